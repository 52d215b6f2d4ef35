"""Tokens, pools and published splits of sentences."""

import json
import logging
import math
import unicodedata

import pytest
import torch
from conftest import DATA_DIR
from scenarios import generator

from metarun.algos.agnostic.maml import maml
from metarun.algos.baselines.centroid import centroid
from metarun.algos.dependent.protonet import protonet
from metarun.data import intents, tokens
from metarun.data.lines import lines_of
from metarun.data.passages import Lexicon
from metarun.data.toy_text import toy_classes, toy_languages
from metarun.engine.batch import evaluate, meta_gradient
from metarun.errors import UserError
from metarun.models.text import TextEmbedding
from metarun.targets.scoring import loss_of
from metarun.tasks.text import _parallel_splits, text, text_crosslingual
from metarun.tree import leaves


def real(name):
    if not intents.is_there(str(DATA_DIR), name):
        pytest.skip(f"{name} is not in METARUN_DATA_DIR")
    return str(DATA_DIR)


def test_words_and_character_grams():
    assert tokens.words("What's my ETA, bot?") == ["what", "'", "s", "my", "eta", ",", "bot", "?"]
    # As CountVectorizer(analyzer="char_wb", ngram_range=(3, 5)) of scikit-learn 1.7 has it.
    assert tokens.grams_of("ab", (3, 5)) == [" ab", "ab ", " ab "]
    assert tokens.grams_of("cde", (3, 5)) == [" cd", "cde", "de ", " cde", "cde ", " cde "]
    assert tokens.grams_of("a", (3, 5)) == [" a "]


def test_words_keep_their_marks_and_do_not_depend_on_how_accents_are_written():
    assert tokens.words("हिन्दी में") == ["हिन्दी", "में"]
    assert tokens.words("İstanbul, می‌خواهم") == ["i̇stanbul", ",", "می‌خواهم"]
    assert tokens.words("❤\ufe0fhello") == ["❤", "\ufe0f", "hello"]
    composed, apart = (unicodedata.normalize(form, "Un café déjà fermé") for form in ("NFC", "NFD"))
    assert composed != apart
    tokenizer = tokens.fit([composed, composed], 64, (3, 5))
    assert (tokenizer([composed]) == tokenizer([apart])).all()
    assert tokens.looks_of(composed, True) == tokens.looks_of(apart, True)
    lexicon = Lexicon(8)
    assert (lexicon.text(composed).gram == lexicon.text(apart).gram).all()
    assert lines_of([apart], 63) == [composed]


def test_texts_that_differ_in_what_tokens_cannot_tell_apart_are_copies(tmp_path, caplog):
    rows = [f"text number {i},c{i % 8}" for i in range(64)]
    for i in range(8):
        rows += [unicodedata.normalize("NFC", f"café {i},c0"), unicodedata.normalize("NFD", f"Café  {i},c1")]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]))
    with caplog.at_level(logging.INFO):
        family = text(path=str(tmp_path / "rows.csv"), ways=2, queries=1)
    assert "8 sentences are copies of others" in caplog.text
    assert sum(len(pool.texts) for pool in family.pools.values()) == 72


def test_labels_that_differ_in_case_alone_are_warned_of(tmp_path, caplog):
    rows = [
        f"text number {i},{'Refund' if i % 16 == 8 else f'class {i % 8}' if i % 8 else 'refund'}" for i in range(64)
    ]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]))
    text(path=str(tmp_path / "rows.csv"), ways=2, queries=1)
    assert "'Refund' and 'refund' are different classes, which may be in different splits" in caplog.text


def test_the_vocabulary_is_of_training_and_unknown_words_still_equal_themselves():
    tokenizer = tokens.fit(["pay my bill", "pay the bill", "once"], 16, (3, 5))
    assert tokenizer.vocabulary == ("bill", "pay")
    rows = tokenizer(["pay zebra", "zebra zebra giraffe"])
    known, unknown = rows[0, :2].tolist()
    assert known == 2
    assert 3 <= unknown < tokenizer.first_bucket
    assert rows[1, :2].tolist() == [unknown, unknown]
    assert rows[1, 2] not in (0, unknown)
    grams = rows[:, tokens.MAX_WORDS :]
    assert set(grams[grams > 0].tolist()) <= set(range(tokenizer.first_bucket, tokenizer.ids))
    assert (rows[0, 2 : tokens.MAX_WORDS] == 0).all()


