"""Milliseconds per meta-step, next to other libraries: ``python -m benchmarks.meta_step [PROBLEM ...]``.

Every contestant solves the same problem (same weights, same tasks, outer Adam) in a separate process, pinned to as
many cores as the problem names. First all contestants compute their meta-gradients, which must agree. Then they are
timed in interleaved rounds, one contestant at a time while the others wait. The figures are medians over rounds. A
library that is missing or fails is listed with the reason. Writes a CSV, a table and a figure into ``--out``.

The package of learn2learn, as published, does not install on Python 3.11 or newer. It is measured where its Cython
files are built by hand, and otherwise listed as missing.
"""

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.problems import PROBLEMS, Problem
from benchmarks.worker import CONTESTANTS
from metarun.engine.process import keep_freed_memory
from metarun.system.files import atomic_write

IMAGE_MAML = ("omniglot_maml", "omniglot_fomaml")
ON_CPU = ("metarun replay, threads", "metarun compile, threads")
ON_GPU = ("metarun cudagraph",)
ONLY_FOR = {"metarun replay, threads": IMAGE_MAML, "metarun compile, threads": IMAGE_MAML}
NOT_FOR = {
    "metarun compile": IMAGE_MAML,
    "metarun xla": (*IMAGE_MAML, "protonet"),
    "learn2learn": ("protonet",),
    "higher": ("protonet", "omniglot_fomaml"),
    "TorchOpt": ("protonet", "omniglot_fomaml"),
}
"""Problems to which a contestant is restricted. Convolutions with separate weights per task gain only from compiling in
threads (docs/performance.md)."""


class Absent(Exception):
    """The contestant cannot take part; the text says why."""


@dataclass
class Contestant:
    """A worker process and its measured times."""

    name: str
    process: "subprocess.Popen[str]"
    start_seconds: float = 0.0
    milliseconds: float = float("nan")

    def ask(self, question: str) -> str:
        """Send a line and wait for the answer.

        Raises:
            Absent: the process has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise Absent("its process ended") from error
        return self.answer()

    def answer(self) -> str:
        """Return the next line of the worker."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line or line.startswith("no "):
            raise Absent(line.removeprefix("no ") or "its process ended")
        return line


@contextmanager
def contestant(name: str, problem: Problem, device: str) -> Iterator[Contestant]:
    """Start a worker, and end it afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker", name, problem.name, device],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield Contestant(name, process)
    finally:
        process.kill()
        process.wait()


def agree(ours: Any, other: Any) -> float:
    """Return the relative difference of two meta-gradients."""
    return float(np.linalg.norm(ours - other) / np.linalg.norm(ours))


def measure(problem: Problem, device: str, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Start all contestants, compare gradients, time them in interleaved rounds; return the rows of the table."""
    names = [
        name
        for name in CONTESTANTS
        if name not in (ON_GPU if device == "cpu" else ON_CPU)
        and problem.name not in NOT_FOR.get(name, ())
        and problem.name in ONLY_FOR.get(name, (problem.name,))
    ]
    from contextlib import ExitStack

    rows: list[dict[str, Any]] = []
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        present: list[Contestant] = []
        reference = None
        for name in names:
            one = stack.enter_context(contestant(name, problem, device))
            path = Path(folder) / f"{len(rows)}.npy"
            row: dict[str, Any] = {"problem": problem.name, "contestant": name}
            rows.append(row)
            try:
                row["start_seconds"] = float(one.answer().split()[1])
                one.ask(f"gradient {path}")
                found = np.load(path)
                reference = found if reference is None else reference
                row["gradient_difference"] = agree(reference, found)
                if row["gradient_difference"] > 3e-3:
                    raise Absent(f"its meta-gradient differs by {row['gradient_difference']:.1e}")
                # Only the second of two steps counts, since the first may still compile.
                one.ask("step 1")
                once = float(one.ask("step 1"))
                row["steps"] = max(int(seconds / rounds / max(once, 1e-5)), 1)
                present.append(one)
            except Absent as error:
                row["note"] = str(error)
        by_name = {row["contestant"]: row for row in rows}
        times: dict[str, list[float]] = {one.name: [] for one in present}
        for _ in range(rounds):
            for one in present:
                steps = by_name[one.name]["steps"]
                times[one.name].append(1000 * float(one.ask(f"step {steps}")) / steps)
        for name, values in times.items():
            by_name[name]["milliseconds"] = statistics.median(values)
            by_name[name]["spread"] = max(values) - min(values)
    return rows


