"""The command as a process of its own, and the same command inside the tests' process, where a second start-up of
Python and torch would show nothing."""

import contextlib
import csv
import io
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

from metarun import cli
from metarun.command import sweep
from metarun.config import register_schema

Done = subprocess.CompletedProcess[str]

QUICK = ("train.steps=4", "train.eval_every=2", "train.val_episodes=4", "eval.episodes=4", "eval.adapt_steps=1")
LONG = ("train.steps=1000000", "train.eval_every=20", "train.log_every=10", "train.val_episodes=4", "engine=eager")
"""A run that does not end before it is stopped."""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def process(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> Done:
    """``python -m metarun`` from beginning to end."""
    return subprocess.run(
        [sys.executable, "-m", "metarun", *arguments],
        cwd=cwd,
        env=environment(**(env or {})),
        capture_output=True,
        text=True,
        check=False,
    )


def started(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """A process that is still running, once it has written a checkpoint."""
    running = subprocess.Popen(
        [sys.executable, "-m", "metarun", *arguments],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A test run that was started in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not list(cwd.rglob("last.pt")):
        assert running.poll() is None, running.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return running


TIMING = {"train_seconds", "test_seconds", "tasks_per_second", "adapt_ms_per_task", "peak_memory_mb", "run"}
TIMING |= {"compile_seconds", "engine", "task_map"}
"""What ``auto`` may choose in runs as short as these equals eager to the bit."""


def rows(path: Path):
    with path.open() as file:
        return list(csv.DictReader(file))


def without_timing(directory: Path):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows(directory / "result.csv")]


@contextlib.contextmanager
def put_back():
    """Restores what ``main`` changes for good, because its process would end: logging, presets, modules from here."""
    root, modules, here = logging.getLogger(), set(sys.modules), str(Path.cwd())
    handlers, level, factory = root.handlers[:], root.level, logging.getLogRecordFactory()
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.setLogRecordFactory(factory)
        register_schema()
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(here):
                del sys.modules[name]


def metarun(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> Done:
    """``metarun.cli.main()`` in this process, which keeps its own signals; what escapes is printed, as Python would."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HYDRA_FULL_ERROR": "0", "METARUN_FULL_ERROR": "0", **(env or {})}.items():
            patch.setenv(name, value)
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["metarun", *arguments])
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
        patch.setattr(cli, "failures", [])
        patch.setattr(sweep, "begun", [])
        patch.setattr(cli, "install", lambda handler: {})
        # A sweep runs in this process, too.
        patch.setattr("metarun.launch.processes.cores", lambda: 1)
        patch.setattr(cli, "handled_by", lambda handler: contextlib.nullcontext())
        with put_back(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as end:
                code = end.code
            except Exception:
                traceback.print_exc()
                code = 1
    if not isinstance(code, int | None):
        print(code, file=err)
        code = 1
    return subprocess.CompletedProcess(arguments, code or 0, out.getvalue(), err.getvalue())
