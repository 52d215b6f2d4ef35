"""Turns of dialogue systems: what a system wants to say, as acts with slots and values, and how a person put it.

Files have the form of the Schema-Guided Dialogue data set (Rastogi et al. 2020, https://arxiv.org/abs/1909.05855):
lists of dialogues in JSON, whose system turns have one frame per service with the acts.

Values are not learned: in prompts and in texts they are placeholders, symbols that are filled in again.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from metarun.data.files import PARTS, Files, found, json_of
from metarun.data.lines import text_of
from metarun.data.pieces import SYMBOLS, symbol
from metarun.data.splits import SHARES, dealt, listed
from metarun.errors import UserError

log = logging.getLogger(__name__)

FOLDER = "sgd_subset"
SOURCE = "https://github.com/google-research-datasets/dstc8-schema-guided-dialogue"
SPLIT_SEED = 13
PLACES = 8
"""The most different values of a turn that are placeholders."""
SAID_IN_WORDS = {"true", "false", "none", "dontcare"}
"""Values that speakers paraphrase, in lower case."""


class Action(NamedTuple):
    """One act of a system."""

    act: str
    slot: str
    values: tuple[str, ...]


class Turn(NamedTuple):
    """One turn of a system."""

    service: str
    dialogue: str
    actions: tuple[Action, ...]
    """In alphabetical order, so that the same acts are described in the same way."""
    utterance: str

    @property
    def values(self) -> list[str]:
        """The different values that are placeholders, in the order of the actions."""
        values = [v for action in self.actions if action.slot != "intent" for v in action.values]
        return list(dict.fromkeys(value for value in values if value.lower() not in SAID_IN_WORDS))[:PLACES]

    @property
    def text(self) -> str:
        """The utterance in lower case, with placeholders for values."""
        values = {value.lower(): symbol(i) for i, value in enumerate(self.values)}
        if not values:
            return self.utterance.lower()
        # The longest first, since a value may be part of another.
        one_of = "|".join(re.escape(value) for value in sorted(values, key=lambda value: (-len(value), value)))
        return re.sub(rf"(?<!\w)({one_of})(?!\w)", lambda match: values[match.group()], self.utterance.lower())


def words_of(name: str) -> str:
    """Return the name of a slot or an intent as words: ``BuyBusTicket`` and ``buy_bus_ticket`` are "buy bus ticket"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name).lower()


class Prompts:
    """Describes what a turn shall say.

    Args:
        acts: the acts of the training turns, each of which gets a symbol.
    """

    def __init__(self, acts: Sequence[str]) -> None:
        self.acts = {act: symbol(PLACES + i) for i, act in enumerate(acts)}

    @cached_property
    def alphabet(self) -> list[str]:
        """The symbols that prompts and texts may hold."""
        return [*map(symbol, range(PLACES)), *self.acts.values()]

    def of(self, turn: Turn) -> str:
        """Return the acts of a turn: the symbol or the name of each act, its slot in words, and its values."""
        place = {value: symbol(i) for i, value in enumerate(turn.values)}
        parts = []
        for action in turn.actions:
            values = (place.get(value, words_of(value)) for value in action.values)
            parts.append(" ".join([self.acts.get(action.act, words_of(action.act)), words_of(action.slot), *values]))
        return "".join(part.rstrip() for part in parts)


def filled(text: str, values: Sequence[str]) -> str:
    """Return a text with its placeholders filled in; one without a value is left out."""
    known = {symbol(i): value for i, value in enumerate(values)}
    return "".join(known.get(c, "" if SYMBOLS <= ord(c) < SYMBOLS + PLACES else c) for c in text)


def slot_errors(text: str, turn: Turn) -> tuple[int, int]:
    """Return the number of errors of a text with placeholders, and of values that it should have.

    An error is a value that is missing, or one that is there once too often or that the turn does not have
    (Wen et al. 2015, https://arxiv.org/abs/1508.01745, §5.1: ERR = (missing + redundant) / slots).
    """
    values = turn.values
    said = [text.count(symbol(i)) for i in range(PLACES)]
    missing = sum(
        not said[i] and not re.search(rf"(?<!\w){re.escape(value.lower())}(?!\w)", text)
        for i, value in enumerate(values)
    )
    redundant = sum(max(times - (i < len(values)), 0) for i, times in enumerate(said))
    return missing + redundant, len(values)


def _expect(holds: bool, where: str, what: str) -> None:
    if not holds:
        raise UserError(f"{where} {what}.")


def action_of(entry: Any, where: str) -> Action:
    """Return an act of a system.

    Raises:
        UserError: it is none; the sentence says ``where``.
    """
    kinds = isinstance(entry, dict) and isinstance(entry.get("act"), str) and isinstance(entry.get("slot", ""), str)
    values = entry.get("values", []) if kinds else None
    whole = isinstance(values, list) and all(isinstance(value, str) for value in values)
    _expect(whole, where, 'has an action without "act", "slot" and a list of "values"; add them')
    return Action(entry["act"], entry.get("slot", ""), tuple(values or ()))


