"""How the time of a meta-step scales: ``python -m benchmarks.scaling [CASE ...]``.

- ``replicas``: 1 to 64 seeds in one process, against one, sinusoid;
- ``meta_batch``: 1 to 1,024 tasks, sinusoid;
- ``navigation``: policy gradients through rollouts;
- ``adaptation``: ten steps on 600 test tasks at once, next to a loop over tasks;
- ``start_up``: seconds of commands started from the shell, and of a whole run of one step.

Times are medians over rounds in which all sizes take turns. Writes a CSV and a figure into ``--out``.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.func import functional_call

from benchmarks.meta_step import versions
from benchmarks.own import experiment_of
from metarun.engine.batch import evaluate
from metarun.engine.choose import Counted
from metarun.engine.meta_step import MetaStep
from metarun.engine.process import keep_freed_memory
from metarun.engine.recording import Recording
from metarun.evaluation import episodes
from metarun.loop import rates_of, training_tasks
from metarun.nn.functional import parameters_of
from metarun.system.files import atomic_write
from metarun.tree import tree_map

Row = dict[str, Any]


def steps_of(engines: list[str], *overrides: str) -> tuple[dict[str, Callable[[], object]], float]:
    """Return a meta-step of ``metarun OVERRIDES`` on each engine, without sampling, and its number of operations."""
    experiment = experiment_of(*overrides, "train.steps=10")
    meta_step = MetaStep(experiment)
    seeds = [one.config.seed for one in experiment.replicas]
    tasks = training_tasks(experiment, seeds, experiment.config.train.meta_batch, 0)
    given = {"train_state": meta_step.initial_train_state(), "tasks": tasks, "rates": rates_of(experiment)[0]}
    with Counted() as counted:
        meta_step.whole(given)
    found: dict[str, Callable[[], object]] = {}
    recording = None if engines == ["eager"] else Recording(meta_step.whole, given)
    for name in engines:
        if name == "eager" or recording is None:
            found[name] = partial(meta_step.whole, given)
        else:
            found[name] = partial(recording if name == "replay" else recording.compiled(given), given)
    return found, counted.work


def timed(cases: dict[tuple[str, int], Callable[[], object]], rounds: int) -> dict[tuple[str, int], float]:
    """Return the median milliseconds of each case, in interleaved rounds of about a twentieth of a second each."""
    counts: dict[tuple[str, int], int] = {}
    for key, run in cases.items():
        run()
        began = time.perf_counter()
        run()
        counts[key] = max(int(0.05 / (time.perf_counter() - began)), 1)
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in cases}
    for _ in range(rounds):
        for key, run in cases.items():
            began = time.perf_counter()
            for _ in range(counts[key]):
                run()
            taken[key].append(1000 * (time.perf_counter() - began) / counts[key])
    return {key: statistics.median(values) for key, values in taken.items()}


def growing(case: str, key: str, sizes: list[int], engines: list[str], rounds: int, *overrides: str) -> list[Row]:
    """Return the rows of a case in which one key grows."""
    cases: dict[tuple[str, int], Callable[[], object]] = {}
    work: dict[int, float] = {}
    for size in sizes:
        found, work[size] = steps_of(engines, *overrides, f"{key}={size}")
        cases |= {(name, size): run for name, run in found.items()}
    return [
        {
            "case": case,
            "size": size,
            "engine": name,
            "milliseconds": ms,
            "gigaflops": work[size] / ms / 1e6,
        }
        for (name, size), ms in timed(cases, rounds).items()
    ]


def replicas(rounds: int) -> list[Row]:
    """Measure seeds that are trained together."""
    sizes, engines = [1, 4, 16, 64], ["eager", "replay", "compile"]
    return growing("replicas", "replicas.count", sizes, engines, rounds, "algo.inner_steps=1")


def meta_batch(rounds: int) -> list[Row]:
    """Measure a growing number of tasks per meta-step."""
    sizes, engines = [1, 4, 16, 64, 256, 1024], ["eager", "replay", "compile"]
    return growing("meta_batch", "train.meta_batch", sizes, engines, rounds, "algo.inner_steps=1")


def navigation(rounds: int) -> list[Row]:
    """Measure second-order policy gradients: 20 episodes of 100 steps before and after each of two steps."""
    return growing("navigation", "train.meta_batch", [5, 20], ["eager"], min(rounds, 5), "task=navigation")


def adaptation(rounds: int) -> list[Row]:
    """Measure ten steps on every test task; metarun scores after each step, the loop only after the last."""
    experiment = experiment_of("algo=maml", "task=sinusoid")
    model, algorithm, loss = experiment.model, experiment.algorithm, experiment.loss
    theta = experiment.initial_thetas()[0]
    blocks = list(episodes(experiment, "test", 600))
    together = tree_map(lambda *leaves: torch.cat(leaves), *blocks)

    def ours() -> object:
        return evaluate(algorithm, theta, together, loss, 10)

    def loop() -> object:
        scores = []
        for i in range(600):
            fast = {name: w.requires_grad_() for name, w in parameters_of(model).items()}
            for _ in range(10):
                loss = (functional_call(model, fast, (together.support["x"][i],)) - together.support["y"][i]).square()
                grads = torch.autograd.grad(loss.mean(), list(fast.values()))
                fast = {
                    n: (w - 0.01 * g).detach().requires_grad_() for (n, w), g in zip(fast.items(), grads, strict=True)
                }
            with torch.no_grad():
                scores.append(
                    (functional_call(model, fast, (together.query["x"][i],)) - together.query["y"][i]).square()
                )
        return scores

    cases: dict[tuple[str, int], Callable[[], object]] = {("metarun", 600): ours, ("loop over tasks", 600): loop}
    return [
        {"case": "adaptation", "size": size, "engine": name, "milliseconds": ms}
        for (name, size), ms in timed(cases, min(rounds, 5)).items()
    ]


def start_up(rounds: int) -> list[Row]:
    """Whole commands."""
    commands = {
        "help": ["--help"],
        "config error": ["train.stepz=3"],
        "one step": ["algo=maml", "task=sinusoid", "train.steps=1"],
    }
    rows = []
    for name, arguments in commands.items():
        taken = []
        for _ in range(min(rounds, 5)):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", "metarun", *arguments], check=False, capture_output=True)
            taken.append(1000 * (time.perf_counter() - began))
        rows.append({"case": "start_up", "size": 1, "engine": name, "milliseconds": statistics.median(taken)})
    return rows


CASES = {f.__name__: f for f in (replicas, meta_batch, navigation, adaptation, start_up)}


def picture(path: Path, rows: list[Row]) -> None:
    """Plot time against size, with one line per engine, for the cases that grow."""
    from matplotlib.figure import Figure

    cases = [case for case in ("replicas", "meta_batch") if any(row["case"] == case for row in rows)]
    if not cases:
        return
    figure = Figure(figsize=(4.6 * len(cases), 3.6), layout="constrained")
    for axis, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        for name, colour in {"eager": "#999999", "replay": "#0072B2", "compile": "#D55E00"}.items():
            points = [(r["size"], r["milliseconds"]) for r in rows if r["case"] == case and r["engine"] == name]
            axis.plot(*zip(*points, strict=True), label=name, color=colour, marker="o", markersize=4)
        axis.set(xscale="log", yscale="log", xlabel=case.replace("_", " "), ylabel="milliseconds per meta-step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/scaling"))
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"there is no case {unknown.pop()}; choose among {', '.join(CASES)}")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    print(f"{versions()}, {arguments.threads} threads\n", flush=True)
    rows = []
    for name in arguments.cases or list(CASES):
        found = CASES[name](arguments.rounds)
        rows += found
        print(f"{name}")
        for row in found:
            first = next(r["milliseconds"] for r in found if r["engine"] == row["engine"])
            rate = f"{row['gigaflops']:7.1f} GFLOP/s" if "gigaflops" in row else ""
            print(
                f"  {row['size']:>5} {row['engine']:<16} {row['milliseconds']:10.3f} ms   "
                f"{row['milliseconds'] / first:6.2f} × the smallest {rate}",
                flush=True,
            )
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "scaling.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ("case", "size", "engine", "milliseconds", "gigaflops"), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    picture(arguments.out / "scaling.png", rows)
    print(f"\nfiles: {arguments.out}")


if __name__ == "__main__":
    main()
