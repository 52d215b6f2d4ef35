"""Few-shot classification of sentences: N ways, K shots.

`text` tests on classes that training has not seen. `text_crosslingual` draws each task within one language, and tests
on languages that training has not seen. Inputs are rows of token ids (`metarun.data.tokens`).
"""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from metarun.contracts import Converter, Facts, Numbers, Sizes, Spec, Split, Task, Tokens
from metarun.data import converters, intents, splits, tokens
from metarun.data.embedding import Embedded, Texts, cached_features, fitted
from metarun.data.files import found, read_file, split_in, table
from metarun.data.portable import portable
from metarun.data.sources import check_source
from metarun.data.spelling import plain
from metarun.data.splits import SHARES
from metarun.data.toy_text import toy_classes, toy_languages
from metarun.errors import require
from metarun.targets.classes import ACCURACY, Classes
from metarun.tasks.few_shot import Asked, Shots, Ways, cells_of, draw_tasks, range_of, sizes_for, units_of

log = logging.getLogger(__name__)

Sentences: TypeAlias = Mapping[str, Mapping[str, Sequence[str]]]
"""Sentences by language and label."""

MOST_BUCKETS = 2**20
LABEL_SPLIT_SEED = 7
LANGUAGE_SPLIT_SEED = 19
COLUMNS = {
    "text": converters.TEXT_NAMES,
    "label": converters.LABEL_NAMES,
    "split": ("split",),
}
"""The columns of a table of the user, and other names that they may have."""

WORD_WEIGHT = 2.0
"""Weight of a whole word relative to one of its n-grams."""


class Pool:
    """The sentences of one split on the device.

    Attributes:
        texts: the sentences.
        rows: their inputs ``[sentences, *input]``: token ids ``[sentences, columns]``, or features ``[sentences, d]``.
        cells: the rows of each language and label.
    """

    rows: Tensor

    def __init__(self, sentences: Sentences, labels: Sequence[str]) -> None:
        texts = [[list(sentences[language].get(label, ())) for label in labels] for language in sorted(sentences)]
        self.cells = cells_of(torch.tensor([[len(cell) for cell in language] for language in texts]))
        self.texts = [text for language in texts for cell in language for text in cell]


@portable
@dataclass(frozen=True)
class TermFrequencies:
    """Rows of ids as weighted counts of their n-grams, of length one (TF-IDF)."""

    weights: Tensor
    """Inverse sentence frequencies of n-grams ``[ids]``, and 0 for words."""

    def __call__(self, x: Tensor) -> Tensor:
        """``[sentences, columns]`` → ``[sentences, ids]``."""
        weights = self.weights.to(x.device, torch.get_default_dtype())
        return tokens.term_frequencies(x, len(weights), weights)


