"""Learners of questions, of acts and of authors take texts as users have them, and give texts back."""

import csv
import json

import pytest
import torch
from conftest import experiment_of
from learners import leave_a_checkpoint

import metarun
from metarun.after.later_test import equal
from metarun.after.predict import predict
from metarun.data import pieces
from metarun.data.acts import Acts
from metarun.data.portable import plain, rebuilt
from metarun.data.writing import Lines
from metarun.tasks.authors import Authors
from metarun.tasks.few_shot import Dealt
from metarun.tasks.generation import Generation
from metarun.tasks.questions import questions
from metarun.tasks.text import text

READER = ("task.dataset=toy", "task.shots=3", "task.queries=3", "task.question=8", "task.passage=24")
READER += ("task.longest=4", "task.buckets=8", "model.width=8", "model.layers=1", "eval.adapt_steps=1")
WRITER = ("task.dataset=toy", "task.shots=3", "task.queries=3", "model.width=8", "eval.adapt_steps=1")
TEXT = "Ada was born in Turin. Her mother sang there in 1901."
PAIRS = [
    (TEXT, "Where was Ada born?"),
    (TEXT, "When did her mother sing?"),
    ("Bo sleeps at noon.", "When does Bo sleep?"),
]
ANSWERS = ["Turin", (TEXT.index("1901"), "1901"), [{"text": "noon", "answer_start": 13}, (10, "at noon")]]
SAID = [
    {"actions": [{"act": "CONFIRM", "slot": "place", "values": ["Turin"]}]},
    [("REQUEST", "time", ())],
    [("OFFER", "place", ["Rome", "Bonn"]), ("REQ_MORE", "", [])],
]
UTTERANCES = ["Shall I book Turin?", "At what time?", "There are Rome and Bonn. Anything else?"]


