"""Models whose layers are mixtures of operations, so that the architecture can be learned and adapted.

As in DARTS (Liu, Simonyan, Yang 2019, https://arxiv.org/abs/1806.09055, equation 2) a layer is Σ_o softmax(a)_o · o(x)
over its operations o; its architecture weights a are parameters like all others. A module with a parameter
``architecture`` also names its ``operations``.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

from metarun.contracts import Numbers, Spec
from metarun.errors import require

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sine": torch.sin,
    "identity": lambda x: x,
}


class MixedActivation(nn.Module):
    """A mixture of layers, each a linear map with separate weights and an activation."""

    def __init__(self, inputs: int, outputs: int, operations: Sequence[str]) -> None:
        super().__init__()
        self.operations = tuple(operations)
        self.paths = nn.ModuleList(nn.Linear(inputs, outputs) for _ in self.operations)
        self.architecture = nn.Parameter(torch.zeros(len(self.operations)))

    def forward(self, x: Tensor) -> Tensor:
        """``[examples, inputs]`` → ``[examples, outputs]``."""
        paths = zip(self.operations, self.paths, strict=True)
        results = torch.stack([ACTIVATIONS[name](path(x)) for name, path in paths], -1)
        return (results * self.architecture.softmax(-1)).sum(-1)


class SupernetMLP(nn.Module):
    """A multi-layer perceptron, each of whose layers chooses its activation.

    Args:
        spec: sizes of input and output.
        widths: width of each hidden layer.
        operations: operations that a layer mixes; with only one the architecture is fixed.
    """

    def __init__(
        self, spec: Spec, widths: Sequence[int] = (40,), operations: Sequence[str] = ("relu", "tanh", "sine")
    ) -> None:
        super().__init__()
        require(
            isinstance(spec.inputs, Numbers),
            "supernet_mlp needs numbers, and this task has words or actions; choose another algorithm or model",
        )
        require(len(widths) > 0 and min(widths) > 0, f"widths must be positive, not {list(widths)}")
        check_operations(operations, ACTIVATIONS)
        sizes = pairwise([prod(spec.inputs.shape), *widths])
        layers = [MixedActivation(n_in, n_out, operations) for n_in, n_out in sizes]
        self.trunk = nn.Sequential(*([nn.Flatten()] if len(spec.inputs.shape) > 1 else []), *layers)
        self.head = nn.Linear(widths[-1], spec.target.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[examples, *input]`` → ``[examples, outputs]``."""
        out: Tensor = self.head(self.trunk(x))
        return out


def check_operations(operations: Sequence[str], known: Mapping[str, object]) -> None:
    """Raise an error if the list is empty, repeats a name or holds an unknown one."""
    unknown = [name for name in operations if name not in known]
    require(len(operations) > 0, "operations must name at least one")
    require(len(set(operations)) == len(operations), f"operations must differ, unlike {list(operations)}")
    require(not unknown, f"operations must be some of {', '.join(known)}, not {', '.join(unknown)}")


def convolution(size: int) -> Callable[[int, int], nn.Module]:
    """Return a constructor of convolutions that halve an image."""
    return lambda inputs, outputs: nn.Conv2d(inputs, outputs, size, 2, padding=size // 2, bias=False)


def separable(inputs: int, outputs: int) -> nn.Module:
    """Return a 3×3 convolution of each channel, followed by a mixture of the channels."""
    each = nn.Conv2d(inputs, inputs, 3, 2, padding=1, groups=inputs, bias=False)
    return nn.Sequential(each, nn.Conv2d(inputs, outputs, 1, bias=False))


def pooled(inputs: int, outputs: int) -> nn.Module:
    """Return average pooling, followed by a mixture of the channels."""
    return nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(inputs, outputs, 1, bias=False))


CONVOLUTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "conv3": convolution(3),
    "conv5": convolution(5),
    "separable": separable,
    "pool": pooled,
}


class MixedConvolution(nn.Module):
    """A mixture of ways to halve an image, each normalised by itself."""

    def __init__(self, inputs: int, outputs: int, operations: Sequence[str]) -> None:
        super().__init__()
        self.operations = tuple(operations)
        self.paths = nn.ModuleList(
            nn.Sequential(CONVOLUTIONS[name](inputs, outputs), nn.BatchNorm2d(outputs, track_running_stats=False))
            for name in self.operations
        )
        self.architecture = nn.Parameter(torch.zeros(len(self.operations)))

    def forward(self, x: Tensor) -> Tensor:
        """``[examples, inputs, height, width]`` → ``[examples, outputs, height / 2, width / 2]``."""
        results = torch.stack([path(x) for path in self.paths], -1)
        return (results * self.architecture.softmax(-1)).sum(-1)


class SupernetConv(nn.Module):
    """Four blocks, each of which chooses its convolution, followed by ReLU; then a linear head on the spatial mean.

    Args:
        spec: input ``(channels, height, width)`` of any size from 16×16, and the number of outputs.
        filters: number of channels of each block, at least 1.
        operations: operations that a block mixes; with only one the architecture is fixed.
    """

    def __init__(
        self, spec: Spec, filters: int = 32, operations: Sequence[str] = ("conv3", "separable", "pool")
    ) -> None:
        super().__init__()
        require(filters >= 1, f"filters must be at least 1, not {filters}")
        require(
            len(spec.inputs.shape) == 3 and min(spec.inputs.shape[1:]) >= 16,
            f"supernet_conv needs images of at least 16×16, and this task's input has shape {spec.inputs.shape}; "
            "choose another model",
        )
        check_operations(operations, CONVOLUTIONS)
        channels = [spec.inputs.shape[0], *[filters] * 4]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(channels):
            layers += [MixedConvolution(inputs, outputs, operations), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(filters, spec.target.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[examples, channels, height, width]`` → ``[examples, outputs]``."""
        out: Tensor = self.head(self.trunk(x))
        return out


def supernet(spec: Spec) -> nn.Module:
    """Return ``SupernetConv`` where inputs are images, else ``SupernetMLP``, each with its own defaults."""
    return SupernetConv(spec) if len(spec.inputs.shape) == 3 else SupernetMLP(spec)
