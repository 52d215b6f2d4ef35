"""``hydra/sweeper=optuna``: a study that Optuna is asked for trials of, and told their validation scores.

The study is a file in the directory of the sweep, and trial N is job N. A study that was cut off goes on: trials that
have not ended are run again, from their checkpoints, before others are chosen. Each choice is drawn with a seed made of
its number, so a study that was cut off chooses what it would have chosen.

A sweep over ``algo.inner_lr=0.01,0.1`` or ``choice(0.01,0.1)`` draws from the values, ``interval(0.001,0.1)`` from a
range, ``int(interval(1,5))`` and ``range(1,9,2)`` from whole numbers, and ``tag(log,interval(0.001,0.1))`` from a range
on a logarithmic scale.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from metarun.command.directories import folders_of
from metarun.command.sweep import STUDY
from metarun.errors import Pruned, UserError
from metarun.results.status import job_in
from metarun.results.tables import Row, Watcher

if TYPE_CHECKING:
    from optuna import Study, Trial

SAMPLERS, PRUNERS = ("tpe", "random", "grid"), ("none", "median", "asha")


def distribution(override: Override) -> Any:
    """Return the distribution from which the values of a sweep are drawn."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    logarithmic = "log" in getattr(value, "tags", ())
    if isinstance(value, IntervalSweep):
        kind = IntDistribution if {type(value.start), type(value.end)} == {int} else FloatDistribution
        return kind(value.start, value.end, log=logarithmic)
    if isinstance(value, RangeSweep) and not logarithmic:
        values = list(value.range())
        if len(values) > 1 and value.step > 0 and all(isinstance(one, int) for one in values):
            return IntDistribution(values[0], values[-1], step=int(value.step))
    return CategoricalDistribution(list(override.sweep_string_iterator()))


