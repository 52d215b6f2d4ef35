"""Tags: entities in sentences, as a tag per word."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from metarun.contracts import Need, Rows, Scores, Tree
from metarun.data.portable import portable
from metarun.targets.metric import Metric

ENTITY_F1 = Metric("entity-f1", higher_is_better=True, percent=True)
SPAN_F1 = Metric("span-f1", higher_is_better=True, percent=True)
NEVER = -1e9
"""The score of what a task or a path of tags cannot have: its probability is 0 to the bit, and its gradient too."""


def begins_at(kind: int) -> int:
    """Return the tag of the first word of an entity of the ``kind``-th type; that of its other words follows.

    Tag 0 is that of words outside of entities.
    """
    return 1 + 2 * kind


def kind_of(tag: Tensor) -> Tensor:
    """Return the type of each tag, counted from 0; -1 for words outside of entities."""
    return (tag + 1).div(2, rounding_mode="floor") - 1


def is_inside(tag: Tensor) -> Tensor:
    """Whether each tag is that of a word of an entity after its first."""
    return (tag > 0) & (tag % 2 == 0)


def spans(tag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the entities of sentences by the words at which they begin.

    An I- tag that continues no entity begins one, as in the evaluation of CoNLL (Tjong Kim Sang and De Meulder 2003,
    https://aclanthology.org/W03-0419, ``conlleval``).

    Args:
        tag: the tag of each word ``[sentences, words]``.

    Returns:
        Whether an entity begins at each word, its type, and the word after its last, all ``[sentences, words]``.
    """
    kind, words = kind_of(tag), tag.shape[-1]
    before = torch.cat([torch.full_like(kind[..., :1], -1), kind[..., :-1]], -1)
    goes_on = is_inside(tag) & (kind == before)
    begins = (kind >= 0) & ~goes_on
    place = torch.arange(words, device=tag.device).expand(tag.shape)
    breaks = place.masked_fill(goes_on, words)
    # The first break after a word is the smallest to its right.
    after = torch.cat([breaks[..., 1:], torch.full_like(breaks[..., :1], words)], -1)
    return begins, kind, after.flip(-1).cummin(-1).values.flip(-1)


def hits(found: Tensor, true: Tensor) -> Tensor:
    """Return numbers of entities ``[4]``: right, found, true; and of spans that are right whatever their type.

    Args:
        found: tags ``[sentences, words]``, 0 in padding.
        true: the same.
    """
    begins, kind, after = spans(found)
    true_begins, true_kind, true_after = spans(true)
    same = begins & true_begins & (after == true_after)
    return torch.stack([(same & (kind == true_kind)).sum(), begins.sum(), true_begins.sum(), same.sum()])


def f1(right: Tensor, found: Tensor, true: Tensor) -> Tensor:
    """Return the F1 of entities from their numbers; 1 where there are none and none were found."""
    total = found + true
    return torch.where(total > 0, 2 * right / total.clamp(min=1), 1.0)


def there(data: Tree) -> Tensor:
    """Return 1 for words and 0 for padding ``[sentences, words]``; padding has no tag."""
    weight: Tensor = data["y"].sum(-1)
    return weight


def own_tags(output: Tensor, data: Tree) -> Tensor:
    """Return the logits ``[sentences, words, tags]`` without chances for tags of types that the task lacks.

    Tasks with fewer types than the largest one say in ``ways [sentences, tags]`` which tags they have.
    """
    return output.masked_fill(data["ways"][:, None] == 0, NEVER) if "ways" in data else output


Decoder = Literal["words", "viterbi", "spans", "crf"]


def allowed(tags: int) -> Tensor:
    """Return 0 for each pair of successive tags ``[tags, tags]``, or ``NEVER`` for an I- tag that continues nothing."""
    tag = torch.arange(tags)
    continues = (kind_of(tag)[:, None] == kind_of(tag)) & (tag > 0)
    return torch.where(is_inside(tag) & ~continues, NEVER, 0.0)


