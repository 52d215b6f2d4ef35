"""Models that predict the next token of a text, and may copy tokens from a prompt before it.

Inputs are rows of token ids ``[examples, prompt + text]``: a prompt, padded with 0, and a text that begins with a
boundary; outputs are logits of the text's next tokens ``[examples, text, ids]``. No output depends on later tokens.

With a prompt, a next token is copied from it with a probability that the model predicts (See, Liu and Manning 2017,
https://arxiv.org/abs/1704.04368, equations 8 and 9):

    p(token) = g · softmax(head(h)) + (1 − g) · Σ a_i over prompt positions i that hold the token,   g = σ(w · h + b)

where a = softmax(h W k / √width + u m + v n) attends to the features k of the prompt, m is 1 at the positions after the
token that the text has said last, and n is 1 where the two tokens before them are the last two of the text. So whoever
copies goes on copying from the start, as induction heads do (Olsson et al. 2022, https://arxiv.org/abs/2209.11895). The
outputs are logarithms of p.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from metarun.contracts import Sequences, Spec
from metarun.errors import require

COPY_ON = 4.0
"""Initial u and v."""
LEAST = 1e-9
"""The smallest probability of a token, so that its logarithm is finite."""


def sequences_of(spec: Spec, model: str) -> Sequences:
    """Return what a model of texts needs to know of its inputs.

    Raises:
        ValueError: the inputs are no texts.
    """
    inputs = spec.inputs
    if not isinstance(inputs, Sequences):
        raise ValueError(f"{model} needs texts to be continued, such as those of task=generation; choose another model")
    return inputs


def follows(prompt: Tensor, text: Tensor) -> Tensor:
    """Return which positions of a prompt come after the last token of the text so far, and after the last two.

    ``prompt [examples, columns]`` and ``text [examples, positions]`` → ``[2, examples, positions, columns]``.
    """

    def earlier(ids: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], 1)

    before, said = earlier(prompt), earlier(text)
    one = text[..., None] == before[:, None]
    return torch.stack([one, one & (said[..., None] == earlier(before)[:, None])])


class NgramEmbedding(nn.Module):
    """Vectors of the last two, three, … tokens, each kind in a separate table where n-grams share rows by a hash.

    Roy et al. 2022, "N-Grammer", https://arxiv.org/abs/2207.06366, without their clustering. The vectors start at zero.
    """

    def __init__(self, longest: int, buckets: int, width: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.tables = nn.ParameterList(nn.Parameter(torch.zeros(buckets, width)) for _ in range(longest - 1))

    def forward(self, text: Tensor) -> Tensor:
        """Token ids ``[examples, positions]`` → ``[examples, positions, width]``."""
        code, earlier, found = text, text, torch.zeros((), device=text.device)
        for table in self.tables:
            earlier = torch.cat([torch.zeros_like(earlier[:, :1]), earlier[:, :-1]], 1)
            # The product of a large prime and the code so far, as in a polynomial hash.
            code = (code * 1_000_003 + earlier) % 2_147_483_647
            found = found + table[code % self.buckets]
        return found


class Embedding(nn.Module):
    """Vectors of tokens, and of n-grams within the text."""

    def __init__(self, inputs: Sequences, width: int, longest: int, buckets: int) -> None:
        super().__init__()
        self.prompt = inputs.prompt
        self.table = nn.Parameter(torch.randn(inputs.ids, width) / math.sqrt(width))
        self.ngrams = NgramEmbedding(longest, buckets, width) if longest > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """``[examples, prompt + text]`` → ``[examples, prompt + text, width]``."""
        tokens = self.table[x]
        if self.ngrams is None:
            return tokens
        prompt, text = tokens[:, : self.prompt], tokens[:, self.prompt :]
        return torch.cat([prompt, text + self.ngrams(x[:, self.prompt :])], 1)


class Recurrent(nn.Module):
    """A gated recurrent unit reads the prompt, and another one the text, whose states attend to those of the prompt."""

    def __init__(self, inputs: Sequences, width: int, layers: int, longest: int, buckets: int, dropout: float) -> None:
        super().__init__()
        self.prompt, self.width, self.layers = inputs.prompt, width, layers
        self.embedding = Embedding(inputs, width, longest, buckets)
        self.drop = nn.Dropout(dropout)
        self.reader = nn.GRU(width, width, batch_first=True) if inputs.prompt else None
        self.writer = nn.GRU(width, width, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.query = nn.Linear(width, width)
        self.into = nn.Linear(2 * width if inputs.prompt else width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[examples, prompt + text]`` → features ``[examples, prompt + text, width]``."""
        embedded = self.drop(self.embedding(x))
        start = embedded.new_zeros(self.layers, len(x), self.width)
        if self.reader is None:
            alone: Tensor = embedded + self.drop(self.into(self.writer(embedded, start)[0]))
            return alone
        there = (x[:, : self.prompt] > 0)[..., None]
        states = self.reader(embedded[:, : self.prompt], start[:1])[0]
        read = (embedded[:, : self.prompt] + states).masked_fill(~there, 0.0)
        # The state at the last token of the prompt, after which there is padding alone.
        following = torch.cat([there[:, 1:], torch.zeros_like(there[:, :1])], 1)
        last = (states * (there & ~following)).sum(1)
        states = self.writer(embedded[:, self.prompt :], last.expand(self.layers, -1, -1).contiguous())[0]
        seen = scaled_dot_product_attention(self.query(states), read, read, attn_mask=there.transpose(1, 2))
        text = embedded[:, self.prompt :] + self.drop(self.into(torch.cat([states, seen], -1)))
        return torch.cat([read, text], 1)


