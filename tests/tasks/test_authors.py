"""Authors: their lines, what is held out, the control, and broken folders."""

from collections import Counter

import pytest
import torch
from conftest import DATA_DIR
from scenarios import generator, sampled

from metarun.data import lines
from metarun.data.acts import before
from metarun.data.lines import Author
from metarun.data.ngram_prior import found_at, prior_of
from metarun.data.ngrams import Ngrams
from metarun.errors import UserError
from metarun.targets.scoring import loss_of, scores_in_test
from metarun.targets.text import BITS
from metarun.tasks.authors import NGRAM, NGRAM_ADAPTED, PRIOR, PRIOR_ORDER, Authors


def toy(**keys):
    return Authors(**{"dataset": "toy", "shots": 4, "queries": 6, "length": 40, **keys})


def texts(family, ids):
    return [family.tokenizer.decoded(row) for row in ids.tolist()]


def author_of(family, split):
    """The author of every line of a split; lines of toy authors are different."""
    shelf = family.shelves[split]
    cuts = zip(shelf.cells.first[0].tolist(), shelf.cells.size[0].tolist(), strict=True)
    return {text: i for i, (first, size) in enumerate(cuts) for text in shelf.texts[first : first + size]}


def test_a_task_has_different_lines_of_one_author_and_the_control_those_of_another():
    family = toy(shots=[2, 4])
    tasks, authors = sampled(family, "test", 16, generator()), author_of(family, "test")
    counts = set()
    for i in range(16):
        shown = texts(family, tasks.support["y"][i][tasks.support["weight"][i] > 0])
        asked, other = texts(family, tasks.query["y"][i]), texts(family, tasks.query["control"]["y"][i])
        counts.add(len(shown))
        own = {authors[text] for text in shown + asked}
        assert own == set(tasks.query["unit"][i].tolist())
        assert {authors[text] for text in other if text} != own
        assert len(set(shown + asked)) == len(shown) + 6
    assert counts == {2, 3, 4}
    ids = tasks.query["y"]
    assert (tasks.query["x"][..., 0] == 1).all()
    assert torch.equal(tasks.query["x"][..., 1:], ids[..., :-1])


def test_splits_share_no_work_and_characters_are_those_of_training():
    family = toy()
    works = {split: {name.rpartition(" of ")[2] for name in shelf.names} for split, shelf in family.shelves.items()}
    assert {len(own) for own in works.values()} == {5, 1, 2}
    assert len(set.union(*works.values())) == 8
    assert set(family.tokenizer.characters) == {c for text in family.shelves["train"].texts for c in text}


def test_the_n_gram_model_is_better_with_support_lines_and_counts_characters_as_the_target_does():
    family = toy(shots=30)
    data = {name: leaf[0] for name, leaf in sampled(family, "test", 1, generator()).query.items() if name != "control"}
    found = scores_in_test(family, lambda x: None, data)
    assert found[NGRAM_ADAPTED.name] < found[NGRAM.name] < 4
    uniform = family.spec.target.scores(torch.zeros(*data["y"].shape, family.tokenizer.ids), data)[BITS.name]
    torch.testing.assert_close(uniform, torch.tensor(family.tokenizer.ids).log2())
    assert toy(merges=20).spec.metrics == (BITS,)


def test_lines_are_different_and_broken_between_words():
    assert lines.lines_of(["One  two\tthree\n\nfour\n", "four\nabcdefgh ij"], 8) == [
        "One two",
        "three",
        "four",
        "abcdefgh",
        "ij",
    ]


def test_small_authors_of_a_work_are_together_in_training_alone():
    authors = [Author(name, "play", [f"{name}{i}" for i in range(n)]) for name, n in (("a", 5), ("b", 2), ("c", 2))]
    assert [(a.name, len(a.lines)) for a in lines.of_size(authors, 4, "data", True)] == [
        ("a", 5),
        ("small parts (play)", 4),
    ]
    assert [a.name for a in lines.of_size(authors, 4, "data", False)] == ["a"]


