"""Models as people write them for torch, with nothing of metarun in them but the constructor's argument."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


def block(inputs, outputs, drop):
    """Three convolutions with batch normalisation, and a shortcut."""
    layers = []
    for first in (inputs, outputs, outputs):
        layers += [nn.Conv2d(first, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1)]
    return nn.ModuleDict(
        {
            "path": nn.Sequential(*layers[:-1]),
            "shortcut": nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
            "after": nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2), nn.Dropout(drop)),
        }
    )


class ResNet12(nn.Module):
    """The residual network of few-shot learning, with batch normalisation and dropout."""

    def __init__(self, spec, widths=(4, 6, 8, 10), **of_another_model):
        super().__init__()
        channels = (spec.inputs.shape[0], *widths)
        self.trunk = Residual(nn.ModuleList(block(a, b, 0.1) for a, b in pairwise(channels)))
        self.head = nn.Linear(widths[-1], spec.target.outputs)

    def forward(self, x):
        return self.head(self.trunk(x))


class Residual(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        for part in self.blocks:
            x = part["after"](part["path"](x) + part["shortcut"](x))
        return x.mean((2, 3))


class GPTLayer(nn.Module):
    """A block that normalises by function calls and attends causally, as nanoGPT's does."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.out, self.up, self.down = (
            nn.Linear(a, b) for a, b in ((width, 3 * width), (width, width), (width, 2 * width), (2 * width, width))
        )
        self.norms = nn.ParameterList([torch.ones(width), torch.ones(width)])

    def forward(self, x):
        q, k, v = (
            z.unflatten(-1, (2, -1)).transpose(1, 2)
            for z in self.qkv(F.layer_norm(x, x.shape[-1:], self.norms[0])).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1 if self.training else 0.0)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + F.dropout(
            self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:], self.norms[1])))), 0.1, self.training
        )


class Sentences(nn.Module):
    """A body over embedded words, averaged or read off at the end, and a linear head."""

    def __init__(self, spec, body, width, **of_another_model):
        super().__init__()
        self.trunk = Words(spec, {"gpt": GPTLayer, "encoder": encoder, "lstm": lstm}[body](width), width)
        self.head = nn.Linear(width, spec.target.outputs)

    def forward(self, x):
        return self.head(self.trunk(x))


class Words(nn.Module):
    def __init__(self, spec, body, width):
        super().__init__()
        self.words = spec.inputs.word_columns
        self.table = nn.Embedding(spec.inputs.ids, width, padding_idx=0)
        self.body = body

    def forward(self, x):
        z = self.body(self.table(x[:, : self.words].long()))
        return (z[0] if isinstance(z, tuple) else z).mean(1)


def encoder(width):
    return nn.TransformerEncoderLayer(width, 2, 2 * width, 0.1, batch_first=True)


def lstm(width):
    return nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)
