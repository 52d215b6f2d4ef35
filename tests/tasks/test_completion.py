"""Completion of pictures: which pixels, of which pictures, and what is refused."""

import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from scenarios import generator

from metarun.contracts import Task
from metarun.errors import UserError
from metarun.models.coordinate_mlp import CoordinateMLP
from metarun.targets.scoring import loss_of
from metarun.tasks.completion import Completion, index_of, places
from metarun.tasks.generate import Generate


@pytest.fixture(scope="module")
def family():
    return Completion("procedural", shots=20, image_size=16)


@pytest.fixture
def emoji_folder(tmp_path, monkeypatch):
    """Six subcategories of three emoji in two designs; the value of a picture's only colour tells which it is."""
    monkeypatch.setenv("METARUN_CACHE_DIR", str(tmp_path / "cache"))
    listed = []
    for kind in range(6):
        for number in range(3):
            name = f"{kind}{number}.png"
            listed.append({"image": name, "subcategory": f"kind {kind}"})
            for place, design in enumerate(("google", "twitter")):
                folder = tmp_path / "emoji" / "img" / design / "64"
                folder.mkdir(parents=True, exist_ok=True)
                shade = 10 * kind + 3 * number + 100 * place
                Image.fromarray(np.full((12, 12, 3), shade, dtype=np.uint8)).save(folder / name)
    (tmp_path / "emoji" / "emoji.json").write_text(json.dumps(listed))
    return tmp_path


def picture_of(task: Task, size: int) -> torch.Tensor:
    """The picture of the first task, from all of its pixels."""
    x, y = (torch.cat([task.support[name][0], task.query[name][0]]) for name in ("x", "y"))
    return y[index_of(x, size).argsort()].view(size, size, -1)


def test_support_and_queries_are_the_pixels_of_one_picture_of_a_new_class(family):
    task = family.sample("test", 3, generator())
    assert task.support["x"].shape == (3, 20, 2)
    assert task.query["y"].shape == (3, 236, 1)
    at = index_of(torch.cat([task.support["x"], task.query["x"]], 1), 16).sort(1).values
    assert bool((at == torch.arange(256)).all())
    found = (picture_of(task, 16)[..., 0] * 255).round().to(torch.uint8)
    is_it = {split: bool((pool.rows[:, 0] == found).flatten(1).all(1).any()) for split, pool in family.pools.items()}
    assert is_it == {"train": False, "val": False, "test": True}


def test_places_are_pixel_centres_row_by_row():
    found = places(4)
    assert found[0].tolist() == [-0.75, -0.75]
    assert found[1].tolist() == [-0.25, -0.75]
    assert bool((index_of(found, 4) == torch.arange(16)).all())


def test_a_range_of_pixels_leaves_padding_that_changes_no_loss():
    family = Completion("procedural", shots=(3, 9), queries=12, image_size=16)
    task = family.sample("test", 30, generator())
    assert set(task.support["weight"].sum(1).tolist()) == set(range(3, 10))
    model = CoordinateMLP(family.spec, (8,), 1)
    one = {name: leaf[0] for name, leaf in task.support.items()}
    real = one["weight"] > 0
    bare = {name: leaf[real] for name, leaf in one.items() if name != "weight"}
    torch.testing.assert_close(loss_of(family)(model, one)[0], loss_of(family)(model, bare)[0])


