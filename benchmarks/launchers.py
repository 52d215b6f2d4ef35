"""The same sweep of 24 jobs by every launcher: ``python -m benchmarks.launchers [NAME ...]``.

One job fails. Each launcher runs the sweep undisturbed, and again with SIGKILL for the process that began it once a
third of the jobs have ended, followed by ``metarun -m resume=``. Tables, exit codes and all numbers of the jobs must
equal those of Hydra's own launcher. It needs ``pip install 'metarun[joblib,submitit,ray,optuna]'``.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.survival import COMMAND, environment, metarun, numbers
from metarun.results.status import jobs_of_sweep

RATES = [*(f"{0.001 * i:.3f}" for i in range(1, 13)), "0", *(f"{0.001 * i:.3f}" for i in range(13, 24))]
SWEEP = [
    *("-m", f"algo.inner_lr={','.join(RATES)}", "train.steps=20", "train.eval_every=5", "train.log_every=5"),
    *(
        "train.meta_batch=4",
        "train.val_episodes=4",
        "eval.episodes=4",
        "eval.adapt_steps=1",
        "engine=eager",
        "hydra.sweep.dir=sweep",
    ),
]
LAUNCHERS = {
    "basic": ["hydra/launcher=basic"],
    "processes": ["hydra.launcher.n_jobs=2"],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit", "hydra.launcher.cluster=local", "hydra.launcher.at_once=2"],
    "ray": ["hydra/launcher=ray", "hydra.launcher.cpus=2"],
    "optuna": ["hydra/sweeper=optuna", "hydra.sweeper.sampler=grid", "hydra.sweeper.n_trials=24"],
}


def table_of(said: str) -> str:
    """Return the end of what a sweep has printed."""
    return said[said.rindex("\njob  ") :]


def ended(directory: Path) -> int:
    """Return how many jobs of a sweep have ended."""
    return sum(job.state in ("completed", "failed") for job in jobs_of_sweep(directory))


def killed(arguments: list[str], folder: Path) -> int:
    """Begin a sweep, kill its process after a third of the jobs; return how many jobs had ended by then."""
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    while ended(folder / "sweep") < len(RATES) // 3:
        if process.poll() is not None:
            return ended(folder / "sweep")
        time.sleep(0.2)
    process.kill()
    process.wait()
    return ended(folder / "sweep")


def measured(name: str, folder: Path) -> tuple[Any, str]:
    """Return (exit code, table, numbers) of a sweep undisturbed and after a kill, and a line that describes both."""
    found, words = [], [f"{name:9}"]
    for way in ("undisturbed", "killed"):
        place = folder / f"{name}_{way}"
        place.mkdir()
        arguments, began = [*SWEEP, *LAUNCHERS[name]], time.monotonic()
        done = killed(arguments, place) if way == "killed" else 0
        again = metarun(["-m", "resume=sweep"] if way == "killed" else arguments, place, 1200)
        try:
            table = table_of(again.stdout)
        except ValueError:
            table = again.stdout + again.stderr
        found.append((again.returncode, table, numbers(place / "sweep")))
        after = f" after {done} of {len(RATES)} jobs" if way == "killed" else ""
        words.append(f"{way}{after}: exit code {again.returncode}, {time.monotonic() - began:.0f} s")
    return found, "; ".join(words)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", nargs="*", default=list(LAUNCHERS), help=f"of {', '.join(LAUNCHERS)}")
    names = parser.parse_args().name
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        expected: Any = None
        for name in dict.fromkeys(["basic", *names]):
            found, line = measured(name, Path(folder))
            if expected is None:
                expected = found[0]
                print(expected[1], flush=True)
            different = [
                f"{what} {way}"
                for way, one in zip(("undisturbed", "killed"), found, strict=True)
                for what, own, other in zip(("exit code", "table", "numbers"), one, expected, strict=True)
                if own != other
            ]
            wrong += bool(different)
            print(f"{line}: {'DIFFERENT: ' + ', '.join(different) if different else 'equal'}", flush=True)
            if different:
                print(found[0][1], found[1][1], flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
