"""Reading boxes of Pascal VOC and COCO, the tasks made of them, and what is said of broken files."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from scenarios import generator

from metarun.after.later_test import check_units
from metarun.checks.family import check_tasks
from metarun.data.boxes import annotated
from metarun.errors import UserError
from metarun.tasks import detection
from metarun.tasks.detection import SIZES, WINDOWS, Detection, turned_colours, windows

WIDTH, HEIGHT = 64, 48
COLOURS = {"cat": (200, 30, 30), "dog": (30, 200, 30), "hen": (30, 30, 200)}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("METARUN_CACHE_DIR", str(tmp_path / "cache"))


def made_up(pictures=48):
    """A name, pixels and boxes per picture: rectangles of the colour of their class on grey noise."""
    rng = np.random.default_rng(0)
    for i in range(pictures):
        pixels, boxes = rng.integers(90, 150, (HEIGHT, WIDTH, 3), dtype=np.uint8), []
        for kind in (list(COLOURS)[i % 3], "dog")[: 1 + i % 2]:
            left, top = int(rng.integers(0, 40)), int(rng.integers(0, 24))
            right, bottom = left + int(rng.integers(8, 24)), top + int(rng.integers(8, 24))
            pixels[top:bottom, left:right] = COLOURS[kind]
            boxes.append((kind, left, top, right, bottom))
        yield f"p{i:02}", pixels, boxes


def xml_of(name, boxes, size=(WIDTH, HEIGHT)):
    objects = "".join(
        f"<object><name>{kind}</name><bndbox><xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax>"
        f"<ymax>{bottom}</ymax></bndbox></object>"
        for kind, left, top, right, bottom in boxes
    )
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}.png</filename>{sides}{objects}</annotation>"


def voc(root, pictures=48):
    """A data set in the layout of Pascal VOC."""
    for folder in ("Annotations", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for name, pixels, boxes in made_up(pictures):
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.png")
        (root / "Annotations" / f"{name}.xml").write_text(xml_of(name, boxes))
    return root


def coco(root, pictures=48):
    """The same data set in the layout of COCO."""
    (root / "images").mkdir(parents=True)
    kinds, images, boxes = list(COLOURS), [], []
    for name, pixels, own in made_up(pictures):
        Image.fromarray(pixels).save(root / "images" / f"{name}.png")
        images.append({"id": len(images) + 1, "file_name": f"{name}.png", "width": WIDTH, "height": HEIGHT})
        for kind, left, top, right, bottom in own:
            box = [left, top, right - left, bottom - top]
            key = {"id": len(boxes), "image_id": len(images), "category_id": 10 + kinds.index(kind)}
            boxes.append({**key, "bbox": box, "iscrowd": 0})
    categories = [{"id": 10 + i, "name": kind} for i, kind in enumerate(kinds)]
    whole = {"images": images, "annotations": boxes, "categories": categories}
    (root / "boxes.json").write_text(json.dumps(whole))
    return root


def family(path, **keys):
    sizes = {"ways": 1, "shots": 1, "queries": 1, "image_size": 32, "augment": False, "test_classes": ["hen"]}
    return Detection(str(path), **{**sizes, **keys})


def test_both_formats_and_a_zip_give_the_same_pictures_and_boxes(tmp_path):
    voc(tmp_path / "voc")
    with zipfile.ZipFile(tmp_path / "voc.zip", "w") as archive:
        for file in sorted((tmp_path / "voc").rglob("*.*")):
            archive.write(file, file.relative_to(tmp_path))
    sources = [tmp_path / "voc", tmp_path / "voc.zip", coco(tmp_path / "coco"), tmp_path / "coco" / "boxes.json"]
    expected = [[(kind, *map(float, box)) for kind, *box in boxes] for _, _, boxes in made_up()]
    for source in sources:
        found, files = annotated(source)
        with files:
            assert [[tuple(box) for box in one.boxes] for one in found] == expected
    tasks = [family(source).sample("test", 3, generator(1)) for source in sources]
    for other in tasks[1:]:
        torch.testing.assert_close(other, tasks[0], rtol=0, atol=0)


@pytest.mark.parametrize("mirrored", [False, True])
def test_boxes_lie_where_the_objects_are(tmp_path, monkeypatch, mirrored):
    """In the square to which a picture is resized, mirrored or not, a box is filled with the colour of its class."""
    monkeypatch.setattr(detection, "turned_colours", lambda count, generator: torch.eye(3).expand(count, 3, 3))
    own = family(voc(tmp_path / "voc"), augment=mirrored)
    for split in ("train", "test"):
        tasks = own.sample(split, 20, generator(2))
        check_tasks(tasks, own.spec, split, 20, "cpu")
        x = own.pictures.shares(tasks.query["x"])
        counted = looked = 0
        for task, picture in np.ndindex(*x.shape[:2]):
            for box, label in zip(
                tasks.query["boxes"][task, picture], tasks.query["label"][task, picture], strict=True
            ):
                if label.sum() > 0 and (box[2:] - box[:2]).min() > 5:
                    left, top, right, bottom = (float(v) for v in box)
                    inside = x[task, picture, :, round(top) + 1 : round(bottom) - 1, round(left) + 1 : round(right) - 1]
                    colours = {kind: torch.tensor(value) / 255 for kind, value in COLOURS.items()}
                    near = {kind: (inside.mean((1, 2)) - colour).abs().max() for kind, colour in colours.items()}
                    kind = min(near, key=near.get)
                    assert (kind == "hen") == (split == "test")
                    counted, looked = counted + int(near[kind] < 0.1), looked + 1
        # A few objects cover each other.
        assert looked >= 8
        assert counted >= 0.8 * looked


def test_boxes_are_in_pixels_of_the_upright_picture(tmp_path):
    root, exif = voc(tmp_path / "data"), Image.Exif()
    expected = family(str(root))
    exif[0x0112] = 6  # to be turned by a right angle
    for path in (root / "JPEGImages").iterdir():
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    found = family(str(root))
    assert torch.equal(found.pixels, expected.pixels)
    assert torch.equal(found.boxes, expected.boxes)
    annotation = root / "Annotations" / "p00.xml"
    annotation.write_text(annotation.read_text().replace(f"<width>{WIDTH}", f"<width>{HEIGHT}"))
    annotation.write_text(annotation.read_text().replace(f"<height>{HEIGHT}", f"<height>{WIDTH}"))
    with pytest.raises(UserError, match="turned as its camera noted"):
        family(str(root))


def test_a_copy_of_a_picture_is_left_out_with_its_boxes(tmp_path, caplog):
    caplog.set_level("INFO")
    root = voc(tmp_path / "data")
    expected = family(str(root))
    (root / "JPEGImages" / "p99.png").write_bytes((root / "JPEGImages" / "p00.png").read_bytes())
    (root / "Annotations" / "p99.xml").write_text((root / "Annotations" / "p00.xml").read_text().replace("p00", "p99"))
    found = family(str(root))
    assert torch.equal(found.pixels, expected.pixels)
    assert torch.equal(found.boxes, expected.boxes)
    assert "p99.png" in caplog.text


def test_training_shows_objects_of_all_sizes_whatever_their_class(tmp_path):
    """The median object of training tasks is as often small as large, and as large for small classes as for others."""
    edge = torch.tensor([0.1, 0.4]).repeat_interleave(2000)
    window = windows(edge, generator(3))
    shown, (low, high) = (edge / window).view(2, -1), SIZES
    assert WINDOWS[0] <= window.min() <= window.max() <= WINDOWS[1]
    assert low <= shown.min() <= shown.max() <= high
    small = (shown < (low * high) ** 0.5).double().mean(1)
    assert small.tolist() == pytest.approx([0.5, 0.5], abs=0.04)
    # An object that would have to be enlarged too much is not.
    assert windows(torch.full((50,), 0.01), generator(4)).tolist() == pytest.approx([WINDOWS[0]] * 50)

    own, medians = family(voc(tmp_path / "voc"), train_queries=4, augment=True), []
    tasks = own.sample("train", 60, generator(5))
    for boxes, label in zip(tasks.query["boxes"], tasks.query["label"], strict=True):
        edges = (boxes[..., 2:] - boxes[..., :2]).mean(-1) / own.target.size
        medians.append(float(edges[label.sum(-1) > 0].median()))
    assert min(medians) < 0.12
    assert max(medians) > 0.4


def test_colours_of_every_second_training_task_are_turned(tmp_path):
    """Distances between colours stay, and all pictures of a task are changed alike; test tasks are as they were."""
    turned = turned_colours(400, generator(6))
    torch.testing.assert_close(turned @ turned.mT, torch.eye(3).expand(400, 3, 3), atol=1e-5, rtol=0)
    kept = (turned == torch.eye(3)).all((1, 2))
    assert kept.double().mean() == pytest.approx(0.5, abs=0.08)
    own = family(voc(tmp_path / "voc"), train_queries=4, augment=True)
    colours = {
        split: [own.pictures.normalised(torch.tensor(COLOURS[kind]).view(1, 3, 1, 1))[0, :, 0, 0] for kind in kinds]
        for split, kinds in {"train": ["cat", "dog"], "test": ["hen"]}.items()
    }
    for split, known in colours.items():
        tasks, seen = own.sample(split, 30, generator(7)), []
        for x, boxes, label in zip(*(tasks.query[name] for name in ("x", "boxes", "label")), strict=True):
            picture, box = (label.sum(-1) * (boxes[..., 2:] - boxes[..., :2]).amin(-1) > 4).nonzero()[:1].T
            if len(picture):
                across, down = ((boxes[picture, box][0, :2] + boxes[picture, box][0, 2:]) / 2).long()
                middle = x[picture[0], :, down, across]
                seen.append(min(float((middle - colour).abs().max()) for colour in known) < 0.3)
        share = sum(seen) / len(seen)
        assert share > 0.8 if split == "test" else 0.2 < share < 0.8


def test_nothing_of_a_test_task_is_in_another(tmp_path):
    own = family(voc(tmp_path / "voc"))
    rows = {name: {int(row) for held in pool.holding.values() for row in held} for name, pool in own.pools.items()}
    assert not rows["test"] & (rows["train"] | rows["val"])
    assert not rows["train"] & rows["val"]
    classes = {name: {own.classes[index] for index in pool.classes} for name, pool in own.pools.items()}
    assert classes == {"train": {"cat", "dog"}, "val": {"cat", "dog"}, "test": {"hen"}}
    tasks = own.sample("test", 40, generator())
    for task in range(40):
        shown = {row.numpy().tobytes() for row in tasks.support["x"][task]}
        assert not shown & {row.numpy().tobytes() for row in tasks.query["x"][task]}
    assert family(tmp_path / "voc", test_classes=["cat"]).dataset != own.dataset


def test_a_later_test_on_other_classes_is_refused(tmp_path):
    root = voc(tmp_path / "data")
    trained = family(str(root))
    check_units(trained, trained)
    with pytest.raises(UserError, match=r"trained on 1 of the 1 classes or tasks of this test, such as cat of"):
        check_units(trained, family(str(root), test_classes=["cat"]))


def test_splits_of_the_data_are_kept(tmp_path):
    root = voc(tmp_path / "voc")
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for part, numbers in {"train": range(15), "val": range(15, 21), "test": range(21, 48)}.items():
        (lists / f"{part}.txt").write_text("".join(f"p{i:02}\n" for i in numbers), encoding="utf-8-sig")
    own = family(root)
    assert "given" in own.dataset
    assert {int(row) for row in own.pools["test"].holding[own.classes.index("hen")]} <= set(range(21, 48))
    (lists / "val.txt").write_text("")
    with pytest.raises(UserError, match=r"names a split for some of its pictures and none for p15|JPEGImages/p15"):
        family(root)


def test_a_learner_reads_boxes_as_its_run_did(tmp_path):
    root = voc(tmp_path / "voc")
    box(5, 5, 5, 40)(root)
    own = family(root, without_area="drop")
    assert own.converter.read(root).y[3] == ()


def edit_xml(change):
    def broken(root):
        path = root / "Annotations" / "p03.xml"
        path.write_text(change(path.read_text()))

    return broken


def box(*corners, kind="cat"):
    return edit_xml(lambda text: xml_of("p03", [(kind, *corners)]))


BROKEN_VOC = {
    "outside of the picture": (
        box(5, 5, 80, 40),
        r"p03.xml, box 1 of .*p03.png \(cat: 5, 5, 80, 40\) leaves its picture",
    ),
    "left of the picture": (box(-9, 5, 20, 40), r"p03.xml, box 1 .* leaves its picture of 64 × 48 pixels"),
    "no area": (box(5, 5, 5, 40), r"p03.xml, object 1 \(cat: 5, 5, 5, 40\) has no area; .*task.without_area=drop"),
    "turned round": (box(30, 5, 10, 40), r"p03.xml, object 1 .* has no area"),
    "no class": (box(5, 5, 20, 40, kind=""), r"p03.xml, object 1 has no class; name it"),
    "no number": (box("left", 5, 20, 40), r"p03.xml, object 1 has xmin 'left'; write a number of pixels"),
    "not finite": (box("nan", 5, 20, 40), r"p03.xml, object 1 has xmin 'nan'; write a number"),
    "no corner": (
        edit_xml(lambda text: text.replace("<ymax>", "<top>").replace("</ymax>", "</top>")),
        r"p03.xml, object 1 has no bndbox/ymax; add it",
    ),
    "cut off": (edit_xml(lambda text: text[: len(text) // 2]), r"p03.xml is not whole XML \(.*\); get the file again"),
    "entities": (
        edit_xml(lambda text: '<!DOCTYPE a [<!ENTITY b "bb">]>' + text),
        "p03.xml declares entities, which annotations need not",
    ),
    "another file": (
        edit_xml(lambda text: "<html></html>"),
        "p03.xml has html where an annotation of Pascal VOC begins",
    ),
    "another size": (
        edit_xml(lambda text: xml_of("p03", [("cat", 1, 1, 9, 9)], (640, 480))),
        r"p03.xml is of a picture of 640 × 480 pixels, and .*p03.png has 64 × 48",
    ),
    "missing picture": (
        lambda root: (root / "JPEGImages" / "p03.png").unlink(),
        r"p03.xml is of the picture p03.png, which is not there; add it",
    ),
    "not a picture": (
        lambda root: (root / "JPEGImages" / "p03.png").write_bytes(b"GIF but not really"),
        r"p03.png, which .*p03.xml annotates, cannot be used: it is not a picture",
    ),
    "cut picture": (
        lambda root: (root / "JPEGImages" / "p03.png").write_bytes(
            (root / "JPEGImages" / "p03.png").read_bytes()[:900]
        ),
        r"p03.png, which .*p03.xml annotates, cannot be used: it cannot be decoded",
    ),
    "two annotations": (
        lambda root: (root / "JPEGImages" / "p03.xml").write_text(xml_of("p03", [])),
        r"JPEGImages/p03.xml and .*Annotations/p03.xml annotate the same picture",
    ),
}


@pytest.mark.parametrize("name", BROKEN_VOC)
def test_a_broken_voc_data_set_gets_one_sentence(tmp_path, name):
    spoil, words = BROKEN_VOC[name]
    root = voc(tmp_path / "voc", 6)
    spoil(root)
    with pytest.raises(UserError, match=words) as error:
        family(root)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def edit_json(change):
    def broken(root):
        held = json.loads((root / "boxes.json").read_text())
        change(held)
        (root / "boxes.json").write_text(json.dumps(held))

    return broken


def setting(where, index, **values):
    return edit_json(lambda held: held[where][index].update(values))


BROKEN_COCO = {
    "cut off": (
        lambda root: (root / "boxes.json").write_text((root / "boxes.json").read_text()[:-30]),
        r"boxes.json is not whole JSON \(.*\); get the file again",
    ),
    "no list": (edit_json(lambda held: held.pop("annotations")), "boxes.json has no list annotations, so it is no"),
    "another file": (lambda root: (root / "boxes.json").write_text("[1, 2]"), "boxes.json has no list images, so"),
    "unknown category": (
        setting("annotations", 2, category_id=99),
        r"boxes.json, annotations\[2\] \(id 2\), has the category id 99, which is unknown; name it in categories",
    ),
    "unknown picture": (
        setting("annotations", 2, image_id=99),
        r"annotations\[2\] \(id 2\), has the image id 99, which no picture has",
    ),
    "duplicate ids": (setting("images", 1, id=1), "gives the image id 1 to p00.png and to p01.png; give each picture"),
    "no bbox": (
        edit_json(lambda held: held["annotations"][0].pop("bbox")),
        r"annotations\[0\] \(id 0\), has no bbox; add it",
    ),
    "short bbox": (
        setting("annotations", 0, bbox=[1, 2, 3]),
        r"annotations\[0\] .* has the bbox \[1, 2, 3\]; write left",
    ),
    "no area": (
        setting("annotations", 0, bbox=[1, 2, 0, 3]),
        r"annotations\[0\] \(id 0\) \(cat: 1, 2, 1, 5\) has no area",
    ),
    "outside": (
        setting("annotations", 0, bbox=[60, 2, 9, 9]),
        r"boxes.json, box 1 of images/p00.png .* leaves its picture",
    ),
    "missing picture": (
        lambda root: (root / "images" / "p01.png").unlink(),
        "boxes.json names the picture p01.png, which is not there; add it, or delete its entry",
    ),
}


@pytest.mark.parametrize("name", BROKEN_COCO)
def test_a_broken_coco_data_set_gets_one_sentence(tmp_path, name):
    spoil, words = BROKEN_COCO[name]
    root = coco(tmp_path / "coco", 6)
    spoil(root)
    with pytest.raises(UserError, match=words) as error:
        family(root)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_boxes_without_an_area_can_be_left_out_and_crowds_are(tmp_path):
    root = coco(tmp_path / "coco", 6)
    setting("annotations", 0, bbox=[1, 2, 0, 3])(root)
    setting("annotations", 1, iscrowd=1)(root)
    found, files = annotated(root, "drop")
    files.__exit__()
    assert [len(one.boxes) for one in found] == [0, 1, 1, 2, 1, 2]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"shots": 9},
            r"too few train pictures of cat \(\d\).*: a task needs 9 shots and 1 queries of each of 1 classes",
        ),
        ({"ways": 2}, "1 classes for test tasks of 2: hen; lower task.ways"),
        ({"test_classes": ["cow"]}, "test_classes must be among cat, dog, hen, not cow"),
        ({"image_size": 40}, "image_size must be a multiple of 16 from 32 to 512, not 40"),
        ({"split": "given"}, "names no splits of its pictures; choose task.split=random"),
    ],
)
def test_what_the_data_cannot_serve_is_refused(tmp_path, keys, words):
    with pytest.raises((UserError, ValueError), match=words):
        family(voc(tmp_path / "voc", 12), **keys)


def test_a_folder_without_annotations_is_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(
        UserError, match="holds no annotations, which are XML files of Pascal VOC or JSON files of COCO"
    ):
        family(tmp_path)
