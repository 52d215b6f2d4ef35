"""Drawing from pools of unequal size, and sizes that give way to the data."""

import logging
from collections import Counter
from math import comb

import pytest
import torch
from conftest import composed
from scenarios import generator

from metarun.assemble import assemble
from metarun.command.presets import typed_keys
from metarun.errors import UserError
from metarun.tasks.few_shot import Asked, Range, cells_of, draw_few, sizes_for
from metarun.tasks.text import text


def test_few_are_drawn_uniformly_from_pools_of_any_size():
    available = torch.tensor([3, 5]).repeat(4000, 1)
    drawn = draw_few(available, 3, generator())
    assert (drawn < available[..., None]).all()
    assert (drawn.sort(-1).values.diff() > 0).all()  # no number twice
    assert Counter(map(tuple, drawn[:, 0].sort(-1).values.tolist())) == {(0, 1, 2): 4000}
    sets = Counter(map(tuple, drawn[:, 1].sort(-1).values.tolist()))
    assert len(sets) == comb(5, 3)
    assert max(sets.values()) - min(sets.values()) < 6 * (4000 / 10) ** 0.5
    for place in range(3):  # each number is as likely in each place
        assert (torch.bincount(drawn[:, 1, place], minlength=5) - 800).abs().max() < 5 * (800 * 0.8) ** 0.5


def test_large_pools_are_drawn_from_their_own_rows():
    cells = cells_of(torch.tensor([[2000, 4, 2, 5000, 7]]))
    sizes = Asked(3, 2, 2).sizes()[False]
    for part in cells.draw(sizes, 50, generator()):
        assert set(part.identity.unique().tolist()) == {0, 1, 3, 4}  # two examples are too few
        first, size = (leaf[0][part.identity] for leaf in cells)
        assert ((part.example >= first) & (part.example < first + size)).all()


def pools(train, val=(30,) * 8, test=(30,) * 8):
    return {name: torch.tensor([sizes]) for name, sizes in {"train": train, "val": val, "test": test}.items()}


def lowered(asked, counts, typed=()):
    return sizes_for(asked, counts, "data", "pictures", typed)


def test_what_a_preset_asks_gives_way_and_what_was_typed_is_refused(caplog):
    caplog.set_level(logging.INFO)
    asked, counts = Asked(5, 1, 15, train_ways=20, train_queries=5), pools((30,) * 16)
    assert lowered(asked, counts)[True].ways == 16
    assert caplog.messages == ["data cannot serve larger tasks, so task.train_ways=16 instead of 20."]
    for typed in (None, ["train_ways"]):
        with pytest.raises(ValueError, match="train_ways must be at most 16, the train classes of data"):
            lowered(asked, counts, typed)
    caplog.clear()
    assert lowered(asked._replace(train_ways=16), counts)[True].ways == 16
    assert not caplog.messages
    # What stays as it was is no change, even where it was null.
    lowered(Asked(2, 1, 1, train_shots=9), pools((6,) * 16))
    assert caplog.messages == ["data cannot serve larger tasks, so task.train_shots=5 instead of 9."]


def test_queries_give_way_to_what_half_of_the_classes_have():
    sizes = lowered(Asked(3, 1, 15), pools((30,) * 8, test=(12, 11, 10, 9, 8, 7, 3, 2)))
    assert sizes[False].queries == 8  # four of eight classes have nine pictures
    assert sizes[True].queries == 8
    reptile = lowered(Asked(3, 1, 1, train_shots=10, train_queries=4), pools((6, 6, 6, 6)))
    assert (reptile[True].shots, reptile[True].queries) == (Range(5, 5), 1)
    with pytest.raises(
        ValueError, match=r"ways must be at most 2, the test classes of data with shots \+ queries = 1 \+ 10"
    ):
        lowered(Asked(3, 1, 10), pools((30,) * 8, test=(12, 11, 10, 9)), ["queries"])


@pytest.mark.parametrize("train_ways", [None, 20, 2])
def test_sizes_of_test_tasks_do_not_depend_on_what_a_preset_asks_of_training(train_ways):
    sizes = lowered(Asked(5, 1, 15, train_ways, train_queries=3), pools((30,) * 4))
    assert sizes[False] == Asked(4, 1, 15).sizes()[False]
    assert sizes[True].ways == min(train_ways or 4, 4)


def test_one_shot_is_never_given_up():
    with pytest.raises(ValueError, match="ways must be at most 0"):
        lowered(Asked(3, 5, 15), pools((30,) * 8, test=(5,) * 8))


def test_typed_keys_are_those_of_the_command_line_and_of_the_experiment():
    assert typed_keys(["task.ways=3", "+task.shots=1", "~preset", "algo=maml"], None) == {
        *("task.ways", "task.shots", "preset", "algo")
    }
    assert "task.shots" in typed_keys([], "maml_sinusoid")


def test_a_preset_of_sentences_serves_few_classes(tmp_path):
    (tmp_path / "banking77").mkdir()
    rows = [f"word{i}{j} of{i},label{i}" for i in range(30) for j in range(22)]
    for part in ("train", "test"):
        (tmp_path / "banking77" / f"{part}.csv").write_text("\n".join(["text,category", *rows[part == "test" :: 2]]))
    parts = ("algo=protonet", "task=text", "task.dataset=banking77", f"data_dir={tmp_path}", "task.buckets=16")
    config, names = composed(*parts)
    assert assemble(config, names, {"task.dataset"}).family.spec.sizes.train_ways == 10
    with pytest.raises(UserError, match="train_ways must be at most 10"):
        assemble(config, names, {"task.train_ways"})
    assert text(ways=5, train_ways=10, dataset="banking77", buckets=16, data_dir=str(tmp_path)).sizes[True].ways == 10
