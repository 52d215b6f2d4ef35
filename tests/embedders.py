"""Tiny frozen models for task.embed."""

import torch
from torch import nn

calls: list[int] = []
"""The number of examples of each call."""


class Colours(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5)
        nn.init.constant_(self.linear.bias, 0.5)
        with torch.no_grad():
            self.linear.weight.copy_(torch.arange(15.0).reshape(5, 3) / 7)

    def forward(self, x):
        calls.append(len(x))
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.linear(x.mean((2, 3)))


def colours():
    return Colours()


def lengths():
    def embed(sentences):
        calls.append(len(sentences))
        return [[float(len(s)), float(s.count("e")), float(s.count(" "))] for s in sentences]

    return embed


def flat():
    return lambda x: torch.zeros(len(x))


def failing():
    raise ConnectionError("no network")
