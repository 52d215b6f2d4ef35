"""Detection: average precision by the rules of COCO, targets and loss, sprites, and the learners on them."""

import contextlib
import io
import json
import shutil

import boxes_by_hand as by_hand
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import composed
from PIL import Image
from scenarios import generator, sampled
from torch.func import vmap

from metarun.algos.agnostic.maml import maml
from metarun.algos.dependent.protonet import protonet
from metarun.checks.family import check_tasks
from metarun.contracts import Numbers, Sizes, Spec
from metarun.data import pictures
from metarun.data.emoji import emoji as every_emoji
from metarun.data.sprites import EDGE, Placed, emoji, pasted, photos
from metarun.engine.batch import meta_gradient
from metarun.errors import UserError
from metarun.inner import Parted, by_row, rows_together
from metarun.models.resnet_fpn import ResNetFPN
from metarun.nn.functional import forward_of, parameters_of
from metarun.run import run
from metarun.targets.boxes import Boxes
from metarun.targets.classes import Classes
from metarun.targets.detections import (
    THRESHOLDS,
    hits,
    mean_over_classes,
    overlap,
    pooled_scores,
    precision_and_recall,
)
from metarun.targets.scoring import loss_of
from metarun.tasks.sprites import SpriteDetection
from metarun.tasks.templates import MIDDLE, STEEP, TemplateMatching


def case(seed):
    """Random true and found boxes, some alike, some on a coarse lattice so that overlaps and scores are tied."""
    g = np.random.default_rng(seed)
    pictures, ways, most, kept = g.integers(1, 9), g.integers(1, 5), g.integers(1, 7), g.integers(1, 21)
    coarse = g.random() < 0.5

    def boxes(*shape):
        centre, size = g.uniform(5, 59, (*shape, 2)), g.uniform(3, 25, (*shape, 2))
        found = np.concatenate([centre - size / 2, centre + size / 2], -1)
        return np.round(found / 4) * 4 + np.array([0, 0, 4, 4]) if coarse else found

    true, kind, real = boxes(pictures, most), g.integers(0, ways, (pictures, most)), g.random((pictures, most)) < 0.7
    real[0, 0] = True
    found, label = boxes(pictures, kept), g.integers(0, ways, (pictures, kept))
    near, pick = g.random((pictures, kept)) < 0.6, g.integers(0, most, (pictures, kept))
    moved = np.take_along_axis(true, pick[..., None], 1)
    moved = moved + g.choice([0, 0.5, 2, 4], (pictures, kept, 1)) * g.normal(size=(pictures, kept, 4))
    moved[..., 2:] = np.maximum(moved[..., 2:], moved[..., :2] + 1)
    found = np.where(near[..., None], moved, found)
    label = np.where(near & (g.random((pictures, kept)) < 0.8), np.take_along_axis(kind, pick, 1), label)
    score = np.round(g.random((pictures, kept)), 1 if g.random() < 0.5 else 12)
    score[g.random((pictures, kept)) < 0.1] = -1  # padding
    order = np.argsort(-score, 1, kind="stable")
    found, label, score = (
        np.take_along_axis(found, order[..., None], 1),
        *(np.take_along_axis(part, order, 1) for part in (label, score)),
    )
    return ways, true, kind, real, found, label, score


def ours(ways, true, kind, real, found, label, score):
    found, label, score, true, kind, real = map(torch.from_numpy, (found, label, score, true, kind, real))
    same = (label[:, :, None] == kind[:, None]) & real[:, None] & (score >= 0)[..., None]
    hit = hits(torch.where(same, overlap(found, true), -1.0))
    counted = (label == torch.arange(ways)[:, None, None]) & (score >= 0)
    positives = torch.stack([((kind == k) & real).sum() for k in range(ways)])
    return *precision_and_recall(score.flatten(), hit.flatten(1), counted.flatten(1), positives), positives, hit


def in_lists(ways, true, kind, real, found, label, score):
    return [
        (
            [(kind[p, i], true[p, i].tolist()) for i in np.flatnonzero(real[p])],
            [(label[p, i], score[p, i], found[p, i].tolist()) for i in np.flatnonzero(score[p] >= 0)],
        )
        for p in range(len(true))
    ]