def counted(tags: Tensor, weight: Tensor, outputs: int) -> Tensor:
    """Return transition scores ``[outputs, outputs]``: log-probabilities of the next tag, by what kind of step it is.

    Steps from outside lead outside or to the first word of an entity; those from an entity also to its next word.
    Types are not told apart, so that the scores hold for new types: the probability of a first word is divided by the
    number of types. Each kind of step counts once more than it was seen.

    Args:
        tags: of the training sentences ``[sentences, words]``.
        weight: 1 for words, 0 for padding ``[sentences, words]``.
        outputs: number of tags.
    """
    pair = weight[:, :-1] * weight[:, 1:]
    before, now = tags[:, :-1], tags[:, 1:]
    scores = torch.full((outputs, outputs), NEVER)
    tag, steps = torch.arange(outputs), {"out": now == 0, "begin": now % 2 == 1, "inside": is_inside(now)}
    for within in (False, True):
        numbers = {name: 1 + float((pair * (step & ((before > 0) == within))).sum()) for name, step in steps.items()}
        if not within:
            del numbers["inside"]
        total = torch.tensor(sum(numbers.values())).log()
        rows = (tag > 0) == within
        scores[rows, 0] = torch.tensor(numbers["out"]).log() - total
        begin = torch.tensor(numbers["begin"] / max((outputs - 1) // 2, 1)).log() - total
        scores[torch.outer(rows, tag % 2 == 1)] = begin
        if within:
            scores = torch.where(
                torch.outer(rows, is_inside(tag)) & (kind_of(tag)[:, None] == kind_of(tag)),
                torch.tensor(numbers["inside"]).log() - total,
                scores,
            )
    return scores


def viterbi(emission: Tensor, transition: Tensor, weight: Tensor) -> Tensor:
    """Return the best path of tags ``[sentences, words]`` by the sum of its scores (Viterbi 1967).

    Args:
        emission: scores of the tags of each word ``[sentences, words, tags]``.
        transition: scores of each pair of successive tags ``[tags, tags]``; before the first word is tag 0.
        weight: 1 for words, 0 for padding, which follows all words ``[sentences, words]``.
    """
    best = emission[:, 0] + transition[0]
    back = []
    for word in range(1, emission.shape[1]):
        score, origin = (best[:, :, None] + transition).max(1)
        real = weight[:, word, None] > 0
        best = torch.where(real, score + emission[:, word], best)
        back.append(torch.where(real, origin, torch.arange(len(transition), device=origin.device)))
    tag = best.argmax(-1)
    path = [tag]
    for origin in reversed(back):
        tag = origin.gather(1, tag[:, None])[:, 0]
        path.append(tag)
    return torch.stack(path[::-1], 1)


def spans_first(output: Tensor, weight: Tensor) -> Tensor:
    """Return tags ``[sentences, words]``: where entities are, whatever their type, and then the type of each.

    Words that are surely part of an entity, and of which no type is as likely as being outside, belong to an entity.
    Its type is the most likely one for all its words together.

    Args:
        output: logits of the tags of each word ``[sentences, words, tags]``.
        weight: 1 for words, 0 for padding, which follows all words ``[sentences, words]``.
    """
    begin, inside = output[..., 1::2], output[..., 2::2]
    any_begin, any_inside = begin.logsumexp(-1, keepdim=True), inside.logsumexp(-1, keepdim=True)
    step = log_softmax(torch.cat([output[..., :1], any_begin, any_inside], -1), -1)
    place = torch.where(weight > 0, viterbi(step, allowed(3).to(output), weight), 0)
    kinds = torch.where(place[..., None] == 1, begin - any_begin, inside - any_inside)
    number = (place == 1).cumsum(-1)
    same = (number[:, :, None] == number[:, None]) & (place > 0)[:, None]
    kind = (same.to(kinds) @ kinds).argmax(-1)
    return torch.where(place > 0, place + 2 * kind, 0)


def path_loss(emission: Tensor, transition: Tensor, data: Tree) -> Tensor:
    """Return −log p of the true paths in a linear-chain conditional random field, per word.

    Lafferty, McCallum, Pereira 2001, https://repository.upenn.edu/cis_papers/159: p(y) ∝ exp Σ (transition + emission).
    """
    y, weight = data["y"], there(data)
    score = (emission * y).sum((1, 2))
    first = y[:, 0] @ transition[0]
    score = score + first + ((y[:, :-1] @ transition) * y[:, 1:]).sum((1, 2))
    total = emission[:, 0] + transition[0]
    for word in range(1, emission.shape[1]):
        further = (total[:, :, None] + transition).logsumexp(1) + emission[:, word]
        total = torch.where(weight[:, word, None] > 0, further, total)
    nats: Tensor = ((total.logsumexp(-1) - score) * weight[:, 0]).sum() / weight.sum()
    return nats


@portable
@dataclass(frozen=True)
class Tags:
    """Targets ``y [sentences, words, tags]`` that are one-hot tags, and zero for padding.

    Tag 0 is that of words outside of entities; each type then has the tag of an entity's first word and that of its
    other words (IOB2).
    """

    types: tuple[str, ...]
    """The names of the types, or of the places for types that differ from task to task."""
    decoder: Decoder = "words"
    """How outputs become tags: ``words`` takes the most likely tag of each word; ``viterbi`` the most likely path among
    those where an I- tag continues an entity; ``spans`` finds entities whatever their type and then the type of each;
    ``crf`` also learns by the probability of paths."""
    transitions: Tensor | None = field(default=None, compare=False, repr=False)
    """Scores of each pair of successive tags ``[tags, tags]`` for ``crf``; for ``viterbi`` those of ``allowed``."""
    metrics: tuple[Metric, ...] = (ENTITY_F1, SPAN_F1)
    offers: tuple[Need, ...] = ("loss", "examples", "rows", "classes")

    @property
    def outputs(self) -> int:
        """The number of tags."""
        return 1 + 2 * len(self.types)

    def _transitions(self, output: Tensor) -> Tensor:
        scores = allowed(self.outputs) if self.transitions is None else self.transitions
        return scores.to(output)

    def loss(self, output: Tensor, data: Tree) -> Tensor:
        """Return the mean cross-entropy over words in nats, or with ``crf`` that of paths, per word."""
        output = own_tags(output, data)
        if self.decoder == "crf":
            return path_loss(output, self._transitions(output), data)
        nats: Tensor = -(data["y"] * log_softmax(output, -1)).sum() / there(data).sum()
        return nats

    def decoded(self, output: Tensor, data: Tree) -> Tensor:
        """Return the tags ``[sentences, words]`` of outputs; those of padding are 0."""
        output, weight = own_tags(output.detach(), data), there(data)
        if self.decoder == "words":
            tag = output.argmax(-1)
        elif self.decoder == "spans":
            tag = spans_first(output, weight)
        else:
            scores = output if self.decoder == "crf" else log_softmax(output, -1)
            tag = viterbi(scores, self._transitions(output), weight)
        return torch.where(weight > 0, tag, 0)

    def counts(self, output: Tensor, data: Tree) -> Tensor:
        """Return the numbers of ``hits``: entities that are right, found, true; and spans that are right."""
        return hits(self.decoded(output, data), data["y"].argmax(-1))

    def scores(self, output: Tensor, data: Tree) -> Scores:
        """Return the F1 of entities, exact in span and type, and of spans whatever their type.

        An output that is not finite finds nothing.
        """
        right, found, true, spans_right = self.counts(output.nan_to_num(), data).to(output.dtype)
        found_f1 = {ENTITY_F1.name: f1(right, found, true), SPAN_F1.name: f1(spans_right, found, true)}
        finite = output.isfinite().all()
        return {name: torch.where(finite, value, 0.0) for name, value in found_f1.items()}

    def rows(self, z: Tensor, data: Tree) -> Rows:
        """Return a row per word."""
        return Rows(z.flatten(0, 1), data["y"].flatten(0, 1), there(data).flatten())
