"""Questions on passages, from files in the format of SQuAD (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250).

    {"data": [{"title": …, "paragraphs": [{"context": …, "qas": [
        {"id": …, "question": …, "answers": [{"text": …, "answer_start": …}]}]}]}]}

A file is a language or a domain. Articles of different files that have the same title are translations of each other,
or treat the same, and are always on the same side of a split. XQuAD has such files in twelve languages (Artetxe, Ruder,
Yogatama 2020, https://aclanthology.org/2020.acl-main.421, CC BY-SA 4.0).
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metarun.data.files import json_of, read_file, visible
from metarun.errors import UserError

log = logging.getLogger(__name__)

XQUAD = "https://github.com/google-deepmind/xquad"


class Question(NamedTuple):
    """A question with its answers."""

    id: str
    text: str
    answers: tuple[tuple[int, str], ...]
    """The first character in the passage, and the text, of each different answer."""


class Passage(NamedTuple):
    """A paragraph of an article."""

    text: str
    questions: tuple[Question, ...]


class Article(NamedTuple):
    """An article with its passages."""

    title: str
    passages: tuple[Passage, ...]


def is_there(data_dir: str) -> bool:
    """Return whether XQuAD is in ``data_dir``."""
    return (Path(data_dir) / "xquad").is_dir()


def files_of(path: Path) -> dict[str, Path]:
    """Return the SQuAD files of a path by the name of their language or domain.

    That is the last part of the name of a file: ``en`` for ``xquad.en.json``.

    Raises:
        UserError: there is none, or two have the same name.
    """
    files = visible(path, "*.json") if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no .json; put files in the format of SQuAD there, one per language or domain.")
    found: dict[str, Path] = {}
    for file in files:
        name = file.stem.rpartition(".")[2]
        if name in found:
            raise UserError(f"{found[name]} and {file} are both named {name}; rename one of them.")
        found[name] = file
    return found


def _parsed(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        UserError: it is not in UTF-8, or no JSON.
    """
    content = read_file(path)
    try:
        return json_of(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}, is not text in UTF-8; save the file in this encoding.") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}, is not JSON ({error.msg}), as in a file that is cut "
            "off; fetch or write it again."
        ) from error


def _part(record: Any, key: str, kind: type, place: str, remedy: str) -> Any:
    """Return a value of a JSON object.

    Raises:
        UserError: it is missing, empty or of another kind.
    """
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{place} has no {key}; {remedy}.")
    return value


def _answer(record: Any, passage: str, place: str) -> tuple[int, str]:
    """Return where an answer begins, and its text.

    Raises:
        UserError: it is not there.
    """
    text = _part(record, "text", str, place, "give the words of the passage that answer the question")
    start = record.get("answer_start")
    if type(start) is int and start >= 0 and passage[start : start + len(text)] == text:
        return start, text
    found = passage.find(text)
    if found < 0:
        raise UserError(
            f"{place} is {text!r}, which is not in the passage; copy the answer from the passage to the letter."
        )
    raise UserError(f"{place} is {text!r}, which is not at answer_start {start!r}; the first such place is {found}.")


def _question(record: Any, passage: str, place: str, answered: bool) -> Question | None:
    """Return a question; None for one that is marked as without an answer (SQuAD 2.0)."""
    identity = record.get("id") if isinstance(record, dict) else None
    place = f"{place} ({identity})" if identity else place
    text = _part(record, "question", str, place, "write its text as question")
    if record.get("is_impossible"):
        return None
    if not answered and not record.get("answers"):
        return Question(str(identity or place), text, ())
    answers = _part(record, "answers", list, place, "give a list of answers")
    if not answers:
        raise UserError(f"{place} has no answer; give one, or leave the question out.")
    found = [_answer(answer, passage, f"{place}, answer {i}") for i, answer in enumerate(answers, 1)]
    return Question(str(identity or place), text, tuple(dict.fromkeys(found)))


def read(path: Path, answered: bool = True) -> list[Article]:
    """Return the articles of a file.

    Args:
        path: the file.
        answered: whether all questions must have an answer, but those that are marked as without one (SQuAD 2.0),
            which are left out in any case.

    Raises:
        UserError: the file cannot be read or is broken; the sentence names the place.
    """
    data = _part(_parsed(path), "data", list, str(path), 'write {"data": [articles]}, the format of SQuAD')
    articles, left = list[Article](), 0
    for number, record in enumerate(data, 1):
        title = _part(
            record,
            "title",
            str,
            f"{path}, article {number},",
            "name it, for articles of the same title must be on the same side of a split",
        )
        here = f"{path}, article {number} ({title})"
        if title in {article.title for article in articles}:
            raise UserError(f"{here}, has the title of an earlier article; join them, or rename one.")
        passages = []
        for index, paragraph in enumerate(_part(record, "paragraphs", list, here, "give a list of paragraphs"), 1):
            place = f"{here}, paragraph {index}"
            text = _part(paragraph, "context", str, place, "write the passage as context")
            asked = _part(paragraph, "qas", list, place, "give a list of questions, perhaps an empty one")
            found = [_question(one, text, f"{place}, question {i}", answered) for i, one in enumerate(asked, 1)]
            left += found.count(None)
            passages.append(Passage(text, tuple(one for one in found if one is not None)))
        articles.append(Article(title, tuple(passages)))
    if left:
        log.info("%s: %d questions without an answer are left out.", path, left)
    if not any(passage.questions for article in articles for passage in article.passages):
        raise UserError(f"{path} has no question with an answer; add some, or leave the file out.")
    return articles


def corpus(path: Path, names: Sequence[str] | None = None) -> dict[str, list[Article]]:
    """Return the articles of the files of a path by the name of their language or domain.

    Args:
        path: a file, or a folder with files.
        names: those that are read; None: all.

    Raises:
        UserError: a file is missing or broken.
    """
    files: Mapping[str, Path] = files_of(path)
    unknown = [name for name in names or () if name not in files]
    if unknown:
        raise UserError(f"{path} has no file of {unknown[0]!r}; it has those of {', '.join(files)}.")
    return {name: read(file) for name, file in files.items() if names is None or name in names}
