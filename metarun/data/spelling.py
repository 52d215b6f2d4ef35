"""Texts without what makes equal ones look different: case, spaces, and how accents are encoded."""

import unicodedata


def small(text: str) -> str:
    """A text in lower case, in which a letter and its accent are one character however they were written."""
    lower = text.lower()
    return lower if lower.isascii() else unicodedata.normalize("NFC", lower)


def plain(text: str) -> str:
    """A text in lower case with single spaces: the same for texts that tokens cannot tell apart."""
    return " ".join(small(text).split())