def test_subcategories_and_the_design_of_emoji_are_held_out(emoji_folder):
    family = Completion("emoji", shots=5, image_size=8, train_design="twitter", data_dir=str(emoji_folder))
    shades = {
        split: {int(shade) for shade in pool.rows[pool.order].flatten(1)[:, 0]} for split, pool in family.pools.items()
    }
    assert min(shades["train"]) >= 100 > max(shades["test"] | shades["val"])
    kinds = {split: {shade % 100 // 10 for shade in own} for split, own in shades.items()}
    assert not kinds["train"] & (kinds["test"] | kinds["val"])
    assert set.union(*kinds.values()) == set(range(6))
    other = Completion("emoji", shots=5, image_size=8, data_dir=str(emoji_folder))
    assert other.dataset != family.dataset
    assert len(other.pools["test"].order) == 2 * len(family.pools["test"].order)


def test_a_class_of_emoji_to_generate_has_one_design(emoji_folder):
    family = Generate("emoji", shots=1, queries=2, generated=2, image_size=8, data_dir=str(emoji_folder))
    task = family.sample("train", 30, generator())
    shade = ((torch.cat([task.support["x"], task.query["x"]], 1)[:, :, 0, 0, 0] + 1) / 2 * 255).round()
    design, kind = shade >= 100, shade % 100 // 10
    assert bool((design == design[:, :1]).all())
    assert bool((kind == kind[:, :1]).all())
    assert set(design[:, 0].tolist()) == {True, False}


def test_the_mean_training_picture_is_the_answer_without_a_learner(family):
    expected = family.pools["train"].rows.double().mean((0, 1)) / 255
    found = family.spec.facts.references["mean_picture"]({}, places(16)).view(16, 16)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.02)


def test_the_picture_of_samples_shows_support_pixels_and_the_true_picture(family, monkeypatch):
    task = family.sample("test", 2, generator())
    shown = {}

    def grid(columns, ink):
        shown.update(columns)
        return Figure()

    monkeypatch.setattr("metarun.tasks.completion.grid_of_pictures", grid)
    family.samples.show({"after": {"completed": torch.zeros(2, 256, 1)}}, task)
    assert list(shown) == ["support", "after adaptation", "true"]
    assert int((~shown["support"][0].isnan()).sum()) == 20
    torch.testing.assert_close(shown["true"][0], picture_of(task, 16))


def wrong_json(folder):
    (folder / "emoji" / "emoji.json").write_text("[{")


def no_field(folder):
    (folder / "emoji" / "emoji.json").write_text('[{"image": "a.png"}]')


def no_list(folder):
    (folder / "emoji" / "emoji.json").unlink()


def empty_list(folder):
    (folder / "emoji" / "emoji.json").write_text("[]")


def no_pictures(folder):
    for path in (folder / "emoji" / "img").rglob("*.png"):
        path.unlink()


def broken_picture(folder):
    (folder / "emoji" / "img" / "google" / "64" / "11.png").write_bytes(b"GIF89a no picture")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (wrong_json, "emoji.json is not a list of emoji with the fields image and subcategory"),
        (no_field, "is not a list of emoji with the fields"),
        (no_list, "emoji.json cannot be read"),
        (empty_list, "lists no emoji"),
        (no_pictures, "holds no picture that emoji.json lists"),
        (broken_picture, r"11\.png cannot be used"),
    ],
)
def test_broken_emoji_get_one_sentence(emoji_folder, damage, sentence):
    damage(emoji_folder)
    with pytest.raises(UserError, match=sentence) as refused:
        Completion("emoji", shots=5, image_size=8, data_dir=str(emoji_folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"shots": 256}, "shots must be below 256"),
        ({"shots": 200, "queries": 100}, "queries must be 1 to 56"),
        ({"train_shots": [9, 3]}, "train_shots must be a rising range"),
        ({"image_size": 300}, "image_size must be 8 to 128"),
        ({"channels": 2}, r"channels must be 1 \(grey\) or 3"),
        ({"split": "vinyal", "dataset": "omniglot"}, "split must be auto, vinyals or random"),
    ],
)
def test_wrong_keys_are_refused(keys, sentence):
    with pytest.raises(ValueError, match=sentence):
        Completion(**{"dataset": "procedural", "image_size": 16, **keys})


def test_a_design_that_is_not_there_is_refused(emoji_folder):
    with pytest.raises(ValueError, match="train_design must be one of the designs google, twitter"):
        Completion("emoji", image_size=8, shots=5, train_design="apple", data_dir=str(emoji_folder))
