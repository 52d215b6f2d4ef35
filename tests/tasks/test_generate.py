"""Few-shot generation: the flow-matching loss, its bound in bits, samples, and what is measured of them."""

import numpy as np
import pytest
import torch
from PIL import Image
from scenarios import generator, sampled
from torch.func import functional_call

from metarun.algos.agnostic.maml import maml
from metarun.algos.agnostic.reptile import reptile
from metarun.algos.baselines.reference import reference
from metarun.algos.baselines.transfer import transfer
from metarun.algos.dependent.adaptive import adaptive
from metarun.contracts import Numbers, Sizes, Spec, Task
from metarun.data.descriptors import described, kernel_distance
from metarun.engine.batch import evaluate, meta_gradient
from metarun.models.unet import UNetSmall
from metarun.random import drawing, fold, normal, uniform
from metarun.targets.flow import FLOW_LOSS, Flow, Mixture, Noisy, time_of
from metarun.targets.scoring import loss_of
from metarun.tasks.generate import COPIES, Generate, OneNormal, discriminant_accuracy, rivals_of
from metarun.tree import leaves, tree_map


@pytest.fixture(scope="module")
def tiny():
    sizes = {"shots": 3, "queries": 4, "train_queries": 2, "draws": 2, "test_draws": 2, "generated": 6}
    return Generate("procedural", image_size=16, **sizes)


def wide(tasks):
    """The same tasks in float64."""
    return tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tasks)


def test_the_meta_gradient_of_maml_equals_a_plain_loop_in_float64(tiny, float64):
    torch.manual_seed(0)
    model = UNetSmall(tiny.spec, width=8).double()
    algorithm = maml(model, inner_lr=0.2, inner_steps=2)
    theta = algorithm.init(generator())
    tasks = wide(sampled(tiny, "train", 2, generator(1)))
    tasks = tasks._replace(support={"x": tasks.support["x"][:, :2]}, query={"x": tasks.query["x"][:, :1]})
    found = meta_gradient(algorithm, theta, tasks, loss_of(tiny))

    def loss(weights, x, seed, draw):
        """Mean squared error of the velocity, with the noise of the ``draw``-th loss of a task."""
        places, times, wanted = [], [], []
        for i, picture in enumerate(x):
            own = fold(fold(seed, draw), i)
            noise, u = normal(fold(own, 0), (2, *picture.shape)), uniform(fold(own, 1), (2,))
            for j in range(2):
                t = (j + u[j]) / 2
                places.append((1 - t) * noise[j] + t * picture)
                times.append(t)
                wanted.append(picture - noise[j])
        velocity = functional_call(model, weights, (Noisy(torch.stack(places), torch.stack(times)),))
        return (velocity - torch.stack(wanted)).square().mean()

    start = {name: w.clone().requires_grad_() for name, w in theta["weights"].items()}
    total = 0.0
    for x, queries, seed in zip(tasks.support["x"], tasks.query["x"], tasks.seed, strict=True):
        weights = start
        for step in range(2):
            slope = torch.autograd.grad(loss(weights, x, seed, step + 1), list(weights.values()), create_graph=True)
            weights = {n: w - 0.2 * g for (n, w), g in zip(weights.items(), slope, strict=True)}
        total = total + loss(weights, queries, seed, 3) / 2
    expected = torch.autograd.grad(total, list(start.values()))
    assert found.loss.item() == pytest.approx(total.item(), rel=1e-12)
    for a, b in zip(leaves(found.grads), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [maml, reptile, adaptive, transfer, reference])
