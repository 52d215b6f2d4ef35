"""One row per method and setting, differences between rows, average ranks, and what is worth its cost.

A setting consists of task, data set, ways, shots, queries and metric. Within a setting, a row is an algorithm with the
keys in which its runs differ from the others, over all its seeds. ``statistics.py`` says what the intervals are.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from metarun.results.comparison import statistics
from metarun.results.comparison.reading import FAMILIES, configuration_of, final_scores, pooled_scores
from metarun.results.comparison.statistics import Estimate
from metarun.results.tables import TASK, metrics_of

Array = NDArray[np.float64]
Replicas = tuple[tuple[str, int, float], ...]
"""Directory, number and seed of each replica of a row."""
OBJECTS = ["replicas", "episodes_hashes", "metrics", "further", "further_against", "estimate"]
"""Columns of a table that no file can hold."""


@dataclass(frozen=True)
class Difference:
    """The score of one row minus that of another."""

    difference: float
    ci95: float
    p: float
    """The probability of such a difference, were there none; rather too large, so that verdicts among many are safe."""
    about_methods: bool
    """Whether the interval holds for other seeds too: both methods have several, or none that would matter."""
    n_episodes: int
    different_tests: float
    """The number of tasks over which the interval is, where the episodes are of the same few; else NaN."""
    paired: bool
    """Whether it is taken episode by episode."""
    paired_seeds: bool
    """Whether it is also taken seed by seed."""
    effect_size: float
    """Cohen's d: the difference in standard deviations over episodes; NaN where it is not paired."""
    share_better: float
    """The share of episodes on which the first has the better score; NaN where it is not paired."""


@dataclass(frozen=True)
class FamilyDifference(Difference):
    """The best model-dependent row minus the best model-agnostic one, both chosen by validation.

    Where it is about methods, ``ci95`` and ``p`` allow for the choice among ``candidates`` pairs (Bonferroni): the
    chosen models had lucky seeds, which make them better in the test too.
    """

    candidates: int
    agnostic: str
    dependent: str


def best_first(table: pd.DataFrame, column: str) -> pd.Series:
    """Return scores as sort keys: the best score has the smallest key."""
    return table[column].where(~table["higher_is_better"], -table[column])


MOST_KEYS = 3
"""How many keys with other defaults a row's name has."""


def different_defaults(runs: pd.DataFrame) -> list[str]:
    """Return the keys in which runs with the same overrides differ all the same, with their values, for each run.

    The defaults that a run was started with may have been changed before the next one: in a file of the configuration,
    or by another version. A key that one of the runs does not have yet distinguishes none, nor does one that refers to
    another key.
    """
    configs = {directory: configuration_of(directory) for directory in runs["directory"].unique()}
    readable = [config for config in configs.values() if config]
    keys = set.intersection(*map(set, readable)) if readable else set[str]()
    keys -= {override.partition("=")[0].lstrip("+") for override in runs["overrides"].iloc[0]}
    values = {key: {config[key] for config in readable} for key in keys}
    different = sorted(key for key, own in values.items() if len(own) > 1 and not any("${" in one for one in own))
    found = []
    for config in (configs[directory] for directory in runs["directory"]):
        own = [f"{key}={config[key]}" for key in different] if config else []
        short = hashlib.sha256(" ".join(own).encode()).hexdigest()[:6]
        found.append(" ".join(own) if len(own) <= MOST_KEYS else f"configuration={short}")
    return found


def with_variants(group: pd.DataFrame) -> pd.DataFrame:
    """Add ``variant``: the overrides of each run that not every run of the setting shares.

    Runs that differ in other keys all the same, or only in their test episodes, are distinguished by these, and never
    averaged.
    """
    shared = frozenset.intersection(*group["overrides"])
    group = group.assign(variant=[" ".join(sorted(overrides - shared)) for overrides in group["overrides"]])
    further = pd.Series("", index=group.index)
    for _, own in group.groupby(["algo", "model", "variant"]):
        if own["directory"].nunique() > 1:
            further[own.index] = different_defaults(own)
    group = group.assign(variant=(group["variant"] + " " + further).str.strip())
    models = group.groupby(["algo", "variant"])["model"].transform("nunique") > 1
    named = (group["variant"] + " model=" + group["model"]).str.strip()
    group = group.assign(variant=group["variant"].where(~models, named))
    mixed = group.groupby(["algo", "model", "variant"])["episodes_hash"].transform("nunique") > 1
    named = (group["variant"] + " episodes=" + group["episodes_hash"].replace("", "unknown")).str.strip()
    return group.assign(variant=group["variant"].where(~mixed, named))


