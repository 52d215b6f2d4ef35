"""``transductive`` is what is seen to happen, not what a type suggests."""

import pytest
import torch
from conftest import composed, experiment_of
from omegaconf import OmegaConf

from metarun.assemble import assemble
from metarun.checks.transduction import is_transductive
from metarun.evaluation import episodes

IMAGES = ("task=omniglot", "task.dataset=procedural", "task.image_size=16", "eval.episodes=2")
SMALL = ("model=conv4", "model.filters=4")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("algo=protonet", *IMAGES, *SMALL), True),
        (("algo=protonet", *IMAGES, *SMALL, "model.norm=group"), False),
        (("algo=protonet", *IMAGES, "model=mlp"), False),
        (("algo=centroid", *IMAGES, *SMALL), False),
        (("algo=relation", *IMAGES, "model=mlp"), False),
        (("algo=relation", *IMAGES, *SMALL, "model.norm=group", "model.readout=flatten"), True),
        (("algo=maml", *IMAGES, *SMALL), True),
        (("algo=maml", *IMAGES, "model=mlp"), False),
        (("algo=transfer", *IMAGES, "model=mlp"), False),
        (("algo=mamlpp", *IMAGES, *SMALL), True),
        (("algo=mamlpp", *IMAGES, *SMALL, "algo.batch_norm=per_step_running"), False),
        (("algo=snail", *IMAGES, "model=mlp"), False),
        (("algo=maml", "task=sinusoid", "eval.episodes=2"), False),
        (("algo=anp", "task=sinusoid", "eval.episodes=2"), False),
        (("algo=maml", "task=bandit", "task.pulls=4", "eval.episodes=2"), False),
    ],
    ids=lambda value: " ".join(value[:1] + value[4:]) if isinstance(value, tuple) else None,
)
def test_queries_that_see_each_other_are_found_out(overrides, expected):
    experiment = experiment_of(*overrides)
    replica, theta = experiment.replicas[0], experiment.initial_thetas()[0]
    block = next(episodes(experiment, "test", 2))
    assert is_transductive(replica.algorithm, theta, experiment.family, block, 1) is expected


class CentresQueries(torch.nn.Module):
    """No batch statistics of metarun's, and yet every answer depends on the mean of all inputs."""

    def __init__(self, spec):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x):
        return self.layer(x - x.mean(0))


def test_a_model_of_ones_own_needs_no_attribute_to_be_found_out():
    config, names = composed("eval.episodes=2")
    config.model = OmegaConf.create({"_target_": "test_transduction.CentresQueries"})
    experiment = assemble(config, names)
    block = next(episodes(experiment, "test", 2))
    first = experiment.replicas[0].algorithm, experiment.initial_thetas()[0], experiment.family
    assert is_transductive(*first, block, 1)
    assert not is_transductive(*first, block._replace(query={k: v[:, :1] for k, v in block.query.items()}), 1)
