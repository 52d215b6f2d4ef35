"""Drawing N-way K-shot tasks from pools of classes, and how many examples a task has."""

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from metarun.contracts import Task
from metarun.data.splits import listed
from metarun.errors import require

log = logging.getLogger(__name__)

Shots = int | tuple[int, int]
"""A number of support examples, or the range [least, most] from which each task draws its number."""
Ways = int | tuple[int, int]
"""A number of classes, or the range [least, most] from which each task draws its number."""


class Range(NamedTuple):
    """A range from which a number of examples is drawn uniformly."""

    least: int
    most: int

    @property
    def fixed(self) -> bool:
        """Whether the range holds a single number."""
        return self.least == self.most

    def text(self, name: str) -> list[str]:
        """Return what the range adds to the name of a data set: nothing where the number is fixed."""
        return [] if self.fixed else [f"{name}={self.least}-{self.most}"]

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw numbers of examples ``[*shape]``."""
        return torch.randint(self.least, self.most + 1, shape, generator=generator)


def range_of(name: str, value: Shots | Ways, smallest: int = 1) -> Range:
    """Return the value of the key ``name`` as a range.

    Raises:
        ValueError: a number is below ``smallest``, or the range is not rising.
    """
    if isinstance(value, int):
        require(value >= smallest, f"{name} must be at least {smallest}, not {value}")
        return Range(value, value)
    least, most = value
    rising = smallest <= least <= most
    require(rising, f"{name} must be a rising range [least, most] from {smallest} on, not {list(value)}")
    return Range(least, most)


def shot_ranges(shots: Shots, train_shots: Shots | None) -> tuple[Range, Range]:
    """Return the numbers of support examples of other tasks, and those of training tasks, by default the same.

    Raises:
        ValueError: a number is below 1, or a range is not rising.
    """
    others = range_of("shots", shots)
    return others, others if train_shots is None else range_of("train_shots", train_shots)


def at_most(value: Shots | Ways, limit: int) -> Shots | Ways:
    """Return a number or a range without what is above ``limit``; a range becomes a number where nothing else is left.

    A range from YAML is a list.
    """
    if isinstance(value, int):
        return min(value, limit)
    least, most = (min(bound, limit) for bound in value)
    return least if least == most else (least, most)


def with_padding(x: Tensor, y: Tensor, real: Tensor | None, ways: Tensor | None = None) -> dict[str, Tensor]:
    """Return leaves of tasks, zero and of weight 0 where ``real [tasks, examples]`` is False; None: all are real.

    ``ways [tasks, ways]`` says which classes each task has; None: all.
    """
    if real is None:
        return {"x": x, "y": y}
    real = real.to(x.device)
    own = {} if ways is None else {"ways": ways[:, None].expand(-1, y.shape[1], -1).to(y)}

    def blank(leaf: Tensor) -> Tensor:
        return leaf.masked_fill(~real.view(*real.shape, *[1] * (leaf.ndim - 2)), 0)

    return {"x": blank(x), "y": blank(y), "weight": real.to(y.dtype), **own}


class TaskSizes(NamedTuple):
    """Sizes of a task: classes, support examples per class, query examples per class."""

    ways: int
    shots: Range
    queries: int
    uneven: bool = False
    """Whether each class, instead of each task, draws its number of support examples."""
    fewest_ways: int | None = None
    """The smallest number of classes where tasks draw theirs, ``ways`` being the largest; None: they do not."""

    @property
    def examples(self) -> int:
        """The largest number of examples per class, support set and queries together."""
        return self.shots.most + self.queries

    def text(self) -> list[str]:
        """Return what makes scores incomparable and is not visible in the number of shots."""
        ways = [] if self.fewest_ways is None else [f"ways={self.fewest_ways}-{self.ways}"]
        return [*ways, *self.shots.text("uneven_shots" if self.uneven else "shots")]


def require_queries(queries: int, train_queries: int | None) -> None:
    """Raise an error unless tasks have queries.

    Raises:
        ValueError: there are fewer than 1.
    """
    for name, value in {"queries": queries, "train_queries": train_queries}.items():
        require(value is None or value >= 1, f"{name} must be at least 1, not {value}")


def sizes_without_classes(
    shots: Shots, queries: int, train_shots: Shots | None, train_queries: int | None
) -> dict[bool, TaskSizes]:
    """Return the sizes of training tasks (True) and of others (False), whose examples are of no classes.

    Raises:
        ValueError: a number is below 1, or a range is not rising.
    """
    require_queries(queries, train_queries)
    others, train = shot_ranges(shots, train_shots)
    return {False: TaskSizes(1, others, queries), True: TaskSizes(1, train, train_queries or queries)}


class Dealt(NamedTuple):
    """The examples of one part of each task, in random order; all ``[tasks, examples]``."""

    label: Tensor
    """From 0 to ways − 1, in the order in which the task's classes were drawn."""
    identity: Tensor
    """Identity of the class."""
    example: Tensor
    """Identity of the example within the class, or the row that holds it."""
    real: Tensor | None
    """True for examples, False for padding; None where there is no padding."""
    ways: Tensor | None = None
    """True for the classes of each task ``[tasks, ways]``; None where it has all."""


