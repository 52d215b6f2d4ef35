"""Tests of what runs and sweeps survive: ``python -m benchmarks.survival CAMPAIGN --count 100``.

- ``kills``: runs of ten pairs of algorithm and task, with several engines and replicas, are killed by SIGKILL at a
  random moment, up to three times each, and resumed; ``episodes.csv`` and ``result.csv`` must equal those of the
  undisturbed run, except for times.
- ``sweeps``: the same for a sweep in which one job fails, started again by the same command or by ``resume=``.
- ``configurations``: one key of a composed configuration is given a meaningless value, which must be refused with a
  sentence within ten seconds.
- ``files``: one file of a finished run is damaged; resuming, comparing and watching must end without a traceback, and a
  resumed run that ends well must have the numbers of the undamaged one.

Each failure is printed together with what reproduces it; the exit code is then 1.
"""

import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

SMALL = "train.steps=200 train.eval_every=20 train.log_every=5 train.val_episodes=4 eval.episodes=8 eval.adapt_steps=2"
IMAGES = "task=omniglot task.dataset=procedural task.image_size=16 train.meta_batch=2 model.filters=4"
PAIRS = (
    "algo=maml task=sinusoid",
    "algo=reptile task=sinusoid replicas.count=2",
    "algo=metasgd task=sinusoid engine=replay train.schedule=cosine train.clip=5",
    "algo=cnp task=sinusoid",
    "algo=maml task=teachers train.meta_batch=4",
    f"algo=protonet {IMAGES}",
    f"algo=anil {IMAGES} train.optimizer=adamw",
    "algo=shared_params task=sinusoid replicas.over='{train.lr: [0.001, 0.01]}'",
    "algo=multitask task=sinusoid train.meta_batch=4",
    "algo=fomaml task=sinusoid engine=eager train.schedule=step train.decay_every=20",
)
TIMES = (
    *("train_seconds", "test_seconds", "tasks_per_second", "adapt_ms_per_task", "peak_memory_mb"),
    *("compile_seconds", "run"),
)
SWEEP = f"-m algo=maml task=sinusoid algo.inner_lr=0.01,0,0.02 {SMALL} engine=eager hydra.sweep.dir=sweep"
COMMAND = [sys.executable, "-m", "metarun"]


def words(text: str) -> list[str]:
    """Split a command of this file into words; quotes keep words together."""
    import shlex

    return [word.replace("'", "") for word in shlex.split(text)]


def metarun(arguments: list[str], cwd: Path, seconds: float = 600) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=seconds, env=environment()
    )


