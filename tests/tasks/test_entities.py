"""Tagged sentences: their files, what is wrong with broken ones, and the tasks that are drawn from them."""

import re

import numpy as np
import pytest
import torch
from conftest import DATA_DIR
from scenarios import generator, sampled

from metarun.checks.family import check_tasks
from metarun.contracts import Words
from metarun.data import corpora, embedding, tokens
from metarun.data.corpora import Source
from metarun.data.portable import plain, rebuilt
from metarun.data.tagged import Sentence, sentences_of
from metarun.errors import UserError
from metarun.models.tagger import Tagger
from metarun.targets.tags import Tags
from metarun.tasks.entities import Entities, How, entities, pieces
from metarun.tasks.few_shot import Range, TaskSizes
from metarun.tasks.tag_references import Logistic, gazetteer

IOB2 = (
    b"# sent_id = a1\n# text = with\ta tab\n1\tAda\tB-PER\t-\tx\n2\tslept\t-\t-\tx\n3\t#\tO\t-\tx\n\n"
    b"1\tRome\tB-LOC\t-\tx\n"
)
CONLL = b"-DOCSTART- -X- -X- O\n\nAda NNP B-NP B-PER\nslept VBD B-VP O\n\nRome NNP B-NP B-LOC\n"
XSID = b"# id = 7\n# intent = weather\n1\twet\tweather\tB-weather/attribute\n2\there\tweather\tO\n"


def test_files_of_three_kinds_are_read():
    ada, rome = sentences_of(IOB2, "x.iob2")
    assert ada == Sentence(("Ada", "slept", "#"), ("B-PER", "O", "O"), "a1")
    assert (rome.words, rome.name) == (("Rome",), "2")
    assert [s.tags for s in sentences_of(CONLL, "x.conll")] == [("B-PER", "O"), ("B-LOC",)]
    assert sentences_of(XSID, "x.conll")[0].tags == ("B-weather/attribute", "O")
    assert sentences_of(b"\xef\xbb\xbfAda\tB-PER\r\n\r\n#\tO\r\n", "x.txt")[1].words == ("#",)
    assert sentences_of("10\u00a0000 B-NUM\n".encode(), "x.txt")[0].words == ("10\u00a0000",)
    # A range is the number of a line of several words in CoNLL-U, and a word where there are no numbers of lines.
    assert sentences_of(b"In\tO\n1914-1918\tB-EVENT\n", "x.txt")[0].words == ("In", "1914-1918")
    assert sentences_of(b"1-2\tdu\tO\n1\tde\tO\n2\tle\tO\n", "x.conll")[0].words == ("de", "le")
    assert sentences_of(b"Ada\tI-PER\nByron\tI-PER\n", "x.txt", scheme="iob1")[0].tags == ("B-PER", "I-PER")


