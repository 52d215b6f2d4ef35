"""The comparison of a run's first meta-gradient with plain autograd stops what is wrong, and nothing else."""

import logging

import pytest
import torch
from conftest import experiment_of
from test_engines import given
from torch import nn

from metarun.assemble import algorithm_names
from metarun.checks.gradient import check_gradient, compare_gradients, plain_gradient
from metarun.engine.meta_step import MetaStep
from metarun.errors import UserError

TINY = ("train.steps=50", "train.meta_batch=4")


class Unseen(nn.Module):
    """Layer normalisation by the operation itself, which no substitute sees: wrong in second order under vmap."""

    def __init__(self, spec, **of_another_model):
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(1, 8), nn.Parameter(torch.rand(8) + 0.5), nn.Linear(8, 1)
        self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        z = torch.ops.aten.native_layer_norm(self.first(x).tanh(), [8], self.scale, self.shift, 1e-5)[0]
        return self.last(z)


def prepared(*overrides):
    experiment = experiment_of(*TINY, *overrides)
    meta_step = MetaStep(experiment)
    return meta_step, given(experiment, meta_step, 0)


UNSEEN = f"model._target_={Unseen.__module__}.Unseen"


@pytest.mark.parametrize("more", [(), ("replicas.count=2",)])
def test_a_wrong_derivative_stops_the_run_and_names_a_parameter(more):
    meta_step, first = prepared("algo=maml", "task=sinusoid", "algo.inner_lr=0.1", UNSEEN, *more)
    with pytest.raises(UserError, match=r"meta-gradient of weights\.\w+\.?\w* differs .* by \S+ %"):
        check_gradient(meta_step, first)


def test_in_first_order_the_same_model_is_right():
    check_gradient(*prepared("algo=fomaml", "task=sinusoid", UNSEEN))


@pytest.mark.parametrize(
    "overrides",
    [
        # Ten steps so long that they magnify what is rounded.
        ("algo=maml", "task=sinusoid", "algo.inner_steps=10", "algo.inner_lr=0.2"),
        ("algo=maml", "task=omniglot", "task.dataset=procedural", "task.image_size=16", "algo.inner_steps=3"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_rounding_stops_nothing(overrides, seed):
    check_gradient(*prepared(*overrides, f"seed={seed}"))


@pytest.mark.parametrize("more", [(), ("replicas.count=2",)])
def test_a_jump_that_only_float32_sees_stops_nothing(more, monkeypatch, caplog):
    """As where an active set changes with the last digit; without the comparison in float64 the run would stop."""

    def jumping(meta_step, given, jitter=0.0):
        found = plain_gradient(meta_step, given, jitter)
        return found if found.dtype == torch.float64 else found * 1.006

    monkeypatch.setattr("metarun.checks.gradient.plain_gradient", jumping)
    meta_step, first = prepared(
        "algo=metaoptnet", "task=omniglot", "task.dataset=procedural", "task.image_size=16", *more
    )
    with pytest.raises(UserError, match=r"0\.6 %"):
        compare_gradients(meta_step, first)
    with caplog.at_level(logging.INFO):
        check_gradient(meta_step, first)
    assert "right in float64" in caplog.text
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.usefixtures("float64")
def test_the_plain_gradient_is_that_of_the_run():
    meta_step, first = prepared("algo=maml", "task=sinusoid", "algo.inner_steps=3")
    torch.testing.assert_close(
        plain_gradient(meta_step, first), meta_step.gradient(first)["gradient"][0], rtol=1e-10, atol=1e-12
    )


SMALL_TASKS = (
    ("task=sinusoid", "task.queries=3"),
    ("task=omniglot", "task.dataset=procedural", "task.image_size=16", "task.queries=2"),
    ("task=text", "task.dataset=toy", "task.buckets=64", "task.queries=2"),
    ("task=navigation", "task.horizon=4", "task.shots=2", "task.queries=2"),
    ("task=bandit", "task.pulls=3", "task.shots=2", "task.queries=2"),
    ("task=mdp", "task.shots=2", "task.queries=2"),
)


@pytest.mark.slow
@pytest.mark.parametrize("algo", algorithm_names())
def test_every_algorithm_can_be_compared(algo, caplog):
    """On whatever it serves, and none is let off with a line that says that it could not be."""
    compared, learns = 0, True
    with caplog.at_level(logging.INFO):
        for task in SMALL_TASKS:
            try:
                meta_step, first = prepared(f"algo={algo}", *task)
            except UserError:
                continue
            learns = meta_step.experiment.algorithm.meta_learns
            if learns:
                check_gradient(meta_step, first)
                compared += 1
    assert compared > 0 or not learns
    assert "cannot be compared" not in caplog.text
