"""Learners of boxes and of generated pictures take pictures as users have them, and give boxes and pictures back."""

import csv

import numpy as np
import pytest
import torch
from conftest import experiment_of
from learners import leave_a_checkpoint
from PIL import Image

import metarun
from metarun.after.load import Remembered
from metarun.after.predict import predict
from metarun.data.converters import Drawings
from metarun.data.generated import Drawn
from metarun.data.objects import Objects, shape_of
from metarun.data.pictures import Pictures
from metarun.targets.boxes import Boxes
from metarun.targets.flow import Flow
from metarun.tasks.detection import Detection
from metarun.tasks.features import Features, Vectors
from metarun.tasks.images import Images

COLOURS = {"cat": (200, 30, 30), "dog": (30, 200, 30), "hen": (30, 30, 200)}
BOXES = [[("cat", 4, 6, 20, 22)], [("dog", 30, 10, 50, 30), ("cat", 2, 20, 18, 44)], [("dog", 8, 8, 24, 40)]]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("METARUN_CACHE_DIR", str(tmp_path / "cache"))


def picture(boxes, seed=0):
    pixels = np.random.default_rng(seed).integers(90, 150, (48, 64, 3), dtype=np.uint8)
    for kind, left, top, right, bottom in boxes:
        pixels[top:bottom, left:right] = COLOURS[kind]
    return pixels


def voc(folder, boxes):
    """Pictures with annotations."""
    folder.mkdir()
    for i, own in enumerate(boxes):
        Image.fromarray(picture(own, i)).save(folder / f"{i:02}.png")
        objects = "".join(
            f"<object><name>{kind}</name><bndbox><xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax>"
            f"<ymax>{bottom}</ymax></bndbox></object>"
            for kind, left, top, right, bottom in own
        )
        (folder / f"{i:02}.xml").write_text(f"<annotation><filename>{i:02}.png</filename>{objects}</annotation>")
    return folder


def test_a_users_boxes_become_what_the_family_makes_of_them(tmp_path):
    boxes = [BOXES[0], BOXES[1], [("hen", 5, 5, 25, 25)], BOXES[2]] * 12
    family = Detection(str(voc(tmp_path / "voc", boxes)), ways=1, shots=1, queries=1, image_size=32)
    rows, classes = torch.tensor([[0, 1, 3]]), torch.tensor([[family.classes.index("cat")]])
    expected = family._part(rows, classes, None, torch.Generator())
    paths = [tmp_path / "voc" / f"{row:02}.png" for row in rows[0].tolist()]
    cats = [[box for box in boxes[row] if box[0] == "cat"] for row in rows[0].tolist()]
    for given in (paths, [path.read_bytes() for path in paths], [np.asarray(Image.open(path)) for path in paths]):
        task = family.converter.task(given, cats)
        for leaf, found in task.support.items():
            torch.testing.assert_close(found, expected[leaf][0])


def test_boxes_come_back_in_the_pixels_of_the_picture():
    target = Boxes(3, 32, most_found=8)
    form = Objects(Pictures(32, 3), target)
    pictures = [picture(own, i) for i, own in enumerate(BOXES)]
    task = form.task(pictures, BOXES)
    heat, background, geometry = task.support["y"].split([3, 1, 4], -1)
    # What a perfect model says: each centre, and nothing elsewhere.
    output = torch.cat([20 * (heat == 1) - 10.0, 0 * background, geometry], -1)
    request = task.ask(pictures)
    answers = request.answers(request.make(lambda x: output, request.data))
    for found, true in zip(answers, BOXES, strict=True):
        assert sorted(one.label for one in found) == sorted(label for label, *_ in true)
        for one in found:
            assert min(max(abs(a - b) for a, b in zip(one[1:5], own[1:], strict=True)) for own in true) < 0.01
    assert task.compared(answers, BOXES) == "AP50 100.00 % with their own boxes"
    # A third of the two classes' objects is not found: that of the second picture's dog.
    answers[1] = [one for one in answers[1] if one.label == "cat"]
    assert task.compared(answers, BOXES) == f"AP50 {100 * (1 + 51 / 101) / 2:.2f} % with their own boxes"
    # The third class has no example, so nothing is of it whatever the model says.
    output[..., 2] = 100.0
    found = request.answers(request.make(lambda x: output, request.data))
    assert {one.label for own in found for one in own} <= {"cat", "dog"}


def test_a_rotated_picture_has_the_shape_in_which_it_is_seen(tmp_path):
    image, exif = Image.fromarray(picture([])), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert shape_of(tmp_path / "turned.jpg") == (48, 64)
    assert shape_of(image) == (64, 48)


