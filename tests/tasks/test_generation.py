"""Acts to utterances: placeholders, slot errors, halves of dialogues, scores of all texts, and broken files."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import DATA_DIR
from scenarios import generator, sampled

from metarun.data import dialogues, responses
from metarun.data.dialogues import Action, Prompts, Turn, filled, slot_errors
from metarun.data.pieces import symbol
from metarun.errors import UserError
from metarun.targets.bleu import bleu, bleu_counts
from metarun.targets.decoding import written
from metarun.tasks.generation import METRICS, Generation

ONE, TWO, THREE = map(symbol, range(3))
BOOKED = Turn(
    "Hotels",
    "1",
    (
        Action("CONFIRM", "city", ("New York",)),
        Action("CONFIRM", "has_wifi", ("True",)),
        Action("CONFIRM", "hotel_name", ("York",)),
        Action("OFFER_INTENT", "intent", ("BookHouse",)),
    ),
    "Shall I book the York hotel in New York, not in Yorkshire?",
)


def toy(**keys):
    return Generation(
        **{
            "dataset": "toy",
            "shots": 3,
            "queries": 4,
            "merges": 60,
            "length": 16,
            "prompt": 8,
            "draft": "none",
            "once": False,
            **keys,
        }
    )


def test_values_are_placeholders_in_prompts_and_texts_and_filled_in_again():
    assert BOOKED.values == ["New York", "York"]
    assert BOOKED.text == f"shall i book the {TWO} hotel in {ONE}, not in yorkshire?"
    assert filled(BOOKED.text, BOOKED.values).lower() == BOOKED.utterance.lower()
    known = Prompts(["CONFIRM"])
    act = known.acts["CONFIRM"]
    assert (
        known.of(BOOKED) == f"{act} city {ONE}{act} has wifi true{act} hotel name {TWO}offer intent intent book house"
    )


def test_slot_errors_are_missing_and_redundant_values():
    assert slot_errors(BOOKED.text, BOOKED) == (0, 2)
    assert slot_errors(f"{ONE} or {ONE}?", BOOKED) == (2, 2)
    # A value in the words of the model is said too, and one that the turn does not have is too many.
    assert slot_errors(f"the york in new york {THREE}", BOOKED) == (1, 2)


def test_answers_without_learning():
    other = Turn("Hotels", "2", (Action("CONFIRM", "hotel_name", ("Ritz",)),), "So the Ritz?")
    same = BOOKED._replace(utterance="Do you want York of New York?")
    assert responses.nearest(BOOKED, [other, same]) == f"do you want {TWO} of {ONE}?"
    assert responses.same_or_template(other, [BOOKED]) == f"please confirm the hotel name {ONE}."
    # A support turn says its own value where it has one that the turn lacks.
    assert responses.nearest(other, [BOOKED]) == f"shall i book the {ONE} hotel in new york, not in yorkshire?"


def test_support_and_query_turns_are_of_different_dialogues_of_one_service():
    family = toy(shots=[2, 3])
    turns = family.splits["test"].turns
    tasks = sampled(family, "test", 10, generator())
    for i in range(10):
        support = [turns[j] for j in tasks.support["turn"][i][tasks.support["weight"][i] > 0].tolist()]
        query = [turns[j] for j in tasks.query["turn"][i].tolist()]
        assert len({turn.service for turn in support + query}) == 1
        assert {turn.service for turn in query} == {family.splits["test"].names[tasks.query["unit"][i][0]]}
        assert not {turn.dialogue for turn in support} & {turn.dialogue for turn in query}
        assert len(support) in (2, 3)
    own = {split: set(services.names) for split, services in family.splits.items()}
    assert sum(map(len, own.values())) == len(set.union(*own.values()))
    ids = tasks.query["x"][0][:, family.columns + 1 :]
    assert torch.equal(ids, tasks.query["y"][0][:, :-1])


@pytest.mark.parametrize("draft", ["nearest", "template"])
def test_a_prompt_ends_with_a_draft_made_from_the_other_support_turns(draft):
    family = toy(draft=draft)
    answer = {"nearest": responses.nearest, "template": responses.same_or_template}[draft]
    tasks, turns = sampled(family, "test", 3, generator()), family.splits["test"].turns
    for i in range(3):
        shown = tasks.support["turn"][i].tolist()
        for part in (tasks.support, tasks.query):
            for row, ids in zip(part["turn"][i].tolist(), part["x"][i].tolist(), strict=True):
                draft = answer(turns[row], [turns[other] for other in shown if other != row])
                expected = [1, *family.tokenizer.encoded(draft)[:15], 1]
                acts = family.splits["test"].prompts[row]
                assert ids[: family.columns] == [*acts, *expected] + [0] * (family.columns - len(acts + expected))


def test_the_texts_of_all_tasks_are_scored_together():
    """A learner that says what was really said has BLEU 1 and no slot error; the others have those of their texts."""
    family = toy()
    tasks = sampled(family, "test", 5, generator())
    counts = torch.cat([tasks.query["y"].flatten(1), tasks.query["turn"], tasks.support["turn"]], 1)
    scores = family.pooled.scores(counts)
    assert list(scores) == [metric.name for metric in METRICS]
    assert scores["bleu"] == pytest.approx(1.0)
    assert scores["slot-error-rate"] == 0.0
    turns, total = family.splits["test"].turns, 0
    for asked, shown in zip(tasks.query["turn"].tolist(), tasks.support["turn"].tolist(), strict=True):
        support = [turns[j] for j in shown]
        for turn in (turns[j] for j in asked):
            text = filled(responses.nearest(turn, support), turn.values)
            total = total + np.array(bleu_counts(text, turn.utterance), dtype=float)
    assert scores["nearest-bleu"] == pytest.approx(bleu(total))
    assert scores["bleu-above-nearest"] == pytest.approx(1 - bleu(total))


def test_counts_are_what_a_learner_writes():
    family = toy()
    task = sampled(family, "test", 1, generator())
    task = task._replace(
        **{part: {n: leaf[0] for n, leaf in getattr(task, part).items()} for part in ("support", "query")}
    )
    sure = torch.full((16, family.tokenizer.ids), -1e9)
    sure[torch.arange(16), torch.arange(16) + 3] = 0.0
    counts = family.pooled.counts(lambda x: sure.expand(len(x), -1, -1), task)
    assert counts[: 4 * 16].view(4, 16).tolist() == [list(range(3, 19))] * 4
    assert counts[4 * 16 :].tolist() == task.query["turn"].tolist() + task.support["turn"].tolist()


def test_schema_guided_dialogue():
    """The services of the test split that no other has, as Rastogi et al. list them, and no value is lost."""
    if not dialogues.is_there(str(DATA_DIR)):
        pytest.skip("sgd_subset is not in METARUN_DATA_DIR")
    turns, _ = dialogues.read(dialogues.FOLDER, str(DATA_DIR))
    parts = dialogues.by_service(turns, "sgd")
    assert sorted(parts["test"]) == [
        *("Buses_3", "Events_3", "Flights_4", "Homes_2", "Media_3", "Movies_3", "Music_3", "Payment_1"),
        *("RentalCars_3", "Trains_1"),
    ]
    for turn in (turn for own in parts["test"].values() for turn in own):
        assert filled(turn.text, turn.values).lower() == turn.utterance.lower()
        assert slot_errors(turn.text, turn)[0] <= 1


def dialogue(name, service, turns=6):
    def entry(i):
        action = {"act": "INFORM", "slot": "time", "values": [f"{i} pm"]}
        frame = {"service": service, "actions": [action], "slots": [{"slot": "time", "start": 6, "exclusive_end": 10}]}
        return {"speaker": "SYSTEM", "utterance": f"It is {i} pm now.", "frames": [frame]}

    user = {"speaker": "USER", "utterance": "Hello", "frames": []}
    return {"dialogue_id": name, "turns": [turn for i in range(turns) for turn in (user, entry(i + 1))]}


def corpus(services="abcdef", dialogues=4):
    return [dialogue(f"{service}{i}", service) for service in services for i in range(dialogues)]


def test_a_folder_of_the_user(tmp_path):
    (tmp_path / "all.json").write_text(json.dumps(corpus()))
    family = Generation(path=str(tmp_path), shots=2, queries=3, merges=5, length=8, prompt=4)
    assert sorted(name for own in family.splits.values() for name in own.names) == list("abcdef")
    assert family.splits["test"].turns[0].text == f"it is {ONE} now."


def broken(change):
    found = corpus()
    change(found[1]["turns"][3])
    return json.dumps(found)


BROKEN = {
    "There is no .*nowhere": None,
    "has no JSON file of dialogues": "",
    r"all.json, line 1, column \d+, is not JSON .* cut off": json.dumps(corpus())[:700],
    "all.json, line 2, is not text in UTF-8": b'[\n"\xe4"]',
    "must hold a list of dialogues": '{"turns": []}',
    r"dialogue 0 \(counted from 0\), has no list of \"turns\"": '[{"dialogue_id": "x"}]',
    r"dialogue a1, turn 3 .* marks 't is' as a value": broken(
        lambda t: t["frames"][0]["slots"][0].update(start=1, exclusive_end=5)
    ),
    "dialogue a1, turn 3 .* has an action without": broken(lambda t: t["frames"][0]["actions"][0].pop("act")),
    "dialogue a1, turn 3 .* lacks": broken(lambda t: t.pop("utterance")),
    "dialogue a1, turn 3 .* has no action": broken(lambda t: t["frames"][0].update(actions=[])),
    "No service of .* has 2 support and 3 query turns .*: [a-f] .6.": json.dumps(corpus(dialogues=1)),
    "has no service for": json.dumps(corpus("ab")),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_broken_files_get_one_sentence(tmp_path, sentence):
    content = BROKEN[sentence]
    if content:
        (tmp_path / "all.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    path = tmp_path if content is not None else tmp_path / "nowhere"
    with pytest.raises(UserError, match=sentence) as error:
        Generation(path=str(path), shots=2, queries=3, merges=5, length=8, prompt=4)
    assert str(error.value).count("\n") == 0


def test_sizes_out_of_range_are_refused():
    for keys in ({"queries": 0}, {"length": 1}, {"prompt": 0}, {"merges": -1}, {"temperature": 0.0}, {"path": "x"}):
        with pytest.raises(ValueError, match=next(iter(keys))):
            toy(**keys)


def test_what_is_written_is_said_if_it_is_likelier_than_the_draft():
    family = toy(draft="template", margin=0.3)
    query = {name: leaf[0] for name, leaf in sampled(family, "test", 1, generator(2)).query.items()}
    table = 0.5 * torch.randn(family.tokenizer.ids, family.tokenizer.ids, generator=generator(3))
    # Only the drafts of the first two turns are likely.
    for token, following in ((t, f) for row in query["draft"][:2].tolist() for t, f in pairwise([1, *row]) if f):
        table[token, following] += 3

    def predict(x):
        return table[x[:, family.columns :]]

    own = written(predict, query["x"][:, : family.columns], family.length)
    said = family._said(predict, query)
    kept = []
    for turn in range(len(said)):
        nats = []
        for text in (own[turn].tolist(), query["draft"][turn].tolist()):
            text = text[: text.index(1) + 1] if 1 in text else text
            steps = [-table[a].log_softmax(0)[b] for a, b in pairwise([1, *text])]
            nats.append(sum(steps) / len(steps))
        kept.append(bool(nats[1] - nats[0] >= 0.3))
        text = (own if kept[-1] else query["draft"])[turn].tolist()
        assert family.tokenizer.decoded(said[turn].tolist()) == family.tokenizer.decoded(text)
    assert set(kept) == {True, False}
    assert toy(draft="template").margin is None
