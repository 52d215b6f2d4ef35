"""Peak memory of a meta-step against inner steps, tasks and replicas: ``python -m benchmarks.memory``.

Each size runs in a separate process. The process measures the high-water mark of its resident memory, above what it
used when everything except the first step was ready (Linux). Second-order MAML keeps every inner step; iMAML does not.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

from benchmarks.meta_step import versions
from metarun.engine.process import CLEAR_REFS, STATUS, peak_memory_mb

IMAGES = "task=omniglot task.dataset=procedural task.train_queries=15 train.meta_batch=4"
CASES = {
    "inner steps, maml": (f"algo=maml {IMAGES} algo.inner_steps=", [1, 2, 4, 8]),
    "inner steps, fomaml": (f"algo=fomaml {IMAGES} algo.inner_steps=", [1, 2, 4, 8]),
    "inner steps, imaml": (f"algo=imaml {IMAGES} algo.inner_steps=", [1, 2, 4, 8, 16, 32]),
    "tasks": (f"algo=maml {IMAGES} train.meta_batch=", [1, 4, 16]),
    "tasks, one at a time": (f"algo=maml {IMAGES} train.task_chunk=1 train.meta_batch=", [1, 4, 16]),
    "replicas": ("algo=maml task=sinusoid replicas.count=", [1, 4, 16, 64]),
}


def one_step(overrides: list[str]) -> float:
    """Return the megabytes that the second of two meta-steps needs at its peak, in this process."""
    from benchmarks.own import experiment_of
    from metarun.assemble import training_tasks
    from metarun.engine.choose import Stepper
    from metarun.engine.meta_step import MetaStep
    from metarun.loop import rates_of

    experiment = experiment_of(*overrides, "train.steps=10", "engine=eager")
    meta_step = MetaStep(experiment)
    seeds = [one.config.seed for one in experiment.replicas]
    tasks = training_tasks(experiment, seeds, experiment.config.train.meta_batch, 0)
    given = {"train_state": meta_step.initial_train_state(), "tasks": tasks, "rates": rates_of(experiment)[0]}
    # The first step of any size loads libraries, so a small one comes before.
    small = experiment_of("algo=maml", "task=sinusoid", "engine=eager")
    small_step = MetaStep(small)
    tasks = training_tasks(small, [0], 1, 0)
    small_step.whole({"train_state": small_step.initial_train_state(), "tasks": tasks, "rates": rates_of(small)[0]})
    resident = next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    CLEAR_REFS.write_text("5")
    Stepper(experiment, meta_step).run(given)
    return peak_memory_mb("cpu") - resident * 1024 / 1e6


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/memory"))
    arguments = parser.parse_args()
    if not CLEAR_REFS.exists():
        parser.error("this benchmark reads memory figures that only Linux provides; run it on Linux")
    if arguments.one:
        print(one_step(arguments.one))
        return
    print(versions(), flush=True)
    rows = []
    for case, (overrides, sizes) in CASES.items():
        for size in sizes:
            words = f"{overrides}{size}".split()
            command = [sys.executable, "-m", "benchmarks.memory", "--one", *words]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"case": case, "size": size, "megabytes": round(float(done.stdout.split()[-1]), 1)})
            print(f"  {case:<24} {size:>4} {rows[-1]['megabytes']:9.1f} MB", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "memory.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ("case", "size", "megabytes"), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"files: {arguments.out}/memory.csv")


if __name__ == "__main__":
    main()
