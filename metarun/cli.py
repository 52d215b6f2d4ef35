"""The command ``metarun``: Hydra's entry point and the boundary where errors become sentences.

torch is imported only once a configuration is composed, so help, completion and most errors come at once.
"""

import difflib
import errno
import logging
import os
import sys
import traceback
from itertools import pairwise
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metarun.command.help import help_text
from metarun.config import check_ranges, register_schema
from metarun.errors import UserError

log = logging.getLogger(__name__)

MAY_CHANGE_ON_RESUME = ("device=", "data_dir=", "hydra.job_logging", "hydra.verbose")

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

WITH_A_VALUE = (
    *("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p", "--cfg", "-c"),
    "--experimental-rerun",
)
"""Hydra's options that are followed by a value."""

failures: list[str] = []
"""Jobs of this process that ended without a result; a sweep goes on past them."""


def wants_traceback() -> bool:
    """Whether the user asked for tracebacks."""
    return os.environ.get("METARUN_FULL_ERROR") == "1"


def fail(sentence: str) -> None:
    """Note that a job failed, and say why, on the screen and in ``run.log``."""
    failures.append(sentence)
    log.error("metarun: %s", " ".join(sentence.split()))


def sentence_of_system_error(error: OSError, directory: Path) -> str | None:
    """What the system refused and what to do, in one sentence; None where the error says neither file nor reason.

    A run writes into its ``directory`` and reads elsewhere, so a path tells a full disk from missing data.
    """
    reason = error.strerror or str(error)
    path = None if error.filename is None else Path(os.fsdecode(error.filename))
    place = "" if path is None else f" ({path})"
    own = path is not None and path.absolute().is_relative_to(directory.absolute())
    if own or error.errno in NO_ROOM:
        return (
            f"The system refused: {reason}{place}; make room or choose another place with hydra.run.dir=DIR. What was "
            "written before is whole."
        )
    if path is None:
        return None
    if isinstance(error, FileNotFoundError):
        return f"There is no {path}, which the run needs; put it there, or change the key that names it."
    return f"{path} cannot be used: {reason}; mend that, or change the key that names it."


def job(config: DictConfig) -> float:
    """One run inside Hydra; returns the validation score, or NaN for a run that failed."""
    try:
        # Here too, because whoever mistyped a number should not wait for torch.
        check_ranges(config)
    except UserError as error:
        if wants_traceback():
            raise
        fail(str(error))
        return float("nan")
    from metarun.loop import Interrupted
    from metarun.run import run

    failed_before = len(failures)
    state = HydraConfig.get()
    directory = Path(state.runtime.output_dir)
    if Path.cwd() in directory.parents:
        directory = directory.relative_to(Path.cwd())
    names = {group: state.runtime.choices[group] for group in ("algo", "task", "model")}
    try:
        return run(config, names, directory)
    except UserError as error:
        if wants_traceback():
            raise
        fail(str(error))
    except (Interrupted, KeyboardInterrupt) as error:
        if (directory / "checkpoints" / "last.pt").exists():
            log.info("Stopped; go on with: metarun resume='%s'", directory)
        raise KeyboardInterrupt from error
    except Exception as error:
        if wants_traceback():
            raise
        sentence = sentence_of_system_error(error, directory) if isinstance(error, OSError) else None
        if sentence is None:
            (directory / "error.txt").write_text(traceback.format_exc())
            sentence = f"{type(error).__name__}: {error} (the traceback is in {directory / 'error.txt'})."
        fail(sentence)
    assert len(failures) > failed_before
    return float("nan")


