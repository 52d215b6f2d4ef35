"""Questions on passages: a task is an article, or a language or domain, and an answer is a span of the passage.

Articles of the three splits differ, whatever the language, so that no passage of a test task has been seen in another
language either. `questions` also holds languages or domains out.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metarun.contracts import Facts, Joined, Pooled, Predict, Samples, Sizes, Spec, Split, Task, Tree
from metarun.data import squad
from metarun.data.asked import Passages, ends_of, inputs_of, placed
from metarun.data.files import found
from metarun.data.passages import (
    AFTER,
    ALIKE,
    ALIKE_FROM,
    BEFORE,
    CAPITAL,
    DIGIT,
    FEATURES,
    MARK,
    PASSAGE,
    RARITY,
    SENTENCE,
    START,
    Array,
    Lexicon,
    Rarity,
    Text,
)
from metarun.data.portable import portable
from metarun.data.spelling import plain
from metarun.data.splits import SHARES, dealt, listed, warn_of_like
from metarun.data.toy_questions import toy_questions
from metarun.errors import UserError, require
from metarun.targets.metric import Metric
from metarun.targets.span import Span, best_spans
from metarun.targets.weights import weight_of
from metarun.tasks.few_shot import units_of
from metarun.tasks.units import with_unit

log = logging.getLogger(__name__)

SPLIT_SEED = 19
SPLITS: tuple[Split, ...] = ("train", "val", "test")
POOLED = tuple(Metric(f"pooled-{metric.name}", True, True) for metric in Span().metrics)
SHOWN = 3
"""Number of questions of a test task that are shown."""

Corpus = Mapping[str, Sequence[squad.Article]]
"""Articles by file, which is a language or a domain."""


@portable
@dataclass(frozen=True)
class ByOverlap:
    """Answers without any learning.

    The answer is in the sentence that has most of the question, by rarity. There it is the run of words of the largest
    worth: a word is worth more the rarer it is, the nearer to a word of the question, and if it has a digit or a
    capital; a word of the question costs. The worth of a run is a difference of running sums, so that it is the sum of
    a score of its end and one of its start.
    """

    question: int
    """Number of the question's positions."""

    def __call__(self, support: Tree, x: Tensor) -> Tensor:
        """Return scores ``[questions, words, 2]`` for ``x [questions, positions, numbers]``."""
        words = x[:, self.question :]
        known = words[..., ALIKE] > ALIKE_FROM
        near = torch.maximum(words[..., BEFORE], words[..., AFTER])
        name = (words[..., CAPITAL] * (1 - words[..., START])).maximum(words[..., DIGIT])
        worth = 0.6 * words[..., RARITY] + 0.6 * near + 0.4 * name - 0.65
        worth = torch.where(known, worth - 0.5, worth) - 0.6 * words[..., MARK]
        summed = worth.cumsum(-1)
        sentence = words[..., START].cumsum(-1)
        # No run crosses the border of sentences, since that costs more than any run is worth.
        start = 100 * sentence + worth - summed + 1000 * words[..., SENTENCE]
        return torch.stack([start, summed - 100 * sentence], -1).masked_fill(words[..., PASSAGE, None] == 0, -1e6)


class Item(NamedTuple):
    """A question with its passage."""

    question: squad.Question
    passage: int
    group: int


class Leaves(NamedTuple):
    """What a question is in a task; arrays, and the target's as in `metarun.targets.span.compared`."""

    numbers: Array
    """`FEATURES` of each position ``[positions, features]``."""
    gram: Array
    """The number of the hashed vector at each position ``[positions]``."""
    word: Array
    """The number of the passage's word at each of its positions, −1 where there is none ``[words]``."""
    y: Array
    token: Array
    gold: Array
    sentence: Array
    right: Array


