"""Environment steps per second of policy rollouts: ``python -m benchmarks.environment_steps``.

Navigation with the paper's policy (ReLU 100-100, https://arxiv.org/abs/1703.03400), horizon 100, 20 episodes per
task, with every episode run to its horizon; then bandits and tables with a recurrent policy. Cases have one policy for
all tasks, as before adaptation, or one policy per task, as after it. Figures are medians over interleaved rounds.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from metarun.contracts import Tree, Weights
from metarun.engine.process import keep_freed_memory
from metarun.models.policy import GRUPolicy, Policy
from metarun.nn.functional import parameters_of
from metarun.tasks import control
from metarun.tasks.bandit import Bandit
from metarun.tasks.mdp import MDP
from metarun.tasks.navigation import Navigation


def shared(family: Navigation | Bandit | MDP, model: nn.Module, tasks: Tree) -> Callable[[], Tensor]:
    """Return a function that rolls out all tasks under one policy."""
    weights = parameters_of(model)

    def one_task(data: Tree) -> Tensor:
        return control.rollout(family.environment, lambda x: functional_call(model, weights, (x,)), data).reward

    return partial(vmap(one_task), tasks)


def adapted(family: Navigation | Bandit | MDP, model: nn.Module, tasks: Tree) -> Callable[[], Tensor]:
    """Return a function that rolls out each task under its own policy."""
    count = len(tasks["noise"])
    weights = {name: w.expand(count, *w.shape).contiguous() for name, w in parameters_of(model).items()}

    def one_task(own: Weights, data: Tree) -> Tensor:
        return control.rollout(family.environment, lambda x: functional_call(model, own, (x,)), data).reward

    return partial(vmap(one_task), weights, tasks)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.environment_steps", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    navigation, bandit, mdp = Navigation(), Bandit(pulls=100), MDP()
    policy = Policy(navigation.spec)
    cases: dict[str, tuple[Callable[[], Tensor], int]] = {}
    for count in (20, 200, 1000):
        tasks = navigation.sample("test", count, torch.Generator().manual_seed(0)).query
        steps = tasks["noise"].shape[:3].numel()
        cases[f"navigation, {count} tasks, one policy"] = shared(navigation, policy, tasks), steps
        cases[f"navigation, {count} tasks, one policy per task"] = adapted(navigation, policy, tasks), steps
    for family in (bandit, mdp):
        tasks = family.sample("test", 200, torch.Generator().manual_seed(0)).query
        name = f"{family.dataset.partition(':')[0]}, 200 tasks, GRU 64"
        cases[name] = shared(family, GRUPolicy(family.spec), tasks), tasks["noise"].shape[:3].numel()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(arguments.rounds + 1):
        for name, (run, _) in cases.items():
            began = time.perf_counter()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    print(f"torch {torch.__version__}, {arguments.threads} threads, million environment steps per second")
    for name, (_, steps) in cases.items():
        print(f"  {name:<42} {steps / statistics.median(seconds[name]) / 1e6:6.2f}")


if __name__ == "__main__":
    main()
