"""Labelled sentences, from the published files.

- ``data_dir/clinc150``: ``data_full.json`` and ``domains.json`` of CLINC150 (Larson et al. 2019,
  https://aclanthology.org/D19-1131, CC BY 3.0): 150 intents in 10 domains, 150 sentences each.
- ``data_dir/banking77``: ``train.csv`` and ``test.csv`` of BANKING77 (Casanueva et al. 2020,
  https://aclanthology.org/2020.nlp4convai-1.5, CC BY 4.0): 77 intents.
- ``fewshot_label_splits/NN/labels.{train,valid,test}.txt`` in either folder, if they exist: one intent per line
  (Dopierre et al. 2021, https://aclanthology.org/2021.acl-long.191, Apache-2.0).
- ``data_dir/xsid``: ``LANGUAGE.{valid,test}.conll`` of xSID (van der Goot et al. 2021,
  https://aclanthology.org/2021.naacl-main.197, CC BY-SA 4.0).
- ``data_dir/nusax_senti``: ``LANGUAGE/{train,valid,test}.csv`` of NusaX (Winata et al. 2023,
  https://aclanthology.org/2023.eacl-main.57, CC BY-SA 4.0).
"""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from metarun.data.files import visible
from metarun.errors import UserError

PARTS = {"train": "train", "val": "valid", "test": "test"}
SOURCES = {
    "clinc150": "https://github.com/clinc/oos-eval",
    "banking77": "https://github.com/PolyAI-LDN/task-specific-datasets",
    "xsid": "https://github.com/mainlp/xsid",
    "nusax": "https://github.com/IndoNLP/nusax",
    "label splits": "https://github.com/tdopierre/ProtAugment",
}
DOMAINS = 10
WORD_CHARACTERS = re.compile(r"\w")
FOLDERS = {"clinc150": "clinc150", "banking77": "banking77", "xsid": "xsid", "nusax": "nusax_senti"}


class Sentence(NamedTuple):
    """A sentence of a parallel corpus."""

    text: str
    label: str
    language: str
    meaning: str
    """The same for sentences that are translations of each other."""


def is_there(data_dir: str, name: str) -> bool:
    """Whether the folder of a data set is in ``data_dir``."""
    return (Path(data_dir) / FOLDERS[name]).is_dir()