def test_texts_that_are_too_long_are_counted(tmp_path, caplog):
    for lengths in ((3, 5), (1, 2), (6, 9)):
        for one in ("a bc def ghij", "word " * 40, "x" * 600, "one two three four five " * 3):
            grams = sum(len(tokens.grams_of(part, lengths)) for part in one.split())
            assert tokens.is_cut(one, lengths) == (grams > tokens.MAX_GRAMS or len(one.split()) > tokens.MAX_WORDS)
            assert tokens.are_full(tokens.fit([one], 16, lengths)([one]))[0] >= tokens.is_cut(one, lengths)
    rows = [f"text number {i} {'long ' * 50 * (i == 3)},c{i % 8}" for i in range(64)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]))
    text(path=str(tmp_path / "rows.csv"), ways=2, queries=1)
    assert "1 of 64 texts have more than 48 words" in caplog.text


def test_weighted_counts_equal_the_formula():
    rows = torch.tensor([[1, 2, 2, 0], [1, 3, 0, 0], [1, 1, 1, 1]])
    weights = tokens.inverse_document_frequency(rows, 5)
    expected = [0.0, math.log(4 / 4) + 1, math.log(4 / 2) + 1, math.log(4 / 2) + 1, math.log(4 / 1) + 1]
    assert weights.tolist() == pytest.approx(expected)
    vectors = tokens.term_frequencies(rows, 5, weights)
    first = torch.tensor([0, expected[1], 2 * expected[2], 0, 0])
    torch.testing.assert_close(vectors[0], first / first.norm())
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))


@pytest.fixture(scope="module")
def toy():
    return text(ways=5, shots=2, queries=3, dataset="toy")