class Asked(NamedTuple):
    """Sizes of tasks as a configuration has them; None in training means as in the other tasks."""

    ways: Ways
    shots: Shots
    queries: int
    train_ways: Ways | None = None
    train_shots: Shots | None = None
    train_queries: int | None = None
    uneven: bool = False

    def sizes(self) -> dict[bool, TaskSizes]:
        """Return the sizes of training tasks (True) and of others (False).

        Raises:
            ValueError: fewer than 2 ways, fewer than 1 of anything else, a range that is not rising, or ``uneven``
                without a range.
        """
        other_ways = range_of("ways", self.ways, 2)
        own_ways = other_ways if self.train_ways is None else range_of("train_ways", self.train_ways, 2)
        require_queries(self.queries, self.train_queries)
        others, train = shot_ranges(self.shots, self.train_shots)
        require(
            not (self.uneven and others.fixed and train.fixed),
            "uneven=true draws the shots of each class from a range; set shots or train_shots to one, such as [1, 5]",
        )

        def sizes(ways: Range, shots: Range, queries: int) -> TaskSizes:
            return TaskSizes(ways.most, shots, queries, self.uneven, None if ways.fixed else ways.least)

        return {
            False: sizes(other_ways, others, self.queries),
            True: sizes(own_ways, train, self.train_queries or self.queries),
        }


Pools = Mapping[str, Tensor]
"""The number of examples of each class ``[groups, classes]`` by split; a task draws its classes from one group."""


def classes_with(pool: Tensor, examples: int) -> int:
    """Return how many classes of every group have at least this number of examples."""
    return int((pool >= examples).sum(1).min())