BROKEN = {
    "no tags": (b"Ada\nslept\n", "line 1, has 1 column"),
    "tags missing in a line": (b"Ada\tB-PER\nslept\n", "line 2, has 1 column"),
    "other columns": (b"Ada\tB-PER\n\nRome\tX\tB-LOC\n", "line 3, has 3 columns"),
    "no iob": (b"Ada\tPERSON\n", "'PERSON'"),
    "bioes": (b"Ada\tB-PER\nByron\tE-PER\n", "line 2, has the tag 'E-PER'"),
    "no type": (b"Ada\tB-\n", "line 1, has the tag 'B-'"),
    "inside nothing": (b"slept\tO\nAda\tI-PER\n", "line 2, has the tag I-PER after O"),
    "inside another": (b"Rome\tB-LOC\nAda\tI-PER\n", "line 2, has the tag I-PER after B-LOC"),
    "mixed encodings": ("Zoë\tB-PER\n".encode() + "\nZoë\tB-PER\n".encode("latin-1"), "line 3, is not text in UTF-8"),
    "wide characters": ("Ada\tB-PER\n".encode("utf-16-le"), "line 1, holds a zero byte"),
    "no word": (b"Ada\tB-PER\n\tO\n", "line 2, has a tag without a word"),
    "empty": (b"\n\n", "holds no sentence"),
    "comments alone": (b"# nothing here\n\n# nor here\n", "holds no sentence"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_get_a_sentence_with_their_name_and_line(name, tmp_path):
    content, words = BROKEN[name]
    (tmp_path / "de.conll").write_bytes(content)
    (tmp_path / "en.conll").write_bytes(b"Ada\tB-PER\n")
    with pytest.raises(UserError) as error:
        entities(path=str(tmp_path))
    assert f"{tmp_path}/de.conll" in str(error.value)
    assert words in str(error.value)
    assert str(error.value).endswith(".")


SENTENCE = "Ada\tB-PER\nslept\tO\n\n"


@pytest.fixture
def folder(tmp_path):
    """Four languages of 30 different sentences."""
    for language in ("da", "de", "en", "sv"):
        text = "".join(f"{language}Ada{i}\tB-PER\nin\tO\n{language}Rome{i}\tB-LOC\n\n" for i in range(30))
        (tmp_path / f"{language}.conll").write_text(text)
    return tmp_path


FEW = {"shots": 3, "queries": 4, "longest": 6, "buckets": 32}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"shots": 40}, "has 30 sentences"),
        ({"test": ["fr"]}, "names fr"),
        ({"test": ["da"], "val": ["da"]}, "both name da"),
        ({"types": ["ORG"]}, "types names ['ORG']"),
        ({"types": "some"}, "types must be shared, new or a list"),
        ({"types": "new", "ways": 5}, "ways=5"),
        ({"column": 1}, "column must be at least 2"),
        ({"column": 4}, "line 1, has 2 columns"),
        ({"longest": 1}, "longest must be at least 2"),
        ({"unfamiliar": 2.0}, "unfamiliar must be from 0 to 1"),
        ({"queries": 0}, "queries must be at least 1"),
        ({"embed": "efficientnet-lite0"}, "embeds pictures, and this task has sentences"),
        ({"components": 0}, "components must be at least 1"),
        ({"dataset": "xsid"}, "two data sets"),
    ],
)
def test_wrong_keys_get_a_sentence(folder, keys, words):
    with pytest.raises((UserError, ValueError), match=re.escape(words)):
        entities(**{**FEW, "path": str(folder), **keys})


def test_empty_folders_and_single_files_get_a_sentence(tmp_path):
    with pytest.raises((UserError, ValueError), match="holds no file with tagged sentences"):
        entities(path=str(tmp_path))
    (tmp_path / "de.conll").write_text(SENTENCE * 20)
    with pytest.raises((UserError, ValueError), match="training and test each need one"):
        entities(path=str(tmp_path))


def test_sources_and_splits_follow_folders_names_and_keys(folder):
    family = entities(**FEW, path=str(folder), test=["sv"], val=["da"])
    assert {split: list(own) for split, own in family.pools.items()} == {
        "train": ["de", "en"],
        "val": ["da"],
        "test": ["sv"],
    }
    (folder / "train").mkdir()
    (folder / "test").mkdir()
    for name in ("de", "en"):
        (folder / f"{name}.conll").rename(folder / "train" / f"{name}.conll")
    (folder / "da.conll").rename(folder / "test" / "da.train.conll")
    (folder / "sv.conll").rename(folder / "test" / "da.test.conll")
    family = entities(**FEW, path=str(folder))
    assert list(family.pools["val"]) == list(family.pools["train"]) == ["de", "en"]
    pool = family.pools["test"]["da"]
    assert pool.apart
    assert {s.words[0][:2] for s in pool.sentences[: pool.supports]} == {"da"}
    assert {s.words[0][:2] for s in pool.sentences[pool.supports :]} == {"sv"}


def test_long_sentences_are_cut_between_entities():
    sentence = Sentence(("a", "b", "c", "d", "e"), ("O", "O", "B-X", "I-X", "O"), "1")
    assert [piece.words for piece in pieces(sentence, 3)] == [("a", "b"), ("c", "d", "e")]
    assert [piece.tags for piece in pieces(sentence, 2)] == [("O", "O"), ("B-X", "I-X"), ("O",)]


