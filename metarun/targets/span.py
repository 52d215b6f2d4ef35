"""Spans: where in a passage an answer starts and ends."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metarun.contracts import Need, Rows, Scores, Tree
from metarun.data.portable import portable
from metarun.errors import require
from metarun.targets.classes import NO_CHANCE
from metarun.targets.metric import Metric
from metarun.targets.weights import mean_over, weight_of

F1 = Metric("f1", higher_is_better=True, percent=True)
EXACT = Metric("exact-match", higher_is_better=True, percent=True)
SENTENCE = Metric("right-sentence", higher_is_better=True, percent=True)


class Spans(NamedTuple):
    """Spans of words, both ends included ``[questions]``."""

    start: Tensor
    end: Tensor


class Answers(NamedTuple):
    """How well spans answer questions, each ``[questions]``."""

    f1: Tensor
    exact: Tensor
    sentence: Tensor


def best_spans(output: Tensor, sentence: Tensor, longest: int) -> Spans:
    """Return the span of each question whose scores of start and end have the largest sum.

    Args:
        output: scores of each word as the start and as the end of the answer ``[questions, words, 2]``.
        sentence: the number of each word's sentence, −1 where there is no word ``[questions, words]``; no span contains
            a position without a word.
        longest: largest number of words of a span.
    """
    words = output.shape[-2]
    there = sentence >= 0
    start, end = output.masked_fill(~there[..., None], NO_CHANCE).unbind(-1)
    holes = (~there).to(output.dtype).cumsum(-1)
    longest = min(longest, words)

    def ahead(values: Tensor, fill: float) -> Tensor:
        """Return the values at each word and the next ones ``[questions, words, longest]``."""
        padded = torch.cat([values, values.new_full((*values.shape[:-1], longest - 1), fill)], -1)
        return torch.stack([padded[..., i : i + words] for i in range(longest)], -1)

    # Across a hole, the number of holes differs between start and end.
    apart = ahead(holes, words + 1.0) > holes[..., None]
    total = (start[..., None] + ahead(end, NO_CHANCE)).masked_fill(apart, 2 * NO_CHANCE)
    best = total.flatten(-2).argmax(-1)
    first = best // longest
    return Spans(first, first + best % longest)


def compared(spans: Spans, data: Tree, longest: int) -> Answers:
    """Compare the words of spans with those of the given answers, of which the most similar one counts.

    As in the official evaluation of SQuAD 1.1 (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250), F1 is that of
    the two bags of words, 0 where they share none, and an exact match has the same words in the same order.

    Args:
        spans: of each question.
        data: ``token [questions, words]`` numbers the words, 0 for those that do not count; ``gold [questions,
            answers, tokens]`` has those of the answers, padded with 0; ``sentence [questions, words]`` and ``right
            [questions, answers]`` have the sentences of words and of answers, the latter −1 for padding.
        longest: largest number of words of a span.
    """
    token, gold, sentence = data["token"], data["gold"], data["sentence"]
    at = spans.start[:, None] + torch.arange(longest, device=token.device)
    chosen = token.gather(-1, at.clamp(max=token.shape[-1] - 1)).masked_fill(at > spans.end[:, None], 0)
    counts = chosen > 0
    number, wanted = counts.sum(-1)[:, None], (gold > 0).sum(-1)
    # The n-th occurrence of a word in the span is found if the answer has it n times.
    occurrence = (chosen[:, :, None] == chosen[:, None, :]).tril().sum(-1)
    held = (chosen[:, None, :, None] == gold[:, :, None, :]).sum(-1)
    found = ((held >= occurrence[:, None]) & counts[:, None]).sum(-1)
    f1 = torch.where(found > 0, 2 * found / (number + wanted).clamp(min=1), 0.0)
    # In order: the n-th counting word of the span is the n-th of the answer.
    nth = (counts.cumsum(-1) - 1).clamp(min=0, max=gold.shape[-1] - 1)
    expected = gold.gather(-1, nth[:, None].expand(-1, gold.shape[1], -1))
    agree = ((expected == chosen[:, None]) | ~counts[:, None]).all(-1)
    exact = agree & (number == wanted) & (data["right"] >= 0)
    own = sentence.gather(-1, spans.start[:, None])
    right = ((own == data["right"]) & (own >= 0)).any(-1)
    dtype = data["y"].dtype
    return Answers(f1.amax(-1).to(dtype), exact.any(-1).to(dtype), right.to(dtype))


@portable
@dataclass(frozen=True)
class Span:
    """Targets ``y [questions, words, 2]``: 1 at the word where the answer starts, and at the one where it ends.

    Where a passage holds several answers, each has its share. Of a question whose answer is not among the words, all
    are 0. The other leaves are those of `compared`.

    Args:
        longest: largest number of words of a predicted answer, at least 1.
    """

    longest: int = 12
    outputs: int = 2
    metrics: tuple[Metric, ...] = (F1, EXACT, SENTENCE)
    offers: tuple[Need, ...] = ("loss", "examples", "rows")

    def __post_init__(self) -> None:
        require(self.longest >= 1, f"longest must be at least 1, not {self.longest}")

    def loss(self, output: Tensor, data: Tree) -> Tensor:
        """Return the mean cross-entropy over the words of a passage in nats, of start and end together."""
        there = (data["sentence"] >= 0)[..., None]
        nats = -(data["y"] * output.masked_fill(~there, NO_CHANCE).log_softmax(-2)).sum((-2, -1)) / 2
        return mean_over(nats, data)

    def answers(self, output: Tensor, data: Tree) -> Answers:
        """Return how well the best spans answer each question; an output that is not finite answers none."""
        sane = output.isfinite().all(-1).all(-1).to(output.dtype)
        spans = best_spans(output.detach().nan_to_num(), data["sentence"], self.longest)
        return Answers(*(values * sane for values in compared(spans, data, self.longest)))

    def scores(self, output: Tensor, data: Tree) -> Scores:
        """Return the mean over questions of token F1, exact match, and whether the right sentence was found.

        All are 0 where the data hold no answers to compare with.
        """
        if "gold" not in data:
            return {metric.name: output.new_zeros(()) for metric in self.metrics}
        found = self.answers(output, data)
        return {metric.name: mean_over(value, data) for metric, value in zip(self.metrics, found, strict=True)}

    def rows(self, z: Tensor, data: Tree) -> Rows:
        """Return a row per word of every passage."""
        weight = (data["sentence"] >= 0).to(data["y"].dtype) * weight_of(data)[:, None]
        return Rows(z.flatten(0, 1), data["y"].flatten(0, 1), weight.flatten())
