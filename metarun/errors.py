"""The one exception that a user sees as a sentence."""


class UserError(Exception):
    """An error that the user can fix; its text is one sentence that says what to do."""


def require(condition: bool, sentence: str) -> None:
    """Raise ``ValueError(sentence)`` unless ``condition`` holds: the range check of every constructor."""
    if not condition:
        raise ValueError(sentence)


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]