class Text:
    """Tasks of ``ways`` classes; ``x [sentences, columns]`` are token ids, ``y [sentences, ways]`` is one-hot.

    With ``embed``, ``x [sentences, d]`` are the features of a frozen model.

    Args:
        corpus: sentences by language and label for each split.
        dataset: name of the corpus, and all that makes scores incomparable.
        asked: sizes of tasks.
        grams: length of the shortest and longest character n-gram, rising.
        buckets: number of ids that the n-grams share, from 2 to ``MOST_BUCKETS``.
        device: where the sentences live.
        typed: the keys that the user set; other sizes give way to what the data can serve. None: all.
        embed: a frozen pretrained model (see `metarun.data.sources`) whose features replace token ids; None: none.
        converter: what a run has learned of words, for a later test of it; None: fitted to training.
        source: where the classes come from, if classes are what tests hold out.
    """

    def __init__(
        self,
        corpus: Mapping[str, Sentences],
        dataset: str,
        asked: Asked,
        grams: tuple[int, int],
        buckets: int,
        device: str,
        typed: Collection[str] | None = None,
        embed: str | None = None,
        converter: Converter | None = None,
        source: str | None = None,
    ) -> None:
        if embed is not None:
            check_source(embed, "sentences")
        require(1 <= grams[0] <= grams[1], f"grams must be a rising pair of lengths from 1, not {list(grams)}")
        require(2 <= buckets <= MOST_BUCKETS, f"buckets must be from 2 to {MOST_BUCKETS}, not {buckets}")
        for split, languages in corpus.items():
            require(
                any(language.values() for language in languages.values()),
                f"the data leave no sentence for {split}; fetch all of their files, or choose task.dataset=toy",
            )
        self.device = device
        # Episodes are equal only where the sentences are.
        sentences = sha256(json.dumps(corpus, sort_keys=True).encode()).hexdigest()[:6]
        labels = {
            split: sorted({label for language in cells.values() for label in language})
            for split, cells in corpus.items()
        }
        self.pools = {split: Pool(cells, labels[split]) for split, cells in corpus.items()}
        self.class_names = tuple(labels["test"])
        if source is not None:
            self.units = {split: units_of(source, own) for split, own in labels.items()}
        counts = {split: pool.cells.size for split, pool in self.pools.items()}
        of_one_language = labels if all(len(size) == 1 for size in counts.values()) else None
        self.sizes = sizes_for(asked, counts, f"{dataset}:{sentences}", "sentences", typed, of_one_language)
        others = self.sizes[False]
        self.dataset = ":".join([dataset, *others.text(), sentences, *([] if embed is None else [embed])])
        self.converter: Converter
        inputs: Numbers | Tokens
        if embed is not None:
            self.converter, inputs, facts = self._embedded(embed, converter)
        else:
            self.converter, inputs, facts = self._tokenised(grams, buckets, converter)
        for pool in self.pools.values():
            pool.rows = pool.rows.to(device)
        self.spec = Spec(
            inputs,
            Classes(others.ways),
            Sizes(others.shots.most, others.queries, others.ways, self.sizes[True].ways, len(labels["train"])),
            metrics=(ACCURACY,),
            facts=facts,
        )

    def _tokenised(
        self, grams: tuple[int, int], buckets: int, known: Converter | None
    ) -> tuple[Converter, Tokens, Facts]:
        """Make rows of token ids by a tokenizer that is ``known``, or fitted to the training sentences."""
        train, own = self.pools["train"], known if isinstance(known, converters.Sentences) else None
        tokenizer = own.tokenizer if own else tokens.fit(train.texts, buckets, (grams[0], grams[1]))
        cut = 0
        for pool in self.pools.values():
            pool.rows = tokenizer(pool.texts)
            full = tokens.are_full(pool.rows).nonzero()[:, 0].tolist()
            cut += sum(tokens.is_cut(pool.texts[i], (grams[0], grams[1])) for i in full)
        if cut:
            log.warning(
                "%d of %d texts have more than %d words or %d n-grams, and no more of them is read; shorten them, or "
                "set task.embed.",
                *(cut, sum(len(pool.texts) for pool in self.pools.values()), tokens.MAX_WORDS, tokens.MAX_GRAMS),
            )
        by_sentence = tokens.inverse_document_frequency(train.rows, tokenizer.ids)
        # Each class is one document: a word that many classes use tells little, however seldom each uses it.
        ends = zip(*(leaf.flatten().tolist() for leaf in train.cells), strict=True)
        documents = [train.rows[first : first + size].flatten() for first, size in ends if size]
        longest = max(len(document) for document in documents)
        by_class = tokens.inverse_document_frequency(
            torch.stack([pad(document, (0, longest - len(document))) for document in documents]), tokenizer.ids
        )
        by_class[: tokenizer.first_bucket] *= WORD_WEIGHT
        grams_only = by_sentence.clone()
        grams_only[: tokenizer.first_bucket] = 0
        if own and own.weights is not None:
            by_class = own.weights
        columns = own.columns if own else max(pool.rows.shape[1] for pool in self.pools.values())
        for pool in self.pools.values():
            pool.rows = pad(pool.rows[:, :columns], (0, max(columns - pool.rows.shape[1], 0)))
        return (
            converters.Sentences(tokenizer, columns, by_class),
            Tokens(columns, tokenizer.ids, tokenizer.first_bucket, tokens.MAX_WORDS, by_class),
            Facts(features=TermFrequencies(grams_only.to(self.device))),
        )

    def _embedded(self, embed: str, known: Converter | None) -> tuple[Converter, Numbers, Facts]:
        """Make rows of features of a frozen model, standardised as is ``known``, or by the training sentences."""
        found = {}
        for split, pool in self.pools.items():
            content = sha256(json.dumps(pool.texts).encode()).hexdigest()
            found[split] = cached_features(embed, "sentences", pool.texts, content, self.device)
        converter = known if isinstance(known, Embedded) else fitted(Texts(), embed, found["train"])
        for split, pool in self.pools.items():
            pool.rows = converter.standardised(found[split])
        return converter, Numbers((len(converter.mean),)), Facts()

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Draw ``count`` tasks; leaves ``[count, sentences, ...]``, and ``class`` as well for training tasks."""
        pool, sizes = self.pools[split], self.sizes[split == "train"]

        def inputs(rows: Tensor) -> Tensor:
            found = pool.rows[rows.to(self.device)]
            return found if found.is_floating_point() else found.long()

        return draw_tasks(pool.cells, sizes, count, generator, inputs, split == "train")


def _by_domain(domains: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the labels of each split; splits share no domain: 6, 1 and 3 of CLINC150's ten, in alphabetical order."""
    names = sorted(domains)
    cut = {"train": names[:-4], "val": names[-4:-3], "test": names[-3:]}
    return {split: sorted(label for name in chosen for label in domains[name]) for split, chosen in cut.items()}


