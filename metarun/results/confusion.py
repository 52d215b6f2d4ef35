"""Which classes a learner takes for which, over all test episodes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metarun.results.plots import blank_figure, save_figure
from metarun.results.reports import MOST_WRITTEN
from metarun.system.files import write_csv

MOST_SHOWN = MOST_WRITTEN
"""Largest number of classes in a picture."""
LINES = 3
"""Number of pairs of classes of which a run says how often one is taken for the other."""
LONGEST = 24
"""Largest number of characters of a name in a picture."""
AT_ONCE = 4096
"""Number of pairs that are looked at together."""

Array = NDArray[np.int64]


class Confused(NamedTuple):
    """How often classes are taken for which; arrays ``[pairs]``, wrong pairs first, and the most frequent first."""

    names: Sequence[str]
    """The names of the classes."""
    true: Array
    """The number of the class."""
    chosen: Array
    """The number of the class that it was taken for."""
    queries: Array
    """How many queries of ``true`` were taken for ``chosen``."""
    of: Array
    """How many queries of ``true`` could be, since ``chosen`` was a class of their episode."""

    @property
    def share(self) -> NDArray[np.float64]:
        """The share of the queries of a class that was taken for the other one ``[pairs]``."""
        found: NDArray[np.float64] = self.queries / self.of
        return found


def confused(answers: Array, names: Sequence[str]) -> Confused:
    """Count answers.

    Args:
        answers: the class of each query and the class chosen for it ``[episodes, queries, 2]``, −1 for padding. Each
            class of an episode has a query.
        names: of the classes.
    """
    there = answers[..., 0] >= 0
    # Only classes that occur have columns, since there may be very many classes.
    known, position = np.unique(answers[there], return_inverse=True)
    pairs, count = np.unique(position.reshape(-1, 2), axis=0, return_counts=True)
    asked = np.zeros((len(answers), len(known)), dtype=np.int64)
    np.add.at(asked, (np.nonzero(there)[0], position.reshape(-1, 2)[:, 0]), 1)
    total = np.concatenate(
        [
            (asked[:, some[:, 0]] * (asked[:, some[:, 1]] > 0)).sum(0)
            for some in (pairs[first : first + AT_ONCE] for first in range(0, len(pairs), AT_ONCE))
        ]
    )
    right = pairs[:, 0] == pairs[:, 1]
    order = np.lexsort((-count / total, np.where(right, count / total, -count), right))
    true, chosen = known[pairs[order]].T
    return Confused(names, true, chosen, count[order], total[order])


def write_confused(path: Path, found: Sequence[tuple[int, Confused]]) -> None:
    """Write a row per replica and pair of classes, those that are never confused left out."""
    rows: list[dict[str, Any]] = []
    for replica, one in found:
        for true, chosen, count, total in zip(*one[1:], strict=True):
            pair = {"class": one.names[true], "chosen": one.names[chosen], "queries": count, "of": total}
            rows.append({**pair, "share": count / total, "replica": replica})
    write_csv(path, ("class", "chosen", "queries", "of", "share", "replica"), rows)


def described_confusion(found: Confused) -> list[str]:
    """Return a line for each of the most confused pairs."""
    return [
        f"{found.names[found.true[i]]} taken for {found.names[found.chosen[i]]}   {100 * found.share[i]:.1f} % of "
        f"{found.of[i]} queries"
        for i in np.flatnonzero(found.true != found.chosen)[:LINES]
    ]


def shown_classes(found: Confused) -> list[int]:
    """Return the classes in the most confused pairs, in alphabetical order."""
    chosen = dict.fromkeys(int(own) for pair in zip(found.true, found.chosen, strict=True) for own in pair)
    return sorted(list(chosen)[:MOST_SHOWN], key=lambda own: found.names[own])


def plot_confused(path: Path, title: str, found: Confused) -> None:
    """Plot the share of each class that was taken for each other one, for the most confused classes."""
    classes = shown_classes(found)
    place = {own: i for i, own in enumerate(classes)}
    share = np.full((len(classes), len(classes)), np.nan)
    for true, chosen, value in zip(found.true.tolist(), found.chosen.tolist(), found.share, strict=True):
        if true in place and chosen in place:
            share[place[true], place[chosen]] = 100 * value
    names = [shortened(found.names[own]) for own in classes]
    side = 2.4 + 0.45 * max(len(classes), 4)
    figure = blank_figure(side + 1, side)
    axis = figure.subplots()
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_yticks(range(len(names)), names)
    every = len(set(found.true.tolist()))
    which = "" if every <= len(classes) else f"\nthe {len(classes)} most confused of {every} classes"
    axis.set(title=f"{title}{which}", xlabel="chosen", ylabel="class")
    for i, j in zip(*np.nonzero(np.isfinite(share)), strict=True):
        colour = "white" if share[i, j] > 60 else "black"
        axis.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label="queries of the class, where the other could be chosen (%)")
    save_figure(figure, path)


def shortened(name: str) -> str:
    """Return a name that fits next to an axis; the middle of a long one is left out."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 3]}…{name[-(2 * LONGEST // 3 - 1) :]}"
