"""A pretrained network for pictures, with a new head: all, some or none of its layers are learned further."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from metarun.contracts import Numbers, Spec
from metarun.data.embedding import loaded
from metarun.errors import require


class Backbone(nn.Module):
    """A network of colour pictures ``[n, 3, h, w]`` → ``[n, d]``, applied to grey or coloured ones of any size."""

    def __init__(self, network: nn.Module, size: int | None) -> None:
        super().__init__()
        self.network, self.size = network, size

    def forward(self, x: Tensor) -> Tensor:
        """``[pictures, 1 or 3, height, width]`` → ``[pictures, features]``."""
        if self.size is not None:
            x = interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False)
        out: Tensor = self.network(x.expand(-1, 3, -1, -1))
        return out


def learn_only(network: nn.Module, trainable: str | Sequence[str]) -> None:
    """Freeze all parameters of ``network`` but those of the modules that ``trainable`` names.

    Raises:
        ValueError: a name is that of no module or parameter; the sentence lists the outermost ones.
    """
    names = [] if trainable == "none" else [trainable] if isinstance(trainable, str) else list(trainable)
    of = dict(network.named_parameters())

    def inside(parameter: str, module: str) -> bool:
        return module == "all" or parameter == module or parameter.startswith(f"{module}.")

    for name in names:
        require(
            any(inside(parameter, name) for parameter in of),
            f"trainable must be all, none, or names of layers, and there is no {name}; the layers with parameters are "
            f"{', '.join(dict.fromkeys(parameter.partition('.')[0] for parameter in of))}",
        )
    for parameter, value in of.items():
        value.requires_grad_(any(inside(parameter, name) for name in names))


class Pretrained(nn.Module):
    """A pretrained network, then a linear head with random weights.

    The network stays in evaluation mode: batch normalisation uses the statistics of pre-training and dropout is off.
    Pictures reach it as the task normalises them (mean 0 and standard deviation 1 per channel over the training
    classes, for ``task=images``), instead of by the means and deviations of its pre-training.

    Args:
        spec: that of a task whose inputs are pictures of one or three channels; grey ones are shown as three equal
            channels.
        source: where the network comes from (`metarun.data.sources`).
        trainable: what is learned besides the head: ``all``, ``none``, or names of layers of the network, such as
            ``[layer4]``. The others are constants.
        weights: whether the network starts from its pretrained weights; if not, from random ones.
        size: edge in pixels to which pictures are resized for the network, at least 16; null: they stay as they are.

    Raises:
        UserError: the network cannot be loaded, or returns no features for pictures of this size.
    """

    def __init__(
        self,
        spec: Spec,
        source: str | None = None,
        trainable: str | Sequence[str] = "all",
        weights: bool = True,
        size: int | None = None,
    ) -> None:
        super().__init__()
        shape = spec.inputs.shape
        require(
            isinstance(spec.inputs, Numbers) and len(shape) == 3 and shape[0] in (1, 3),
            "pretrained needs pictures of one or three channels; for features of a frozen model of sentences set "
            "task.embed, else choose another model",
        )
        assert source is None or isinstance(source, str)
        require(
            source is not None,
            "pretrained needs the name of a network: model.source=torchvision:resnet18, timm:NAME, transformers:NAME, "
            "efficientnet-lite0 or package.module:function; else choose another model",
        )
        assert source is not None
        require(size is None or size >= 16, f"size must be at least 16 or null, not {size}")
        network = loaded(source, "pictures", weights, "model.source").call
        require(
            isinstance(network, nn.Module),
            f"model.source={source} must give a torch.nn.Module, not {type(network).__name__}; task.embed takes any "
            "callable",
        )
        assert isinstance(network, nn.Module)
        learn_only(network, trainable)
        self.trunk = Backbone(network, size).eval()
        try:
            with torch.no_grad():
                features = self.trunk(torch.zeros(2, *shape))
        except (RuntimeError, ValueError, AssertionError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise ValueError(
                f"model.source={source} does not take pictures of {shape[1]}×{shape[2]} ({said}); set model.size to "
                "the edge that it was made for, such as 224"
            ) from error
        require(
            isinstance(features, Tensor) and features.ndim == 2,
            f"model.source={source} must return features [pictures, d]",
        )
        self.head = nn.Linear(features.shape[1], spec.target.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[pictures, channels, height, width]`` → ``[pictures, outputs]``."""
        out: Tensor = self.head(self.trunk(x))
        return out
