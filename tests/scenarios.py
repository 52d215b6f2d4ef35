"""Small families with known answers."""

import torch

from metarun.contracts import Numbers, Sizes, Spec, Task
from metarun.targets.classes import ACCURACY, Classes
from metarun.targets.real import MSE, Real


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sampled(family, split: str, count: int, generator: torch.Generator) -> Task:
    """Tasks of ``family``, each with a seed, as a run has them."""
    return family.sample(split, count, generator)._replace(seed=torch.randint(2**62, (count,), generator=generator))


class Quadratic(torch.nn.Module):
    """A model whose output is its parameter vector."""

    def __init__(self, size: int = 3):
        super().__init__()
        self.w = torch.nn.Parameter(torch.arange(1.0, size + 1))

    def forward(self, x):
        return self.w


def quadratic_loss(predict, data):
    """½‖w − c‖²: gradient w − c, Hessian the identity."""
    loss = 0.5 * (predict(None) - data["c"]).square().sum()
    return loss, {"mse": loss.detach()}


def linear_loss(predict, data):
    """wᵀc: the Hessian is zero."""
    loss = predict(None) @ data["c"]
    return loss, {"mse": loss.detach()}


def centres(tasks: int = 4, size: int = 3) -> Task:
    """Tasks with one centre each, the same for support and query."""
    c = torch.randn(tasks, size, generator=generator())
    return Task({"c": c}, {"c": c})


def number_spec(shape, outputs, shots, queries) -> Spec:
    """Of a family whose targets are numbers."""
    return Spec(Numbers(shape), Real(outputs), Sizes(shots, queries), (MSE,))


def class_spec(shape, ways, shots, queries, train_ways=None, training_classes=None) -> Spec:
    """Of a family whose targets are classes."""
    sizes = Sizes(shots, queries, ways, train_ways, training_classes)
    return Spec(Numbers(shape), Classes(ways), sizes, (ACCURACY,))


QUADRATIC_SPEC = number_spec((1,), 3, 1, 1)
IMAGE_SPEC = class_spec((1, 16, 16), 3, 2, 4, 3, 12)


def classification_loss(predict, data):
    """Cross-entropy and accuracy."""
    output, target = predict(data["x"]), Classes(data["y"].shape[-1])
    return target.loss(output, data), target.scores(output, data)


def regression_loss(predict, data):
    """Mean squared error, twice."""
    output, target = predict(data["x"]), Real(data["y"].shape[-1])
    return target.loss(output, data), target.scores(output, data)


class TinyImages:
    """Three-way classification of 16×16 noisy patterns; with ``fixed_labels`` one model can learn it all."""

    spec = IMAGE_SPEC
    dataset = "tiny"

    def __init__(self, fixed_labels=False):
        self.fixed_labels = fixed_labels
        self.patterns = torch.randn(12, 1, 16, 16, generator=generator(7))

    def sample(self, split, count, generator):
        classes = torch.rand(count, 12, generator=generator).topk(3).indices
        if self.fixed_labels:
            classes = 3 * torch.randint(4, (count, 3), generator=generator) + torch.arange(3)

        def part(shots):
            label = torch.arange(3).repeat_interleave(shots)
            order = torch.rand(count, 3 * shots, generator=generator).argsort(1)
            label = label.expand(count, -1).gather(1, order)
            identity = classes.gather(1, label)
            noise = torch.randn(count, 3 * shots, 1, 16, 16, generator=generator)
            x = self.patterns[identity] + 0.5 * noise
            y = torch.nn.functional.one_hot(label, 3).to(x.dtype)
            return {"x": x, "y": y, "class": identity}

        return Task(part(2), part(4))
