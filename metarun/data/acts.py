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
from metarun.data.files import read_file
from metarun.data.pieces import BOUNDARY, PADDING, Pieces, symbol
from metarun.data.portable import portable
from metarun.data.responses import WAYS
from metarun.errors import require
from metarun.targets.bleu import bleu, bleu_counts
from metarun.targets.decoding import Rule, each_once, readable, written


def prompt_of(ids: Sequence[int], draft: str | None, tokenizer: Pieces, length: int, columns: int) -> list[int]:
    """Return a prompt of acts, and of a draft between boundaries unless it is None, padded to ``columns``.

    Args:
        ids: of the acts.
        draft: a text, of which at most ``length`` − 1 tokens are taken.
        tokenizer: turns it into tokens.
        length: most tokens of a text, its end included.
        columns: length of the prompt.
    """
    found = list(ids)
    if draft is not None:
        found += [BOUNDARY, *tokenizer.encoded(draft)[: length - 1], BOUNDARY]
    return found + [PADDING] * (columns - len(found))


def before(text: Tensor) -> Tensor:
    """Return what a model reads to predict ``text [..., columns]``: a boundary, then all but the last token."""
    return torch.cat([torch.full_like(text[..., :1], BOUNDARY), text[..., :-1]], -1)


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

    def _prompts(self, turns: Sequence[Turn]) -> Tensor:
        """Return a prompt for each turn ``[turns, columns]``; drafts are made from the other turns of the support."""
        form, rows = self.form, []
        for turn in turns:
            others = [other for other in self.turns if other is not turn]
            draft = WAYS[form.draft](turn, others) if form.draft in WAYS else None
            ids = form.tokenizer.encoded(form.describe.of(turn))[: form.prompt]
            rows.append(prompt_of(ids, draft, form.tokenizer, form.length, form.columns))
        return torch.tensor(rows)

    @cached_property
    def support(self) -> Tree:
        """The support set ``x`` and ``y`` as rows of ids (`metarun.targets.text.Text`)."""
        text = self.form.tokenizer.rows((turn.text for turn in self.turns), self.form.length)
        return {"x": torch.cat([self._prompts(self.turns), before(text)], -1), "y": text}

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

        return Request({"x": self._prompts(turns)}, partial(said_of, form, temperature), texts)

    def compared(self, answers: Sequence[str], y: Sequence[str]) -> str:
        """Return the BLEU of all utterances together."""
        counts = np.sum([bleu_counts(own, text) for own, text in zip(answers, y, strict=True)], 0)
        return f"BLEU {100 * bleu(counts):.2f} % with their own utterances"


def said_of(form: "Acts", temperature: float, predict: Predict, data: Tree) -> Tensor:
    """Return the text of each prompt as ids ``[turns, length]``."""
    rule = readable(form.rule if form.once else None)
    return written(predict, data["x"], form.length, temperature, rule)


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
        files = [path] if path.is_file() else sorted(path.rglob("*.json"))
        files = [file for file in files if file.name != "schema.json"]
        require(len(files) > 0, f"{path} has no JSON file of dialogues; name one")
        turns = [turn for file in files for turn in system_turns(read_file(file), str(file), said=False)]
        require(len(turns) > 0, f"{path} has no turn of a system; name a file with some")
        y = [turn.utterance for turn in turns]
        count = [f"{turn.dialogue}:{number}" for number, turn in enumerate(turns, 1)]
        return Examples(turns, y if all(y) else None, count)