@lru_cache(maxsize=100_000)
def cached_scores(directory: str) -> dict[int, dict[str, Array]]:
    """Return `final_scores`, read once."""
    return final_scores(directory)


@lru_cache(maxsize=100_000)
def cached_pooled(directory: str) -> dict[int, dict[str, Array]]:
    """Return `pooled_scores`, read once."""
    return pooled_scores(directory)


def scores_of(
    replicas: Replicas,
    metric: str | None = None,
    read: Callable[[str], Mapping[int, Mapping[str, Array]]] = cached_scores,
) -> tuple[Array, tuple[float, ...]] | None:
    """Return scores ``[seeds, episodes]`` and the seeds; None if a file is missing or damaged, or numbers differ.

    Replicas with the same seed are averaged. ``metric`` names a further metric; None: the first. ``read`` maps a
    directory to the scores of each replica; with `cached_pooled` they are ``[seeds, 1 + resamplings]``.
    """
    by_seed: dict[float, list[Array]] = {}
    for directory, number, seed in replicas:
        scores = read(directory).get(number, {}).get(metric or "score")
        if scores is None:
            return None
        by_seed.setdefault(seed, []).append(scores)
    if len({len(scores) for own in by_seed.values() for scores in own}) != 1:
        return None
    seeds = tuple(sorted(by_seed))
    return np.array([np.mean(by_seed[seed], axis=0) for seed in seeds]), seeds


def over_tasks(scores: Array, replicas: Replicas) -> Array:
    """Return means per task ``[seeds, tasks]`` of ``scores [seeds, episodes]`` if episodes are of the same few tasks.

    Such episodes are not independent: those of one patient are alike. Over several tasks the intervals are therefore
    over tasks. Where there is only one, they can only be over its episodes.
    """
    found = scores_of(replicas[:1], TASK)
    if found is None or found[0].shape[1] != scores.shape[1]:
        return scores
    _, place, count = np.unique(found[0][0], return_inverse=True, return_counts=True)
    if len(count) == 1:
        return scores
    return np.stack([np.bincount(place, own) for own in scores]) / count


def read_ahead(results: pd.DataFrame) -> None:
    """Read the episodes of every method that has several seeds, by several threads."""
    several = results.groupby(["algo", "model", "overrides"])["seed"].transform("nunique") > 1
    with ThreadPoolExecutor() as pool:
        list(pool.map(cached_scores, results["directory"][several].unique()))


def per_seed(runs: pd.DataFrame, column: str) -> pd.Series:
    """Return a column's mean for each seed, so that a seed that has run twice does not count twice.

    A diverged run must be visible instead of vanishing from the mean, so that NaN stays.
    """
    return runs.groupby("seed")[column].agg(lambda values: values.mean(skipna=False))


def estimate_of(runs: pd.DataFrame, replicas: Replicas, metric: str | None = None) -> tuple[Estimate, bool]:
    """Return the mean score of a method, and whether its interval comes from the scores of single episodes.

    Its interval is over seeds and episodes if there are several seeds, else over the episodes of the one model.
    """
    several = len({seed for *_, seed in replicas}) > 1
    # Only several seeds are worth reading every episode for.
    found = scores_of(replicas, metric) if several and all(runs["episodes_hash"] != "") else None
    if found is not None and found[0].shape[1] > 1:
        estimate = statistics.over_seeds_and_episodes(over_tasks(found[0], replicas))
        return replace(estimate, mean=float(found[0].mean())), True
    columns = ("score", "ci95") if metric is None else (metric, f"{metric}_ci95")
    means, half_widths = (per_seed(runs, column).to_numpy(dtype=float) for column in columns)
    episodes = int(runs["n_episodes"].min())
    return statistics.of_summaries(means, (half_widths / 1.96) ** 2, episodes, several), not several


def no_seed_matters(runs: pd.DataFrame) -> bool:
    """Whether a method has no parameters that training or adaptation could set, and so gives the same with any seed."""
    return bool((runs[["meta_parameters", "adapted_parameters"]] == 0).all(axis=None))