def test_features_of_words():
    assert [tokens.shape_of(word) for word in ("McDonald's", "USA", "2024", "北京", "x-1")] == [
        "XxXxx'x",
        "XX",
        "99",
        "cc",
        "x-9",
    ]
    features = tokens.fit_words([["the", "Ada"]] * 3, 64, 4)
    x = features([["the", "Ada", "zzz"], ["Ada"]])
    assert x.shape == (2, 4, tokens.COLUMNS)
    assert (x[0, 3] == 0).all()
    # The same word at the beginning and later on differs in the shape by its place alone.
    assert (x[0, 1] != x[1, 0]).nonzero().flatten().tolist() == [2]
    known, strange = x[0, 0, 0], x[0, 2, 0]
    assert features.first_known <= known < features.first_strange <= strange < features.ids


@pytest.fixture(scope="module")
def toy():
    return entities(dataset="toy", shots=4, queries=5, buckets=256)


def test_tasks_hold_the_tags_of_their_sentences_and_share_none_between_parts(toy):
    for split in ("train", "val", "test"):
        tasks = sampled(toy, split, 6, generator(1))
        for task in range(6):
            name = toy.names[tasks.query["group"][task, 0]]
            pool, types = toy.pools[split][name], toy.spec.target.types
            rows = [set(part["sentence"][task].tolist()) for part in (tasks.support, tasks.query)]
            assert not rows[0] & rows[1]
            for part in (tasks.support, tasks.query):
                for row, y in zip(part["sentence"][task].tolist(), part["y"][task], strict=True):
                    tags = ["O", *(f"{p}-{t}" for t in types for p in "BI")]
                    found = tuple(tags[tag] for tag in y[y.sum(-1) > 0].argmax(-1))
                    assert found == pool.sentences[row].tags


def test_splits_share_no_source_and_no_sentence(toy):
    words = {split: {s.words for pool in own.values() for s in pool.sentences} for split, own in toy.pools.items()}
    assert not words["train"] & words["test"]
    assert not words["val"] & words["test"]
    assert not set(toy.pools["train"]) & (set(toy.pools["test"]) | set(toy.pools["val"]))


def test_unfamiliar_tasks_exchange_features_by_one_rule_and_leave_shapes_alone(toy):
    x = next(iter(toy.pools["train"].values())).x[:30].long()
    changed = toy._unfamiliar(x, torch.tensor(0.5), torch.tensor(11))
    assert torch.equal(changed[..., 1:3], x[..., 1:3])
    assert torch.equal(changed > 0, x > 0)
    known = (x >= toy.features.first_known) & (x < toy.features.first_strange)
    share = (changed != x)[known].double().mean()
    assert 0.3 < share < 0.7
    assert ((changed == x) | (changed >= toy.features.first_strange)).all()
    rule = dict(zip(x[known].tolist(), changed[known].tolist(), strict=True))
    assert [rule[i] for i in x[known].tolist()] == changed[known].tolist()
    assert not torch.equal(toy._unfamiliar(x, torch.tensor(0.5), torch.tensor(12)), changed)


def test_new_types_are_those_that_training_lacks_and_each_has_its_shots():
    family = entities(dataset="toy", types="new", ways=2, shots=3, queries=2, buckets=256)
    types = {split: {t for pool in own.values() for t in pool.types} for split, own in family.pools.items()}
    assert not types["train"] & types["test"]
    tasks = sampled(family, "test", 5, generator(2))
    assert tasks.support["x"].shape[1] == 6
    begins = tasks.support["y"][..., 1::2].sum((1, 2))
    assert (begins >= 3).all()


def source(*types):
    rows = [Sentence((f"{kind}word{i}", "is"), (f"B-{kind}", "O"), str(i)) for i in range(20) for kind in types]
    return Source(rows)


def made(types):
    corpus = {"train": {"a": source("X", "Y"), "b": source("X")}, "val": {}, "test": {"c": source("X", "Z", "W")}}
    size = TaskSizes(1, Range(4, 4), 4)
    return Entities(corpus, "made", {False: size, True: size}, How(types, 2, 4, 32, unfamiliar=1.0))


