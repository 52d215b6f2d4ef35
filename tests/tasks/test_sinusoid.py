import math

import pytest
import torch
from scenarios import generator

from metarun.tasks.sinusoid import Sinusoid


@pytest.mark.parametrize(("split", "support", "query"), [("train", 5, 5), ("test", 5, 40)])
def test_points_lie_on_one_sine_wave_within_the_ranges_of_the_paper(split, support, query):
    tasks = Sinusoid(shots=5, queries=40).sample(split, 500, generator())
    assert tasks.support["x"].shape == (500, support, 1)
    assert tasks.query["y"].shape == (500, query, 1)
    x, y = (torch.cat([part[n] for part in tasks[:2]], 1).squeeze(-1).double() for n in ("x", "y"))
    assert -5 <= x.min() < -4.9
    assert 4.9 < x.max() <= 5
    # A sin(x − φ) = a sin x + b cos x: two unknowns explain every point of a task, and give A and φ back.
    basis = torch.stack([x.sin(), x.cos()], -1)
    coefficients = torch.linalg.lstsq(basis, y[..., None]).solution
    torch.testing.assert_close((basis @ coefficients).squeeze(-1), y, atol=1e-5, rtol=0)
    a, b = coefficients[:, 0, 0], coefficients[:, 1, 0]
    amplitude, phase = (a**2 + b**2).sqrt(), torch.atan2(-b, a)
    assert 0.1 <= amplitude.min() < 0.2
    assert 4.9 < amplitude.max() <= 5.001
    assert -1e-3 <= phase.min() < 0.1
    assert math.pi - 0.1 < phase.max() <= math.pi + 1e-3


def test_the_generator_decides_everything():
    family = Sinusoid()
    state = torch.get_rng_state()
    first, second = (family.sample("test", 3, generator(5)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())
