"""Questions on passages: files, words, spans and their scores, splits, and the reader."""

import json
import re
import string
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA_DIR
from scenarios import generator, sampled
from torch.func import vmap

from metarun.algos.agnostic.maml import maml
from metarun.algos.baselines.reference import reference
from metarun.algos.dependent.shared_params import shared_params
from metarun.data import squad
from metarun.data.files import json_of
from metarun.data.passages import (
    FEATURES,
    PASSAGE,
    QUESTION,
    Lexicon,
    Rarity,
    joined,
    normalised,
    sentences_of,
    words_of,
)
from metarun.engine.batch import meta_gradient
from metarun.errors import UserError
from metarun.models.reader import Reader
from metarun.targets.scoring import loss_of
from metarun.targets.span import Span, Spans, best_spans, compared
from metarun.tasks.questions import questions


def tiny(**keys):
    """Questions of toy languages, in short passages."""
    return questions(**{"dataset": "toy", "shots": 3, "queries": 4, "question": 8, "passage": 48, "buckets": 8, **keys})


# Files


def article(text="The cat sat. It ate a fish.", answer="a fish", start=20, title="Cats", **changes):
    asked = {
        "id": "q1",
        "question": "What did it eat?",
        "answers": [{"text": answer, "answer_start": start}],
        **changes,
    }
    return {"title": title, "paragraphs": [{"context": text, "qas": [asked]}]}


def without(record, key):
    return {name: value for name, value in record.items() if name != key}