def summarise(group: pd.DataFrame) -> pd.DataFrame:
    """Return one row per algorithm and variant, sorted by score within each family."""
    rows = []
    for (family, algo, model, variant), runs in group.groupby(["family", "algo", "model", "variant"]):
        replicas = tuple(zip(runs["directory"], runs["replica"], runs["seed"], strict=True))
        estimate, exact = estimate_of(runs, replicas)
        metrics, several = metrics_of(runs.iloc[0]), runs["seed"].nunique() > 1
        settled = not several and no_seed_matters(runs)
        if settled:
            estimate = Estimate(estimate.mean, ((0.0, math.inf), *estimate.parts))
        rows.append(
            {
                "family": family,
                "algo": algo,
                "variant": variant,
                "model": model,
                "score_before": runs.groupby("seed")["score_before"].mean().mean(),
                "adapt_steps": runs["adapt_steps"].max(),
                "score": per_seed(runs, "score").mean(skipna=False),
                "method_ci95": estimate.ci95 if several else math.nan,
                "ci95": per_seed(runs, "ci95").mean(skipna=False),
                "seeds": runs["seed"].nunique(),
                "about_method": several or settled,
                "seed_std": per_seed(runs, "score").std(ddof=1, skipna=False),
                "val_score": runs.groupby("seed")["val_score"].mean().mean(),
                "n_episodes": runs["n_episodes"].min(),
                "different_tests": runs["different_tests"].min(),
                "transductive": runs["transductive"].any(),
                "meta_steps": runs["meta_steps"].mean(),
                "train_seconds": runs["train_seconds"].mean(),
                "adapt_ms_per_task": runs["adapt_ms_per_task"].mean(),
                "peak_memory_mb": runs["peak_memory_mb"].max(),
                "meta_parameters": runs["meta_parameters"].max(),
                "adapted_parameters": runs["adapted_parameters"].max(),
                "higher_is_better": bool(runs["higher_is_better"].iloc[0]),
                "from_episodes": exact,
                "metrics": metrics,
                "further": {metric.name: further(runs, replicas, metric.name) for metric in metrics[1:]},
                "replicas": replicas,
                "episodes_hashes": set(runs["episodes_hash"]),
                "estimate": estimate,
            }
        )
    table = pd.DataFrame(rows)
    table["family"] = pd.Categorical(table["family"], list(FAMILIES), ordered=True)
    order = pd.DataFrame({"family": table["family"], "score": best_first(table, "score")})
    table = table.loc[order.sort_values(["family", "score"]).index].reset_index(drop=True)
    return table.assign(
        **{f"pareto_{name}": pareto(table, cost) for name, cost in (("training", "train_seconds"), *ADAPTATION)}
    )


ADAPTATION = (("adaptation", "adapt_ms_per_task"),)


def further(runs: pd.DataFrame, replicas: Replicas, metric: str) -> tuple[float, float]:
    """Return mean and half-width of a metric besides the first; NaN where a run does not have it."""
    if metric not in runs or f"{metric}_ci95" not in runs:
        return math.nan, math.nan
    mean, several = float(per_seed(runs, metric).mean(skipna=False)), len({seed for *_, seed in replicas}) > 1
    if not several:
        return mean, float(per_seed(runs, f"{metric}_ci95").mean(skipna=False))
    pooled = scores_of(replicas, metric, cached_pooled) if runs["episodes_hash"].nunique() == 1 else None
    estimate = statistics.of_pooled(pooled[0]) if pooled else estimate_of(runs, replicas, metric)[0]
    return mean, estimate.ci95


def pareto(table: pd.DataFrame, cost: str) -> list[bool]:
    """Return for each row whether no other is as good in both score and cost, of equal rows the first."""
    worth, best = [False] * len(table), math.inf
    keys = zip(table[cost], best_first(table, "score"), range(len(table)), strict=True)
    for _, score, place in sorted(key for key in keys if not math.isnan(key[0] + key[1])):
        if score < best:
            worth[place], best = True, score
    return worth


def name_of(row: pd.Series) -> str:
    """Return the name of an algorithm with its variant."""
    return f"{row['algo']} {row['variant']}".strip()


