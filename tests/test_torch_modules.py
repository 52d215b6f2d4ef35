"""Torch's own modules inside a model: their meta-gradients under every engine against plain autograd in float64.

A new module is one line of ``MODULES``. The reference knows nothing of metarun: it is a loop over tasks with
``torch.autograd.grad``, in which the model is called as it is.
"""

import inspect
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from scenarios import class_spec, classification_loss, generator
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from metarun.algos.agnostic.maml import maml
from metarun.algos.agnostic.reptile import reptile
from metarun.algos.dependent.protonet import protonet
from metarun.contracts import Task
from metarun.engine.batch import meta_gradient
from metarun.engine.recording import Recording
from metarun.nn.functional import forward_of
from metarun.tree import tree_map

WAYS, SHOTS, QUERIES, TASKS = 3, 2, 2, 3


class Call(nn.Module):
    """A function as a module; its parameters are ``weight`` and ``bias`` of ``size``."""

    def __init__(self, function, *size):
        super().__init__()
        self.function = function
        self.weight, self.bias = nn.Parameter(torch.rand(size) + 0.5), nn.Parameter(torch.rand(size) - 0.5)

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


class Applied(nn.Module):
    """A function without parameters as a module."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def both_distances(x, w, b):
    """The Euclidean distance to one set of rows, plus the sum of differences to another."""
    return (x - w).square().sum(-1).sqrt() + (x - b).abs().sum(-1)


class First(nn.Module):
    """The first of the results of a module, fed with ``copies`` of its input."""

    def __init__(self, module, copies=1, **named):
        super().__init__()
        self.module, self.copies, self.named = module, copies, named

    def forward(self, x):
        return self.module(*[x] * self.copies, **self.named)[0]


class Heads(nn.Module):
    """Scaled dot-product attention of a sequence to itself, two heads."""

    def __init__(self, **named):
        super().__init__()
        self.qkv, self.named = nn.Linear(6, 18), named

    def forward(self, x):
        q, k, v = (z.unflatten(-1, (2, 3)).transpose(-2, -3) for z in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, **self.named).transpose(-2, -3).flatten(-2)


class NormedWeight(nn.Module):
    """The formula of weight normalisation, whose second derivative torch's own has wrong (``gradgradcheck`` fails)."""

    def forward(self, g, v):
        return g * v / v.flatten(1).norm(dim=1).view(-1, *[1] * (v.ndim - 1))

    def right_inverse(self, weight):
        return weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1)), weight


def normed(module):
    nn.utils.parametrize.register_parametrization(module, "weight", NormedWeight(), unsafe=True)
    return module


class Bag(nn.Module):
    """Bags of rows of a table, since torch's own cannot be differentiated twice."""

    def __init__(self, reduce, padding=None):
        super().__init__()
        bag = nn.EmbeddingBag(9, 4, padding_idx=padding)
        self.weight, self.reduce, self.padding = bag.weight, reduce, padding

    def forward(self, x):
        rows = F.embedding(x, self.weight, self.padding)
        return self.reduce(rows if self.padding is None else rows * (x != self.padding)[..., None])


def evaluated(module):
    """In eval mode, with running statistics that are not the initial ones."""
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=generator(3)) + (0.5 if "var" in name else 0.0))
    return module.eval()


def frozen(module):
    """With constant parameters and running statistics that are not the initial ones, in training mode."""
    return evaluated(module).requires_grad_(False).train()


def weight_norm(module):
    return nn.utils.parametrizations.weight_norm(module)


def spectral_norm_in_eval(module):
    return evaluated(nn.utils.parametrizations.spectral_norm(module))