BROKEN = {
    "an answer that is not in the passage": (
        [article(answer="a bird")],
        "question 1 (q1), answer 1 is 'a bird', which",
    ),
    "an answer that is elsewhere": (
        [article(start=3)],
        "'a fish', which is not at answer_start 3; the first such place is 20",
    ),
    "an answer without a place": ([article(start=None)], "which is not at answer_start None"),
    "an empty answer": ([article(answer="")], "answer 1 has no text"),
    "a question without answers": ([article(answers=[])], "paragraph 1, question 1 (q1) has no answer; give one"),
    "a question without words": ([article(question=" ")], "question 1 (q1) has no question"),
    "no questions": (
        [{"title": "Cats", "paragraphs": [{"context": "A cat.", "qas": []}]}],
        "no question with an answer",
    ),
    "a paragraph without a list of questions": (
        [{"title": "Cats", "paragraphs": [{"context": "A cat."}]}],
        "has no qas",
    ),
    "an empty passage": ([article(text="")], "article 1 (Cats), paragraph 1 has no context"),
    "an article without a title": ([article(), without(article(), "title")], "article 2, has no title; name it"),
    "an article without paragraphs": ([{"title": "Cats"}], "article 1 (Cats) has no paragraphs"),
    "two articles of one title": ([article(), article()], "article 2 (Cats), has the title of an earlier article"),
    "an empty language": ([], "no question with an answer; add some, or leave the file out"),
    "another format": ({"rows": 1}, "has no data; write"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_gets_one_sentence_that_names_the_place(kind, tmp_path):
    content, words = BROKEN[kind]
    path = tmp_path / "xquad.en.json"
    path.write_text(json.dumps({"data": content} if isinstance(content, list) else content))
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        questions(path=str(path))
    said = str(refused.value)
    assert str(path) in said
    assert said.endswith(".")
    assert "\n" not in said


def test_files_that_are_no_text_are_named(tmp_path):
    good = json.dumps({"data": [article()]}, indent=1)
    path = tmp_path / "xquad.en.json"
    path.write_text(good[:120])
    with pytest.raises(UserError, match=r"xquad.en.json, line \d+, column \d+, is not JSON .* cut off"):
        squad.read(path)
    path.write_bytes(good.replace("The cat", "Le café").encode("latin-1"))
    with pytest.raises(UserError, match="line 7, is not text in UTF-8"):
        squad.read(path)
    (tmp_path / "squad.en.json").write_text(good)
    with pytest.raises(UserError, match="are both named en; rename one"):
        questions(path=str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no \.json"):
        questions(path=str(tmp_path / "empty"))


def own_file(folder, sizes, name="squad.en.json"):
    """A file with articles of so many questions."""
    articles = []
    for number, size in enumerate(sizes):
        text = " ".join([*(f"Name{i} has thing{i}." for i in range(size)), f"Story{number} ends."])
        asked = []
        for i in range(size):
            answers = [{"text": f"thing{i}", "answer_start": text.index(f"thing{i}")}]
            asked.append({"id": f"{number}-{i}", "question": f"What has Name{i}?", "answers": answers})
        articles.append({"title": f"article {number}", "paragraphs": [{"context": text, "qas": asked}]})
    (folder / name).write_text(json.dumps({"data": articles}))


def test_half_a_character_is_read_as_an_unknown_one(tmp_path):
    content = json.dumps({"data": [article(text="A \ud83d cat. It ate a fish.", start=16, question="What? \ud83d")]})
    (tmp_path / "a.json").write_text(content)
    passage = squad.read(tmp_path / "a.json")[0].passages[0]
    assert (passage.text, passage.questions[0].text) == ("A \ufffd cat. It ate a fish.", "What? \ufffd")
    assert json_of('["\\ud83d\\ude00"]') == ["\U0001f600"]


def test_too_few_articles_or_questions_are_named(tmp_path, caplog):
    own_file(tmp_path, [4, 4])
    with pytest.raises(UserError, match="has 2 articles, and each of the three splits needs one"):
        questions(path=str(tmp_path))
    own_file(tmp_path, [4, 4, 4, 4])
    with pytest.raises(UserError, match=r"no train task has 5 questions, .*en: article \d \(4\): lower task.shots"):
        questions(path=str(tmp_path), shots=4)
    with pytest.raises(UserError, match="has no file de; it has en"):
        questions(path=str(tmp_path), shots=2, test_files=["de"])
    own_file(tmp_path, [4] * 12 + [1])
    with caplog.at_level("INFO"):
        questions(path=str(tmp_path), shots=2)
    assert "tasks with fewer than 3 questions are left out: en: article 12 (1)." in caplog.text


def test_no_passage_of_a_test_is_trained_on_and_no_question_is_asked_twice(tmp_path, caplog):
    own_file(tmp_path, [3] * 12)
    file = next(tmp_path.glob("*.json"))
    content = json.loads(file.read_text())
    text = "Everybody has seen the red house."
    asked = [{"question": f"What colour {i % 3}?", "answers": [{"text": "red", "answer_start": 23}]} for i in range(6)]
    asked[0]["answers"] = [{"text": "seen", "answer_start": 14}]
    for record in content["data"]:
        record["paragraphs"].append({"context": text, "qas": asked})
    file.write_text(json.dumps(content))
    with caplog.at_level("INFO"):
        family = questions(path=str(tmp_path), shots=2)
    holding = {split for split, pool in family.pools.items() for p in pool.passages if p.text == text}
    assert holding == {"test"}
    assert "6 passages of training or validation are copies of later splits' and are left out." in caplog.text
    first, *others = (item.question for item in family.pools["test"].items if item.question.text == "What colour 0?")
    assert first.answers == ((14, "seen"), (23, "red"))
    assert len(others) == len(family.pools["test"].groups) - 1


def test_titles_that_differ_in_case_alone_are_warned_of(tmp_path, caplog):
    own_file(tmp_path, [3] * 12)
    file = next(tmp_path.glob("*.json"))
    (tmp_path / "squad.de.json").write_text(file.read_text().replace("article 3", "Article 3"))
    questions(path=str(tmp_path), shots=2)
    assert "'Article 3' and 'article 3' are different articles, which may be in different splits" in caplog.text


def test_a_language_that_is_tested_is_not_trained_on_unless_it_is_named(tmp_path):
    for language in ("de", "en", "fr", "ru"):
        own_file(tmp_path, [4, 4, 4], f"squad.{language}.json")

    def languages(**keys):
        found = questions(path=str(tmp_path), shots=2, by="file", **keys)
        return {split: set(pool.file) for split, pool in found.pools.items()}

    assert languages(test_files=["de"]) == {"train": {"en", "fr", "ru"}, "val": {"en", "fr", "ru"}, "test": {"de"}}
    assert languages(test_files=["de"], val_files=["en"])["train"] == {"fr", "ru"}
    assert languages(test_files=["de"], train_files=["de", "en"])["train"] == {"de", "en"}


def test_questions_without_an_answer_are_left_out(tmp_path):
    path = tmp_path / "a.json"
    record = article()
    record["paragraphs"][0]["qas"].append({"id": "q2", "question": "Why?", "is_impossible": True, "answers": []})
    path.write_text(json.dumps({"data": [record]}))
    assert [question.id for question in squad.read(path)[0].passages[0].questions] == ["q1"]


# Words and sentences


def test_words_sentences_and_what_answers_are_compared_by():
    def shown(text):
        return [text[word.start : word.end] for word in words_of(text)]

    assert shown('He paid $1,200.50 ("well-known") in the U.S.') == (
        ["He", "paid", "$", "1,200.50", "(", '"', "well-known", '"', ")", "in", "the", "U.S", "."]
    )
    assert shown("SI磁通量。") == ["SI", "磁", "通", "量", "。"]
    assert shown("ที่นี่") == ["ที่", "นี่"]
    assert normalised("The U.S., a Well-Known (24–10) win") == ("us", "wellknown", "24–10", "win")
    assert normalised("1943 年") == ("1943", "年")
    text = "Dr. No met J.R.R. Tolkien? Yes! 24.5 km…  End"
    assert sentences_of(text, words_of(text))[-1] == 5
    thai = "ก" * 60 + " " + "ข" * 60 + " " + "ค" * 5
    assert set(sentences_of(thai, words_of(thai))) == {0, 1}


def test_a_long_passage_keeps_what_has_most_of_the_question():
    lexicon = Lexicon(4)
    text = "One two three four. Zebras eat grass here. Five six seven eight. Zebras sleep. Nine ten eleven."
    passage, question = lexicon.text(text), lexicon.text("Where do zebras eat grass?")
    pair = joined(question, passage, lexicon, Rarity([passage]), (4, 12))
    kept = [text[passage.words[i].start : passage.words[i].end] if i >= 0 else "" for i in pair.word]
    # The first sentence fills what is left, as it comes before others that have as little.
    assert kept == ["One", "two", "", "Zebras", "eat", "grass", "here", ".", "", "Zebras", "sleep", "."]
    assert pair.numbers[:4, QUESTION].tolist() == [1.0] * 4
    assert pair.numbers[4:, PASSAGE].tolist() == [float(word != "") for word in kept]
    both = dict(zip(kept, pair.numbers[4:, FEATURES.index("occurs in both")].tolist(), strict=True))
    assert (both["grass"], both["eat"], both["here"], both[""]) == (1.0, 1.0, 0.0, 0.0)
    whole = joined(question, passage, lexicon, Rarity([passage]), (4, 12), keep=[2])
    assert "seven" in [text[passage.words[i].start : passage.words[i].end] for i in whole.word if i >= 0]


# Spans


def official(prediction, answers):
    """F1 and exact match as in evaluate-v1.1 of SQuAD, written from its description."""

    def words(text):
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    best_f1 = best_exact = 0.0
    for answer in answers:
        ours, theirs = words(prediction), words(answer)
        same = sum((Counter(ours) & Counter(theirs)).values())
        f1 = 2 * same / (len(ours) + len(theirs)) if same else 0.0
        best_f1, best_exact = max(best_f1, f1), max(best_exact, float(" ".join(ours) == " ".join(theirs)))
    return best_f1, best_exact


PASSAGES = {
    "The U.S. beat the 24–10 team, a team of an old, old state (the old one).": (
        "old, old state",
        "the old one",
        "team",
    ),
    "It's the well-known 'Theory' — an a-b test; The end.": ("the Theory", "A test", "well-known Theory"),
    "a an the, the.": ("the", "An"),
}


@pytest.mark.parametrize("text", PASSAGES)
def test_scores_equal_the_official_evaluation(text):
    """Of every span of a passage: the words of a prediction are joined by spaces."""
    answers, lexicon = PASSAGES[text], Lexicon(2)
    own = lexicon.text(text)
    count = len(own.words)
    start, end = torch.triu_indices(count, count)
    gold = [lexicon.tokens(answer) for answer in answers] + [[]]
    width = max(map(len, gold)) + 2
    data = {
        "y": torch.zeros(1, dtype=torch.float64),
        "token": torch.from_numpy(own.token)[None].expand(len(start), -1),
        "sentence": torch.from_numpy(own.sentence)[None].expand(len(start), -1),
        "gold": torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in gold]).expand(len(start), -1, -1),
        "right": torch.tensor([*[0] * len(answers), -1]).expand(len(start), -1),
    }
    found = compared(Spans(start, end), data, count)
    for i, (first, last) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        prediction = " ".join(text[word.start : word.end] for word in own.words[first : last + 1])
        assert (found.f1[i].item(), found.exact[i].item()) == pytest.approx(official(prediction, answers)), prediction


def test_the_best_span_equals_a_search():
    torch.manual_seed(0)
    output, longest = torch.randn(40, 9, 2), 4
    sentence = torch.where(torch.rand(40, 9) < 0.2, -1, 0)
    sentence[:, 0] = 0
    spans = best_spans(output, sentence, longest)
    for i in range(40):
        allowed = [
            (first, last)
            for first in range(9)
            for last in range(first, min(first + longest, 9))
            if (sentence[i, first : last + 1] >= 0).all()
        ]
        best = max(allowed, key=lambda span: output[i, span[0], 0] + output[i, span[1], 1])
        assert (spans.start[i].item(), spans.end[i].item()) == best


def test_outputs_that_are_not_finite_answer_nothing():
    family = tiny()
    data = family.sample("test", 1, generator()).query
    data = {name: leaf[0] for name, leaf in data.items()}
    perfect = 10 * data["y"]
    assert all(score == 1 for score in family.target.scores(perfect, data).values())
    broken = perfect.clone()
    broken[:2] = torch.nan
    assert all(score == 0.5 for score in family.target.scores(broken, data).values())
    with pytest.raises(ValueError, match="longest must be at least 1"):
        Span(longest=0)


# Tasks


def test_articles_and_languages_of_the_splits_differ():
    family = tiny(by="file", shots=5)
    titles = {split: {passage.text for passage in pool.passages} for split, pool in family.pools.items()}
    files = {split: set(pool.file) for split, pool in family.pools.items()}
    assert not files["train"] & files["test"]
    assert not files["train"] & files["val"]
    assert not titles["train"] & titles["test"]
    of_article = tiny()
    ids = {split: {item.question.id for item in pool.items} for split, pool in of_article.pools.items()}
    assert not ids["train"] & ids["test"]
    assert set(of_article.pools["train"].file) == set(of_article.pools["test"].file)


def test_tasks_do_not_depend_on_what_was_drawn_before():
    """Or else runs on the same test tasks would not be known as such."""
    fresh, used = tiny(), tiny()
    used.sample("train", 2, generator(5))
    torch.testing.assert_close(
        *(family.sample("test", 2, generator(1)).query for family in (fresh, used)), rtol=0, atol=0
    )


def test_targets_mark_the_answer_and_support_and_query_differ():
    family = tiny(queries=30)
    task = family.sample("test", 3, generator(1))
    pool = family.pools["test"]
    for part in task[:2]:
        for i, j in (part["weight"] > 0).nonzero().tolist():
            number = int(part["number"][i, j])
            item, word = pool.items[number], family._leaves("test", number, False).word
            text = pool.texts[item.passage]
            first, last = (int(word[part["y"][i, j, :, k].argmax()]) for k in range(2))
            assert text.text[text.words[first].start : text.words[last].end] == item.question.answers[0][1]
            assert part["y"][i, j].sum() == 2
    assert not set(task.support["number"].flatten().tolist()) & set(task.query["number"][0].tolist())
    assert (task.query["weight"].sum(1) == 25 - 3).all()
    assert not task.query["y"][task.query["weight"] == 0].any()


def test_padded_words_and_questions_change_nothing(tmp_path):
    torch.manual_seed(0)
    own_file(tmp_path, [6] * 6)
    keys = {"dataset": "auto", "path": str(tmp_path), "shots": 2}
    short, long = tiny(queries=4, **keys), tiny(queries=7, question=13, passage=60, **keys)
    model = Reader(short.spec, width=8, dropout=0.0)
    other = Reader(long.spec, width=8, dropout=0.0)
    other.load_state_dict(model.state_dict())
    for build in (lambda m, f: maml(m, 0.1), lambda m, f: shared_params(m, f.spec)):
        found = []
        for family, own in ((short, model), (long, other)):
            algorithm = build(own, family)
            tasks = sampled(family, "train", 2, generator(3))
            found.append(meta_gradient(algorithm, algorithm.init(generator()), tasks, loss_of(family)))
        assert "weight" not in sampled(short, "train", 2, generator(3)).query
        torch.testing.assert_close(found[0].loss, found[1].loss)
        torch.testing.assert_close(found[0].scores, found[1].scores)
        torch.testing.assert_close(found[0].grads, found[1].grads, atol=1e-5, rtol=1e-4)


def test_scores_of_all_tasks_together_weigh_questions_equally():
    family = tiny(queries=30)
    task = family.sample("test", 4, generator())
    predict = lambda x: torch.zeros(*x.shape[:-2], 48, 2)  # noqa: E731
    counts = vmap(lambda one: family.pooled.counts(predict, one))(task._replace(seed=torch.zeros(4)))
    each = []
    for i, y in enumerate(task.query["y"]):
        data = {name: leaf[i] for name, leaf in task.query.items()}
        each.append(torch.stack(list(family.target.scores(torch.zeros_like(y), data).values())))
    each = torch.stack(each)
    expected = (each * task.query["weight"].sum(1, keepdim=True)).sum(0) / task.query["weight"].sum()
    assert list(family.pooled.scores(counts).values()) == pytest.approx(expected.tolist())


def test_samples_show_the_words_of_answers():
    family = tiny()
    task = sampled(family, "test", 2, generator())
    spans = vmap(lambda one: family.samples.make(lambda x: one.query["y"], one))(task)
    shown = family.samples.show({"after": spans}, task)
    answers = re.findall("- answer: (.*)", shown)
    assert len(answers) == 6
    assert answers == re.findall("- after adaptation: (.*)", shown)


def test_the_reference_finds_sentences_without_learning():
    family = tiny(shots=1, queries=10)
    algorithm = reference(family.spec)
    task = family.sample("test", 10, generator())
    scores = vmap(lambda data: family.target.scores(algorithm.predict({}, {}, data["x"]), data))(task.query)
    assert scores["right-sentence"].mean() > 0.9  # by chance one of four


@pytest.mark.usefixtures("float64")
def test_maml_equals_an_autograd_loop():
    """The reader and the loss written out, one question after the other."""
    torch.manual_seed(0)
    family = tiny(queries=30)
    model = Reader(family.spec, width=6, layers=2, reach=1, dropout=0.0)
    algorithm = maml(model, 0.2, 2)
    theta, tasks = algorithm.init(generator()), sampled(family, "train", 2, generator(1))
    found = meta_gradient(algorithm, theta, tasks, loss_of(family)).grads["weights"]
    assert "weight" in tasks.query

    def convolved(x, w, name, spacing):
        kernel = w[f"{name}.map.weight"].view(6, 3, -1).permute(0, 2, 1)
        return F.conv1d(x.T[None], kernel, w[f"{name}.map.bias"], padding=spacing, dilation=spacing)[0].T

    def output(w, x):
        asked, passage = x[:8], x[8:]
        there = passage[:, 1] == 1
        q = convolved(asked, w, "trunk.asked", 1).relu()
        real = asked[:, 0] == 1
        a = F.linear(q[real], w["trunk.attention.weight"], w["trunk.attention.bias"]).softmax(0)
        mean = (a * q[real]).sum(0)
        scale, shift = F.linear(mean, w["trunk.condition.weight"], w["trunk.condition.bias"]).split(6)
        h = ((1 + scale) * F.linear(passage, w["trunk.words.weight"], w["trunk.words.bias"]) + shift).relu()
        h = h * there[:, None]
        for i in range(2):
            h = h + convolved(h, w, f"trunk.windows.{i}", 1 + 2 * i).relu()
            h = F.layer_norm(h, (6,), w[f"trunk.norms.{i}.weight"], w[f"trunk.norms.{i}.bias"]) * there[:, None]
        return F.linear(h, w["head.weight"], w["head.bias"])[there]

    def loss(w, data):
        total, count = 0.0, 0
        for i in range(len(data["x"])):
            if data["weight"][i] == 0:
                continue
            logits = output(w, data["x"][i])
            places = data["y"][i].argmax(0)
            total = total + sum(F.cross_entropy(logits[:, k], places[k]) for k in range(2)) / 2
            count += 1
        return total / count

    leaves = {name: w.clone().requires_grad_() for name, w in theta["weights"].items()}
    total = 0.0
    for t in range(2):
        support, query = ({name: leaf[t] for name, leaf in part.items()} for part in tasks[:2])
        fast = dict(leaves)
        for _ in range(2):
            slope = torch.autograd.grad(loss(fast, support), list(fast.values()), create_graph=True)
            fast = {name: w - 0.2 * g for (name, w), g in zip(fast.items(), slope, strict=True)}
        total = total + loss(fast, query) / 2
    expected = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    for name in expected:
        assert (found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-3) < 1e-9, name


@pytest.fixture
def xquad():
    if not squad.is_there(str(DATA_DIR)):
        pytest.skip("XQuAD is not in METARUN_DATA_DIR/xquad")
    return DATA_DIR / "xquad"


@pytest.mark.parametrize(("language", "exact"), [("en", 0.96), ("zh", 0.96)])
def test_the_answers_of_xquad_are_spans_of_words(xquad, language, exact):
    """How often the words that cover an answer match it exactly: the most that a reader can reach."""
    found = []
    for one in squad.read(xquad / f"xquad.{language}.json")[:12]:
        for passage in one.passages:
            words = words_of(passage.text)
            for question in passage.questions:
                start, answer = question.answers[0]
                inside = [word for word in words if word.start < start + len(answer) and word.end > start]
                shown = " ".join(passage.text[word.start : word.end] for word in inside)
                found.append(normalised(shown) == normalised(answer))
    assert np.mean(found) > exact


def test_bad_keys_are_refused():
    for key in ("shots", "queries", "train_shots", "passage", "question", "longest", "buckets"):
        with pytest.raises(ValueError, match=f"{key} must be at least 1"):
            tiny(**{key: 0})
    with pytest.raises(ValueError, match="shares must be above 0"):
        tiny(shares=(1.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="path and dataset=toy are two data sets"):
        tiny(path="somewhere")
    for key in ("width", "layers", "reach"):
        with pytest.raises(ValueError, match=f"{key} must be at least 1"):
            Reader(tiny().spec, **{key: 0})
    with pytest.raises(ValueError, match="dropout must be from 0"):
        Reader(tiny().spec, dropout=1.0)
