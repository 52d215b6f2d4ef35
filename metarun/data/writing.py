"""Lines of an author as their owner has them, to be continued by a language model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from metarun.contracts import Examples, Predict, Request, Tree
from metarun.data.acts import before
from metarun.data.converters import row_names
from metarun.data.files import read_file, visible
from metarun.data.lines import lines_of, text_of
from metarun.data.ngram_prior import Prior
from metarun.data.pieces import Pieces
from metarun.data.portable import portable
from metarun.errors import require
from metarun.targets.decoding import readable, written


def lines_written(form: "Lines", temperature: float, predict: Predict, data: Tree) -> Tensor:
    """Return lines ``[lines, length]`` of ids that begin as ``data`` says."""
    begins = data["x"]
    return written(form.expecting(predict), begins[:, :0], form.length, temperature, readable(), begins)


class OfAuthor:
    """Lines of one author, and further ones in the same hand (`metarun.contracts.UserTask`)."""

    def __init__(self, form: "Lines", x: Any, y: Any) -> None:
        require(y is None, "lines have no y besides themselves; leave it out")
        texts = [x] if isinstance(x, str) else list(x)
        require(all(isinstance(one, str) for one in texts), "x must hold lines of text")
        self.form, self.lines = form, lines_of(texts, form.length - 1)
        require(len(self.lines) > 0, "x must hold at least one line of text")

    @cached_property
    def support(self) -> Tree:
        """The support set ``x`` and ``y`` as rows of ids (`metarun.targets.text.Text`)."""
        ids = self.form.tokenizer.rows(self.lines, self.form.length)
        x, prior = before(ids), self.form.prior
        return {"x": x, "y": ids, **({} if prior is None else {"state": prior.states(x)})}

    def ask(self, x: Any) -> Request:
        """Return the request for the most likely line with each beginning, which may be empty."""
        return self.draw([x] if isinstance(x, str) else x, 0.0)

    def draw(self, x: Any, temperature: float | None = None) -> Request:
        """Return the request for lines that are drawn with a temperature of at least 0.

        ``x`` is their number, or the beginning of each.
        """
        form = self.form
        temperature = form.temperature if temperature is None else temperature
        require(temperature >= 0, f"temperature must be at least 0, not {temperature}")
        beginnings: Sequence[str] = [""] * x if isinstance(x, int) else list(x)
        known = len(beginnings) > 0 and all(isinstance(one, str) for one in beginnings)
        require(known, "x must be a number of lines, at least 1, or a list of their beginnings")
        begins = form.tokenizer.rows((one.replace("\n", " ") for one in beginnings), form.length, ended=False)

        def texts(ids: Tensor) -> list[str]:
            told = (begins > 0).sum(1).tolist()
            # What was told comes back as it is, although it may have characters that the learner does not know.
            found = zip(beginnings, ids.tolist(), told, strict=True)
            return [one + form.tokenizer.decoded(own[count:]) for one, own, count in found]

        return Request({"x": begins}, partial(lines_written, form, temperature), texts)


def own_lines(content: bytes, place: str) -> Iterable[str]:
    """Return the lines of a file that are not blank."""
    return (line for line in text_of(content, place).splitlines() if line.strip())


@portable
@dataclass(frozen=True)
class Lines:
    """Lines of an author as their owner has them (`metarun.contracts.TaskConverter`)."""

    tokenizer: Pieces
    length: int
    """Most tokens of a line, its end included."""
    temperature: float = 0.7
    """That of lines that are drawn."""
    prior: Prior | None = None
    """What learners start from; a checkpoint does not hold it, and it is counted again from the training lines."""

    def expecting(self, predict: Predict) -> Predict:
        """Return a learner's outputs, added to what the n-gram model expects if there is one."""
        prior = self.prior
        return predict if prior is None else lambda x: predict(x) + prior.table[prior.states(x)]

    def task(self, x: Any, y: Any = None) -> OfAuthor:
        """Return a user's task.

        Args:
            x: a text, or a list of lines; long ones are broken between words.
            y: None.

        Raises:
            ValueError: they are something else.
        """
        return OfAuthor(self, x, y)

    def read(self, path: Path) -> Examples:
        """Read the lines of a text file, or of all files named ``*.txt`` in a folder.

        Raises:
            ValueError: there is none.
            UserError: a file is not in UTF-8; the sentence names the line.
        """
        files = [path] if path.is_file() else visible(path, "**/*.txt")
        found = [line for file in files for line in own_lines(read_file(file), str(file))]
        require(len(found) > 0, f"{path} has no line of text; name a text file, or a folder of files named *.txt")
        return Examples(found, None, row_names(len(found)))