def test_padding_changes_nothing(tiny, make, float64):
    """Neither where it stands nor what it holds: losses and bits before and after adaptation, and pooled metrics."""
    torch.manual_seed(0)
    model = UNetSmall(tiny.spec, width=8).double()
    algorithm = make(tiny.spec) if make is reference else make(model, tiny.spec) if make is transfer else make(model)
    theta = algorithm.init(generator())
    task = wide(sampled(tiny, "test", 1, generator(2)))

    def padded(data):
        """One picture of padding in front of the others, and one after them."""
        ends = {name: torch.full_like(leaf[:, :1], 7) for name, leaf in data.items()}
        found = {name: torch.cat([ends[name], leaf, ends[name]], 1) for name, leaf in data.items()}
        found["x"] = found["x"].where(found["x"] != 7, 0.0)
        weight = torch.ones(found["x"].shape[:2])
        weight[:, [0, -1]] = 0
        return found | {"weight": weight}

    other = Task(padded(task.support), padded(task.query), task.seed)
    plain = evaluate(algorithm, theta, task, loss_of(tiny), 2)
    again = evaluate(algorithm, theta, other, loss_of(tiny), 2)
    torch.testing.assert_close(plain.losses, again.losses)


def test_pooled_metrics_and_bits_do_not_see_padding_in_the_support_set(tiny, float64):
    torch.manual_seed(0)
    model = UNetSmall(tiny.spec, width=8).double()
    task = tree_map(lambda leaf: leaf[0], wide(sampled(tiny, "test", 1, generator(2))))
    x = task.support["x"]
    support = {"x": torch.cat([torch.zeros_like(x[:1]), x]), "weight": torch.tensor([0.0, 1, 1, 1])}
    with torch.no_grad():
        counts = [tiny.pooled.counts(model, one) for one in (task, task._replace(support=support))]
    torch.testing.assert_close(*counts)


def test_queries_of_a_test_have_the_same_noise_at_every_step(tiny):
    """With a step size of nothing, the loss does not change along adaptation; the support set sees new noise."""
    algorithm = maml(UNetSmall(tiny.spec, width=8), inner_lr=1e-30)
    task = sampled(tiny, "test", 2, generator(2))
    losses = evaluate(algorithm, algorithm.init(generator()), task, loss_of(tiny), 3).losses
    assert bool((losses == losses[:, :1]).all())
    with drawing(task.seed[0], training=False):
        support = {"x": task.support["x"][0]}
        first, second = (loss_of(tiny)(lambda noisy: noisy.x, support)[0] for _ in range(2))
    assert first != second


def family_of_numbers(levels):
    """A flow of single numbers with the given levels, all equally likely, and the velocity with the least loss."""
    flow = Flow((1, 1, 1), draws=1)
    levels = torch.tensor(levels) * 2 / 15 - 1
    ideal = Mixture(levels.view(-1, 1, 1, 1), torch.tensor(0.0), torch.zeros(len(levels))).velocity
    return flow, levels, ideal


@pytest.mark.parametrize(("levels", "bits"), [([0.0, 15.0], 1.0), ([5.0, 6.0, 13.0, 1.0], 2.0)])
def test_the_bound_in_bits_is_the_entropy_where_the_velocity_is_ideal(levels, bits, float64):
    flow, values, ideal = family_of_numbers(levels)
    x = values[torch.arange(2000) % len(values)].view(-1, 1, 1, 1)
    data = {"x": x, "seed": torch.randint(2**62, (2000,), generator=generator())}
    found = flow.bits(ideal, data, draws=64)
    assert found.item() == pytest.approx(bits, abs=0.03)
    # A velocity that knows nothing of the data pays for it.
    poor = flow.bits(lambda noisy: -noisy.x, data, draws=64)
    assert poor > found + 1


def test_the_ideal_velocity_has_the_least_loss_of_its_distribution(float64):
    flow, values, ideal = family_of_numbers([0.0, 6.0, 15.0])
    data = {"x": values[torch.arange(3000) % 3].view(-1, 1, 1, 1), "seed": torch.arange(3000)}
    best = flow.task_loss(ideal, data)[0]
    for factor, shift in ((0.95, 0.0), (1.05, 0.0), (1.0, 0.05), (1.0, -0.05)):
        assert flow.task_loss(lambda noisy: factor * ideal(noisy) + shift, data)[0] > best  # noqa: B023


def test_times_of_the_bound_follow_their_density(float64):
    area = torch.linspace(1e-4, 5, 50)
    t = time_of(area)
    torch.testing.assert_close(-(1 - t).log() - t, area, rtol=1e-8, atol=1e-10)


