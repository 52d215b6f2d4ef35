"""Milliseconds a meta-step of second-order MAML on the sinusoid: ``python -m benchmarks.meta_step``.

The setting of the MAML paper: MLP 40-40, 25 tasks, 10 + 10 points, outer Adam, one thread. Beside metarun runs a
plain Python loop over tasks with ``torch.autograd.grad``, on the same tasks from the same weights. The
meta-gradients are compared before anything is timed; rounds are interleaved, the figures are medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metarun.algos.agnostic.maml import maml
from metarun.engine import meta_gradient
from metarun.models.mlp import MLP
from metarun.tasks.sinusoid import Sinusoid
from metarun.tree import leaves
from metarun.types import Task

INNER_LR = 0.01
Gradient = Callable[[nn.Module, Task], list[Tensor]]


def mse(prediction: Tensor, y: Tensor) -> Tensor:
    """Mean squared error."""
    return (prediction - y).square().mean()


def with_metarun(family: Sinusoid, inner_steps: int) -> Gradient:
    """Ours: the task mapped by vmap."""

    def gradient(model: nn.Module, tasks: Task) -> list[Tensor]:
        algorithm = maml(model, family.spec, INNER_LR, inner_steps)
        theta = {"weights": dict(model.named_parameters())}
        return list(leaves(meta_gradient(algorithm, theta, tasks, family.loss).grads))

    return gradient


def with_python_loop(inner_steps: int) -> Gradient:
    """Plain torch: a loop over tasks, ``autograd.grad`` inside."""

    def gradient(model: nn.Module, tasks: Task) -> list[Tensor]:
        weights: dict[str, Tensor] = dict(model.named_parameters())
        total = torch.zeros(())
        for t in range(len(tasks.support["x"])):
            fast: dict[str, Tensor] = dict(weights)
            for _ in range(inner_steps):
                loss = mse(functional_call(model, fast, (tasks.support["x"][t],)), tasks.support["y"][t])
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {n: w - INNER_LR * g for (n, w), g in zip(fast.items(), grads, strict=True)}
            total = total + mse(functional_call(model, fast, (tasks.query["x"][t],)), tasks.query["y"][t])
        return list(torch.autograd.grad(total / len(tasks.support["x"]), list(weights.values())))

    return gradient


def measure(inner_steps: int, rounds: int) -> None:
    """Compare gradients, then time steps in interleaved rounds, and print medians."""
    family = Sinusoid(shots=10)
    contestants = {"metarun": with_metarun(family, inner_steps), "python loop": with_python_loop(inner_steps)}
    torch.manual_seed(0)
    model = MLP(family.spec)
    tasks = family.sample("train", 25, torch.Generator().manual_seed(0))
    reference = contestants["metarun"](model, tasks)
    for name, gradient in contestants.items():
        torch.testing.assert_close(gradient(model, tasks), reference, rtol=1e-3, atol=1e-5, msg=f"{name} differs")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name, gradient in contestants.items():
            tasks = family.sample("train", 25, torch.Generator().manual_seed(number))
            began = time.perf_counter()
            for parameter, g in zip(model.parameters(), gradient(model, tasks), strict=True):
                parameter.grad = g
            optimizer.step()
            times[name].append(1000 * (time.perf_counter() - began))
    ours = statistics.median(times["metarun"])
    print(f"{inner_steps} inner step{'s' * (inner_steps != 1)}, torch {torch.__version__}, one thread")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"  {name:<12} {median:8.2f} ms a meta-step   {median / ours:5.1f} × metarun")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.meta_step", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for inner_steps in (1, 5):
        measure(inner_steps, rounds)


if __name__ == "__main__":
    main()
