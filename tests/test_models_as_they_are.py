"""What a user's module says counts: dropout, frozen parameters, running statistics; what cannot work is refused."""

import random

import pytest
import torch
import torch.nn.functional as F
from conftest import composed, experiment_of
from omegaconf import OmegaConf
from scenarios import class_spec, classification_loss, generator
from test_torch_modules import WAYS, First, Model, found
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

from metarun.algos.agnostic.anil import anil
from metarun.algos.agnostic.maml import maml
from metarun.checks.family import check_family
from metarun.contracts import Task
from metarun.engine.batch import evaluate, meta_gradient
from metarun.errors import UserError
from metarun.evaluation import episodes
from metarun.loop import meta_train
from metarun.nn.functional import forward_of
from metarun.nn.transforms import plainly
from metarun.random import drawing, fold, uniform
from metarun.run import run
from metarun.tree import leaves, tree_map

SPEC = class_spec((6,), WAYS, 2, 2, WAYS, WAYS)
FLAT, SEQUENCE = (6,), (5, 6)


@pytest.fixture(autouse=True)
def _float64(float64):
    torch.manual_seed(0)


def tasks_of(shape, count=3):
    draw = generator(1)

    def part():
        y = F.one_hot(torch.arange(WAYS).repeat_interleave(2), WAYS).double().expand(count, -1, -1)
        return {"x": torch.randn(count, 2 * WAYS, *shape, generator=draw), "y": y}

    return Task(part(), part(), torch.randint(2**62, (count,), generator=draw))


RANDOM = {
    "Dropout": (FLAT, lambda: nn.Dropout(0.4)),
    "Dropout in place": (FLAT, lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.4, inplace=True))),
    "Dropout1d": (SEQUENCE, lambda: nn.Dropout1d(0.4)),
    "AlphaDropout": (FLAT, lambda: nn.AlphaDropout(0.4)),
    "FeatureAlphaDropout": (SEQUENCE, lambda: nn.FeatureAlphaDropout(0.4)),
    "RReLU": (FLAT, nn.RReLU),
    "LSTM": (SEQUENCE, lambda: First(nn.LSTM(6, 3, 2, dropout=0.4, batch_first=True))),
    "MultiheadAttention": (SEQUENCE, lambda: First(nn.MultiheadAttention(6, 2, dropout=0.4, batch_first=True), 3)),
    "TransformerEncoderLayer": (SEQUENCE, lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.4, batch_first=True)),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_layers_are_the_same_under_every_engine_and_off_in_test(name):
    shape, make = RANDOM[name]
    model, tasks = Model(shape, make()).train(), tasks_of(shape)
    algorithm = maml(model, inner_lr=0.1, inner_steps=2)
    theta = algorithm.init(generator())
    eager, *others = (
        list(leaves(found(engine, algorithm, theta, tasks))) for engine in ("eager", "replay", "replicas")
    )
    with plainly():
        others.append(list(leaves(meta_gradient(algorithm, theta, tasks, classification_loss).grads)))
    for other in others:
        torch.testing.assert_close(other, eager, rtol=1e-9, atol=1e-11)
    again = list(leaves(found("eager", algorithm, theta, tasks._replace(seed=tasks.seed + 1))))
    assert not torch.allclose(again[0], eager[0])
    trained = evaluate(algorithm, theta, tasks, classification_loss, 2).losses
    model.eval()
    torch.testing.assert_close(trained, evaluate(algorithm, theta, tasks, classification_loss, 2).losses)


def test_dropout_equals_masks_from_the_task_s_seed():
    """The meta-gradient of one step against autograd with masks that are written out."""
    model, tasks = Model(FLAT, nn.Dropout(0.4)).train(), tasks_of(FLAT)
    algorithm = maml(model, inner_lr=0.1)
    theta = algorithm.init(generator())
    weights = {n: w.clone().requires_grad_() for n, w in theta["weights"].items()}

    def loss(weights, data, mask):
        hidden = F.linear(data["x"], weights["trunk.0.weight"], weights["trunk.0.bias"]) * mask / 0.6
        return F.cross_entropy(F.linear(hidden, weights["head.weight"], weights["head.bias"]), data["y"].argmax(1))

    total = 0
    for index, seed in enumerate(tasks.seed):
        support, query = (tree_map(lambda leaf: leaf[index], part) for part in tasks[:2])  # noqa: B023
        first, second = (uniform(fold(seed, draw), (6, 6)) >= 0.4 for draw in (1, 2))
        slope = torch.autograd.grad(loss(weights, support, first), list(weights.values()), create_graph=True)
        fast = {n: w - 0.1 * g for (n, w), g in zip(weights.items(), slope, strict=True)}
        total = total + loss(fast, query, second) / 3
    expected = torch.autograd.grad(total, list(weights.values()))
    grads = meta_gradient(algorithm, theta, tasks, classification_loss).grads["weights"]
    torch.testing.assert_close(tuple(grads[n] for n in weights), expected, rtol=1e-10, atol=1e-12)


