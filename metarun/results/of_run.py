"""The results of a finished run: rows, tables, figures and lines on the screen."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import metarun
from metarun.assemble import Experiment, Replica
from metarun.contracts import Tree
from metarun.engine.batch import adapted_parameters
from metarun.engine.process import peak_memory_mb
from metarun.engine.replicas import label
from metarun.evaluation import Tested, measured, metrics_of, pooled_metrics, reports_of
from metarun.results import drawer
from metarun.results.confusion import confused, described_confusion, plot_confused, write_confused
from metarun.results.plots import plot_adaptation, plot_training
from metarun.results.reports import described, plot_measured, write_measured
from metarun.results.tables import SEPARATOR
from metarun.state import Best, Training
from metarun.tree import learned, leaves, size

log = logging.getLogger(__name__)

FAMILY_NAMES = {"agnostic": "model-agnostic", "dependent": "model-dependent", "baseline": "baseline"}


def identity_columns(experiment: Experiment, index: int, run: str) -> dict[str, Any]:
    """Return the columns of ``result.csv`` that are known about a replica before training."""
    replica, metrics = experiment.replicas[index], (*metrics_of(experiment), *pooled_metrics(experiment))
    config, spec = replica.config, experiment.family.spec
    return {
        "run": run,
        "algo": experiment.names["algo"],
        "family": experiment.algorithm.approach,
        "task": experiment.names["task"],
        "dataset": experiment.family.dataset,
        "model": experiment.names["model"],
        "seed": config.seed,
        "ways": spec.sizes.ways,
        "shots": spec.sizes.shots,
        "queries": spec.sizes.queries,
        "metric": spec.metrics[0].name,
        "meta_batch": config.train.meta_batch,
        "device": torch.cuda.get_device_name(experiment.device) if experiment.device != "cpu" else "cpu",
        "torch_version": torch.__version__,
        "metarun_version": metarun.__version__,
        "config_hash": experiment.identity["replicas"][index],
        "higher_is_better": spec.metrics[0].higher_is_better,
        "precision": config.train.precision.name,
        "replica": replica.number,
        "varied": label(replica.differs),
        "metrics": SEPARATOR.join(metric.name for metric in metrics),
        "percent": SEPARATOR.join(metric.name for metric in metrics if metric.percent),
    }


def measured_columns(
    experiment: Experiment, replica: Replica, training: Training, best: Best, tested: Tested
) -> dict[str, Any]:
    """Return the columns of ``result.csv`` that a finished replica adds; times are those of all replicas together."""
    trained_tasks = training.step * experiment.config.train.meta_batch * len(experiment.replicas)
    return {
        **tested_columns(experiment, replica, best.theta, tested),
        "val_score": best.val_score,
        "selected_step": best.step,
        "meta_steps": training.step,
        "train_seconds": round(training.seconds, 3),
        "compile_seconds": round(training.compile_seconds, 3),
        "engine": training.engine,
        "task_map": training.task_map,
        "tasks_per_second": round(trained_tasks / training.step_seconds, 1) if training.step else None,
    }


def tested_columns(experiment: Experiment, replica: Replica, theta: Tree, tested: Tested) -> dict[str, Any]:
    """Return the columns of ``result.csv`` that a test adds."""
    steps, metrics = tested.scored.adapt_steps, metrics_of(experiment)
    scores = tested.scored.scores[metrics[0].name]
    further: dict[str, Any] = {}
    for metric in metrics[1:]:
        last = tested.scored.scores[metric.name][:, -1]
        further |= {metric.name: last.mean().item(), f"{metric.name}_ci95": confidence(last).item()}
    for name, pooled in tested.pooled.items():
        further |= {name: pooled.score, f"{name}_ci95": pooled.half_width}
    return {
        "status": "completed",
        "adapt_steps": steps[-1],
        "score_before": scores[:, 0].mean().item() if steps[0] == 0 < steps[-1] else None,
        "score": scores[:, -1].mean().item(),
        "ci95": confidence(scores)[-1].item(),
        **further,
        "n_episodes": len(scores),
        "different_tests": None if tested.scored.units is None else len(set(tested.scored.units.tolist())),
        "episodes_hash": tested.episodes_hash,
        "transductive": tested.transductive,
        "test_seconds": round(tested.seconds, 3),
        "adapt_ms_per_task": round(tested.adapt_ms_per_task, 4),
        "peak_memory_mb": round(peak_memory_mb(experiment.device), 1),
        "meta_parameters": size(learned(theta)) if experiment.algorithm.meta_learns else 0,
        "adapted_parameters": adapted_parameters(replica.algorithm, theta),
        "dtype": str(next(leaves(theta), torch.empty(0)).dtype).removeprefix("torch."),
    }


def confidence(scores: Tensor) -> Tensor:
    """Return the half-width of the 95 % confidence interval of the mean over the first axis."""
    half_width: Tensor = 1.96 * scores.std(0) / len(scores) ** 0.5
    return half_width


def setting_of(experiment: Experiment) -> str:
    """Return ways and shots in words."""
    spec = experiment.family.spec
    return f"{spec.sizes.ways}-way {spec.sizes.shots}-shot" if spec.sizes.ways else f"{spec.sizes.shots}-shot"


def say(experiment: Experiment, row: dict[str, Any], tested: Tested) -> None:
    """Print a replica's row."""
    metric, *further = metrics_of(experiment)
    before = "no score without a support set" if row["score_before"] is None else metric.text(row["score_before"])
    steps, scores = row["adapt_steps"], tested.scored.scores[metric.name]
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
        log.info("  %s before adaptation   %s", metric.name, before)
    log.info(
        "  %s %s   %s   (95 %% CI over episodes)",
        metric.name,
        after,
        metric.interval(row["score"], row["ci95"]),
    )
    for other in further:
        log.info("  %s %s   %s", other.name, after, other.interval(row[other.name], row[f"{other.name}_ci95"]))
    for other in pooled_metrics(experiment):
        shown = other.interval(row[other.name], row[f"{other.name}_ci95"])
        log.info("  %s of all test episodes together, %s   %s", other.name, after, shown)
    few = getattr(experiment.family, "different_tests", None)
    if few is not None and few < row["n_episodes"]:
        which = f"{few} different tasks" if few > 1 else "a single task"
        log.info("  the episodes are of %s, and the intervals are not about further ones", which)
    diverged = int((~scores[:, -1].isfinite()).sum())
    if diverged:
        log.warning("  %d of %d episodes diverged: their score is not a number", diverged, row["n_episodes"])
    if len(tested.scored.adapt_steps) > 1:
        change = scores[:, -1] - scores[:, 0]
        worse = int(((change < 0) if metric.higher_is_better else (change > 0)).sum())
        if worse:
            log.info("  %d of %d episodes score worse after adaptation than before", worse, row["n_episodes"])
    if row.get("train_seconds") is not None:
        log.info(
            "  step %s of %s selected by validation (%s), trained in %.0f s, tested in %.1f s",
            row["selected_step"],
            row["meta_steps"],
            metric.text(row["val_score"]),
            row["train_seconds"],
            row["test_seconds"],
        )