def of_table(path: str, data_dir: str, split: str, smallest: int, ways: int) -> tuple[dict[str, Sentences], str]:
    """Return the sentences of a table by split and label, and the name of the data.

    Args:
        path: a CSV with the columns ``text`` and ``label``, and perhaps ``split``.
        data_dir: where it is looked up if it is not here.
        split: ``given``, ``random`` or ``auto`` (see `splits.by_class`).
        smallest: number of sentences of the smallest label that is of use.
        ways: number of labels that a split should have at least.

    Raises:
        UserError: the table is missing or broken, or a label is in two splits.
    """
    require(split in ("auto", "given", "random"), f"split must be auto, given or random for a table, not {split}")
    place = found(path, data_dir)
    rows = table(read_file(place), str(place), COLUMNS, optional=("split",))
    examples = splits.Examples(
        place.stem,
        "sentences",
        [row.values["label"] for row in rows],
        [split_in(row, str(place)) for row in rows],
        [plain(row.values["text"]) for row in rows],
    )
    positions, name = splits.by_class(examples, examples.rows_of(smallest), split, LABEL_SPLIT_SEED, ways)
    corpus: dict[str, Sentences] = {
        part: {"": {label: [rows[i].values["text"] for i in own] for label, own in by_label.items()}}
        for part, by_label in positions.items()
    }
    return corpus, f"{place.stem}:{name}"


