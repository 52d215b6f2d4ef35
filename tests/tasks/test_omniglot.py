import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scenarios import generator

from metarun.data import omniglot as data
from metarun.data.procedural import procedural_characters
from metarun.errors import UserError
from metarun.tasks.omniglot import Omniglot


@pytest.fixture(scope="module")
def procedural():
    return Omniglot(ways=5, shots=2, queries=3, dataset="procedural")


def test_a_batch_is_balanced_shuffled_and_support_and_query_share_no_drawing(procedural):
    tasks = procedural.sample("train", 40, generator())
    for part, shots in zip(tasks[:2], (2, 3), strict=True):
        assert part["x"].shape == (40, 5 * shots, 1, 28, 28)
        assert 0 <= part["x"].min() < part["x"].max() <= 1
        assert (part["y"].sum(1) == shots).all()
    # Neither the rank of a class nor the position of an image tells its label.
    identity, label = tasks.support["class"], tasks.support["y"].argmax(-1)
    rank = torch.stack([torch.unique(row, return_inverse=True)[1] for row in identity])
    assert 0.1 < (rank == label).double().mean() < 0.3
    assert 0.1 < (label == torch.arange(10) // 2).double().mean() < 0.3
    # Every image of a task is another one, and the same class has the same label in both parts.
    images = torch.cat([part["x"].flatten(2) for part in tasks[:2]], 1)
    assert (torch.cdist(images, images) + 99 * torch.eye(25) > 0.5).all()
    for i in range(40):
        known = dict(zip(identity[i].tolist(), label[i].tolist(), strict=True))
        query = zip(tasks.query["class"][i].tolist(), tasks.query["y"][i].argmax(-1).tolist(), strict=True)
        assert all(known[c] == y for c, y in query)


def test_test_tasks_do_not_name_their_classes(procedural):
    tasks = procedural.sample("test", 2, generator())
    assert set(tasks.support) == set(tasks.query) == {"x", "y"}


def test_pools_are_disjoint(procedural):
    flat = {split: images[:, 0].flatten(1).float() for split, images in procedural.images.items()}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert torch.cdist(flat[a], flat[b]).min() > 0


@pytest.mark.parametrize(("rotations", "classes"), [("none", 600), ("task", 2400), ("classes", 2400)])
def test_rotations(rotations, classes):
    family = Omniglot(dataset="procedural", rotations=rotations)
    assert len(family.images["train"]) == classes
    upright = procedural_characters(28)["train"]
    if rotations != "none":
        torch.testing.assert_close(family.images["train"][6], upright[1].rot90(2, (1, 2)))
    tasks = family.sample("train", 200, generator())
    characters = torch.div(tasks.support["class"], classes // 600, rounding_mode="floor")
    repeats = sum(len(set(row)) < 5 for row in characters.tolist())
    # With a turn drawn for each class a task has five characters; as classes, turns of one can meet.
    assert (repeats > 0) == (rotations == "classes")


def test_procedural_characters_are_the_same_everywhere_and_hard_for_pixels():
    """A pixel nearest neighbour gets 63 % at 5 ways 1 shot, far below what is learned (README, Results)."""
    family = Omniglot(dataset="procedural")
    tasks = family.sample("test", 300, generator())
    distance = torch.cdist(tasks.query["x"].flatten(2), tasks.support["x"].flatten(2))
    predicted = tasks.support["y"].argmax(-1).gather(1, distance.argmin(-1))
    accuracy = (predicted == tasks.query["y"].argmax(-1)).double().mean()
    assert 0.4 < accuracy < 0.75


def test_real_data(real_omniglot):
    images, split = data.characters(real_omniglot, 28, "auto")
    assert split == "vinyals"
    assert {name: len(part) for name, part in images.items()} == {"train": 1028, "val": 172, "test": 423}
    random, _ = data.characters(real_omniglot, 28, "random")
    assert {name: len(part) for name, part in random.items()} == {"train": 1100, "val": 100, "test": 423}
    for parts in (images, random):
        digests = [hashlib.sha256(c.numpy().tobytes()).digest() for part in parts.values() for c in part]
        assert len(set(digests)) == 1623
    # Ink is bright on dark: a drawing is mostly empty.
    assert 5 < images["train"].float().mean() < 40


def png(value=255, size=105):
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size), value, np.uint8)).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


