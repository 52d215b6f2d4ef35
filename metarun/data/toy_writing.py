"""Artificial authors and services, so that tasks of generation need no download.

Everything is a function of a fixed seed, so it is the same on every machine.
"""

import random

from metarun.data.dialogues import Action, Turn
from metarun.data.lines import Author

SEED = 160
LETTERS = ("bdfgklmnprstvz", "aeiou")
WORDS, AUTHORS, WORKS, LINES = 200, 6, 8, 110
"""Words of the language, authors of a work, works, and lines of an author."""
FAVOURITES = 12
"""Words that an author prefers, and, a third as often, all authors of a work."""


def new_words(count: int, syllables: int, randomness: random.Random) -> list[str]:
    """Return different words of so many syllables."""
    words = dict[str, None]()
    while len(words) < count:
        words["".join(randomness.choice(LETTERS[i % 2]) for i in range(2 * syllables))] = None
    return list(words)


def toy_authors() -> list[Author]:
    """Return authors who write in one language, each with favourite words and a favourite end of a line."""
    randomness = random.Random(SEED)
    language, authors = new_words(WORDS, 2, randomness), []
    for work in range(WORKS):
        of_work = randomness.sample(language, FAVOURITES)
        for number in range(AUTHORS):
            own, mark = randomness.sample(language, FAVOURITES), randomness.choice(".!?;")
            lines = dict[str, None]()
            while len(lines) < LINES:
                words = [
                    randomness.choice(randomness.choices((language, own, of_work), (2, 3, 1))[0])
                    for _ in range(randomness.randint(3, 5))
                ]
                lines[" ".join(words).capitalize() + mark] = None
            authors.append(Author(f"author {number} of work {work}", f"work {work}", list(lines)))
    return authors


SERVICES, SLOTS, DIALOGUES, TURNS = 20, 4, 12, 6
"""Services, slots of a service, dialogues of a service, and turns of a dialogue."""
ACTS = ("CONFIRM", "GOODBYE", "INFORM", "REQUEST")


def toy_turns() -> list[Turn]:
    """Return turns of services, each with other slots, and with another word that begins what it says of an act.

    A sentence has that word, the words of the language for the act, the slot, and the value if the act has one.
    """
    randomness = random.Random(SEED + 1)
    language, names = new_words(40, 2, randomness), new_words(SERVICES * SLOTS, 3, randomness)
    of_act = {act: randomness.sample(language, 2) for act in ACTS}
    turns = []
    for service in range(SERVICES):
        slots = names[service * SLOTS : (service + 1) * SLOTS]
        first = {act: randomness.choice(language) for act in ACTS}
        for dialogue in range(DIALOGUES):
            for _ in range(TURNS):
                act = randomness.choice(ACTS)
                slot = "" if act == "GOODBYE" else randomness.choice(slots)
                value = str(randomness.randrange(100)) if act in ("CONFIRM", "INFORM") else ""
                said = " ".join(filter(None, [first[act], *of_act[act], slot, value])) + "."
                action = Action(act, slot, (value,) if value else ())
                turns.append(Turn(f"service {service}", f"{service}/{dialogue}", (action,), said.capitalize()))
    return turns
