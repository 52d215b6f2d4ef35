"""Numbers from seeds: their distributions, their independence, and that whatever runs a step draws the same."""

import shutil

import pytest
import torch

from metarun.contracts import Task
from metarun.engine.recording import Recording
from metarun.errors import UserError
from metarun.nn import noise
from metarun.nn.transforms import over_tasks
from metarun.random import drawing, fold, fresh_seed, normal, uniform


def generator():
    return torch.Generator().manual_seed(0)


def test_splitmix64_as_published():
    """The first outputs of the reference generator (Vigna, https://prng.di.unimi.it/splitmix64.c) with seed 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    expected = [(value >> 41) / 2**23 + 0.5 / 2**23 for value in published]
    torch.testing.assert_close(uniform(torch.tensor(1234567), (3,)), torch.tensor(expected))


def test_normal_numbers_have_the_moments_of_a_normal_distribution():
    z = normal(torch.randint(2**62, (400,), generator=generator()), (50, 20))
    assert z.shape == (400, 50, 20)
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert (z**power).mean().item() == pytest.approx(moment, abs=0.03)
    inside = (z.abs() < 1.96).double().mean().item()
    assert inside == pytest.approx(0.95, abs=0.002)


def test_streams_of_a_seed_are_independent_of_it_and_of_each_other():
    seeds = torch.randint(2**62, (3,), generator=generator())
    streams = torch.stack([uniform(seed, (20_000,)) for one in seeds for seed in (one, fold(one, 0), fold(one, 1))])
    assert torch.corrcoef(streams).fill_diagonal_(0).abs().max() < 0.03


def tasks(count):
    x = torch.zeros(count, 2, 3)
    return Task({"x": x}, {"x": x}, torch.randint(2**62, (count,), generator=generator()))


def drawn(task):
    return torch.stack([normal(fresh_seed(), (14,)), normal(fresh_seed(), (14,))])


def step(given):
    x = given["seed"][:, None].double()
    return {"z": over_tasks(drawn, Task({"x": x}, {"x": x}, given["seed"]), training=True)}


def test_a_task_draws_the_same_alone_in_a_batch_and_recorded():
    batch = tasks(5)
    together = over_tasks(drawn, batch, training=True)
    assert len(together.flatten().unique()) == together.numel()
    with drawing(batch.seed[3], True):
        torch.testing.assert_close(drawn(None), together[3], rtol=0, atol=0)
    other = {"seed": batch.seed.flip(0)}
    recording = Recording(step, other).replayed(other)
    torch.testing.assert_close(recording({"seed": batch.seed})["z"], together, rtol=0, atol=0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_compiled_numbers_are_the_same(float64, tmp_path, monkeypatch):
    """Fourteen, since eight at a time leaves some over, and the compiler has been wrong there."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    given = {"seed": tasks(5).seed}
    compiled = Recording(step, given).compiled(given)
    torch.testing.assert_close(compiled(given), step(given), rtol=1e-14, atol=1e-14)


def test_drawing_without_a_seed_is_refused():
    with pytest.raises(UserError, match=r"set Task\.seed"):
        over_tasks(drawn, tasks(2)._replace(seed=None), training=True)


def test_random_functions_in_a_model_take_their_arguments_as_torch_has_them():
    def drawn(function, *args, **options):
        with drawing(torch.tensor(7), training=True):
            return function(*args, **options)

    for function in (noise.rand, noise.randn):
        by_name, in_order = drawn(function, size=(2, 3)), drawn(function, 2, 3)
        assert torch.equal(by_name, in_order)
        assert len(by_name.unique()) == 6
    half = torch.full((1000,), 0.5)
    assert drawn(noise.bernoulli, half, 0.0).sum() == 0
    assert drawn(noise.bernoulli, half, p=1.0).sum() == 1000
    with pytest.raises(UserError, match="with out="):
        drawn(noise.rand, 2, out=torch.empty(2))