def test_dropout_keeps_the_mean_and_alpha_dropout_the_variance_too():
    x = torch.randn(1000, 200, generator=generator())
    for layer, mean, variance in ((nn.Dropout(0.3), 0.0, 1 / 0.7), (nn.AlphaDropout(0.3), 0.0, 1.0)):
        with drawing(torch.tensor(5), training=True):
            out = forward_of(layer)({}, x)
        assert out.mean().item() == pytest.approx(mean, abs=0.01)
        assert out.var().item() == pytest.approx(variance, rel=0.01)
    with drawing(torch.tensor(5), training=True):
        kept = forward_of(nn.Dropout2d(0.3))({}, torch.ones(50, 40, 3, 3)).unique(dim=-1)
    assert kept.shape[-1] == 1, "channels are dropped as a whole"


class HalfFrozen(nn.Module):
    """80 constant numbers and 41 that learn."""

    def __init__(self, spec, **of_another_model):
        super().__init__()
        self.trunk = nn.Linear(*spec.inputs.shape, 40).requires_grad_(False)
        self.head = nn.Linear(40, 1)

    def forward(self, x):
        return self.head(self.trunk(x).relu())


@pytest.mark.parametrize("algo", ["maml", "reptile", "metasgd", "imaml", "mamlpp", "transfer"])
def test_frozen_parameters_are_constants(algo, tmp_path):
    torch.set_default_dtype(torch.float32)
    model = f"{HalfFrozen.__module__}.{HalfFrozen.__name__}"
    experiment = experiment_of(
        f"algo={algo}",
        "task=sinusoid",
        f"model._target_={model}",
        *("train.steps=4", "train.meta_batch=2", "train.eval_every=4", "train.val_episodes=2"),
        "train.weight_decay=0.1",
    )
    before = [p.clone() for p in experiment.model.trunk.parameters()]
    training = meta_train(experiment, tmp_path, resume=False)
    learned = training.best[0].theta["weights"]
    assert {name.partition(".")[0] for name in learned} == {"head"}
    assert sum(w.numel() for w in learned.values()) == 41
    assert all(torch.equal(a, b) for a, b in zip(experiment.model.trunk.parameters(), before, strict=True))


class Frozen(HalfFrozen):
    """121 constant numbers."""

    def __init__(self, spec, **of_another_model):
        super().__init__(spec)
        self.requires_grad_(False)


def test_a_model_that_is_frozen_as_a_whole_is_refused_by_what_adapts_it():
    with pytest.raises(UserError, match=r"algo=reptile adapts the parameters of the model, and all .* are frozen"):
        experiment_of("algo=reptile", "task=sinusoid", f"model._target_={Frozen.__module__}.Frozen")


class Writes(nn.Module):
    """A module that changes its buffer in one way or another."""

    def __init__(self, how):
        super().__init__()
        self.register_buffer("seen", torch.zeros(6))
        self.linear, self.how = nn.Linear(6, WAYS), how

    def forward(self, x):
        if self.how == "in place":
            self.seen.add_(x.detach().mean(0))
        elif self.how == "by index":
            self.seen[0] = 1.0
        elif self.how == "as output":
            torch.mul(self.seen, 2, out=self.seen)
        else:
            self.seen = self.seen + x.detach().mean(0)
        return self.linear(x)


@pytest.mark.parametrize("how", ["in place", "by index", "as output", "by a new one"])
def test_a_buffer_that_is_written_is_refused(how):
    model = Writes(how)
    before = model.seen
    with pytest.raises(UserError, match="writes to its buffer seen"):
        meta_gradient(*prepared(model), tasks_of(FLAT), classification_loss)
    assert model.seen is before