def test_a_later_test_on_other_pictures_normalises_them_as_the_run_did(tmp_path):
    for kind in range(6):
        (tmp_path / "data" / f"{kind}").mkdir(parents=True)
        for i in range(2):
            Image.fromarray(picture([("cat", 4, 4, 20, 6 * kind + 8)], i)).save(tmp_path / f"data/{kind}/{i}.png")
    known = Pictures(16, 3, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    family = Images(str(tmp_path / "data"), ways=2, shots=1, queries=1, image_size=16, converter=known)
    assert family.converter == known
    np.savez(tmp_path / "own.npz", x=np.arange(48.0).reshape(12, 4), y=np.repeat(np.arange(6), 2))
    measured = Vectors((1.0,) * 4, (2.0,) * 4)
    vectors = Features(str(tmp_path / "own.npz"), ways=2, shots=1, queries=1, converter=measured)
    assert vectors.converter == measured
    # The rows are (x − 1) / 2 for rows x that begin with a multiple of 4.
    assert ((2 * vectors.rows["test"][:, 0] + 1) % 4 == 0).all()


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    directory = tmp_path_factory.mktemp("detector")
    sizes = ("task.sprites=shapes", "task.backgrounds=noise", "task.ways=3", "task.image_size=32")
    model = ("model.widths=[8,8,8]", "model.features=8", "model.zero_head=false")
    leave_a_checkpoint(experiment_of("algo=maml", "task=sprites", *sizes, *model, "eval.adapt_steps=1"), directory)
    return directory


def test_objects_are_found_from_python_and_in_files(detector, tmp_path):
    learner = metarun.load(detector)
    pictures = [picture(own, i) for i, own in enumerate(BOXES)]
    adapted = learner.adapt(pictures, BOXES)
    found = adapted.predict(pictures)
    assert len(found) == 3
    for own in found:
        assert [one.score for one in own] == sorted((one.score for one in own), reverse=True)
        assert {one.label for one in own} <= {"cat", "dog"}
        assert all(0 <= one.left <= one.right <= 64 and 0 <= one.top <= one.bottom <= 48 for one in own)
    together = learner.adapt_tasks([pictures, pictures[:1]], [BOXES, BOXES[:1]]).predict([pictures[:2], pictures])
    alone = [found[:2], learner.adapt(pictures[:1], BOXES[:1]).predict(pictures)]
    for one, other in zip(together, alone, strict=True):
        assert [[box.label for box in own] for own in one] == [[box.label for box in own] for own in other]
    folder, out = voc(tmp_path / "support", BOXES), tmp_path / "out.csv"
    assert "AP50" in predict(detector, folder, folder, out)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(map(len, found))
    assert list(rows[0]) == ["example", "label", "left", "top", "right", "bottom", "score"]
    for y, sentence in (
        (None, "a list of boxes for each picture"),
        (BOXES[:2], "3 pictures and y has 2"),
        ([[("cat", 1, 2, 3)], [], []], r"boxes as \(label, left, top, right, bottom\), and picture 1"),
        ([[], [("cat", 5, 5, 5, 9)], []], "of picture 2 has no area"),
        ([[], [], [("cat", 5, 5, 90, 9)]], "leaves its 64 × 48 pixels"),
        ([[], [], []], "boxes of 1 to 3 classes"),
    ):
        with pytest.raises(ValueError, match=sentence):
            learner.adapt(pictures, y)


def test_drawn_pictures_have_the_form_of_those_that_were_shown(tmp_path):
    drawing = np.full((16, 16), 255, np.uint8)
    drawing[4:6, 2:12] = 0
    colour = picture(BOXES[0])[:16, :16]
    for form, pixels in ((Drawings(16), drawing), (Pictures(16, 3), colour)):
        Image.fromarray(pixels).save(tmp_path / "own.png")
        task = Drawn(form, Flow((pixels.ndim - 2 or 1, 16, 16)), 2).task([tmp_path / "own.png"], None)
        assert task.support["x"].min() >= -1
        (found,) = task.draw(1).answers(task.support["x"])
        np.testing.assert_array_equal(found, pixels)


def test_pictures_are_drawn_from_a_seed_without_the_data_of_the_run(tmp_path):
    for kind in range(4):
        (tmp_path / "data" / f"{kind}").mkdir(parents=True)
        for i in range(4):
            Image.fromarray(picture([("cat", 4 + i, 4, 20, 10 * kind + 8)], i)).save(tmp_path / f"data/{kind}/{i}.png")
    sizes = ("task.shots=2", "task.queries=2", "task.train_queries=2", "task.image_size=16", "task.channels=1")
    place = f"task.path={tmp_path / 'data'}"
    experiment = experiment_of("algo=maml", "task=generate", place, *sizes, "model.width=8", "eval.adapt_steps=1")
    leave_a_checkpoint(experiment, tmp_path / "run")
    learner = metarun.load(tmp_path / "run")
    (tmp_path / "data" / "0").rename(tmp_path / "shown")
    (tmp_path / "data").rename(tmp_path / "gone")
    assert isinstance(learner.learned.family, Remembered)
    adapted = learner.adapt(sorted((tmp_path / "shown").iterdir()))
    assert adapted.curve.shape == (2,)
    drawn = [adapted.sample(2, seed=seed, steps=2) for seed in (1, 1, 2)]
    assert [one.shape for one in drawn[0]] == [(16, 16)] * 2
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (np.array(drawn[0]) != np.array(drawn[2])).any()
    out = tmp_path / "new.csv"
    predict(tmp_path / "run", tmp_path / "shown", None, out, count=2, seed=3)
    expected = adapted.sample(2, seed=3)
    with out.open(newline="") as file:
        for row, pixels in zip(csv.DictReader(file), expected, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(row["picture"])), pixels)
    with pytest.raises(metarun.UserError, match="draws pictures and predicts nothing"):
        adapted.predict(2)
    with pytest.raises(ValueError, match="number of pictures, at least 1"):
        adapted.sample(0)
    with pytest.raises(ValueError, match="no y besides themselves"):
        learner.adapt(sorted((tmp_path / "shown").iterdir()), ["a", "a", "a"])
