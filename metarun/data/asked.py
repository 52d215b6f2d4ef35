"""Questions on passages as their owner has them, and how a question with its passage becomes an example."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metarun.contracts import Examples, Predict, Request, Tree
from metarun.data import squad
from metarun.data.converters import row_names, table_of
from metarun.data.passages import RARITY, Array, Lexicon, Rarity, Text, joined, normalised
from metarun.data.portable import portable
from metarun.errors import require
from metarun.targets.span import best_spans

Answers = Sequence[tuple[int, str]]
"""The different answers of a question: the first character in the passage, and the text."""


class Placed(NamedTuple):
    """A question joined with its passage, and where its answers are in it."""

    numbers: Array
    """`FEATURES` of each position ``[positions, features]``."""
    gram: Array
    """The number of the hashed vector at each position ``[positions]``."""
    word: Array
    """The number of the passage's word at each of its positions, −1 where there is none ``[words]``."""
    sentence: Array
    """The number of the sentence at each of the passage's positions, −1 where there is none ``[words]``."""
    y: Array
    """The share of the answers that start and end at each position of the passage ``[words, 2]``."""


def ends_of(answers: Answers, text: Text) -> list[tuple[int, int]]:
    """Return the first and the last word of each answer."""
    found = []
    for start, answer in answers:
        inside = [i for i, w in enumerate(text.words) if w.start < start + len(answer) and w.end > start]
        found.append((inside[0], inside[-1]))
    return found


def placed(
    question: Text,
    passage: Text,
    ends: Sequence[tuple[int, int]],
    lexicon: Lexicon,
    rarity: Rarity,
    room: tuple[int, int],
    keep: bool,
) -> Placed:
    """Join a question with its passage.

    Args:
        question: cut by ``lexicon``.
        passage: the same.
        ends: the first and the last word of each answer.
        lexicon: the words of all texts.
        rarity: that of words.
        room: number of positions for the question and for the passage.
        keep: whether the passage keeps the sentences of the answers, if it is too long.
    """
    kept = sorted({int(passage.sentence[i]) for pair in ends for i in pair}) if keep else ()
    pair = joined(question, passage, lexicon, rarity, room, kept)
    sentence, y = np.full(room[1], -1, dtype=np.int64), np.zeros((room[1], 2), dtype=np.float32)
    there = pair.word >= 0
    sentence[there] = passage.sentence[pair.word[there]]
    place = {word: position for position, word in enumerate(pair.word.tolist()) if word >= 0}
    whole = [(place[first], place[last]) for first, last in ends if first in place and last in place]
    for first, last in whole:
        y[first, 0] += 1 / len(whole)
        y[last, 1] += 1 / len(whole)
    return Placed(pair.numbers.astype(np.float16), pair.gram.astype(np.int32), pair.word, sentence, y)


def inputs_of(numbers: Tensor, gram: Tensor, lexicon: Lexicon) -> Tensor:
    """Return inputs ``[..., positions, features + buckets]`` of numbers and of hashed vectors."""
    dtype = torch.get_default_dtype()
    numbers, vectors = numbers.to(dtype), torch.from_numpy(lexicon.vectors)[gram].to(dtype)
    # What a word looks like helps where it is common, as words that ask are; rare words would only be memorised.
    common = (1 - numbers[..., RARITY, None]).square()
    return torch.cat([numbers, common * vectors], -1)


def spans_found(longest: int, predict: Predict, data: Tree) -> Tensor:
    """Return the positions of the first and the last word of each answer ``[questions, 2]``."""
    spans = best_spans(predict(data["x"]).nan_to_num(), data["sentence"], longest)
    return torch.stack(spans, -1)


def pairs_of(x: Any) -> list[tuple[str, str]]:
    """Return passages and questions, given as pairs, as dictionaries or as a table.

    Raises:
        ValueError: there is something else.
    """
    if hasattr(x, "to_dict"):
        x = x.to_dict("records")
    found = []
    for one in x:
        if isinstance(one, Mapping):
            one = (one.get("passage", one.get("context")), one.get("question"))
        known = isinstance(one, Sequence) and len(one) == 2 and all(isinstance(text, str) for text in one)
        require(
            known and bool(one[0].strip()) and bool(one[1].strip()),
            "x must hold pairs (passage, question), or dictionaries with these two keys; "
            f"{one!r} is neither, or has an empty text",
        )
        found.append((one[0], one[1]))
    require(len(found) > 0, "x must hold at least one question with its passage")
    return found


def answers_of(given: Any, passage: str) -> Answers:
    """Return the answers of a question, given as a text, as (first character, text), or as a list of these.

    Raises:
        ValueError: there is something else, or an answer is not in the passage.
    """
    one = isinstance(given, str | Mapping) or (
        isinstance(given, Sequence) and len(given) == 2 and isinstance(given[0], int)
    )
    found = []
    for answer in [given] if one else list(given):
        if isinstance(answer, Mapping):
            answer = (answer.get("answer_start"), answer.get("text"))
        start, text = (None, answer) if isinstance(answer, str) else answer
        require(isinstance(text, str) and bool(text.strip()), f"y holds the answer {answer!r}, which is no text")
        start = passage.find(text) if start is None else start
        require(
            start >= 0 and passage[start : start + len(text)] == text,
            f"y holds the answer {text!r}, which is not in its passage, or not where it says; copy it to the letter",
        )
        found.append((start, text))
    require(len(found) > 0, "y must hold an answer for each question")
    return found


