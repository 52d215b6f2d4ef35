"""A language model of an author: lines of an author, a few of which are shown, and others are predicted.

Works (plays, presidents, folders of the user) of training, validation and test differ. A test task also carries the
lines of another test author, ``query["control"]``: what is gained by adapting to these too is not knowledge of the
author. It carries as well how well an n-gram model predicts each query line, with and without the support lines.

With ``prior=ngram`` a learner starts from a better n-gram model of the training authors (`metarun.data.ngram_prior`):
what its model returns is added to the logarithms of that model's probabilities (residual learning: Li et al. 2022,
https://arxiv.org/abs/2210.14431). A training line gets them from counts that leave its work out, as those of a test
line do.
"""

import logging
import math
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarun.contracts import Predict, Samples, Scores, Sequences, Sizes, Spec, Split, Task, Tree
from metarun.data import lines, pieces
from metarun.data.acts import before
from metarun.data.files import found
from metarun.data.lines import Author
from metarun.data.ngram_prior import Prior, prior_of
from metarun.data.ngrams import Ngrams
from metarun.data.toy_writing import toy_authors
from metarun.data.writing import Lines
from metarun.errors import require
from metarun.targets.decoding import written
from metarun.targets.metric import Metric
from metarun.targets.text import BITS, Text
from metarun.tasks.few_shot import Cells, Dealt, Shots, cells_of, sizes_without_classes, units_of
from metarun.tasks.units import with_unit

log = logging.getLogger(__name__)

NGRAM = Metric("ngram-bits", higher_is_better=False)
NGRAM_ADAPTED = Metric("ngram-bits-with-support", higher_is_better=False)
CONTROL = Metric("bits-after-another-author", higher_is_better=False)
ORDER = 5
"""Length of the n-grams of the model to compare with."""
PRIOR = Metric("prior-bits", higher_is_better=False)
PRIOR_ORDER = 6
"""Length of the n-grams that a learner starts from; on the validation lines of Shakespeare's speakers, lengths of 4 to
7 have 2.466, 2.289, 2.249 and 2.255 bits per character, and the model to compare with, of length 5, has 2.375."""
FOLDS = 5
"""Number of tables of the n-gram model for training lines; each leaves out a fifth of the works."""
DIGITS = 3
"""Digits of its nats per line, since the last bits of a logarithm differ between machines."""
MOST_UNKNOWN = 0.01
"""Share of unknown characters above which a warning says what bits per character are worth."""
SHOWN = 4
"""Number of lines of an author that samples show, and of lines that they write."""


class Shelf:
    """The lines of one split as rows of ids ``[lines, columns]``, with the rows of each author.

    ``state [lines, columns]`` are rows of the family's table of the n-gram model, if it has one.
    """

    state: Tensor | None = None

    def __init__(self, authors: list[Author], tokenizer: pieces.Pieces, columns: int, device: str) -> None:
        self.names = [author.name for author in authors]
        self.works = [author.work for author in authors for _ in author.lines]
        self.texts = [line for author in authors for line in author.lines]
        self.ids = tokenizer.rows(self.texts, columns)
        self.rows = self.ids.to(device)
        self.cells: Cells = cells_of(torch.tensor([[len(author.lines) for author in authors]]))