class Remembers(nn.Module):
    """A module that keeps in an attribute what it has seen, and counts how often it was asked; it uses neither."""

    def __init__(self, spec, **of_another_model):
        super().__init__()
        self.layer, self.last, self.calls = nn.Linear(1, 1), torch.zeros(1), 0

    def forward(self, x):
        out = self.layer(x) + self.used()
        self.last, self.calls = out.mean(0).detach(), self.calls + 1
        return out

    def used(self):
        return 0


class UsesTheLast(Remembers):
    def used(self):
        return self.last


class UsesTheCount(Remembers):
    def used(self):
        return 0.001 * self.calls


class DrawsByPython(Remembers):
    def used(self):
        return random.random()


@pytest.mark.parametrize("algo", ["maml", "scratch"])
@pytest.mark.parametrize(("model", "kept"), [(UsesTheLast, "last"), (UsesTheCount, "calls")])
def test_a_model_whose_answers_depend_on_earlier_calls_is_refused(algo, model, kept):
    with pytest.raises(UserError, match=f"{model.__name__} changes .*{kept}.* from one call to the next"):
        checked(algo, model)


@pytest.mark.parametrize("model", [Remembers, DrawsByPython])
def test_a_model_that_keeps_what_it_never_uses_is_not_refused(model):
    checked("maml", model)


def checked(algo, model):
    target = f"model._target_={model.__module__}.{model.__name__}"
    experiment = experiment_of(f"algo={algo}", "task=sinusoid", target, "train.meta_batch=2")
    check_family(experiment, episodes(experiment, "test", 2))


def prepared(model):
    algorithm = maml(model, inner_lr=0.1)
    return algorithm, algorithm.init(generator())


class Applied(nn.Module):
    """A linear layer after any function of the input."""

    def __init__(self, function, *parts):
        super().__init__()
        self.function, self.parts, self.linear = function, nn.ModuleList(parts), nn.LazyLinear(WAYS)

    def forward(self, x):
        return self.linear(self.function(x, *self.parts))


def packed(x, lstm):
    return lstm(pack_padded_sequence(x, [5] * len(x), batch_first=True))[0].data[: len(x)]


REFUSED = {
    "a packed sequence": (SEQUENCE, lambda: Applied(packed, nn.LSTM(6, 4, batch_first=True)), "pad the seq"),
    "max_norm": (
        FLAT,
        lambda: Applied(lambda x, table: table((x[:, :2] > 0).long()).flatten(1), nn.Embedding(2, 4, max_norm=1.0)),
        "max_norm",
    ),
    "offsets": (
        FLAT,
        lambda: Applied(lambda x, bag: bag((x > 0).long().flatten(), torch.arange(len(x)) * 6), nn.EmbeddingBag(2, 4)),
        "offsets",
    ),
    "bias_k": (
        SEQUENCE,
        lambda: First(nn.MultiheadAttention(6, 2, add_bias_kv=True, batch_first=True), 3),
        "add_bias_kv",
    ),
    "spectral_norm in training": (
        FLAT,
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, WAYS)),
        "writes to its buffer",
    ),
    "a native function": (
        FLAT,
        lambda: Applied(lambda x: torch.native_layer_norm(x, (6,), None, None, 1e-5)[0]),
        "native_layer_norm",
    ),
    "whole random numbers": (FLAT, lambda: Applied(lambda x: x[torch.randperm(len(x))]), "randperm"),
    "one value": (
        FLAT,
        lambda: Applied(lambda x, norm: norm(x[:1]).expand(len(x), -1), nn.BatchNorm1d(6)),
        "one value per channel",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_made_right_is_refused_by_name(name):
    shape, make, words = REFUSED[name]
    model = make()
    if name == "bias_k":
        model = nn.Sequential(model, nn.Flatten(), nn.Linear(30, WAYS))
    with torch.no_grad():
        model.eval()(tasks_of(shape).support["x"][0])
    model.train()
    with pytest.raises(UserError, match=words):
        meta_gradient(*prepared(model), tasks_of(shape), classification_loss)


def test_running_statistics_are_those_of_the_module():
    """In eval mode a normalisation is a constant scale and shift, and queries do not see each other."""
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, WAYS))
    x = torch.randn(7, 6, generator=generator()) + 2
    for _ in range(50):
        model.train()(x)
    model.eval()
    weights = {n: p.detach() for n, p in model.named_parameters()}
    torch.testing.assert_close(forward_of(model)(weights, x), functional_call(model, weights, (x,)))
    torch.testing.assert_close(forward_of(model)(weights, x[:1]), forward_of(model)(weights, x)[:1])


