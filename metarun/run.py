"""One run from configuration to tables and plots."""

import logging
import math
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from metarun.assemble import assemble
from metarun.checks.diagnosis import step_size_remedy
from metarun.engine.process import reset_peak_memory, settings_of
from metarun.engine.processes import connected
from metarun.errors import UserError
from metarun.evaluation import Tested, meta_test, metrics_of, pooled_metrics
from metarun.loop import meta_train
from metarun.results import drawer
from metarun.results.examples import write_examples
from metarun.results.of_run import (
    identity_columns,
    measured_columns,
    say,
    write_adaptation,
    write_confusion,
    write_reports,
    write_training,
)
from metarun.results.status import mark
from metarun.results.tables import Watcher, write_episodes, write_pooled, write_results
from metarun.results.trackers import Trackers
from metarun.state import Best
from metarun.system.torchrun import rank

log = logging.getLogger(__name__)


def run(
    config: DictConfig,
    names: dict[str, str],
    directory: Path,
    resume: bool | None = None,
    typed: Collection[str] | None = None,
    watchers: Sequence[Watcher] = (),
    number: int | None = None,
) -> float:
    """Meta-train, select, meta-test; write tables and pictures into ``directory``.

    ``resume`` says whether to go on from the checkpoint in ``directory``; None leaves that to ``config.resume``.
    ``typed`` are the keys that the user set (see `assemble`). ``watchers`` follow meta-training. ``number`` is that of
    a job of a sweep, which decides its GPU where there are several.
    ``result.csv`` says ``running`` from the beginning, and is written again as the last of all files.

    Returns:
        The validation score of the selected parameters, which a sweeper may optimise; of several replicas, the best.

    Raises:
        UserError: anything that the user can fix.
        Interrupted: the user stopped the run.
        Pruned: a watcher has ended the run.
    """
    with settings_of(config), ExitStack() as stack:
        experiment = assemble(config, names, typed, number)
        if ":" in experiment.device:
            torch.cuda.set_device(experiment.device)
        stack.enter_context(connected(experiment.device))
        reset_peak_memory(experiment.device)
        rows = [identity_columns(experiment, i, directory.name) for i in range(len(experiment.replicas))]
        mark(directory, rows, "running")
        tracker = stack.enter_context(Trackers(config, directory))
        stack.callback(drawer.forget)
        finished: list[tuple[dict[str, Any], Tested]] = []
        try:
            again = config.resume is not None if resume is None else resume
            training = meta_train(experiment, directory, again, (tracker, *watchers))
            if rank() != 0:
                # Process 0 tests, and writes what there is to keep.
                return math.nan
            trained: list[tuple[dict[str, Any], Best]] = []
            for row, best in zip(rows, training.best, strict=True):
                diverged = not bool(training.train_state["weights"][row["replica"]].isfinite().all())
                if best is None or diverged or not math.isfinite(best.val_score):
                    row["status"] = "failed"
                else:
                    trained.append((row, best))
            if trained:
                # Before the test, so that they are drawn while it goes on.
                write_training(experiment, training, trained, directory)
                write_examples(experiment, trained[0][0]["replica"], trained[0][1].theta, directory)
            for row, best in trained:
                replica = experiment.replicas[row["replica"]]
                tested = meta_test(experiment, replica, best.theta)
                row |= measured_columns(experiment, replica, training, best, tested)
                finished.append((row, tested))
            if not finished:
                raise UserError(f"Every replica diverged; {step_size_remedy(experiment)}.")
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            mark(directory, rows, "interrupted" if stopped else "failed")
            raise
        scored = [(row["replica"], tested.scored) for row, tested in finished]
        write_episodes(directory, scored, metrics_of(experiment))
        write_pooled(directory, [(row["replica"], tested.pooled) for row, tested in finished])
        write_adaptation(experiment, finished, directory)
        for row, tested in finished:
            say(experiment, row, tested)
        write_confusion(experiment, finished, directory)
        write_reports(experiment, [(row["replica"], best.theta) for row, best in trained], directory)
        drawer.finish()
        write_results(directory, rows, (*metrics_of(experiment), *pooled_metrics(experiment)))
        tracker.tested(rows, training.step)
        for row in rows:
            if row["status"] == "failed":
                log.warning("  %s diverged and has no score; lower its step size, or set train.clip=1", row["varied"])
        log.info("  files: %s", directory)
        scores: list[float] = [row["val_score"] for row, _ in finished]
        return max(scores) if experiment.family.spec.metrics[0].higher_is_better else min(scores)
