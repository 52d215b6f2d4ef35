"""Steps and operations that XLA compiles give what torch gives (.ci/extras installs JAX)."""

import math

import pytest
import torch
from test_engines import SETTINGS, with_two_inputs
from torch.func import grad
from torch.nn import functional

from metarun.engine import xla
from metarun.engine.recorder import CannotRecord
from metarun.engine.recording import Recording

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not xla.installed(), reason="jax is not installed"),
    pytest.mark.usefixtures("float64"),
]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_by_xla_gives_what_the_step_gives(name):
    meta_step, first, second = with_two_inputs(name)
    compiled = Recording(meta_step.whole, first).by_xla(first)
    torch.testing.assert_close(compiled(second), meta_step.whole(second), rtol=1e-9, atol=1e-11)


X = torch.linspace(-2.0, 3.0, 24, dtype=torch.float64).view(2, 3, 4) + 0.05
SQUARE = torch.tensor([[4.0, 1.0, 0.5], [1.0, 3.0, 0.2], [0.5, 0.2, 2.0]], dtype=torch.float64)
KERNEL = torch.tensor([[[0.5, -1.0, 0.2], [0.1, 0.3, 0.7]]], dtype=torch.float64)
NAMED = ("relu", "elu", "silu", "softplus", "leaky_relu")
OPERATIONS = {
    "division to whole numbers": lambda x: x.div(0.7, rounding_mode="trunc") + x.div(0.7, rounding_mode="floor"),
    "remainders": lambda x: x % 0.7 + x.fmod(0.7),
    "powers": lambda x: x**2 + x**3.0 + x.abs() ** 0.5 + 2.0**x + x.abs() ** x,
    "integers": lambda x: ((x * 100).long() >> 2) ^ ((x * 7).long() & 5) | 3,
    "bounds": lambda x: x.clamp(-1, 2) + x.clamp(min=0.1) + x.clamp_max(1) + torch.maximum(x, -x),
    "reductions": lambda x: x.sum((0, 2)) + x.mean(2).mean(0) + x.amax((0, 2)),
    "spread": lambda x: x.var((0, 2)) + x.std((0, 2), correction=0),
    "all axes": lambda x: x.sum() + x.prod() + x.max() + x.norm() + x.logsumexp(1).sum(),
    "extremes and their places": lambda x: x.max(1)[0] * x.max(1)[1] + x.argmin(2, keepdim=True).sum() * x.min(1)[0],
    "sums along an axis": lambda x: x.cumsum(1) + x.abs().cumprod(-1),
    "orders": lambda x: (-x).sort(2)[0] + x.sort(2, descending=True)[1] + x.sin().topk(4, 2)[0],
    "places": lambda x: x[:, 1:3, ::2].sum() + x.select(1, -1) + x[..., -2:].sum() + x[:, [2, 0]].sum(1),
    "gathering": lambda x: x.gather(2, (x > 0).long() + 1) + x.scatter(1, torch.zeros(2, 1, 4).long(), 5.0),
    "adding at places": lambda x: x.scatter_add(1, (x > 0).long(), x) + x.index_put((torch.tensor([1, 1]),), x, True),
    "selecting": lambda x: x.index_select(1, torch.tensor([2, 2, 0])) + torch.where(x > 0, x, 1.0),
    "masks": lambda x: x.masked_fill(x < -1, 7.0),
    "joining": lambda x: torch.stack([x, x.flip(1)], 1).unbind(1)[1] + torch.cat([x[:, :1], x[:, 1:]], 1).roll(1, 0),
    "parts": lambda x: x.split(3, 2)[1] + x.split([1, 3], 2)[0],
    "shapes": lambda x: x.transpose(0, 1).permute(1, 0, 2).reshape(2, 12).view(2, 3, 4).unsqueeze(1).squeeze(1),
    "one axis": lambda x: x[:1].squeeze().squeeze(0)[None].expand(5, -1, -1) + x.diagonal(0, 0, 1).sum(),
    "triangles": lambda x: (x[0].tril(-1) + x[0].triu(1)) @ torch.diag_embed(x[1, 0]) + torch.eye(3, 4),
    "borders": lambda x: functional.pad(x, (1, 2, 0, 1), value=0.5),
    "activations": lambda x: sum(getattr(functional, name)(x) for name in NAMED),
    "both forms of gelu": lambda x: functional.gelu(x) + functional.gelu(x, approximate="tanh"),
    "probabilities": lambda x: functional.log_softmax(x, 1) + x.softmax(2) + functional.logsigmoid(x),
    "elementwise": lambda x: x.erf() + x.sgn() + x.exp().rsqrt() + x.abs().log1p() + x.expm1() + torch.atan2(x, x + 1),
    "constants": lambda x: torch.arange(4) * x + torch.linspace(0, 1, 4) + torch.full((4,), 2.0) + torch.zeros_like(x),
    "truth": lambda x: ((x > 0) & (x < 1)).any(1).double() + (x != 0).all(1).double() + (~(x >= 1)).double().sum(1),
    "solving": lambda x: torch.linalg.solve(SQUARE, x) + torch.linalg.solve(SQUARE, x[0, :, 0])[:, None],
    "factors": lambda x: torch.linalg.solve_triangular(torch.linalg.cholesky(SQUARE), x, upper=False),
    "inverses": lambda x: torch.linalg.inv(SQUARE + x @ x.mT) @ x,
    "products": lambda x: torch.baddbmm(x @ x.mT, x, x.mT, beta=0.5, alpha=2) @ torch.addmm(x[0], SQUARE, x[1]),
    "rows of a table": lambda x: functional.embedding(torch.tensor([[2, 0], [1, 1]]), x[0]),
    "convolutions": lambda x: functional.conv1d(x, x[:, :, :3], x[0, 0, :2], stride=2, padding=1),
    "convolutions in groups": lambda x: functional.conv1d(x[:, :2], KERNEL.mT.reshape(2, 1, 3), groups=2),
    "transposed convolutions": lambda x: functional.conv_transpose1d(x[:, :1], KERNEL, stride=2, output_padding=1),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_and_its_first_two_derivatives_are_those_of_torch(name):
    function = OPERATIONS[name]

    def derived(tree):
        value = function(tree["x"])
        if not value.is_floating_point():
            return {"value": value}

        def total(x):
            return (function(x) * torch.linspace(0.5, 1.5, value.numel()).view(value.shape)).sum()

        slope = grad(total)
        bend = grad(lambda x: slope(x).square().sum())
        return {"value": value, "slope": slope(tree["x"]), "bend": bend(tree["x"])}

    expected = derived({"x": X})
    other = {"x": X.flip(0)}
    found = Recording(derived, other).by_xla(other)({"x": X})
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_numbers_from_seeds_are_the_same():
    from metarun import random

    seeds = torch.arange(5) * 10**15

    def step(tree):
        return {"bits": random.mixed(tree["seed"]), "numbers": random.uniform(tree["seed"], (3,))}

    other = {"seed": seeds.flip(0)}
    found = Recording(step, other).by_xla(other)({"seed": seeds})
    torch.testing.assert_close(found, step({"seed": seeds}), rtol=0, atol=0)


def test_what_has_no_translation_is_named():
    with pytest.raises(CannotRecord, match="lgamma"):
        Recording(lambda tree: {"y": torch.lgamma(tree["x"])}, {"x": X}).by_xla({"x": X})


INTEGERS = torch.tensor([[123456789, -7, 2**30], [2**30, 2, 9]], dtype=torch.int32)
FEATURES = torch.tensor([[0.1, -3.0, 2.0], [0.5, 0.0, -1.0]], dtype=torch.float32)
LOWER = torch.tensor([[4.0, 9.0], [1.0, 3.0]], dtype=torch.float64)
PARTICULAR = {
    "largest and smallest size": (lambda x: torch.stack([x.norm(p, 1) for p in (math.inf, -math.inf, 0, 1)]), FEATURES),
    "whole numbers towards zero": (lambda x: torch.div(x, 10, rounding_mode="trunc"), INTEGERS),
    "sums of whole numbers": (lambda x: x.cumsum(0), INTEGERS),
    "sums in another type": (lambda x: x.cumsum(1, dtype=torch.float64), FEATURES),
    "a threshold": (lambda x: functional.softplus(x, 2.0, 1.0), FEATURES.double()),
    "one triangle": (lambda x: torch.linalg.cholesky_ex(x)[0], LOWER),
    "the other triangle": (lambda x: torch.linalg.cholesky_ex(x, upper=True)[0], LOWER.mT.contiguous()),
    "a matrix that is not definite": (lambda x: torch.linalg.cholesky_ex(-x)[1], LOWER),
    "a number of another precision": (lambda x: x > torch.tensor(0.1, dtype=torch.float64), FEATURES),
    "matrices and a matrix": (lambda x: torch.linalg.solve(SQUARE[None], x), SQUARE + 1),
    "one index": (lambda x: x.index_select(1, torch.tensor(2)), FEATURES),
}


@pytest.mark.parametrize("name", PARTICULAR)
def test_particular_arguments_mean_what_they_mean_in_torch(name):
    function, x = PARTICULAR[name]
    found = Recording(lambda tree: {"y": function(tree["x"])}, {"x": x}).by_xla({"x": x})({"x": x})
    torch.testing.assert_close(found, {"y": function(x)}, rtol=1e-12, atol=0, equal_nan=False)


def test_a_jax_that_cannot_be_used_is_a_reason_for_another_engine(monkeypatch):
    def broken():
        raise ImportError("jaxlib is too old")

    monkeypatch.setattr(xla, "jax_with_settings", broken)
    with pytest.raises(CannotRecord, match="too old"):
        Recording(lambda tree: {"y": tree["x"] + 1}, {"x": X}).by_xla({"x": X})
