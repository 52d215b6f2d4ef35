"""What reaches the terminal: text that comes from data holds nothing that a terminal would obey."""

import logging
import unicodedata

HARMLESS = "\n\t\u200c\u200d"
"""Line ends, tabs, and the joiners that scripts and emoji are written with."""


def printable(text: str) -> str:
    """``text`` with its control and direction characters written as escapes; line ends and tabs stay."""
    if text.isprintable():
        return text
    return "".join(
        repr(c)[1:-1] if c not in HARMLESS and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c
        for c in text
    )


class PrintableRecord(logging.LogRecord):
    """A log record whose message is printable."""

    def getMessage(self) -> str:
        """The message with its arguments."""
        return printable(super().getMessage())
