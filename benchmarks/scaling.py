"""How the time of a meta-step scales: ``python -m benchmarks.scaling [CASE ...]``.

- ``meta_batch``: 1 to 1,024 tasks, sinusoid;
- ``replicas``: 1 to 64 seeds in one process, sinusoid;
- ``inner_steps``: 1 to 32, second order, sinusoid;
- ``ways``: 5 to 100 classes, prototypical networks on images of 16×16;
- ``widths``: 40 to 640 units per layer, sinusoid;
- ``examples``: data sets of 1,000 to 1,000,000 vectors: reading one, and drawing tasks from it;
- ``navigation``: policy gradients through rollouts;
- ``adaptation``: ten steps on 600 test tasks at once, next to a loop over tasks.

Times are medians over rounds in which all sizes take turns. An exponent is the slope of log time over log size at the
three largest sizes. Writes a CSV, a table and a figure into ``--out``, and the last two into a page of the
documentation if asked; cases that are not measured again stay as they are.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.func import functional_call

from benchmarks.meta_step import readable, versions
from benchmarks.own import experiment_of
from benchmarks.pages import put, with_others
from metarun.assemble import training_tasks
from metarun.engine.batch import evaluate
from metarun.engine.choose import Counted
from metarun.engine.meta_step import MetaStep
from metarun.engine.process import keep_freed_memory
from metarun.engine.recording import Recording
from metarun.evaluation import episodes
from metarun.loop import rates_of
from metarun.nn.functional import parameters_of
from metarun.system.files import write_text
from metarun.tasks.features import Features
from metarun.tree import tree_map

Row = dict[str, Any]
COLUMNS = ("case", "size", "engine", "milliseconds", "gigaflops")


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
            made = recording.replayed(given) if name == "replay" else recording.compiled(given)
            found[name] = partial(made, given)
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


@dataclass(frozen=True)
class Growth:
    """A size that grows while all else stays."""

    title: str
    keys: tuple[str, ...]
    """The keys that are set to each size."""
    sizes: tuple[int, ...]
    engines: tuple[str, ...]
    others: tuple[str, ...]
    """Further overrides."""


ONE_STEP = ("algo=maml", "task=sinusoid", "algo.inner_steps=1")
IMAGES = ("task=omniglot", "task.dataset=procedural", "task.image_size=16", "model.filters=16", "train.meta_batch=1")
GROWTHS = {
    "meta_batch": Growth(
        "tasks per meta-step",
        ("train.meta_batch",),
        (1, 4, 16, 64, 256, 1024),
        ("eager", "replay", "compile"),
        ONE_STEP,
    ),
    "replicas": Growth("replicas", ("replicas.count",), (1, 4, 16, 64), ("eager", "replay", "compile"), ONE_STEP),
    "inner_steps": Growth(
        "inner steps", ("algo.inner_steps",), (1, 2, 4, 8, 16, 32), ("eager", "replay"), ("algo=maml", "task=sinusoid")
    ),
    "ways": Growth(
        "classes per task",
        ("task.ways", "task.train_ways"),
        (5, 10, 20, 50, 100),
        ("eager", "replay"),
        ("algo=protonet", *IMAGES),
    ),
    "widths": Growth(
        "units per layer", ("model.widths",), (40, 80, 160, 320, 640), ("eager", "replay", "compile"), ONE_STEP
    ),
}
"""MAML with one inner step on the sinusoid and, for classes, prototypical networks on images of 16×16."""


def grown(name: str, rounds: int) -> list[Row]:
    """Measure meta-steps of growing size."""
    growth = GROWTHS[name]
    cases: dict[tuple[str, int], Callable[[], object]] = {}
    work: dict[int, float] = {}
    for size in growth.sizes:
        value = f"[{size},{size}]" if name == "widths" else str(size)
        found, work[size] = steps_of([*growth.engines], *growth.others, *(f"{key}={value}" for key in growth.keys))
        cases |= {(engine, size): run for engine, run in found.items()}
    return [
        {"case": name, "size": size, "engine": engine, "milliseconds": ms, "gigaflops": work[size] / ms / 1e6}
        for (engine, size), ms in timed(cases, rounds).items()
    ]


def examples(rounds: int) -> list[Row]:
    """Measure a data set of vectors that grows: reading it, and drawing a batch of tasks from it."""
    sizes, cases, rows = (1_000, 10_000, 100_000, 1_000_000), dict[tuple[str, int], Callable[[], object]](), list[Row]()
    for size in sizes:
        rng = np.random.default_rng(0)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vectors.npz"
            label = np.arange(size) % 100
            np.savez(path, x=rng.standard_normal((size, 16), dtype=np.float32) + label[:, None] % 7, y=label)
            taken = []
            for _ in range(min(rounds, 3)):
                began = time.perf_counter()
                family = Features(str(path), queries=5)
                taken.append(1000 * (time.perf_counter() - began))
        rows.append({"case": "examples", "size": size, "engine": "reading", "milliseconds": statistics.median(taken)})
        cases["drawing 25 tasks", size] = partial(family.sample, "train", 25, torch.Generator().manual_seed(0))
    timings = timed(cases, rounds)
    return rows + [
        {"case": "examples", "size": size, "engine": name, "milliseconds": ms} for (name, size), ms in timings.items()
    ]


def navigation(rounds: int) -> list[Row]:
    """Measure second-order policy gradients: 20 episodes of 100 steps before and after each of two steps."""
    runs: dict[tuple[str, int], Callable[[], object]] = {}
    for size in (5, 20):
        runs["eager", size] = steps_of(["eager"], "task=navigation", f"train.meta_batch={size}")[0]["eager"]
    return [
        {"case": "navigation", "size": size, "engine": name, "milliseconds": ms}
        for (name, size), ms in timed(runs, min(rounds, 5)).items()
    ]


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


CASES: dict[str, Callable[[int], list[Row]]] = {
    **{name: partial(grown, name) for name in GROWTHS},
    **{f.__name__: f for f in (examples, navigation, adaptation)},
}
TITLES = {**{name: growth.title for name, growth in GROWTHS.items()}, "examples": "examples in the data set"}
"""What grows in the cases that have a line in the table and a panel in the picture."""


def lines_of(rows: Sequence[Row], case: str) -> dict[str, list[tuple[int, float]]]:
    """Return the sizes and milliseconds of each engine."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["case"] == case:
            found.setdefault(row["engine"], []).append((row["size"], row["milliseconds"]))
    return {engine: sorted(points) for engine, points in found.items()}


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """Return b of the line of least squares through ``log milliseconds = a + b log size``, at the last three sizes."""
    x, y = np.log(np.array(points[-3:], dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])