def test_types_that_training_lacks_have_places_that_training_fills_with_its_own():
    family = made("shared")
    assert family.spec.target.types == ("X", "Y", "new0", "new1")
    test = sampled(family, "test", 4, generator())
    assert (test.query["ways"][0, 0] == torch.tensor([1, 1, 1, 0, 0, 1, 1, 1, 1])).all()
    train = sampled(family, "train", 40, generator(1))
    begins = train.support["y"].sum((0, 1, 2))[1::2]
    assert (begins > 0).all()
    assert ((train.support["ways"][:, :, None] - train.support["y"]) >= 0).all()


def test_copies_of_training_sentences_are_left_out_of_tests():
    corpus = {
        "train": {"a": source("X")},
        "val": {},
        "test": {"b": Source(source("X").support, source("X", "Y").support)},
    }
    left = corpora.without_copies(corpus)["test"]["b"]
    assert not left.support
    assert {s.tags[0] for s in left.query} == {"B-Y"}


def test_no_task_asks_for_a_sentence_that_it_shows(folder):
    for path in folder.glob("*.conll"):
        path.write_text(path.read_text().rstrip() + "\n\n" + path.read_text())
    pool = entities(**FEW, path=str(folder), test=["sv"], val=["da"]).pools["test"]["sv"]
    assert len(pool.sentences) == len({s.words for s in pool.sentences}) == 30


def test_pooled_scores_are_those_of_all_entities_and_the_mean_over_sources(toy):
    counts = torch.zeros(2, len(toy.names), 4)
    counts[0, 0], counts[1, 1] = torch.tensor([1.0, 2, 2, 2]), torch.tensor([0.0, 0, 4, 0])
    scores = toy._pooled(counts)
    assert scores["pooled-entity-f1"] == pytest.approx(2 / 8)
    assert scores["pooled-span-f1"] == pytest.approx(4 / 8)
    assert scores["source-entity-f1"] == pytest.approx((0.5 + 0) / 2)
    # No task is of the test sources, which is no success.
    # No task is of the other sources.
    assert all(np.isnan(scores[f"entity-f1-{toy.names[i]}"]) for i in toy.tested if i > 1)


def test_the_gazetteer_gives_each_word_its_most_frequent_tag():
    tags = torch.tensor([[1, 0, 0], [1, 2, 0]])
    support = {"x": torch.tensor([[[7, 1], [8, 1], [8, 2]], [[7, 1], [8, 3], [0, 0]]]), "y": torch.eye(3)[tags]}
    support["y"][1, 2] = 0
    found = gazetteer(support, torch.tensor([[[8, 9], [7, 9], [5, 9]]]))
    torch.testing.assert_close(
        found.exp(), torch.tensor([[[2.5, 0, 1], [0.5, 2, 0], [0.5, 0, 0]]]), atol=2e-6, rtol=1e-6
    )
    data = {"y": torch.eye(3)[torch.tensor([[0, 2, 0]])]}
    for decoder in ("words", "viterbi", "spans"):
        assert Tags(("X",), decoder).decoded(found, data)[0].tolist()[::2] == [0, 0]


@pytest.mark.usefixtures("float64")
def test_logistic_regression_reaches_the_minimum_of_its_objective():
    g = generator(1)
    x = torch.randint(1, 9, (3, 4, 2), generator=g)
    y = torch.eye(3)[torch.randint(3, (12,), generator=g)]
    y[5] = 0
    logistic = Logistic(0.1, 16, 400)
    z = logistic.features(x)
    w = logistic.fitted(z, y).requires_grad_()
    objective = -(y * (z @ w).log_softmax(-1)).sum() + 0.05 * w.square().sum()
    (slope,) = torch.autograd.grad(objective, w)
    assert slope.abs().max() < 1e-6
    # Padding after a sentence is no neighbour, and a word's features do not depend on other sentences.
    assert (logistic.features(x[:1])[:4] == z[:4]).all()


