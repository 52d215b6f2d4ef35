"""Imports go one way, so that an algorithm knows neither the kind of task nor where its settings come from."""

import ast
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
