"""Text: the cross-entropy of each next token, in nats per token or in bits per character."""

import math
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn.functional import log_softmax

from metarun.contracts import Need, Scores, Tree
from metarun.data.portable import portable
from metarun.targets.metric import Metric

NATS = Metric("nats-per-token", higher_is_better=False)
BITS = Metric("bits-per-character", higher_is_better=False)


@portable
@dataclass(frozen=True)
class Text:
    """Targets ``y [examples, positions]`` that are the ids of next tokens; ids below 1 are padding.

    Outputs are logits ``[examples, positions, ids]``. Every token of a task counts alike, so that longer texts count
    more, and texts of weight 0 do not count.
    """

    outputs: int
    """Number of ids."""
    characters: Tensor | None = field(default=None, compare=False, repr=False)
    """Number of characters of each id ``[ids]``, if the score is in bits per character; None: nats per token."""
    offers: tuple[Need, ...] = ("loss", "examples")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Bits per character, which do not depend on how text is cut into tokens, or nats per token."""
        return (NATS if self.characters is None else BITS,)

    def nats(self, output: Tensor, data: Tree) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of each token, and whether it counts: both ``[examples, positions]``."""
        y = data["y"]
        real = (y > 0).to(output.dtype)
        if "weight" in data:
            real = real * data["weight"][:, None]
        nats = -log_softmax(output, -1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
        # Padding may hold anything, including infinity, whose product with 0 is not 0.
        counted: Tensor = nats.masked_fill(real == 0, 0.0) * real
        return counted, real

    def loss(self, output: Tensor, data: Tree) -> Tensor:
        """Return the mean cross-entropy per token in nats."""
        nats, real = self.nats(output, data)
        return nats.sum() / real.sum().clamp(min=1)

    def scores(self, output: Tensor, data: Tree) -> Scores:
        """Return nats per token, or bits per character."""
        nats, real = self.nats(output.detach(), data)
        if self.characters is None:
            return {NATS.name: nats.sum() / real.sum().clamp(min=1)}
        return {BITS.name: nats.sum() / (math.log(2) * self.length(data).clamp(min=1))}

    def length(self, data: Tree) -> Tensor:
        """Return the number of characters of the texts of a task, a scalar; a text's end counts as one."""
        assert self.characters is not None
        y: Tensor = data["y"]
        lengths: Tensor = self.characters.to(y.device)[y.clamp(min=0)] * (y > 0)
        of_text = lengths.sum(-1)
        return of_text @ data["weight"].to(of_text) if "weight" in data else of_text.sum()
