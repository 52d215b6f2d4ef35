"""The command ``metarun``: Hydra's entry point and the boundary where errors become sentences.

torch is imported only after a configuration is composed, so that help, completion and most errors appear at once.
"""

import errno
import logging
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import metarun
from metarun import launch
from metarun.command import sweep
from metarun.command.help import help_text
from metarun.command.once import composing_once
from metarun.command.presets import typed_keys
from metarun.command.resume import arguments_of_resumed, config_dirs, options_first
from metarun.command.sentences import sentence_of
from metarun.command.sweep import closing_words, finished
from metarun.config import check_ranges, config_hash, register_schema
from metarun.errors import Pruned, Stopped, UserError
from metarun.results import drawer, trackers
from metarun.results.status import mark, rows_of
from metarun.system import lock
from metarun.system.files import has_checkpoint, remove_leftovers, write_text
from metarun.system.importing import importing
from metarun.system.signals import handled_by, install, stop
from metarun.system.terminal import PrintableRecord, printable
from metarun.system.torchrun import following, rank

log = logging.getLogger(__name__)

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

draws_elsewhere = False
"""Whether this process is the command, which has another process draw its pictures."""

failures: list[str] = []
"""Sentences of the jobs of this process that failed; a sweep continues after a failure."""


def wants_traceback() -> bool:
    """Whether the user has asked for tracebacks."""
    return os.environ.get("METARUN_FULL_ERROR") == "1"


def fail(sentence: str) -> None:
    """Record that a job failed, and log the reason on the screen and in ``run.log``."""
    failures.append(sentence)
    log.error("metarun: %s", " ".join(sentence.split()))


def sentence_of_system_error(error: OSError, directory: Path) -> str | None:
    """Return what the system refused and what to do, in one sentence; None if no file is named and the disk has room.

    A run writes to its ``directory`` and reads elsewhere, so the path distinguishes a full disk from missing data.
    """
    reason = error.strerror or str(error)
    path = None if error.filename is None else Path(os.fsdecode(error.filename))
    place = "" if path is None else f" ({path})"
    own = path is not None and path.absolute().is_relative_to(directory.absolute())
    if own or error.errno in NO_ROOM:
        return (
            f"The system refused: {reason}{place}; make room or choose another place with hydra.run.dir=DIR. What was "
            "written before is intact."
        )
    if path is None:
        return None
    if isinstance(error, FileNotFoundError):
        return f"There is no {path}, which the run needs; put it there, or change the key that names it."
    return f"{path} cannot be used: {reason}; fix that, or change the key that names it."


def job(config: DictConfig) -> float:
    """Do one run inside Hydra; return the validation score, or NaN for a run that failed."""
    # Here too, because a launcher may run it in another process.
    logging.setLogRecordFactory(PrintableRecord)
    directory = Path(HydraConfig.get().runtime.output_dir)
    if Path.cwd() in directory.parents:
        directory = directory.relative_to(Path.cwd())
    try:
        lock.acquire(directory, wait=HydraConfig.get().mode == RunMode.MULTIRUN)
    except UserError as error:
        fail(str(error))
        return float("nan")
    try:
        return owned_job(config, directory)
    finally:
        lock.release(directory)


def owned_job(config: DictConfig, directory: Path) -> float:
    """Do the run of a job whose directory belongs to this process."""
    state = HydraConfig.get()
    names = {group: str(state.runtime.choices[group]) for group in ("algo", "task", "model")}
    of_a_sweep = state.mode == RunMode.MULTIRUN
    for folder in (directory, directory / "checkpoints"):
        remove_leftovers(folder)
    try:
        # Before torch is imported, because a user who mistyped a number should not wait for the import.
        check_ranges(config)
        trackers.chosen(config)
        if of_a_sweep and (score := finished(config, directory)) is not None:
            log.info("%s has completed already.", directory)
            return score
        if draws_elsewhere and not rank():
            drawer.start()
        with importing():
            from metarun.run import run

        watchers = launch.watchers(config, state)
        resume = config.resume is not None or (of_a_sweep and has_checkpoint(directory))
        with handled_by(stop):
            typed = typed_keys(state.overrides.task, state.runtime.choices.get("experiment"))
            number = state.job.num if of_a_sweep else None
            return run(config, names, directory, resume, typed, watchers, number)
    except Pruned as end:
        note(config, names, directory, "pruned", str(end))
        log.info("%s", end)
        return float("nan")
    except (KeyboardInterrupt, SystemExit):
        # submitit leaves by SystemExit from a job that is queued again.
        note(config, names, directory, "interrupted")
        if has_checkpoint(directory) and not of_a_sweep:
            log.info("Stopped; continue with: metarun resume='%s'", directory)
        raise
    except Exception as error:
        if wants_traceback():
            raise
        sentence = why_it_failed(error, directory)
        note(config, names, directory, "failed", sentence)
        fail(sentence)
        return float("nan")