@pytest.mark.parametrize("seed", range(12))
def test_average_precision_and_recall_are_those_of_the_rules_written_out(seed):
    drawn = case(seed)
    precision, recall, positives, _ = ours(*drawn)
    pictures = in_lists(*drawn)
    for kind in range(drawn[0]):
        for column in (0, 4, 9):
            expected = by_hand.average_precision(pictures, kind, THRESHOLDS[column])
            if expected is None:
                assert positives[kind] == 0
                continue
            found = precision[kind, column].item(), recall[kind, column].item()
            assert found == pytest.approx(expected, abs=1e-12)


def test_average_precision_is_that_of_the_official_code():
    """On 200 random cases, to a millionth."""
    coco, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    for seed in range(200):
        drawn = case(seed)
        pictures = in_lists(*drawn)

        def entries(found, p, start, scored):
            for i, one in enumerate(found):
                left, top, right, bottom = one[-1]
                box = {"image_id": p, "category_id": int(one[0]) + 1, "bbox": [left, top, right - left, bottom - top]}
                extra = {"score": one[1]} if scored else {"id": start + i, "area": 1.0, "iscrowd": 0}
                yield {**box, **extra}

        truths, found = [], []
        for p, (true, own) in enumerate(pictures, 1):
            truths += entries(true, p, len(truths) + 1, scored=False)
            found += entries(own, p, 0, scored=True)
        if not found:
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            data = coco.COCO()
            data.dataset = {
                "images": [{"id": p + 1} for p in range(len(pictures))],
                "annotations": truths,
                "categories": [{"id": k + 1} for k in range(drawn[0])],
            }
            data.createIndex()
            official = evaluation.COCOeval(data, data.loadRes(found), "bbox")
            official.evaluate()
            official.accumulate()
            official.summarize()
        precision, recall, positives, _ = ours(*drawn)
        values = [mean_over_classes(part, positives).item() for part in (precision[:, :1], precision, recall)]
        assert values == pytest.approx([official.stats[1], official.stats[0], official.stats[8]], abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_boxes_of_all_tasks_are_ranked_together(seed):
    """Average precision of all found boxes as if they were of one class, matched within their own."""
    drawn = case(seed)
    *_, positives, hit = ours(*drawn)
    score, number = torch.from_numpy(drawn[-1]), positives.sum()
    real = score >= 0
    precision, recall = precision_and_recall(score.flatten(), hit.flatten(1), real.flatten()[None], number[None])
    rows = torch.cat([score.flatten()[:, None], hit.flatten(1).T.double()], -1)
    first = torch.zeros_like(rows[:1])
    # The pictures as two tasks.
    half = len(rows) // 2
    parts = [torch.cat([first + n, part]) for n, part in ((number - 1, rows[:half]), (1, rows[half : 2 * half]))]
    if len(rows) % 2:
        parts[0], parts[1] = torch.cat([parts[0], rows[-1:]]), torch.cat([parts[1], -torch.ones_like(rows[-1:])])
        score_order = [*range(half), len(rows) - 1, *range(half, 2 * half)]
        precision, recall = precision_and_recall(
            rows[score_order, 0], rows[score_order, 1:].T > 0, (rows[score_order, 0] >= 0)[None], number[None]
        )
    found = pooled_scores(torch.stack(parts))
    expected = [precision[0, 0], precision.mean(), recall.mean()]
    assert list(found.values()) == pytest.approx([float(value) for value in expected], abs=1e-12)


PICTURES = [
    [(0, (3.0, 5.0, 17.0, 19.0)), (1, (14.0, 8.0, 30.0, 31.0))],
    [(2, (0.0, 20.0, 9.0, 32.0))],
    [(1, (11.0, 1.0, 15.0, 7.0)), (1, (20.0, 20.0, 31.0, 27.0)), (0, (1.0, 16.0, 12.0, 31.0))],
]


def padded(most, rubbish=0.0):
    """The boxes of ``PICTURES`` with padding: boxes ``[pictures, most, 4]`` and one-hot classes."""
    boxes, label = torch.full((3, most, 4), rubbish), torch.zeros(3, most, 3)
    for row, own in enumerate(PICTURES):
        for place, (kind, box) in enumerate(own):
            boxes[row, place], label[row, place, kind] = torch.tensor(box), 1.0
    return {"boxes": boxes, "label": label}


TARGET = Boxes(3, 32, most=3, most_found=10)


def data_of(most, rubbish=0.0, target=TARGET):
    data = padded(most, rubbish)
    return {"y": target.drawn(data["boxes"], data["label"]), **data}


@pytest.mark.usefixtures("float64")
def test_targets_and_loss_are_those_of_the_papers_written_out():
    data = data_of(3)
    heat, geometry = by_hand.targets(PICTURES, 32, 4, 3)
    torch.testing.assert_close(data["y"][..., :3], heat)
    near = heat.amax(-1, keepdim=True) >= 0.1
    torch.testing.assert_close(data["y"][..., 4:], torch.where(near, geometry, 0.0))
    torch.testing.assert_close(data["y"][..., 3:4], (~near).to(heat.dtype))
    output = torch.randn(3, 64, TARGET.outputs, generator=generator())
    torch.testing.assert_close(TARGET.loss(output, data), by_hand.loss(output, heat, geometry, 3))


@pytest.mark.usefixtures("float64")
def test_what_the_targets_say_is_found_again():
    data = data_of(3)
    heat, background, geometry = data["y"].split([3, 1, 4], -1)
    output = torch.cat([torch.logit(heat.clamp(1e-6, 1 - 1e-6)), 0 * background, geometry], -1)
    found = TARGET.found(output)
    for row, own in enumerate(PICTURES):
        kept = {
            (int(k), *[round(v, 6) for v in box.tolist()])
            for k, box in zip(found.label[row], found.boxes[row], strict=True)
        }
        assert {(kind, *box) for kind, box in own} <= kept
    assert TARGET.scores(output, data)["ap50"] == 1
    assert all(value == 1 for value in TARGET.further(output, data).values())


@pytest.mark.usefixtures("float64")
def test_padded_boxes_and_padded_pictures_change_nothing():
    tight, loose = data_of(3), data_of(7, rubbish=12.5)
    output = torch.randn(3, 64, TARGET.outputs, generator=generator())
    torch.testing.assert_close(tight["y"], loose["y"], rtol=0, atol=0)
    wider = {name: torch.cat([leaf, torch.zeros_like(leaf[:1])]) for name, leaf in loose.items()}
    wider["weight"] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    more = torch.cat([output, torch.full_like(output[:1], torch.inf)])
    roomy = Boxes(3, 32, most=7, most_found=10)
    for target, own, data in ((roomy, output, loose), (roomy, more, wider)):
        torch.testing.assert_close(target.loss(own, data), TARGET.loss(output, tight), rtol=1e-12, atol=0)
        for measure in ("scores", "further"):
            found, expected = getattr(target, measure)(own, data), getattr(TARGET, measure)(output, tight)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        counts, fewer = (one.counts(o, d, THRESHOLDS) for one, o, d in ((target, own, data), (TARGET, output, tight)))
        assert pooled_scores(counts[None]) == pooled_scores(fewer[None])
    z = torch.randn(3, 64, 5, generator=generator())
    rows, padded_rows = TARGET.rows(z, tight), roomy.rows(torch.cat([z, z[:1]]), wider)
    for one in (rows, padded_rows):
        assert not one.y[one.weight == 0].any()
    kept = [torch.cat([one.z, one.y], -1)[one.weight > 0] for one in (rows, padded_rows)]
    assert sorted(kept[0].tolist()) == sorted(kept[1].tolist())


@pytest.mark.usefixtures("float64")
def test_scores_of_tasks_that_are_mapped_together_are_those_of_each():
    data = data_of(3)
    outputs = torch.randn(4, 3, 64, TARGET.outputs, generator=generator())
    together = vmap(lambda output: {**TARGET.scores(output, data), **TARGET.further(output, data)})(outputs)
    alone = [{**TARGET.scores(output, data), **TARGET.further(output, data)} for output in outputs]
    for name, values in together.items():
        torch.testing.assert_close(values, torch.stack([one[name] for one in alone]), rtol=0, atol=0)


def tiny(**keys):
    sizes = {"ways": 2, "shots": 2, "queries": 2, "image_size": 32}
    return SpriteDetection(**{"sprites": "shapes", "backgrounds": "noise", **sizes, **keys})


def small_model(family):
    torch.manual_seed(0)
    return ResNetFPN(family.spec, (4, 6), 6, zero_head=False)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("first_order", [False, True])
def test_the_meta_gradient_of_maml_is_that_of_a_plain_loop(first_order):
    family = tiny()
    model = small_model(family)
    tasks = sampled(family, "train", 2, generator(1))
    found = meta_gradient(maml(model, 0.05, 2, first_order), {"weights": parameters_of(model)}, tasks, loss_of(family))
    weights = {name: w.detach().clone().requires_grad_() for name, w in model.named_parameters()}

    def of_part(part, task, w):
        lists = [
            [(int(k.argmax()), box.tolist()) for box, k in zip(*both, strict=True) if k.sum() > 0]
            for both in zip(part["boxes"][task], part["label"][task], strict=True)
        ]
        heat, geometry = by_hand.targets(lists, 32, 4, 2)
        return by_hand.loss(by_hand.forward(w, part["x"][task]), heat, geometry, 2)

    total = 0
    for task in range(2):
        fast = dict(weights)
        for _ in range(2):
            loss = of_part(tasks.support, task, fast)
            slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            slopes = [slope.detach() if first_order else slope for slope in slopes]
            fast = {name: w - 0.05 * slope for (name, w), slope in zip(fast.items(), slopes, strict=True)}
        total = total + of_part(tasks.query, task, fast) / 2
    expected = torch.autograd.grad(total, list(weights.values()))
    assert found.loss.item() == pytest.approx(total.item(), rel=1e-9)
    for (name, slope), own in zip(found.grads["weights"].items(), expected, strict=True):
        torch.testing.assert_close(slope, own, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.usefixtures("float64")
def test_learners_that_read_rows_see_locations_and_correct_sizes():
    family = tiny()
    model, target = small_model(family), family.target
    task = {name: leaf[0] for name, leaf in family.sample("test", 1, generator(1)).support.items()}
    embed, weights = forward_of(model.trunk), parameters_of(model.trunk)
    rows, queries = rows_together(family.spec, embed, weights, task, task["x"])
    assert isinstance(queries, Parted)
    z = model.trunk(torch.cat([task["x"], task["x"]]))[: len(task["x"])]
    centres = task["y"][..., :2] == 1
    for kind in range(2):
        expected = z[..., :-4][centres[..., kind]]
        found = rows.z[(rows.y[:, kind] == 1) & (rows.weight > 0)]
        torch.testing.assert_close(*(part[part[:, 0].argsort()] for part in (found, expected)))
    background = rows.z[rows.y[:, 2] == 1]
    assert len(background) > len(task["x"])
    clear = {tuple(row) for row in z[..., :-4][task["y"][..., 2] == 1].detach().numpy().round(9).tolist()}
    assert {tuple(row) for row in background.detach().numpy().round(9).tolist()} <= clear
    # The sizes are corrected by the mean error at the centres of all objects.
    both = centres.any(-1)
    lack = (task["y"][..., -4:-2][both] - z[..., -4:-2][both]).sum(0) / (both.sum() + 1)
    geometry = torch.cat([z[..., -4:-2] + lack, z[..., -2:]], -1)
    answers = by_row(lambda rows: rows[:, :3] * 2, queries)
    torch.testing.assert_close(answers, torch.cat([2 * z[..., :3], geometry], -1))
    algorithm = protonet(model, family.spec, "cosine")
    output = algorithm.predict(algorithm.init(generator()), task, task["x"])
    assert output.shape == task["y"].shape
    torch.testing.assert_close(output[..., 3:], geometry)
    assert target.outputs - target.shared == family.spec.row_outputs == 3


def test_other_tasks_are_refused_by_the_model():
    with pytest.raises(ValueError, match="choose model=conv4"):
        ResNetFPN(Spec(Numbers((3, 32, 32)), Classes(2), Sizes(1, 1, 2), ()))
    with pytest.raises(ValueError, match="image_size must be a multiple of 32 for 4 widths, not 48"):
        ResNetFPN(tiny(image_size=48).spec, (4, 4, 4, 4))


def test_boxes_of_sprites_are_where_they_are_pasted():
    """A white square, whole and over the edge, turned by a right angle and by half of one."""
    size, white = 64, torch.ones(1, 4, 4, EDGE, EDGE)
    centre = torch.tensor([[[20.0, 30.0], [60.0, 30.0], [20.0, 10.0], [44.0, 44.0]]])
    edge, angle = torch.tensor([[16.0, 16.0, 12.0, 20.0]]), torch.tensor([[0.0, torch.pi / 2, 0.0, torch.pi / 4]])
    real = torch.tensor([[True, True, False, True]])
    x, boxes = pasted(torch.zeros(1, 3, size, size), white, real, Placed(centre, edge, angle))
    half = 10 * 2**0.5
    expected = [[12, 22, 28, 38], [52, 22, 64, 38], [0, 0, 0, 0], [44 - half, 44 - half, 44 + half, 44 + half]]
    torch.testing.assert_close(boxes[0], torch.tensor(expected), atol=1.0, rtol=0)
    assert x[0, :, 24:36, 14:26].min() > 0.99
    assert x[0, :, 5:15, 15:25].max() == 0


def parts(family, split):
    """The groups of classes, the photos and the design that pictures of a split are made of."""
    pool = family.pools[split]
    return {family.sprites.groups[i] for i in pool.classes.tolist()}, set(pool.photos.tolist()), pool.design


def test_nothing_of_a_test_task_is_seen_elsewhere():
    groups, backgrounds, designs = zip(*(parts(tiny(), split) for split in ("train", "val", "test")), strict=True)
    for kind in (groups, backgrounds):
        assert all(kind)
        assert not kind[2] & (kind[0] | kind[1])
        assert not kind[0] & kind[1]
    assert designs == (0, 0, 1)
    assert [parts(tiny(designs="same"), split)[2] for split in ("train", "test")] == [0, 0]


def test_tasks_of_sprites_are_what_the_keys_say():
    family = tiny(ways=3, shots=2, queries=3, objects=2, distractors=2)
    tasks = sampled(family, "test", 20, generator(3))
    torch.testing.assert_close(tasks, sampled(family, "test", 20, generator(3)), rtol=0, atol=0)
    check_tasks(tasks, family.spec, "test", 20, "cpu")
    support, query = tasks.support["label"], tasks.query["label"]
    # A sprite that lies outside of its picture altogether has no box, which does not happen here.
    assert (support.sum((1, 2)) == 2).all()
    number = query.sum((2, 3))
    assert set(number.unique().tolist()) == {1, 2}
    assert ((query.sum(2) > 0).sum(1) >= 3).all()
    boxes = tasks.query["boxes"][query.sum(-1) > 0]
    assert boxes.min() >= 0
    assert boxes.max() <= 32
    assert (boxes[:, 2:] - boxes[:, :2] >= 3).all()
    several = family.sample("train", 2, generator(1)).query["x"].shape[1]
    assert (several, tiny(train_queries=1).sample("train", 2, generator()).query["x"].shape[1]) == (9, 2)


def test_photographs_are_split_by_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("METARUN_CACHE_DIR", str(tmp_path / "cache"))
    for kind in range(6):
        (tmp_path / "photos" / str(kind)).mkdir(parents=True)
        for number in range(2):
            colour = (40 * kind, 100 * number, 20)
            Image.new("RGB", (50, 40), colour).save(tmp_path / "photos" / str(kind) / f"{number}.png")
    # A copy in another folder could be in two splits.
    shutil.copy(tmp_path / "photos" / "0" / "0.png", tmp_path / "photos" / "5" / "copy.png")
    family = tiny(backgrounds=str(tmp_path / "photos"))
    shares = [len(parts(family, split)[1]) for split in ("train", "val", "test")]
    assert (sum(shares), [share % 2 for share in shares]) == (12, [0, 0, 0])
    with pytest.raises(UserError, match="holds no pictures"):
        tiny(backgrounds=str(tmp_path / "cache"))


def test_emoji_that_look_alike_are_one_class(tmp_path, monkeypatch):
    monkeypatch.setenv("METARUN_CACHE_DIR", str(tmp_path / "cache"))
    known = []
    for number in range(20):
        name = f"{number}.png"
        known.append({"subcategory": f"kind {number // 10}", "short_name": name, "image": name})
        for place, design in enumerate(("twitter", "google")):
            folder = tmp_path / "emoji" / "img" / design / "64"
            folder.mkdir(parents=True, exist_ok=True)
            # The last emoji is a copy of the first one in one of the designs.
            shade = 10 * (number % 19 if place else number) + 5 * place
            Image.new("RGBA", (12, 12), (shade, 0, 0, 255)).save(folder / name)
    (tmp_path / "emoji" / "emoji.json").write_text(json.dumps(known))
    for decoder in (1, 2):
        monkeypatch.setattr(pictures, "DECODER", decoder)
        found = emoji(tmp_path / "emoji")
        assert found.groups == ["kind 0"] * 10 + ["kind 1"] * 9
        assert len(photos(tmp_path / "emoji" / "img", 16).classes) == 39
        every_emoji(tmp_path / "emoji", pictures.Pictures(16, 3))
    # What was decoded in another way is not read from the cache.
    names = sorted(path.name.partition("-")[0] for path in (tmp_path / "cache").glob("*.bytes"))
    assert names == ["backgrounds", "backgrounds", "emoji", "emoji", "sprites"]


def test_broken_emoji_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("METARUN_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "emoji").mkdir()
    listed = tmp_path / "emoji" / "emoji.json"
    known = [{"subcategory": "cat", "short_name": f"c{i}", "image": f"{i}.png"} for i in range(10)]
    for content, words in (
        ('[{"subcategory":', r"emoji.json is not a list of emoji .*; get the file again"),
        ('[{"image": "a.png"}]', r"emoji.json is not a list of emoji with subcategory, short_name and image"),
        (json.dumps(known), "There is no|cannot be read"),
    ):
        listed.write_text(content)
        with pytest.raises(UserError, match=words):
            tiny(sprites="emoji", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"ways": 0}, "ways must be at least 1, not 0"),
        ({"image_size": 40}, "image_size must be a multiple of 16 from 32 to 256, not 40"),
        ({"sprite_size": (0.5, 0.3)}, r"sprite_size must rise from 0.1 to 0.8 at most, not \[0.5, 0.3\]"),
        ({"turn": 181}, "turn must be 0 to 180 degrees, not 181"),
        ({"hidden": 0.6}, "hidden must be 0 to 0.5, not 0.6"),
        ({"ways": 80}, "ways must be at most 71, by the val classes of shapes, not 80"),
    ],
)
def test_keys_out_of_range_are_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        tiny(**keys)