class OnPassages:
    """Questions of one task, and answers in the words of their passages (`metarun.contracts.UserTask`)."""

    def __init__(self, form: "Passages", x: Any, y: Any) -> None:
        self.form, self.pairs = form, pairs_of(x)
        self.lexicon, self.texts = Lexicon(form.buckets), dict[str, Text]()
        require(y is not None, "y must hold an answer for each question, and is None")
        given = list(y)
        require(
            len(given) == len(self.pairs),
            f"x has {len(self.pairs)} questions and y has {len(given)} answers; give one for each",
        )
        self.answers = [answers_of(own, passage) for own, (passage, _) in zip(given, self.pairs, strict=True)]

    def _cut(self, passages: Iterable[str]) -> list[Text]:
        passages = list(passages)
        self.texts |= {one: self.lexicon.text(one) for one in passages if one not in self.texts}
        return [self.texts[one] for one in passages]

    def _placed(self, pairs: Sequence[tuple[str, str]], answers: Sequence[Answers]) -> tuple[list[Placed], Tree]:
        """Return questions joined with their passages, and what a learner sees of them.

        How rare a word is, is counted in all passages of the support set and of ``pairs``.
        """
        shown = dict.fromkeys(passage for passage, _ in (*self.pairs, *pairs))
        rarity, room = Rarity(self._cut(shown)), (self.form.question, self.form.passage)
        found = []
        for (passage, question), own in zip(pairs, answers, strict=True):
            (text,) = self._cut([passage])
            ends, asked = ends_of(own, text), self.lexicon.text(question)
            found.append(placed(asked, text, ends, self.lexicon, rarity, room, keep=True))
        numbers, gram, _, sentence, _ = (torch.from_numpy(np.stack(leaf)) for leaf in zip(*found, strict=True))
        return found, {"x": inputs_of(numbers, gram, self.lexicon), "sentence": sentence}

    @cached_property
    def support(self) -> Tree:
        """The support set ``x``, ``y`` and ``sentence`` (`metarun.targets.span.Span`)."""
        found, data = self._placed(self.pairs, self.answers)
        y = torch.from_numpy(np.stack([one.y for one in found]))
        return {**data, "y": y.to(torch.get_default_dtype())}

    def ask(self, x: Any) -> Request:
        """Return the request for answers to questions; each answer is the text of a span of its passage."""
        pairs = pairs_of(x)
        found, data = self._placed(pairs, [()] * len(pairs))

        def texts(spans: Tensor) -> list[str]:
            said = []
            for (passage, _), one, (first, last) in zip(pairs, found, spans.tolist(), strict=True):
                words = self.texts[passage].words
                said.append(passage[words[one.word[first]].start : words[one.word[last]].end])
            return said

        return Request(data, partial(spans_found, self.form.longest), texts)

    def rows(self, answer: str, truth: Any) -> list[dict[str, Any]]:
        """Return an answer as a row of a table, with the first of the true answers."""
        return [{"prediction": answer} | ({"target": truth[0][1]} if truth else {})]

    def compared(self, answers: Sequence[str], y: Sequence[Any]) -> str:
        """Return exact match and F1 as the official evaluation of SQuAD has them."""
        pairs = [[agreement(one, text) for _, text in own] for one, own in zip(answers, y, strict=True)]
        exact, f1 = (100 * np.mean([max(pair[i] for pair in own) for own in pairs]) for i in range(2))
        return f"exact match {exact:.2f} %, F1 {f1:.2f} % on their own answers"


def agreement(answer: str, truth: str) -> tuple[float, float]:
    """Return exact match and token F1 of an answer (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250, §6.1)."""
    own, true = normalised(answer), normalised(truth)
    common = (Counter(own) & Counter(true)).total()
    return float(own == true), 2 * common / (len(own) + len(true)) if common else 0.0


@portable
@dataclass(frozen=True)
class Passages:
    """Questions on passages as their owner has them (`metarun.contracts.TaskConverter`)."""

    question: int
    """Number of positions for the words of the question."""
    passage: int
    """Number of positions for the words of the passage."""
    longest: int
    """Largest number of words of an answer."""
    buckets: int
    """Length of the hashed vector of a word."""

    def task(self, x: Any, y: Any) -> OnPassages:
        """Return a user's task.

        Args:
            x: pairs (passage, question), dictionaries with the keys ``passage`` (or ``context``) and ``question``, or a
                table with such columns.
            y: an answer for each question: its text, which is looked for in the passage; (first character, text); or
                a list of several.

        Raises:
            ValueError: they are something else.
        """
        return OnPassages(self, x, y)

    def read(self, path: Path) -> Examples:
        """Read a file in the format of SQuAD, or a table with the columns passage, question and perhaps answer.

        Raises:
            ValueError: the file is neither.
            UserError: the file is broken; the sentence names the place.
        """
        if path.suffix.lower() == ".json":
            articles = squad.read(path, answered=False)
            every = [(p.text, q) for article in articles for p in article.passages for q in p.questions]
            y = [question.answers for _, question in every]
            x = [(passage, question.text) for passage, question in every]
            return Examples(x, y if all(y) else None, [question.id for _, question in every])
        table = table_of(path, na=False).rename(columns=str.lower).rename(columns={"context": "passage"})
        require(
            {"passage", "question"} <= set(table.columns),
            f"{path} lacks a column named passage (or context) or question; name them so",
        )
        wanted = [column for column in ("passage", "question", "answer") if column in table]
        empty = table[wanted].isna().any(axis=1).to_numpy()
        require(
            not empty.any(), f"{path} has no {' or no '.join(wanted)} in row {empty.argmax() + 1}; fill or delete it"
        )
        texts = {column: [str(cell) for cell in table[column]] for column in wanted}
        x, own = list(zip(texts["passage"], texts["question"], strict=True)), None
        if "answer" in texts:
            own = [answers_of(a, passage) for a, (passage, _) in zip(texts["answer"], x, strict=True)]
        return Examples(x, own, row_names(len(x)))
