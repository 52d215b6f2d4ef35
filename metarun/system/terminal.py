"""Making text from data safe to print: it must hold nothing that a terminal would execute."""

import logging
import unicodedata

HARMLESS = "\n\t\u200c\u200d"
"""Line ends, tabs, and the joiners that some scripts and emoji need."""


def printable(text: str) -> str:
    """Return ``text`` with control and direction characters escaped; line ends and tabs stay."""
    # Line ends and tabs alone must not cost a look at every character of a file.
    if text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(
        repr(c)[1:-1] if c not in HARMLESS and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c
        for c in text
    )


class PrintableRecord(logging.LogRecord):
    """A log record whose message is printable."""

    def getMessage(self) -> str:
        """Return the message with its arguments, made printable."""
        return printable(super().getMessage())