def _read(path: Path, name: str, parse: Callable[[str], Any]) -> Any:
    """The result of ``parse`` on the text of a file of data set ``name``.

    Raises:
        UserError: the file cannot be read, or is not the published one.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); put the files of {SOURCES[name]} into {path.parent}, or choose "
            "task.dataset=toy."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(
            f"{path} is not the published file ({type(error).__name__}: {error}); fetch it again from {SOURCES[name]}."
        ) from error


def _table(*columns: str) -> Callable[[str], list[dict[str, str]]]:
    """A parser for CSV text that requires ``columns``."""

    def parse(text: str) -> list[dict[str, str]]:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        if not rows or any(row.get(column) is None for row in rows for column in columns):
            raise ValueError(f"columns {', '.join(columns)} expected")
        return rows

    return parse


def clinc150(data_dir: str) -> dict[str, list[str]]:
    """Sentences by intent, from all parts of the published file, without out-of-scope sentences."""

    def parse(text: str) -> dict[str, list[str]]:
        content = json.loads(text)
        intents: dict[str, list[str]] = {}
        for part in ("train", "val", "test"):
            for sentence, intent in content[part]:
                intents.setdefault(str(intent), []).append(str(sentence))
        return intents

    intents: dict[str, list[str]] = _read(Path(data_dir) / "clinc150" / "data_full.json", "clinc150", parse)
    return intents


def clinc150_domains(data_dir: str, known: Mapping[str, Any]) -> dict[str, list[str]]:
    """Intents by domain; each intent must be one of ``known``, the intents of the sentences."""

    def parse(text: str) -> dict[str, list[str]]:
        # The published file spells intents with spaces where data_full.json has underscores.
        found = {str(domain): [str(i).replace(" ", "_") for i in names] for domain, names in json.loads(text).items()}
        if len(found) < DOMAINS or not known.keys() >= {intent for names in found.values() for intent in names}:
            raise ValueError(f"{DOMAINS} domains of the intents of data_full.json expected")
        return found

    domains: dict[str, list[str]] = _read(Path(data_dir) / "clinc150" / "domains.json", "clinc150", parse)
    return domains


def banking77(data_dir: str) -> dict[str, list[str]]:
    """Sentences by intent, from both parts."""
    intents: dict[str, list[str]] = {}
    for part in ("train", "test"):
        path = Path(data_dir) / "banking77" / f"{part}.csv"
        for row in _read(path, "banking77", _table("text", "category")):
            intents.setdefault(row["category"], []).append(row["text"])
    return intents


def has_label_splits(data_dir: str, name: str) -> bool:
    """Whether the folder of published label splits exists."""
    return (Path(data_dir) / FOLDERS[name] / "fewshot_label_splits").is_dir()


def label_split(data_dir: str, name: str, number: str, known: Mapping[str, Any]) -> dict[str, list[str]]:
    """Labels of train, val and test according to ``fewshot_label_splits/NUMBER``."""
    split: dict[str, list[str]] = {}
    elsewhere: set[str] = set()
    for part, published in PARTS.items():
        path = Path(data_dir) / FOLDERS[name] / "fewshot_label_splits" / number / f"labels.{published}.txt"
        labels = split[part] = sorted(_read(path, "label splits", str.split))
        unknown = [label for label in labels if label not in known]
        again = [label for i, label in enumerate(labels) if label in labels[:i] or label in elsewhere]
        elsewhere |= set(labels)
        if unknown or again or not labels:
            what = f"names {unknown[0]}, which is not in the data set" if unknown else "is empty"
            if again:
                what = f"names {again[0]}, which is already in a split"
            raise UserError(f"{path} {what}; put the published file there, or choose task.split=random.")
    return split


def _headers(text: str) -> list[dict[str, str]]:
    """The comment lines ``# key = value`` of every sentence of a CoNLL file, as mappings."""
    blocks = [
        dict(line[2:].split(" = ", 1) for line in block.splitlines() if line.startswith("# ") and " = " in line)
        for block in text.split("\n\n")
    ]
    headers = [block for block in blocks if block]
    if not headers or any("text" not in header or "intent" not in header for header in headers):
        raise ValueError("comment lines '# text = ' and '# intent = ' expected")
    return headers


def _english(header: Mapping[str, str], english: list[str]) -> str:
    """The English original of a header's sentence, or that sentence itself if it is English.

    Translations name the original, except in the Norwegian files, whose ids start with its position: ``12/3``.
    """
    position = header.get("id", "").split("/")[0]
    if "text-en" not in header and position.isdigit() and 1 <= int(position) <= len(english):
        return english[int(position) - 1]
    return header.get("text-en", header["text"])


def xsid(data_dir: str) -> list[Sentence]:
    """All sentences of the validation and test files of every language; the training files are machine translations."""
    folder = Path(data_dir) / "xsid"
    languages = sorted({path.name.split(".")[0] for path in visible(folder, "*.conll")})
    if not languages:
        raise UserError(f"{folder} holds no LANGUAGE.test.conll; put the files of {SOURCES['xsid']} there.")
    sentences = []
    for part in ("valid", "test"):
        english = [header["text"] for header in _read(folder / f"en.{part}.conll", "xsid", _headers)]
        for language in languages:
            for header in _read(folder / f"{language}.{part}.conll", "xsid", _headers):
                # A few of the named originals differ from the English file by stray punctuation.
                meaning = "".join(WORD_CHARACTERS.findall(_english(header, english).lower()))
                sentences.append(Sentence(header["text"], header["intent"], language, meaning))
    return sentences


def nusax(data_dir: str) -> list[Sentence]:
    """All sentences of every language; sentences with the same published id are translations of each other."""
    folder = Path(data_dir) / "nusax_senti"
    languages = [path.name for path in visible(folder) if path.is_dir()]
    if not languages:
        raise UserError(f"{folder} holds no folder of a language; put the files of {SOURCES['nusax']} there.")
    return [
        Sentence(row["text"], row["label"], language, f"{part} {row['id']}")
        for language in languages
        for part in ("train", "valid", "test")
        for row in _read(folder / language / f"{part}.csv", "nusax", _table("id", "text", "label"))
    ]
