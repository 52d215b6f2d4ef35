"""Acts to be put into words as their owner has them, and how acts with a draft become a prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarun.contracts import Examples, Predict, Request, Tree
from metarun.data.dialogues import PLACES, Prompts, Turn, action_of, filled, system_turns
from metarun.data.files import read_file, visible
from metarun.data.pieces import BOUNDARY, PADDING, Pieces, symbol
from metarun.data.portable import portable
from metarun.data.responses import WAYS
from metarun.errors import require
from metarun.targets.bleu import bleu, bleu_counts
from metarun.targets.decoding import Rule, each_once, readable, written


def draft_of(draft: str, tokenizer: Pieces, length: int) -> list[int]:
    """Return the ids of a draft with its end, at most ``length``."""
    return [*tokenizer.encoded(draft)[: length - 1], BOUNDARY]


def padded(ids: Sequence[int], length: int) -> list[int]:
    """Return ids followed by padding."""
    return [*ids, *[PADDING] * (length - len(ids))]


def prompt_of(ids: Sequence[int], draft: Sequence[int] | None, columns: int) -> list[int]:
    """Return a prompt of the ids of acts, and of those of a draft after a boundary unless it is None, padded."""
    return padded(ids if draft is None else [*ids, BOUNDARY, *draft], columns)


def before(text: Tensor) -> Tensor:
    """Return what a model reads to predict ``text [..., columns]``: a boundary, then all but the last token."""
    return torch.cat([torch.full_like(text[..., :1], BOUNDARY), text[..., :-1]], -1)


def said(predict: Predict, prompt: Tensor, draft: Tensor, length: int, rule: Rule | None, margin: float) -> Tensor:
    """Return the texts that are said ``[turns, length]``: the most likely ones that a learner writes, or drafts.

    Args:
        predict: the learner.
        prompt: ``[turns, columns]``.
        draft: texts ``[turns, length]``.
        length: most tokens of a text, its end included.
        rule: what written texts obey; None: nothing.
        margin: what is written is said if it is likelier than the draft by this many nats per token.
    """
    own = written(predict, prompt, length, rule=rule)
    ends = (own == BOUNDARY).long()
    own = own.masked_fill(ends.cumsum(1) - ends > 0, PADDING)

    def nats(text: Tensor) -> Tensor:
        """Return the mean cross-entropy per token of each text ``[turns]``."""
        logits = predict(torch.cat([prompt, before(text)], 1))
        of_token = -logits.log_softmax(-1).gather(-1, text[..., None])[..., 0] * (text > 0)
        mean: Tensor = of_token.sum(1) / (text > 0).sum(1).clamp(min=1)
        return mean

    return torch.where((nats(draft) - nats(own) >= margin)[:, None], own, draft)


def values_once(tokenizer: Pieces) -> Rule:
    """Return the rule that each value of a prompt is said once."""
    holds = [[float(symbol(i) in text) for i in range(PLACES)] for text in tokenizer.strings]
    return each_once(torch.tensor(holds))


def turn_of(given: Any, said: str = "") -> Turn:
    """Return what shall be said as a turn.

    Args:
        given: a turn of the Schema-Guided Dialogue data set, a dictionary with ``actions``, or a list of actions: each
            a dictionary with ``act``, ``slot`` and ``values``, or such a triple.
        said: the utterance.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(given, Turn):
        return given._replace(utterance=said or given.utterance)
    if isinstance(given, Mapping) and "frames" in given:
        require(len(given["frames"]) == 1, "a turn must have a single frame, of the service that speaks")
        given = given["frames"][0]
    acts = given.get("actions") if isinstance(given, Mapping) else given
    known = isinstance(acts, Sequence) and not isinstance(acts, str) and len(acts) > 0
    require(known, f"x must hold a list of actions for each turn, such as [('REQUEST', 'city', [])], not {given!r}")
    found = []
    for one in acts or ():
        if not isinstance(one, Mapping):
            triple = isinstance(one, Sequence) and not isinstance(one, str) and len(one) == 3
            require(triple, f"an action has an act, a slot and a list of values, and this has not: {one!r}")
            one = {"act": one[0], "slot": one[1], "values": one[2]}
        values = one.get("values", [])
        found.append(action_of({**one, "values": list(values) if isinstance(values, tuple) else values}, "x"))
    return Turn("", "", tuple(sorted(found)), said)


