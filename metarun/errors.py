"""The one exception that a user sees as a sentence."""


class UserError(Exception):
    """Something the user can mend; its text is one sentence that says what to do."""


def require(condition: bool, sentence: str) -> None:
    """Raise ``ValueError(sentence)`` unless ``condition`` holds: the range check of every constructor."""
    if not condition:
        raise ValueError(sentence)
