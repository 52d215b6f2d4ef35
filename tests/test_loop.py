"""Meta-training: what stops it, what is kept, and that a stopped run goes on as if it had not been stopped."""

import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import metarun, process, rows, started, without_timing
from conftest import experiment_of
from torch import nn

from metarun import evaluation, loop
from metarun.algos.agnostic.maml import maml
from metarun.errors import UserError
from metarun.random import stream
from metarun.results.tables import write_metrics
from metarun.tree import leaves, tree_map

TINY = ("train.steps=40", "train.eval_every=10", "train.log_every=4", "train.val_episodes=8", "eval.episodes=60")


def metrics(directory: Path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(directory / "metrics.csv")]


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(
    ("kill", "algo", "count", "engine"),
    [
        (signal.SIGKILL, "maml", 1, "auto"),
        (signal.SIGINT, "reptile", 2, "auto"),
        pytest.param(signal.SIGKILL, "maml", 1, "compile", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_resumes_to_the_numbers_of_an_uninterrupted_one(tmp_path, kill, algo, count, engine):
    overrides = [
        f"engine={engine}",
        f"algo={algo}",
        f"replicas.count={count}",
        "train.steps=120",
        "train.meta_batch=4",
        "train.eval_every=20",
        "train.log_every=5",
        "train.val_episodes=10",
        "eval.episodes=20",
    ]
    overrides += ["train.schedule=cosine", "train.clip=5"]
    metarun(*overrides, "hydra.run.dir=whole", cwd=tmp_path)
    whole, stopped = tmp_path / "whole", tmp_path / "apart" / "stopped = here"
    stopped.parent.mkdir()
    running = started(*overrides, "hydra.run.dir='stopped = here'", cwd=stopped.parent)
    running.send_signal(kill)
    said, _ = running.communicate(timeout=60)
    if kill == signal.SIGINT:
        assert running.returncode == 130
        assert "metarun resume=" in said
        assert rows(stopped / "result.csv")[0]["status"] == "interrupted"
    else:
        assert rows(stopped / "result.csv")[0]["status"] == "running"
    # In a process that has nothing but the files, once; how a run was stopped makes no difference to that.
    again = process if kill == signal.SIGKILL else metarun
    assert again(f"resume={stopped}", cwd=tmp_path).returncode == 0
    assert without_timing(stopped) == without_timing(whole)
    assert metrics(stopped) == metrics(whole)
    assert rows(stopped / "episodes.csv") == rows(whole / "episodes.csv")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    experiment = experiment_of(*TINY, "train.meta_batch=2")
    family = experiment.family
    original = family.sample
    bad = stream(0, "train", 24).initial_seed()

    def poisoned(split, count, generator):
        tasks = original(split, count, generator)
        if generator.initial_seed() == bad:
            tasks.query["y"][0, 0] = math.nan
        return tasks

    family.sample = poisoned
    with pytest.raises(UserError, match=r"finite by step 2[5-9]: the data of training step 25 hold NaN.*last good"):
        loop.meta_train(experiment, tmp_path, resume=False)
    kept = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    assert kept["step"] == 20
    assert all(leaf.isfinite().all() for leaf in leaves(kept["train_state"]))


def test_a_run_that_is_killed_between_its_last_checkpoint_and_its_table_writes_the_table(tmp_path):
    experiment = experiment_of(*TINY, "train.meta_batch=2")

    def killed(directory, rows):
        if rows[0][-1]["step"] == experiment.config.train.steps:
            raise KeyboardInterrupt
        write_metrics(directory, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_metrics", killed)
        with pytest.raises(KeyboardInterrupt):
            loop.meta_train(experiment, tmp_path, resume=False)
    assert int(rows(tmp_path / "metrics.csv")[-1]["step"]) < experiment.config.train.steps
    loop.meta_train(experiment, tmp_path, resume=True)
    assert int(rows(tmp_path / "metrics.csv")[-1]["step"]) == experiment.config.train.steps


def test_the_best_by_validation_is_what_is_kept(tmp_path):
    """Validation scores are replaced by a known sequence whose best is in the middle."""
    experiment = experiment_of(*TINY, "train.meta_batch=2")
    seen = {}
    scores = iter([3.0, math.nan, 1.0, 2.0])

    def fake(experiment, replica, theta, tasks):
        score = next(scores)
        seen[score] = tree_map(torch.clone, theta)
        return theta, score, score

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "validate", fake)
        training = loop.meta_train(experiment, tmp_path, resume=False)
    best = training.best[0]
    assert (best.step, best.val_score) == (30, 1.0)
    torch.testing.assert_close(best.theta, seen[1.0], rtol=0, atol=0)
    saved = torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)
    torch.testing.assert_close(saved["theta"], seen[1.0], rtol=0, atol=0)


def test_a_run_is_not_resumed_on_a_model_with_other_parts(tmp_path):
    """Of as many numbers in all, as when somebody has put the layers of their own model in another order."""
    experiment = experiment_of(*TINY, "train.meta_batch=2", "model.widths=[4,6]")
    loop.meta_train(experiment, tmp_path, resume=False)
    first = experiment.replicas[0]
    model = nn.Sequential(nn.Linear(1, 9), nn.Linear(9, 2), nn.Linear(2, 1), nn.Linear(1, 1), nn.Linear(1, 1))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in first.model.parameters())
    algorithm = maml(model)
    other = replace(experiment, replicas=[replace(first, model=model, algorithm=algorithm)], algorithm=algorithm)
    with pytest.raises(UserError, match="does not fit the model that is built now"):
        loop.meta_train(other, tmp_path, resume=True)


def test_after_a_stop_between_two_files_the_best_on_disk_is_the_best_that_is_tested(tmp_path):
    """On another machine, rounding may keep a resumed run from finding again what was the best before it was killed."""
    experiment, scores = experiment_of(*TINY, "train.meta_batch=2"), iter([2.0, 1.0, 3.0, 3.0, 3.0])

    def fake(experiment, replica, theta, tasks):
        return theta, 0.0, next(scores)

    def killed(experiment, training, directory):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "validate", fake)
        save, saved = loop.save, iter([loop.save, killed])
        patch.setattr(loop, "save", lambda *arguments: next(saved)(*arguments))
        with pytest.raises(KeyboardInterrupt):
            loop.meta_train(experiment, tmp_path, resume=False)
        patch.setattr(loop, "save", save)
        best = loop.meta_train(experiment, tmp_path, resume=True).best[0]
    assert best.step == 10
    on_disk = torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)
    assert on_disk["step"] == 10
    torch.testing.assert_close(on_disk["theta"], best.theta, rtol=0, atol=0)


