"""Models of sentences, for rows of token ids (`metarun.data.tokens`)."""

import math

import torch
from torch import Tensor, nn

from metarun.contracts import Spec, Tokens
from metarun.data.tokens import term_frequencies
from metarun.errors import require
from metarun.nn.ops import unit_rows


def tokens_of(spec: Spec, model: str) -> Tokens:
    """Return the token ids that ``spec`` describes; raise an error if the task has none."""
    inputs = spec.inputs
    require(isinstance(inputs, Tokens), f"{model} needs sentences, and this task has none; choose another model")
    assert isinstance(inputs, Tokens)
    return inputs


class WeightedTerms(nn.Module):
    """A sentence as weighted counts of its words and n-grams, concatenated with a learned map of these counts.

        z = unit vector of counts · weights · exp(w)        one number per id, w = 0 at the start
        h = unit vector of U z                              ``width`` numbers
        features = scale · [z, residual · h]

    The weights are inverse class frequencies: the fixed features to beat. Before training h is a random
    projection of z, which preserves angles up to noise, so that training starts near the level of z alone.
    """

    def __init__(self, tokens: Tokens, width: int, residual: float, scale: float) -> None:
        super().__init__()
        self.ids, self.residual = tokens.ids, residual
        self.weights: Tensor
        self.register_buffer("weights", tokens.weights.to(torch.get_default_dtype()))
        self.log_weights = nn.Parameter(torch.zeros(tokens.ids))
        self.map = nn.Parameter(torch.randn(tokens.ids, width) / math.sqrt(width))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, x: Tensor) -> Tensor:
        """``[sentences, columns]`` → ``[sentences, ids + width]``."""
        z = term_frequencies(x, self.ids, self.weights * self.log_weights.exp())
        h = unit_rows(z @ self.map)
        return self.log_scale.exp() * torch.cat([z, self.residual * h], 1)


class TextEmbedding(nn.Module):
    """Weighted counts with a learned residual map, then a linear head.

    Args:
        spec: that of a task whose inputs are token ids.
        width: width of the residual map, at least 1.
        residual: length of the residual map's output, relative to the counts' length 1, at least 0.
        scale: initial scale of the features, above 0; learned.
    """

    def __init__(self, spec: Spec, width: int = 256, residual: float = 0.5, scale: float = 4.0) -> None:
        super().__init__()
        tokens = tokens_of(spec, "text_embedding")
        require(width >= 1, f"width must be at least 1, not {width}")
        require(residual >= 0, f"residual must be at least 0, not {residual}")
        require(scale > 0, f"scale must be above 0, not {scale}")
        self.trunk = WeightedTerms(tokens, width, residual, scale)
        self.head = nn.Linear(tokens.ids + width, spec.target.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[sentences, columns]`` → ``[sentences, outputs]``."""
        out: Tensor = self.head(self.trunk(x))
        return out


class WordEmbedding(nn.Module):
    """The vectors of a sentence's words ``[sentences, words, width]`` and a mask of the padding."""

    def __init__(self, tokens: Tokens, width: int) -> None:
        super().__init__()
        self.columns = tokens.word_columns
        self.table = nn.Parameter(torch.randn(tokens.first_bucket, width) / math.sqrt(width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[sentences, columns]`` → vectors, and True where there is a word ``[sentences, words, 1]``."""
        words = x[:, : self.columns]
        there = (words != 0)[..., None]
        return self.table[words] * there, there


def pooled(states: Tensor, there: Tensor) -> Tensor:
    """Return each feature's maximum over the words of a sentence ``[sentences, width]``; 0 where there are no words."""
    lowest = torch.finfo(states.dtype).min
    return torch.where(there.any(1), states.masked_fill(~there, lowest).amax(1), 0.0)


class ConvolvedWords(nn.Module):
    """Convolution over the words of a sentence, then the largest value of each filter (Kim 2014)."""

    def __init__(self, tokens: Tokens, width: int, window: int) -> None:
        super().__init__()
        self.embedding = WordEmbedding(tokens, width)
        self.convolution = nn.Conv1d(width, width, window, padding=window // 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[sentences, columns]`` → ``[sentences, width]``."""
        words, there = self.embedding(x)
        states = self.convolution(words.transpose(1, 2)).transpose(1, 2).relu()
        return pooled(states, there)


class TextCNN(nn.Module):
    """Words, one convolution, a maximum over positions (Kim 2014, https://arxiv.org/abs/1408.5882), a linear head.

    Args:
        spec: that of a task whose inputs are token ids.
        width: width of word vectors and filters, at least 1.
        window: number of words that a filter sees, odd.
    """

    def __init__(self, spec: Spec, width: int = 100, window: int = 3) -> None:
        super().__init__()
        require(width >= 1, f"width must be at least 1, not {width}")
        require(window >= 1 and window % 2 == 1, f"window must be odd, not {window}")
        self.trunk = ConvolvedWords(tokens_of(spec, "text_cnn"), width, window)
        self.head = nn.Linear(width, spec.target.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[sentences, columns]`` → ``[sentences, outputs]``."""
        out: Tensor = self.head(self.trunk(x))
        return out


class Attention(nn.Module):
    """A pre-norm transformer layer with one attention head, written out so that it can be differentiated twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before_attention, self.before_layers = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """``[sentences, words, width]`` → the same shape; nothing attends to padding."""
        normed = self.before_attention(x)
        logits = self.query(normed) @ self.key(normed).transpose(1, 2) / math.sqrt(x.shape[2])
        logits = logits.masked_fill(~there.transpose(1, 2), torch.finfo(logits.dtype).min)
        x = x + logits.softmax(-1) @ self.value(normed)
        out: Tensor = x + self.layers(self.before_layers(x))
        return out


class TransformedWords(nn.Module):
    """Words with learned positions, passed through attention layers, then the largest value of each feature."""

    def __init__(self, tokens: Tokens, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = WordEmbedding(tokens, width)
        self.position = nn.Parameter(torch.randn(tokens.word_columns, width) / math.sqrt(width))
        self.layers = nn.ModuleList(Attention(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """``[sentences, columns]`` → ``[sentences, width]``."""
        words, there = self.embedding(x)
        states = words + self.position
        for layer in self.layers:
            states = layer(states, there)
        return pooled(states, there)


class TextTransformer(nn.Module):
    """Words, a small transformer, a maximum over positions, a linear head.

    Args:
        spec: that of a task whose inputs are token ids.
        width: width of every layer, at least 1.
        layers: number of layers, at least 1.
    """

    def __init__(self, spec: Spec, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        require(width >= 1, f"width must be at least 1, not {width}")
        require(layers >= 1, f"layers must be at least 1, not {layers}")
        self.trunk = TransformedWords(tokens_of(spec, "text_transformer"), width, layers)
        self.head = nn.Linear(width, spec.target.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[sentences, columns]`` → ``[sentences, outputs]``."""
        out: Tensor = self.head(self.trunk(x))
        return out