def test_a_batch_is_balanced_and_support_and_query_share_no_sentence(toy):
    tasks = toy.sample("train", 40, generator())
    for part, shots in zip(tasks[:2], (2, 3), strict=True):
        assert part["x"].shape == (40, 5 * shots, *toy.spec.inputs.shape)
        assert (part["y"].sum(1) == shots).all()
    labels = tasks.support["y"].argmax(-1)
    assert 0.1 < (labels == torch.arange(10) // 2).double().mean() < 0.3
    for i in range(40):
        known = dict(zip(tasks.support["class"][i].tolist(), labels[i].tolist(), strict=True))
        query = zip(tasks.query["class"][i].tolist(), tasks.query["y"][i].argmax(-1).tolist(), strict=True)
        assert all(known[c] == y for c, y in query)
        rows = {tuple(row.tolist()) for part in tasks[:2] for row in part["x"][i]}
        assert len(rows) >= 24  # two sentences of a class may happen to be the same


def test_toy_classes_are_new_compositions_of_known_concepts():
    classes = {split: {tuple(name.split("-")) for name in cells} for split, cells in toy_classes().items()}
    assert not classes["train"] & classes["test"]
    assert not classes["train"] & classes["val"]
    assert not classes["val"] & classes["test"]
    known = [{triple[kind] for triple in classes["train"]} for kind in range(3)]
    assert all(triple[kind] in known[kind] for triple in classes["test"] for kind in range(3))


def test_no_test_language_and_no_translation_of_a_test_sentence_is_trained_on():
    for sentences in (toy_languages(), intents.xsid(real("xsid")), intents.nusax(real("nusax"))):
        splits = _parallel_splits(sentences)
        where = {}
        for s in sentences:
            where.setdefault((s.language, s.text), set()).add(s.meaning)
        # A sentence may translate two meanings that its language does not tell apart; the others name theirs.
        meanings = {
            split: {
                next(iter(found))
                for language, cells in cells_of.items()
                for cell in cells.values()
                for sentence in cell
                if len(found := where[language, sentence]) == 1
            }
            for split, cells_of in splits.items()
        }
        for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
            assert not set(splits[a]) & set(splits[b])
            assert not meanings[a] & meanings[b]
            assert len(meanings[b]) > 50


def test_cognates_share_n_grams_and_other_words_do_not():
    by_language = {}
    for sentence in toy_languages():
        by_language.setdefault(sentence.language, {})[sentence.meaning] = sentence.text.split()
    first, second = (by_language[f"toy{i:02}"] for i in (0, 1))
    pairs = {(a, b) for m in first for a, b in zip(first[m], second[m], strict=True) if len(a) == 6}
    alike = sum(sum(x == y for x, y in zip(a, b, strict=True)) >= 4 for a, b in pairs) / len(pairs)
    assert 0.25 < alike < 0.5  # both keep a root's form with probability 0.6


def test_tasks_of_the_parallel_corpus_stay_inside_one_language():
    family = text_crosslingual(dataset="toy")
    # What a later test must not have of training are languages; labels are the same in all.
    assert "toy00 of toy" in frozenset.union(*family.units.values())
    assert not family.units["train"] & family.units["test"]
    pool = family.pools["test"]
    language_of = torch.arange(len(pool.cells.size)).repeat_interleave(pool.cells.size.sum(1))
    tasks = family.sample("test", 20, generator())
    for i in range(20):
        rows = torch.cat([part["x"][i] for part in tasks[:2]]).int()
        found = [(pool.rows == row).all(1).nonzero()[:, 0] for row in rows]
        common = set.intersection(*({language_of[j].item() for j in hits} for hits in found))
        assert len(common) >= 1


def test_published_sets_have_their_published_sizes():
    clinc = intents.clinc150(real("clinc150"))
    assert (len(clinc), {len(cell) for cell in clinc.values()}) == (150, {150})
    banking = intents.banking77(real("banking77"))
    assert (len(banking), sum(map(len, banking.values()))) == (77, 13083)
    for name, corpus, sizes in (("clinc150", clinc, (50, 50, 50)), ("banking77", banking, (25, 25, 27))):
        split = intents.label_split(str(DATA_DIR), name, "03", corpus)
        assert tuple(map(len, split.values())) == sizes
        assert not set(split["train"]) & set(split["test"])
    xsid = intents.xsid(str(DATA_DIR))
    assert len({s.language for s in xsid}) == 19
    assert len({s.label for s in xsid}) == 16
    # A meaning that is named alike in (almost) every language: the ids and English texts were understood.
    meanings = [s.meaning for s in xsid if s.language == "no"]
    english = {s.meaning for s in xsid if s.language == "en"}
    assert sum(m in english for m in meanings) / len(meanings) > 0.99


def test_domains_of_clinc150_are_disjoint():
    family = text(dataset="clinc150", split="domains", data_dir=real("clinc150"))
    assert {split: pool.cells.size.shape[1] for split, pool in family.pools.items()} == {
        "train": 90,
        "val": 15,
        "test": 45,
    }


@pytest.mark.parametrize(("shots", "published"), [(1, 0.787), (5, 0.949)])
def test_the_centroid_reaches_the_published_level(shots, published):
    """78.7 ± 1.2 and 94.9 ± 0.4 % were measured with an implementation of another library."""
    family = text(shots=shots, dataset="clinc150", data_dir=real("clinc150"))
    algorithm = centroid(family.spec)
    scores = torch.cat(
        [
            evaluate(algorithm, {}, family.sample("test", 50, generator(i)), loss_of(family), 1).scores["accuracy"]
            for i in range(4)
        ]
    )
    assert abs(scores.mean().item() - published) < 3.3 * scores.std().item() / 200**0.5 + 0.006


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["cannot be read", "task.dataset=toy"]),
        ("{", ["not the published file", "fetch it again"]),
        (json.dumps({"train": [["a"]]}), ["not the published file"]),
        (json.dumps({"val": []}), ["not the published file", "train"]),
    ],
)
def test_a_missing_or_broken_file_is_named(tmp_path, content, words):
    (tmp_path / "clinc150").mkdir()
    if content is not None:
        (tmp_path / "clinc150" / "data_full.json").write_text(content)
    with pytest.raises(UserError) as refused:
        text(dataset="clinc150", data_dir=str(tmp_path))
    for word in words:
        assert word in str(refused.value)


def test_a_split_that_names_an_unknown_label_is_refused(tmp_path):
    folder = tmp_path / "clinc150" / "fewshot_label_splits" / "01"
    folder.mkdir(parents=True)
    (folder / "labels.train.txt").write_text("greeting\nnonsense\n")
    with pytest.raises(UserError, match="names nonsense"):
        intents.label_split(str(tmp_path), "clinc150", "01", {"greeting": []})


def test_splits_that_share_a_label_are_refused(tmp_path):
    folder = tmp_path / "clinc150" / "fewshot_label_splits" / "01"
    folder.mkdir(parents=True)
    for part, labels in {"train": "a b", "valid": "c d", "test": "e a"}.items():
        (folder / f"labels.{part}.txt").write_text(labels)
    with pytest.raises(UserError, match=r"labels\.test\.txt names a, which is already in a split.*split=random"):
        intents.label_split(str(tmp_path), "clinc150", "01", dict.fromkeys("abcde"))


