"""A reader of passages: where the answer to a question starts and ends."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from metarun.contracts import Joined, Spec
from metarun.data.passages import PASSAGE, QUESTION
from metarun.errors import require
from metarun.targets.classes import NO_CHANCE


class Windows(nn.Module):
    """A convolution along words, written as a linear map of each word and its neighbours.

    Args:
        inputs: numbers per word.
        width: numbers per word of the result.
        reach: number of neighbours on either side.
        spacing: distance between two of these neighbours.
    """

    def __init__(self, inputs: int, width: int, reach: int, spacing: int = 1) -> None:
        super().__init__()
        self.map, self.reach, self.spacing = nn.Linear(inputs * (2 * reach + 1), width), reach, spacing

    def forward(self, x: Tensor) -> Tensor:
        """``[texts, words, inputs]`` → ``[texts, words, width]``."""
        words, far = x.shape[-2], self.reach * self.spacing
        padded = pad(x, (0, 0, far, far))
        shifted = [padded[..., i : i + words, :] for i in range(0, 2 * far + 1, self.spacing)]
        out: Tensor = self.map(torch.cat(shifted, -1))
        return out


class Reading(nn.Module):
    """What the words of a passage are to a question.

    q = attention-weighted mean of the words of the question, each seen with its neighbours
    h = relu((1 + A q) · P x + B q)             for every word x of the passage
    h ← norm(h + relu(windows(h)))              ``layers`` times, with growing reach
    """

    def __init__(self, inputs: Joined, width: int, layers: int, reach: int, dropout: float) -> None:
        super().__init__()
        self.question = inputs.question
        self.asked = Windows(inputs.numbers, width, 1)
        self.attention = nn.Linear(width, 1)
        self.condition = nn.Linear(width, 2 * width)
        self.words = nn.Linear(inputs.numbers, width)
        self.windows = nn.ModuleList(Windows(width, width, reach, 1 + 2 * i) for i in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[questions, positions, numbers]`` → ``[questions, words of the passage, width]``."""
        asked, passage = x[..., : self.question, :], x[..., self.question :, :]
        there = passage[..., PASSAGE, None]
        words = self.asked(asked).relu()
        attention = self.attention(words).masked_fill(asked[..., QUESTION, None] == 0, NO_CHANCE).softmax(-2)
        scale, shift = self.condition((attention * words).sum(-2, keepdim=True)).chunk(2, -1)
        h = ((1 + scale) * self.words(passage) + shift).relu() * there
        for windows, norm in zip(self.windows, self.norms, strict=True):
            h = norm(h + windows(self.dropout(h)).relu()) * there
        out: Tensor = h
        return out


class Reader(nn.Module):
    """Scores of every word of a passage as the start and as the end of the answer.

    Args:
        spec: that of a task of questions.
        width: numbers per word, at least 1.
        layers: number of convolutions, at least 1.
        reach: number of words on either side that a convolution sees, at least 1.
        dropout: share of numbers that are dropped before each convolution, from 0 on and below 1.
    """

    def __init__(self, spec: Spec, width: int = 32, layers: int = 2, reach: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        inputs = spec.inputs
        require(
            isinstance(inputs, Joined),
            "reader needs questions on passages, which this task lacks; choose another model",
        )
        assert isinstance(inputs, Joined)
        for name, value in {"width": width, "layers": layers, "reach": reach}.items():
            require(value >= 1, f"{name} must be at least 1, not {value}")
        require(0 <= dropout < 1, f"dropout must be from 0 on and below 1, not {dropout}")
        self.trunk = Reading(inputs, width, layers, reach, dropout)
        self.head = nn.Linear(width, spec.target.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[questions, positions, numbers]`` → ``[questions, words of the passage, 2]``."""
        out: Tensor = self.head(self.trunk(x))
        return out
