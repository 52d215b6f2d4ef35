"""Vectors of words by a frozen pretrained model that embeds each word alone (``task.embed`` where inputs are words).

Models of sentences give one vector per sentence, so each different word is embedded as if it were a sentence. What is
around a word is left to the learner's model.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from metarun.data.embedding import cached_features, features
from metarun.data.portable import portable
from metarun.errors import require


def different(sentences: Iterable[Sequence[str]]) -> list[str]:
    """Return the different words of sentences in alphabetical order."""
    return sorted({word for sentence in sentences for word in sentence})


def embedded(embed: str, words: list[str], device: str = "cpu") -> Tensor:
    """Return the features of words ``[words, d]``, read from the cache if it holds them.

    Raises:
        UserError: the model cannot be loaded, or returns something else.
    """
    return cached_features(embed, "sentences", words, sha256(json.dumps(words).encode()).hexdigest(), device)


@portable
@dataclass(frozen=True)
class WordVectors:
    """Turns words into the principal components of a frozen model's features; created by `fit_vectors`."""

    embed: str
    """What embeds words."""
    mean: Tensor
    """Mean features of the training words ``[d]``."""
    directions: Tensor
    """``[d, size]``, scaled so that the numbers of a training word have a mean square of 1."""

    @property
    def size(self) -> int:
        """How many numbers a word has."""
        return self.directions.shape[1]

    def projected(self, z: Tensor) -> Tensor:
        """Return the numbers of words ``[words, size]`` from their features ``[words, d]``."""
        z = z.to(torch.get_default_dtype())
        return (z - self.mean.to(z)) @ self.directions.to(z)

    def of(self, sentences: Sequence[Sequence[str]], longest: int) -> Tensor:
        """Return the numbers of the words of sentences ``[sentences, longest, size]``, zero after their ends.

        Raises:
            ValueError: the model cannot be loaded, or is another one than that of training.
        """
        words = different(sentences)
        z = features(self.embed, "sentences", words)
        require(
            z.shape[1] == len(self.mean),
            f"task.embed={self.embed} returns {z.shape[1]} features now, and the learner was trained on "
            f"{len(self.mean)}; restore the model, or train again",
        )
        return table_of(self.projected(z))[places(sentences, words, longest)]


def fit_vectors(embed: str, training: Tensor, size: int) -> WordVectors:
    """Return the ``size`` principal components of the features of training words ``[words, d]``, or all d of them."""
    z = training.double()
    mean = z.mean(0)
    values, vectors = torch.linalg.eigh((z - mean).T @ (z - mean) / len(z))
    size = min(size, len(mean))
    scale = (values[-size:].mean().clamp(min=torch.finfo(torch.float64).tiny)) ** -0.5
    # The sign of an eigenvector is arbitrary; its largest number is made positive.
    vectors = vectors[:, -size:].flip(1)
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return WordVectors(embed, mean.float(), (vectors * scale).float())


def places(sentences: Sequence[Sequence[str]], words: Sequence[str], longest: int) -> Tensor:
    """Return the row of each word in `table_of` the words ``[sentences, longest]``, 0 after the end of a sentence."""
    row = {word: i + 1 for i, word in enumerate(words)}
    found = [[row[word] for word in sentence[:longest]] for sentence in sentences]
    return torch.tensor([own + [0] * (longest - len(own)) for own in found])


def table_of(numbers: Tensor) -> Tensor:
    """Return the numbers of words after a row of zeros ``[words + 1, size]``."""
    return torch.nn.functional.pad(numbers, (0, 0, 1, 0))
