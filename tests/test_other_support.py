"""The control of a family: the score on a task's queries after adapting to another task's support set."""

import torch
from conftest import composed
from omegaconf import OmegaConf

from metarun.assemble import assemble
from metarun.evaluation import episodes, evaluate, metrics_of
from metarun.targets.metric import Metric
from metarun.tasks.sinusoid import Sinusoid

ELSEWHERE = Metric("mse elsewhere", higher_is_better=False)


class Controlled(Sinusoid):
    """Sine waves whose test tasks also carry the support set of the next one."""

    def __init__(self, device="cpu"):
        super().__init__(device=device)
        self.control = ELSEWHERE

    def sample(self, split, count, generator):
        tasks = super().sample(split, count, generator)
        other = {name: leaf.roll(-1, 0) for name, leaf in tasks.support.items()}
        return tasks if split != "test" else tasks._replace(query={**tasks.query, "control": other})


def test_the_control_is_the_score_after_adapting_to_another_support_set():
    config, names = composed("algo=maml", "task=sinusoid", "eval.adapt_steps=2", "algo.inner_lr=0.05")
    config.task = OmegaConf.create({"_target_": "test_other_support.Controlled"})
    experiment = assemble(config, names)
    replica, (theta,) = experiment.replicas[0], experiment.initial_thetas()
    tasks = next(episodes(experiment, "test", 5))
    found = evaluate(experiment, replica, theta, [tasks], testing=True)
    assert [metric.name for metric in metrics_of(experiment)] == ["mse", ELSEWHERE.name]
    for i in range(5):
        weights = {name: w.clone().requires_grad_() for name, w in theta["weights"].items()}
        own = {name: leaf[i] for name, leaf in tasks.query["control"].items()}
        for step in range(3):

            def error(data, weights=weights):
                return (torch.func.functional_call(experiment.model, weights, data["x"]) - data["y"]).square().mean()

            query = {name: tasks.query[name][i] for name in ("x", "y")}
            torch.testing.assert_close(
                found.scores[ELSEWHERE.name][i, step], error(query).detach(), rtol=1e-4, atol=1e-5
            )
            slope = torch.autograd.grad(error(own), list(weights.values()))
            weights = {
                name: (w - 0.05 * g).detach().requires_grad_()
                for (name, w), g in zip(weights.items(), slope, strict=True)
            }
    assert not torch.allclose(found.scores[ELSEWHERE.name][:, 2], found.scores["mse"][:, 2])
