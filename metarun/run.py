"""One run from configuration to tables and plots."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

import metarun
from metarun.assemble import Experiment, Replica, assemble
from metarun.config import config_hash
from metarun.contracts import Tree
from metarun.engine.batch import adapted_parameters
from metarun.engine.process import peak_memory_mb, reset_peak_memory, settings_of
from metarun.engine.replicas import label
from metarun.errors import UserError
from metarun.evaluation import Tested, meta_test, observe, second_metric
from metarun.loop import meta_train
from metarun.results.observations import described, plot_observed, write_observed
from metarun.results.plots import plot_adaptation, plot_training
from metarun.results.tables import format_score, format_score_ci, write_episodes, write_results
from metarun.state import Best, Training
from metarun.tree import learned, leaves, size

log = logging.getLogger(__name__)

FAMILY_NAMES = {"agnostic": "model-agnostic", "dependent": "model-dependent", "baseline": "baseline"}


def identity_columns(experiment: Experiment, index: int, run: str) -> dict[str, Any]:
    """The columns of ``result.csv`` that are known of a replica before training."""
    replica = experiment.replicas[index]
    config, spec = replica.config, experiment.family.spec
    return {
        "run": run,
        "algo": experiment.names["algo"],
        "family": experiment.algorithm.family,
        "task": experiment.names["task"],
        "dataset": experiment.family.dataset,
        "model": experiment.names["model"],
        "seed": config.seed,
        "ways": spec.ways,
        "shots": spec.shots,
        "queries": spec.queries,
        "metric": spec.metric,
        "meta_batch": config.train.meta_batch,
        "device": torch.cuda.get_device_name(experiment.device) if experiment.device != "cpu" else "cpu",
        "torch_version": torch.__version__,
        "metarun_version": metarun.__version__,
        "config_hash": config_hash(config),
        "higher_is_better": spec.higher_is_better,
        "precision": config.train.precision.name,
        "replica": index,
        "varied": label(replica.differs),
    }


def measured_columns(
    experiment: Experiment, replica: Replica, training: Training, best: Best, tested: Tested
) -> dict[str, Any]:
    """The columns of ``result.csv`` that a finished replica adds; times are those of all replicas together."""
    theta, scores, steps = best.theta, tested.scored.scores, tested.scored.adapt_steps
    second_name = second_metric(experiment)
    second = tested.scored.second_scores[:, -1] if second_name else None
    trained_tasks = training.step * experiment.config.train.meta_batch * len(experiment.replicas)
    return {
        "status": "completed",
        "adapt_steps": steps[-1],
        "score_before": scores[:, 0].mean().item() if steps[0] == 0 < steps[-1] else None,
        "score": scores[:, -1].mean().item(),
        "ci95": confidence(scores)[-1].item(),
        "second_metric": second_name,
        "second_score": None if second is None else second.mean().item(),
        "second_ci95": None if second is None else confidence(second).item(),
        "n_episodes": len(scores),
        "episodes_hash": tested.episodes_hash,
        "transductive": tested.transductive,
        "val_score": best.val_score,
        "selected_step": best.step,
        "meta_steps": training.step,
        "train_seconds": round(training.seconds, 3),
        "compile_seconds": round(training.compile_seconds, 3),
        "engine": training.engine,
        "task_map": training.task_map,
        "test_seconds": round(tested.seconds, 3),
        "tasks_per_second": round(trained_tasks / training.step_seconds, 1) if training.step else None,
        "adapt_ms_per_task": round(tested.adapt_ms_per_task, 4),
        "peak_memory_mb": round(peak_memory_mb(experiment.device), 1),
        "meta_parameters": size(learned(theta)) if experiment.algorithm.meta_learns else 0,
        "adapted_parameters": adapted_parameters(replica.algorithm, theta),
        "dtype": str(next(leaves(theta), torch.empty(0)).dtype).removeprefix("torch."),
    }


def confidence(scores: Tensor) -> Tensor:
    """Half-width of the 95 % confidence interval of the mean over the first axis."""
    half_width: Tensor = 1.96 * scores.std(0) / len(scores) ** 0.5
    return half_width


def setting_of(experiment: Experiment) -> str:
    """Ways and shots in words."""
    spec = experiment.family.spec
    return f"{spec.ways}-way {spec.shots}-shot" if spec.ways else f"{spec.shots}-shot"


def report(experiment: Experiment, row: dict[str, Any], tested: Tested) -> None:
    """Print a replica's row for people."""
    spec, metric = experiment.family.spec, row["metric"]
    before = (
        "no score without a support set" if row["score_before"] is None else format_score(row["score_before"], metric)
    )
    steps, scores = row["adapt_steps"], tested.scored.scores
    after = "after the support set" if row["score_before"] is None else f"after {steps} step{'s' * (steps != 1)}"
    log.info("")
    log.info(
        "%s (%s) on %s, %s, %s test episodes of %s%s",
        row["algo"],
        FAMILY_NAMES[row["family"]],
        row["task"],
        setting_of(experiment),
        row["n_episodes"],
        row["dataset"],
        f", {row['varied']}" if row["varied"] else "",
    )
    if steps == 0:
        after = "without a support set"
    else:
        log.info("  %s before adaptation   %s", metric, before)
    log.info(
        "  %s %s   %s   (95 %% CI over episodes)",
        metric,
        after,
        format_score_ci(row["score"], row["ci95"], metric),
    )
    if second := row["second_metric"]:
        log.info("  %s %s   %s", second, after, format_score_ci(row["second_score"], row["second_ci95"], second))
    diverged = int((~scores[:, -1].isfinite()).sum())
    if diverged:
        log.warning("  %d of %d episodes diverged: their score is not a number", diverged, row["n_episodes"])
    if len(tested.scored.adapt_steps) > 1:
        change = scores[:, -1] - scores[:, 0]
        worse = int(((change < 0) if spec.higher_is_better else (change > 0)).sum())
        if worse:
            log.info("  %d of %d episodes score worse after adaptation than before", worse, row["n_episodes"])
    log.info(
        "  step %s of %s selected by validation (%s), trained in %.0f s, tested in %.1f s",
        row["selected_step"],
        row["meta_steps"],
        format_score(row["val_score"], metric),
        row["train_seconds"],
        row["test_seconds"],
    )