def text(
    ways: Ways = 5,
    shots: Shots = 1,
    queries: int = 15,
    train_ways: Ways | None = None,
    train_shots: Shots | None = None,
    train_queries: int | None = None,
    uneven: bool = False,
    dataset: Literal["auto", "toy", "clinc150", "banking77"] = "auto",
    split: Literal["auto", "01", "02", "03", "04", "05", "random", "domains", "given"] = "auto",
    grams: tuple[int, int] = (3, 5),
    buckets: int = 4096,
    path: str | None = None,
    device: str = "cpu",
    data_dir: str = "data",
    typed: Collection[str] | None = None,
    embed: str | None = None,
    converter: Converter | None = None,
) -> Text:
    """Tasks whose classes training has not seen.

    Args:
        ways: number of classes of a task, at least 2, or a range from which each task draws it.
        shots: number of support sentences per class, at least 1; or a range from which each task draws this number.
        queries: number of query sentences per class of a validation or test task, at least 1.
        train_ways: number of classes of a training task, for learners that allow it; null: ``ways``.
        train_shots: number of support sentences per class in training, or a range; null: ``shots``.
        train_queries: number of query sentences per class in training; null: ``queries``.
        uneven: whether each class draws its own number of support sentences from a range, instead of each task drawing
            one number for all its classes.
        dataset: ``clinc150``, ``banking77``, ``toy``, or ``auto``: clinc150 if it is there, else toy.
        split: number of a published label split, ``random`` (thirds of the labels by a fixed seed), ``domains``
            (clinc150 only: test domains are new too), or ``auto``: 01 if it is there, else random. For ``path``:
            ``given`` (by its column ``split``), ``random``, or ``auto``: given if there is such a column.
        grams: length of the shortest and longest character n-gram.
        buckets: number of ids that the n-grams share.
        path: the user's CSV with the columns ``text`` and ``label``, and perhaps ``split``, in place of ``dataset``.
        device: where the sentences live.
        data_dir: holds the folders ``clinc150`` and ``banking77``.
        typed: the keys that the user set; other sizes give way to what the data can serve. None: all.
        embed: a frozen pretrained model (see `metarun.data.sources`) whose features replace token ids; null: none.
        converter: what a run has learned of words, for a later test of it; None: fitted to training.

    Raises:
        UserError: data are missing or damaged, or the model cannot be loaded.
    """
    asked = Asked(ways, shots, queries, train_ways, train_shots, train_queries, uneven)
    asked.sizes()
    if path is not None:
        require(dataset == "auto", f"path and dataset={dataset} are two data sets; choose one")
        smallest, fewest = range_of("shots", shots).most + 1, range_of("ways", ways).least
        corpus, name = of_table(path, data_dir, split, smallest, fewest)
        source = str(found(path, data_dir).resolve())
        return Text(corpus, name, asked, grams, buckets, device, typed, embed, converter, source)
    require(split != "given", "split=given is for a table of your own; set path too, or choose another split")
    if dataset == "auto":
        dataset = "clinc150" if intents.is_there(data_dir, "clinc150") else "toy"
        if dataset == "toy":
            log.info(
                "No CLINC150 in %s/clinc150, so the language is a toy (%s).", data_dir, intents.SOURCES["clinc150"]
            )
    require(split != "domains" or dataset != "banking77", "split=domains is for clinc150; banking77 has no domains")
    if dataset == "toy":
        require(split == "auto", f"split={split} is for clinc150 and banking77; the toy language has one split")
        return Text(
            {part: {"": cells} for part, cells in toy_classes().items()},
            "toy",
            asked,
            grams,
            buckets,
            device,
            typed,
            embed,
            converter,
        )
    by_label = intents.clinc150(data_dir) if dataset == "clinc150" else intents.banking77(data_dir)
    if split == "auto":
        split = "01" if intents.has_label_splits(data_dir, dataset) else "random"
        if split == "random":
            log.info("No fewshot_label_splits of %s, so its labels are split at random, a third each.", dataset)
    if split == "domains":
        labels = _by_domain(intents.clinc150_domains(data_dir, by_label))
    elif split == "random":
        shares = {"train": 1 / 3, "val": 1 / 3, "test": 1 / 3}
        labels = {
            part: sorted(chosen) for part, chosen in splits.dealt(list(by_label), LABEL_SPLIT_SEED, shares).items()
        }
    else:
        labels = intents.label_split(data_dir, dataset, split, by_label)
    chosen = {part: {"": {label: by_label[label] for label in names}} for part, names in labels.items()}
    return Text(chosen, f"{dataset}:{split}", asked, grams, buckets, device, typed, embed, converter, dataset)