def why_it_failed(error: Exception, directory: Path) -> str:
    """Return what ended a run, in one sentence; an unforeseen error leaves its traceback in ``error.txt``."""
    if isinstance(error, UserError):
        return str(error)
    sentence = sentence_of_system_error(error, directory) if isinstance(error, OSError) else None
    if sentence is not None:
        return sentence
    place = directory / "error.txt"
    try:
        write_text(place, traceback.format_exc())
    except OSError:
        return f"{type(error).__name__}: {error}."
    return f"{type(error).__name__}: {error} (the traceback is in {place})."


def note(config: DictConfig, names: dict[str, str], directory: Path, status: str, sentence: str = "") -> None:
    """Record the end of a run in ``result.csv``, even if the run ended before it could write any row."""
    known = []
    if not rows_of(directory / "result.csv"):
        row = {
            "run": directory.name,
            "seed": config.seed,
            "replica": 0,
            "metarun_version": metarun.__version__,
            **names,
        }
        # An invalid configuration may have no hash.
        with suppress(OmegaConfBaseException, ValueError, TypeError):
            row["config_hash"] = config_hash(config)
        known = [row]
    with suppress(OSError):
        mark(directory, known, status, " ".join(sentence.split()))


def say_how_it_ended() -> bool:
    """Print the table of a sweep, if any, and release all directories; return whether all jobs completed."""
    said, complete = closing_words(sweep.begun)
    if said:
        with suppress(BrokenPipeError):
            print(said, flush=True)
    lock.release_all()
    return complete


def leave(number: int, frame: FrameType | None) -> None:
    """End the process on a signal before training: an import or a composition is not worth unwinding."""
    say_how_it_ended()
    os._exit(128 + number)


def main() -> Any:
    """Run ``metarun``; exit with 1 after an error, and with 128 + the signal's number after a signal."""
    global draws_elsewhere
    draws_elsewhere = True
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        try:
            print(help_text(config_dirs(arguments)), flush=True)
        except BrokenPipeError:
            # A pager was closed early, so the rest of the buffer must not be written.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    # Hydra would print the error and exit; this makes it raise, so that errors become sentences in one place.
    os.environ["METARUN_FULL_ERROR"] = os.environ.get("HYDRA_FULL_ERROR", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # A log that cannot be written (a full disk) must not bury the sentence under further tracebacks.
    logging.raiseExceptions = wants_traceback()
    logging.setLogRecordFactory(PrintableRecord)
    install(leave)
    # As with python -m, _target_ can name modules in the current folder.
    sys.path.append(str(Path.cwd()))
    try:
        options, overrides = options_first(arguments_of_resumed(arguments))
        with following(options, overrides) as further:
            sys.argv[1:] = [*options, *overrides, *further]
            register_schema(*map(Path, config_dirs(options)))
            launch.register()
            entry = hydra.main(version_base="1.3", config_path="pkg://metarun.conf", config_name="config")
            with composing_once(multirun=bool({"-m", "--multirun"} & set(options))):
                entry(job)()
    except KeyboardInterrupt as error:
        sys.exit(error.exit_code if isinstance(error, Stopped) else 130)
    except (HydraException, OmegaConfBaseException, UserError) as error:
        if wants_traceback():
            raise
        sys.exit(printable(f"metarun: {sentence_of(error)}"))
    except OSError as error:
        if wants_traceback():
            raise
        sys.exit(
            f"metarun: the output directory cannot be written ({error.strerror or error}: {error.filename}); choose "
            "another with hydra.run.dir=DIR (hydra.sweep.dir=DIR for a sweep)."
        )
    except Exception as error:
        if wants_traceback():
            raise
        sys.exit(f"metarun: {type(error).__name__}: {' '.join(str(error).split())} (HYDRA_FULL_ERROR=1 shows where).")
    finally:
        complete = say_how_it_ended()
    if failures or not complete:
        sys.exit(1)