def sentence_of(error: BaseException) -> str:
    """What Hydra's and OmegaConf's errors mean, in one sentence."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"There is no {group}={name}; choose one of: {', '.join(error.options)}."
    if isinstance(error, OverrideParseException):
        return (
            f"The argument {error.override!r} cannot be read: write KEY=VALUE, with quotes around special characters."
        )
    if isinstance(cause, OmegaConfBaseException) and cause.key is not None:
        key = str(cause.full_key or cause.key)
        parent = cause.parent_node
        if type(cause).__name__ in ("ConfigAttributeError", "ConfigKeyError"):
            prefix = key.rpartition(".")[0]
            siblings = list(parent) if isinstance(parent, DictConfig) and not parent._is_none() else []
            close = difflib.get_close_matches(str(cause.key), [str(sibling) for sibling in siblings], 1)
            hint = (
                f"did you mean {prefix + '.' if prefix else ''}{close[0]}?"
                if close
                else "metarun --help lists the keys."
            )
            if prefix in ("algo", "task", "model"):
                hint += f" (+{key}=... sets one that {parent.get('_target_')} takes and its YAML does not list)"
            return f"There is no key {key}; {hint}"
        return f"{key}: {str(cause.msg or cause).splitlines()[0]}."
    text = " ".join(str(error).split())
    return text if text.endswith(".") else f"{text}."


class RefuseUsedDirectory(Callback):
    """Keep a new run out of the directory of another one, before Hydra writes anything there."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the directory of a single run."""
        if config.resume is None:
            self.check(config, "hydra.run.dir", "checkpoints/last.pt", "result.csv")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the directory of a sweep."""
        self.check(config, "hydra.sweep.dir", "*/checkpoints/last.pt", "*/result.csv")

    def check(self, config: DictConfig, key: str, *patterns: str) -> None:
        """Leave with a sentence if the directory under ``key`` holds a run."""
        HydraConfig.instance().set_config(config)
        directory = Path(str(OmegaConf.select(config, key)))
        if any(True for pattern in patterns for _ in directory.glob(pattern)):
            # Hydra turns an exception of a callback into a warning and goes on; SystemExit passes.
            sys.exit(f"metarun: {directory} holds a run already; continue it with resume=DIR, or choose another {key}.")


def options_first(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's options with their values, and the overrides: it reads no override that stands after an option."""
    options, overrides = [], []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        options.append(argument)
        if rest and (argument in WITH_A_VALUE or (argument in ("--info", "-i") and "=" not in rest[0])):
            options.append(rest.pop(0))
    return options, overrides


def arguments_of_resumed_run(arguments: list[str]) -> list[str]:
    """For ``resume=DIR``: the overrides and ``--config-dir`` that the run began with, all written to DIR.

    Raises:
        UserError: DIR is not the directory of a run, or keys are given that would make it another run.
    """
    given = [argument for argument in arguments if argument.startswith("resume=")]
    if not given or given[-1] in ("resume=", "resume=null"):
        return arguments
    directory = Path(given[-1].removeprefix("resume=").strip("'\""))
    path = directory / ".hydra" / "overrides.yaml"
    if not (directory / "checkpoints" / "last.pt").is_file() or not path.is_file():
        raise UserError(
            f"There is nothing to resume in {directory}: it has no checkpoints/last.pt or no .hydra; name the "
            "directory that the run printed, or start again without resume."
        )
    before = [str(override) for override in OmegaConf.load(path)]
    quoted = "'" + str(directory).replace("\\", "\\\\").replace("'", "\\'") + "'"
    options, overrides = options_first([argument for argument in arguments if argument not in given])
    changed = [a for a in overrides if not a.startswith(MAY_CHANGE_ON_RESUME)]
    if changed:
        raise UserError(
            f"{changed[0]} would make the run in {directory} another one: resume with no other keys than device and "
            "data_dir, or start a new run."
        )
    if not config_dirs(arguments):
        sources = OmegaConf.select(OmegaConf.load(path.with_name("hydra.yaml")), "hydra.runtime.config_sources")
        for source in sources:
            if source.provider == "command-line":
                options += ["--config-dir", source.path]
    kept = [override for override in before if not override.startswith("resume=")]
    return [*options, *kept, *overrides, f"resume={quoted}", f"hydra.run.dir={quoted}"]


def config_dirs(arguments: list[str]) -> list[str]:
    """The values of ``--config-dir`` among the arguments."""
    return [value for option, value in pairwise([*arguments, ""]) if option in ("--config-dir", "-cd") and value] + [
        a.partition("=")[2] for a in arguments if a.startswith(("--config-dir=", "-cd="))
    ]


def main() -> Any:
    """Entry point of ``metarun``; exits with 1 after an error, 130 after an interruption."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        try:
            print(help_text(config_dirs(arguments)), flush=True)
        except BrokenPipeError:
            # A pager was closed early; what is left in the buffer must go nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    # Hydra would print and exit by itself; this makes it raise, so that one place makes sentences of errors.
    os.environ["METARUN_FULL_ERROR"] = os.environ.get("HYDRA_FULL_ERROR", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # A log that cannot be written (a full disk) must not bury the sentence under tracebacks of its own.
    logging.raiseExceptions = wants_traceback()
    # As with python -m: what stands in the current folder can be named by _target_.
    sys.path.append(str(Path.cwd()))
    try:
        options, overrides = options_first(arguments_of_resumed_run(arguments))
        sys.argv[1:] = [*options, *overrides]
        register_schema(*map(Path, config_dirs(options)))
        entry = hydra.main(version_base="1.3", config_path="pkg://metarun.conf", config_name="config")
        entry(job)()
    except KeyboardInterrupt:
        sys.exit(130)
    except (HydraException, OmegaConfBaseException, UserError) as error:
        if wants_traceback():
            raise
        sys.exit(f"metarun: {sentence_of(error)}")
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
    if failures:
        sys.exit(1)