def test_test_episodes_depend_on_eval_seed_alone():
    def test_tasks(*overrides):
        return list(evaluation.episodes(experiment_of(*overrides), "test", 70))

    reference = test_tasks("algo=maml", "seed=0")
    assert [len(block.query["x"]) for block in reference] == [50, 20]
    torch.testing.assert_close(test_tasks("algo=reptile", "seed=3", "train.steps=7"), reference, rtol=0, atol=0)
    assert not torch.equal(test_tasks("eval.seed=5")[0].query["x"], reference[0].query["x"])
    # Asking for fewer gives the first ones.
    fewer = next(evaluation.episodes(experiment_of("algo=maml"), "test", 10))
    torch.testing.assert_close(fewer.query["x"], reference[0].query["x"][:10], rtol=0, atol=0)


def test_streams_differ_by_purpose_seed_and_step():
    keys = [(s, n, i) for s in range(3) for n in ("weights", "train", "val", "test") for i in range(20)]
    draws = {tuple(torch.randint(1 << 30, (2,), generator=stream(*key)).tolist()) for key in keys}
    assert len(draws) == len(keys)


def test_blocks_are_evaluated_together_or_in_smaller_groups_with_the_same_scores(monkeypatch):
    experiment = experiment_of("eval.adapt_steps=2")
    first, theta = experiment.replicas[0], experiment.initial_thetas()[0]
    blocks = list(evaluation.episodes(experiment, "test", 170))
    plain, sizes = evaluation.batch.evaluate, []

    def small_gpu(algorithm, theta, tasks, *rest):
        sizes.append(len(tasks.query["x"]))
        if sizes[-1] > 60:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return plain(algorithm, theta, tasks, *rest)

    together = evaluation.evaluate(experiment, first, theta, blocks)
    monkeypatch.setattr(evaluation.batch, "evaluate", small_gpu)
    apart = evaluation.evaluate(experiment, first, theta, iter(blocks))
    assert sizes == [170, 100, 50, 50, 50, 20]
    torch.testing.assert_close(apart, together, equal_nan=True)

    def tiny_gpu(*arguments):
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(evaluation.batch, "evaluate", tiny_gpu)
    with pytest.raises(UserError, match=r"lower task\.queries"):
        evaluation.evaluate(experiment, first, theta, blocks)