IMAGES = ("task=omniglot", "task.dataset=procedural", "task.image_size=16", "model._target_=ordinary_models.ResNet12")
SENTENCES = ("task=text", "task.dataset=toy", "task.buckets=64", "model._target_=ordinary_models.Sentences")
ORDINARY = {
    "ResNet-12": IMAGES,
    "GPT": (*SENTENCES, "+model.body=gpt", "model.width=8"),
    "bidirectional LSTM": (*SENTENCES, "+model.body=lstm", "model.width=8"),
    "TransformerEncoderLayer": (*SENTENCES, "+model.body=encoder", "model.width=8"),
}


@pytest.mark.parametrize("algo", ["maml", "reptile", "protonet", "metasgd"])
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_models_run_unchanged(name, algo, tmp_path):
    """Two meta-steps and a validation; the first gradient has been compared with plain autograd on the way."""
    torch.set_default_dtype(torch.float32)
    budget = ("train.steps=2", "train.eval_every=2", "train.meta_batch=2", "train.val_episodes=2", "engine=eager")
    small = ("task.train_ways=null", "eval.adapt_steps=1", "task.train_queries=2", "task.queries=2")
    experiment = experiment_of(f"algo={algo}", *ORDINARY[name], *budget, *small)
    training = meta_train(experiment, tmp_path, resume=False)
    assert bool(training.train_state["weights"].isfinite().all())
    assert training.best[0] is not None


class FromFile(torch.nn.Module):
    """A trained head on a frozen layer, which is read from a file."""

    def __init__(self, spec, path: str):
        super().__init__()
        self.trunk = torch.nn.Linear(1, 4)
        self.trunk.load_state_dict(torch.load(path, weights_only=True))
        self.trunk.requires_grad_(False)
        self.head = torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.trunk(x).tanh())


def test_a_run_is_not_resumed_on_other_frozen_weights(tmp_path):
    torch.save(torch.nn.Linear(1, 4).state_dict(), tmp_path / "backbone.pt")
    quick = ("train.steps=2", "train.eval_every=1", "train.val_episodes=3", "eval.episodes=3", "eval.adapt_steps=1")
    config, names = composed("algo=maml", "task=sinusoid", "engine=eager", *quick)
    config.model = OmegaConf.create(
        {"_target_": "test_models_as_they_are.FromFile", "path": str(tmp_path / "backbone.pt")}
    )
    run(config, names, tmp_path / "run")
    run(config, names, tmp_path / "run", resume=True)
    torch.save(torch.nn.Linear(1, 4).state_dict(), tmp_path / "backbone.pt")
    with pytest.raises(UserError, match="other frozen parameters or buffers"):
        run(config, names, tmp_path / "run", resume=True)


class Shaken(nn.Module):
    """Noise and a draw that is skipped, as people write them: while the module is training."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(6), nn.Linear(6, WAYS)

    def forward(self, x):
        if self.training:
            x = x + 5 * torch.randn_like(x)
        return self.linear(self.norm(x))


def test_what_a_module_does_in_training_alone_it_does_not_in_test():
    """Batch normalisation goes on using the statistics of the batch, and the module is left as it was."""
    model, x = Shaken().train(), torch.randn(7, 6, generator=generator())
    weights = {n: p.detach() for n, p in model.named_parameters()}
    plain = model.linear(F.batch_norm(x, None, None, training=True))
    with drawing(torch.tensor(5), training=False):
        torch.testing.assert_close(forward_of(model)(weights, x), plain)
    with drawing(torch.tensor(5), training=True):
        assert not torch.allclose(forward_of(model)(weights, x), plain)
    assert all(part.training for part in model.modules())


def test_a_transformer_masks_padding_in_eval_mode_too():
    """Where torch's own would look for nested tensors, which cannot be mapped over tasks."""
    layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 2), torch.randn(2, 3, 5, 6, generator=generator())
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    model = Applied(lambda x, encoder: encoder(x, src_key_padding_mask=padding), encoder)
    model.linear = nn.Identity()
    weights = {n: p.detach() for n, p in model.named_parameters()}
    expected = torch.stack([functional_call(model.train(), weights, (one,)) for one in x])
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(lambda x: forward_of(model)(weights, x))(x), expected)