def banking(folder, sentences):
    """A small BANKING77 of ``sentences`` by label, without label splits."""
    (folder / "banking77").mkdir(parents=True)
    rows = [f"{text},{label}" for label, cell in sentences.items() for text in cell]
    for part in ("train", "test"):
        (folder / "banking77" / f"{part}.csv").write_text("\n".join(["text,category", *rows]))


def test_without_label_splits_the_labels_are_dealt_at_random_and_the_data_are_named(tmp_path):
    cells = {f"label{i}": [f"word{i}{j} and word{i}" for j in range(6)] for i in range(15)}
    banking(tmp_path / "a", cells)
    family = text(ways=2, queries=2, dataset="banking77", data_dir=str(tmp_path / "a"))
    assert family.dataset.startswith("banking77:random:")
    assert [len(pool.cells.size[0]) for pool in family.pools.values()] == [5, 5, 5]
    again = text(ways=2, queries=2, dataset="banking77", split="random", data_dir=str(tmp_path / "a"))
    assert again.dataset == family.dataset
    banking(tmp_path / "b", cells | {"label3": ["other"] * 6})
    assert text(ways=2, queries=2, dataset="banking77", data_dir=str(tmp_path / "b")).dataset != family.dataset


@pytest.mark.usefixtures("float64")
def test_a_sentence_without_words_leaves_gradients_finite():
    family = text(ways=2, shots=2, queries=2, dataset="toy", buckets=16)
    model = TextEmbedding(family.spec, 4)
    tasks = family.sample("train", 2, generator())
    for part in tasks[:2]:
        part["x"][:, 0] = 0
    for algorithm in (maml(model, 0.5, 2), protonet(model, family.spec, "cosine")):
        grads = meta_gradient(algorithm, algorithm.init(generator()), tasks, loss_of(family)).grads
        assert all(leaf.isfinite().all() for leaf in leaves(grads))


def test_too_few_languages_are_refused(tmp_path):
    for language in ("english", "javanese"):
        folder = tmp_path / "nusax_senti" / language
        folder.mkdir(parents=True)
        for part in ("train", "valid", "test"):
            rows = [f"{part}{i},sentence {i},{label}" for i, label in enumerate(("good", "bad") * 10)]
            (folder / f"{part}.csv").write_text("\n".join(["id,text,label", *rows]))
    with pytest.raises(ValueError, match=r"leave no sentence for (val|test); fetch all of their files"):
        text_crosslingual(ways=2, dataset="nusax", data_dir=str(tmp_path))


@pytest.mark.parametrize("content", ["[]", '{"a": ["x"]}', json.dumps({str(i): ["nope"] for i in range(10)})])
def test_broken_domains_are_named(tmp_path, content):
    (tmp_path / "clinc150").mkdir()
    (tmp_path / "clinc150" / "domains.json").write_text(content)
    with pytest.raises(UserError, match=r"domains\.json is not the published file"):
        intents.clinc150_domains(str(tmp_path), {"x": []})


def test_broken_tables_of_other_sets_are_named(tmp_path):
    (tmp_path / "xsid").mkdir()
    with pytest.raises(UserError, match=r"holds no LANGUAGE\.test\.conll"):
        intents.xsid(str(tmp_path))
    (tmp_path / "xsid" / "en.valid.conll").write_text("1\tword\tx\tO\n")
    with pytest.raises(UserError, match="not the published file"):
        intents.xsid(str(tmp_path))
    with pytest.raises(UserError, match="holds no folder of a language"):
        intents.nusax(str(tmp_path))
    (tmp_path / "nusax_senti" / "english").mkdir(parents=True)
    (tmp_path / "nusax_senti" / "english" / "train.csv").write_text("id,sentence\n1,hello\n")
    with pytest.raises(UserError, match="columns id, text, label expected"):
        intents.nusax(str(tmp_path))


def test_too_many_ways_for_the_data_are_refused():
    with pytest.raises(ValueError, match="ways must be at most 40, the val classes of toy"):
        text(ways=41, dataset="toy")
    with pytest.raises(ValueError, match="at most 0"):
        text(shots=30, queries=20, dataset="toy")
