"""A tagger: features of words, what is around them, and a tag per word."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, pad

from metarun.contracts import Spec, Words
from metarun.errors import require
from metarun.models.text import Attention


class WordVectors(nn.Module):
    """A word as the sum of the vectors of its ids, and of a linear map of its numbers where it has any."""

    def __init__(self, words: Words, width: int) -> None:
        super().__init__()
        # Padding has no row: its vector is zero. Vectors are short, so that what is learned of a rare id soon outweighs
        # what was drawn.
        self.table = nn.Parameter(0.1 * torch.randn(words.ids - 1, width))
        self.columns = words.columns
        # Without a bias, so that padding stays zero.
        self.numbers = nn.Linear(words.vector, width, bias=False) if words.vector else None

    def forward(self, x: Tensor) -> Tensor:
        """``[sentences, words, columns + numbers]`` → ``[sentences, words, width]``."""
        ids = x[..., : self.columns].long()
        vectors: Tensor = embedding(ids, pad(self.table, (0, 0, 1, 0))).sum(2)
        return vectors if self.numbers is None else vectors + self.numbers(x[..., self.columns :])


class Neighbours(nn.Module):
    """Each word's features with those of the words around it, in their order; zero beyond the ends."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach = reach

    def forward(self, x: Tensor) -> Tensor:
        """``[sentences, words, width]`` → ``[sentences, words, (2 reach + 1) width]``."""
        words, wide = x.shape[1], pad(x, (0, 0, self.reach, self.reach))
        return torch.cat([wide[:, i : i + words] for i in range(2 * self.reach + 1)], -1)


class Recurrent(nn.Module):
    """Gated recurrent units from both ends of a sentence."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.forth, self.back = (
            nn.GRU(inputs, width // 2, batch_first=True),
            nn.GRU(inputs, width // 2, batch_first=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[sentences, words, inputs]`` → ``[sentences, words, width]``."""
        # Padding is zero, but a state that has read padding is not, so each sentence is turned round by itself.
        real = x.abs().sum(-1, keepdim=True) > 0
        length = real.sum(1, keepdim=True)
        place = torch.arange(x.shape[1], device=x.device)[None, :, None]
        turned = torch.where(place < length, length - 1 - place, place)

        def turn(z: Tensor) -> Tensor:
            return z.gather(1, turned.expand(*z.shape))

        return torch.cat([self.forth(x)[0], turn(self.back(turn(x))[0])], -1)


class Attended(nn.Module):
    """A transformer layer on words with learned positions."""

    def __init__(self, words: int, inputs: int, width: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(words, width) / math.sqrt(width))
        self.enter, self.attention = nn.Linear(inputs, width), Attention(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[sentences, words, inputs]`` → ``[sentences, words, width]``."""
        there = x.abs().sum(-1, keepdim=True) > 0
        out: Tensor = self.attention(self.enter(x) + self.position, there)
        return out


class OverWords(nn.Sequential):
    """Word vectors and layers on them, each of which leaves padding at zero."""

    def forward(self, x: Tensor) -> Tensor:
        """``[sentences, words, columns]`` → features ``[sentences, words, width]``."""
        real = x[..., :1] > 0
        vectors, *layers = self
        z: Tensor = vectors(x)
        for layer in layers:
            z = layer(z) * real
        return z


class Tagger(nn.Module):
    """Vectors of words from what they look like, layers of context, and a linear head per word.

    Args:
        spec: that of a task whose inputs are words.
        embedding: width of word vectors, at least 1.
        width: width of the layers of context, at least 2 and even.
        layers: number of layers of context, at least 1.
        context: ``convolution`` over three neighbours, ``gru`` from both ends, or ``transformer``.
        dropout: share of the features that are left out in training, from 0 to below 1.
    """

    def __init__(
        self,
        spec: Spec,
        embedding: int = 64,
        width: int = 96,
        layers: int = 2,
        context: Literal["convolution", "gru", "transformer"] = "convolution",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        words = spec.inputs
        require(
            isinstance(words, Words), "tagger needs sentences of words, which this task lacks; choose another model"
        )
        assert isinstance(words, Words)
        require(embedding >= 1, f"embedding must be at least 1, not {embedding}")
        require(width >= 2 and width % 2 == 0, f"width must be at least 2 and even, not {width}")
        require(layers >= 1, f"layers must be at least 1, not {layers}")
        require(0 <= dropout < 1, f"dropout must be from 0 to below 1, not {dropout}")

        def layer(inputs: int) -> list[nn.Module]:
            if context == "gru":
                return [Recurrent(inputs, width)]
            if context == "transformer":
                return [Attended(words.words, inputs, width)]
            return [Neighbours(1), nn.Linear(3 * inputs, width), nn.ReLU()]

        parts: list[nn.Module] = [WordVectors(words, embedding)]
        for i in range(layers):
            parts += [*layer(width if i else embedding), *([nn.Dropout(dropout)] if dropout else [])]
        self.trunk = OverWords(*parts)
        self.head = nn.Linear(width, spec.target.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[sentences, words, columns]`` → ``[sentences, words, tags]``."""
        out: Tensor = self.head(self.trunk(x))
        return out