def _turn(entry: Any, dialogue: str, where: str, said: bool) -> Turn | None:
    """Return the turn of a system; None for one of a user or one that concerns several services.

    One of no words is None, too, unless turns need not have been ``said``.
    """
    if not said and isinstance(entry, dict):
        entry = {"utterance": "", **entry}
    known = isinstance(entry, dict) and {"speaker", "utterance", "frames"} <= entry.keys()
    _expect(known and isinstance(entry["frames"], list), where, 'lacks "speaker", "utterance" or "frames"; add them')
    if entry["speaker"] != "SYSTEM" or len(entry["frames"]) != 1:
        return None
    frame, utterance = entry["frames"][0], entry["utterance"]
    known = isinstance(frame, dict) and "service" in frame and isinstance(frame.get("actions"), list)
    _expect(known, where, 'has a frame without "service" and a list of "actions"; add them')
    _expect(isinstance(utterance, str), where, "has an utterance that is no text; write one")
    if said and not utterance.strip():
        return None
    actions = tuple(sorted(action_of(action, where) for action in frame["actions"]))
    _expect(len(actions) > 0, where, "has no action; add what it says")
    values = {value for action in actions for value in action.values}
    for span in frame.get("slots", []) if utterance.strip() else ():
        ends = isinstance(span, dict) and (span.get("start"), span.get("exclusive_end"))
        _expect(bool(ends) and all(isinstance(end, int) for end in ends or ()), where, "has a slot without its ends")
        marked = utterance[span["start"] : span["exclusive_end"]]
        what = f"marks {marked!r} as a value, which no action of it has; correct its ends or the action"
        _expect(marked in values, where, what)
    return Turn(frame["service"], dialogue, actions, utterance)


def system_turns(content: bytes, place: str, said: bool = True) -> Iterator[Turn]:
    """Yield the system's turns of a file, or only those that have been ``said``.

    Raises:
        UserError: the file is not such a file; the sentence names the place in it.
    """
    text = text_of(content, place)
    try:
        dialogues = json_of(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}, line {error.lineno}, column {error.colno}, is not JSON ({error.msg}); it may be cut "
            "off, so fetch or write it again."
        ) from error
    _expect(isinstance(dialogues, list), place, "must hold a list of dialogues in JSON")
    for number, dialogue in enumerate(dialogues):
        known = isinstance(dialogue, dict) and isinstance(dialogue.get("turns"), list)
        _expect(known, f"{place}, dialogue {number} (counted from 0),", 'has no list of "turns"; add it')
        name = str(dialogue.get("dialogue_id", number))
        for index, entry in enumerate(dialogue["turns"]):
            turn = _turn(entry, name, f"{place}, dialogue {name}, turn {index} (counted from 0),", said)
            if turn is not None:
                yield turn


def is_there(data_dir: str) -> bool:
    """Whether the data set is in ``data_dir``."""
    return (Path(data_dir) / FOLDER).is_dir()


def read(path: str, data_dir: str) -> tuple[dict[str, list[Turn]] | list[Turn], str]:
    """Return the turns of a folder, by split where it has folders named train, val (or dev) and test; and its name.

    Raises:
        UserError: there is no such folder, no such file in it, or a file is broken.
    """
    place = found(path, data_dir)
    if not place.is_dir():
        raise UserError(f"{place} is a file; set task.path to the folder that holds it.")
    with Files(place, f"fetch it again from {SOURCE}") as files:
        names = [name for name in files.names() if name.endswith(".json") and not name.endswith("schema.json")]
        if not names:
            raise UserError(f"{place} has no JSON file of dialogues; put some there, or fetch them from {SOURCE}.")
        parts = {name: PARTS.get(name.partition("/")[0].lower()) for name in names}
        by_file = {name: list(system_turns(files.read(name), str(place / name))) for name in names}
    if None in parts.values():
        return [turn for turns in by_file.values() for turn in turns], place.name
    split: dict[str, list[Turn]] = {part: [] for part in SHARES}
    for name, turns in by_file.items():
        split[str(parts[name])] += turns
    return split, place.name


def by_service(turns: Mapping[str, Sequence[Turn]] | Sequence[Turn], dataset: str) -> dict[str, dict[str, list[Turn]]]:
    """Return the turns of each service by split; no service is in two splits.

    Where the data name splits, a service belongs to the first of train, val and test that has it, with all its turns.
    Otherwise services are drawn by a fixed seed.

    Raises:
        UserError: a split has no service.
    """
    if not isinstance(turns, Mapping):
        drawn = dealt({turn.service for turn in turns}, SPLIT_SEED, SHARES, 1)
        turns = {part: [turn for turn in turns if turn.service in names] for part, names in drawn.items()}
    home = dict[str, str]()
    parts: dict[str, dict[str, list[Turn]]] = {part: {} for part in SHARES}
    for part in SHARES:
        for turn in turns[part]:
            parts[home.setdefault(turn.service, part)].setdefault(turn.service, []).append(turn)
    for part, own in parts.items():
        if not own:
            raise UserError(f"{dataset} has no service for {part} that no earlier split has; add some.")
    return parts


def of_size(
    services: Mapping[str, Sequence[Turn]], shots: int, queries: int, dataset: str
) -> dict[str, list[list[Turn]]]:
    """Return the dialogues of each service that has enough turns for both parts; a line of the log names the others.

    Raises:
        UserError: none is left.
    """
    large, small = dict[str, list[list[Turn]]](), list[str]()
    for service, turns in services.items():
        dialogues = dict[str, list[Turn]]()
        for turn in turns:
            dialogues.setdefault(turn.dialogue, []).append(turn)
        # Support turns are those of whole dialogues, so that they may need one dialogue more than their number.
        longest = max(map(len, dialogues.values()))
        if len(turns) >= shots + queries + longest - 1:
            large[service] = list(dialogues.values())
        else:
            small.append(f"{service} ({len(turns)})")
    wanted = f"{shots} support and {queries} query turns of different dialogues"
    if not large:
        raise UserError(
            f"No service of {dataset} has {wanted}: {listed(small)}; lower task.shots and "
            "task.queries, or add dialogues."
        )
    if small:
        log.info("%s: services without %s are left out: %s.", dataset, wanted, listed(small))
    return large


def acts_of(turns: Iterable[Turn]) -> list[str]:
    """Return the acts that occur."""
    return sorted({action.act for turn in turns for action in turn.actions})