def _common_size(pool: Tensor, ways: int, shots: int) -> int:
    """Return a number of examples that ``ways`` classes, and half of those with a query, have in every group."""
    sizes = pool.sort(1, descending=True).values
    usable = (sizes > shots).sum(1)
    rank = ((usable + 1) // 2).clamp(min=min(ways, pool.shape[1]))
    return int(sizes.gather(1, rank[:, None] - 1).min())


def _lowered(asked: Asked, pools: Pools, typed: Collection[str]) -> Asked:
    """Return sizes that the pools can serve as far as keys that are not ``typed`` allow; test sizes come first.

    The sizes of test tasks depend on the data alone, and not on what an algorithm's preset asks of training, so that
    algorithms stay comparable.
    """

    def lowered(asked: Asked, key: str, limit: int, smallest: int) -> Asked:
        value: Shots | Ways | None = getattr(asked, key)
        if value is None or key in typed:
            return asked
        return Asked(**{**asked._asdict(), key: at_most(value, max(limit, smallest))})

    most_shots = range_of("shots", asked.shots).most
    asked = lowered(asked, "ways", min(classes_with(pool, most_shots + 1) for pool in pools.values()), 2)
    others = asked.sizes()[False]
    for split in pools.keys() - {"train"}:
        if classes_with(pools[split], others.examples) < others.ways:
            size = _common_size(pools[split], others.ways, most_shots)
            asked = lowered(asked, "queries", size - most_shots, 1)
    pool = pools["train"]
    own = asked.sizes()[True]
    if classes_with(pool, own.examples) >= own.ways:
        return asked
    few_shots = 1 if asked.train_shots is not None and "train_shots" not in typed else own.shots.most
    asked = lowered(asked, "train_ways", classes_with(pool, few_shots + 1), 2)
    own = asked.sizes()[True]
    if classes_with(pool, own.examples) < own.ways:
        size = _common_size(pool, own.ways, few_shots)
        key = "queries" if asked.train_queries is None else "train_queries"
        if key not in typed:
            asked = asked._replace(train_queries=min(own.queries, max(size - own.shots.most, 1)))
        asked = lowered(asked, "train_shots", size - asked.sizes()[True].queries, 1)
    return asked


def sizes_for(
    asked: Asked,
    pools: Pools,
    dataset: str,
    what: str,
    typed: Collection[str] | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
) -> dict[bool, TaskSizes]:
    """Return the sizes of training tasks (True) and of others (False) that the pools can serve.

    A size that the user did not type, but that comes from a preset or a default, gives way to the data, and a line of
    the log says so.

    Args:
        asked: the sizes that the configuration has.
        pools: the number of examples of each class ``[groups, classes]`` by split.
        dataset: name of the data, for messages.
        what: what examples are called, for messages.
        typed: the keys that the user set; None: all.
        names: the names of the classes by split, if those that are too small for the tasks shall be named.

    Raises:
        ValueError: the pools cannot serve what the user asked for.
    """
    asked.sizes()
    possible = asked if typed is None else _lowered(asked, pools, typed)
    # Of the keys that may be null, only train_queries can become a number.
    before = (
        asked if possible.train_queries is None else asked._replace(train_queries=asked.train_queries or asked.queries)
    )
    changes = [
        f"task.{key}={new} instead of {getattr(before, key)}"
        for key, new in possible._asdict().items()
        if new != getattr(before, key)
    ]
    if changes:
        log.info("%s cannot serve larger tasks, so %s.", dataset, " and ".join(changes))
    sizes = possible.sizes()
    for split, pool in pools.items():
        ways, shots, queries, *_ = sizes[split == "train"]
        prefix = "train_" if split == "train" and sizes[True] != sizes[False] else ""
        enough = classes_with(pool, shots.most + queries)
        require(
            ways <= enough,
            f"{prefix}ways must be at most {enough}, the {split} classes of {dataset} with "
            f"{prefix}shots + {prefix}queries = {shots.most} + {queries} {what} or more, not {ways}",
        )
        counts = zip(names[split] if names else (), pool[0].tolist(), strict=False)
        if small := [f"{name} ({count})" for name, count in counts if count < shots.most + queries]:
            log.info(
                "%s: %s classes with fewer than %d %s are left out: %s.",
                *(dataset, split, shots.most + queries, what, listed(small)),
            )
    return sizes


def draw(allowed: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw ``size`` different positions in each row of ``allowed [..., pool]``, uniformly among the True ones."""
    # Positions that are not allowed sort after all those that are.
    return torch.rand(allowed.shape, generator=generator).masked_fill(~allowed, -1.0).topk(size).indices


def draw_few(available: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw ``size`` different numbers below each of ``available [...]``, in random order: ``[..., size]``.

    Unlike `draw`, this takes time and memory that do not grow with the pools (R. W. Floyd's algorithm, in Bentley and
    Floyd 1987, https://doi.org/10.1145/30401.315746).
    """
    chosen = available.new_zeros(*available.shape, size)
    for i in range(size):
        last = available - size + i
        drawn = (
            torch.rand(available.shape, generator=generator, dtype=torch.float64).mul(last + 1).long().clamp(max=last)
        )
        taken = (chosen[..., :i] == drawn[..., None]).any(-1)
        chosen[..., i] = torch.where(taken, last, drawn)
    # A late position can hold numbers that an early one cannot.
    return chosen.gather(-1, draw(torch.ones_like(chosen, dtype=torch.bool), size, generator))


LARGE_POOL = 1024
"""Number of examples of a class above which tasks are drawn by `draw_few`."""


class Cells(NamedTuple):
    """Where the examples of each group and class lie in one array of rows."""

    first: Tensor
    """The row at which the examples of each group and class begin ``[groups, classes]``."""
    size: Tensor
    """The number of these examples ``[groups, classes]``; 0 where a group lacks the class."""

    def draw(self, sizes: TaskSizes, count: int, generator: torch.Generator) -> tuple[Dealt, Dealt]:
        """Draw tasks, each from one group; return their support and query parts, with rows as examples."""
        group = torch.randint(len(self.size), (count, 1), generator=generator)
        classes = draw((self.size >= sizes.examples)[group[:, 0]], sizes.ways, generator)
        available, largest = self.size[group, classes], int(self.size.max())
        if largest > LARGE_POOL:
            examples = draw_few(available, sizes.examples, generator)
        else:
            examples = draw(torch.arange(largest) < available[..., None], sizes.examples, generator)
        return deal(classes, self.first[group, classes][..., None] + examples, sizes, generator)


def cells_of(size: Tensor) -> Cells:
    """Return the cells of rows that are sorted by group and class, given their numbers ``[groups, classes]``."""
    return Cells((size.flatten().cumsum(0) - size.flatten()).view_as(size), size)


def deal(classes: Tensor, examples: Tensor, sizes: TaskSizes, generator: torch.Generator) -> tuple[Dealt, Dealt]:
    """Deal drawn examples into the support and query parts of tasks, each in its own random order.

    Args:
        classes: identity of each task's classes ``[tasks, ways]``.
        examples: the examples drawn from each class ``[tasks, ways, sizes.examples]``.
        sizes: sizes of the tasks.
        generator: source of the order, and of the number of support examples.
    """
    labels = torch.arange(classes.shape[1])[None, :, None].expand(examples.shape)
    most = sizes.shots.most

    def part(columns: slice) -> tuple[Dealt, Tensor]:
        label, example = (values[:, :, columns].flatten(1) for values in (labels, examples))
        order = draw(torch.ones_like(label, dtype=torch.bool), label.shape[1], generator)
        label = label.gather(1, order)
        return Dealt(label, classes.gather(1, label), example.gather(1, order), None), order

    (support, order), (query, _) = part(slice(most)), part(slice(most, None))
    if sizes.shots.fixed and sizes.fewest_ways is None:
        return support, query
    # Drawn last, so that tasks with fewer shots are those with the most, less some of their support examples.
    count = sizes.shots.draw((len(classes), classes.shape[1] if sizes.uneven else 1, 1), generator)
    real = (torch.arange(most) < count).expand(-1, classes.shape[1], -1).flatten(1).gather(1, order)
    if sizes.fewest_ways is None:
        return support._replace(real=real), query._replace(real=torch.ones_like(query.label, dtype=torch.bool))
    number = Range(sizes.fewest_ways, sizes.ways).draw((len(classes), 1), generator)
    own = torch.arange(sizes.ways) < number
    return (
        support._replace(real=real & own.gather(1, support.label), ways=own),
        query._replace(real=own.gather(1, query.label), ways=own),
    )


class Ordered(NamedTuple):
    """The rows of one split, sorted by class."""

    order: Tensor
    """Positions of the rows in the data set ``[rows]``."""
    cells: Cells
    """Where each class is in ``order``."""
    classes: list[str]
    """The names of the classes."""


def ordered(rows: Mapping[str, Sequence[int]]) -> Ordered:
    """Return the positions of rows by class as tensors."""
    order = torch.tensor([row for own in rows.values() for row in own], dtype=torch.long)
    return Ordered(order, cells_of(torch.tensor([[len(own) for own in rows.values()]])), list(rows))


def units_of(source: object, names: Iterable[str]) -> frozenset[str]:
    """Return the names of a split's classes or tasks, with the source that they are of."""
    return frozenset(f"{name} of {source}" for name in names)


def digest_of(class_: Tensor) -> str:
    """Return a name for the examples of a class that has none, made of their content."""
    return f"the class {hashlib.sha256(class_.numpy().tobytes()).hexdigest()[:12]}"


def part_of(dealt: Dealt, x: Tensor, ways: int, training: bool) -> dict[str, Tensor]:
    """Return the leaves of one part of tasks, given its inputs ``x``; parts of training tasks also have ``class``."""
    y = one_hot(dealt.label, ways).to(x.device, torch.get_default_dtype())
    identity = {"class": dealt.identity.to(x.device)} if training else {}
    return {**with_padding(x, y, dealt.real, dealt.ways), **identity}


def draw_tasks(
    cells: Cells,
    sizes: TaskSizes,
    count: int,
    generator: torch.Generator,
    inputs: Callable[[Tensor], Tensor],
    training: bool,
) -> Task:
    """Draw tasks from labelled rows.

    Queries of tasks that are not for training carry ``identity [tasks, examples]``, the number of each one's class, by
    which the answers of a test are pooled.

    Args:
        cells: where the rows of each class are.
        sizes: sizes of the tasks.
        count: number of tasks.
        generator: source of all that is drawn.
        inputs: rows ``[tasks, examples]`` → inputs ``[tasks, examples, *input]``; called for support, then query.
        training: whether parts tell the identity of each example's class.
    """
    drawn = cells.draw(sizes, count, generator)
    support, query = (part_of(part, inputs(part.example), sizes.ways, training) for part in drawn)
    if not training:
        query["identity"] = drawn[1].identity.to(query["x"].device)
    return Task(support, query)
