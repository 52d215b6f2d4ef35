"""Exceptions that a user sees as a sentence, or as the end of a run that was stopped."""


class UserError(Exception):
    """An error that the user can fix; its text is one sentence that says what to do."""


class Pruned(Exception):
    """A study has ended a run early, because others do better; the text is one sentence."""


class Stopped(KeyboardInterrupt):
    """A signal stopped the process; the signal's number is the first argument."""

    @property
    def exit_code(self) -> int:
        """The exit code of the process, by the convention of shells."""
        return 128 + int(self.args[0])


def require(condition: bool, sentence: str) -> None:
    """Raise ``ValueError(sentence)`` unless ``condition`` holds; every constructor checks its ranges with this."""
    if not condition:
        raise ValueError(sentence)


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]
