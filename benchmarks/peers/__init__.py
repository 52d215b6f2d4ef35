"""Whole scripts, from the shell to a printed score, that do the work of a command of metarun.

Each trains MAML on the sinusoid, selects on validation tasks, tests, and prints the score. ``benchmarks.commands`` runs
them. All read the work from the same arguments (``Work``).
"""

import argparse
from dataclasses import dataclass, replace

from benchmarks.problems import PROBLEMS, Problem


@dataclass(frozen=True)
class Work:
    """What ``metarun algo=maml task=sinusoid`` does; the sizes that a benchmark varies are arguments."""

    steps: int = 5000
    eval_every: int = 500
    val_episodes: int = 200
    episodes: int = 600
    adapt_steps: int = 10
    queries: int = 100

    @property
    def training(self) -> Problem:
        """The tasks of a meta-step."""
        return PROBLEMS["sinusoid_5"]

    def testing(self, count: int) -> Problem:
        """``count`` tasks of validation or test."""
        return replace(self.training, tasks=count, queries=self.queries)


def work_of_arguments() -> Work:
    """Return the work that the command line names."""
    parser = argparse.ArgumentParser()
    for name, default in vars(Work()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    return Work(**vars(parser.parse_args()))