def test_sentences_of_ones_own_become_the_tensors_that_the_family_samples(toy):
    task = sampled(toy, "test", 1, generator(3)).query
    pool = toy.pools["test"][toy.names[task["group"][0, 0]]]
    sentences = [pool.sentences[i] for i in task["sentence"][0]]
    assert torch.equal(toy.converter.inputs([list(s.words) for s in sentences]), task["x"][0])
    assert torch.equal(toy.converter.targets([list(s.tags) for s in sentences]), task["y"][0])
    own = toy.converter.task([s.words for s in sentences], [s.tags for s in sentences])
    request = own.ask([s.words for s in sentences])
    tags = request.answers(request.make(lambda x: 50 * task["y"][0], request.data))
    assert all(tuple(row) == s.tags for row, s in zip(tags, sentences, strict=True))
    assert own.compared(tags, [s.tags for s in sentences]) == "entity F1 100.00 % with their own tags"
    assert own.rows(["B-PER", "O"], None) == [{"prediction": "B-PER O"}]
    with pytest.raises(ValueError, match="2 words has 1 tags"):
        toy.converter.task([["Ada", "sleeps"]], [["O"]])
    for wrong, words in ((["Ada"], "lists of words"), ([["Ada"] * 40], "has 40 words")):
        with pytest.raises(ValueError, match=words):
            toy.converter.inputs(wrong)
    for wrong, words in (([["PER"]], "none of O"), ([["B-PER"]], "holds the type PER"), (["O"], "a list of tags")):
        with pytest.raises(ValueError, match=words):
            toy.converter.targets(wrong)


def test_a_later_test_keeps_what_training_has_learned_of_words_and_types(toy):
    other = entities(dataset="toy", shots=9, queries=5, buckets=256, converter=toy.converter)
    assert torch.equal(other.features.known, toy.features.known)
    assert other.spec.target.types == toy.spec.target.types


def test_a_later_test_refuses_types_that_have_no_place(tmp_path):
    """They would pass for types that the learner knows."""
    for path, kind in (("run/train", "Y"), ("run/test", "Y"), ("later/train", "Y"), ("later/test", "Z")):
        (tmp_path / path).mkdir(parents=True)
        text = "".join(f"{path}a{i}\tB-X\n{path}b{i}\tB-{kind}\n\n" for i in range(30))
        (tmp_path / path / f"{path[-4:]}.conll").write_text(text)
    learned = entities(path=str(tmp_path / "run"), **FEW).converter
    assert learned.places == 0
    with pytest.raises(ValueError, match=r"has the types Z, which the learner was not trained with.*task.types"):
        entities(path=str(tmp_path / "later"), converter=learned, **FEW)
    family = entities(path=str(tmp_path / "later"), converter=learned, types=["X"], **FEW)
    assert sampled(family, "test", 1, generator()).query["y"].sum((0, 1, 2))[3:].sum() == 0


def test_a_rare_type_of_the_sentences_that_are_held_out_has_its_place_whatever_else_moves():
    words = [Sentence((f"a{i}", f"b{i}"), ("B-X", "B-Y" if i < 32 else "B-Z"), str(i)) for i in range(40)]
    size = TaskSizes(1, Range(4, 4), 4)
    corpus = {"train": {"a": Source(words)}, "val": {}, "test": {"b": Source(words[:20])}}
    family = Entities(corpus, "made", {False: size, True: size}, How("shared", 2, 4, 32, unfamiliar=1.0))
    assert family.spec.target.types == ("X", "Y", "new0")
    task = sampled(family, "val", 40, generator())
    begins = task.query["y"].sum((1, 2))[:, 1::2]
    # Each query has an X and a Z, and Z is where there is a place for it.
    assert (begins[:, 2] == 4).all()


def test_a_learner_reads_tags_as_its_run_did(folder):
    for path in folder.glob("*.conll"):
        path.write_text(path.read_text().replace("B-", "I-").replace("I-PER", "I-PER\t-").replace("I-LOC", "I-LOC\t-"))
        path.write_text(path.read_text().replace("in\tO", "in\tO\t-"))
    family = entities(**FEW, path=str(folder), test=["sv"], val=["da"], column=2, scheme="iob1")
    assert family.converter.read(folder / "sv.conll").y[0] == ("B-PER", "O", "B-LOC")


def real(name):
    if not corpora.is_there(str(DATA_DIR), name):
        pytest.skip(f"{name} is not in METARUN_DATA_DIR")
    return str(DATA_DIR)


