"""Assigning classes to training, validation and test."""

import logging
import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from metarun.data.spelling import plain
from metarun.errors import UserError

log = logging.getLogger(__name__)

SHARES = {"train": 0.6, "val": 0.15, "test": 0.25}
"""Share of the classes in each split that is drawn."""
VALIDATION = 0.2
"""Share of the training classes that become validation classes where the data have none."""
NAMED = 5
"""The most classes that a message names."""


def dealt(names: Iterable[str], seed: int, shares: Mapping[str, float], fewest: int = 0) -> dict[str, set[str]]:
    """Assign ``names`` to ``train`` and ``val``, ``test`` or both by ``shares``, at random by ``seed``.

    Each split of ``shares`` has at least ``fewest`` names, or an equal share where there are too few for that.
    """
    shuffled = sorted(names)
    random.Random(seed).shuffle(shuffled)
    fewest = min(fewest, len(shuffled) // len(shares))
    size = {split: max(round(share * len(shuffled)), fewest) for split, share in shares.items()}
    of_val = fewest if "val" in shares else 0
    test = max(len(shuffled) - size.get("test", 0), fewest + of_val)
    train = min(size["train"], test - of_val) if "val" in shares else test
    return {"train": set(shuffled[:train]), "val": set(shuffled[train:test]), "test": set(shuffled[test:])}


def dealt_among(
    every: Iterable[str], usable: Iterable[str], seed: int, shares: Mapping[str, float], fewest: int = 0
) -> dict[str, set[str]]:
    """Assign ``usable`` names as `dealt` does, and if possible so that a name's split does not depend on the others.

    All names are dealt, and then those that are of no use are left out. What is of use depends on the size of tasks: a
    learner that was trained for one shot must not find its training classes among the test classes for five. Where this
    leaves a split too few names, those of use alone are dealt.
    """
    usable = set(usable)
    kept = {split: names & usable for split, names in dealt(every, seed, shares).items()}
    enough = max(min(fewest, len(usable) // len(shares)), 1)
    return kept if all(len(kept[split]) >= enough for split in shares) else dealt(usable, seed, shares, fewest)


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


@dataclass(frozen=True)
class Examples:
    """Labelled examples, in any order."""

    name: str
    """What the data are called."""
    what: str
    """What an example is called, in the plural."""
    labels: Sequence[str]
    splits: Sequence[str | None]
    """The split that the data name for each example."""
    copies: Sequence[object] = field(default=())
    """A value for each example, equal for those that are the same; empty: no two are."""

    def rows_of(self, smallest: int, elsewhere: frozenset[object] = frozenset()) -> dict[str, list[int]]:
        """Return the positions of each class's examples, without copies and without classes that are too small.

        Args:
            smallest: number of examples of the smallest class that is of use.
            elsewhere: the examples of another data set, whose copies are left out too.
        """
        seen, found, left = set(elsewhere), dict[str, list[int]](), list[str]()
        for row, label in enumerate(self.labels):
            if self.copies:
                if self.copies[row] in seen:
                    left.append(label)
                    continue
                seen.add(self.copies[row])
            found.setdefault(label, []).append(row)
        if left:
            log.info(
                "%s: %d %s are copies of others and are left out, such as one of %s.",
                *(self.name, len(left), self.what, left[0]),
            )
        small = {label: len(rows) for label, rows in sorted(found.items()) if len(rows) < smallest}
        if small:
            log.info(
                "%s: classes with fewer than %d %s are left out: %s.",
                *(self.name, smallest, self.what, listed([f"{label} ({n})" for label, n in small.items()])),
            )
        return {label: rows for label, rows in sorted(found.items()) if label not in small}


def lists_in(folder: Path, labels: Iterable[str], usable: Collection[str]) -> dict[str, set[str]]:
    """Return the classes of each split by the files ``train.txt``, ``val.txt`` and ``test.txt`` of a folder.

    A line holds the name of a class, or the last part of its name. Classes that are not ``usable`` are left out.

    Raises:
        UserError: a file cannot be read, or a line names no class, several, or one that another line names too.
    """
    labels = sorted(set(labels))
    last = Counter(label.rpartition("/")[2] for label in labels)
    by_name = {label.rpartition("/")[2]: label for label in labels} | {label: label for label in labels}
    split: dict[str, set[str]] = {}
    place: dict[str, str] = {}
    for part in SHARES:
        path = folder / f"{part}.txt"
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); put lists of classes there, or choose task.split=random."
            ) from error
        split[part] = set()
        for number, line in enumerate(map(str.strip, lines), 1):
            here = f"{path}, line {number}"
            if line and line not in by_name:
                raise UserError(f"{here}, names {line!r}, which is not a class of the data; mend or delete the line.")
            if line and line not in labels and last[line] > 1:
                raise UserError(f"{here}, names {line!r}, which {last[line]} classes end with; write the whole name.")
            if line and by_name[line] in place:
                raise UserError(
                    f"{here}, names {line!r}, as {place[by_name[line]]} does; let each class have one split."
                )
            if line:
                place[by_name[line]] = here
                split[part].add(by_name[line])
    return {part: names & set(usable) for part, names in split.items()}


def given(examples: Examples, rows: Mapping[str, Sequence[int]]) -> dict[str, set[str]]:
    """Return the classes of each split that the data name themselves.

    Raises:
        UserError: a class is in two splits, or has examples in none.
    """
    split: dict[str, set[str]] = {part: set() for part in SHARES}
    for label, own in rows.items():
        parts = {examples.splits[row] for row in own}
        if len(parts) > 1 or None in parts:
            where = " and ".join(sorted(str(part) for part in parts if part)) or "no split"
            also = " and in none" if None in parts and len(parts) > 1 else ""
            raise UserError(
                f"{examples.name}: class {label} is in {where}{also}, but test classes must be new; give each class "
                "one split, or choose task.split=random, which draws whole classes."
            )
        split[str(parts.pop())].add(label)
    return split


def warn_of_like(names: Iterable[str], where: str, what: str) -> None:
    """Warn of names that differ in case, spaces or the encoding of accents alone; they may be in different splits."""
    alike: dict[str, set[str]] = {}
    for name in names:
        alike.setdefault(plain(name), set()).add(name)
    if several := [sorted(own) for own in alike.values() if len(own) > 1]:
        log.warning(
            "%s: %s are different %s, which may be in different splits; if they are the same, write them alike.",
            *(where, " and ".join(map(repr, several[0])), what),
        )


def by_class(
    examples: Examples,
    rows: Mapping[str, Sequence[int]],
    option: str,
    seed: int,
    ways: int,
    lists: Path | None = None,
    testing: bool = True,
) -> tuple[dict[str, dict[str, list[int]]], str]:
    """Return the positions of examples by split and class, and the name of the split.

    Args:
        examples: the data.
        rows: positions of the examples by class (`Examples.rows_of`).
        option: ``given`` (by the data), ``random``, or ``auto``: given if the data name splits.
        seed: of random splits.
        ways: number of classes that a split should have at least.
        lists: a folder of lists that decide instead (see `lists_in`).
        testing: whether test tasks are made of these data.

    Raises:
        UserError: the data do not name their splits, or a split has no class.
    """
    warn_of_like(rows, examples.name, "classes")
    has_splits = any(part is not None for part in examples.splits)
    if option == "given" and not has_splits:
        raise UserError(f"{examples.name} names no splits; choose task.split=random.")
    if lists is not None:
        split, name = lists_in(lists, examples.labels, rows), lists.name
    elif option == "given" or (option == "auto" and has_splits):
        split, name = given(examples, rows), "given"
    else:
        shares = SHARES if testing else {"train": 1 - VALIDATION, "val": VALIDATION}
        split, name = dealt_among(set(examples.labels), rows, seed, shares, ways), f"random{seed}"
    if split["train"] and not split["val"]:
        log.info("%s names no validation classes, so a fifth of its training classes become these.", examples.name)
        drawn = dealt(split["train"], seed, {"train": 1 - VALIDATION, "val": VALIDATION}, ways)
        split |= {part: drawn[part] for part in ("train", "val")}
    wanted = [part for part in SHARES if testing or part != "test"]
    for part in wanted:
        if not split[part] and name.startswith("random"):
            raise UserError(
                f"{examples.name} has {len(rows)} classes with enough {examples.what}, and {', '.join(wanted)} each "
                "need one at least; add some, or lower task.shots."
            )
        if not split[part]:
            raise UserError(
                f"{examples.name} has no {part} class with enough {examples.what} (of {len(rows)} such classes); add "
                "some, or choose task.split=random."
            )
    return {part: {label: list(rows[label]) for label in sorted(split[part])} for part in wanted}, name
