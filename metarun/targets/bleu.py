"""BLEU of a corpus in lower case, equal to that of sacrebleu with its default settings.

Post 2018, https://arxiv.org/abs/1804.08771, describes them.

    BLEU = BP · exp(mean over n = 1 … 4 of ln p_n),   BP = min(1, exp(1 − reference length / length))

p_n is the share of the outputs' n-grams that occur in their reference, each at most as often as there (Papineni et al.
2002, https://doi.org/10.3115/1073083.1073135, §2). Where none occurs, p_n is 1 / (2^k · number of n-grams), k counting
such n (Chen and Cherry 2014, https://doi.org/10.3115/v1/W14-3346, smoothing 3).
"""

import math
import re
from collections import Counter
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ORDER = 4
"""Length of the longest n-gram."""
COUNTS = 2 * ORDER + 2
"""Matches and numbers of n-grams of each length, the length of the output and that of the reference."""

ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
SEPARATED = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
"""What is separated from its neighbours, as in the script mteval-v13a of NIST."""


def tokens_of(text: str) -> list[str]:
    """Return the words and the marks of a text in lower case."""
    text = text.lower().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in ENTITIES.items():
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, replacement in SEPARATED:
        text = pattern.sub(replacement, text)
    return text.split()


def _grams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


@lru_cache(maxsize=2**16)
def bleu_counts(output: str, reference: str) -> tuple[int, ...]:
    """Return what BLEU is computed from, ``COUNTS`` numbers that add up over a corpus."""
    ours, theirs = tokens_of(output), tokens_of(reference)
    matches, totals = [], []
    for n in range(1, ORDER + 1):
        grams = _grams(ours, n)
        matches.append((grams & _grams(theirs, n)).total())
        totals.append(grams.total())
    return (*matches, *totals, len(ours), len(theirs))


def bleu(counts: NDArray[np.float64]) -> float:
    """Return BLEU, from 0 to 1, for the sum of ``bleu_counts`` over a corpus ``[COUNTS]``."""
    matches, totals, (ours, theirs) = counts[:ORDER], counts[ORDER : 2 * ORDER], counts[2 * ORDER :]
    if not matches.any() or not totals.all():
        return 0.0
    smallest, logarithms = 1.0, []
    for match, total in zip(matches, totals, strict=True):
        if match == 0:
            smallest *= 2
        logarithms.append(math.log((match or 1 / smallest) / total))
    brevity = min(1.0, math.exp(1 - theirs / ours))
    return brevity * math.exp(sum(logarithms) / ORDER)
