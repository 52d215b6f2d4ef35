"""Targets of one's own: rows that are not examples, and losses without any rows."""

from dataclasses import dataclass, replace

import pandas as pd
import pytest
import torch
from conftest import composed
from omegaconf import OmegaConf
from scenarios import generator, sampled
from torch import nn
from torch.nn.functional import log_softmax, one_hot

from metarun.algos.agnostic.maml import maml
from metarun.algos.agnostic.protomaml import protomaml
from metarun.algos.baselines.multitask import multitask
from metarun.algos.dependent.incontext import incontext
from metarun.algos.dependent.mann import mann
from metarun.algos.dependent.matching import matching
from metarun.algos.dependent.metaoptnet import metaoptnet
from metarun.algos.dependent.protonet import protonet
from metarun.algos.dependent.relation import relation
from metarun.algos.dependent.shared_params import shared_params
from metarun.algos.dependent.snail import snail
from metarun.contracts import Numbers, Rows, Sizes, Spec, Task
from metarun.engine.batch import meta_gradient
from metarun.run import run
from metarun.targets.metric import Metric
from metarun.targets.real import MSE
from metarun.targets.scoring import loss_of
from metarun.tasks.sinusoid import Sinusoid

WORDS, WIDTH, TAGS = 5, 4, 3
ACCURACY = Metric("word accuracy", higher_is_better=True, percent=True)


@dataclass(frozen=True)
class Tags:
    """A tag for each word: ``y [sentences, words, tags]``, zero where a sentence has ended."""

    outputs: int = TAGS
    metrics: tuple = (ACCURACY,)
    offers: tuple = ("loss", "examples", "rows", "classes")

    def loss(self, output, data):
        return -(data["y"] * log_softmax(output, -1)).sum() / data["y"].sum()

    def scores(self, output, data):
        right = (output.argmax(-1) == data["y"].argmax(-1)) * data["y"].sum(-1)
        return {ACCURACY.name: right.sum() / data["y"].sum()}

    def rows(self, z, data):
        return Rows(z.flatten(0, 1), data["y"].flatten(0, 1), data["y"].sum(-1).flatten())


class Sentences:
    """Words are points around a mean per tag, which differs from task to task; sentences have three to five words."""

    dataset = "sentences"

    def __init__(self, device="cpu"):
        self.spec = Spec(Numbers((WORDS, WIDTH)), Tags(), Sizes(6, 4), (ACCURACY,))

    def sample(self, split, count, generator):
        means = 2 * torch.randn(count, TAGS, WIDTH, generator=generator)
        tag = torch.randint(TAGS, (count, 10, WORDS), generator=generator)
        there = torch.arange(WORDS) < torch.randint(3, WORDS + 1, (count, 10, 1), generator=generator)
        x = means[torch.arange(count)[:, None, None], tag]
        x = (x + 0.3 * torch.randn(x.shape, generator=generator)) * there[..., None]
        y = one_hot(tag, TAGS).to(x.dtype) * there[..., None]
        return Task({"x": x[:, :6], "y": y[:, :6]}, {"x": x[:, 6:], "y": y[:, 6:]})


class Tagger(nn.Module):
    """Features of each word, then a tag."""

    def __init__(self, spec=None):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh())
        self.head = nn.Linear(8, TAGS)

    def forward(self, x):
        return self.head(self.trunk(x))


def as_words(part):
    """The words of each task's sentences as its examples, for a model that looks at words one by one."""
    weight = part["y"].sum(-1).flatten(1)
    return {"x": part["x"].flatten(1, 2), "y": part["y"].flatten(1, 2), "weight": weight}


class Words:
    """The same tasks with words as examples."""

    def __init__(self):
        self.spec = Spec(Numbers((WIDTH,)), WordTags(), Sizes(6 * WORDS, 4 * WORDS), (ACCURACY,))


class WordTags(Tags):
    def rows(self, z, data):
        return Rows(z, data["y"], data["weight"])


LEARNERS = {
    "maml": lambda model, spec: maml(model, 0.1),
    "protonet": protonet,
    "matching": matching,
    "relation": relation,
    "shared_params": shared_params,
    "metaoptnet": metaoptnet,
    # As long as the words of all sentences.
    "snail": lambda model, spec: snail(model, replace(spec, sizes=Sizes(6 * WORDS, 4 * WORDS)), 8),
    "incontext": lambda model, spec: incontext(model, spec, 8, 1, 2),
}


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.usefixtures("float64")
def test_a_learner_reads_the_words_of_sentences_as_rows(name):
    """Equal to the same learner on the same words, one by one."""
    torch.manual_seed(0)
    family, words, model = Sentences(), Words(), Tagger()
    tasks = sampled(family, "train", 2, generator(1))
    found, expected = (
        meta_gradient(learner, learner.init(generator()), batch, loss_of(of))
        for learner, batch, of in (
            (LEARNERS[name](model, family.spec), tasks, family),
            (
                LEARNERS[name](model, words.spec),
                Task(as_words(tasks.support), as_words(tasks.query), tasks.seed),
                words,
            ),
        )
    )
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.grads, expected.grads)
    torch.testing.assert_close(found.scores, expected.scores)


QUICK = (
    *("train.steps=2", "train.eval_every=1", "train.val_episodes=3", "eval.episodes=4", "eval.adapt_steps=1"),
    *("engine=eager", "train.meta_batch=2"),
)


@pytest.mark.parametrize("algo", ["maml", "protonet"])
def test_a_tagger_runs_from_the_command(algo, tmp_path):
    config, names = composed(f"algo={algo}", "task=sinusoid", *QUICK)
    config.task = OmegaConf.create({"_target_": "test_targets.Sentences"})
    config.model = OmegaConf.create({"_target_": "test_targets.Tagger"})
    run(config, names, tmp_path)
    row = pd.read_csv(tmp_path / "result.csv").iloc[0]
    assert row["metric"] == "word accuracy"
    assert 0 <= row["score"] <= 1
    assert not row["transductive"]


@dataclass(frozen=True)
class Rough:
    """An error that knows no rows."""

    outputs: int = 1
    metrics: tuple = (MSE,)
    offers: tuple = ("loss",)

    def loss(self, output, data):
        return (output - data["height"]).abs().mean()

    def scores(self, output, data):
        return {MSE.name: (output - data["height"]).square().mean()}


class Heights(Sinusoid):
    """Sine waves whose targets have another name."""

    def __init__(self, device="cpu"):
        super().__init__(device=device)
        object.__setattr__(self.spec, "target", Rough())

    def sample(self, split, count, generator):
        tasks = super().sample(split, count, generator)
        return Task(*({"x": part["x"], "height": part["y"]} for part in tasks[:2]))


def test_a_target_with_a_loss_alone_runs_to_the_end(tmp_path):
    config, names = composed("algo=maml", "task=sinusoid", *QUICK)
    config.task = OmegaConf.create({"_target_": "test_targets.Heights"})
    run(config, names, tmp_path)
    row = pd.read_csv(tmp_path / "result.csv").iloc[0]
    assert row["status"] == "completed"
    assert row["score"] > 0


def test_algorithms_for_one_target_per_example_refuse_tasks_of_words():
    spec = Sentences().spec
    assert spec.offers("rows")
    assert not spec.offers("targets")
    assert not spec.offers("labels")
    for algorithm in (mann(Tagger(), spec), protomaml(Tagger(), spec), multitask(Tagger())):
        assert not spec.offers(algorithm.needs)
