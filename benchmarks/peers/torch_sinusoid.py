"""MAML on the sinusoid in plain torch, as a loop over tasks: ``python -m benchmarks.peers.torch_sinusoid``."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.peers import Work, work_of_arguments
from benchmarks.problems import Problem
from benchmarks.torch_peers import Batch, TorchContestant, parts, plain_torch


def drawn(problem: Problem, number: int) -> Batch:
    """Return the tasks of a problem with a number."""
    return {name: torch.from_numpy(values) for name, values in problem.batch(number).items()}


def score(model: nn.Module, problem: Problem, batch: Batch, steps: int) -> Tensor:
    """Return the mean loss on the queries ``[steps + 1]``, before adaptation and after each of its steps."""
    found = []
    for sx, sy, qx, qy in parts(batch):
        fast: dict[str, Tensor] = {name: w.detach() for name, w in model.named_parameters()}
        losses = []
        for step in range(steps + 1):
            with torch.no_grad():
                losses.append(mse_loss(torch.func.functional_call(model, fast, (qx,)), qy))
            if step == steps:
                break
            fast = {name: w.requires_grad_() for name, w in fast.items()}
            loss = mse_loss(torch.func.functional_call(model, fast, (sx,)), sy)
            grads = torch.autograd.grad(loss, list(fast.values()))
            fast = {n: (w - problem.inner_lr * g).detach() for (n, w), g in zip(fast.items(), grads, strict=True)}
        found.append(torch.stack(losses))
    return torch.stack(found).mean(0)


def trained(work: Work, contestant: TorchContestant) -> float:
    """Train, select and test; return the score."""
    model, training = contestant.model, work.training
    validation, test = drawn(work.testing(work.val_episodes), 10**6), drawn(work.testing(work.episodes), 10**6 + 1)
    best, selected = float("inf"), model
    for number in range(work.steps):
        contestant.batches = [drawn(training, number)]
        contestant.step(0)
        if (number + 1) % work.eval_every == 0 or number + 1 == work.steps:
            found = float(score(model, training, validation, work.adapt_steps)[-1])
            if found < best:
                best, selected = found, deepcopy(model)
    return float(score(selected, training, test, work.adapt_steps)[-1])


def main() -> None:
    """Train, select, test and print."""
    # With models this small, a second thread only waits for the first.
    torch.set_num_threads(1)
    work = work_of_arguments()
    print(f"score {trained(work, plain_torch(work.training, 'cpu')):.4f}")


if __name__ == "__main__":
    main()
