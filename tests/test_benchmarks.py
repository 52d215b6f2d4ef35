"""What the benchmarks compare is the same problem."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.commands import Contestant, measured, table
from benchmarks.own import Own
from benchmarks.pages import put, with_others
from benchmarks.peers import Work
from benchmarks.peers.torch_sinusoid import drawn, score
from benchmarks.problems import PROBLEMS
from benchmarks.scaling import exponent
from benchmarks.torch_peers import plain_torch
from metarun.contracts import Task
from metarun.engine.batch import evaluate


@pytest.fixture(autouse=True)
def as_it_was():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", PROBLEMS)
def test_metarun_and_plain_torch_have_the_same_meta_gradient(name):
    whole = PROBLEMS[name]
    problem = replace(whole, tasks=min(whole.tasks, 2), ways=min(whole.ways, 10), queries=3)
    expected = plain_torch(problem, "cpu").gradient()
    for engine in ("eager", "replay"):
        assert np.linalg.norm(Own(problem, "cpu", engine).gradient() - expected) < 1e-3 * np.linalg.norm(expected)


def test_a_script_scores_what_metarun_scores():
    """The tasks of a test, adapted from the same weights, have the same loss before and after each step."""
    work = Work(episodes=4, adapt_steps=3, queries=7)
    batch = drawn(work.testing(4), 3)
    own = Own(work.training, "cpu", "eager")
    theta = own.meta_step.layout.theta({**own.state, "weights": own.state["weights"][0]})
    tasks = Task({"x": batch["sx"], "y": batch["sy"]}, {"x": batch["qx"], "y": batch["qy"]})
    expected = evaluate(own.experiment.algorithm, theta, tasks, own.experiment.loss, 3).losses.mean(0)
    found = score(plain_torch(work.training, "cpu").model, work.training, batch, 3)
    torch.testing.assert_close(found, expected)


def test_commands_are_compared_by_medians_with_the_first_of_the_same_caches():
    def row(name, caches, wall, **further):
        return {"contestant": name, "caches": caches, "wall_seconds": wall, "cpu_seconds": 1.0, "score": 0.5, **further}

    rows = [row("a", "cold", wall) for wall in (9.0, 2.0, 4.0)] + [row("b", "cold", 8.0), row("a", "warm", 1.0)]
    lines = table([*rows, {"contestant": "b", "caches": "warm", "note": "it failed"}]).splitlines()[2:]
    assert lines == [
        "| a | cold | 4 | 1.00 | 1 | 0.5 |",
        "| b | cold | 8 | 2.00 | 1 | 0.5 |",
        "| a | warm | 1 | 1.00 | 1 | 0.5 |",
        "| b | warm | – | – | – | it failed |",
    ]


def test_the_cost_of_a_command_is_that_of_all_its_processes(tmp_path):
    spin = "import time; began = time.process_time()\nwhile time.process_time() < began + 0.2: pass"
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}]); print('score 1.5')"
    found = measured(Contestant("two", [[sys.executable, "-c", inner]] * 2), tmp_path)
    assert found["score"] == 1.5
    assert found["cpu_seconds"] >= 0.4
    with pytest.raises(RuntimeError, match="it went wrong"):
        measured(Contestant("bad", [[sys.executable, "-c", "import sys; sys.exit('it went wrong')"]]), tmp_path)


def test_a_page_has_what_was_measured_in_parts(tmp_path):
    path, page, columns = tmp_path / "a.csv", tmp_path / "page.md", ("case", "size", "milliseconds", "note")
    page.write_text("before\n<!-- a -->\nold\n<!-- end of a -->\nafter\n")
    with_others(path, columns, ["x"], [{"case": "x", "size": 1, "milliseconds": 2.5}])
    with_others(path, columns, ["y"], [{"case": "y", "size": 2, "milliseconds": 1.0, "note": "slow"}])
    rows = with_others(path, columns, ["x"], [{"case": "x", "size": 3, "milliseconds": 0.5}])
    assert [(row["case"], row["size"], row["milliseconds"]) for row in rows] == [("y", 2, 1.0), ("x", 3, 0.5)]
    for text in ("new", "newer"):
        put(page, {"a": text})
    assert page.read_text() == "before\n<!-- a -->\nnewer\n<!-- end of a -->\nafter\n"
    with pytest.raises(ValueError, match="no place for b"):
        put(page, {"b": "text"})


def test_the_exponent_is_that_of_a_power():
    assert exponent([(1, 50.0), (10, 50.0), *((size, 3e-3 * size**1.7) for size in (100, 300, 1000))]) == pytest.approx(
        1.7
    )
