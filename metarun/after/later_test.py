"""``metarun-test``: a finished run tested again, with other shots, steps, episodes or data."""

import argparse
import hashlib
import logging
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from metarun.after.load import Learned, best_file, best_of, learned_in, read_best, recomposed
from metarun.assemble import Experiment, Replica, build_family, choose_device
from metarun.command.resume import key_of
from metarun.command.trust import refuse_links
from metarun.config import check_ranges, config_hash
from metarun.contracts import Family, Moments, Spec
from metarun.data.portable import plain
from metarun.engine.process import reset_peak_memory, settings_of
from metarun.engine.replicas import replica_configs
from metarun.errors import UserError
from metarun.evaluation import meta_test, metrics_of, pooled_metrics
from metarun.results.of_run import (
    identity_columns,
    say,
    tested_columns,
    write_adaptation,
    write_confusion,
    write_reports,
)
from metarun.results.status import TESTS, loaded, number, rows_of, state_of
from metarun.results.tables import SEPARATOR, write_episodes, write_pooled, write_results
from metarun.system.files import write_text
from metarun.system.terminal import PrintableRecord, printable

log = logging.getLogger(__name__)

MAY_CHANGE = ("eval", "task", "data_dir", "device")
ELSEWHERE = ("data_dir", "device")
"""Keys that change where a test runs and where its data are, but not its configuration."""
OF_TRAINING = (
    *("val_score", "selected_step", "meta_steps", "train_seconds", "compile_seconds"),
    *("engine", "task_map", "tasks_per_second"),
)
"""Columns of ``result.csv`` that tell of the training; they are taken over from the run."""


