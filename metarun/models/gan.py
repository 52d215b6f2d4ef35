"""A small generator of pictures and its critic.

After the networks of Clouâtre and Demers 2019 (https://arxiv.org/abs/1901.02199, §3.3, "DCGAN" in their code), at a
size for a CPU. The generator normalises over the channels, height and width of each picture, as theirs does. The
critic has no normalisation, whose second derivatives would cost most of the time.
"""

from itertools import chain
from typing import Any

from torch import Tensor, nn

from metarun.contracts import Numbers, Spec
from metarun.errors import require
from metarun.targets.adversarial import Adversarial, Latent

HALVINGS, SLOPE = 2, 0.2


def doubled(inputs: int, outputs: int) -> list[nn.Module]:
    """Return layers that double the size of pictures."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
    return [nn.Upsample(scale_factor=2), convolution, nn.GroupNorm(1, outputs), nn.LeakyReLU(SLOPE)]


def halved(inputs: int, outputs: int) -> list[nn.Module]:
    """Return layers that halve the size of pictures."""
    return [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.LeakyReLU(SLOPE)]


class GANSmall(nn.Module):
    """A generator and a critic, each a few convolutions.

    Args:
        spec: that of a family with a `metarun.targets.adversarial.Adversarial` as target, of pictures whose edge is a
            multiple of 4.
        width: number of channels at full size, at least 1; twice as many at half size, four times at a quarter.
    """

    def __init__(self, spec: Spec, width: int = 16) -> None:
        super().__init__()
        shape, target = spec.inputs.shape, spec.target
        if not (isinstance(target, Adversarial) and isinstance(spec.inputs, Numbers) and len(shape) == 3):
            raise ValueError(
                "gan_small makes pictures and judges them, as task=generate_adversarial wants; choose another model"
            )
        channels, height, across = shape
        require(
            height % 2**HALVINGS == 0 and across % 2**HALVINGS == 0,
            f"gan_small needs pictures whose edge is a multiple of {2**HALVINGS}, not {height}; change task.image_size",
        )
        require(width >= 1, f"width must be at least 1, not {width}")
        low, most = (height // 2**HALVINGS, across // 2**HALVINGS), width * 2**HALVINGS
        self.generator = nn.Sequential(
            nn.Linear(target.latents, most * low[0] * low[1]),
            nn.Unflatten(1, (most, *low)),
            nn.GroupNorm(1, most),
            nn.LeakyReLU(SLOPE),
            *chain.from_iterable(doubled(most >> i, most >> (i + 1)) for i in range(HALVINGS)),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Tanh(),
        )
        self.critic = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.LeakyReLU(SLOPE),
            *chain.from_iterable(halved(width << i, width << (i + 1)) for i in range(HALVINGS)),
            nn.Flatten(),
            # Without a bias, which would be the same for real and made pictures.
            nn.Linear(most * low[0] * low[1], 1, bias=False),
        )

    def forward(self, given: Any) -> Tensor:
        """Return pictures ``[rows, *picture]`` for `Latent` noise, or judgements ``[rows]`` for pictures."""
        made: Tensor = self.generator(given.z) if isinstance(given, Latent) else self.critic(given)[:, 0]
        return made
