"""In-context learning: a transformer that reads the support set and answers queries.

Müller, Hollmann, Pineda Arango, Grabocka, Hutter 2022, "Transformers Can Do Bayesian Inference",
https://arxiv.org/abs/2112.10510 (§4 and figure 2): support examples attend to each other, and queries attend to the
support set alone. No example has a position, so the prediction depends neither on the order of the support set nor on
the other queries. Trained on many tasks, the transformer approximates the mean of the posterior predictive
distribution.

    token      linear map of the features of x concatenated with y, or with zeros for a query
    layer      x ← x + attention(norm x, norm support),  x ← x + MLP(norm x)            (pre-norm)

Inputs are the features of the model's trunk. Where we deviate: for regression the network predicts a mean under the
family's loss, instead of a histogram of the density.
"""

import torch
from torch import Tensor, nn

from metarun.algos.dependent.snail import Sequences, reader
from metarun.contracts import Algorithm, Spec
from metarun.errors import require
from metarun.nn.ops import multi_head


class Layer(nn.Module):
    """Attention to the support set, then a perceptron, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.behind = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, given: Sequences) -> Sequences:
        """Shapes stay."""
        support, query, weight = given
        read = self.before(support)
        keys, values = self.key(read), self.value(read)

        def layer(x: Tensor) -> Tensor:
            x = x + self.mix(multi_head(self.query(self.before(x)), keys, values, self.heads, weight))
            out: Tensor = x + self.perceptron(self.behind(x))
            return out

        together = layer(torch.cat([support, query]))
        return Sequences(together[: len(support)], together[len(support) :], weight)


class Transformer(nn.Module):
    """``([support, token], [queries, token])`` → ``[queries, outputs]``."""

    def __init__(self, token: int, outputs: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(token, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def forward(self, given: Sequences) -> Tensor:
        """Return one prediction per query."""
        support, query, weight = given
        out: Tensor = self.out(self.layers(Sequences(self.embed(support), self.embed(query), weight)).query)
        return out


def incontext(model: nn.Module, spec: Spec, width: int = 64, layers: int = 3, heads: int = 4) -> Algorithm:
    """A transformer over the support set.

    Args:
        model: a module with ``trunk`` and ``head``; of the head only its width is used.
        spec: that of a regression or classification task.
        width: width of a token, a multiple of ``heads``.
        layers: number of layers, at least 1.
        heads: number of attention heads, at least 1.
    """
    require(layers >= 1, f"layers must be at least 1, not {layers}")
    require(heads >= 1, f"heads must be at least 1, not {heads}")
    require(width >= 1 and width % heads == 0, f"width must be a multiple of heads={heads}, not {width}")
    return reader(
        model,
        spec,
        "incontext",
        lambda token: Transformer(token, spec.row_outputs, width, layers, heads),
        "https://arxiv.org/abs/2112.10510",
    )