FLAT, SEQUENCE, IMAGE, TOKENS = (6,), (5, 6), (2, 6, 6), "tokens"
MODULES = {
    # name: (input shape, module, and another of the same values where torch's own has no right second derivative)
    "BatchNorm1d": (FLAT, lambda: nn.BatchNorm1d(6)),
    "BatchNorm1d without affine": (FLAT, lambda: nn.BatchNorm1d(6, affine=False)),
    "BatchNorm1d of sequences": (SEQUENCE, lambda: nn.BatchNorm1d(5)),
    "BatchNorm1d in eval mode": (FLAT, lambda: evaluated(nn.BatchNorm1d(6))),
    "BatchNorm1d frozen": (FLAT, lambda: frozen(nn.BatchNorm1d(6))),
    "BatchNorm2d": (IMAGE, lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())),
    "BatchNorm2d without averages": (IMAGE, lambda: nn.BatchNorm2d(2, track_running_stats=False)),
    "F.batch_norm": (FLAT, lambda: Call(lambda x, w, b: F.batch_norm(x, None, None, w, b, True), 6)),
    "torch.batch_norm": (
        FLAT,
        lambda: Call(lambda x, w, b: torch.batch_norm(x, w, b, None, None, True, 0.1, 1e-5, False), 6),
    ),
    "LayerNorm": (FLAT, lambda: nn.LayerNorm(6)),
    "LayerNorm of two axes": (SEQUENCE, lambda: nn.LayerNorm((5, 6))),
    "F.layer_norm": (SEQUENCE, lambda: Call(lambda x, w, b: F.layer_norm(x, (6,), w, b), 6)),
    "torch.layer_norm": (FLAT, lambda: Call(lambda x, w, b: torch.layer_norm(x, (6,), w, b), 6)),
    "InstanceNorm1d": (SEQUENCE, lambda: nn.InstanceNorm1d(5, affine=True)),
    "InstanceNorm2d": (IMAGE, lambda: nn.InstanceNorm2d(2)),
    "InstanceNorm2d in eval mode": (
        IMAGE,
        lambda: evaluated(nn.InstanceNorm2d(2, affine=True, track_running_stats=True)),
    ),
    "F.instance_norm": (SEQUENCE, lambda: Call(lambda x, w, b: F.instance_norm(x, weight=w, bias=b), 5)),
    "GroupNorm": (IMAGE, lambda: nn.GroupNorm(2, 2)),
    "RMSNorm": (FLAT, lambda: nn.RMSNorm(6)),
    "LocalResponseNorm": (IMAGE, lambda: nn.LocalResponseNorm(2)),
    "LSTM": (SEQUENCE, lambda: First(nn.LSTM(6, 4, batch_first=True))),
    "LSTM, two layers, both directions": (
        SEQUENCE,
        lambda: First(nn.LSTM(6, 3, 2, batch_first=True, bidirectional=True)),
    ),
    "LSTM with projections": (SEQUENCE, lambda: First(nn.LSTM(6, 4, batch_first=True, proj_size=2))),
    "LSTM without biases": (SEQUENCE, lambda: First(nn.LSTM(6, 4, bias=False, batch_first=True))),
    "GRU, two layers, both directions": (
        SEQUENCE,
        lambda: First(nn.GRU(6, 3, 2, batch_first=True, bidirectional=True)),
    ),
    "RNN": (SEQUENCE, lambda: First(nn.RNN(6, 4, 2, batch_first=True))),
    "RNN with ReLU": (SEQUENCE, lambda: First(nn.RNN(6, 4, nonlinearity="relu", batch_first=True))),
    "LSTMCell": (FLAT, lambda: First(nn.LSTMCell(6, 4))),
    "GRUCell": (FLAT, lambda: nn.GRUCell(6, 4)),
    "RNNCell": (FLAT, lambda: nn.RNNCell(6, 4)),
    "MultiheadAttention": (SEQUENCE, lambda: First(nn.MultiheadAttention(6, 2, batch_first=True), 3)),
    "MultiheadAttention without weights": (
        SEQUENCE,
        lambda: First(nn.MultiheadAttention(6, 2, batch_first=True), 3, need_weights=False),
    ),
    "MultiheadAttention with masks": (
        SEQUENCE,
        lambda: First(
            nn.MultiheadAttention(6, 2, batch_first=True, bias=False),
            3,
            attn_mask=torch.ones(5, 5).triu(1).bool(),
        ),
    ),
    "MultiheadAttention of other widths": (
        SEQUENCE,
        lambda: First(nn.MultiheadAttention(6, 2, batch_first=True, kdim=6, vdim=6), 3),
    ),
    "TransformerEncoderLayer": (
        SEQUENCE,
        lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True, norm_first=True),
    ),
    "TransformerEncoderLayer in eval mode": (
        SEQUENCE,
        lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval(),
    ),
    "scaled_dot_product_attention": (SEQUENCE, Heads),
    "scaled_dot_product_attention, causal": (SEQUENCE, lambda: Heads(is_causal=True)),
    "scaled_dot_product_attention, scaled": (SEQUENCE, lambda: Heads(scale=0.3)),
    "Embedding": (TOKENS, lambda: nn.Embedding(9, 4)),
    "Embedding with padding": (TOKENS, lambda: nn.Embedding(9, 4, padding_idx=0)),
    "EmbeddingBag, mean": (TOKENS, lambda: nn.EmbeddingBag(9, 4), lambda: Bag(lambda rows: rows.mean(-2))),
    "EmbeddingBag, sum with padding": (
        TOKENS,
        lambda: nn.EmbeddingBag(9, 4, mode="sum", padding_idx=0),
        lambda: Bag(lambda rows: rows.sum(-2), 0),
    ),
    "EmbeddingBag, max": (
        TOKENS,
        lambda: nn.EmbeddingBag(9, 4, mode="max"),
        lambda: Bag(lambda rows: rows.max(-2).values),
    ),
    "weight_norm": (FLAT, lambda: weight_norm(nn.Linear(6, 4)), lambda: normed(nn.Linear(6, 4))),
    "weight_norm of a convolution": (
        IMAGE,
        lambda: weight_norm(nn.Conv2d(2, 3, 3)),
        lambda: normed(nn.Conv2d(2, 3, 3)),
    ),
    "spectral_norm in eval mode": (FLAT, lambda: spectral_norm_in_eval(nn.Linear(6, 4))),
    "Bilinear": (FLAT, lambda: Call(lambda x, w, b: F.bilinear(x, x, w, b[:, 0, 0]), 4, 6, 6)),
    "MaxPool2d": (IMAGE, lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2))),
    "AdaptiveAvgPool2d": (IMAGE, lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(2))),
    "ConvTranspose2d": (IMAGE, lambda: nn.ConvTranspose2d(2, 3, 2)),
    "PReLU": (FLAT, lambda: nn.PReLU(6)),
    "Hardsigmoid": (FLAT, lambda: nn.Hardsigmoid(inplace=True), lambda: Applied(lambda x: (x / 6 + 0.5).clamp(0, 1))),
    "Hardswish": (IMAGE, lambda: nn.Hardswish()),
    "cdist": (
        SEQUENCE,
        lambda: Call(lambda x, w, b: torch.cdist(x, w) + torch.cdist(x, b, p=1), 3, 6),
        lambda: Call(lambda x, w, b: both_distances(x[:, :, None], w, b), 3, 6),
    ),
    "Softmax and GELU": (FLAT, lambda: nn.Sequential(nn.GELU(), nn.Linear(6, 6), nn.Softmax(-1))),
}