def write_data_set(root: Path, extra: dict[str, bytes] | None = None) -> Path:
    """A data set of one character a half, with ``extra`` entries in the first zip."""
    folder = root / "omniglot"
    folder.mkdir(exist_ok=True)
    for half in data.MD5:
        with zipfile.ZipFile(folder / f"{half}.zip", "w") as archive:
            for drawing in range(20):
                archive.writestr(f"{half}/{half}/character01/{drawing:02}.png", png())
            for name, content in (extra or {}).items() if half == "images_background" else ():
                archive.writestr(name, content)
    return folder


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METARUN_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("name", ["../outside.png", "/etc/outside.png", "a/../../outside.png"])
def test_an_entry_that_points_outside_is_refused(tmp_path, name):
    write_data_set(tmp_path, {name: png()})
    with pytest.raises(UserError, match="points outside"):
        data.characters(str(tmp_path), 28, "random")


@pytest.mark.usefixtures("no_cache")
def test_damaged_data_are_refused_and_named(tmp_path):
    folder = write_data_set(tmp_path)
    whole = (folder / "images_background.zip").read_bytes()
    for damage in (whole[: len(whole) // 2], b"", whole.replace(b"IDAT", b"IDAX", 1)):
        (folder / "images_background.zip").write_bytes(damage)
        with pytest.raises(UserError, match=r"images_background\.zip") as caught:
            data.characters(str(tmp_path), 28, "random")
        assert "task.download=true" in str(caught.value)


@pytest.mark.usefixtures("no_cache")
def test_a_data_set_with_characters_missing_is_refused(tmp_path):
    write_data_set(tmp_path)
    with pytest.raises(UserError, match="holds 2 characters where the data set has 1623"):
        data.characters(str(tmp_path), 28, "random")


@pytest.mark.usefixtures("no_cache")
def test_a_character_with_a_missing_drawing_is_refused(tmp_path):
    write_data_set(tmp_path, {"images_background/Alphabet/character02/01.png": png()})
    with pytest.raises(UserError, match="character02 has 1 drawings"):
        data.characters(str(tmp_path), 28, "random")


def test_download_checks_the_sum_and_leaves_nothing_behind(tmp_path, monkeypatch):
    source = tmp_path / "upstream"
    source.mkdir()
    for half in data.MD5:
        (source / f"{half}.zip").write_bytes(half.encode())
    with pytest.raises(UserError, match="wrong md5"):
        data.download(str(tmp_path), source.as_uri() + "/")
    assert not (tmp_path / "omniglot").exists()
    sums = {half: hashlib.md5(half.encode()).hexdigest() for half in data.MD5}
    monkeypatch.setattr(data, "MD5", sums)
    data.download(str(tmp_path), source.as_uri() + "/")
    assert (tmp_path / "omniglot" / "images_evaluation.zip").read_bytes() == b"images_evaluation"
    with pytest.raises(UserError, match="could not be fetched"):
        data.download(str(tmp_path / "other"), (tmp_path / "nowhere").as_uri() + "/")


@pytest.mark.usefixtures("no_cache")
def test_unpacked_folders_and_zips_hold_the_same(tmp_path):
    folder = write_data_set(tmp_path)
    packed = data._read(folder, 28)
    for half in data.MD5:
        with zipfile.ZipFile(folder / f"{half}.zip") as archive:
            archive.extractall(folder)
        (folder / f"{half}.zip").unlink()
    torch.testing.assert_close(data._read(folder, 28), packed, rtol=0, atol=0)
