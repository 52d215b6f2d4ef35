"""The residual network of twelve layers of the few-shot literature."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metarun.contracts import Numbers, Spec
from metarun.errors import require
from metarun.models.conv4 import head_of, norm_of


class Block(nn.Module):
    """Three 3×3 convolutions with normalisation, a 1×1 convolution around them, 2×2 max-pooling and dropout."""

    def __init__(self, channels: int, width: int, norm: str, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (channels, width, width):
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=norm == "none"), norm_of(norm, width)]
            layers.append(nn.LeakyReLU(0.1))
        self.layers = nn.Sequential(*layers[:-1])
        self.around = nn.Sequential(nn.Conv2d(channels, width, 1, bias=norm == "none"), norm_of(norm, width))
        self.after = nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """``[pictures, channels, height, width]`` → ``[pictures, width, height / 2, width / 2]``."""
        out: Tensor = self.after(self.layers(x) + self.around(x))
        return out


class ResNet12(nn.Module):
    """Four residual blocks, the mean over positions, and a linear head.

    As in TADAM (Oreshkin, Rodríguez López, Lacoste 2018, https://arxiv.org/abs/1805.10123) and, with other widths,
    MetaOptNet (Lee et al. 2019, https://arxiv.org/abs/1904.03758: 64, 160, 320 and 640, with DropBlock instead of
    dropout).

    Args:
        spec: input ``(channels, height, width)`` of any size from 16×16, and the number of outputs.
        widths: number of channels of the four blocks, each at least 1.
        norm: ``batch`` (statistics of the current batch, hence transductive), ``group`` or ``none``.
        dropout: probability with which a value after each block is left out in meta-training, at least 0, below 1.
        zero_head: whether the head starts meta-training from zeros, as in ``conv4``.
    """

    def __init__(
        self,
        spec: Spec,
        widths: Sequence[int] = (64, 128, 256, 512),
        norm: str = "batch",
        dropout: float = 0.0,
        zero_head: bool = False,
    ) -> None:
        super().__init__()
        require(len(widths) == 4 and min(widths) >= 1, f"widths must be four numbers of at least 1, not {list(widths)}")
        require(norm in ("batch", "group", "none"), f"norm must be batch, group or none, not {norm}")
        require(0 <= dropout < 1, f"dropout must be at least 0 and below 1, not {dropout}")
        shape = spec.inputs.shape
        require(
            isinstance(spec.inputs, Numbers) and len(shape) == 3 and min(shape[1:]) >= 16,
            f"resnet12 needs images of at least 16×16, and this task's input has shape {shape}; choose another model",
        )
        channels = (shape[0], *widths[:3])
        blocks = [Block(inputs, width, norm, dropout) for inputs, width in zip(channels, widths, strict=True)]
        self.trunk = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = head_of(widths[-1], spec.target.outputs, zero_head)
        with torch.no_grad():
            for module in self.trunk.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, a=0.1, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """``[examples, channels, height, width]`` → ``[examples, outputs]``."""
        out: Tensor = self.head(self.trunk(x))
        return out