def on_same_episodes(a: pd.Series, b: pd.Series) -> bool:
    """Whether two rows were tested on the same episodes."""
    hashes = a["episodes_hashes"] | b["episodes_hashes"]
    return len(hashes) == 1 and "" not in hashes


def subtracted(
    a: tuple[Array, tuple[float, ...]],
    b: tuple[Array, tuple[float, ...]],
    about_methods: bool,
    replicas: Replicas = (),
    difference: Callable[[Array, Array, bool], Estimate] = statistics.difference_of_methods,
) -> Estimate:
    """Return ``a − b``, scores with their seeds, over the seeds where it is about methods, else over their mean.

    ``replicas`` are those of one of the rows, whose episodes are of the same tasks; empty for pooled scores.
    """
    (first, first_seeds), (second, second_seeds) = a, b
    if not about_methods:
        first, second = first.mean(0, keepdims=True), second.mean(0, keepdims=True)
    found = difference(over_tasks(first, replicas), over_tasks(second, replicas), first_seeds == second_seeds)
    return replace(found, mean=float(first.mean() - second.mean())) if replicas else found


def further_difference(a: pd.Series, b: pd.Series, metric: str) -> Estimate | None:
    """Return row ``a`` minus row ``b`` in a metric besides the first, by episode, or by resampling if it is pooled.

    It is about methods if both rows are. None: the rows lack common test episodes, or the metric.
    """
    if not on_same_episodes(a, b):
        return None
    for read in (cached_scores, cached_pooled):
        found = [scores_of(row["replicas"], metric, read) for row in (a, b)]
        if found[0] is None or found[1] is None or found[0][0].shape[1] != found[1][0].shape[1]:
            continue
        of = statistics.difference_of_pooled if read is cached_pooled else statistics.difference_of_methods
        replicas = a["replicas"] if read is cached_scores else ()
        return subtracted(found[0], found[1], bool(a["about_method"] and b["about_method"]), replicas, of)
    return None


def further_differences(a: pd.Series, b: pd.Series) -> dict[str, tuple[float, float]]:
    """Return mean and half-width of the differences in all metrics besides the first that have one."""
    found = {metric.name: further_difference(a, b, metric.name) for metric in a["metrics"][1:]}
    return {name: (estimate.mean, estimate.ci95) for name, estimate in found.items() if estimate is not None}


def of_models(row: pd.Series) -> Estimate:
    """Return the mean of the trained models of a row, over episodes alone.

    The part of the episodes in an interval over seeds would be too small for it: what a seed and an episode have to do
    with each other counts there among the seeds.
    """
    of_tasks = not math.isnan(row["different_tests"])
    found = scores_of(row["replicas"]) if row["from_episodes"] and (row["seeds"] > 1 or of_tasks) else None
    if found is not None:
        own = statistics.over_episodes(over_tasks(found[0].mean(0, keepdims=True), row["replicas"])[0])
        return replace(own, mean=float(found[0].mean()))
    estimate: Estimate = row["estimate"]
    return Estimate(estimate.mean, estimate.parts[-1:])


def difference_of(a: pd.Series, b: pd.Series, candidates: int = 1) -> Difference:
    """Return row ``a`` minus row ``b``, episode by episode where both were tested on the same episodes.

    It is about methods if both are; ``ci95`` and ``p`` then allow for a choice among ``candidates``.
    """
    same = on_same_episodes(a, b)
    found = [scores_of(row["replicas"]) if same else None for row in (a, b)]
    about_methods = bool(a["about_method"] and b["about_method"])
    paired = False
    if found[0] is not None and found[1] is not None:
        (first, first_seeds), (second, second_seeds) = found[0], found[1]
        paired = first.shape[1] == second.shape[1] > 1
    if not paired:
        estimate = statistics.unpaired(*(row["estimate"] if about_methods else of_models(row) for row in (a, b)))
        sizes = (math.nan, math.nan)
    else:
        estimate = subtracted((first, first_seeds), (second, second_seeds), about_methods, a["replicas"])
        better = statistics.share_better(first, second, bool(a["higher_is_better"]))
        sizes = (statistics.effect_size(first, second), better)
    choices = candidates if about_methods else 1
    return Difference(
        estimate.mean,
        estimate.half_width(0.05 / choices),
        min(1.0, choices * estimate.p) if not math.isnan(estimate.p) else math.nan,
        about_methods,
        int(min(a["n_episodes"], b["n_episodes"])),
        float(np.fmin(a["different_tests"], b["different_tests"])),
        paired,
        paired and about_methods and first_seeds == second_seeds,
        *sizes,
    )