def table(rows: Sequence[Row]) -> str:
    """Return the table of all that grows: milliseconds at each size, and the exponent at the large end."""
    texts = []
    for case, title in TITLES.items():
        lines = lines_of(rows, case)
        if not lines:
            continue
        sizes = [size for size, _ in next(iter(lines.values()))]
        texts += [f"| {title} | " + " | ".join(f"{size:,}" for size in sizes) + " | exponent |"]
        texts += ["|---" * (len(sizes) + 2) + "|"]
        for engine, points in lines.items():
            cells = [readable(ms) for _, ms in points]
            texts.append(f"| {engine} | " + " | ".join(cells) + f" | {exponent(points):.2f} |")
        texts.append("")
    return "\n".join(texts).strip()


def picture(path: Path, rows: Sequence[Row]) -> None:
    """Plot time against size, a panel for each case that grows, with a line per engine."""
    from metarun.results.plots import blank_figure, readable_log, save_figure

    cases = [case for case in TITLES if lines_of(rows, case)]
    if not cases:
        return
    columns = min(len(cases), 3)
    figure = blank_figure(3.6 * columns, 3.2 * -(-len(cases) // columns))
    axes = figure.subplots(-(-len(cases) // columns), columns, squeeze=False).flatten()
    colours = {"eager": "#999999", "replay": "#0072B2", "compile": "#D55E00", "reading": "#009E73"}
    for axis, case in zip(axes, cases, strict=False):
        for engine, points in lines_of(rows, case).items():
            label, colour = f"{engine} ({exponent(points):.2f})", colours.get(engine, "#CC79A7")
            axis.plot(*zip(*points, strict=True), label=label, color=colour, marker="o", markersize=4)
        every = [point for points in lines_of(rows, case).values() for point in points]
        for which, values in zip((axis.xaxis, axis.yaxis), zip(*every, strict=True), strict=True):
            readable_log(which, min(values), max(values))
        axis.set(xlabel=TITLES[case], ylabel="milliseconds")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    for axis in axes[len(cases) :]:
        axis.set_axis_off()
    save_figure(figure, path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/scaling"))
    parser.add_argument("--page", type=Path, help="page with a place for the table (docs/performance.md)")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"there is no case {unknown.pop()}; choose among {', '.join(CASES)}")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    print(f"{versions()}, {arguments.threads} threads\n", flush=True)
    for name in arguments.cases or list(CASES):
        found = CASES[name](arguments.rounds)
        # After each case, so that cases can be measured at different times.
        rows = with_others(arguments.out / "scaling.csv", COLUMNS, [name], found)
        write_text(arguments.out / "scaling.md", table(rows) + "\n")
        picture(arguments.out / "scaling.png", rows)
        print(f"{name}")
        for row in found:
            first = next(r["milliseconds"] for r in found if r["engine"] == row["engine"])
            rate = f"{row['gigaflops']:7.1f} GFLOP/s" if "gigaflops" in row else ""
            print(
                f"  {row['size']:>5} {row['engine']:<16} {row['milliseconds']:10.3f} ms   "
                f"{row['milliseconds'] / first:6.2f} × the smallest {rate}",
                flush=True,
            )
    if arguments.page is not None:
        put(arguments.page, {"scaling": table(rows)})
        picture(arguments.page.parent / "scaling.png", rows)
    print(f"\nfiles: {arguments.out}/scaling.csv, scaling.md, scaling.png")


if __name__ == "__main__":
    main()
