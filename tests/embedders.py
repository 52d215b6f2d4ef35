"""Tiny networks for task.embed and model.source."""

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


def unfit():
    """Return a network for pictures of another size, as those of transformers are."""

    def embed(x):
        assert x.shape[-1] == 224, "Input height doesn't match model (224)."

    return embed


def failing():
    raise ConnectionError("no network")


class Network(nn.Module):
    """Batch normalisation with statistics of its own, sums and ReLU in place, as torchvision's networks have."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.last = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5))
        numbers = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
                if tensor.is_floating_point():
                    drawn = torch.rand(tensor.shape, generator=numbers, dtype=tensor.dtype)
                    tensor.copy_(drawn + 0.5 if "running_var" in name else drawn - 0.5)

    def forward(self, x):
        x = self.stem(x)
        after = self.layer1(x)
        after += x
        return self.last(after).mean((2, 3))


def network():
    return Network()


def maps():
    return nn.Conv2d(3, 4, 3)


def beside_the_corner():
    """Return a callable whose features are a single pixel, which mirror images and turns move."""
    return lambda x: x[:, :, 0, 1]