class Pool:
    """The questions of one split.

    Args:
        corpus: the articles of the split.
        lexicon: the words of all splits.
        by: whether a group of questions, from which a task draws, is an ``article`` or a ``file``.
        least: number of questions of the smallest group that is of use.
    """

    def __init__(self, corpus: Corpus, lexicon: Lexicon, by: str, least: int) -> None:
        self.lexicon, self.items, self.groups = lexicon, list[Item](), list[list[int]]()
        self.passages, self.file = list[squad.Passage](), list[str]()
        self.small, self.names = list[str](), list[str]()
        for name, articles in corpus.items():
            parts = [[article] for article in articles] if by == "article" else [list(articles)]
            for part in parts:
                label = f"{name}: {part[0].title}" if by == "article" else name
                size = sum(len(passage.questions) for article in part for passage in article.passages)
                if size < least:
                    self.small.append(f"{label} ({size})")
                self._add([passage for article in part for passage in article.passages], name, label, size >= least)

    def _add(self, passages: Sequence[squad.Passage], file: str, label: str, use: bool) -> None:
        """Add the passages of a group, and its questions if it is large enough for ``use``."""
        group = list[int]()
        for passage in passages:
            if use:
                group += range(len(self.items), len(self.items) + len(passage.questions))
            self.items += [Item(question, len(self.passages), len(self.groups)) for question in passage.questions]
            self.passages.append(passage)
            self.file.append(file)
        if use:
            self.groups.append(group)
            self.names.append(label)

    @cached_property
    def texts(self) -> list[Text]:
        """The passages, cut into words."""
        return [self.lexicon.text(passage.text) for passage in self.passages]

    @cached_property
    def rarity(self) -> dict[str, Rarity]:
        """How rare words are in the passages of each file; neither questions nor answers are looked at."""
        return {
            name: Rarity(text for text, file in zip(self.texts, self.file, strict=True) if file == name)
            for name in dict.fromkeys(self.file)
        }


