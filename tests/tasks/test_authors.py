"""Authors: their lines, what is held out, the control, and broken folders."""

import pytest
import torch
from conftest import DATA_DIR
from scenarios import generator, sampled

from metarun.data import lines
from metarun.data.lines import Author
from metarun.data.ngram_prior import found_at, prior_of
from metarun.data.ngrams import Ngrams
from metarun.errors import UserError
from metarun.targets.scoring import loss_of, scores_in_test
from metarun.targets.text import BITS
from metarun.tasks.authors import NGRAM, NGRAM_ADAPTED, Authors, inputs_of


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
        assert len(own) == 1
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
    path = folder(tmp_path, {"ann/1.txt": many("ann"), "ann/2.txt": "more\n", "bob.txt": many("bob")})
    authors, split, _ = lines.own_texts(path, ".", 63)
    assert [(author.name, len(author.lines)) for author in authors] == [("ann", 13), ("bob", 12)]
    assert split is None


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


def test_the_table_has_the_probabilities_of_the_n_gram_model():
    family = toy()
    train, other = family.shelves["train"].ids[::7], family.shelves["test"].ids[:50]
    counts = Ngrams(train.numpy(), 4, family.tokenizer.ids)
    prior = prior_of(counts)
    x = inputs_of(other)
    p = prior.table[torch.vmap(prior.states)(x)]
    nats = -p.gather(-1, other[..., None])[..., 0] * (other > 0)
    torch.testing.assert_close(nats.double(), torch.from_numpy(counts.nats(other.numpy())), rtol=1e-5, atol=1e-5)


def test_a_learner_that_returns_nothing_is_the_n_gram_model_without_the_work_of_a_training_line():
    family = toy(shots=[2, 4], prior="ngram")

    def silent(x):
        return torch.zeros(*x.shape, family.tokenizer.ids)

    data = {name: leaf[0] for name, leaf in sampled(family, "test", 1, generator()).query.items() if name != "control"}
    _, scores = loss_of(family)(silent, data)
    torch.testing.assert_close(scores[BITS.name], scores_in_test(family, silent, data)[NGRAM.name], rtol=1e-3, atol=0)
    train = family.shelves["train"]
    line = 5
    kept = [i for i, work in enumerate(train.works) if work != train.works[line]]
    nats = Ngrams(train.ids[kept].numpy(), 5, family.tokenizer.ids).nats(train.ids[line : line + 1].numpy())
    found = -family.table[train.state[line]].gather(-1, train.ids[line][:, None])[:, 0] * (train.ids[line] > 0)
    torch.testing.assert_close(found.double(), torch.from_numpy(nats[0]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="merges=5 makes word pieces"):
        toy(prior="ngram", merges=5)