def table(problem: Problem, device: str, rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown, fastest first, with ratios to metarun's fastest engine."""
    measured = sorted((r for r in rows if "milliseconds" in r), key=lambda r: float(r["milliseconds"]))
    ours = next((r["milliseconds"] for r in measured if r["contestant"].startswith("metarun")), float("nan"))
    place = f"{problem.cores} core{'s' * (problem.cores > 1)}" if device == "cpu" else "GPU"
    lines = [f"**{problem.title}**, {place}", ""]
    lines += ["| contestant | ms per meta-step | × metarun's fastest | gradient differs by |", "|---|---|---|---|"]
    for row in measured:
        ms, difference = row["milliseconds"], row["gradient_difference"]
        lines.append(f"| {row['contestant']} | {readable(ms)} | {ms / ours:.2f} | {difference:.0e} |")
    lines += [f"| {r['contestant']} | – | – | {r['note']} |" for r in rows if "note" in r]
    if device == "cpu":
        bound = arithmetic_bound(problem)
        lines += ["", f"Arithmetic alone, at the rate that is measured for products of this size: {bound:.3g} ms."]
    return "\n".join(lines)


def arithmetic_bound(problem: Problem) -> float:
    """Return the milliseconds that the products of a step take at the rate of one such product alone."""
    import time

    import torch

    torch.set_num_threads(problem.cores)
    keep_freed_memory()
    if problem.model == "mlp":
        a, b = torch.randn(problem.tasks, 10, 40), torch.randn(problem.tasks, 40, 40)
        operations = 2 * a.numel() * 40

        def work() -> object:
            return torch.bmm(a, b)
    else:
        side = 14 if problem.max_pool else 7
        x, w = torch.randn(300, 64, side, side), torch.randn(64, 64, 3, 3)
        operations = 2 * 9 * 64 * x.numel()

        def work() -> object:
            return torch.conv2d(x, w, padding=1)

    taken = []
    for _ in range(200 if problem.model == "mlp" else 20):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return 1000 * problem.multiplications() * statistics.median(taken) / operations


def readable(milliseconds: float) -> str:
    """Three digits."""
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def picture(path: Path, results: dict[str, list[dict[str, Any]]]) -> None:
    """Plot one panel per problem: bars on a logarithmic axis, with metarun's in colour."""
    from matplotlib.figure import Figure

    from metarun.results.plots import AGNOSTIC

    heights = [1.0 + 0.28 * sum("milliseconds" in r for r in rows) for rows in results.values()]
    figure = Figure(figsize=(7.0, sum(heights)), layout="constrained")
    axes = figure.subplots(len(results), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (name, rows) in zip(axes, results.items(), strict=True):
        measured = sorted((r for r in rows if "milliseconds" in r), key=lambda r: float(r["milliseconds"]))
        names = [r["contestant"] for r in measured]
        values = [r["milliseconds"] for r in measured]
        colours = [AGNOSTIC if n.startswith("metarun") else "#999999" for n in names]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, [readable(v) for v in values], padding=3, fontsize=8)
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter("")
        axis.set_xlim(min(values) / 2, max(values) * 2)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(PROBLEMS[name].title, fontsize=10, loc="left")
    axes[-1].set_xlabel("milliseconds per meta-step")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def versions(device: str = "cpu") -> str:
    """Return the processor or the GPU and the measured versions, in one line."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in ("torch", "jax", "learn2learn", "higher", "torchopt"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        model = next((line.partition(": ")[2] for line in info.read_text().splitlines() if "model name" in line), model)
    if device == "cuda":
        import torch

        model = torch.cuda.get_device_name()
    return f"{model}, Python {platform.python_version()}, {', '.join(found)}"


COLUMNS = ("problem", "contestant", "milliseconds", "spread", "steps", "gradient_difference", "start_seconds", "note")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.meta_step", description=__doc__)
    parser.add_argument("problems", nargs="*", metavar="PROBLEM", help=", ".join(PROBLEMS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each contestant and problem, over all rounds")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/meta_step"))
    arguments = parser.parse_args()
    if unknown := set(arguments.problems) - set(PROBLEMS):
        parser.error(f"there is no problem {unknown.pop()}; choose among {', '.join(PROBLEMS)}")
    results, texts = {}, [versions(arguments.device), ""]
    print(texts[0], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.problems or list(PROBLEMS):
        results[name] = measure(PROBLEMS[name], arguments.device, arguments.rounds, arguments.seconds)
        texts += [table(PROBLEMS[name], arguments.device, results[name]), ""]
        print("\n" + texts[-2], flush=True)
    with (arguments.out / "meta_step.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for rows in results.values() for row in rows)
    (arguments.out / "meta_step.md").write_text("\n".join(texts))
    picture(arguments.out / "meta_step.png", results)
    print(f"\nfiles: {arguments.out}/meta_step.csv, meta_step.md, meta_step.png")


if __name__ == "__main__":
    main()