def test_samples_of_a_normal_distribution_have_its_moments(float64):
    mean = torch.tensor([[[0.5, -0.25]]])
    density = OneNormal(mean, torch.full_like(mean, 0.09), share=1e9)
    flow = Flow((1, 1, 2))
    noise = torch.randn(4000, 1, 1, 2, generator=generator())
    made = flow.sampled(lambda noisy: density({"x": torch.zeros(1, 1, 1, 2)}, noisy), noise, 40)
    torch.testing.assert_close(made.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(made.std(0), torch.full_like(mean, 0.3), rtol=0.03, atol=0)


def test_a_density_of_the_support_pictures_copies_them_and_real_pictures_do_not(tiny):
    tasks = sampled(tiny, "test", 6, generator(3))
    copying, drawing_real = [], []
    for i in range(6):
        task = tree_map(lambda leaf: leaf[i], tasks)  # noqa: B023
        own = task.support["x"]
        narrow = Mixture(own, torch.tensor(1e-4), torch.zeros(3))
        copying.append(tiny.pooled.counts(narrow.velocity, task))
        real = Mixture(task.query["x"], torch.tensor(1e-4), torch.zeros(4))
        drawing_real.append(tiny.pooled.counts(real.velocity, task))
    copies, none = (tiny.pooled.scores(torch.stack(counts)) for counts in (copying, drawing_real))
    assert copies[COPIES.name] > 0.9
    assert none[COPIES.name] < 0.4
    assert none["kernel-distance"] < copies["kernel-distance"]
    # What is trained on the real queries themselves tells them apart.
    assert none["accuracy-generated"] > copies["accuracy-support"] - 0.05


@pytest.mark.parametrize("value", [-1.0, torch.nan])
def test_the_same_picture_of_every_class_and_no_picture_tell_nothing_apart(tiny, value, monkeypatch):
    tasks = sampled(tiny, "test", 6, generator(3))
    monkeypatch.setattr(tiny, "made", lambda predict, task, count: torch.full((count, 1, 16, 16), value))
    scores = tiny.pooled.scores(torch.stack([tiny._counts(None, tree_map(lambda x: x[i], tasks)) for i in range(6)]))  # noqa: B023
    # A diverged generator does not even guess.
    assert scores["accuracy-generated"] == pytest.approx(0.2 if value == -1 else 0)
    assert np.isnan(scores[COPIES.name]) == np.isnan(value)


def test_kernel_distance_equals_its_double_sum():
    a, b = torch.randn(5, 3, generator=generator()), torch.randn(4, 3, generator=generator(1))

    def kernel(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    same = [[np.mean([kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j])] for s in (a, b)]
    across = np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b).item() == pytest.approx(same[0][0] + same[1][0] - 2 * across, rel=1e-4)


def test_the_classifier_is_a_linear_discriminant_among_different_classes():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 4)) * 1.2
    train = [centre + rng.normal(size=(9, 4)) for centre in centres]
    real = np.stack([centre + rng.normal(size=(20, 4)) for centre in centres])
    within = sum((own - own.mean(0)).T @ (own - own.mean(0)) for own in train) / 27
    inverse = np.linalg.inv(within + 0.2 * np.trace(within) / 4 * np.eye(4))
    scores = np.stack([real @ inverse @ m - 0.5 * m @ inverse @ m for m in (own.mean(0) for own in train)], -1)
    expected = (scores.argmax(-1) == np.arange(3)[:, None]).mean()
    sums = torch.tensor(np.stack([np.concatenate([[9], own.sum(0), (own.T @ own).ravel()]) for own in train]))
    rivals = rivals_of([5, 2, 9], 3)
    assert rivals.tolist() == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    assert discriminant_accuracy(sums, torch.tensor(real), rivals) == pytest.approx(expected)
    # A class that was drawn twice is no rival of itself.
    assert rivals_of([5, 5, 2, 9], 3).tolist() == [[0, 2, 3], [1, 2, 3], [2, 3, 0], [3, 0, 2]]


