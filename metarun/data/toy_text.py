"""An artificial language and its translations, so that text tasks need no download.

A meaning is three concepts: an action, an object and a quality. A class is the set of sentences that share
one triple. Each concept has several surface words that look nothing alike, so that sentences of one class may
have no word in common: a learner that knows which words are synonyms needs one example where others need many.
Sentences also contain function words and words of other concepts, as noise. Classes of different splits are
different triples of the same concepts.

Other languages have the same grammar and different words, except for a share of cognates, which differ from a common
root in one letter. Everything is a function of a fixed seed, so it is the same on every machine.
"""

import random
from functools import cache
from itertools import product

from metarun.data.intents import Sentence

KINDS, CONCEPTS, SYNONYMS, FUNCTION_WORDS = 3, 15, 5, 30
"""Kinds of concept (action, object, quality), concepts of each, surface words of each, function words."""

CLASSES = {"train": 150, "val": 40, "test": 100}
SENTENCES = 40
"""Sentences per class."""

LANGUAGES, SHARED_CLASSES, MEANINGS, COGNATES = 16, 12, 120, 0.6
"""Sizes of the parallel corpus: languages, classes (the same in all), sentences per class, share of cognates."""

SEED = 150
LETTERS = ("bdfgklmnprstvz", "aeiou")


def _word(randomness: random.Random, syllables: int) -> str:
    return "".join(randomness.choice(LETTERS[i % 2]) for i in range(2 * syllables))


def new_words(count: int, syllables: int, randomness: random.Random) -> list[str]:
    """Return different words of two letters per syllable."""
    words: dict[str, None] = {}
    while len(words) < count:
        words[_word(randomness, syllables)] = None
    return list(words)


def _triples(randomness: random.Random) -> list[tuple[int, ...]]:
    triples = list(product(range(CONCEPTS), repeat=KINDS))
    randomness.shuffle(triples)
    return triples


def _sentence(triple: tuple[int, ...], randomness: random.Random) -> list[int]:
    """A random sentence for ``triple`` as positions in the lexicon (function words, then the words of each concept)."""

    def surface(kind: int, concept: int) -> int:
        return FUNCTION_WORDS + (kind * CONCEPTS + concept) * SYNONYMS + randomness.randrange(SYNONYMS)

    content = [surface(kind, concept) for kind, concept in enumerate(triple)]
    content.append(surface(randomness.randrange(KINDS), randomness.randrange(CONCEPTS)))
    fillers = [randomness.randrange(FUNCTION_WORDS) for _ in range(randomness.randint(3, 6))]
    words = content + fillers
    randomness.shuffle(words)
    return words


def _lexicon(randomness: random.Random) -> list[str]:
    """The function words, which are short, then all surface words."""
    return new_words(FUNCTION_WORDS, 1, randomness) + new_words(KINDS * CONCEPTS * SYNONYMS, 3, randomness)


@cache
def toy_classes() -> dict[str, dict[str, list[str]]]:
    """Sentences by class, for each split; made once in a process, and not to be changed."""
    randomness = random.Random(SEED)
    lexicon, triples = _lexicon(randomness), iter(_triples(randomness))
    return {
        split: {
            "-".join(map(str, triple)): [
                " ".join(lexicon[i] for i in _sentence(triple, randomness)) for _ in range(SENTENCES)
            ]
            for triple, _ in zip(triples, range(count), strict=False)
        }
        for split, count in CLASSES.items()
    }


def _relexified(lexicon: list[str], randomness: random.Random) -> list[str]:
    """The lexicon of another language: cognates with one letter changed, other words new."""
    words = []
    for root in lexicon:
        if randomness.random() < COGNATES:
            place = randomness.randrange(len(root))
            letter = randomness.choice(LETTERS[place % 2])
            words.append(root[:place] + letter + root[place + 1 :])
        else:
            words.append(_word(randomness, len(root) // 2))
    return words


@cache
def toy_languages() -> list[Sentence]:
    """The parallel corpus: every sentence in every language; made once in a process, and not to be changed."""
    randomness = random.Random(SEED + 1)
    roots = _lexicon(randomness)
    triples = _triples(randomness)[:SHARED_CLASSES]
    sentences = [(triple, _sentence(triple, randomness)) for triple in triples for _ in range(MEANINGS)]
    corpus = []
    for language in range(LANGUAGES):
        lexicon = _relexified(roots, randomness)
        for number, (triple, words) in enumerate(sentences):
            text = " ".join(lexicon[i] for i in words)
            corpus.append(Sentence(text, "-".join(map(str, triple)), f"toy{language:02}", str(number)))
    return corpus