@pytest.mark.parametrize(("dataset", "speakers"), [("shakespeare", "ROMEO (r_and_j)"), ("presidents", "GWBush")])
def test_public_domain_authors(dataset, speakers):
    if not lines.is_there(str(DATA_DIR), dataset):
        pytest.skip("public_domain_authors is not in METARUN_DATA_DIR")
    authors = {author.name: author for author in lines.CORPUS[dataset](str(DATA_DIR), 63)}
    assert len(authors[speakers].lines) > 500
    assert all(len(line) <= 63 for line in authors[speakers].lines)


def folder(tmp_path, files):
    for name, content in files.items():
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(tmp_path)


def many(name, count=12):
    return "".join(f"line {i} of {name}\n" for i in range(count))


def test_a_folder_has_a_folder_or_a_file_per_author(tmp_path):
    path = folder(tmp_path, {"ann/1.txt": many("ann"), "ann/2.txt": "more\n", "bob.TXT": many("bob")})
    authors, split, _ = lines.own_texts(path, ".", 63)
    assert [(author.name, len(author.lines)) for author in authors] == [("ann", 13), ("bob", 12)]
    assert split is None


def test_a_script_that_training_lacks_is_warned_of(tmp_path, caplog):
    for part, letters in {"train": "abcd", "val": "abcd", "test": "абвг"}.items():
        for author in "12":
            (tmp_path / part / f"{part}{author}").mkdir(parents=True)
            lines = [" ".join(letters[(i >> k) % 4] * 3 for k in range(0, 6, 2)) for i in range(40)]
            (tmp_path / part / f"{part}{author}" / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    Authors(path=str(tmp_path), shots=5, queries=5)
    assert caplog.text.count("of the characters are in no training line") == 1
    assert "(test): 75.0 %" in caplog.text


def test_folders_may_name_the_splits(tmp_path):
    parts = {"train": "ab", "dev": "cd", "test": "ef"}
    path = folder(tmp_path, {f"{part}/{name}.txt": many(name) for part, names in parts.items() for name in names})
    family = Authors(path=path, shots=4, queries=6)
    assert {split: shelf.names for split, shelf in family.shelves.items()} == {
        "train": ["a", "b"],
        "val": ["c", "d"],
        "test": ["e", "f"],
    }


BROKEN = {
    "There is no .*nowhere": (None, {}),
    "has no file that ends in .txt": ({"a.doc": "text"}, {}),
    "b.txt, line 2, is not text in UTF-8": (
        {"a.txt": many("a"), "b.txt": b"fine\n" + "schön\n".encode("latin1")},
        {},
    ),
    "author c has no line of text": ({**{f"{n}.txt": many(n) for n in "ab"}, "c.txt": " \n\t\n"}, {}),
    "leaves no author for": ({f"{n}.txt": many(n) for n in "ab"}, {}),
    "No author of .* has 60 different lines": ({f"{n}.txt": many(n) for n in "abcdefgh"}, {"shots": 30, "queries": 30}),
    "author a is in test and train": ({"train/a.txt": many("a"), "test/a.txt": many("a")}, {}),
    "is a file; set task.path to a folder": ({"a.txt": many("a")}, {"path": "a.txt"}),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_broken_folders_get_one_sentence(tmp_path, sentence):
    files, keys = BROKEN[sentence]
    path = folder(tmp_path, files) if files else str(tmp_path / "nowhere")
    own = {**keys, "path": f"{path}/{keys['path']}" if "path" in keys else path}
    with pytest.raises(UserError, match=sentence) as error:
        Authors(**{"shots": 4, "queries": 6, **own})
    assert str(error.value).count("\n") == 0


def test_sizes_out_of_range_are_refused():
    for keys in ({"queries": 0}, {"length": 3}, {"merges": -1}, {"temperature": 0.0}, {"path": "x"}):
        with pytest.raises(ValueError, match=next(iter(keys))):
            toy(**keys)


def test_toy_authors_have_lines_enough_for_the_defaults():
    """So that the command runs where there are no files."""
    assert sampled(Authors(dataset="toy"), "test", 1, generator()).query["y"].shape[1] == 50


def test_values_are_found_among_codes():
    codes = torch.tensor([2, 3, 7, 20])
    assert found_at(codes, torch.tensor([[3, 20], [0, 21], [2, 8]])).tolist() == [[1, 3], [-1, -1], [0, -1]]
    assert found_at(codes[:1], torch.tensor([2, 3])).tolist() == [0, -1]


def by_hand(texts, history, token, ids, order):
    """Interpolated modified Kneser-Ney from its definition, for tuples of tokens."""
    rows = [(1,) * (order - 1) + tuple(i for i in text if i) for text in texts]

    def grams(n):
        return [row[i - n + 1 : i + 1] for row in rows for i in range(order - 1, len(row))]

    def count(n):
        if n == order:
            return Counter(grams(n))
        plain, longer = Counter(grams(n)), Counter(gram[1:] for gram in set(grams(n + 1)))
        return {gram: times if n > 1 and gram[0] == 1 else longer[gram] for gram, times in plain.items()}

    def probability(history):
        n = len(history) + 1
        lower = 1 / (ids - 1) if n == 1 else probability(history[1:])
        counts = count(n)
        own = {gram: times for gram, times in counts.items() if gram[:-1] == history}
        if not own:
            return lower
        k = Counter(counts.values())
        off = [0, 0.5, 0.5, 0.5]
        if all(k[i] for i in range(1, 5)):
            y = k[1] / (k[1] + 2 * k[2])
            off = [0] + [min(max(i - (i + 1) * y * k[i + 1] / k[i], 0), i) for i in (1, 2, 3)]
        left = sum(off[min(times, 3)] for times in own.values())
        times = own.get((*history, token), 0)
        return (max(times - off[min(times, 3)], 0) + left * lower) / sum(own.values())

    return probability(history)


def test_the_table_has_the_probabilities_of_modified_kneser_ney():
    texts = torch.randint(3, 7, (60, 8), generator=generator(5))
    texts[:, 5:] = torch.tensor([1, 0, 0])
    texts[30:, 3:] = torch.tensor([1, 0, 0, 0, 0])
    prior = prior_of(Ngrams(texts[:50].numpy(), 3, 7))
    p = prior.table[torch.vmap(prior.states)(before(texts[50:]))].exp()
    real = texts[50:] > 0
    torch.testing.assert_close(p.sum(-1)[real], torch.ones(int(real.sum())), rtol=1e-5, atol=0)
    for line, text in enumerate(texts[50:].tolist()):
        for place, token in enumerate(text[:4]):
            history = ((1, 1, *text[:place]))[-2:]
            expected = by_hand(texts[:50].tolist(), history, token, 7, 3)
            assert float(p[line, place, token]) == pytest.approx(expected, rel=1e-4), (history, token)


def test_a_learner_that_returns_nothing_is_the_n_gram_model_without_the_work_of_a_training_line():
    family = toy(shots=[2, 4], prior="ngram")
    train = family.shelves["train"]

    def silent(x):
        return torch.zeros(*x.shape, family.tokenizer.ids)

    def expected(lines, counted):
        prior = prior_of(Ngrams(counted.numpy(), PRIOR_ORDER, family.tokenizer.ids))
        return prior.table[prior.states(before(lines))]

    data = {name: leaf[0] for name, leaf in sampled(family, "test", 1, generator()).query.items() if name != "control"}
    _, scores = loss_of(family)(silent, data)
    torch.testing.assert_close(scores[BITS.name], scores_in_test(family, silent, data)[PRIOR.name])
    other = family.target.scores(expected(data["y"], train.ids), data)
    torch.testing.assert_close(scores[BITS.name], other[BITS.name], rtol=1e-5, atol=0)
    line = 5
    kept = [i for i, work in enumerate(train.works) if work != train.works[line]]
    of_line = expected(train.ids[line : line + 1], train.ids[kept])[0]
    real = train.ids[line] > 0
    torch.testing.assert_close(family.table[train.state[line]][real], of_line[real])
    with pytest.raises(ValueError, match="merges=5 makes word pieces"):
        toy(prior="ngram", merges=5)