class Model(nn.Module):
    """A linear layer where inputs are numbers, the module, and a linear layer on what it gives."""

    def __init__(self, shape, module):
        super().__init__()
        before = {TOKENS: nn.Identity, IMAGE: partial(nn.Conv2d, 2, 2, 1)}.get(shape, partial(nn.Linear, 6, 6))()
        self.trunk = nn.Sequential(before, module, nn.Flatten())
        example = torch.zeros(4, 5).long() if shape == TOKENS else torch.rand(4, *shape)
        with torch.no_grad():
            features = self.trunk.eval()(example).shape[1]
        self.head = nn.Linear(features, WAYS)

    def forward(self, x):
        return self.head(self.trunk(x))


def built(name, own=False):
    """A model of the module in float64, in the modes in which the module was made; ``own``: for the reference."""
    shape, *makes = MODULES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = makes[-1 if own else 0]()
        modes = [part.training for part in module.modules()]
        model = Model(shape, module).train()
    for part, training in zip(module.modules(), modes, strict=True):
        constant = [not p.requires_grad for p in part.parameters(recurse=False)]
        part.training = training and not (own and constant and all(constant))
    return model.double()


def tasks_for(name):
    """A batch of tasks, and its seeds."""
    shape, draw = MODULES[name][0], generator(1)

    def part(shots):
        n = WAYS * shots
        x = torch.randint(9, (TASKS, n, 5), generator=draw)
        if shape != TOKENS:
            x = torch.randn(TASKS, n, *shape, generator=draw, dtype=torch.float64)
        y = F.one_hot(torch.arange(WAYS).repeat_interleave(shots), WAYS).double().expand(TASKS, -1, -1)
        return {"x": x, "y": y}

    return Task(part(SHOTS), part(QUERIES), torch.randint(2**62, (TASKS,), generator=draw))


def cross_entropy(model, weights, data):
    return F.cross_entropy(functional_call(model, weights, (data["x"],)), data["y"].argmax(1))


def reference(model, tasks, kind, steps):
    """Gradient for each parameter that is not frozen, by plain autograd."""
    start = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(w) for n, w in start.items()}
    for index in range(TASKS):
        support, query = (tree_map(lambda leaf: leaf[index], part) for part in tasks[:2])  # noqa: B023
        if kind == "protonet":
            trunk = {n.removeprefix("trunk."): w for n, w in start.items() if n.startswith("trunk.")}
            z = functional_call(model.trunk, trunk, (torch.cat([support["x"], query["x"]]),))
            centres = z[: WAYS * SHOTS].view(WAYS, SHOTS, -1).mean(1)
            distances = (z[WAYS * SHOTS :, None] - centres).square().sum(-1)
            loss = F.cross_entropy(-distances, query["y"].argmax(1))
        else:
            fast = start
            for _ in range(steps):
                slope = torch.autograd.grad(
                    cross_entropy(model, fast, support), list(fast.values()), create_graph=kind == "maml"
                )
                fast = {n: w - 0.1 * g for (n, w), g in zip(fast.items(), slope, strict=True)}
            loss = cross_entropy(model, fast, query)
        if kind == "reptile":
            found = [start[n] - fast[n] for n in start]
        else:
            found = torch.autograd.grad(loss, list(start.values()), allow_unused=True)
        for name, gradient in zip(start, found, strict=True):
            total[name] = total[name] + (0.0 if gradient is None else gradient.detach()) / TASKS
    return total