def test_crossner_tests_a_domain_on_its_own_files_without_copies():
    corpus = corpora.without_copies(corpora.crossner(real("crossner"), ["music"]))
    assert set(corpus["train"]) == {"ai", "literature", "politics", "science"}
    test = corpus["test"]["music"]
    assert 90 <= len(test.support) <= 100
    known = {s.words for one in corpus["train"].values() for s in one.support}
    assert not known & {s.words for s in test.query}


@pytest.mark.slow
def test_universal_ner_shares_no_meaning_between_training_and_test():
    corpus = corpora.universal_ner(real("universal_ner"))
    assert [len(own) for own in corpus.values()] == [7, 0, 7]
    ids = {s.name for name in ("English-PUD", "Swedish-PUD") for s in corpus["train"][name].support}
    for name in ("German", "Russian"):
        assert not ids & {s.name for s in corpus["test"][name].sentences()}


def test_xsid_is_read_whole_and_shares_no_language():
    """Although words are missing in eight of its lines."""
    corpus = corpora.xsid(real("xsid"))
    languages = [set(own) for own in corpus.values()]
    assert all(languages)
    assert len(set().union(*languages)) == sum(map(len, languages))
    kinds = {tag.partition("/")[0] for one in corpus["train"].values() for s in one.support for tag in s.tags}
    assert {"O", "B-weather"} <= kinds


@pytest.fixture(scope="module")
def with_vectors():
    keys = {"shots": (2, 4), "queries": 5, "buckets": 256, "components": 2}
    return entities(dataset="toy", embed="embedders:lengths", **keys)


def test_words_have_the_principal_components_of_a_frozen_model(with_vectors):
    family, vectors = with_vectors, with_vectors.converter.vectors
    assert family.spec.inputs == Words(32, tokens.COLUMNS, family.features.ids, 2)
    tasks = sampled(family, "train", 3, generator(3))
    check_tasks(tasks, family.spec, "train", 3, "cpu")
    names = [family.names[i] for i in tasks.support["group"][:, 0]]
    for task, pool in enumerate(family.pools["train"][name] for name in names):
        for place, row in enumerate(tasks.support["sentence"][task]):
            words, x = pool.sentences[row].words, tasks.support["x"][task, place, :, tokens.COLUMNS :]
            if tasks.support["weight"][task, place] == 0:
                assert (x == 0).all()
                continue
            expected = vectors.projected(embedding.features("embedders:lengths", "sentences", list(words)))
            torch.testing.assert_close(x[: len(words)], expected)
            assert (x[len(words) :] == 0).all()
    training = sorted({w for pool in family.pools["train"].values() for s in pool.sentences for w in s.words})
    z = vectors.projected(embedding.features("embedders:lengths", "sentences", training)).double()
    covariance = z.T @ z / len(z)
    assert z.mean(0).abs().max() < 1e-4
    torch.testing.assert_close(covariance.trace(), torch.tensor(2.0, dtype=torch.float64), rtol=1e-4, atol=0)
    assert covariance[0, 1].abs() < 1e-4
    assert covariance[0, 0] > covariance[1, 1]


def test_a_learner_gives_words_the_same_numbers(with_vectors):
    converter = rebuilt(plain(with_vectors.converter))
    pool = with_vectors.pools["test"][with_vectors.names[with_vectors.tested[0]]]
    found = converter.inputs([pool.sentences[0].words, ["never", "seen"]])
    torch.testing.assert_close(found[0, :, : tokens.COLUMNS].int(), pool.x[0])
    torch.testing.assert_close(found[0, :, tokens.COLUMNS :], with_vectors.vectors[pool.place[0]])
    assert converter.embed == "embedders:lengths"


def test_a_tagger_reads_numbers_of_words_and_padding_changes_nothing(with_vectors):
    torch.manual_seed(0)
    model = Tagger(with_vectors.spec)
    x = sampled(with_vectors, "test", 1, generator(4)).query["x"][0]
    real = x[..., :1] > 0
    longer = torch.cat([x, torch.zeros_like(x)], 1)
    torch.testing.assert_close(model(longer)[:, : x.shape[1]] * real, model(x) * real)
    other = x.clone()
    other[..., tokens.COLUMNS :] *= 2
    assert not torch.allclose(model(other), model(x))
