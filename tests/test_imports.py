"""Imports go one way, so that an algorithm knows neither the kind of task nor where its settings come from."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "metarun"
FORBIDDEN = {
    "algos": ("hydra", "omegaconf", "metarun.tasks", "metarun.models", "metarun.engine", "metarun.loop"),
    "tasks": ("hydra", "omegaconf", "metarun.algos", "metarun.models", "metarun.engine", "metarun.loop"),
    "models": ("hydra", "omegaconf", "metarun.algos", "metarun.tasks", "metarun.engine", "metarun.loop"),
}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_go_one_way(folder):
    paths = sorted((PACKAGE / folder).rglob("*.py"))
    assert paths
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong = [name for name in names if name.startswith(FORBIDDEN[folder])]
            assert not wrong, f"{path} imports {wrong[0]}"


FIRST_STEP = """
import sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # as on Windows, an import fails
from metarun.config import register_schema
from benchmarks.own import experiment_of
from metarun.engine.choose import Stepper
from metarun.engine.meta_step import MetaStep
from metarun.assemble import sample_tasks
from metarun.random import stream
from metarun.tree import tree_map
import torch
experiment = experiment_of("algo=maml", "task=sinusoid", "train.steps=1", "device=cpu")
meta_step = MetaStep(experiment)
tasks = tree_map(lambda leaf: leaf[None], sample_tasks(experiment, "train", 4, stream(0, "train")))
given = {"train_state": meta_step.initial_train_state(), "tasks": tasks, "rates": {"lr": torch.ones(1)}}
Stepper(experiment, meta_step)(given)
import metarun.run  # pictures are drawn by another process
heavy = {"torch._dynamo", "torch._inductor", "pandas", "scipy", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
assert torch._dynamo.config.cache_size_limit > 0
assert torch._dynamo is sys.modules["torch._dynamo"]
assert torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2)).sum() == 2
"""


def test_the_first_step_comes_without_the_compiler():
    """Torch's compiler takes longer to import than torch, and is there as soon as anything asks for it.

    Nor does the step need a module that only Unix has.
    """
    environment = {**os.environ, "USER": "somebody"}  # for whom Python would otherwise look in pwd
    done = subprocess.run(
        [sys.executable, "-c", FIRST_STEP], cwd=PACKAGE.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