ALGORITHMS = {
    "maml, 1 step": ("maml", 1, partial(maml, inner_lr=0.1)),
    "maml, 3 steps": ("maml", 3, partial(maml, inner_lr=0.1, inner_steps=3)),
    "fomaml": ("fomaml", 2, partial(maml, inner_lr=0.1, inner_steps=2, first_order=True)),
    "reptile": (
        "reptile",
        2,
        partial(reptile, inner_lr=0.1, inner_steps=2, inner_batch=99, inner_optimizer="sgd"),
    ),
    "protonet": ("protonet", 0, protonet),
}
ENGINES = ["eager", "replay", "compile", "replicas"]


def found(engine, algorithm, theta, tasks):
    """The meta-gradient by an engine, as a tree like ``theta``."""

    def step(given):
        with torch.no_grad():
            batch = given["tasks"]
            return {"grads": meta_gradient(algorithm, given["theta"], batch, classification_loss).grads}

    given = {"theta": theta, "tasks": tasks}
    if engine == "eager":
        return step(given)["grads"]
    if engine == "replicas":

        def replica(given):
            batch = given["tasks"]
            return meta_gradient(algorithm, given["theta"], batch, classification_loss, transformed=True).grads

        twice = tree_map(lambda leaf: torch.stack([leaf, leaf]), given)
        return tree_map(lambda leaf: leaf[1], vmap(replica)(twice))
    other = {**given, "tasks": tree_map(lambda leaf: leaf.flip(0), given["tasks"])}
    recording = Recording(step, other)
    return (recording.compiled(other) if engine == "compile" else recording.replayed(other))(given)["grads"]


REPLAYED = ("BatchNorm2d", "LSTM", "MultiheadAttention", "EmbeddingBag, mean", "weight_norm")


def quick(name, algo, engine):
    """Whether a developer's own run of the tests has the case: not those that record or compile, which take seconds."""
    if engine == "eager":
        return algo != "maml, 1 step"
    return algo == "maml, 3 steps" and (engine == "replicas" or (engine == "replay" and name in REPLAYED))


CASES = [
    pytest.param(name, algo, engine, marks=[] if quick(name, algo, engine) else pytest.mark.slow)
    for name in MODULES
    for algo in ALGORITHMS
    for engine in ENGINES
]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(("name", "algo", "engine"), CASES)
def test_meta_gradient_equals_plain_autograd(name, algo, engine):
    kind, steps, factory = ALGORITHMS[algo]
    model, tasks = built(name), tasks_for(name)
    spec = class_spec((6,), WAYS, SHOTS, QUERIES, WAYS, WAYS)
    with sdpa_kernel(SDPBackend.MATH):
        expected = reference(built(name, own=True), tasks, kind, steps)
    before = [buffer.clone() for buffer in model.buffers()]
    context = {"model": model, "spec": spec}
    algorithm = factory(**{name: context[name] for name in context if name in inspect.signature(factory).parameters})
    theta = algorithm.init(generator())
    gradients = found(engine, algorithm, theta, tasks)["weights"]
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    for key, gradient in gradients.items():
        full = key if key in expected else f"trunk.{key}"
        # Some gradients are 0 but for rounding: a bias that a normalisation takes out again.
        scale = max(expected[full].norm().item(), 1e-3 * whole)
        assert (gradient - expected[full]).norm().item() <= 1e-9 * scale, full
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


@pytest.mark.parametrize("kind", ["which keys count", "numbers to add"])
def test_a_query_that_may_see_no_key_gets_zeros_and_finite_gradients(kind):
    """As from torch's own attention: an example of padding has no words to look at."""
    there = torch.tensor([[True, False, True], [False, False, False]])[:, None]
    mask = there if kind == "which keys count" else torch.zeros(2, 1, 3).masked_fill(~there, -torch.inf)
    attend = Applied(lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=mask))
    x = torch.randn(2, 3, 4, generator=generator(), requires_grad=True)
    found, expected = forward_of(attend)({}, x), attend(x)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for out in (found, expected)]
    torch.testing.assert_close(*slopes)