def write_training(
    experiment: Experiment, training: Training, trained: list[tuple[dict[str, Any], Best]], directory: Path
) -> None:
    """Write ``training.png``, with one line per replica that has something to test."""
    if training.step:
        curves = [(row["varied"], training.rows[row["replica"]], best.step) for row, best in trained]
        title, metric = title_of([row for row, _ in trained]), experiment.family.spec.metrics[0]
        drawer.draw("training", plot_training, directory / "training.png", title, metric, curves)


def title_of(rows: list[dict[str, Any]]) -> str:
    """Return the title of a run's pictures."""
    first = rows[0]
    title = f"{first['algo']} on {first['task']}"
    return title if len(rows) > 1 else f"{title}, {first['varied'] or 'seed ' + str(first['seed'])}"


def write_adaptation(experiment: Experiment, finished: list[tuple[dict[str, Any], Tested]], directory: Path) -> None:
    """Write ``adaptation.png``, with one line per replica that was tested."""
    panels = []
    for shown in metrics_of(experiment):
        scores = [(row["varied"], tested.scored.scores[shown.name]) for row, tested in finished]
        panels.append((shown, [(name, s.mean(0).tolist(), confidence(s).tolist()) for name, s in scores]))
    title, steps = title_of([row for row, _ in finished]), finished[0][1].scored.adapt_steps
    drawer.draw("adaptation", plot_adaptation, directory / "adaptation.png", title, steps, panels)


def write_confusion(experiment: Experiment, finished: list[tuple[dict[str, Any], Tested]], directory: Path) -> None:
    """Write which test classes are taken for which, if they have names: a table of all replicas, a picture of one."""
    names: Sequence[str] = getattr(experiment.family, "class_names", ())
    found = [
        (row["replica"], confused(tested.scored.answers.cpu().numpy(), names))
        for row, tested in finished
        if tested.scored.answers is not None
    ]
    if not found:
        return
    write_confused(directory / "confusion.csv", found)
    title = title_of([row for row, _ in finished])
    drawer.draw("confusion", plot_confused, directory / "confusion.png", title, found[0][1])
    for line in described_confusion(found[0][1]):
        log.info("  %s", line)


def write_reports(experiment: Experiment, thetas: list[tuple[int, Tree]], directory: Path) -> None:
    """Write the reports besides scores, if any: a table of all replicas, and a figure and lines of the first."""
    title = f"{experiment.names['algo']} on {experiment.names['task']}"
    if len(thetas) > 1:
        title += f", {label(experiment.replicas[thetas[0][0]].differs)}"
    of_replicas = [
        [(report.name, measured(experiment, index, theta, report)) for report in reports_of(experiment, index)]
        for index, theta in thetas
    ]
    for reports in zip(*of_replicas, strict=True):
        (name, first), numbers = reports[0], [numbers for _, numbers in reports]
        write_measured(directory / f"{name}.csv", numbers)
        drawer.draw(name, plot_measured, directory / f"{name}.png", title, first)
        for line in described(first):
            log.info("  %s", line)
