"""``resume=DIR``: the command that started a run or a sweep, reconstructed from its directory."""

from pathlib import Path

from metarun.command.composing import quoted
from metarun.command.sweep import read_plan
from metarun.command.trust import refuse_distrusted
from metarun.errors import UserError
from metarun.results.status import PLAN, loaded
from metarun.system.files import has_checkpoint

MAY_CHANGE_ON_RESUME = ("device=", "data_dir=", "tracker=", "hydra.job_logging", "hydra.verbose")
MAY_CHANGE_IN_A_SWEEP = (*MAY_CHANGE_ON_RESUME, "hydra/launcher=", "hydra.launcher.")

WITH_A_VALUE = (
    *("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p", "--cfg", "-c"),
    "--experimental-rerun",
)
"""Options of Hydra that are followed by a value."""


def options_first(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separate Hydra's options, with their values, from overrides: Hydra reads no override that follows an option."""
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


def config_dirs(arguments: list[str]) -> list[str]:
    """Return the values of ``--config-dir`` among the arguments."""
    return [
        value
        for option, value in zip(arguments, [*arguments, ""][1:], strict=True)
        if option in ("--config-dir", "-cd") and value
    ] + [a.partition("=")[2] for a in arguments if a.startswith(("--config-dir=", "-cd="))]


def key_of(override: str) -> str:
    """Return the key of an override."""
    return override.partition("=")[0].lstrip("+~")


def kept_by_run(directory: Path) -> tuple[list[str], list[str]]:
    """Return the overrides and the config directories that the run in ``directory`` was started with.

    Raises:
        UserError: there is no run to resume.
    """
    path = directory / ".hydra" / "overrides.yaml"
    if (directory / PLAN).is_file():
        raise UserError(f"{directory} holds a sweep: resume it with metarun -m resume='{directory}'.")
    if not has_checkpoint(directory) or not path.is_file():
        raise UserError(
            f"There is nothing to resume in {directory}: it has no checkpoints/last.pt or no .hydra; name the "
            "directory that the run printed, or start again without resume."
        )
    overrides, settings = loaded(path), loaded(path.with_name("hydra.yaml"))
    try:
        sources = settings["hydra"]["runtime"]["config_sources"]
        folders = [str(source["path"]) for source in sources if source["provider"] == "command-line"]
    except (KeyError, TypeError):
        folders = None
    if folders is None or not isinstance(overrides, list) or not all(isinstance(one, str) for one in overrides):
        raise UserError(f"The files in {path.parent} are not those of a run; start it again without resume.")
    return overrides, folders


def kept_by_sweep(directory: Path) -> tuple[list[str], list[str]]:
    """Return the overrides and the config directories that the sweep in ``directory`` was started with.

    Raises:
        UserError: there is no sweep to resume.
    """
    plan = read_plan(directory)
    if plan is None:
        raise UserError(
            f"There is no sweep to resume in {directory}: it has no {PLAN}; name the directory of a sweep, or leave "
            "out -m to resume a single run."
        )
    return [*plan.hydra, *plan.overrides], plan.config_dirs


def arguments_of_resumed(arguments: list[str]) -> list[str]:
    """Return, for ``resume=DIR``, the overrides and ``--config-dir`` that the run or sweep in DIR was started with.

    The output goes to DIR again. With ``trust=true``, overrides in DIR that could run code are accepted too.

    Raises:
        UserError: DIR holds nothing to resume or something that is not trusted, or a given key would change the run.
    """
    given = [argument for argument in arguments if argument.startswith("resume=")]
    if not given or given[-1] in ("resume=", "resume=null"):
        return arguments
    directory = Path(given[-1].removeprefix("resume=").strip("'\""))
    options, overrides = options_first([argument for argument in arguments if argument not in given])
    sweep = bool({"-m", "--multirun"} & set(options))
    before, folders = (kept_by_sweep if sweep else kept_by_run)(directory)
    trusted = "trust=true" in overrides
    overrides = [override for override in overrides if override not in ("trust=true", "trust=false")]
    changed = [a for a in overrides if not a.startswith(MAY_CHANGE_IN_A_SWEEP if sweep else MAY_CHANGE_ON_RESUME)]
    if changed:
        raise UserError(
            f"{changed[0]} would change the {'sweep' if sweep else 'run'} in {directory}: resume with no other keys "
            f"than device, data_dir and tracker{', and those of the launcher' if sweep else ''}, or start a new one."
        )
    replaced = {"resume", *map(key_of, overrides)}
    if not trusted:
        refuse_distrusted(directory, before, [*replaced], folders, bool(config_dirs(arguments)))
    if not config_dirs(arguments):
        options += [word for folder in folders for word in ("--config-dir", folder)]
    kept = [override for override in before if key_of(override) not in replaced]
    place = [f"hydra.sweep.dir={quoted(directory)}"]
    if not sweep:
        place = [f"resume={quoted(directory)}", f"hydra.run.dir={quoted(directory)}"]
    return [*options, *kept, *overrides, *place]