def environment() -> dict[str, str]:
    """Return an environment with one thread per process, so that a kill hits one working process."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def killed(arguments: list[str], cwd: Path, after: float) -> bool:
    """Start the command and kill it after ``after`` seconds; return False if it ended before."""
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    try:
        process.wait(after)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def numbers(directory: Path) -> list[Any]:
    """Return what the runs under a directory have measured, without times."""
    found: list[Any] = []
    for path in sorted(directory.rglob("result.csv")):
        with path.open(newline="") as file:
            rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
        episodes = path.with_name("episodes.csv")
        found.append((path.parent.name, rows, episodes.read_text() if episodes.exists() else ""))
    return found


def kill_runs(count: int, draw: random.Random, folder: Path) -> list[str]:
    """Return the runs whose numbers differ after kills."""
    wrong, kills = [], 0
    for pair in PAIRS:
        arguments = words(f"{pair} {SMALL}")
        began = time.monotonic()
        done = metarun([*arguments, "hydra.run.dir=whole"], folder)
        seconds, expected = time.monotonic() - began, numbers(folder / "whole")
        if done.returncode:
            wrong.append(f"{pair}: {done.stdout}{done.stderr}")
            continue
        for number in range(-(-count // len(PAIRS))):
            moments = []
            for _ in range(draw.choice((1, 1, 2, 3))):
                moments.append(round(draw.uniform(0.3, 1.0) * seconds, 3))
                again = ["resume=run"] if has_checkpoint(folder / "run") else [*arguments, "hydra.run.dir=run"]
                kills += killed(again, folder, moments[-1])
            completed = (folder / "run" / "result.csv").exists() and "completed" in str(numbers(folder / "run"))
            again = ["resume=run"] if has_checkpoint(folder / "run") else [*arguments, "hydra.run.dir=run"]
            done = subprocess.CompletedProcess([], 0, "", "") if completed else metarun(again, folder)
            leftovers = [path.name for path in (folder / "run").rglob(".*") if path.name != ".hydra"]
            if done.returncode or numbers(folder / "run") != renamed(expected, "run") or (leftovers and not completed):
                wrong.append(f"{pair}, kill {number} after {moments} s: {done.returncode} {leftovers} {done.stderr}")
            shutil.rmtree(folder / "run")
        shutil.rmtree(folder / "whole")
        print(f"{kills} kills: {len(wrong)} wrong, after {pair} ({seconds:.0f} s undisturbed)", flush=True)
    return wrong


def has_checkpoint(directory: Path) -> bool:
    """Whether the run can be resumed."""
    from metarun.system.files import has_checkpoint as found

    return found(directory)


def renamed(found: list[Any], name: str) -> list[Any]:
    """Return the numbers of a single run under the name of another directory."""
    return [(name, *rest) for _, *rest in found]


def kill_sweeps(count: int, draw: random.Random, folder: Path) -> list[str]:
    """Return the sweeps whose numbers differ after kills."""
    (folder / "undisturbed").mkdir()
    began = time.monotonic()
    done = metarun(words(SWEEP), folder / "undisturbed")
    seconds, expected = time.monotonic() - began, numbers(folder / "undisturbed")
    end = done.stdout.splitlines()[-8:]
    wrong = []
    for number in range(count):
        moment = round(draw.uniform(0.1, 1.0) * seconds, 3)
        killed(words(SWEEP), folder, moment)
        resume = draw.random() < 0.5 and (folder / "sweep" / "sweep.json").exists()
        again = metarun(["-m", "resume=sweep"] if resume else words(SWEEP), folder)
        if again.returncode != 1 or numbers(folder / "sweep") != expected or again.stdout.splitlines()[-8:] != end:
            said = f"{again.returncode} {again.stdout[-900:]}{again.stderr}"
            wrong.append(f"sweep {number}, killed after {moment} s: {said}")
        shutil.rmtree(folder / "sweep")
        print(f"{number + 1} sweeps killed: {len(wrong)} wrong", flush=True)
    return wrong


BAD: dict[type, tuple[str, ...]] = {
    bool: ("2", "many", "[true]", "0.5", "{a: 1}"),
    int: ("many", "0.5", "nan", "inf", "-7", "[1]", "{a: 1}", "-1000000000000000000000"),
    float: ("many", "nan", "inf", "-inf", "[0.1]", "{a: 1}", "true"),
    str: ("{a: 1}", "[a]", "3.5", "no_such_thing"),
    list: ("3.5", "text", "{a: 1}", "true"),
    type(None): ("{a: {b: 1}}", "[[many]]", "nan", "-7"),
}
ANY_VALUE = ("data_dir", "resume", "device", "task.dataset", "_target_")
"""Keys whose texts are only checked where they are used."""


def leaves_of(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of a plain configuration with its value; lists are values."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Inside, TimeoutError is raised after ``seconds``."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def try_configurations(count: int, draw: random.Random, folder: Path) -> list[str]:
    """Return the configurations that were accepted, or refused otherwise than with a sentence."""
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from metarun.assemble import assemble
    from metarun.config import check_ranges, register_schema
    from metarun.engine.choose import Stepper
    from metarun.engine.meta_step import MetaStep
    from metarun.errors import UserError
    from metarun.results.trackers import chosen as chosen_trackers

    register_schema()

    def composed(*overrides: str) -> tuple[DictConfig, dict[str, str]]:
        with initialize_config_module("metarun.conf", version_base="1.3"):
            config = compose("config", overrides=list(overrides), return_hydra_config=True)
        names = {group: str(config.hydra.runtime.choices[group]) for group in ("algo", "task", "model")}
        return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]), names

    for pair in PAIRS:
        # Data that are drawn once and then cached must not count as a hang.
        assemble(*composed(*words(pair)))
    wrong = []
    for number in range(count):
        chosen = words(draw.choice(PAIRS))
        plain: Any = OmegaConf.to_container(composed(*chosen)[0], resolve=True, enum_to_str=True)
        choices = [(k, v) for k, v in leaves_of(plain) if type(v) in BAD and not k.endswith(ANY_VALUE)]
        key, value = draw.choice(choices)
        override = f"{key}={draw.choice(BAD[type(value)])}"
        said = ""
        try:
            with within(10):
                config, names = composed(*chosen, override)
                check_ranges(config)
                chosen_trackers(config)
                experiment = assemble(config, names)
                Stepper(experiment, MetaStep(experiment))
            said = "accepted"
        except (UserError, HydraException, OmegaConfBaseException):
            pass
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        if said:
            wrong.append(f"{' '.join(chosen)} {override} (was {value!r}): {said}")
        if number % 100 == 99:
            print(f"{number + 1} configurations: {len(wrong)} wrong", flush=True)
    return wrong


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Return a copy of the bytes with some damage."""
    place, other = draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)
    kinds: list[Callable[[], bytes]] = [
        lambda: data[:place],
        lambda: data[:place] + bytes([data[place - 1] ^ (1 << draw.randrange(8))]) + data[place + 1 :],
        lambda: data[:place] + draw.randbytes(draw.randrange(1, 200)) + data[other:],
        lambda: data[: min(place, other)] + bytes(abs(other - place)) + data[max(place, other) :],
        lambda: b"",
        lambda: draw.randbytes(len(data)),
        lambda: data[:place] + data[other:],
    ]
    return draw.choice(kinds)()