def write_pictures(
    experiment: Experiment, training: Training, finished: list[tuple[dict[str, Any], Tested]], directory: Path
) -> None:
    """``training.png`` and ``adaptation.png``, a line for each replica that finished."""
    first = finished[0][0]
    title = f"{first['algo']} on {first['task']}"
    if len(finished) == 1:
        title += f", {first['varied'] or 'seed ' + str(first['seed'])}"
    if training.step:
        curves = [(row["varied"], training.rows[row["replica"]], row["selected_step"]) for row, _ in finished]
        plot_training(directory / "training.png", title, first["metric"], curves)
    lines = []
    for row, tested in finished:
        scores = tested.scored.scores
        lines.append((row["varied"], scores.mean(0).tolist(), confidence(scores).tolist()))
    steps = finished[0][1].scored.adapt_steps
    plot_adaptation(directory / "adaptation.png", title, first["metric"], steps, lines)


def write_observations(experiment: Experiment, thetas: list[tuple[int, Tree]], directory: Path) -> None:
    """What the algorithm shows beside its scores, if anything: a table of all replicas, a picture and lines of one."""
    observation = experiment.algorithm.observation
    if observation is None:
        return
    observed = [observe(experiment, index, theta) for index, theta in thetas]
    write_observed(directory / f"{observation.name}.csv", observed)
    title = f"{experiment.names['algo']} on {experiment.names['task']}"
    if len(observed) > 1:
        first = label(experiment.replicas[observed[0].replica].differs)
        title += f", {first}"
        log.info("  of %s:", first)
    plot_observed(directory / f"{observation.name}.png", title, observed[0])
    for line in described(observed[0]):
        log.info("  %s", line)


def run(config: DictConfig, names: dict[str, str], directory: Path) -> float:
    """Meta-train, select, meta-test; write tables and pictures into ``directory``.

    Returns:
        The validation score of the selected parameters, which a sweeper may optimise; of several replicas, the best.

    Raises:
        UserError: anything that the user can fix.
        Interrupted: the user stopped the run.
    """
    with settings_of(config):
        experiment = assemble(config, names)
        if ":" in experiment.device:
            torch.cuda.set_device(experiment.device)
        reset_peak_memory(experiment.device)
        rows = [identity_columns(experiment, i, directory.name) for i in range(len(experiment.replicas))]
        finished: list[tuple[dict[str, Any], Tested]] = []
        try:
            training = meta_train(experiment, directory, resume=config.resume is not None)
            for row, replica, best in zip(rows, experiment.replicas, training.best, strict=True):
                diverged = not bool(training.state["weights"][row["replica"]].isfinite().all())
                if best is None or diverged or not math.isfinite(best.val_score):
                    row["status"] = "failed"
                    continue
                tested = meta_test(experiment, replica, best.theta)
                row |= measured_columns(experiment, replica, training, best, tested)
                finished.append((row, tested))
            if not finished:
                raise UserError("Every replica diverged; lower train.lr or algo.inner_lr, or set train.clip=1.")
        except BaseException as error:
            if not (directory / "result.csv").exists():
                stopped = type(error).__name__ in ("Interrupted", "KeyboardInterrupt")
                write_results(directory, [row | {"status": "interrupted" if stopped else "failed"} for row in rows])
            raise
        scored = [(row["replica"], tested.scored) for row, tested in finished]
        write_episodes(directory, scored, second_metric(experiment) is not None)
        write_results(directory, rows)
        write_pictures(experiment, training, finished, directory)
        for row, tested in finished:
            report(experiment, row, tested)
        thetas = [(row["replica"], training.best[row["replica"]]) for row, _ in finished]
        write_observations(experiment, [(index, best.theta) for index, best in thetas if best], directory)
        for row in rows:
            if row["status"] == "failed":
                log.warning("  %s diverged and has no score; lower its step size, or set train.clip=1", row["varied"])
        log.info("  files: %s", directory)
        scores: list[float] = [row["val_score"] for row, _ in finished]
        return max(scores) if experiment.family.spec.higher_is_better else min(scores)