def test_a_template_is_found_where_it_was_cut_out_and_padding_is_no_template():
    """Its correlation with itself is 1; boxes and pictures that are padding change nothing."""
    target, own = Boxes(2, 64, most=1), generator(5)
    x = torch.randn(2, 3, 64, 64, generator=own)
    boxes = torch.tensor([[[8.0, 14.0, 28.0, 30.0]], [[32.0, 32.0, 44.0, 52.0]]])
    support = {"x": x, "boxes": boxes, "label": torch.eye(2)[:, None]}
    output = TemplateMatching(target)(support, x)
    found = target.found(output)
    for picture in range(2):
        assert found.label[picture, 0] == picture
        torch.testing.assert_close(found.boxes[picture, 0], boxes[picture, 0])
    logit = STEEP * (1 - MIDDLE)
    torch.testing.assert_close(output[..., :2].amax((1, 2)), torch.full((2,), logit), atol=1e-3, rtol=0)
    wide = {name: torch.cat([leaf, leaf[:1]]) for name, leaf in support.items()}
    wide["boxes"] = torch.cat([wide["boxes"], torch.full_like(wide["boxes"], 7.0)], 1)
    wide["label"] = torch.cat([wide["label"], torch.zeros_like(wide["label"])], 1)
    wide["weight"] = torch.tensor([1.0, 1.0, 0.0])
    torch.testing.assert_close(TemplateMatching(target)(wide, x), output)


@pytest.mark.parametrize("algo", ["maml", "reference"])
def test_detection_runs_from_the_command(algo, tmp_path):
    sizes = ("image_size=32", "ways=2", "shots=1", "queries=1", "most_found=4", "sprites=shapes", "backgrounds=noise")
    quick = ("train.steps=1", "train.eval_every=1", "train.val_episodes=2", "eval.episodes=3", "engine=eager")
    config, names = composed(f"algo={algo}", "task=sprites", *(f"task.{key}" for key in sizes), *quick)
    config.model.widths, config.model.features = [4, 4], 4
    run(config, names, tmp_path)
    row = pd.read_csv(tmp_path / "result.csv").iloc[0]
    assert (row["status"], row["metric"]) == ("completed", "ap50")
    for name in ("ap50-95", "ar", "pooled-ap50", "pooled-ap50-95", "pooled-ar"):
        assert 0 <= row[name] <= 1
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "episode.png").exists()