class Layer(nn.Module):
    """A pre-norm transformer layer (Xiong et al. 2020, https://arxiv.org/abs/2002.04745)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_layers = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``[examples, positions, width]`` → the same shape; ``mask``: who sees whom."""
        parts = self.project(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        seen = scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None])
        x = x + self.drop(self.out(seen.transpose(1, 2).flatten(2)))
        out: Tensor = x + self.drop(self.layers(self.before_layers(x)))
        return out


class Transformed(nn.Module):
    """A transformer over prompt and text: all see the prompt, and the text sees what comes before it."""

    def __init__(
        self, inputs: Sequences, width: int, layers: int, heads: int, longest: int, buckets: int, dropout: float
    ) -> None:
        super().__init__()
        self.prompt = inputs.prompt
        self.embedding = Embedding(inputs, width, longest, buckets)
        self.position = nn.Parameter(torch.randn(inputs.prompt + inputs.text, width) / math.sqrt(width))
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(layers))
        self.after = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[examples, prompt + text]`` → features ``[examples, prompt + text, width]``."""
        place = torch.arange(x.shape[1], device=x.device)
        earlier = (place <= place[:, None]) | (place < self.prompt)
        # A place of padding sees itself, so that it has something to see.
        mask = (earlier & (x > 0)[:, None]) | (place == place[:, None])
        states = self.drop(self.embedding(x) + self.position)
        for layer in self.layers:
            states = layer(states, mask)
        out: Tensor = self.after(states)
        return out


class Decoder(nn.Module):
    """A body with a hidden layer (``trunk``), a linear ``head``, and copying from the prompt where there is one."""

    def __init__(self, spec: Spec, inputs: Sequences, body: nn.Module, width: int) -> None:
        super().__init__()
        self.prompt = inputs.prompt
        self.trunk = nn.Sequential(body, nn.Linear(width, width), nn.GELU())
        self.head = nn.Linear(width, spec.target.outputs)
        if inputs.prompt:
            self.copy_query, self.copy_gate = nn.Linear(width, width), nn.Linear(width, 1)
            self.copy_on = nn.Parameter(torch.full((2,), COPY_ON))

    def forward(self, x: Tensor) -> Tensor:
        """``[examples, prompt + text]`` → logits of the next tokens ``[examples, text, ids]``."""
        features: Tensor = self.trunk(x)
        prompt, text = features[:, : self.prompt], features[:, self.prompt :]
        logits: Tensor = self.head(text)
        if not self.prompt:
            return logits
        ids = x[:, : self.prompt]
        scores = self.copy_query(text) @ prompt.transpose(1, 2) / math.sqrt(prompt.shape[-1])
        scores = scores + (self.copy_on[:, None, None, None] * follows(ids, x[:, self.prompt :]).to(scores)).sum(0)
        attention = scores.masked_fill((ids == 0)[:, None], torch.finfo(scores.dtype).min).softmax(-1)
        places = ids[:, None].expand(-1, text.shape[1], -1)
        copied = torch.zeros_like(logits).scatter_add(-1, places, attention)
        gate = self.copy_gate(text).sigmoid()
        mixture: Tensor = gate * logits.softmax(-1) + (1 - gate) * copied
        return (mixture + LEAST).log()


def _check(width: int, layers: int, ngrams: int, buckets: int, dropout: float) -> None:
    """Raise an error if a size is out of range."""
    require(width >= 1, f"width must be at least 1, not {width}")
    require(layers >= 1, f"layers must be at least 1, not {layers}")
    require(ngrams >= 1, f"ngrams must be at least 1, not {ngrams}")
    require(buckets >= 1, f"buckets must be at least 1, not {buckets}")
    require(0 <= dropout < 1, f"dropout must be from 0 to below 1, not {dropout}")


class GRUDecoder(Decoder):
    """A gated recurrent unit with attention to the prompt (Luong, Pham and Manning 2015, without input feeding).

    https://arxiv.org/abs/1508.04025, §3.1 with the score "general".

    Args:
        spec: that of a task whose inputs are texts.
        width: width of every layer, at least 1.
        layers: number of recurrent layers that write, at least 1.
        ngrams: longest n-gram of the text that has a vector (see `NgramEmbedding`), at least 1; 1: single tokens alone.
        buckets: rows of the table of each length of n-grams, at least 1.
        dropout: probability, from 0 to below 1.
    """

    def __init__(
        self,
        spec: Spec,
        width: int = 128,
        layers: int = 1,
        ngrams: int = 1,
        buckets: int = 4096,
        dropout: float = 0.3,
    ) -> None:
        inputs = sequences_of(spec, "gru_decoder")
        _check(width, layers, ngrams, buckets, dropout)
        super().__init__(spec, inputs, Recurrent(inputs, width, layers, ngrams, buckets, dropout), width)


class TransformerDecoder(Decoder):
    """A small transformer over prompt and text (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

    Args:
        spec: that of a task whose inputs are texts.
        width: width of every layer, at least 1.
        layers: number of layers, at least 1.
        heads: number of attention heads, which divides the width.
        ngrams: longest n-gram of the text that has a vector (see `NgramEmbedding`), at least 1; 1: single tokens alone.
        buckets: rows of the table of each length of n-grams, at least 1.
        dropout: probability, from 0 to below 1.
    """

    def __init__(
        self,
        spec: Spec,
        width: int = 96,
        layers: int = 2,
        heads: int = 4,
        ngrams: int = 1,
        buckets: int = 4096,
        dropout: float = 0.3,
    ) -> None:
        inputs = sequences_of(spec, "transformer_decoder")
        _check(width, layers, ngrams, buckets, dropout)
        require(heads >= 1 and width % heads == 0, f"heads must divide width={width}, and {heads} does not")
        super().__init__(spec, inputs, Transformed(inputs, width, layers, heads, ngrams, buckets, dropout), width)