def best_of(members: pd.DataFrame) -> pd.Series:
    """Return the row with the best validation score, or the best test score if none was validated."""
    keys = best_first(members, "val_score")
    return members.loc[(keys if keys.notna().any() else best_first(members, "score").fillna(math.inf)).idxmin()]


def family_difference(table: pd.DataFrame) -> FamilyDifference | None:
    """Return the best model-dependent minus the best model-agnostic row, by validation; None if one is missing."""
    agnostic, dependent = (table[table["family"] == family] for family in ("agnostic", "dependent"))
    if agnostic.empty or dependent.empty:
        return None
    a, b = best_of(agnostic), best_of(dependent)
    candidates = len(agnostic) * len(dependent)
    found = difference_of(b, a, candidates)
    choices = candidates if found.about_methods else 1
    return FamilyDifference(**vars(found), candidates=choices, agnostic=name_of(a), dependent=name_of(b))


def against(table: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Add each row's difference from the algorithm ``reference``, in columns whose names begin with ``against``.

    ``against_p`` has Holm's correction for all rows of the table; ``reference`` is the name of the row, and
    ``further_against`` has the differences in the metrics besides the first. Of several variants of the reference, the
    one with the best validation score is taken. Where the setting has no run of the reference, the columns are empty.
    """
    members = table[table["algo"] == reference]
    columns = {
        **{"against": "difference", "against_ci95": "ci95", "against_p": "p", "against_d": "effect_size"},
        **{"against_better": "share_better", "against_paired": "paired", "against_methods": "about_methods"},
    }
    if members.empty:
        empty = dict.fromkeys(columns, math.nan) | {"against_paired": False, "against_methods": False}
        return table.assign(**empty, reference="", further_against=[{}] * len(table))
    row = best_of(members)
    found = [difference_of(other, row) for _, other in table.iterrows()]
    own = [index == row.name for index in table.index]
    table = table.assign(**{name: [getattr(d, value) for d in found] for name, value in columns.items()})
    levels = statistics.holm([math.nan if same else d.p for d, same in zip(found, own, strict=True)])
    more = [
        {} if same else further_differences(other, row) for (_, other), same in zip(table.iterrows(), own, strict=True)
    ]
    table = table.assign(against_p=levels, reference=name_of(row), further_against=more)
    table.loc[own, ["against_d", "against_better"]] = math.nan
    return table


@dataclass(frozen=True)
class Ranking:
    """Average ranks of the algorithms that every setting has."""

    algos: list[str]
    """The best average rank first."""
    ranks: list[float]
    settings: int
    p: float
    critical_difference: float
    left_out: list[str]
    """Algorithms that some setting lacks."""


def ranking(tables: Sequence[pd.DataFrame]) -> Ranking | None:
    """Rank the algorithms over settings, each by its best variant; None for fewer than 2 settings or algorithms."""
    have = [set(table["algo"]) for table in tables]
    common, all_of_them = sorted(set.intersection(*have)), sorted(set.union(*have))
    if len(tables) < 2 or len(common) < 2:
        return None
    chosen = [[best_of(table[table["algo"] == algo]) for algo in common] for table in tables]
    higher = [bool(table["higher_is_better"].iloc[0]) for table in tables]
    # A method that diverged is the last.
    worst = [[-math.inf if up else math.inf] for up in higher]
    scores = np.array([[row["score"] for row in rows] for rows in chosen], dtype=float)
    found = statistics.ranks_of(np.where(np.isnan(scores), worst, scores), higher)
    order = np.argsort(found.mean, kind="stable")
    return Ranking(
        [common[i] for i in order],
        [float(found.mean[i]) for i in order],
        len(tables),
        found.p,
        found.critical_difference,
        [algo for algo in all_of_them if algo not in common],
    )


def settings_of(results: pd.DataFrame, columns: Sequence[str]) -> Iterable[tuple[dict[str, Any], pd.DataFrame]]:
    """Yield each setting with its runs."""
    for values, group in results.groupby(list(columns), dropna=False):
        yield dict(zip(columns, values, strict=True)), group
