"""Corpora of tagged sentences by language or domain: those of the user, Universal NER, CrossNER, xSID, and a toy."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeAlias

from metarun.data import intents
from metarun.data.files import PARTS, Files, found
from metarun.data.splits import SHARES, dealt
from metarun.data.tagged import NOT_DATA, SUFFIXES, Scheme, Sentence, sentences_of
from metarun.errors import UserError, require

log = logging.getLogger(__name__)

SOURCES = {
    "universal_ner": "https://github.com/UniversalNER",
    "crossner": "https://github.com/zliucr/CrossNER",
    "xsid": "https://github.com/mainlp/xsid",
}
FOLDERS = {"universal_ner": "universal_ner", "crossner": "crossner/ner_data", "xsid": "xsid"}
DOMAINS = ("ai", "literature", "music", "politics", "science")
SPLIT_SEED = 19
VALIDATION = 0.15
"""Share of the sentences of each training source that is held out where no source is for validation."""


class Source(NamedTuple):
    """The sentences of one language, domain or file."""

    support: Sequence[Sentence]
    query: Sequence[Sentence] | None = None
    """Those that queries are drawn from; None: from the same, but never those that support has."""

    def sentences(self) -> Sequence[Sentence]:
        """Return all sentences."""
        return [*self.support, *(self.query or ())]


Corpus: TypeAlias = dict[str, dict[str, Source]]
"""Sources by split and name. A source of validation with the name of a training source has other sentences of it."""


def parts_in(name: str) -> list[str]:
    """Return the splits that the name of a file mentions: ``de.valid.conll`` is one of validation."""
    words = re.split(r"[^a-z]+", PurePosixPath(name).stem.lower())
    return [PARTS[word] for word in words if word in PARTS]


def source_in(name: str) -> str:
    """Return the source of a file: its folder, or what its name begins with if it lies at the top."""
    path = PurePosixPath(name)
    if len(path.parts) > 1:
        return path.parts[-2]
    words = [word for word in path.stem.split(".") if word.lower() not in PARTS]
    return ".".join(words) or path.stem


def read(path: Path, column: int | None, scheme: Scheme) -> dict[str, dict[str, list[Sentence]]]:
    """Return the sentences of a file, a folder or a zip archive by source and by the split that a file's name mentions.

    Where folders ``train``, ``val`` and ``test`` lie at the top, the split is that of the folder, before the name of
    the source, as in ``test/de``.

    Raises:
        UserError: there is no such file, or one of them is broken.
    """
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        return {source_in(path.name): {"": sentences_of(path.read_bytes(), str(path), column, scheme)}}
    sources = dict[str, dict[str, list[Sentence]]]()
    with Files(path) as files:
        names = [
            n for n in files.names() if PurePosixPath(n).suffix.lower() in SUFFIXES and not NOT_DATA.match(Path(n).stem)
        ]
        require(bool(names), f"{path} holds no file with tagged sentences, {', '.join(SUFFIXES)}; put some there")
        for name in names:
            top = PurePosixPath(name).parts[0].lower()
            below = name.partition("/")[2] if top in PARTS and "/" in name else name
            source = f"{PARTS[top]}/{source_in(below)}" if below is not name else source_in(name)
            part = (parts_in(below) or [""])[-1]
            own = sources.setdefault(source, {}).setdefault(part, [])
            own += sentences_of(files.read(name), str(path / name), column, scheme)
    return sources


def source_of(by_part: Mapping[str, Sequence[Sentence]]) -> Source:
    """Return a source that supports with its training and validation files and asks with its test files.

    Where it lacks one of the two, both are drawn from all of its sentences. A sentence that occurs several times is
    used once, so that no task shows what it asks for.
    """
    different = dict[tuple[str, ...], tuple[str, Sentence]]()
    for part, own in sorted(by_part.items(), key=lambda item: item[0] == "test"):
        for sentence in own:
            different.setdefault(sentence.words, (part, sentence))
    support = [sentence for part, sentence in different.values() if part != "test"]
    query = [sentence for part, sentence in different.values() if part == "test"]
    return Source(support, query) if support and query else Source([*support, *query])


def of_path(
    path: str, data_dir: str, column: int | None, scheme: Scheme, val: Sequence[str], test: Sequence[str]
) -> Corpus:
    """Return the sources of the user's files by split.

    Splits are those of the folders ``train``, ``val`` and ``test`` if they are at the top; ``val`` and ``test`` if
    they name sources; else drawn by a fixed seed.

    Raises:
        UserError: a file is broken, a named source is not there, or a split lacks sources.
    """
    place = found(path, data_dir)
    files = read(place, column, scheme)
    sources = {name: source_of(parts) for name, parts in files.items()}
    whole = sum(len(own) for parts in files.values() for own in parts.values())
    if copies := whole - sum(len(source.sentences()) for source in sources.values()):
        log.info("%s: %d sentences are copies of others of their source and are left out.", place.name, copies)
    given = {name.partition("/")[0] for name in sources} <= set(SHARES) and any("/" in name for name in sources)
    if given:
        require(not val and not test, f"{place} has folders for its splits, so task.val and task.test must be empty")
        corpus: Corpus = {split: {} for split in SHARES}
        for name, source in sources.items():
            corpus[name.partition("/")[0]][name.partition("/")[2]] = source
    else:
        for key, names in {"val": val, "test": test}.items():
            unknown = [name for name in names if name not in sources]
            require(
                not unknown,
                f"task.{key} names {unknown[0] if unknown else ''}, which is none of the sources in {place}: "
                f"{', '.join(sorted(sources))}",
            )
        both = sorted(set(val) & set(test))
        require(not both, f"task.val and task.test both name {both[0] if both else ''}; test on other sources")
        rest = [name for name in sources if name not in {*val, *test}]
        if test:
            split = {"train": set(rest), "val": set(val), "test": set(test)}
        else:
            require(
                len(rest) >= 2,
                f"{place} holds {len(rest)} source{'s' if len(rest) != 1 else ''} (folders, or files at the top), and "
                "training and test each need one; add some",
            )
            split = dealt(rest, SPLIT_SEED, SHARES if not val else {"train": 0.75, "test": 0.25}, 1)
            split["val"] |= set(val)
        corpus = {part: {name: sources[name] for name in sorted(names)} for part, names in split.items()}
    for part in ("train", "test"):
        require(bool(corpus[part]), f"{place} has no source for {part}; add one, or change task.val and task.test")
    return corpus


def with_validation(corpus: Corpus, fewest: int) -> Corpus:
    """Return the corpus with validation on the last sentences of each training source, if no source is for validation.

    They are ``VALIDATION`` of the sentences, and at least ``fewest``.
    """
    if corpus.get("val"):
        return corpus
    train, val = dict[str, Source](), dict[str, Source]()
    for name, source in corpus["train"].items():
        own = source.sentences()
        cut = max(len(own) - max(round(VALIDATION * len(own)), fewest), 0)
        train[name], val[name] = Source(own[:cut]), Source(own[cut:])
    return {"train": train, "val": val, "test": corpus["test"]}


def without_copies(corpus: Corpus) -> Corpus:
    """Return the corpus without those queries of test and validation whose words are a sentence of another part."""
    known = {s.words for source in corpus["train"].values() for s in source.sentences()}
    left, result = 0, {"train": corpus["train"]}
    for split in ("val", "test"):
        result[split] = {}
        for name, source in corpus[split].items():
            seen = set(known)
            support = [s for s in source.support if s.words not in seen]
            if source.query is None:
                result[split][name] = Source(support)
                left += len(source.support) - len(support)
                continue
            seen |= {s.words for s in support}
            query = [s for s in source.query if s.words not in seen]
            result[split][name] = Source(support, query)
            left += len(source.sentences()) - len(support) - len(query)
    if left:
        log.info("%d sentences of validation and test are copies of others and are left out.", left)
    return result


def is_there(data_dir: str, name: str) -> bool:
    """Whether the folder of a named corpus exists."""
    return (Path(data_dir) / FOLDERS[name]).is_dir()


def _files(data_dir: str, name: str, pattern: str, scheme: Scheme = "iob2") -> list[Sentence]:
    folder = Path(data_dir) / FOLDERS[name]
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise UserError(
            f"{folder} holds no {pattern}; put the files of {SOURCES[name]} there, or choose task.dataset=toy."
        )
    return [sentence for path in paths for sentence in sentences_of(path.read_bytes(), str(path), None, scheme)]


def universal_ner(data_dir: str) -> Corpus:
    """Return Universal NER (Mayhew et al. 2024, https://aclanthology.org/2024.naacl-long.243): seven treebanks train.

    The PUD treebanks translate each other, so training has their first 500 sentences, and tests support with the next
    250 and ask the last 250. Serbian is the text of Croatian and is left out. A few of the published I- tags continue
    no entity.
    """

    def tree(pattern: str) -> list[Sentence]:
        return _files(data_dir, "universal_ner", f"UNER_{pattern}", "iob1")

    train = {
        "English-EWT": tree("English-EWT/*.iob2"),
        "English-PUD": tree("English-PUD/*.iob2")[:500],
        "Swedish-PUD": tree("Swedish-PUD/*.iob2")[:500],
        "Swedish-Talbanken": tree("Swedish-Talbanken/*.iob2"),
        "Norwegian-Bokmal": tree("Norwegian-NDT/nob*.iob2"),
        "Norwegian-Nynorsk": tree("Norwegian-NDT/nno*.iob2"),
        "Croatian": tree("Croatian-SET/*.iob2"),
    }
    pud = {name: tree(f"{name}-PUD/*.iob2") for name in ("German", "Russian")}
    test = {name: Source(own[500:750], own[750:]) for name, own in pud.items()}
    folders = {
        "Chinese": "Chinese-GSD",
        "Portuguese": "Portuguese-Bosque",
        "Slovak": "Slovak-SNK",
        "Danish": "Danish-DDT",
    }
    for name, folder in folders.items():
        test[name] = Source(tree(f"{folder}/*-dev.iob2"), tree(f"{folder}/*-test.iob2"))
    arabizi = "Maghrebi_Arabic_French-Arabizi/*"
    test["Arabizi"] = Source(
        tree(f"{arabizi}-train.iob2"), [*tree(f"{arabizi}-dev.iob2"), *tree(f"{arabizi}-test.iob2")]
    )
    return {"train": {name: Source(own) for name, own in train.items()}, "val": {}, "test": test}


def crossner(data_dir: str, test: Sequence[str]) -> Corpus:
    """Return CrossNER (Liu et al. 2021, https://arxiv.org/abs/2012.04373) with domains held out.

    Support is drawn from the train file of a domain and queries from its test file.
    """
    unknown = [name for name in test if name not in DOMAINS]
    require(not unknown, f"task.test must name domains of CrossNER, {', '.join(DOMAINS)}, not {unknown}")
    require(len(test) < len(DOMAINS), "task.test names all domains of CrossNER; leave some for training")

    def domain(name: str, part: str = "*") -> list[Sentence]:
        return _files(data_dir, "crossner", f"{name}/{part}.txt", "iob1")

    return {
        "train": {name: Source(domain(name)) for name in DOMAINS if name not in test},
        "val": {},
        "test": {name: Source(domain(name, "train"), domain(name, "test")) for name in test},
    }


WITHOUT_WORD = re.compile(r"(?m)^(\d+\t)\s*(?=\t)")
"""The beginning of a line whose word is missing or a space, as in eight lines of xSID."""


def _utterances(data_dir: str, name: str) -> list[Sentence]:
    """Return the tagged utterances of a file of xSID, with ``_`` for words that are missing."""
    path = Path(data_dir) / FOLDERS["xsid"] / name
    content = WITHOUT_WORD.sub(r"\1_", path.read_text(encoding="utf-8"))
    return sentences_of(content.encode(), str(path))


def xsid(data_dir: str) -> Corpus:
    """Return the slots of xSID (van der Goot et al. 2021, https://aclanthology.org/2021.naacl-main.197) by language.

    Splits share neither a language nor an utterance in another language, and a language has each utterance once.
    """
    sentences = intents.xsid(data_dir)
    files = dict.fromkeys((part, s.language) for part in ("valid", "test") for s in sentences)
    tagged = [one for part, language in files for one in _utterances(data_dir, f"{language}.{part}.conll")]
    require(len(tagged) == len(sentences), f"{data_dir}/xsid has utterances without words; fetch its files again")
    languages = dealt({s.language for s in sentences}, SPLIT_SEED, SHARES)
    meanings = dealt({s.meaning for s in sentences}, SPLIT_SEED, SHARES)
    first = dict[tuple[str, str], Sentence]()
    for sentence, own in zip(sentences, tagged, strict=True):
        first.setdefault((sentence.language, sentence.meaning), own)
    return {
        part: {
            name: Source(
                [own for (language, meaning), own in first.items() if language == name and meaning in meanings[part]]
            )
            for name in sorted(languages[part])
        }
        for part in SHARES
    }