class Sayings:
    """Turns of one service, and what is said in further ones (`metarun.contracts.UserTask`)."""

    def __init__(self, form: "Acts", x: Any, y: Any) -> None:
        self.form, given = form, list(x)
        said = [turn_of(one).utterance for one in given] if y is None else list(y)
        require(
            len(given) == len(said), f"x has {len(given)} turns and y has {len(said)} utterances; give one for each"
        )
        whole = len(said) > 0 and all(isinstance(text, str) and text.strip() for text in said)
        require(whole, "y must hold an utterance for each turn, at least one")
        self.turns = [turn_of(one, text) for one, text in zip(given, said, strict=True)]

    def _given(self, turns: Sequence[Turn]) -> tuple[Tensor, Tensor]:
        """Return a prompt and a draft for each turn; drafts are made from the other turns of the support."""
        form, rows, drafts = self.form, [], []
        for turn in turns:
            others, draft = [other for other in self.turns if other is not turn], None
            if form.draft in WAYS:
                draft = draft_of(WAYS[form.draft](turn, others), form.tokenizer, form.length)
            ids = form.tokenizer.encoded(form.describe.of(turn))[: form.prompt]
            rows.append(prompt_of(ids, draft, form.columns))
            drafts.append(padded(draft or [], form.length))
        return torch.tensor(rows), torch.tensor(drafts)

    @cached_property
    def support(self) -> Tree:
        """The support set ``x`` and ``y`` as rows of ids (`metarun.targets.text.Text`)."""
        text = self.form.tokenizer.rows((turn.text for turn in self.turns), self.form.length)
        return {"x": torch.cat([self._given(self.turns)[0], before(text)], -1), "y": text}

    def ask(self, x: Any) -> Request:
        """Return the request for the most likely utterance of each turn."""
        return self.draw(x, 0.0)

    def draw(self, x: Any, temperature: float | None = None) -> Request:
        """Return the request for utterances that are drawn with a temperature of at least 0."""
        require(not isinstance(x, int | str), "x must hold what each turn says, and not a number of turns")
        form, turns = self.form, [turn_of(one) for one in x]
        temperature = form.temperature if temperature is None else temperature
        require(len(turns) > 0, "x must hold at least one turn")
        require(temperature >= 0, f"temperature must be at least 0, not {temperature}")

        def texts(ids: Tensor) -> list[str]:
            found = zip(ids.tolist(), turns, strict=True)
            return [filled(form.tokenizer.decoded(own), turn.values) for own, turn in found]

        prompts, drafts = self._given(turns)
        return Request({"x": prompts, "draft": drafts}, partial(said_of, form, temperature), texts)

    def compared(self, answers: Sequence[str], y: Sequence[str]) -> str:
        """Return the BLEU of all utterances together."""
        counts = np.sum([bleu_counts(own, text) for own, text in zip(answers, y, strict=True)], 0)
        return f"BLEU {100 * bleu(counts):.2f} % with their own utterances"


def said_of(form: "Acts", temperature: float, predict: Predict, data: Tree) -> Tensor:
    """Return the text of each prompt as ids ``[turns, length]``."""
    rule = readable(form.rule if form.once else None)
    if temperature > 0 or form.margin is None:
        return written(predict, data["x"], form.length, temperature, rule)
    return said(predict, data["x"], data["draft"], form.length, rule, form.margin)


@portable
@dataclass(frozen=True)
class Acts:
    """Turns of a dialogue system as their owner has them (`metarun.contracts.TaskConverter`)."""

    tokenizer: Pieces
    acts: tuple[str, ...]
    """The acts that have symbols."""
    prompt: int
    """Most tokens of acts."""
    length: int
    """Most tokens of a text, its end included."""
    draft: str = "none"
    """The way to make drafts, or ``none``."""
    once: bool = True
    """Whether each value of a prompt is said once."""
    temperature: float = 0.7
    """That of utterances that are drawn."""
    margin: float | None = None
    """See `said`; None: what is written is always said."""

    @property
    def columns(self) -> int:
        """The length of a prompt with its draft."""
        return self.prompt + (self.length + 1 if self.draft in WAYS else 0)

    @cached_property
    def describe(self) -> Prompts:
        """Describes what turns shall say."""
        return Prompts(self.acts)

    @cached_property
    def rule(self) -> Rule:
        """What texts obey where each value is said once."""
        return values_once(self.tokenizer)

    def task(self, x: Any, y: Any) -> Sayings:
        """Return a user's task.

        Args:
            x: what each turn says: a list of actions, each an act, a slot and a list of values as a triple or as a
                dictionary; or a turn of the Schema-Guided Dialogue data set.
            y: the utterance of each turn; None: those that turns of x have.

        Raises:
            ValueError: they are something else.
        """
        return Sayings(self, x, y)

    def read(self, path: Path) -> Examples:
        """Read the system's turns in a file of the Schema-Guided Dialogue data set, or in a folder of such files.

        Raises:
            ValueError: there is no such file.
            UserError: a file is broken; the sentence names the place.
        """
        files = [path] if path.is_file() else visible(path, "**/*.json")
        files = [file for file in files if file.name != "schema.json"]
        require(len(files) > 0, f"{path} has no JSON file of dialogues; name one")
        turns = [turn for file in files for turn in system_turns(read_file(file), str(file), said=False)]
        require(len(turns) > 0, f"{path} has no turn of a system; name a file with some")
        y = [turn.utterance for turn in turns]
        count = [f"{turn.dialogue}:{number}" for number, turn in enumerate(turns, 1)]
        return Examples(turns, y if all(y) else None, count)