class Questions:
    """Tasks of questions on passages.

    ``x [questions, positions, numbers]`` are questions joined with passages (`metarun.data.passages`), and the targets
    are those of `metarun.targets.span.Span`.

    Args:
        corpus: the articles of each split.
        dataset: name of the data, and all that makes scores incomparable.
        by: whether a task is an ``article`` or a ``file``.
        sizes: numbers of support and query questions of training tasks (True) and of others (False).
        room: number of positions for the question and for the passage.
        longest: largest number of words of a predicted answer.
        buckets: length of the hashed vector of a word.
        device: where tasks are put.
        place: where the articles come from; None: from ``dataset``.
    """

    def __init__(
        self,
        corpus: Mapping[Split, Corpus],
        dataset: str,
        by: str,
        sizes: Mapping[bool, tuple[int, int]],
        room: tuple[int, int],
        longest: int,
        buckets: int,
        device: str,
        place: str | None = None,
    ) -> None:
        self.device, self.sizes, self.room = device, sizes, room
        self.lexicon = Lexicon(buckets)
        self.pools = {
            split: Pool(own, self.lexicon, by, sizes[split == "train"][0] + 1) for split, own in corpus.items()
        }
        for split, pool in self.pools.items():
            least = sizes[split == "train"][0] + 1
            if not pool.groups:
                remedy = "lower task.shots, or " + ("add questions" if by == "file" else "set task.by=file")
                raise UserError(
                    f"{dataset}: no {split} task has {least} questions, one more than its shots; the largest have "
                    f"{listed(pool.small)}: {remedy}."
                )
            if pool.small:
                log.info(
                    "%s: %s tasks with fewer than %d questions are left out: %s.",
                    *(dataset, split, least, listed(pool.small)),
                )
        self.different_tests = len(self.pools["test"].groups)
        every = [item.question.answers for pool in self.pools.values() for item in pool.items]
        self.answers = max(map(len, every))
        self.tokens = max(len(self.lexicon.tokens(text)) for answers in every for _, text in answers)
        self.made: dict[tuple[Split, int, bool], Leaves] = {}
        self.units = {
            split: units_of(place or dataset, (article.title for articles in own.values() for article in articles))
            for split, own in corpus.items()
        }
        content = sha256(repr([(split, corpus[split]) for split in SPLITS]).encode()).hexdigest()[:6]
        self.dataset = f"{dataset}:{content}"
        shots, queries = sizes[False]
        target = Span(longest)
        self.spec = Spec(
            Joined(*room, len(FEATURES) + buckets),
            target,
            Sizes(shots, queries),
            metrics=target.metrics,
            facts=Facts(references={"overlap": ByOverlap(room[0])}),
        )
        self.target = target
        self.converter = Passages(*room, longest, buckets)
        self.pooled = Pooled(POOLED, self._counts, self._pooled)
        self.samples = Samples(self._spans, self._shown)

    def _leaves(self, split: Split, number: int, keep: bool) -> Leaves:
        """Return a question as arrays; with ``keep``, its passage keeps the sentences of the answers."""
        if (key := (split, number, keep)) not in self.made:
            self.made[key] = self._make(self.pools[split], number, keep)
        return self.made[key]

    def _make(self, pool: Pool, number: int, keep: bool) -> Leaves:
        item = pool.items[number]
        text, question = pool.texts[item.passage], self.lexicon.text(item.question.text)
        ends = ends_of(item.question.answers, text)
        rarity = pool.rarity[pool.file[item.passage]]
        own = placed(question, text, ends, self.lexicon, rarity, self.room, keep)
        found = self._blank()
        for name, leaf in own._asdict().items():
            getattr(found, name)[:] = leaf
        there = own.word >= 0
        found.token[there] = text.token[own.word[there]]
        for i, ((_, answer), (first, _)) in enumerate(zip(item.question.answers, ends, strict=True)):
            tokens = self.lexicon.tokens(answer)
            found.gold[i, : len(tokens)] = tokens
            found.right[i] = text.sentence[first]
        return found

    def _blank(self) -> Leaves:
        """Return the leaves of padding."""
        positions, words = sum(self.room), self.room[1]
        return Leaves(
            np.zeros((positions, len(FEATURES)), dtype=np.float16),
            np.zeros(positions, dtype=np.int32),
            np.full(words, -1, dtype=np.int32),
            np.zeros((words, 2), dtype=np.float32),
            np.zeros(words, dtype=np.int64),
            np.zeros((self.answers, self.tokens), dtype=np.int64),
            np.full(words, -1, dtype=np.int64),
            np.full(self.answers, -1, dtype=np.int64),
        )

    def _part(self, split: Split, chosen: Sequence[Sequence[int]], most: int, keep: bool, weigh: bool) -> Tree:
        """Return the leaves of one part of tasks: of ``most`` questions, padded with blank ones."""
        blank, dtype = self._blank(), torch.get_default_dtype()
        rows = [[self._leaves(split, number, keep) for number in own] + [blank] * (most - len(own)) for own in chosen]
        leaf = {
            name: torch.from_numpy(np.stack([[getattr(one, name) for one in row] for row in rows]))
            for name in Leaves._fields
        }
        number = torch.tensor([[*own, *[-1] * (most - len(own))] for own in chosen])
        found = {
            "x": inputs_of(leaf["numbers"], leaf["gram"], self.lexicon),
            "y": leaf["y"].to(dtype),
            **{name: leaf[name] for name in ("token", "gold", "sentence", "right")},
            "number": number,
        }
        if weigh:
            found["weight"] = (number >= 0).to(dtype)
        return {name: leaf.to(self.device) for name, leaf in found.items()}

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Draw ``count`` tasks; leaves ``[count, questions, ...]``, with ``weight`` where tasks differ in size.

        Of a query, the passage keeps the sentence of the answer only in training tasks.
        """
        groups, (shots, queries) = self.pools[split].groups, self.sizes[split == "train"]
        support, query = [], []
        chosen = torch.randint(len(groups), (count,), generator=generator)
        for group in chosen.tolist():
            order = torch.randperm(len(groups[group]), generator=generator).tolist()
            drawn = [groups[group][i] for i in order[: shots + queries]]
            support.append(drawn[:shots])
            query.append(drawn[shots:])
        weigh = any(len(group) < shots + queries for group in groups)
        asked = self._part(split, query, queries, split == "train", weigh)
        return Task(
            self._part(split, support, shots, True, weigh), with_unit(asked, chosen) if split == "test" else asked
        )

    def _counts(self, predict: Predict, task: Task) -> Tensor:
        """Return the sums of the metrics over the questions of a task, and the number of questions ``[4]``."""
        weight = weight_of(task.query)
        found = self.target.answers(predict(task.query["x"]), task.query)
        return torch.stack([*(values @ weight for values in found), weight.sum()])

    @staticmethod
    def _pooled(counts: Tensor) -> dict[str, float]:
        """Return the metrics over the questions of all tasks."""
        *sums, total = counts.double().sum(0).tolist()
        return {metric.name: value / total for metric, value in zip(POOLED, sums, strict=True)}

    def _spans(self, predict: Predict, task: Task) -> Tree:
        spans = best_spans(predict(task.query["x"]), task.query["sentence"], self.target.longest)
        return {"start": spans.start, "end": spans.end}

    def _shown(self, spans: Mapping[str, Tree], tasks: Task) -> str:
        """Return questions of test tasks with the answers before and after adaptation."""
        pool, lines = self.pools["test"], list[str]()
        for i, numbers in enumerate(tasks.query["number"].tolist()):
            for j, number in enumerate(numbers[:SHOWN]):
                if number < 0:
                    continue
                item = pool.items[number]
                text, word = pool.texts[item.passage], self._leaves("test", number, False).word
                lines.append(f"**{pool.names[item.group]}** {item.question.text.strip()}")
                lines.append(f"- answer: {item.question.answers[0][1]}")
                for when, tree in spans.items():
                    first, last = (int(word[int(tree[end][i, j])]) for end in ("start", "end"))
                    chosen = text.text[text.words[first].start : text.words[last].end]
                    lines.append(f"- {when} adaptation: {chosen}")
                lines.append("")
        return "\n".join(lines)


def _files(
    names: Sequence[str],
    by: str,
    train: Sequence[str] | None,
    val: Sequence[str] | None,
    test: Sequence[str] | None,
    seed: int,
) -> dict[Split, list[str]]:
    """Return the files of each split (see ``questions``)."""
    if by == "file" and train is None and test is None and len(names) >= len(SPLITS):
        drawn = {split: sorted(own) for split, own in dealt(names, seed, SHARES, 1).items()}
        return {"train": drawn["train"], "val": list(val or drawn["val"]), "test": drawn["test"]}
    named = {*(val or ()), *(test or ())} if by == "file" else set[str]()
    own = list(train or [name for name in names if name not in named] or names)
    others = [name for name in names if by == "article" or name not in own]
    return {"train": own, "val": list(val or own), "test": list(test or others or names)}


def _joined(questions: Sequence[squad.Question]) -> tuple[squad.Question, ...]:
    """Return the different questions of a passage, each with all answers that it has been given."""
    found = dict[str, squad.Question]()
    for one in questions:
        first = found.setdefault(plain(one.text), one)
        found[plain(one.text)] = first._replace(answers=tuple(dict.fromkeys((*first.answers, *one.answers))))
    return tuple(found.values())


def _without_copies(corpus: Mapping[Split, Corpus], name: str) -> dict[Split, Corpus]:
    """Return a corpus whose splits share no passage, and in which no passage has a question twice.

    A passage of several splits stays in the test articles, or else in those of validation.
    """
    later, left, result = set[str](), 0, dict[Split, Corpus]()
    for split in reversed(SPLITS):
        own, kept = set[str](), {file: list[squad.Article]() for file in corpus[split]}
        for file, articles in corpus[split].items():
            for article in articles:
                new = [passage for passage in article.passages if plain(passage.text) not in later]
                left += len(article.passages) - len(new)
                own |= {plain(passage.text) for passage in new}
                passages = tuple(passage._replace(questions=_joined(passage.questions)) for passage in new)
                kept[file].append(article._replace(passages=passages))
        result[split] = kept
        later |= own
    if left:
        log.info("%s: %d passages of training or validation are copies of later splits' and are left out.", name, left)
    return {split: result[split] for split in SPLITS}


def questions(
    shots: int = 10,
    queries: int = 10,
    train_shots: int | None = None,
    train_queries: int | None = None,
    by: Literal["article", "file"] = "article",
    dataset: Literal["auto", "xquad", "toy"] = "auto",
    path: str | None = None,
    train_files: Sequence[str] | None = None,
    val_files: Sequence[str] | None = None,
    test_files: Sequence[str] | None = None,
    shares: tuple[float, float, float] = (0.4, 0.1, 0.5),
    split_seed: int = SPLIT_SEED,
    question: int = 24,
    passage: int = 160,
    longest: int = 12,
    buckets: int = 32,
    device: str = "cpu",
    data_dir: str = "data",
) -> Questions:
    """Tasks whose articles, and perhaps languages or domains, training has not seen.

    Args:
        shots: number of support questions of a task, at least 1.
        queries: largest number of query questions of a validation or test task, at least 1.
        train_shots: the same as ``shots`` in training; null: ``shots``.
        train_queries: the same as ``queries`` in training; null: ``queries``.
        by: whether a task is an ``article`` of a file, or a ``file``: a language or a domain.
        dataset: ``xquad`` (12 languages), ``toy``, or ``auto``: xquad if it is there, else toy.
        path: the user's file in the format of SQuAD, or a folder of such files, in place of ``dataset``.
        train_files: names of the files of training tasks, such as ``[en]``; null: all, and with ``by=file`` those that
            are neither in ``val_files`` nor in ``test_files``. With ``by=file`` and neither these nor ``test_files``,
            files are drawn: 60 % for training, 15 % for validation, 25 % for testing.
        val_files: the same of validation tasks; null: ``train_files``.
        test_files: the same of test tasks; null: all, and with ``by=file`` those that are not in ``train_files``.
        shares: of articles in training, validation and test, above 0.
        split_seed: draws articles, and files.
        question: largest number of words of a question; more are cut off.
        passage: largest number of words of a passage; a longer one keeps the sentences that have most of the question.
        longest: largest number of words of a predicted answer.
        buckets: length of the hashed vector of a word.
        device: where tasks are put.
        data_dir: holds the folder ``xquad``.

    Raises:
        UserError: data are missing or broken, or have too few articles or questions.
    """
    counts = {"shots": shots, "queries": queries, "train_shots": train_shots, "train_queries": train_queries}
    counts |= {"question": question, "passage": passage, "longest": longest, "buckets": buckets}
    for name, value in counts.items():
        require(value is None or value >= 1, f"{name} must be at least 1, not {value}")
    require(min(shares) > 0, f"shares must be above 0, not {list(shares)}")
    if path is not None:
        require(dataset == "auto", f"path and dataset={dataset} are two data sets; choose one")
        place = found(path, data_dir)
        articles: Corpus = squad.corpus(place)
        name = place.stem
    elif dataset == "xquad" or (dataset == "auto" and squad.is_there(data_dir)):
        articles, name = squad.corpus(found("xquad", data_dir, "task.dataset=toy, or data_dir")), "xquad"
    else:
        if dataset == "auto":
            log.info("No XQuAD in %s/xquad, so the languages are toys (%s).", data_dir, squad.XQUAD)
        articles, name = toy_questions(), "toy"
    for own in (train_files, val_files, test_files):
        if unknown := [file for file in own or () if file not in articles]:
            raise UserError(f"{name} has no file {unknown[0]}; it has {', '.join(articles)}.")
    files = _files(list(articles), by, train_files, val_files, test_files, split_seed)
    used = {file for own in files.values() for file in own}
    titles = {article.title for file in used for article in articles[file]}
    if len(titles) < len(SPLITS):
        raise UserError(f"{name} has {len(titles)} articles, and each of the three splits needs one; add some.")
    warn_of_like(titles, name, "articles")
    of_split = dealt(titles, split_seed, dict(zip(SPLITS, shares, strict=True)), 1)
    corpus: dict[Split, Corpus] = {
        split: {file: [a for a in articles[file] if a.title in of_split[split]] for file in files[split]}
        for split in SPLITS
    }
    if path is not None:
        corpus = _without_copies(corpus, name)
    for split, of_file in corpus.items():
        for file, parts in of_file.items():
            if not any(passage.questions for article in parts for passage in article.passages):
                raise UserError(f"{name}: {file} has no question for {split}; add articles, or choose {split}_files.")
    sizes = {False: (shots, queries), True: (train_shots or shots, train_queries or queries)}
    facts = [name, f"by {by}", *(f"{split}={'+'.join(files[split])}" for split in ("train", "test"))]
    read_from = name if path is None else str(place.resolve())
    return Questions(corpus, ":".join(facts), by, sizes, (question, passage), longest, buckets, device, read_from)