def equal(a: Any, b: Any) -> bool:
    """Whether two plain forms (`metarun.data.portable`) are equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    same = a == b if type(a) is type(b) else False
    return bool(same) if isinstance(same, bool) else bool(same.all())


def check_spec(trained: Learned, family: Family) -> None:
    """Raise an error unless a learner can be tested on a family.

    Raises:
        UserError: inputs or targets differ from those that it was trained with, or it cannot take the steps.
    """
    before, now, algo = trained.spec, family.spec, trained.names["algo"]

    def of(spec: Spec) -> Any:
        # A policy may be tested for longer.
        return spec.inputs.observation if isinstance(spec.inputs, Moments) else plain(spec.inputs)

    if not equal(of(before), of(now)):
        raise UserError(
            f"The inputs of {family.dataset} are {now.inputs}, and the learner was trained on {before.inputs} "
            f"({trained.dataset}); test it on data of the same kind."
        )
    if type(before.target) is not type(now.target):
        raise UserError(
            f"The targets of {family.dataset} are {now.target}, and the learner has learned {before.target}."
        )
    for what in ("names", "shift", "scale"):
        known, found = (getattr(spec.target, what, None) for spec in (before, now))
        if known != found:
            raise UserError(
                f"The targets of {family.dataset} have the {what} {found}, and the learner has learned others, "
                f"{known}; test it on data with the same targets."
            )
    if before.target.outputs != now.target.outputs and not trained.algorithm.open_ways:
        raise UserError(
            f"algo={algo} has {before.target.outputs} outputs, and {family.dataset} has {now.target.outputs}: set "
            f"task.ways={before.target.outputs}, or choose an algorithm that makes its head from the examples, such as "
            "protonet."
        )


def check_units(trained: Family | None, family: Family) -> None:
    """Raise an error if a test has classes or tasks that the run was trained on, or validated with.

    Raises:
        UserError: the sentence names one of them.
    """
    none: dict[str, frozenset[str]] = {}
    before, now = getattr(trained, "units", none), getattr(family, "units", none)
    # What the run itself was tested on may have the name of something that it was trained on.
    new = now.get("test", frozenset()) - before.get("test", frozenset())
    known = {part: before.get(part, frozenset()) & new for part in ("train", "val")}
    again = sorted(known["train"] | known["val"])
    if again:
        raise UserError(
            f"The run was {'trained' if known['train'] else 'validated'} on {len(again)} of the {len(now['test'])} "
            f"classes or tasks of this test, such as {again[0]}; leave the split as it was in training (where classes "
            "are few, task.ways and task.shots can change it, too), or train again."
        )


def check_steps(trained: Learned, steps: int) -> None:
    """Raise an error if a method cannot take so many adaptation steps.

    Raises:
        UserError: it has learned fewer.
    """
    most = trained.algorithm.max_steps
    if most is not None and steps > most:
        raise UserError(
            f"algo={trained.names['algo']} has learned {most} steps of adaptation and cannot take "
            f"eval.adapt_steps={steps}: set eval.adapt_steps={most}."
        )


def overrides_of_run(directory: Path) -> list[str]:
    """Return the overrides that a run was started with, as text; none if they cannot be read."""
    found = loaded(directory / ".hydra" / "overrides.yaml")
    return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []


def failed_replicas(directory: Path) -> set[str]:
    """Return the numbers of the replicas that a completed run calls failed; none if there is no ``result.csv``.

    ``best.pt`` also holds what was selected before a replica diverged, and what a run has that has not ended yet.

    Raises:
        UserError: the run has not completed, so that its parameters are not those of its configuration.
    """
    rows = rows_of(directory / "result.csv") if directory.is_dir() else []
    state, reason = state_of(directory, rows) if rows else ("completed", "")
    if state != "completed":
        raise UserError(
            f"The run in {directory} has not completed ({': '.join(part for part in (state, reason) if part)}): let it "
            f"end, continue it with metarun resume='{directory}', or test a copy of its checkpoints/best.pt with --out."
        )
    return {row.get("replica") or "0" for row in rows if row.get("status") == "failed"}


def training_columns(directory: Path, trained: Learned, tested: int) -> dict[str, Any]:
    """Return what ``result.csv`` of a run says about the training of a replica, or what its checkpoint says.

    The seconds are those of the ``tested`` replicas together, as a comparison shares them out among a table's rows.
    """
    rows = rows_of(directory / "result.csv") if directory.is_dir() else []
    row = next((row for row in rows if row.get("replica") == str(trained.replica)), {})
    found: dict[str, Any] = {}
    for name in OF_TRAINING:
        value = number(row.get(name))
        found[name] = (row.get(name) or None) if value is None else int(value) if value.is_integer() else value
    if rows and isinstance(found["train_seconds"], int | float):
        found["train_seconds"] = round(found["train_seconds"] * tested / len(rows), 3)
    return found | {"val_score": trained.val_score, "selected_step": trained.step}


def later_test(
    path: Path,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    trust: bool = False,
    config_dir: str | Path | None = None,
) -> Path:
    """Test a run's learner again, and write ``result.csv``, ``episodes.csv``, ``adaptation.png`` and the reports.

    Args:
        path: the directory of the run, or a copy of its ``best.pt``.
        overrides: changes of ``task``, ``eval``, ``data_dir`` and ``device``.
        out: where to write; None: a directory in the run's folder ``tests`` that is named after the overrides.
        trust: whether the checkpoint may name code outside the installed configuration.
        config_dir: the directory of your own configuration, if the run was started with one.

    Returns:
        The directory that was written.

    Raises:
        UserError: anything that the user can fix.
    """
    for one in overrides:
        if "=" not in one or key_of(one).partition(".")[0] not in MAY_CHANGE:
            raise UserError(
                f"{one} cannot be changed after training; metarun-test takes keys of task and eval, data_dir, device."
            )
    if not path.exists():
        raise UserError(f"There is no {path}; name the directory of a run, or a copy of its best.pt.")
    if out is None:
        if not path.is_dir():
            raise UserError(f"{path} is a file; say with --out where to write the test.")
        out = path / TESTS / (re.sub(r"[^A-Za-z0-9_.=,\[\]-]+", "_", ",".join(overrides))[:120] or "as_trained")
    if (out / "result.csv").exists():
        raise UserError(f"{out} holds a test already; choose another directory with --out.")
    if path.is_dir() and not trust:
        for folder in (path, path / TESTS, out):
            refuse_links(folder)
    failed = failed_replicas(path)
    device_given = [one.partition("=")[2] for one in overrides if key_of(one) == "device"]
    device = choose_device(device_given[-1] if device_given else "auto")
    content, place = read_best(path, device), best_file(path)
    elsewhere = [one for one in overrides if key_of(one) == "data_dir"]
    as_trained, _ = recomposed(content, place, elsewhere, config_dir, trust)
    config, names = recomposed(content, place, overrides, config_dir, trust)
    check_ranges(config)
    with settings_of(config):
        reset_peak_memory(device)
        found = [
            learned_in(content, place, as_trained, content["names"], device, index)
            for index, best in enumerate(best_of(content))
            if best is not None and str(index) not in failed
        ]
        if not found:
            raise UserError(f"{place} has no parameters that validation selected; train again.")
        # Sizes that nobody typed give way to the data, as they did in the run.
        typed = [key_of(one) for one in (*overrides_of_run(path), *overrides)]
        family = build_family(config, device, typed, found[0].converter)
        check_spec(found[0], family)
        if hasattr(family, "units") and any(key_of(one).startswith("task.") for one in overrides):
            trained, of_run = None, [key_of(one) for one in overrides_of_run(path)]
            # If the data of the run are gone, those of the test are others.
            with suppress(UserError):
                trained = build_family(as_trained, device, of_run, found[0].converter)
            check_units(trained, family)
            del trained
        check_steps(found[0], config.eval.adapt_steps)
        configs = replica_configs(config)
        replicas = [Replica(*configs[one.replica], one.model, one.algorithm, one.replica) for one in found]
        experiment = Experiment(config, names, family, replicas, replicas[0].algorithm, {}, device)
        hashes = [config_hash(own) for own, _ in replica_configs(as_trained)]
        changes = [one for one in overrides if key_of(one) not in ELSEWHERE]
        test_and_write(experiment, found, path, out, hashes, changes)
    given = {key_of(one) for one in overrides}
    before = overrides_of_run(path) or [f"{group}={name}" for group, name in names.items()]
    kept = [one for one in before if key_of(one) not in given]
    write_text(out / ".hydra" / "overrides.yaml", yaml.safe_dump([*kept, *overrides]))
    write_text(out / ".hydra" / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    log.info("  files: %s", out)
    return out


def identity_of_test(trained: str, now: str, changes: Sequence[str]) -> dict[str, str]:
    """Return the columns that say what was tested, given the hashes of the configuration in training and now.

    A run that was trained with what a test has changed is another one, though its configuration is that of the test.
    """
    if now == trained:
        return {"config_hash": trained, "tested": ""}
    both = hashlib.sha256(f"{trained} tested as {now}".encode()).hexdigest()[:12]
    return {"config_hash": both, "tested": SEPARATOR.join(changes)}


def test_and_write(
    experiment: Experiment,
    found: Sequence[Learned],
    path: Path,
    out: Path,
    trained: Sequence[str],
    changes: Sequence[str],
) -> None:
    """Test every learner of a run, and write tables, a picture and reports; ``result.csv`` comes last.

    ``trained`` has the hash of the configuration of each replica in training, and ``changes`` what is different now.
    """
    finished, metrics = [], metrics_of(experiment)
    name = (path if path.is_dir() else best_file(path)).resolve().name
    for index, one in enumerate(found):
        tested = meta_test(experiment, experiment.replicas[index], one.theta)
        row = identity_columns(experiment, index, name) | training_columns(path, one, len(found))
        row |= tested_columns(experiment, experiment.replicas[index], one.theta, tested)
        row |= identity_of_test(trained[one.replica], str(row["config_hash"]), changes)
        finished.append((row, tested))
    write_episodes(out, [(row["replica"], tested.scored) for row, tested in finished], metrics)
    write_pooled(out, [(row["replica"], tested.pooled) for row, tested in finished])
    write_adaptation(experiment, finished, out)
    for row, tested in finished:
        say(experiment, row, tested)
    write_confusion(experiment, finished, out)
    write_reports(experiment, [(index, one.theta) for index, one in enumerate(found)], out)
    write_results(out, [row for row, _ in finished], (*metrics, *pooled_metrics(experiment)))


def main() -> None:
    """Entry point of ``metarun-test``."""
    parser = argparse.ArgumentParser(
        prog="metarun-test",
        description="Test a finished run again, with other shots, steps, episodes or data: metarun-test DIR "
        "task.shots=5 eval.adapt_steps=20",
    )
    parser.add_argument("run", type=Path, metavar="DIR", help="directory of a run, or a copy of its best.pt")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of task and eval, data_dir, device")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (a directory in DIR/tests)")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="your own configuration, as for metarun")
    arguments = parser.parse_intermixed_args()
    trust = "trust=true" in arguments.overrides
    overrides = [one for one in arguments.overrides if one not in ("trust=true", "trust=false")]
    logging.setLogRecordFactory(PrintableRecord)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    # As with the command, _target_ can name modules in the current folder.
    sys.path.append(str(Path.cwd()))
    try:
        with suppress(BrokenPipeError):
            later_test(arguments.run, overrides, arguments.out, trust, arguments.config_dir)
    except UserError as error:
        sys.exit(printable(f"metarun-test: {error}"))
    except OSError as error:
        sys.exit(
            printable(f"metarun-test: {error.strerror or error}: {error.filename}; choose another place with --out.")
        )
