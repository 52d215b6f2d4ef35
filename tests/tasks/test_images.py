"""Pictures, vectors and sentences that users bring: layouts, splits, sampling, and what is wrong with broken ones."""

import io
import logging
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA_DIR, composed
from PIL import Image, ImageOps
from scenarios import generator

from metarun import evaluation
from metarun.assemble import assemble
from metarun.checks.family import check_tasks
from metarun.data import augment, pieces, squad, tables
from metarun.data.converters import Drawings
from metarun.data.files import LARGEST_FILE, Files, table
from metarun.data.objects import listed_pictures
from metarun.data.pictures import Pictures, read_pictures
from metarun.data.splits import dealt
from metarun.data.writing import Lines
from metarun.errors import UserError
from metarun.results.status import rows_of
from metarun.run import run
from metarun.tasks.features import Features
from metarun.tasks.images import Images, colours
from metarun.tasks.text import text

EACH = {f"c{i:02}": 8 if i % 3 else 6 for i in range(12)}
"""Number of pictures per class."""
SMALL = {"image_size": 16, "ways": 2, "queries": 2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METARUN_CACHE_DIR", str(tmp_path / "cache"))


def picture(number: int, size=(20, 24), mode="RGB", kind="PNG") -> bytes:
    buffer, noise = io.BytesIO(), np.random.default_rng(number)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    Image.fromarray(noise.integers(0, 256, shape, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def drawn(root: Path, where="{label}/{i}.png", each=None) -> Path:
    """A folder with pictures of every class; ``where`` says where, for each of ``each``."""
    number = 0
    for label, count in (each or EACH).items():
        split = ("train", "val", "test")[int(label[1:]) // 4]
        for i in range(count):
            path = root / where.format(label=label, i=i, split=split)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(number))
            number += 1
    return root


def zipped(folder: Path, place: Path) -> Path:
    with zipfile.ZipFile(place, "w") as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.write(path, path.relative_to(folder.parent))
    return place


def content(family: Images) -> dict[str, set[bytes]]:
    return {part: {pool.rows[row].numpy().tobytes() for row in pool.order} for part, pool in family.pools.items()}


def test_all_layouts_of_the_same_pictures_are_the_same_data(tmp_path):
    folder = drawn(tmp_path / "deep", "fruit/{label}/{i}.png")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.png").write_bytes(b"")
    rows = [f"deep/fruit/{label}/{i}.png;{label}" for label, count in EACH.items() for i in range(count)]
    (tmp_path / "index.csv").write_text("\ufeffFile;Class\n" + "\n".join(rows))
    inside = tmp_path / "inside"
    shutil.copytree(folder, inside)
    (inside / "index.csv").write_text(
        "path,class\n" + "\n".join(r.replace("deep/", "").replace(";", ",") for r in rows)
    )
    families = [
        Images(str(path), **SMALL)
        for path in (folder, zipped(folder, tmp_path / "deep.zip"), tmp_path / "index.csv", inside)
    ]
    assert len({family.dataset.rpartition(":")[2] for family in families}) == 1
    assert len({str(content(family)) for family in families}) == 1
    assert families[0].classes == families[1].classes
    assert sorted(c for part in families[0].classes.values() for c in part) == sorted(EACH)
    assert Images(str(folder), **SMALL, split_seed=1).dataset != families[0].dataset


@pytest.mark.parametrize("layout", ["folders", "ravi", "column", "lists"])
def test_splits_of_the_data_are_kept(tmp_path, layout):
    """As tiered-ImageNet and CUB are unpacked, mini-ImageNet's and CIFAR-FS's published lists, and a column."""
    options, path = {}, tmp_path / "data"
    if layout == "folders":
        drawn(path, "{split}/{label}/{i}.png")
    elif layout == "lists":
        drawn(path, "data/{label}/{i}.png")
        lists = path / "splits" / "bertinetto"
        lists.mkdir(parents=True)
        for i, split in enumerate(("train", "val", "test")):
            (lists / f"{split}.txt").write_text("\n".join(sorted(EACH)[4 * i : 4 * i + 4]) + "\n")
        options = {"split": str(lists)}
    else:
        drawn(path, "images/{label}_{i}.png")
        for i, split in enumerate(("train", "val", "test")):
            own = [f"{label}_{j}.png,{label}" for label in sorted(EACH)[4 * i : 4 * i + 4] for j in range(EACH[label])]
            if layout == "ravi":
                (path / f"{split}.csv").write_text("filename,label\n" + "\n".join(own))
            else:
                with (path / "index.csv").open("a") as file:
                    file.write("" if i else "path,class,split\n")
                    file.write("".join(f"images/{row},{split}\n" for row in own))
    family = Images(str(path), **SMALL, **options)
    labels = [label for part in family.classes.values() for label in part]
    assert labels == sorted(EACH)
    assert [len(part) for part in family.classes.values()] == [4, 4, 4]
    assert family.dataset.split(":")[1] == ("bertinetto" if layout == "lists" else "given")
    # CUB, whose folder of pictures lies next to other files, split at random.
    if layout == "folders":
        mixed = Images(str(path), **SMALL, split="random")
        assert sorted(label for part in mixed.classes.values() for label in part) == labels
        assert mixed.classes != family.classes


def test_lists_of_classes_name_one_class_each_and_small_ones_are_left_out(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder, lists = drawn(tmp_path / "data", "{label}/{i}.png", EACH | {"c03": 1}), tmp_path / "lists"
    lists.mkdir()
    for part, numbers in {"train": range(6), "val": range(6, 9), "test": range(9, 12)}.items():
        # As Windows saves text.
        (lists / f"{part}.txt").write_text("\r\n".join(f"c{i:02}" for i in numbers), encoding="utf-8-sig")
    family = Images(str(folder), **SMALL, split=str(lists))
    assert family.classes["train"] == [f"c{i:02}" for i in range(6) if i != 3]
    assert "c03 (1)" in caplog.text
    (folder / "c00").rename(tmp_path / "c00")
    for group in "ab":
        shutil.copytree(tmp_path / "c00", folder / group / "c00")
        (folder / group / "c00" / "0.png").write_bytes(picture(ord(group)))
    with pytest.raises(UserError, match=r"train.txt, line 1, names 'c00', which 2 classes end with"):
        Images(str(folder), **SMALL, split=str(lists))


def test_a_class_may_be_a_part_of_the_name(tmp_path):
    drawn(tmp_path / "faces", "session{i}/{label}_0{i}.png")
    family = Images(str(tmp_path / "faces"), **SMALL, class_of="([^/]+)_[0-9]+[.]png$")
    assert sorted(c for part in family.classes.values() for c in part) == sorted(EACH)


def test_tasks_are_balanced_without_a_common_picture_and_agree_with_the_spec(tmp_path):
    family = Images(str(drawn(tmp_path / "data")), image_size=16, ways=3, shots=2, queries=4, train_ways=5)
    for split, ways in (("train", 5), ("test", 3)):
        tasks = family.sample(split, 60, generator())
        check_tasks(tasks, family.spec, split, 60, "cpu")
        assert tasks.query["x"].shape == (60, 4 * ways, 3, 16, 16)
        assert (tasks.support["y"].sum(1) == 2).all()
        known = {}
        for row, label in enumerate(family.classes[split]):
            first, size = (leaf[0, row] for leaf in family.pools[split].cells)
            order = family.pools[split].order[first : first + size]
            known |= {family.converter.normalised(family.pools[split].rows[i]).numpy().tobytes(): label for i in order}
        for i in range(60):
            both = [[x.numpy().tobytes() for x in part["x"][i]] for part in tasks[:2]]
            assert len({*both[0], *both[1]}) == 6 * ways
            labels = [[known[x] for x in part] for part in both]
            of = dict(zip(labels[0], tasks.support["y"][i].argmax(1).tolist(), strict=True))
            assert len(of) == ways
            assert [of[label] for label in labels[1]] == tasks.query["y"][i].argmax(1).tolist()
    held = content(family)
    assert not held["train"] & held["test"]
    assert not held["train"] & held["val"]


def test_training_pictures_are_normalised_and_a_learner_prepares_new_ones_alike(tmp_path):
    folder = drawn(tmp_path / "data")
    family = Images(str(folder), **SMALL)
    pool = family.pools["train"]
    x = family.converter.normalised(pool.rows[pool.order]).double()
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3).double(), atol=1e-3, rtol=0)
    label = family.classes["train"][0]
    paths = sorted((folder / label).iterdir())
    assert torch.equal(
        Pictures(**vars(family.converter)).inputs(paths),
        family.converter.normalised(pool.rows[pool.order[: len(paths)]]),
    )
    torch.testing.assert_close(family.converter.shares(x[:2].float()) * 255, pool.rows[pool.order[:2]].float())


def test_pictures_of_any_mode_become_bytes_as_pillow_makes_them():
    form, noise = Pictures(16, 3), np.random.default_rng(0).integers(0, 256, (24, 20, 4), np.uint8)
    rgb = Image.fromarray(noise[..., :3])
    expected = np.asarray(rgb.resize((16, 16), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert np.array_equal(form.pixels(rgb), expected)
    assert np.array_equal(form.pixels(picture(3, mode="L"))[0], form.pixels(picture(3, mode="L"))[2])
    grey = Image.fromarray(noise[..., 0])
    assert np.array_equal(Pictures(16, 1).pixels(grey)[0], np.asarray(grey.resize((16, 16), Image.Resampling.LANCZOS)))
    cropped = Pictures(16, 1, (0.25, 0.5, 0.75, 1.0)).pixels(grey)[0]
    assert np.array_equal(cropped, np.asarray(grey.resize((16, 16), Image.Resampling.LANCZOS, (5, 12, 15, 24))))
    clear = Image.fromarray(np.concatenate([noise[..., :3], np.zeros_like(noise[..., :1])], 2))
    assert (form.pixels(clear) == 255).all()
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    assert np.abs(Pictures(16, 1).pixels(deep).astype(int) - Pictures(16, 1).pixels(grey)).max() <= 1
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(turned, "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(turned)).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(form.pixels(turned.getvalue()), np.asarray(upright).transpose(2, 0, 1))


def test_more_than_eight_bits_are_scaled_or_refused_and_never_cut_off():
    grey = np.random.default_rng(0).integers(0, 256, (24, 20), np.uint8)
    deep = b"P5 20 24 65535\n" + (grey.astype(">u2") * 257).tobytes()
    expected = Pictures(16, 1).pixels(Image.fromarray(grey)).astype(int)
    assert np.abs(Pictures(16, 1).pixels(deep) - expected).max() <= 1
    for numbers in (grey.astype(np.int32) * 257, grey.astype(np.float32) / 255):
        buffer = io.BytesIO()
        Image.fromarray(numbers).save(buffer, "TIFF")
        with pytest.raises(ValueError, match="scale them to 8 or 16 bits"):
            Pictures(16, 1).pixels(buffer.getvalue())


def test_drawings_of_users_are_read_as_pictures_are(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (24, 20), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(noise.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    clear = np.zeros((24, 20, 4), np.uint8)
    clear[6:12, 6:12, 3] = 255
    Image.fromarray(clear).save(tmp_path / "clear.png")
    for name in ("turned", "deep", "clear"):
        expected = 255 - Pictures(16, 1).pixels((tmp_path / f"{name}.png").read_bytes())
        found = Drawings(16).inputs(str(tmp_path / f"{name}.png"))
        torch.testing.assert_close(found[0] * 255, torch.from_numpy(expected).float())
    assert (found == 0).float().mean() > 0.5  # paper
    with pytest.raises(ValueError, match="divide bytes by 255"):
        Drawings(16).inputs(np.full((2, 16, 16), 200, np.uint8))


def test_an_image_of_the_user_stays_as_it_is():
    image = Image.open(io.BytesIO(picture(0, size=(400, 320), kind="JPEG")))
    found = Pictures(16, 3).inputs([image])
    assert image.size == (400, 320)
    expected = Image.open(io.BytesIO(picture(0, size=(400, 320), kind="JPEG"))).resize(
        (16, 16), Image.Resampling.LANCZOS
    )
    torch.testing.assert_close(found[0] * 255, torch.from_numpy(np.array(expected)).movedim(2, 0).float())


def test_an_array_of_one_picture_is_one_picture_and_not_its_rows():
    one = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    assert torch.equal(Pictures(16, 3).inputs(one), Pictures(16, 3).inputs([one]))
    assert torch.equal(Pictures(16, 3).inputs(torch.from_numpy(one[..., 0])), Pictures(16, 3).inputs([one[..., 0]]))
    assert len(Pictures(16, 3).inputs(one[None])) == 1
    assert len(listed_pictures(one)) == 1


def test_a_picture_that_occurs_twice_is_used_once_and_small_classes_are_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = drawn(tmp_path / "data", each=EACH | {"c11": 1})
    shutil.copy(folder / "c00" / "0.png", folder / "c01" / "again.png")
    family = Images(str(folder), **SMALL)
    assert sum(len(pool.order) for pool in family.pools.values()) == sum(EACH.values()) - EACH["c11"]
    assert "data: 1 pictures are copies of others and are left out, such as one of c01." in caplog.messages
    assert "data: classes with fewer than 2 pictures are left out: c11 (1)." in caplog.messages
    caplog.clear()
    Images(str(drawn(tmp_path / "more", each=dict.fromkeys(EACH, 8) | {"c05": 3})), **(SMALL | {"queries": 6}))
    assert "classes with fewer than 7 pictures are left out: c05 (3)." in caplog.messages[-1]


def test_test_classes_may_come_from_other_data(tmp_path, caplog):
    first = drawn(tmp_path / "first")
    second = tmp_path / "second"
    for number in range(12):
        path = second / f"d{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(5000 + number, mode="L"))
    shutil.copy(first / "c00" / "0.png", second / "d0" / "copied.png")
    family = Images(str(first), **SMALL, test_path=str(second))
    assert family.classes["test"] == ["d0", "d1", "d2"]
    assert sorted(family.classes["train"] + family.classes["val"]) == sorted(EACH)
    assert "test=second" in family.dataset
    assert not content(family)["test"] & (content(family)["train"] | content(family)["val"])
    assert family.sample("test", 2, generator()).query["x"].shape == (2, 4, 3, 16, 16)
    assert Images(str(first), **SMALL).converter != family.converter  # statistics of other training classes
    assert not caplog.text
    (second / "d0").rename(second / "C00")
    Images(str(first), **SMALL, test_path=str(second))
    assert "second: test classes have names of training classes of first: C00." in caplog.text


@pytest.mark.parametrize(("count", "ways"), [(12, 5), (7, 5), (100, 5), (3, 2)])
def test_a_drawn_split_gives_each_part_enough_classes_where_there_are_enough(count, ways):
    names = {f"c{i}" for i in range(count)}
    split = dealt(names, 3, {"train": 0.6, "val": 0.15, "test": 0.25}, ways)
    assert set.union(*split.values()) == names
    assert sum(map(len, split.values())) == count
    assert min(map(len, split.values())) >= min(ways, count // 3)
    assert dealt(names, 4, {"train": 0.6, "val": 0.15, "test": 0.25}, ways) != split or count == 3
    other = dealt(names, 3, {"train": 0.4, "val": 0.1, "test": 0.5}, ways)
    assert all(len(part) >= min(ways, count // 3) for part in other.values())
    assert not dealt(names, 3, {"train": 0.75, "test": 0.25}, ways)["val"]


def test_augmentations_do_what_they_say_and_leave_the_tasks_alone(tmp_path):
    folder = str(drawn(tmp_path / "data"))
    plain, changed = (Images(folder, **SMALL, augment=names) for names in ([], ["flip", "crop", "colour"]))
    first, second = (family.sample("train", 5, generator()) for family in (plain, changed))
    assert torch.equal(first.support["class"], second.support["class"])
    assert not torch.equal(first.support["x"], second.support["x"])
    again = changed.sample("train", 5, generator())
    assert torch.equal(second.query["x"], again.query["x"])
    for split in ("val", "test"):
        assert torch.equal(*(family.sample(split, 5, generator()).query["x"] for family in (plain, changed)))

    pixels = torch.randint(0, 256, (200, 3, 20, 20), dtype=torch.uint8, generator=generator())
    flipped = augment.augmented(pixels, ["flip"], generator())
    same, mirrored = ((flipped == other).flatten(1).all(1) for other in (pixels, pixels.flip(3)))
    assert (same ^ mirrored).all()
    assert 60 < same.sum() < 140
    moved = augment.augmented(pixels, ["crop"], generator())
    found = set()
    for picture_, other in zip(pixels, moved, strict=True):
        hits = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if torch.equal(other[:, 2:-2, 2:-2], picture_[:, 2 - down : 18 - down, 2 - right : 18 - right])
        ]
        assert len(hits) == 1
        found.add(hits[0])
    assert len(found) == 25
    # Colour: the steps one by one, in numpy.
    x, factors = pixels[:3].double().numpy(), (torch.tensor([1.1, 0.6, 1.4]), torch.tensor([0.7, 1.3, 1.0]))
    result = augment.recoloured(pixels[:3], factors[0], factors[1], factors[0].flip(0))
    for i in range(3):
        b, c, s = float(factors[0][i]), float(factors[1][i]), float(factors[0][2 - i])
        y = x[i] * b
        grey = np.tensordot(augment.LUMA, y, 1)
        y, grey = (grey.mean() + c * (part - grey.mean()) for part in (y, grey))
        y = np.clip(np.round(grey + s * (y - grey)), 0, 255)
        assert np.abs(result[i].numpy() - y).max() <= 1


def test_histograms_of_colour_are_those_of_numpy():
    x = torch.rand(2, 3, 8, 8, generator=generator())
    for picture_, found in zip(x, colours(x), strict=True):
        counts, _ = np.histogramdd(picture_.flatten(1).T.numpy(), 8, [(0, 1)] * 3)
        torch.testing.assert_close(found, torch.tensor((counts.flatten() / 64) ** 0.5, dtype=torch.float32))


def test_decoded_pictures_are_read_from_the_cache_until_the_data_change(tmp_path, monkeypatch):
    folder = drawn(tmp_path / "data")
    first = Images(str(folder), **SMALL).dataset
    made = next((tmp_path / "cache").glob("images-*.bytes"))
    monkeypatch.setattr(Pictures, "pixels", None)
    assert Images(str(folder), **SMALL).dataset == first
    monkeypatch.undo()
    monkeypatch.setenv("METARUN_CACHE_DIR", str(tmp_path / "cache"))
    made.write_bytes(b"\0" * made.stat().st_size)
    assert Images(str(folder), **SMALL).dataset == first
    (folder / "c00" / "0.png").write_bytes(picture(999, size=(30, 30)))
    assert Images(str(folder), **SMALL).dataset != first
    (tmp_path / "no").write_text("")
    monkeypatch.setenv("METARUN_CACHE_DIR", str(tmp_path / "no"))
    assert Images(str(folder), **SMALL).sample("test", 1, generator()).support["x"].isfinite().all()


def header_of(width: int, height: int) -> bytes:
    """A small PNG that declares a size."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(9)))
    parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def with_file(name, data):
    """A change of a good folder: a file more, or another content of one."""

    def change(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        return folder

    return change


def index(*rows, head="path,class,split"):
    """A change of a good folder: an index of all pictures and ``rows``."""
    good = [f"{label}/{i}.png,{label},train" for label in EACH for i in range(6)]
    return with_file("index.csv", "\n".join([head, *good, *rows]))


def archive_with(name=None, damage=None, declared=None):
    """A change of a good folder: an archive of it with an entry more, or with damage."""

    def change(folder):
        place = zipped(folder, folder.parent / "data.zip")
        if name:
            with zipfile.ZipFile(place, "a") as archive:
                archive.writestr(name, picture(1))
        if damage:
            place.write_bytes(damage(place.read_bytes()))
        return place

    return change


def both_splits(folder):
    for i, path in enumerate(sorted(folder.rglob("*.png"))):
        own = folder / ("train", "test")[i % 2] / path.parent.name
        own.mkdir(parents=True, exist_ok=True)
        path.rename(own / path.name)
    return folder


def few(folder):
    for label in list(EACH)[2:]:
        shutil.rmtree(folder / label)
    return folder


def one_each(folder):
    for path in folder.rglob("*.png"):
        if path.stem != "0":
            path.unlink()
    return folder


BROKEN_PICTURES = {
    "missing": (lambda folder: folder / "nowhere", {}, ["There is no", "nowhere", "task.path"]),
    "empty": (lambda folder: few(folder).parent, {"path": "cache2"}, ["There is no cache2"]),
    "no picture": (lambda folder: with_file("c/notes.txt", "x")(folder) / "c", {}, ["c holds no picture"]),
    "no folder": (with_file("loose.png", picture(1)), {}, ["loose.png lies in no folder of a class"]),
    "not a picture": (with_file("c00/bad.png", "hello"), {}, ["c00/bad.png cannot be used: it is not a picture"]),
    "empty picture": (with_file("c00/bad.png", b""), {}, ["c00/bad.png", "not a picture"]),
    "half a picture": (with_file("c00/bad.jpg", picture(1, (90, 90), kind="JPEG")[:900]), {}, ["bad.jpg", "decoded"]),
    "absurd size": (with_file("c00/bad.png", header_of(60_000, 60_000)), {}, ["bad.png", "has more than 67108864"]),
    "large size": (with_file("c00/bad.png", header_of(9_000, 10_000)), {}, ["9000 × 10000 pixels, and at most"]),
    "another format": (with_file("c00/bad.png", b"%!PS-Adobe-3.0 EPSF-3.0\n"), {}, ["bad.png", "not a picture"]),
    "no column": (index(head="path,kind,split"), {}, ["index.csv has no column class in its first line"]),
    "no value": (index("c00/0.png,,train"), {}, ["index.csv, line 74, has no class"]),
    "more values": (index("c00/0.png,a,train,1"), {}, ["line 74, has 4 values", "3 columns"]),
    "unknown split": (index("c00/0.png,a,later"), {}, ["line 74, has the split 'later'"]),
    "absent picture": (index("c00/none.png,c00,train"), {}, ["c00/none.png cannot be read (No such file", "line 74"]),
    "two splits": (index("c01/7.png,c01,test"), {}, ["class c01 is in test and train", "task.split=random"]),
    "no test class": (index(), {}, ["no test class"]),
    "no text": (with_file("index.csv", b"path,class\n\xff\xfe,a\n"), {}, ["index.csv, line 2, is not text in UTF-8"]),
    "no row": (with_file("index.csv", "path,class\n"), {}, ["has no row after its first line"]),
    "folders share a class": (both_splits, {}, ["class c00 is in test and train"]),
    "splits and more": (
        lambda folder: shutil.copytree(both_splits(folder) / "test", folder / "predict").parent,
        {},
        ["the folders test and train are splits, and predict next to them is not", "task.class_of"],
    ),
    "few classes": (few, {}, ["data has 2 classes with enough pictures, and train, val, test each need one"]),
    "one example each": (one_each, {}, ["data has 0 classes with enough pictures", "lower task.shots"]),
    "given, but none": (lambda folder: folder, {"split": "given"}, ["data names no splits"]),
    "no lists": (lambda folder: folder, {"split": "lists"}, ["There is no lists", "task.split"]),
    "wrong list": (with_file("lists/train.txt", "c00\nnever\n"), {"split": "data/lists"}, ["line 2, names 'never'"]),
    "not an archive": (
        archive_with(damage=lambda old: b"PK"),
        {},
        ["data.zip cannot be opened as a zip", "pack it again"],
    ),
    "half an archive": (archive_with(damage=lambda old: old[: len(old) // 2]), {}, ["data.zip cannot be opened"]),
    "bit in an archive": (archive_with(damage=lambda old: old.replace(b"IDAT", b"IDAX", 1)), {}, ["data.zip", "CRC"]),
    "way out": (archive_with("../out.png"), {}, ["data.zip has an entry that points outside of it ('../out.png')"]),
    "absolute": (archive_with("/etc/out.png"), {}, ["points outside of it"]),
}


@pytest.mark.parametrize("case", BROKEN_PICTURES)
def test_broken_pictures_are_named_in_one_sentence_and_nothing_of_them_is_used(tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, options, words = BROKEN_PICTURES[case]
    path = change(drawn(tmp_path / "data"))
    with pytest.raises(UserError) as refused:
        Images(**{"path": str(path), **SMALL, **options})
    said = str(refused.value)
    assert said.endswith(".")
    assert "\n" not in said
    for word in words:
        assert word in said, said
    if "cannot be" in said or "damaged" in said:
        assert {path.suffix for path in (tmp_path / "cache").glob("*")} <= {".lock"}


def test_an_entry_that_declares_an_absurd_size_is_refused_before_it_is_read(tmp_path):
    place = zipped(drawn(tmp_path / "data"), tmp_path / "data.zip")
    with Files(place) as files:
        files.archive.getinfo("data/c00/0.png").file_size = LARGEST_FILE + 1
        with pytest.raises(UserError, match=f"has {LARGEST_FILE + 1} bytes, and at most {LARGEST_FILE} are read"):
            files.read("data/c00/0.png")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"image_size": 8}, "image_size must be 16 to 512"),
        ({"channels": 2}, "channels must be 3"),
        ({"crop": (0.5, 0, 0.5, 1)}, "crop must be left, top"),
        ({"augment": ["twist"]}, "augment must hold some of flip, crop, colour, not twist"),
        ({"augment": ["colour"], "channels": 1}, "augment=\\[colour\\] is for channels=3"),
        ({"class_of": "("}, "class_of must be a regular expression with one group"),
        ({"ways": 6}, "ways must be at most 4, the train classes of data"),
    ],
)
def test_keys_out_of_range_are_refused(tmp_path, keys, words):
    with pytest.raises(ValueError, match=words):
        Images(str(drawn(tmp_path / "data")), **{**SMALL, **keys})


def vectors(place: Path, **arrays) -> Path:
    numbers = np.random.default_rng(0)
    own = {"x": numbers.normal(3, 2, (90, 5)).astype(np.float32), "y": np.repeat(np.arange(15), 6)} | arrays
    np.savez(place, **{name: value for name, value in own.items() if value is not None})
    return place


def test_more_shots_leave_every_class_in_its_split_if_enough_are_left(tmp_path, caplog):
    sizes = np.random.default_rng(0).integers(3, 30, 40)
    label, path = np.repeat(np.arange(40), sizes), tmp_path / "vectors.npz"
    np.savez(path, x=np.random.default_rng(1).normal(size=(len(label), 2)), y=label)
    kept = Features(str(path), ways=2, queries=1).classes
    for shots in (5, 9):
        found = Features(str(path), ways=2, queries=1, shots=shots).classes
        assert sum(map(len, found.values())) < sum(map(len, kept.values()))
        assert all(set(own) <= set(kept[part]) for part, own in found.items())
    # Of three classes with a single example more, each split has one.
    assert all(Features(str(path), ways=2, queries=1, shots=int(np.sort(sizes)[-6]) - 1).classes.values())
    assert "copies" not in caplog.text
    with np.load(path) as held:
        np.savez(path, x=held["x"][[0, *range(len(label) - 1)]], y=label)
    Features(str(path), ways=2, queries=1)
    assert "1 vectors are copies of others" in caplog.text


def test_vectors_are_standardised_by_training_classes_and_drawn_by_class(tmp_path):
    family = Features(str(vectors(tmp_path / "v.npz")), ways=3, queries=2)
    assert {split: len(rows) for split, rows in family.rows.items()} == {"train": 48, "val": 18, "test": 24}
    train = family.rows["train"].double()
    torch.testing.assert_close(train.mean(0), torch.zeros(5).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.std(0, correction=0), torch.ones(5).double())
    tasks = family.sample("train", 20, generator())
    check_tasks(tasks, family.spec, "train", 20, "cpu")
    held = np.load(tmp_path / "v.npz")
    of = {
        family.converter.inputs(x[None]).numpy().tobytes(): y
        for x, y in zip(held["x"], held["y"].tolist(), strict=True)
    }
    for i in range(20):
        found = [[of[x.numpy().tobytes()] for x in part["x"][i]] for part in tasks[:2]]
        label = dict(zip(found[0], tasks.support["y"][i].argmax(1).tolist(), strict=True))
        assert [label[y] for y in found[1]] == tasks.query["y"][i].argmax(1).tolist()
    parts = np.repeat(["train", "val", "test"], 30)
    given = Features(str(vectors(tmp_path / "g.npz", split=parts)), ways=3, queries=2, standardise=False)
    assert torch.equal(given.rows["val"], torch.from_numpy(held["x"][30:60]))


def test_vectors_far_from_zero_keep_what_tells_them_apart(tmp_path):
    near = np.random.default_rng(0).normal(size=(90, 5))
    rows = [Features(str(vectors(tmp_path / "v.npz", x=x)), ways=3, queries=2) for x in (near, near + 1e9)]
    for part in ("train", "test"):
        torch.testing.assert_close(rows[1].rows[part], rows[0].rows[part], atol=1e-5, rtol=0)
    x, learner = near[:3], rows[1].converter
    torch.testing.assert_close(learner.inputs(x + 1e9), rows[0].converter.inputs(x), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("float64")
def test_a_number_that_training_never_changes_is_not_scaled_by_its_rounding(tmp_path):
    parts = np.repeat(["train", "val", "test"], [60, 12, 18])
    x = np.where(parts == "test", 0.3, 0.1)[:, None]
    assert torch.from_numpy(x[:60]).std(0, correction=0) > 0
    family = Features(str(vectors(tmp_path / "v.npz", x=x, split=parts)), ways=2, queries=2)
    torch.testing.assert_close(family.rows["test"], torch.full((18, 1), 0.2))


def test_vectors_may_be_of_any_type_that_holds_numbers_and_labels_bytes(tmp_path):
    x, parts = np.random.default_rng(0).integers(0, 99, (90, 5)), np.repeat(["train", "val", "test"], 30)
    y = np.array([f"ü{i // 6:02}" for i in range(90)])
    usual = Features(str(vectors(tmp_path / "v.npz", x=x.astype("f4"), y=y, split=parts)), ways=3, queries=2)
    for kind in (">f4", ">i8", "u2", "f2", np.longdouble):
        changed = {"y": np.char.encode(y, "utf-8"), "split": np.char.encode(parts, "utf-8")}
        other = Features(str(vectors(tmp_path / "v.npz", x=x.astype(kind), **changed)), ways=3, queries=2)
        assert other.class_names == usual.class_names
        assert torch.equal(other.rows["test"], usual.rows["test"])


def lying(place: Path) -> Path:
    """A file whose header declares far more numbers than there are."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 5)})
    with zipfile.ZipFile(vectors(place), "r") as archive:
        labels = archive.read("y.npy")
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(1800))
        archive.writestr("y.npy", labels)
    return place


def zipped_text(place: Path) -> Path:
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00\x06\x00{'de':")
    return place


BAD = np.zeros((90, 5))
BAD[7, 2] = np.nan
BROKEN_VECTORS = {
    "missing": (lambda place: place, ["There is no"]),
    "not one": (lambda place: (place.write_text("x"), place)[1], ["is not a file of numpy.savez"]),
    "no labels": (lambda place: vectors(place, y=None), ["holds no array y"]),
    "no matrix": (lambda place: vectors(place, x=np.zeros(90)), ["x must be numbers of shape [examples, numbers]"]),
    "texts": (lambda place: vectors(place, x=np.full((90, 2), "a")), ["x must be numbers"]),
    "lengths": (lambda place: vectors(place, y=np.zeros(89)), ["y must have shape [90], as x has rows, not [89]"]),
    "objects": (lambda place: vectors(place, y=np.array([None] * 90)), ["holds Python objects"]),
    "not finite": (lambda place: vectors(place, x=BAD), ["row 7 (from 0) of x holds a number that is not finite"]),
    "no label": (lambda place: vectors(place, y=np.r_[np.nan, np.arange(89.0) // 6]), ["row 0 (from 0) of y"]),
    "split": (lambda place: vectors(place, split=np.full(90, "x")), ["row 0 (from 0) has the split 'x'"]),
    "shared": (lambda place: vectors(place, split=np.tile(["train", "test"], 45)), ["class 0 is in test and train"]),
    "lying header": (lying, ["x.npy declares 20000000000000 bytes"]),
    "broken header": (lambda place: zipped_text(place), ["x.npy has a broken header"]),
}


@pytest.mark.parametrize("case", BROKEN_VECTORS)
def test_broken_vectors_are_named(tmp_path, case):
    change, words = BROKEN_VECTORS[case]
    with pytest.raises(UserError) as refused:
        Features(str(change(tmp_path / "v.npz")), ways=3, queries=2)
    for word in words:
        assert word in str(refused.value), str(refused.value)


def sentences(place: Path, *rows, head="text,label") -> Path:
    good = [f'"word{i} of {j}, said {label}",{label}' for label in EACH for i, j in enumerate(range(6))]
    place.write_text("\n".join([head, *good, *rows]))
    return place


def test_own_sentences_are_split_by_label(tmp_path):
    place = sentences(tmp_path / "mine.csv", '"WORD0 of 0, said c00",c05')  # a copy, in another case
    family = text(ways=2, queries=2, buckets=64, path=str(place))
    assert family.dataset.startswith("mine:random7:")
    counts = {split: pool.cells.size.sum().item() for split, pool in family.pools.items()}
    assert counts == {"train": 42, "val": 12, "test": 18}
    split = [("train", "val", "test")[i // 24] for i in range(72)]
    rows = place.read_text().splitlines()[1:73]
    place.write_text(
        "\n".join(
            ["utterance;intent;split", *(f"{r.replace(',c', ';c')};{s}" for r, s in zip(rows, split, strict=True))]
        )
    )
    given = text(ways=2, queries=2, buckets=64, path=str(place))
    assert given.dataset.startswith("mine:given:")
    assert [pool.cells.size.shape[1] for pool in given.pools.values()] == [4, 4, 4]
    new = given.converter.inputs(["word0 of 0, said c00", "never heard of it " * 40])
    assert new.shape == (2, *given.spec.inputs.shape)
    assert torch.equal(new[0], given.pools["train"].rows[0].long())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda place: place, ["There is no"]),
        (lambda place: sentences(place, head="text,sort"), ["no column label"]),
        (lambda place: sentences(place, "a, b,c00"), ["line 74, has 3 values", "in quotes"]),
        (lambda place: sentences(place, ",c00"), ["line 74, has no text"]),
        (lambda place: sentences(place, '"open,c00'), ["mine.csv"]),
        (lambda place: (place.write_bytes(b""), place)[1], ["no column text"]),
        (lambda place: (place.write_text("text,label\na,x\nb,y\n"), place)[1], ["mine has 0 classes with"]),
    ],
)
def test_broken_sentences_are_named(tmp_path, make, words):
    with pytest.raises(UserError) as refused:
        text(ways=2, queries=2, buckets=64, path=str(make(tmp_path / "mine.csv")))
    for word in words:
        assert word in str(refused.value), str(refused.value)


def test_no_reader_takes_what_systems_add_to_folders(tmp_path):
    (tmp_path / "cat").mkdir()
    for name in ("cat/a.png", "rows.csv", "lines.txt", "squad.en.json"):
        (tmp_path / name).write_text("real")
        # As macOS and notebooks leave them.
        for added in (tmp_path / name).with_name(f"._{Path(name).name}"), tmp_path / ".ipynb_checkpoints" / name:
            added.parent.mkdir(parents=True, exist_ok=True)
            added.write_text("not real")
    assert read_pictures(tmp_path).names == ["cat/a.png"]
    assert list(tables.files_of(str(tmp_path), "data")) == ["rows"]
    assert list(squad.files_of(tmp_path)) == ["en"]
    assert Lines(pieces.Pieces(()), 8).read(tmp_path).x == ["real"]


def test_tables_are_read_as_they_are_written():
    rows = table(b'A;B\n"x;\ny";1\n\n z ;2\n', "t.csv", {"a": ("a",), "b": ("b",)})
    assert [(row.line, row.values["a"]) for row in rows] == [(3, "x;\ny"), (5, "z")]


@pytest.mark.slow
def test_many_pictures_are_held_in_bounded_memory_and_drawn_fast(tmp_path):
    """200,000 pictures in 1,000 classes."""
    import resource
    import time

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    place = tmp_path / "many.zip"
    with zipfile.ZipFile(place, "w") as archive:
        for i in range(200_000):
            pixels = np.zeros((84, 84, 3), np.uint8)
            pixels[i % 84, i // 84 % 84] = i // 7056 + 1
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
            archive.writestr(f"c{i % 1000}/{i}.png", buffer.getvalue())
    family = Images(str(place), train_queries=5)
    spent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert family.pools["train"].rows.shape == (200_000, 3, 84, 84)
    times = []
    for seed in range(20):
        began = time.process_time()
        family.sample("train", 4, generator(seed))
        times.append(time.process_time() - began)
    print(f"{spent / 1024:.0f} MB, {1000 * min(times):.1f} ms")
    assert min(times) < 0.02
    # Names and hashes of 200,000 pictures, and what is mapped of their pixels while statistics are measured.
    assert spent < 1.5 * 2**20


RUNS = [
    *(("images", algo) for algo in ("fomaml", "protonet", "centroid")),
    *(("features", algo) for algo in ("reptile", "transfer")),
    ("text", "protonet"),
]


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(("task", "algo"), RUNS)
def test_runs_on_own_data_from_the_presets(tmp_path, caplog, task, algo):
    """Presets ask for more ways and queries than the data have, and the run goes on with a line that says so."""
    caplog.set_level(logging.INFO)
    path = {
        "images": lambda: drawn(tmp_path / "data"),
        "features": lambda: vectors(tmp_path / "v.npz"),
        "text": lambda: sentences(tmp_path / "mine.csv"),
    }[task]()
    quick = ("train.steps=2", "train.meta_batch=2", "train.eval_every=2", "train.val_episodes=2", "eval.episodes=3")
    more = {"images": ("task.image_size=16", "model.filters=4"), "text": ("task.buckets=64",)}.get(task, ())
    config, names = composed(f"algo={algo}", f"task={task}", f"task.path={path}", *quick, *more, "eval.adapt_steps=1")
    assert run(config, names, tmp_path / "run", typed={"task.path"}) >= 0
    assert "cannot serve larger tasks, so task." in caplog.text
    row = rows_of(tmp_path / "run" / "result.csv")[0]
    assert (row["ways"], row["status"]) == ("5" if task == "features" else "4", "completed")


def test_large_tasks_are_evaluated_in_parts_to_the_same_scores(tmp_path, monkeypatch):
    small = ("task.image_size=16", "model.filters=4", "task.ways=2", "task.queries=2")
    config, names = composed("algo=fomaml", "task=images", f"task.path={drawn(tmp_path / 'data')}", *small)
    experiment = assemble(config, names)
    theta, blocks = experiment.initial_thetas()[0], list(evaluation.episodes(experiment, "test", 70))
    whole = evaluation.evaluate(experiment, experiment.replicas[0], theta, blocks)
    counts = []
    adapted = evaluation.batch.evaluate
    monkeypatch.setattr(
        evaluation, "MOST_NUMBERS", 16 * evaluation.numbers_per_task(experiment.algorithm, theta, blocks[0])
    )
    monkeypatch.setattr(
        evaluation.batch, "evaluate", lambda *given: (counts.append(len(given[2].seed)), adapted(*given))[1]
    )
    parts = evaluation.evaluate(experiment, experiment.replicas[0], theta, blocks)
    assert counts == [16, 16, 16, 2, 16, 4]
    torch.testing.assert_close(parts.losses, whole.losses)


@pytest.mark.parametrize("task", ["images", "features"])
def test_a_path_that_was_not_set_is_asked_for(task):
    with pytest.raises(UserError, match=r"task\.path is missing: set it with task\.path=VALUE\."):
        assemble(*composed(f"task={task}"))


@pytest.mark.parametrize(
    ("task", "classes"),
    [
        pytest.param("grocery", {"train": 49, "val": 12, "test": 20}, marks=pytest.mark.slow),
        pytest.param("cells", {"train": 65, "val": 16, "test": 12}, marks=pytest.mark.slow),
        ("faces", {"train": 61, "val": 15, "test": 26}),
    ],
)
def test_named_data_sets_have_their_published_sizes(task, classes):
    config, names = composed(f"task={task}", f"data_dir={DATA_DIR}", "task.image_size=16")
    if not (DATA_DIR / config.task.path).is_dir():
        pytest.skip(f"{config.task.path} is not in METARUN_DATA_DIR")
    family = assemble(config, names, set()).family
    assert {split: len(own) for split, own in family.classes.items()} == classes
    assert family.spec.sizes.ways == 5
