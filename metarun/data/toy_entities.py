"""Artificial languages with entities of several types, so that tagging needs no download.

A sentence is a row of filler words with one to three entities. What tells an entity is alike in all languages: one to
three words with a capital letter, as some fillers have too. What tells its type is not: it follows from the word
before the entity and from the ending of its first word, which are drawn for each language. A learner that knows how
languages work needs few sentences to learn those of a new one. Everything is a function of a fixed seed.
"""

import random

from metarun.data.corpora import Corpus, Source
from metarun.data.splits import SHARES, dealt
from metarun.data.tagged import Sentence
from metarun.data.toy_text import new_words

LANGUAGES, SENTENCES, TYPES = 20, 160, 6
SEED = 190
FILLERS, STEMS, SIGNALS = 60, 200, 2
"""Numbers of filler words and of stems of entities per language, and of words that announce each type."""


def _language(randomness: random.Random) -> list[Sentence]:
    """Return the sentences of a new language."""
    fillers, stems = new_words(FILLERS, 2, randomness), new_words(STEMS, 2, randomness)
    signals = new_words(SIGNALS * TYPES, 1, randomness)
    endings = new_words(TYPES, 1, randomness)

    def entity() -> tuple[list[str], list[str]]:
        kind = randomness.randrange(TYPES)
        words = [randomness.choice(stems).capitalize() for _ in range(randomness.choice((1, 1, 2, 2, 3)))]
        tags = [f"B-type{kind}", *[f"I-type{kind}"] * (len(words) - 1)]
        words[0] += endings[kind]
        # Some entities are announced and all have their ending.
        if randomness.random() < 0.7:
            return [signals[kind * SIGNALS + randomness.randrange(SIGNALS)], *words], ["O", *tags]
        return words, tags

    def filler() -> tuple[list[str], list[str]]:
        word = randomness.choice(fillers)
        return [word.capitalize() if randomness.random() < 0.1 else word], ["O"]

    sentences = []
    for number in range(SENTENCES):
        parts = [entity() for _ in range(randomness.randint(1, 3))] + [
            filler() for _ in range(randomness.randint(4, 8))
        ]
        randomness.shuffle(parts)
        words, tags = ([x for part in parts for x in part[i]] for i in range(2))
        sentences.append(Sentence((words[0].capitalize(), *words[1:]), tuple(tags), str(number + 1)))
    return sentences


def toy_entities() -> Corpus:
    """Return all languages, each in one split."""
    randomness = random.Random(SEED)
    languages = {f"toy{i:02}": _language(randomness) for i in range(LANGUAGES)}
    split = dealt(languages, SEED, SHARES)
    return {part: {name: Source(languages[name]) for name in sorted(names)} for part, names in split.items()}