def _parallel_splits(sentences: Sequence[intents.Sentence]) -> dict[str, dict[str, dict[str, list[str]]]]:
    """Return corpora that share neither a language nor a meaning, with one sentence per meaning and language."""
    languages = splits.dealt(list({s.language for s in sentences}), LANGUAGE_SPLIT_SEED, SHARES)
    meanings = splits.dealt(list({s.meaning for s in sentences}), LANGUAGE_SPLIT_SEED, SHARES)
    corpus: dict[str, dict[str, dict[str, list[str]]]] = {split: {} for split in languages}
    seen = set()
    for sentence in sentences:
        if (key := (sentence.language, sentence.meaning)) in seen:
            continue
        seen.add(key)
        for split, cells in corpus.items():
            if sentence.language in languages[split] and sentence.meaning in meanings[split]:
                cells.setdefault(sentence.language, {}).setdefault(sentence.label, []).append(sentence.text)
    return corpus


def text_crosslingual(
    ways: Ways = 5,
    shots: Shots = 1,
    queries: int = 5,
    train_ways: Ways | None = None,
    train_shots: Shots | None = None,
    train_queries: int | None = None,
    uneven: bool = False,
    dataset: Literal["auto", "toy", "xsid", "nusax"] = "auto",
    grams: tuple[int, int] = (3, 5),
    buckets: int = 4096,
    device: str = "cpu",
    data_dir: str = "data",
    typed: Collection[str] | None = None,
    embed: str | None = None,
    converter: Converter | None = None,
) -> Text:
    """Tasks within one language, with new languages in test; no test sentence has a translation in training.

    Args:
        ways: number of classes of a task, at least 2 (at most 3 for nusax), or a range from which each task draws it.
        shots: number of support sentences per class, at least 1; or a range from which each task draws this number.
        queries: number of query sentences per class of a validation or test task, at least 1.
        train_ways: number of classes of a training task, for learners that allow it; null: ``ways``.
        train_shots: number of support sentences per class in training, or a range; null: ``shots``.
        train_queries: number of query sentences per class in training; null: ``queries``.
        uneven: whether each class draws its own number of support sentences from a range, instead of each task drawing
            one number for all its classes.
        dataset: ``xsid`` (intents, 19 languages), ``nusax`` (sentiment, 12 languages), ``toy``, or ``auto``:
            xsid if it is there, else toy.
        grams: length of the shortest and longest character n-gram.
        buckets: number of ids that the n-grams share.
        device: where the sentences live.
        data_dir: holds the folders ``xsid`` and ``nusax_senti``.
        typed: the keys that the user set; other sizes give way to what the data can serve. None: all.
        embed: a frozen pretrained model (see `metarun.data.sources`) whose features replace token ids; null: none.
        converter: what a run has learned of words, for a later test of it; None: fitted to training.

    Raises:
        UserError: data are missing or damaged, or the model cannot be loaded.
    """
    asked = Asked(ways, shots, queries, train_ways, train_shots, train_queries, uneven)
    asked.sizes()
    if dataset == "auto":
        dataset = "xsid" if intents.is_there(data_dir, "xsid") else "toy"
        if dataset == "toy":
            log.info("No xSID in %s/xsid, so the languages are toys (%s).", data_dir, intents.SOURCES["xsid"])
    if dataset == "toy":
        sentences = toy_languages()
    else:
        sentences = intents.xsid(data_dir) if dataset == "xsid" else intents.nusax(data_dir)
    corpus = _parallel_splits(sentences)
    family = Text(corpus, f"{dataset}:languages", asked, grams, buckets, device, typed, embed, converter)
    family.units = {split: units_of(dataset, languages) for split, languages in corpus.items()}
    return family
