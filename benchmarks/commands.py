"""Whole commands, from the shell to the table, next to whole scripts: ``python -m benchmarks.commands [CASE ...]``.

- ``start_up``: the help, a mistake in the configuration, and a run of a single step;
- ``sinusoid``: MAML with five inner steps, 5,000 meta-steps, next to a script in JAX, with caches of compiled graphs
  that are empty (cold) or as the same command has left them (warm);
- ``sinusoid_short``: the same with 300 meta-steps, also next to scripts that loop over tasks, with learn2learn and
  without;
- ``sweep``: four algorithms with four seeds each on small images, and the same one after the other;
- ``navigation``: one, two and four runs at once.

The scripts are in ``benchmarks/peers``; they do the same work with the same sizes. ``--peer-python`` names the
interpreter that has their libraries; what is missing is named and left out. ``--also NAME=PYTHON`` lets the metarun of
another environment take part, such as an older version. Contestants take turns. Every command is a process (or several)
in an empty directory; the CPU seconds are its own and those of the processes that it has started. Writes
``commands.csv``, one row per command and round, and ``commands.md``, with medians, into ``--out``, and the tables into
``--page``; cases that are not measured again stay as they are.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.meta_step import versions
from benchmarks.pages import put, with_others
from metarun.system.files import write_text

ROOT = Path(__file__).parents[1]
SCRIPTS = {"JAX script": "jax", "learn2learn script": "learn2learn", "plain torch script": "torch"}
"""Each script and the library that it needs, after which its module is named."""
COLUMNS = ("case", "contestant", "caches", "round", "wall_seconds", "cpu_seconds", "score", "note")

Row = dict[str, Any]


@dataclass(frozen=True)
class Contestant:
    """Commands that start at once."""

    name: str
    commands: Sequence[Sequence[str]]
    caches: str = ""
    """``cold``: caches of compiled graphs are empty before each round; ``warm``: they are kept; else not mentioned."""
    fails: bool = False
    """Whether the command is to fail."""
    path: str | None = None
    """Where Python looks for modules first."""


def measured(contestant: Contestant, caches: Path) -> Row:
    """Run the commands at once in empty directories; return wall and CPU seconds, and the score of the first.

    Raises:
        RuntimeError: a command has failed, or has not failed although it should.
    """
    with tempfile.TemporaryDirectory() as folder:
        if contestant.caches != "warm":
            caches = Path(folder) / "caches"
        own = {"METARUN_CACHE_DIR": str(caches), "JAX_COMPILATION_CACHE_DIR": str(caches), "JAX_PLATFORMS": "cpu"}
        environment = {**os.environ, **own}
        if contestant.path is not None:
            environment["PYTHONPATH"] = contestant.path
        began, running = time.perf_counter(), []
        for number, command in enumerate(contestant.commands):
            place = Path(folder) / str(number)
            place.mkdir()
            with (place / "said.txt").open("wb") as said:
                running.append(subprocess.Popen(command, cwd=place, env=environment, stdout=said, stderr=said))
        cpu = 0.0
        for number, process in enumerate(running):
            cpu += cpu_seconds_of(process)
            if bool(process.returncode) != contestant.fails:
                said_by_it = (Path(folder) / str(number) / "said.txt").read_text(errors="replace").splitlines()
                raise RuntimeError(said_by_it[-1] if said_by_it else f"exit code {process.returncode}")
        wall = time.perf_counter() - began
        return {"wall_seconds": round(wall, 3), "cpu_seconds": round(cpu, 3), "score": score_in(Path(folder) / "0")}


def cpu_seconds_of(process: "subprocess.Popen[bytes]") -> float:
    """Wait for a process; return the CPU seconds of it and of the processes that it has started and waited for."""
    if not hasattr(os, "wait4"):
        process.wait()
        return float("nan")
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime


def score_in(directory: Path) -> float | None:
    """Return the score that a run has left in a table, or a script has printed."""
    for path in sorted(directory.rglob("result.csv")):
        with path.open() as file:
            return float(next(csv.DictReader(file))["score"])
    last = (directory / "said.txt").read_text(errors="replace").splitlines()[-1:]
    return float(last[0].removeprefix("score ")) if last and last[0].startswith("score ") else None


def of_metarun(python: str, *arguments: str) -> list[str]:
    """Return a command of metarun."""
    return [python, "-m", "metarun", *arguments]


def script(python: str, name: str, *arguments: str) -> Contestant:
    """Return the script of a peer, with empty caches."""
    command = [python, "-m", f"benchmarks.peers.{SCRIPTS[name]}_sinusoid", *arguments]
    return Contestant(name, [command], "cold", path=str(ROOT))


def absent(python: str, library: str) -> str | None:
    """Return why a library cannot be imported; None if it can."""
    done = subprocess.run([python, "-c", f"import {library}"], capture_output=True, text=True, check=False)
    return (done.stderr.strip().splitlines() or ["it cannot be imported"])[-1] if done.returncode else None


def start_up(own: dict[str, str], peer: str) -> Iterator[Contestant]:
    """The help, a mistake and a single step."""
    for name, python in own.items():
        yield Contestant(f"{name} algo=maml task=sinusoid train.steps=1", [of_metarun(python, "train.steps=1")])
        yield Contestant(f"{name} --help", [of_metarun(python, "--help")])
        yield Contestant(f"{name} train.stepz=3", [of_metarun(python, "train.stepz=3")], fails=True)


SINUSOID = ("algo=maml", "task=sinusoid")


def sinusoid(own: dict[str, str], peer: str) -> Iterator[Contestant]:
    """The default command next to a script in JAX."""
    for caches in ("cold", "warm"):
        for name, python in own.items():
            yield Contestant(name, [of_metarun(python, *SINUSOID)], caches)
        yield replace(script(peer, "JAX script"), caches=caches)


SHORT = 300
"""Meta-steps of the case in which scripts take part that loop over tasks."""


def sinusoid_short(own: dict[str, str], peer: str) -> Iterator[Contestant]:
    """Fewer steps, next to all scripts."""
    for name, python in own.items():
        yield Contestant(name, [of_metarun(python, *SINUSOID, f"train.steps={SHORT}")], "cold")
    for name in SCRIPTS:
        yield script(peer, name, "--steps", str(SHORT))


SWEEP = (
    *("-m", "algo=maml,reptile,protonet,shared_params", "seed=0,1,2,3", "task=omniglot", "task.dataset=procedural"),
    *("task.image_size=16", "task.queries=5", "task.train_ways=null", "model.filters=8", "train.steps=60"),
    *("train.meta_batch=4", "train.val_episodes=50", "eval.episodes=100", "eval.adapt_steps=3"),
)


def sweep(own: dict[str, str], peer: str) -> Iterator[Contestant]:
    """Sixteen small runs in several processes, and one after the other."""
    for name, python in own.items():
        yield Contestant(f"{name} -m", [of_metarun(python, *SWEEP)])
        yield Contestant(f"{name} -m hydra/launcher=basic", [of_metarun(python, *SWEEP, "hydra/launcher=basic")])


NAVIGATION = (
    *("algo=maml", "task=navigation", "train.steps=20", "train.eval_every=20", "train.val_episodes=20"),
    *("eval.episodes=40", "eval.adapt_steps=2"),
)


def navigation(own: dict[str, str], peer: str) -> Iterator[Contestant]:
    """Runs that share the cores."""
    for name, python in own.items():
        for count in (1, 2, 4):
            commands = [of_metarun(python, *NAVIGATION, f"seed={seed}") for seed in range(count)]
            yield Contestant(f"{name}, {count} at once", commands)


CASES = {f.__name__: f for f in (start_up, sinusoid, sinusoid_short, sweep, navigation)}


def rounds_of(case: str, contestants: Sequence[Contestant], rounds: int, caches: Path) -> list[Row]:
    """Let the contestants take turns; one that fails is left out of the rounds that follow."""
    rows: list[Row] = []
    present = list(contestants)
    for one in [one for one in contestants if one.caches == "warm"]:
        # What a first run compiles is there for all that are timed.
        try_to_measure(one, caches / one.name.replace(" ", "_"))
    for number in range(rounds):
        for one in list(present):
            row: Row = {"case": case, "contestant": one.name, "caches": one.caches, "round": number}
            found = try_to_measure(one, caches / one.name.replace(" ", "_"))
            rows.append({**row, **found})
            print(f"  {one.name}{' ' + one.caches if one.caches else ''}: {found}", flush=True)
            if "note" in found:
                present.remove(one)
    return rows


def try_to_measure(one: Contestant, caches: Path) -> Row:
    """Return what ``measured`` finds, or a note why the contestant failed."""
    try:
        return measured(one, caches)
    except RuntimeError as error:
        return {"note": " ".join(str(error).split())[:200]}


def table(rows: Sequence[Row]) -> str:
    """Return the medians of a case as Markdown, with ratios to the first contestant with the same caches."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["contestant"], row["caches"]), []).append(row)
    cached = any(caches for _, caches in groups)
    names = ["command", *(["caches"] if cached else []), "wall s", "× the first", "CPU s", "score"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    first: dict[str, float] = {}
    for (name, caches), own in groups.items():
        done = [row for row in own if row.get("note") is None]
        cells = [name, *([caches] if cached else [])]
        if not done:
            lines.append("| " + " | ".join([*cells, "–", "–", "–", own[-1]["note"]]) + " |")
            continue
        wall, cpu = (statistics.median(row[key] for row in done) for key in ("wall_seconds", "cpu_seconds"))
        ratio = wall / first.setdefault(caches, wall)
        score = "" if done[0]["score"] is None else f"{done[0]['score']:.3g}"
        lines.append("| " + " | ".join([*cells, f"{wall:.3g}", f"{ratio:.2f}", f"{cpu:.3g}", score]) + " |")
    return "\n".join(lines)


def page(rows: Sequence[Row]) -> str:
    """Return the tables of all cases that have been measured."""
    texts = []
    for case, function in CASES.items():
        if own := [row for row in rows if row["case"] == case]:
            texts.append(f"**{case.replace('_', ' ')}**: {(function.__doc__ or '').strip()}\n\n{table(own)}")
    return "\n\n".join(texts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.commands", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter with jax, learn2learn and torch")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=PYTHON", help="another metarun")
    parser.add_argument("--page", type=Path, help="page with a place for the tables (docs/performance.md)")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/commands"))
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"there is no case {unknown.pop()}; choose among {', '.join(CASES)}")
    own = {"metarun": sys.executable, **dict(one.split("=", 1) for one in arguments.also)}
    missing = {name: absent(arguments.peer_python, library) for name, library in SCRIPTS.items()}
    print(f"{versions()}, {os.cpu_count()} cores", flush=True)
    for name, why in missing.items():
        if why is not None:
            print(f"{name} is left out: {why}", flush=True)
    for case in arguments.cases or list(CASES):
        print(f"\n{case}", flush=True)
        contestants = [one for one in CASES[case](own, arguments.peer_python) if missing.get(one.name) is None]
        with tempfile.TemporaryDirectory() as caches:
            found = rounds_of(case, contestants, arguments.rounds, Path(caches))
        print("\n" + table(found), flush=True)
        # After each case, so that cases can be measured at different times.
        rows = with_others(arguments.out / "commands.csv", COLUMNS, [case], found)
        write_text(arguments.out / "commands.md", page(rows) + "\n")
    if arguments.page is not None:
        put(arguments.page, {"commands": page(rows)})
    print(f"\nfiles: {arguments.out}/commands.csv, commands.md")


if __name__ == "__main__":
    main()