KINDS = {
    "questions": READER,
    "generation": (*WRITER, "task.merges=40", "task.length=24", "task.prompt=12"),
    "authors": (*WRITER, "task.length=24", "model.buckets=16"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Directories of learners by task."""
    root = tmp_path_factory.mktemp("learners")
    for task, sizes in KINDS.items():
        leave_a_checkpoint(experiment_of("algo=maml", f"task={task}", *sizes), root / task)
    return {task: root / task for task in KINDS}


def test_a_users_questions_become_what_the_family_makes_of_them():
    family = questions(dataset="toy", by="file", shots=3, question=8, passage=24, buckets=8)
    pool, name = family.pools["test"], next(iter(family.pools["test"].rarity))
    own = [i for i, item in enumerate(pool.items) if pool.file[item.passage] == name]
    expected = family._part("test", [own], len(own), keep=True, weigh=False)
    pairs = [(pool.passages[pool.items[i].passage].text, pool.items[i].question.text) for i in own]
    # All passages of the file are there, so words are as rare as for the family.
    task = family.converter.task(pairs, [pool.items[i].question.answers for i in own])
    assert task.support.keys() == {"x", "y", "sentence"}
    for leaf, found in task.support.items():
        assert torch.equal(found, expected[leaf][0])
    request, without = task.ask(pairs), family._part("test", [own], len(own), keep=False, weigh=False)
    assert torch.equal(request.data["x"], without["x"][0])
    # Scores that are right give the true answers.
    spans = request.make(lambda x: 100 * without["y"][0], request.data)
    there = without["y"][0].sum((1, 2)) > 0
    for i, answer in enumerate(request.answers(spans)):
        assert not there[i] or answer == pool.items[own[i]].question.answers[0][1]


def test_answers_are_words_of_the_passage_alone_and_together(places):
    reader = metarun.load(places["questions"])
    adapted = reader.adapt(PAIRS, ANSWERS)
    found = adapted.predict(PAIRS)
    assert all(answer and answer in passage for answer, (passage, _) in zip(found, PAIRS, strict=True))
    as_records = [{"context": passage, "question": question} for passage, question in PAIRS]
    assert reader.adapt(as_records, ANSWERS).predict(as_records) == found
    assert adapted.curve.shape == (2,)
    together = reader.adapt_tasks([PAIRS, PAIRS[:2]], [ANSWERS, ANSWERS[:2]]).predict([PAIRS, PAIRS[:1]])
    assert together == [found, reader.adapt(PAIRS[:2], ANSWERS[:2]).predict(PAIRS[:1])]
    assert adapted.task.compared(["turin", "in the 1901", "noon"], adapted.task.answers) == (
        "exact match 66.67 %, F1 88.89 % on their own answers"
    )
    for x, y, sentence in (
        (PAIRS, None, "y must hold an answer"),
        (PAIRS, ["Turin"], "3 questions and y has 1"),
        (PAIRS, ["Rome", "1901", "noon"], "'Rome', which is not in its passage"),
        (PAIRS, ["Turin", (0, "1901"), "noon"], "not where it says"),
        ([TEXT], ["Turin"], r"pairs \(passage, question\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            reader.adapt(x, y)
    with pytest.raises(metarun.UserError, match="no classes"):
        adapted.predict_proba(PAIRS)
    with pytest.raises(metarun.UserError, match="call predict"):
        adapted.sample(2)


def squad(path, answered):
    asked = [{"id": "q1", "question": "Where was Ada born?", "answers": [{"text": "Turin", "answer_start": 16}]}]
    asked += [] if answered else [{"id": "q2", "question": "Who sang?"}]
    path.write_text(json.dumps({"data": [{"title": "Ada", "paragraphs": [{"context": TEXT, "qas": asked}]}]}))
    return path


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_predictions_for_questions_in_files(places, tmp_path):
    support, query, out = squad(tmp_path / "s.json", True), squad(tmp_path / "q.json", False), tmp_path / "out.csv"
    assert predict(places["questions"], support, query, out) == f"2 predictions from 1 examples: {out}"
    assert [row["example"] for row in rows(out)] == ["q1", "q2"]
    assert all(row["prediction"] in TEXT for row in rows(out))
    assert "exact match" in predict(places["questions"], support, support, out)
    assert rows(out)[0]["target"] == "Turin"
    table = tmp_path / "s.csv"
    table.write_text(f"Passage,question,answer\n{TEXT},Where?,Turin\n")
    assert "exact match" in predict(places["questions"], table, table, out)
    with pytest.raises(metarun.UserError, match="y must hold an answer"):
        predict(places["questions"], query, query, out)


def test_a_users_turns_become_what_the_family_makes_of_them():
    family = Generation(dataset="toy", shots=3, queries=3, merges=40, length=24, prompt=12)
    own = family.splits["test"]
    turns = [own.turns[i] for i in range(3)]
    index = torch.arange(3)[None]
    expected = family._part(own, index, None, index)
    for given in (turns, [[action._asdict() for action in turn.actions] for turn in turns]):
        support = family.converter.task(given, [turn.utterance for turn in turns]).support
        for leaf in ("x", "y"):
            assert torch.equal(support[leaf], expected[leaf][0])
    asked = family.converter.task(turns, None).ask([own.turns[3]])
    prompt = family._part(own, torch.tensor([[3]]), None, index)["x"][0, :, : family.columns]
    assert torch.equal(asked.data["x"], prompt)


def test_utterances_say_each_value_once_and_samples_follow_their_seed(places):
    speaker = metarun.load(places["generation"])
    adapted = speaker.adapt(SAID, UTTERANCES)
    said = adapted.predict(SAID)
    request = adapted.task.ask(SAID)

    def ending(x):
        logits = torch.zeros(len(x), 24, speaker.spec.target.outputs)
        logits[..., pieces.BOUNDARY] = 1
        return logits

    # One that would end at once says each value before, and nothing else.
    assert [sorted(text) for text in request.answers(request.make(ending, request.data))] == [
        sorted(text) for text in ("Turin", "", "RomeBonn")
    ]
    assert adapted.sample(SAID, temperature=0) == said
    drawn = [adapted.sample(SAID, seed=seed, temperature=2.0) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert adapted.task.compared(UTTERANCES, UTTERANCES) == "BLEU 100.00 % with their own utterances"
    assert speaker.adapt_tasks([SAID], [UTTERANCES]).predict([SAID]) == [said]
    for x, y, sentence in (
        (SAID, UTTERANCES[:2], "3 turns and y has 2"),
        (SAID, None, "an utterance for each turn"),
        (["hello"], ["hello"], "a list of actions"),
        ([[("REQUEST", "time")]], ["When?"], "an act, a slot and a list of values"),
    ):
        with pytest.raises(ValueError, match=sentence):
            speaker.adapt(x, y)
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        adapted.sample(SAID, temperature=-1)


def test_predictions_for_acts_in_files_need_no_utterance(places, tmp_path):
    def dialogues(path, said):
        turns = [
            {"speaker": "SYSTEM", "frames": [{"service": "Taxi", "actions": one["actions"]}]} | said for one in SAID[:1]
        ]
        path.write_text(json.dumps([{"dialogue_id": "d", "turns": turns}]))
        return path

    support = dialogues(tmp_path / "s.json", {"utterance": UTTERANCES[0]})
    query, out = dialogues(tmp_path / "q.json", {}), tmp_path / "out.csv"
    assert predict(places["generation"], support, query, out) == f"1 predictions from 1 examples: {out}"
    assert rows(out)[0]["example"] == "d:1"
    assert rows(out)[0]["prediction"]
    assert "BLEU" in predict(places["generation"], support, support, out)


def test_an_authors_lines_become_what_the_family_makes_of_them():
    family = Authors(dataset="toy", shots=4, queries=4, length=40)
    shelf = family.shelves["test"]
    own = torch.arange(4)
    expected = family._part(shelf, Dealt(own, own, own, None))
    support = family.converter.task(shelf.texts[:4], None).support
    for leaf in ("x", "y"):
        assert torch.equal(support[leaf], expected[leaf])


def test_lines_begin_as_they_are_told_and_follow_their_seed(places, tmp_path):
    author = metarun.load(places["authors"])
    lines = ["the sea is calm", "the moon lies fair upon the straits"]
    adapted = author.adapt(lines)
    # A text is broken into the same lines.
    assert author.adapt("\n".join(lines)).curve.tolist() == adapted.curve.tolist()
    found = adapted.predict(["the ", ""])
    assert found[0].startswith("the ")
    assert pieces.UNREADABLE not in found[1]
    assert adapted.predict("the ")[0] == found[0]
    drawn = [adapted.sample(3, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 3
    assert all(line.startswith("see ") for line in adapted.sample(["see "] * 2))
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    (tmp_path / "begin.txt").write_text("the\nsea \n")
    out = tmp_path / "out.csv"
    assert "2 predictions from 2" in predict(places["authors"], tmp_path / "lines.txt", tmp_path / "begin.txt", out)
    assert rows(out)[1]["prediction"].startswith("sea ")
    assert "3 predictions" in predict(places["authors"], tmp_path / "lines.txt", None, out, count=3)
    assert [row["prediction"] for row in rows(out)] == drawn[0]
    with pytest.raises(metarun.UserError, match="either --query"):
        predict(places["authors"], tmp_path / "lines.txt", None, out)
    with pytest.raises(ValueError, match="no y besides themselves"):
        author.adapt(lines, lines)
    with pytest.raises(ValueError, match="at least one line"):
        author.adapt([" "])


def test_a_later_test_on_other_sentences_keeps_the_words_of_the_run(tmp_path):
    rows = [f"sentence number {i} of kind{kind},kind{kind}" for kind in range(9) for i in range(3)]
    (tmp_path / "own.csv").write_text("\n".join(["text,label", *rows]))
    sizes = {"shots": 1, "ways": 2, "queries": 1, "buckets": 64}
    run = text(dataset="toy", **sizes)
    converter = rebuilt(plain(run.converter))
    other = text(path=str(tmp_path / "own.csv"), converter=converter, **sizes)
    assert equal(plain(other.spec.inputs), plain(run.spec.inputs))
    pool = other.pools["test"]
    assert torch.equal(pool.rows.long(), run.converter.inputs(pool.texts))
    fitted = text(path=str(tmp_path / "own.csv"), **sizes)
    assert not equal(plain(fitted.spec.inputs), plain(run.spec.inputs))


def test_a_later_test_keeps_the_pieces_of_the_run():
    family = Authors(dataset="toy", shots=4, queries=4, length=40)
    fewer = Lines(pieces.fit(["the sea"], 0), 40)
    again = Authors(dataset="toy", shots=4, queries=4, length=40, converter=fewer)
    assert again.spec.target.outputs == fewer.tokenizer.ids < family.spec.target.outputs
    acts = Acts(fewer.tokenizer, ("INFORM",), 12, 24)
    speaking = Generation(dataset="toy", shots=3, queries=3, length=24, prompt=12, draft="none", converter=acts)
    assert (speaking.converter.tokenizer, speaking.converter.acts) == (acts.tokenizer, acts.acts)
