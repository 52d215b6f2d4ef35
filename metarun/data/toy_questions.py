"""Artificial languages with passages and questions, so that tasks of questions need no download.

A sentence of a passage says what someone has of a kind of thing. A question names someone and the kind, and the thing
is the answer, of one to three words. Languages have different words, and each puts the answer before or after the word
for the kind of thing: a reader has to find out which.
"""

import random
from functools import lru_cache
from itertools import count

from metarun.data.squad import Article, Passage, Question
from metarun.data.toy_text import new_words

LANGUAGES, ARTICLES, PASSAGES, SENTENCES, KINDS, THINGS, FILLERS = 12, 12, 5, 5, 6, 20, 12
"""Languages; articles of each, passages of an article, sentences of a passage; kinds of thing, things of each kind, and
words that say nothing."""
SEED = 250


def _language(number: int) -> list[Article]:
    """Return the articles of a language, which are translations of those of another."""
    own, meaning = random.Random(SEED + 1 + number), random.Random(SEED)
    words = iter(new_words(1 + FILLERS + KINDS * (2 + THINGS) + ARTICLES * PASSAGES * SENTENCES, 2, own))
    asking, fillers = next(words), [next(words) for _ in range(FILLERS)]
    kinds = [(next(words), next(words), [next(words) for _ in range(THINGS)]) for _ in range(KINDS)]
    names, before, ids = (word.capitalize() for word in words), own.random() < 0.5, count()
    articles = []
    for title in range(ARTICLES):
        passages = []
        for _ in range(PASSAGES):
            text, questions = "", list[Question]()
            for _ in range(SENTENCES):
                said, asked, things = kinds[meaning.randrange(KINDS)]
                filler, name = fillers[meaning.randrange(FILLERS)], next(names)
                answer = " ".join(things[meaning.randrange(THINGS)] for _ in range(meaning.randint(1, 3)))
                start = f"{name} {filler} " if before else f"{name} {filler} {said} "
                question = f"{asking} {asked} {said} {name}?"
                questions.append(Question(str(next(ids)), question, ((len(text + start), answer),)))
                text += f"{start}{answer} {said}. " if before else f"{start}{answer} {filler}. "
            passages.append(Passage(text.rstrip(), tuple(questions)))
        articles.append(Article(f"article {title}", tuple(passages)))
    return articles


@lru_cache(maxsize=1)
def toy_questions() -> dict[str, list[Article]]:
    """Return the articles of each language."""
    return {f"toy{number:02}": _language(number) for number in range(LANGUAGES)}