def test_features_change_with_direction_and_not_with_contrast():
    lines = torch.zeros(2, 1, 16, 16)
    lines[0, :, 8], lines[1, ..., 8] = 1, 1
    down, across = described(lines)
    assert (down - across).norm() > 0.5
    torch.testing.assert_close(described(0.5 * lines)[0], down, rtol=0, atol=0.02)


def test_tasks_are_of_one_class_and_test_classes_are_new(tiny):
    task = tiny.sample("test", 5, generator())
    assert task.support["x"].shape == (5, 3, 1, 16, 16)
    assert bool((task.query["class"] == task.query["class"][:, :1]).all())
    # Classes are few strokes, so pictures of one are nearer to each other than to those of other classes.
    flat = torch.cat([task.support["x"], task.query["x"]], 1).flatten(2)
    own = torch.cdist(flat, flat).mean()
    assert own < torch.cdist(flat[[0]], flat[[1]]).mean() + torch.cdist(flat[[2]], flat[[3]]).mean()
    pictures = {split: {row.numpy().tobytes() for row in pool.rows} for split, pool in tiny.pools.items()}
    assert not pictures["train"] & pictures["test"]


def test_ranges_of_shots_leave_padding():
    family = Generate("procedural", shots=(1, 4), queries=3, generated=2, image_size=16)
    task = family.sample("test", 40, generator())
    counts = task.support["weight"].sum(1)
    assert set(counts.tolist()) == {1.0, 2.0, 3.0, 4.0}
    assert task.support["x"][task.support["weight"] == 0].abs().sum() == 0


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"queries": 1}, "queries must be at least 2"),
        ({"shots": 15, "queries": 6}, "more pictures than any train class"),
        ({"sampler_steps": 0}, "sampler_steps must be at least 1"),
        ({"image_size": 4}, "image_size must be 8 to 128"),
        ({"channels": 3}, "grey; set channels=1"),
        ({"train_design": "twitter"}, "train_design is for dataset=emoji"),
    ],
)
def test_wrong_keys_are_refused(keys, sentence):
    with pytest.raises(ValueError, match=sentence):
        Generate("procedural", **{"image_size": 16, **keys})


def test_unet_refuses_what_it_cannot_draw():
    def spec(shape, target):
        return Spec(Numbers(shape), target, Sizes(1, 1), (FLOW_LOSS,))

    with pytest.raises(ValueError, match="multiple of 4"):
        UNetSmall(spec((1, 18, 18), Flow((1, 18, 18))))
    with pytest.raises(ValueError, match="multiple of 8"):
        UNetSmall(spec((1, 16, 16), Flow((1, 16, 16))), width=12)
    model = UNetSmall(spec((3, 16, 20), Flow((3, 16, 20))), width=8)
    noisy = Noisy(torch.randn(2, 3, 16, 20), torch.tensor([0.1, 0.9]))
    assert model(noisy).shape == noisy.x.shape
    # The time matters, and pictures do not see each other.
    assert not torch.equal(model(noisy), model(Noisy(noisy.x, noisy.t.flip(0))))
    torch.testing.assert_close(model(Noisy(noisy.x[:1], noisy.t[:1])), model(noisy)[:1])


def test_the_users_own_pictures_are_no_drawings_whatever_their_folder_is_called(tmp_path, monkeypatch):
    monkeypatch.setenv("METARUN_CACHE_DIR", str(tmp_path / "cache"))
    noise = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / "omniglot_like" / f"class{number}"
        folder.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(noise.integers(0, 256, (16, 16), np.uint8)).save(folder / f"{i}.png")
    sizes = {"shots": 1, "queries": 2, "generated": 2, "image_size": 16, "channels": 1}
    family = Generate(path=str(tmp_path / "omniglot_like"), **sizes)
    read = family.converter.pictures.inputs(sorted((tmp_path / "omniglot_like").rglob("*.png")))
    known = {tuple(picture.flatten().tolist()) for picture in family.pools["train"].rows}
    assert {tuple((255 * picture).round().int().flatten().tolist()) for picture in read} == known
