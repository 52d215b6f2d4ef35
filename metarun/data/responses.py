"""Answers without learning, to compare learners with: a support turn with the same acts and slots, or templates."""

from collections.abc import Callable, Sequence

from metarun.data.dialogues import Turn, words_of
from metarun.data.pieces import symbol

TEMPLATES = {
    "INFORM": "the {slot} is {values}.",
    "OFFER": "the {slot} is {values}.",
    "CONFIRM": "please confirm the {slot} {values}.",
    "REQUEST": "what {slot} would you like?",
    "INFORM_COUNT": "there are {values}.",
    "OFFER_INTENT": "would you like to {values}?",
    "GOODBYE": "have a great day.",
    "REQ_MORE": "is there anything else i can help you with?",
    "NOTIFY_SUCCESS": "your request was successful.",
    "NOTIFY_FAILURE": "sorry, your request could not be completed.",
}
"""What is said for each act of the Schema-Guided Dialogue data set."""


def _kinds(turn: Turn) -> list[tuple[str, str]]:
    return [(action.act, action.slot) for action in turn.actions]


def template(turn: Turn) -> str:
    """Return a sentence for each act, with placeholders for values."""
    place = {value: symbol(i) for i, value in enumerate(turn.values)}
    sentences = []
    for action in turn.actions:
        values = [place.get(value, words_of(value)) for value in action.values]
        pattern = TEMPLATES.get(action.act, "{slot} {values}.")
        if action.act == "REQUEST" and values:
            pattern = "what {slot} would you like, such as {values}?"
        sentences.append(pattern.format(slot=words_of(action.slot), values=" or ".join(values)))
    return " ".join(sentences)


def _in_other_words(turn: Turn, of: Turn) -> str:
    """Return what is said in ``of``, with the placeholders of the values that ``turn`` has in the same slots."""
    place = {value: i for i, value in enumerate(turn.values)}
    ours = {(a.act, a.slot, n): value for a in turn.actions for n, value in enumerate(a.values)}
    theirs = {value: ours.get((a.act, a.slot, n)) for a in of.actions for n, value in enumerate(a.values)}
    return _swapped(of.text, [place.get(theirs[value] or "") for value in of.values], of.values)


def _swapped(text: str, places: Sequence[int | None], values: Sequence[str]) -> str:
    """Return a text with each placeholder replaced by another one, or by its own value where there is none."""
    for i, place in enumerate(places):
        # Symbols beyond all that occur, so that no placeholder is replaced twice.
        text = text.replace(symbol(i), values[i].lower() if place is None else symbol(1000 + place))
    for place in places:
        text = text if place is None else text.replace(symbol(1000 + place), symbol(place))
    return text


def nearest(turn: Turn, support: Sequence[Turn]) -> str:
    """Return the text of the support turn whose acts and slots overlap most (Jaccard); nothing without such turns."""
    own = set(_kinds(turn))

    def overlap(other: Turn) -> float:
        theirs = set(_kinds(other))
        return len(own & theirs) / len(own | theirs)

    return _in_other_words(turn, max(support, key=overlap)) if support else ""


def same_or_template(turn: Turn, support: Sequence[Turn]) -> str:
    """Return the text of a support turn with the same acts and slots, or else the template."""
    same = [other for other in support if _kinds(other) == _kinds(turn)]
    return _in_other_words(turn, same[0]) if same else template(turn)


WAYS: dict[str, Callable[[Turn, list[Turn]], str]] = {"nearest": nearest, "template": same_or_template}
"""Ways to answer without learning, by name: (turn, support turns) → text with placeholders."""