class KeepsApart(nn.Module):
    """A module that keeps its weight a second time, outside of its parameters."""

    def __init__(self, how):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6, bias=False), nn.Linear(6, WAYS)
        weight = self.first.weight
        self.kept = {"in a list": [weight], "as a view": [weight.t()[:]], "in its own memory": []}[how]
        if how == "in its own memory":
            self.second = nn.Linear(6, 6, bias=False)
            self.second.weight = nn.Parameter(weight.t())

    def forward(self, x):
        return self.last(F.linear(self.first(x), *(self.kept or [self.second.weight])))


@pytest.mark.parametrize("how", ["in a list", "as a view", "in its own memory"])
def test_a_weight_that_is_kept_twice_is_refused_since_one_of_the_two_would_not_be_learned(how):
    words = "share their memory" if how == "in its own memory" else "uses its parameter first.weight by a reference"
    with pytest.raises(UserError, match=words):
        meta_gradient(*prepared(KeepsApart(how)), tasks_of(FLAT), classification_loss)


def test_random_numbers_of_other_types_are_what_they_are_in_torch():
    """Whole numbers and truth values are drawn with their probability; what would be another draw is refused."""

    def drawn(function):
        model = Applied(function)
        model.linear = nn.Identity()
        with drawing(torch.tensor(5), training=True):
            return forward_of(model)({}, torch.zeros(4000)).double()

    for kind in (torch.long, torch.bool, torch.float32):
        mean = drawn(lambda x, kind=kind: x.to(kind).bernoulli(0.3))
        assert mean.mean().item() == pytest.approx(0.3, abs=0.03)
    assert drawn(lambda x: torch.rand(()) + 0 * x).unique().numel() == 1
    for words, function in {
        "from a generator": lambda x: torch.rand(3, generator=generator()),
        "not torch.complex64": lambda x: torch.randn(3, dtype=torch.complex64),
    }.items():
        with pytest.raises(UserError, match=words):
            drawn(function)


class Selected(HalfFrozen):
    """Its first parameter is frozen and of whole numbers."""

    def __init__(self, spec, **of_another_model):
        super().__init__(spec)
        self.trunk = nn.ParameterList([nn.Parameter(torch.tensor([0]), requires_grad=False)])
        self.head = nn.Linear(1, 1)

    def forward(self, x):
        return self.head(x[:, self.trunk[0]])


def test_a_number_next_to_the_weights_is_no_whole_number():
    torch.set_default_dtype(torch.float32)
    model = f"{Selected.__module__}.Selected"
    experiment = experiment_of("algo=scratch", "task=sinusoid", f"model._target_={model}", "algo.step_sizes=[0.01]")
    step_size = experiment.initial_thetas()[0]["carried"]["step_size"]
    assert step_size.item() == pytest.approx(0.01)


def test_instance_normalisation_of_single_values_is_refused():
    model = nn.Sequential(nn.Unflatten(1, (6, 1)), nn.InstanceNorm1d(6), nn.Flatten(), nn.Linear(6, WAYS))
    with pytest.raises(UserError, match="one value per channel and example"):
        meta_gradient(*prepared(model), tasks_of(FLAT), classification_loss)


class Complex(nn.Module):
    """All of its numbers are complex."""

    def __init__(self, spec, **of_another_model):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(torch.complex64) @ self.weight).real


class Two(HalfFrozen):
    """It returns its features too."""

    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(("model", "words"), [(Complex, "must be real numbers"), (Two, "gives a tuple where one tens")])
def test_a_model_of_other_numbers_or_results_is_refused(model, words, tmp_path):
    torch.set_default_dtype(torch.float32)
    experiment = experiment_of("algo=maml", "task=sinusoid", f"model._target_={model.__module__}.{model.__name__}")
    with pytest.raises(UserError, match=words):
        meta_train(experiment, tmp_path, resume=False)


class Tied(nn.Module):
    """A head whose weight is also that of the body."""

    def __init__(self, head_first):
        super().__init__()
        parts = {"trunk": nn.Linear(6, 6), "head": nn.Linear(6, 6)}
        parts["head"].weight = parts["trunk"].weight
        for name in sorted(parts, reverse=not head_first):
            self.add_module(name, parts[name])

    def forward(self, x):
        return self.head(self.trunk(x))


@pytest.mark.parametrize("head_first", [True, False])
def test_a_head_that_is_tied_to_the_body_is_refused_by_what_adapts_one_of_them(head_first):
    with pytest.raises(ValueError, match=r"they share trunk\.weight"):
        anil(Tied(head_first))
    aliased = Model(FLAT, nn.ReLU())
    aliased.also = nn.Sequential(aliased.head)
    anil(aliased)
