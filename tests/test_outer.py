"""The outer optimizer beside ``torch.optim`` and torch's own schedules, in float64."""

import pytest
import torch
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, StepLR

from metarun.engine.optimizer import clipped, initial_moments, learning_rates, outer_step

pytestmark = pytest.mark.usefixtures("float64")
OPTIMIZERS = {"sgd": SGD, "adam": Adam, "adamw": AdamW}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_torch_optim(name, weight_decay):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, generator=generator)
    theirs = start.clone().requires_grad_()
    optimizer = OPTIMIZERS[name]([theirs], lr=0.05, weight_decay=weight_decay)
    ours, moments = start.clone(), initial_moments(start, name)
    for step in range(20):
        # Gradients of very different sizes, one of them 0, so that epsilon and both corrections count.
        gradient = torch.randn(7, generator=generator) * torch.tensor([1e-9, 1e-4, 0.0, 1.0, 1.0, 10.0, 1e3])
        lr = torch.tensor(0.05 / (1 + step))
        optimizer.param_groups[0]["lr"] = lr.item()
        theirs.grad = gradient.clone()
        optimizer.step()
        ours, moments = outer_step(name, ours, gradient, moments, lr, weight_decay)
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("largest", [0.1, 100.0])
def test_clipping_is_torchs(largest):
    gradient = torch.tensor([3.0, -4.0, 12.0])
    parameter = torch.zeros(3, requires_grad=True)
    parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_([parameter], largest)
    torch.testing.assert_close(clipped(gradient, largest), parameter.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "step"])
def test_learning_rates_are_those_of_torchs_schedulers(schedule):
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = {
        "constant": lambda: LinearLR(optimizer, 1.0, 1.0, total_iters=40),
        "linear": lambda: LinearLR(optimizer, 1.0, 0.1, total_iters=40),
        "cosine": lambda: CosineAnnealingLR(optimizer, 40, eta_min=0.01),
        "step": lambda: StepLR(optimizer, 15, 0.5),
    }[schedule]()
    rates = learning_rates(schedule, 0.1, 40, final=0.1, decay=0.5, decay_every=15)
    for rate in rates:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate.item(), rel=1e-9)
        optimizer.step()
        scheduler.step()
