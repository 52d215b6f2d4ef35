"""Contestants in torch that loop over tasks: plain torch, learn2learn, higher and TorchOpt."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from benchmarks.problems import Problem

Batch = dict[str, Tensor]
MetaLoss = Callable[[nn.Module, Batch], Iterator[Tensor]]
"""(model, tasks) → the query loss of each task divided by the number of tasks, with a graph."""


def network(problem: Problem) -> nn.Module:
    """Return the model as a user of torch would write it, with the problem's weights."""
    layers: list[nn.Module] = []
    if problem.model == "mlp":
        layers = [nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)]
    else:
        for i in range(4):
            stride = 1 if problem.max_pool else 2
            layers.append(nn.Conv2d(64 if i else 1, 64, 3, stride, padding=1, bias=False))
            layers += [nn.BatchNorm2d(64, track_running_stats=False), nn.ReLU()]
            if problem.max_pool:
                layers.append(nn.MaxPool2d(2))
        if problem.method == "protonet":
            layers.append(nn.Flatten())
        else:
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, problem.ways)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), problem.weights(), strict=True):
            parameter.copy_(torch.from_numpy(value))
    return model


def task_loss(problem: Problem, prediction: Tensor, y: Tensor) -> Tensor:
    """Return the loss of one task."""
    return mse_loss(prediction, y) if problem.model == "mlp" else cross_entropy(prediction, y.argmax(1))


def parts(batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield support and query of each task."""
    yield from zip(batch["sx"], batch["sy"], batch["qx"], batch["qy"], strict=True)


class TorchContestant:
    """A loop over tasks, ``backward`` and ``torch.optim.Adam``."""

    def __init__(self, problem: Problem, device: str, meta_loss: MetaLoss) -> None:
        self.problem, self.device, self.meta_loss = problem, device, meta_loss
        self.model = network(problem).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3)
        self.batches = [{n: torch.from_numpy(v).to(device) for n, v in problem.batch(i).items()} for i in range(4)]

    def gradient(self) -> np.ndarray[Any, Any]:
        """Return the first meta-gradient as one vector."""
        self.optimizer.zero_grad()
        for loss in self.meta_loss(self.model, self.batches[0]):
            loss.backward()  # type: ignore[no-untyped-call]
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]).cpu().numpy()

    def step(self, number: int) -> None:
        """One meta-step."""
        self.optimizer.zero_grad()
        for loss in self.meta_loss(self.model, self.batches[number % 4]):
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def wait(self) -> None:
        """Return when the steps so far are done."""
        if self.device != "cpu":
            torch.cuda.synchronize()


def plain_torch(problem: Problem, device: str) -> TorchContestant:
    """Use ``torch.autograd.grad`` in a loop; for prototypical networks one batch, as anyone would write them."""

    def maml(model: nn.Module, batch: Batch) -> Iterator[Tensor]:
        for sx, sy, qx, qy in parts(batch):
            fast: dict[str, Tensor] = dict(model.named_parameters())
            for _ in range(problem.inner_steps):
                loss = task_loss(problem, torch.func.functional_call(model, fast, (sx,)), sy)
                second = problem.method == "maml"
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=second)
                fast = {n: w - problem.inner_lr * g for (n, w), g in zip(fast.items(), grads, strict=True)}
            yield task_loss(problem, torch.func.functional_call(model, fast, (qx,)), qy) / problem.tasks

    def protonet(model: nn.Module, batch: Batch) -> Iterator[Tensor]:
        for sx, sy, qx, qy in parts(batch):
            z = model(torch.cat([sx, qx]))
            support, query = z[: len(sx)], z[len(sx) :]
            centres = (sy.T @ support) / problem.shots
            yield cross_entropy(-torch.cdist(query, centres).square(), qy.argmax(1)) / problem.tasks

    return TorchContestant(problem, device, protonet if problem.method == "protonet" else maml)


def learn2learn(problem: Problem, device: str) -> TorchContestant:
    """Use the package's MAML: a clone of the module for each task, whose parameters are replaced in place."""
    from learn2learn.algorithms.maml import MAML

    def meta_loss(model: nn.Module, batch: Batch) -> Iterator[Tensor]:
        maml = MAML(model, lr=problem.inner_lr, first_order=problem.method == "fomaml")
        for sx, sy, qx, qy in parts(batch):
            learner = maml.clone()
            for _ in range(problem.inner_steps):
                learner.adapt(task_loss(problem, learner(sx), sy))
            yield task_loss(problem, learner(qx), qy) / problem.tasks

    return TorchContestant(problem, device, meta_loss)


def higher(problem: Problem, device: str) -> TorchContestant:
    """Use the package's patched module and differentiable SGD."""
    import higher as package

    def meta_loss(model: nn.Module, batch: Batch) -> Iterator[Tensor]:
        inner = torch.optim.SGD(model.parameters(), problem.inner_lr)
        second = problem.method == "maml"
        for sx, sy, qx, qy in parts(batch):
            with package.innerloop_ctx(model, inner, copy_initial_weights=False, track_higher_grads=second) as (f, opt):
                for _ in range(problem.inner_steps):
                    opt.step(task_loss(problem, f(sx), sy))
                yield task_loss(problem, f(qx), qy) / problem.tasks

    return TorchContestant(problem, device, meta_loss)


def torchopt(problem: Problem, device: str) -> TorchContestant:
    """Use the package's differentiable SGD, with the state saved and restored for each task."""
    import torchopt as package

    def meta_loss(model: nn.Module, batch: Batch) -> Iterator[Tensor]:
        inner = package.MetaSGD(model, lr=problem.inner_lr)
        at_start = package.extract_state_dict(model, by="reference"), package.extract_state_dict(inner)
        for sx, sy, qx, qy in parts(batch):
            for _ in range(problem.inner_steps):
                inner.step(task_loss(problem, model(sx), sy))
            yield task_loss(problem, model(qx), qy) / problem.tasks
            package.recover_state_dict(model, at_start[0])
            package.recover_state_dict(inner, at_start[1])

    return TorchContestant(problem, device, meta_loss)