def forked(program: str, arguments: list[str], cwd: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run an entry point of metarun in a fork of this process, which has imported what it needs.

    Raises:
        subprocess.TimeoutExpired: it takes longer than ``seconds``.
    """
    import metarun.__main__

    output = cwd / "output.txt"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(cwd)
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.argv = ["metarun", *arguments]
            getattr(metarun.__main__, program)()
            code = 0
        except SystemExit as end:
            # As the interpreter ends: a text is printed.
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    until = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            said = output.read_text(errors="replace")
            return subprocess.CompletedProcess([program], os.waitstatus_to_exitcode(status), said, "")
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise subprocess.TimeoutExpired(program, seconds)
        time.sleep(0.02)


def damage_files(count: int, draw: random.Random, folder: Path) -> list[str]:
    """Return the cases of damage that led to a traceback, to a hang, or to other numbers."""
    import matplotlib.pyplot  # noqa: F401
    import pandas  # noqa: F401
    import torch

    torch.set_num_threads(1)
    arguments = words(f"{PAIRS[0]} {SMALL} hydra.run.dir=whole")
    metarun(arguments, folder)
    expected = numbers(folder / "whole")
    files = [path.relative_to(folder / "whole") for path in (folder / "whole").rglob("*") if path.is_file()]
    files = [path for path in files if path.suffix in (".pt", ".csv", ".yaml")]
    wrong = []
    for number in range(count):
        run = shutil.copytree(folder / "whole", folder / "run")
        path = draw.choice(files)
        data = damaged((run / path).read_bytes(), draw)
        same = data == (run / path).read_bytes()
        (run / path).write_bytes(data)
        kept = folder / "damaged"
        kept.write_bytes(data)
        problems = []
        for program in ("compare", "status", "main"):
            try:
                done = forked(program, ["resume=run"] if program == "main" else ["run"], folder, 120)
            except subprocess.TimeoutExpired:
                problems.append(f"{program} hangs")
                continue
            said = done.stdout
            if "Traceback" in said or done.returncode not in (0, 1) or (done.returncode == 1 and "metarun" not in said):
                problems.append(f"{program}: {done.returncode} {said[-600:]}")
            if program == "main" and done.returncode == 0 and numbers(run) != renamed(expected, "run"):
                problems.append("main: other numbers")
        if problems and not same:
            shutil.copy(kept, Path.cwd() / f"damaged_{number}_{path.name}")
            wrong.append(f"damage {number} of {path}: {problems}")
            print(wrong[-1], flush=True)
        shutil.rmtree(run)
        if number % 5 == 4:
            print(f"{number + 1} damaged files: {len(wrong)} wrong", flush=True)
    return wrong


def main() -> None:
    """Entry point."""
    campaigns = {
        "kills": kill_runs,
        "sweeps": kill_sweeps,
        "configurations": try_configurations,
        "files": damage_files,
    }
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("campaign", choices=campaigns)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        os.environ["METARUN_CACHE_DIR"] = cache
        wrong = campaigns[given.campaign](given.count, random.Random(given.seed), Path(folder))
    for one in wrong:
        print("WRONG", one)
    print(f"{given.campaign}: {given.count} tried, {len(wrong)} wrong, {time.monotonic() - began:.0f} s")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