def split(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the overrides that are the same for all trials, and a distribution for each key that is swept over."""
    fixed, swept = [], {}
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        key = override.get_key_element()
        if override.is_sweep_override():
            swept[key] = distribution(override)
        else:
            fixed.append(f"{key}={override.get_value_element_as_str()}")
    return fixed, swept


def check_space(swept: Mapping[str, Any]) -> None:
    """Raise an error if a study cannot search over the keys.

    Raises:
        UserError: there is no key, or scores would not be comparable.
    """
    if not swept:
        raise UserError("hydra/sweeper=optuna needs a key to search over, such as algo.inner_lr=interval(0.01,0.1).")
    for key in swept:
        if key in ("task", "task.dataset") or key.startswith("eval."):
            raise UserError(
                f"A study compares scores on the same validation tasks, so it cannot search over {key}; give it one "
                "value, or leave out hydra/sweeper=optuna."
            )


def combinations(swept: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every combination of the values, in the order of a sweep without Optuna.

    Raises:
        UserError: a key is searched over a range.
    """
    from optuna.distributions import CategoricalDistribution

    for key, one in swept.items():
        if not isinstance(one, CategoricalDistribution):
            raise UserError(f"hydra.sweeper.sampler=grid needs a list of values for {key}; write {key}=A,B,C.")
    return [dict(zip(swept, values, strict=True)) for values in itertools.product(*(o.choices for o in swept.values()))]


def suggested(trial: "Trial", key: str, space: Any) -> Any:
    """Return a trial's value of a key: the one that was chosen before, or a new one."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(space, CategoricalDistribution):
        return trial.suggest_categorical(key, space.choices)
    if isinstance(space, IntDistribution):
        return trial.suggest_int(key, space.low, space.high, step=space.step, log=space.log)
    return repr(trial.suggest_float(key, space.low, space.high, log=space.log))


def higher_is_better(config: DictConfig) -> bool:
    """Return whether a higher score of the configured task is better."""
    # Imported here, since a study that is refused needs no torch.
    from metarun.assemble import choose_device
    from metarun.config import build

    family = build(config, "task", device=choose_device(config.device), data_dir=config.data_dir)
    return bool(family.spec.metrics[0].higher_is_better)


def opened(directory: Path, pruner: str, direction: str | None = None) -> "Study":
    """Return the study in the directory of a sweep, which is created if a ``direction`` is given."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = str(directory / STUDY)
    storage = JournalStorage(JournalFileBackend(path, JournalFileOpenLock(path)))
    pruners = {
        "none": optuna.pruners.NopPruner,
        "median": optuna.pruners.MedianPruner,
        "asha": optuna.pruners.SuccessiveHalvingPruner,
    }
    if direction is None:
        return optuna.load_study(study_name="metarun", storage=storage, pruner=pruners[pruner]())
    return optuna.create_study(
        study_name="metarun",
        storage=storage,
        direction=direction,
        pruner=pruners[pruner](),
        load_if_exists=True,
    )


def pruning(config: DictConfig, hydra: DictConfig) -> list[Watcher]:
    """Return what watches a run that is a trial of a study, if the study has a pruner.

    Args:
        config: configuration of the run.
        hydra: the section ``hydra`` of its configuration.
    """
    if hydra.sweeper.pruner == "none":
        return []
    from optuna.study import StudyDirection
    from optuna.trial import Trial

    study = opened(Path(str(hydra.sweep.dir)), str(hydra.sweeper.pruner))
    trial = Trial(study, study.get_trials(deepcopy=False)[int(hydra.job.num)]._trial_id)
    best = max if study.direction == StudyDirection.MAXIMIZE else min

    def watch(rows: Sequence[Row]) -> None:
        scores = [score for row in rows if math.isfinite(score := row.get("val_score", math.nan))]
        step = int(rows[0]["step"])
        if not scores or step >= config.train.steps:
            return
        # A run that goes on from a checkpoint comes past steps that it has reported.
        if step not in study.get_trials(deepcopy=False)[trial.number].intermediate_values:
            trial.report(best(scores), step)
        if trial.should_prune():
            raise Pruned(f"The pruner {hydra.sweeper.pruner} stopped the trial after step {step}.")

    return [watch]


class OptunaSweeper(Sweeper):
    """Runs a study; ``conf/hydra/sweeper/optuna.yaml`` explains the keys."""

    def __init__(self, n_trials: int, n_jobs: int, sampler: str, seed: int, pruner: str) -> None:
        self.n_trials, self.n_jobs, self.sampler, self.seed, self.pruner = n_trials, n_jobs, sampler, seed, pruner

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Check the keys, and make the launcher.

        Raises:
            UserError: a key has a value that it cannot have.
        """
        for key, value, known in (("sampler", self.sampler, SAMPLERS), ("pruner", self.pruner, PRUNERS)):
            if value not in known:
                raise UserError(f"hydra.sweeper.{key} must be one of {', '.join(known)}, not {value}.")
        for key, number, least in (("n_trials", self.n_trials, 1), ("n_jobs", self.n_jobs, 1), ("seed", self.seed, 0)):
            if type(number) is not int or number < least:
                raise UserError(f"hydra.sweeper.{key} must be a whole number of at least {least}, not {number}.")
        self.composed, self.context = config, hydra_context
        self.directory = Path(str(config.hydra.sweep.dir))
        self.workers = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[float]:
        """Run the trials that have no end yet; return the scores of all that have completed."""
        fixed, swept = split(arguments)
        check_space(swept)
        grid = combinations(swept) if self.sampler == "grid" else []
        higher = higher_is_better(self.context.config_loader.load_sweep_config(self.composed, fixed))
        study = opened(self.directory, self.pruner, "maximize" if higher else "minimize")
        wanted = min(self.n_trials, len(grid)) if grid else self.n_trials
        for first in range(0, wanted, self.n_jobs):
            known = study.get_trials(deepcopy=False)
            batch = range(first, min(first + self.n_jobs, wanted))
            open_ones = [number for number in batch if number >= len(known) or not known[number].state.is_finished()]
            # All are chosen before one is run, whether the batch is new or was cut off.
            chosen = {number: self.chosen(study, number, swept, grid) for number in open_ones}
            self.run(study, {number: [*fixed, *values] for number, values in chosen.items()})
        return [trial.value for trial in study.get_trials(deepcopy=False) if trial.value is not None]

    def chosen(
        self, study: "Study", number: int, swept: Mapping[str, Any], grid: Sequence[Mapping[str, Any]]
    ) -> list[str]:
        """Return the overrides of trial ``number``, which is new or was cut off."""
        from optuna.samplers import RandomSampler, TPESampler
        from optuna.trial import Trial, TrialState

        sampler = TPESampler if self.sampler == "tpe" else RandomSampler
        study.sampler = sampler(seed=(self.seed * 1_000_003 + number) % 2**32)
        known = study.get_trials(deepcopy=False)
        new = number == len(known)
        if new and grid:
            study.enqueue_trial(dict(grid[number]))
        new = new or known[number].state == TrialState.WAITING
        trial = study.ask() if new else Trial(study, known[number]._trial_id)
        return [f"{key}={suggested(trial, key, one)}" for key, one in swept.items()]

    def run(self, study: "Study", jobs: Mapping[int, Sequence[str]]) -> None:
        """Run jobs, whose numbers ascend, and tell the study how each has ended."""
        waiting = [number for number in jobs if not self.tell(study, number, jobs[number], math.nan)]
        # A launcher numbers jobs consecutively.
        for _, group in itertools.groupby(enumerate(waiting), key=lambda pair: pair[1] - pair[0]):
            numbers = [number for _, number in group]
            results = self.workers.launch([list(jobs[number]) for number in numbers], numbers[0])
            for number, result in zip(numbers, results, strict=True):
                self.tell(study, number, jobs[number], float(result.return_value))

    def tell(self, study: "Study", number: int, overrides: Sequence[str], value: float) -> bool:
        """Tell the study how a job has ended, if it has; a job that was cut off stays open."""
        from optuna.trial import TrialState

        (folder,) = folders_of(self.composed, [overrides], number)
        found = job_in(self.directory / folder, "").state
        if found == "completed" and math.isfinite(value):
            study.tell(number, value)
        elif found in ("failed", "pruned"):
            study.tell(number, state=TrialState.FAIL if found == "failed" else TrialState.PRUNED)
        else:
            return False
        return True