class Authors:
    """Tasks of one author each: ``x [lines, columns]`` are token ids, ``y [lines, columns]`` the tokens that follow.

    Args:
        shots: number of support lines, at least 1, or a range from which each task draws it.
        queries: number of query lines of a validation or test task, at least 1.
        train_shots: the same as ``shots`` in training; null: ``shots``.
        train_queries: the same as ``queries`` in training; null: ``queries``.
        dataset: ``shakespeare`` (the speakers of eight plays; plays are held out), ``presidents`` (their addresses),
            ``toy``, or ``auto``: shakespeare if it is there, else toy.
        path: a folder of the user's with a folder of text files or a text file per author, in place of ``dataset``.
        merges: number of word pieces longer than a character; 0: characters alone.
        prior: what a learner starts from: ``ngram`` (an n-gram model of the training authors) or ``none``.
        length: most tokens of a line, its end included, at least 8; longer lines are broken between words.
        temperature: that of the samples, above 0.
        device: where the lines live.
        data_dir: holds the folder ``public_domain_authors``.
        converter: what a run has learned of characters and pieces, for a later test of it; None: fitted to training.

    Raises:
        UserError: data are missing or damaged.
    """

    def __init__(
        self,
        shots: Shots = 50,
        queries: int = 50,
        train_shots: Shots | None = None,
        train_queries: int | None = None,
        dataset: Literal["auto", "shakespeare", "presidents", "toy"] = "auto",
        path: str | None = None,
        merges: int = 0,
        prior: Literal["ngram", "none"] = "none",
        length: int = 64,
        temperature: float = 0.7,
        device: str = "cpu",
        data_dir: str = "data",
        converter: Lines | None = None,
    ) -> None:
        self.device, self.temperature, self.length = device, temperature, length
        self.sizes = sizes_without_classes(shots, queries, train_shots, train_queries)
        require(merges >= 0, f"merges must be at least 0, not {merges}")
        require(
            not merges or prior == "none",
            f"prior=ngram counts characters, and merges={merges} makes word pieces; set merges=0 or prior=none",
        )
        require(length >= 8, f"length must be at least 8, not {length}")
        require(temperature > 0, f"temperature must be above 0, not {temperature}")
        parts, name = corpus(dataset, path, length - 1, data_dir)
        for part, authors in parts.items():
            train = part == "train"
            parts[part] = lines.of_size(authors, self.sizes[train].examples, f"{name} ({part})", train)
        source = name if path is None else found(path, data_dir).resolve()
        self.units = {part: units_of(source, {author.work for author in authors}) for part, authors in parts.items()}
        content = sha256(repr(sorted(parts.items())).encode()).hexdigest()[:6]
        if converter is None:
            tokenizer = pieces.fit((line for author in parts["train"] for line in author.lines), merges)
        else:
            tokenizer = converter.tokenizer
        self.tokenizer = tokenizer
        self.shelves = {part: Shelf(authors, tokenizer, length, device) for part, authors in parts.items()}
        for part in ("val", "test"):
            warn_of_unknown(self.shelves[part].ids, f"{name} ({part})")
        require(
            len(self.shelves["test"].names) >= 2,
            f"{name} has a single author to test, and the control needs another; add some, or lower shots and queries",
        )
        self.different_tests = len(self.shelves["test"].names)
        self.ngrams = Ngrams(self.shelves["train"].ids.numpy(), ORDER, tokenizer.ids) if not merges else None
        self.prior: Prior | None = None
        if prior == "ngram":
            self._count(name, None if converter is None else converter.prior)
            self.loss = self._loss_with_prior
        self.converter = Lines(tokenizer, length, temperature, self.prior)
        self.known: dict[int, list[NDArray[np.float64]]] = {}
        """The n-gram model's nats of tasks that have been drawn, since test tasks are drawn again and again."""
        cut = [f"merges={merges}"] if merges else []
        self.dataset = ":".join([name, *self.sizes[False].text(), f"length={length}", *cut, content])
        target = Text(tokenizer.ids, tokenizer.lengths())
        self.spec = Spec(
            Sequences(0, length, tokenizer.ids),
            target,
            Sizes(self.sizes[False].shots.most, queries),
            metrics=(BITS, *((NGRAM, NGRAM_ADAPTED) if self.ngrams else ()), *((PRIOR,) if prior == "ngram" else ())),
        )
        self.target = target
        self.control = CONTROL
        self.samples = Samples(self._write, self._show)

    def _count(self, name: str, known: Prior | None) -> None:
        """Count the training lines; the table for a training line leaves out its work and some others.

        ``known`` is the n-gram model of another run, which is taken in place of that of the training lines.

        Raises:
            ValueError: the training lines are all of one work.
        """
        train, ids = self.shelves["train"], self.tokenizer.ids
        works = sorted(set(train.works))
        require(
            len(works) >= 2,
            f"{name} has a single work to train on, and prior=ngram leaves out the work of a line; add some, or "
            "set task.prior=none",
        )
        counted = prior_of(Ngrams(train.ids.numpy(), PRIOR_ORDER, ids), self.device)
        self.prior = counted if known is None else known
        tables = [self.prior.table]
        for split, shelf in self.shelves.items():
            if split != "train":
                shelf.state = self.prior.states(before(shelf.rows))
        train.state = torch.zeros_like(train.rows)
        folds = torch.tensor([works.index(work) % FOLDS for work in train.works])
        for fold in range(min(FOLDS, len(works))):
            own = folds == fold
            others = prior_of(Ngrams(train.ids[~own].numpy(), PRIOR_ORDER, ids), self.device)
            rows = own.to(self.device)
            used, place = torch.unique(others.states(before(train.rows[rows])), return_inverse=True)
            train.state[rows] = place + sum(len(table) for table in tables)
            tables.append(others.table[used])
        self.table = torch.cat(tables)

    def _loss_with_prior(self, predict: Predict, data: Tree) -> tuple[Tensor, Scores]:
        """Return the loss and scores of outputs that are added to what the n-gram model expects."""
        output = predict(data["x"]) + self.table[data["state"]]
        return self.target.loss(output, data), self.target.scores(output, data)

    def _part(self, shelf: Shelf, dealt: Dealt) -> dict[str, Tensor]:
        """Return the leaves of one part of tasks; all zero where there is padding."""
        rows = dealt.example.to(self.device)
        ids = shelf.rows[rows]
        leaves = {"x": before(ids), "y": ids, **({} if shelf.state is None else {"state": shelf.state[rows]})}
        if dealt.real is None:
            return leaves
        real = dealt.real.to(self.device)
        leaves = {key: leaf * real[..., None].to(leaf) for key, leaf in leaves.items()}
        return {**leaves, "weight": real.to(torch.get_default_dtype())}

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Draw ``count`` tasks; leaves ``[count, lines, ...]``."""
        shelf = self.shelves[split]
        support, query = shelf.cells.draw(self.sizes[split == "train"], count, generator)
        parts = self._part(shelf, support), self._part(shelf, query)
        if split != "test":
            return Task(*parts)
        # Of another author: the support set of the next task that has one, and tasks are drawn independently.
        other, _ = self._of_others(shelf, support.identity[:, 0], generator)
        further: dict[str, Any] = {"control": self._part(shelf, other)}
        if self.ngrams is not None:
            further["ngram"] = self._by_ngrams(shelf, support, query)
        return Task(parts[0], with_unit({**parts[1], **further}, support.identity[:, 0]))

    def _of_others(self, shelf: Shelf, authors: Tensor, generator: torch.Generator) -> tuple[Dealt, Dealt]:
        """Draw support and query lines of an author other than each of ``authors [tasks]``."""
        sizes, drawn = self.sizes[False], []
        for author in authors.tolist():
            allowed = shelf.cells.size.clone()
            allowed[:, author] = 0
            drawn.append(Cells(shelf.cells.first, allowed).draw(sizes, 1, generator))
        return tuple(_together(list(part)) for part in zip(*drawn, strict=True))  # type: ignore[return-value]

    def _by_ngrams(self, shelf: Shelf, support: Dealt, query: Dealt) -> Tensor:
        """Return the nats of query lines by counts of training, and of training and support: ``[tasks, lines, 2]``."""
        assert self.ngrams is not None
        found = []
        for task in range(len(query.example)):
            asked = query.example[task]
            shown = support.example[task] if support.real is None else support.example[task][support.real[task]]
            key = hash((shelf, *asked.tolist(), *shown.tolist()))
            if key not in self.known:
                rows, own = shelf.ids[asked].numpy(), Ngrams(shelf.ids[shown].numpy(), ORDER, self.ngrams.ids)
                self.known[key] = [self.ngrams.nats(rows, further).sum(1) for further in (None, own)]
            found.append(self.known[key])
        nats = torch.tensor(np.array(found), dtype=torch.float64).round(decimals=DIGITS)
        return nats.movedim(1, 2).to(self.device, torch.get_default_dtype())

    def scores(self, predict: Predict, data: Tree) -> Scores:
        """Return the bits per character of the n-gram models, whatever ``predict`` is."""
        found = {}
        if "ngram" in data:
            found = self._scores_of_ngrams(data)
        if self.prior is not None:
            found[PRIOR.name] = self.target.scores(self.table[data["state"]], data)[BITS.name]
        return found

    def _scores_of_ngrams(self, data: Tree) -> Scores:
        nats = data["ngram"]
        total = nats.sum(0) if "weight" not in data else data["weight"] @ nats
        without, with_support = (total / (math.log(2) * self.target.length(data))).unbind(0)
        return {NGRAM.name: without, NGRAM_ADAPTED.name: with_support}

    def _write(self, predict: Predict, task: Task) -> Tree:
        """Return lines that the learner writes: ``[SHOWN, columns]``."""

        return {
            "lines": written(
                self.converter.expecting(predict), task.query["x"][:SHOWN, :0], self.length, self.temperature
            )
        }

    def _show(self, made: Mapping[str, Tree], tasks: Task) -> str:
        """Return lines of the author, and those that the learner wrote before and after adaptation."""

        def shown(ids: Tensor) -> list[str]:
            return [f"    {self.tokenizer.decoded(row)}" for row in ids[:SHOWN].tolist()]

        text = [f"Lines are drawn with temperature {self.temperature:g}."]
        for task in range(len(tasks.query["y"])):
            text += ["", f"## Task {task + 1}", "", "Support lines:", "", *shown(tasks.support["y"][task])]
            for when, tree in made.items():
                text += ["", f"Written {when} adaptation:", "", *shown(tree["lines"][task])]
        return "\n".join(text) + "\n"


def warn_of_unknown(ids: Tensor, where: str) -> None:
    """Warn if many characters of ``ids`` are unknown, since bits per character take them for a single character."""
    share = float((ids == pieces.UNKNOWN).sum() / (ids > 0).sum())
    if share > MOST_UNKNOWN:
        log.warning(
            "%s: %.1f %% of the characters are in no training line. They count as one unknown character, which is easy "
            "to predict, so that bits per character are too few; train on authors of the same script.",
            *(where, 100 * share),
        )


def _together(parts: list[Dealt]) -> Dealt:
    """Return the parts of single tasks as those of a batch."""
    return Dealt(*(None if leaf[0] is None else torch.cat(leaf) for leaf in zip(*parts, strict=True)))  # type: ignore[arg-type]


def corpus(
    dataset: Literal["auto", "shakespeare", "presidents", "toy"], path: str | None, longest: int, data_dir: str
) -> tuple[dict[str, list[Author]], str]:
    """Return the authors of each split, and the name of the data.

    Raises:
        UserError: data are missing or damaged.
    """
    if path is not None:
        require(dataset == "auto", f"path and dataset={dataset} are two data sets; choose one")
        authors, split, name = lines.own_texts(path, data_dir, longest)
        return lines.by_work(authors, split, name), name
    if dataset == "auto":
        dataset = "shakespeare" if lines.is_there(data_dir, "shakespeare") else "toy"
        if dataset == "toy":
            log.info("No %s in %s, so the authors are toys (%s).", lines.FOLDER, data_dir, lines.SOURCE)
    authors = toy_authors() if dataset == "toy" else lines.CORPUS[dataset](data_dir, longest)
    return lines.by_work(authors, None, dataset), dataset
