"""Entities in sentences: few-shot tagging in new languages and domains, and of new types.

A task is one language, domain or file: its support set is tagged sentences, from which a learner shall find the
entities of further ones. With ``types=shared`` types mean the same wherever they have the same name; with ``types=new``
each task draws some types that training has not seen, in any order.

Inputs are what words look like (`metarun.data.tokens.WordFeatures`). ``unfamiliar`` keeps training from relying on
words that it knows: in such a task a share of the features of words is exchanged for those that stand for what training
has not seen, by a rule that holds in the whole task, as if the language were new.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from metarun.contracts import Facts, Pooled, Predict, Samples, Sizes, Spec, Split, Task, Tree, Words
from metarun.data import corpora, tokens
from metarun.data.corpora import Corpus, Source
from metarun.data.files import found
from metarun.data.sources import check_source
from metarun.data.splits import SHARES, dealt, listed, warn_of_like
from metarun.data.tagged import Scheme, Sentence, TaggedWords
from metarun.data.toy_entities import toy_entities
from metarun.data.word_vectors import different, embedded, fit_vectors, places, table_of
from metarun.errors import require
from metarun.targets.metric import Metric
from metarun.targets.tags import Decoder, Tags, begins_at, counted, f1, kind_of, spans
from metarun.tasks.few_shot import Shots, TaskSizes, draw, sizes_without_classes, units_of
from metarun.tasks.tag_references import Logistic, gazetteer

log = logging.getLogger(__name__)

POOLED_F1 = Metric("pooled-entity-f1", higher_is_better=True, percent=True)
POOLED_SPAN_F1 = Metric("pooled-span-f1", higher_is_better=True, percent=True)
MEAN_F1 = Metric("source-entity-f1", higher_is_better=True, percent=True)
"""The mean over sources of the F1 of all entities of a source."""
MOST_SHOWN = 12
"""The most test sources whose own F1 is reported."""
MOST_BUCKETS = 2**20
TYPE_SPLIT_SEED = 23


def pieces(sentence: Sentence, longest: int) -> list[Sentence]:
    """Return a sentence in pieces of at most ``longest`` words, none of which begins inside an entity if possible."""
    rest, found = sentence, list[Sentence]()
    while len(rest.words) > longest:
        cut = next((i for i in range(longest, 0, -1) if not rest.tags[i].startswith("I-")), longest)
        found.append(Sentence(rest.words[:cut], rest.tags[:cut], rest.name))
        rest = Sentence(rest.words[cut:], rest.tags[cut:], rest.name)
    return [*found, rest]


def types_in(sentences: Sequence[Sentence]) -> set[str]:
    """Return the types of all entities."""
    return {tag[2:] for sentence in sentences for tag in sentence.tags if tag.startswith("B-")}


class Pool:
    """The sentences of one source of a split on the device.

    Attributes:
        sentences: all of them: those that support is drawn from, then those that queries are drawn from.
        x: what their words look like ``[sentences, words, columns]``.
        tag: tags among the source's own types ``[sentences, words]``; −1 for padding.
        supports: number of sentences for support.
        apart: whether queries come from the other sentences; otherwise all are for both.
        place: the row of each word in the family's table of vectors ``[sentences, words]``; 0 for padding.
        types: the names of the source's types.
        from_training: whether training has sentences of this source.
    """

    x: Tensor
    tag: Tensor
    place: Tensor

    def __init__(self, source: Source, types: Sequence[str], longest: int, from_training: bool) -> None:
        support = [piece for sentence in source.support for piece in pieces(sentence, longest)]
        query = [piece for sentence in source.query or () for piece in pieces(sentence, longest)]
        self.sentences, self.supports, self.apart = [*support, *query], len(support), source.query is not None
        own = types_in(self.sentences)
        self.types = [name for name in types if name in own]
        self.from_training = from_training

    def encode(self, features: tokens.WordFeatures, device: str) -> None:
        """Make tensors of the sentences."""
        self.x = features([sentence.words for sentence in self.sentences]).to(device)
        tag_of = {"O": 0}
        for kind, name in enumerate(self.types):
            tag_of |= {f"B-{name}": begins_at(kind), f"I-{name}": begins_at(kind) + 1}
        rows = [[tag_of.get(tag, 0) for tag in sentence.tags] for sentence in self.sentences]
        self.tag = torch.tensor([row + [-1] * (features.longest - len(row)) for row in rows]).to(device)
        kinds = torch.arange(max(len(self.types), 1))
        # Which types each sentence has an entity of [sentences, types].
        self.has = (kind_of(self.tag.cpu())[..., None] == kinds).any(1)

    def allowed(self) -> tuple[Tensor, Tensor]:
        """Return which sentences support and queries may have ``[sentences]`` each."""
        place = torch.arange(len(self.sentences))
        return (place < self.supports, place >= self.supports) if self.apart else (place >= 0, place >= 0)


@dataclass(frozen=True)
class How:
    """What tasks are made of sentences.

    Raises:
        ValueError: a value is out of range.
    """

    types: str | tuple[str, ...] = "shared"
    """``shared``, ``new``, or the names of the only types that count, which are shared."""
    ways: int = 3
    """Number of types of a task with new types, at least 1."""
    longest: int = 32
    """Number of words of the longest sentence, at least 2; longer ones are cut into pieces."""
    buckets: int = 8192
    """Number of ids that features known from training share, from 2 to ``MOST_BUCKETS``."""
    unfamiliar: float = 0.5
    """Share of the tasks of training sources that are made unfamiliar, from 0 to 1."""
    decoder: Decoder = "spans"
    embed: str | None = None
    """A frozen model of sentences whose features each word has, too (see `metarun.data.sources`); None: none."""
    components: int = 64
    """Number of principal components of these features, at least 1."""

    def __post_init__(self) -> None:
        require(self.ways >= 1, f"ways must be at least 1, not {self.ways}")
        require(self.longest >= 2, f"longest must be at least 2, not {self.longest}")
        require(2 <= self.buckets <= MOST_BUCKETS, f"buckets must be from 2 to {MOST_BUCKETS}, not {self.buckets}")
        require(self.components >= 1, f"components must be at least 1, not {self.components}")
        if self.embed is not None:
            check_source(self.embed, "sentences")
        require(0 <= self.unfamiliar <= 1, f"unfamiliar must be from 0 to 1, not {self.unfamiliar}")
        known = not isinstance(self.types, str) or self.types in ("shared", "new")
        require(known, f"types must be shared, new or a list of names, not {self.types}")

    def text(self) -> list[str]:
        """Return what makes scores incomparable."""
        kind = f"new:ways={self.ways}" if self.types == "new" else "shared"
        return [kind, f"longest={self.longest}", *([] if self.embed is None else [self.embed])]


class Entities:
    """Tasks of finding entities; ``x [sentences, words, columns]`` are ids, ``y [sentences, words, tags]`` is one-hot.

    With a frozen model, its numbers of each word follow the ids in ``x``.

    Args:
        corpus: sources by split; without any for validation, the last sentences of training sources are held out.
        dataset: name of the corpus, and all that makes scores incomparable.
        sizes: numbers of sentences of training tasks (True) and of others (False).
        how: what tasks are made of sentences.
        device: where the sentences live.
        converter: what a run has learned of words and types; None: it is fitted to the training sentences.
        place: where the sources come from; None: from ``dataset``.
    """

    def __init__(
        self,
        corpus: Corpus,
        dataset: str,
        sizes: Mapping[bool, TaskSizes],
        how: How,
        device: str = "cpu",
        converter: TaggedWords | None = None,
        place: str | None = None,
    ) -> None:
        self.device, self.sizes, self.how, self.new = device, sizes, how, how.types == "new"
        others, each = sizes[False], how.ways if self.new else 1
        corpus = corpora.with_validation(corpus, each * each * (others.shots.most + others.queries))
        chosen = _types(corpus, how.types)
        self.pools = {
            split: {
                name: Pool(source, chosen[split], how.longest, name in corpus["train"])
                for name, source in sources.items()
            }
            for split, sources in corpus.items()
        }
        self._check(dataset)
        words = different(
            sentence.words for own in self.pools.values() for p in own.values() for sentence in p.sentences
        )
        found = None if how.embed is None else embedded(how.embed, words, device)
        self.converter = converter or self._fitted(words, found)
        self.features, self.columns = self.converter.features, self.converter.types
        self.strange_columns = self.converter.places
        require(
            self.features.longest == how.longest,
            f"the learner was trained with task.longest={self.features.longest}; test it with the same",
        )
        self._check_places(dataset)
        vectors, self.vectors = self.converter.vectors, None
        if vectors is not None and found is not None:
            self.vectors = table_of(vectors.projected(found)).to(device)
        for own in self.pools.values():
            for pool in own.values():
                pool.encode(self.features, device)
                if self.vectors is not None:
                    pool.place = places([s.words for s in pool.sentences], words, how.longest).to(device)
        self.names = tuple(dict.fromkeys(name for own in self.pools.values() for name in own))
        self.units = {split: units_of(place or dataset, own) for split, own in self.pools.items()}
        target = self._target(how.decoder)
        self.converter = replace(self.converter, target=target)
        self.spec = Spec(
            Words(how.longest, tokens.COLUMNS, self.features.ids, 0 if vectors is None else vectors.size),
            target,
            Sizes(others.shots.most * each, others.queries * each),
            metrics=target.metrics,
            facts=Facts(groups=self.names, references={"gazetteer": gazetteer, "logistic": Logistic()}),
        )
        self.dataset = ":".join([dataset, *others.shots.text("shots"), *how.text(), self._content()])
        self.tested = [self.names.index(name) for name in self.pools["test"]][:MOST_SHOWN]
        by_source = (Metric(f"entity-f1-{self.names[i]}", higher_is_better=True, percent=True) for i in self.tested)
        self.pooled = Pooled((MEAN_F1, POOLED_F1, POOLED_SPAN_F1, *by_source), self._counts, self._pooled)
        self.samples = Samples(self._found, self._shown)

    def _content(self) -> str:
        """Return a hash of what validation and test tasks are drawn from."""
        parts = [(name, pool.sentences, pool.types) for own in self.pools.values() for name, pool in own.items()]
        return sha256(repr(parts).encode()).hexdigest()[:6]

    def _check(self, dataset: str) -> None:
        """Require sentences and types enough for a task of every source."""
        for split, own in self.pools.items():
            asked = self.sizes[split == "train"]
            prefix = "train_" if split == "train" and self.sizes[True] != self.sizes[False] else ""
            for name, pool in own.items():
                where = f"{dataset}: source {name} of {split}"
                require(
                    bool(pool.types),
                    f"{where} has no entity of a type that counts; leave the source out, or change task.types",
                )
                if self.new:
                    self._check_types(where, pool, asked, prefix)
                    continue
                have = min(pool.supports, len(pool.sentences) - pool.supports) if pool.apart else len(pool.sentences)
                needs = max(asked.shots.most, asked.queries) if pool.apart else asked.shots.most + asked.queries
                numbers = f"{prefix}shots={asked.shots.most} and {prefix}queries={asked.queries}"
                require(
                    have >= needs,
                    f"{where} has {have} sentences, and {numbers} need {needs}; lower them, or leave the source out",
                )

    def _check_types(self, where: str, pool: Pool, asked: TaskSizes, prefix: str) -> None:
        """Leave out the types of a source that are too rare for a task of new types; require enough of them.

        A sentence that holds several types is drawn for one of them, so each needs as many as all types of a task.
        """
        numbers = {name: [0, 0] for name in pool.types}
        for place, sentence in enumerate(pool.sentences):
            for name in types_in([sentence]) & set(pool.types):
                numbers[name][pool.apart and place >= pool.supports] += 1
        needs = (asked.shots.most, asked.queries) if pool.apart else (asked.shots.most + asked.queries, 0)
        common = [
            name
            for name, own in numbers.items()
            if all(n >= self.how.ways * need for n, need in zip(own, needs, strict=True))
        ]
        require(
            len(common) >= self.how.ways,
            f"{where} has {len(common)} of {len(numbers)} types with {self.how.ways * sum(needs)} sentences, and "
            f"ways={self.how.ways} with {prefix}shots={asked.shots.most} and {prefix}queries={asked.queries} need "
            f"{self.how.ways}; lower them, or leave the source out",
        )
        if rare := [name for name in numbers if name not in common]:
            log.info(
                "%s: types with fewer than %d sentences are left out: %s.",
                where,
                self.how.ways * sum(needs),
                listed(rare),
            )
        pool.types = common

    def _check_places(self, dataset: str) -> None:
        """Require a place for each type of a validation or test task that training lacks."""
        for split in ("val", "test"):
            for name, pool in self.pools[split].items():
                lacking = [kind for kind in pool.types if kind not in self.columns]
                needs = self.how.ways if self.new else len(lacking)
                require(
                    needs <= self.strange_columns,
                    f"{dataset}: source {name} of {split} has the types {listed(lacking)}, which the learner was not "
                    f"trained with, and {needs} of a task are more than its {self.strange_columns} places for such; "
                    f"{'lower task.ways' if self.new else 'name the types that count in task.types'}",
                )

    def _columns(self) -> tuple[tuple[str, ...], int]:
        """Return the names of the types with separate places, and the number of further places.

        Types that training lacks take one of the further places, as do those of training where it is made unfamiliar.
        """
        if self.new:
            return (), self.how.ways
        known = sorted({name for pool in self.pools["train"].values() for name in pool.types})
        lacking = [
            len(set(pool.types) - set(known)) for split in ("val", "test") for pool in self.pools[split].values()
        ]
        return tuple(known), max(lacking)

    def _fitted(self, words: list[str], found: Tensor | None) -> TaggedWords:
        """Return what training says of words and types; ``found`` are features of ``words``, if there are any."""
        training = [sentence.words for pool in self.pools["train"].values() for sentence in pool.sentences]
        vectors = None
        if self.how.embed is not None and found is not None:
            own = set(different(training))
            seen = torch.tensor([word in own for word in words])
            vectors = fit_vectors(self.how.embed, found[seen], self.how.components)
        return TaggedWords(tokens.fit_words(training, self.how.buckets, self.how.longest), *self._columns(), vectors)

    def _target(self, decoder: Decoder) -> Tags:
        names = (*self.columns, *(f"new{i}" for i in range(self.strange_columns)))
        target = Tags(names, decoder)
        if decoder != "crf":
            return target
        tags = torch.cat([pool.tag for pool in self.pools["train"].values()]).cpu()
        return replace(target, transitions=counted(tags.clamp(min=0), (tags >= 0).float(), target.outputs))

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Draw ``count`` tasks, each of one source; ``group`` is its number, and ``sentence`` that of each example."""
        names = list(self.pools[split])
        chosen = torch.randint(len(names), (count,), generator=generator).tolist()
        parts = [self._task(split, names[i], generator) for i in chosen]
        support, query = ({key: torch.stack([task[i][key] for task in parts]) for key in parts[0][i]} for i in range(2))
        return Task(support, query)

    def _task(self, split: Split, name: str, generator: torch.Generator) -> tuple[Tree, Tree]:
        pool, asked = self.pools[split][name], self.sizes[split == "train"]
        strange = pool.from_training and bool(torch.rand((), generator=generator) < self.how.unfamiliar)
        kinds, place = self._places(pool, strange, generator)
        support, query = self._drawn(pool, asked, kinds, generator)
        share = torch.rand((), generator=generator) if strange else torch.zeros(())
        salt = torch.randint(2**20, (), generator=generator)
        real = asked.shots.draw((), generator) * (len(kinds) if self.new else 1)
        group = self.names.index(name)

        def part(rows: Tensor, real: Tensor | None) -> Tree:
            rows = rows.to(self.device)
            weight = torch.ones(len(rows), device=self.device)
            if real is not None:
                weight = (torch.arange(len(rows), device=self.device) < real.to(self.device)).to(weight)
            tag, outputs = pool.tag[rows], self.spec.target.outputs
            there = (tag >= 0) & (weight > 0)[:, None]
            y = one_hot(place.to(self.device)[tag.clamp(min=0)], outputs) * there[..., None]
            x = self._unfamiliar(pool.x[rows].long(), share, salt)
            if self.vectors is not None:
                numbers = self.vectors[pool.place[rows]]
                x = torch.cat([x.to(numbers), numbers], -1)
            x = x * there[..., None]
            found = {"x": x, "y": y.to(torch.get_default_dtype())}
            if not (self.sizes[False].shots.fixed and self.sizes[True].shots.fixed):
                found["weight"] = weight.to(found["y"])
            if self.strange_columns and not self.new:
                own = torch.zeros(outputs, dtype=torch.bool).index_fill(0, place, True)
                found["ways"] = own.to(found["y"]).expand(len(rows), -1)
            index = torch.full((len(rows),), group, device=self.device)
            return {**found, "group": index, "sentence": rows}

        return part(support, real), part(query, None)

    def _places(self, pool: Pool, strange: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the types of a task among those of its source, and the tag that each of the source's tags becomes."""
        number = len(pool.types)
        place = torch.zeros(1 + 2 * number, dtype=torch.long)
        if self.new:
            kinds = torch.randperm(number, generator=generator)[: self.how.ways]
            columns = torch.arange(len(kinds))
        else:
            kinds = torch.arange(number)
            free = torch.randperm(self.strange_columns, generator=generator) + len(self.columns)
            moved = torch.tensor([name not in self.columns for name in pool.types])
            if strange and self.strange_columns:
                # As many types of training move as the others leave places for, at most.
                moving = (torch.rand(number, generator=generator) < 0.5) & ~moved
                moved = moved | (moving & (moving.cumsum(0) <= len(free) - moved.sum()))
            own = torch.tensor([self.columns.index(name) if name in self.columns else 0 for name in pool.types])
            columns = torch.where(moved, free[(moved.cumsum(0) - 1).clamp(min=0)] if len(free) else own, own)
        for offset in range(2):
            place[begins_at(0) + 2 * kinds + offset] = begins_at(0) + 2 * columns + offset
        return kinds, place

    def _drawn(self, pool: Pool, asked: TaskSizes, kinds: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the support and query sentences of a task, in random order."""
        for_support, for_query = pool.allowed()
        if not self.new:
            if pool.apart:
                return draw(for_support, asked.shots.most, generator), draw(for_query, asked.queries, generator)
            both = draw(for_support, asked.shots.most + asked.queries, generator)
            return both[: asked.shots.most], both[asked.shots.most :]
        taken = torch.zeros(len(pool.sentences), dtype=torch.bool)
        drawn = []
        for allowed, number in ((for_support, asked.shots.most), (for_query, asked.queries)):
            own = []
            for kind in kinds.tolist():
                rows = draw(allowed & pool.has[:, kind] & ~taken, number, generator)
                taken[rows] = True
                own.append(rows)
            together = torch.stack(own, 1).flatten()
            drawn.append(together)
        return drawn[0], drawn[1]

    def _unfamiliar(self, x: Tensor, share: Tensor, salt: Tensor) -> Tensor:
        """Return ids of which this share of those that training knows is exchanged for strange ones."""
        features = self.features
        known = (x >= features.first_known) & (x < features.first_strange)
        # Multiplicative hashing (Knuth, The Art of Computer Programming 3, section 6.4).
        mixed = ((x + salt) * 2654435761) % 2**32
        exchanged = known & (mixed < share * 2**32)
        return torch.where(exchanged, features.first_strange + (mixed >> 7) % tokens.STRANGE, x)

    def _counts(self, predict: Predict, task: Task) -> Tensor:
        """Return the numbers of entities of a test task in the row of its source ``[sources, 4]``."""
        found = self.spec.target.counts(predict(task.query["x"]), task.query)  # type: ignore[attr-defined]
        own = one_hot(task.query["group"][0], len(self.names))
        counts: Tensor = own[:, None] * found
        return counts

    def _pooled(self, counts: Tensor) -> dict[str, float]:
        """Return the metrics of all tasks together from counts ``[tasks, sources, 4]``.

        A source without entities in these tasks, perhaps because none is of it, is not in the mean and has no F1.
        """
        by_source = counts.sum(0).double()
        right, found, true, spans_right = by_source.sum(0)
        every = f1(*by_source[:, :3].unbind(1))
        there = by_source[:, 2] > 0
        return {
            MEAN_F1.name: float(every[there].mean()) if there.any() else 0.0,
            POOLED_F1.name: float(f1(right, found, true)),
            POOLED_SPAN_F1.name: float(f1(spans_right, found, true)),
            **{f"entity-f1-{self.names[i]}": float(every[i]) if there[i] else math.nan for i in self.tested},
        }

    def _found(self, predict: Predict, task: Task) -> Tree:
        return {"tag": self.spec.target.decoded(predict(task.query["x"]), task.query)}  # type: ignore[attr-defined]

    def _shown(self, found: Mapping[str, Tree], tasks: Task) -> str:
        """Return the first queries of each task: their true entities, and those found before and after adaptation."""
        lines = []
        for task, group in enumerate(tasks.query["group"][:, 0].tolist()):
            name = self.names[group]
            pool = self.pools["test"][name]
            lines.append(f"## {name}\n")
            for example in range(min(5, tasks.query["sentence"].shape[1])):
                words = pool.sentences[int(tasks.query["sentence"][task, example])].words
                answers = {"true": tasks.query["y"][task, example].argmax(-1)}
                answers |= {when: tree["tag"][task, example] for when, tree in found.items()}
                lines += [f"- {when}: {self._marked(words, tag)}" for when, tag in answers.items()] + [""]
        return "\n".join(lines)

    def _marked(self, words: Sequence[str], tag: Tensor) -> str:
        """Return a sentence whose entities stand in brackets, with their types."""
        begins, kind, after = (leaf[0].tolist() for leaf in spans(tag[None]))
        types, text = self.spec.target.types, list(words)  # type: ignore[attr-defined]
        for start in range(len(words)):
            if begins[start]:
                last = min(after[start], len(words)) - 1
                text[start] = f"[{text[start]}"
                text[last] = f"{text[last]}]({types[kind[start]]})"
        return " ".join(text)


def _types(corpus: Corpus, types: str | Sequence[str]) -> dict[str, list[str]]:
    """Return the types that count in each split.

    New types are those that training lacks; where all sources have all types, these are dealt to the splits.
    """
    of_split = {
        split: sorted({name for source in sources.values() for name in types_in(source.sentences())})
        for split, sources in corpus.items()
    }
    every = sorted({name for names in of_split.values() for name in names})
    require(bool(every), "the data hold no entity; every word has the tag O")
    warn_of_like(every, "The tags", "types")
    if not isinstance(types, str):
        unknown = [name for name in types if name not in every]
        require(not unknown, f"types names {unknown[:1]}, and the data have {listed(every)}")
        return {split: list(types) for split in of_split}
    if types == "shared":
        return of_split
    new = {split: [name for name in names if name not in of_split["train"]] for split, names in of_split.items()}
    if new["test"] and new["val"]:
        return {**new, "train": of_split["train"]}
    split = dealt(every, TYPE_SPLIT_SEED, SHARES, 2)
    return {part: sorted(names) for part, names in split.items()}


LANGUAGE_TYPES = ("LOC", "ORG", "PER")
"""The types of Universal NER; a few of its files also have OTH, which does not count."""


def entities(
    shots: Shots = 20,
    queries: int = 25,
    train_shots: Shots | None = None,
    train_queries: int | None = None,
    dataset: Literal["auto", "toy", "universal_ner", "crossner", "xsid"] = "auto",
    path: str | None = None,
    val: Sequence[str] = (),
    test: Sequence[str] = (),
    types: str | Sequence[str] = "shared",
    ways: int = 3,
    longest: int = 32,
    buckets: int = 8192,
    unfamiliar: float = 0.5,
    decoder: Decoder = "spans",
    column: int | None = None,
    scheme: Scheme = "iob2",
    device: str = "cpu",
    data_dir: str = "data",
    converter: TaggedWords | None = None,
    embed: str | None = None,
    components: int = 64,
) -> Entities:
    """Tasks of finding entities in a language, a domain or a file.

    Args:
        shots: number of support sentences of a task, at least 1, or a range; with ``types=new`` of each type.
        queries: number of query sentences of a validation or test task, at least 1; with ``types=new`` of each type.
        train_shots: the same in training; null: ``shots``.
        train_queries: null: ``queries``.
        dataset: ``universal_ner`` (new languages), ``crossner`` (new domains), ``xsid`` (slots in new languages),
            ``toy``, or ``auto``: universal_ner if it is there, else toy.
        path: the user's file or folder of CoNLL or IOB2 files in place of ``dataset``, a source per folder or file.
        val: the sources of validation; none: as the folders say, or sentences of training sources.
        test: the sources of test; none: as the folders say, or drawn by a fixed seed. For crossner its domains.
        types: ``shared`` (types mean the same by name), ``new`` (each task draws types that training lacks), or the
            names of the only types that count.
        ways: number of types of a task with ``types=new``, at least 1.
        longest: number of words of the longest sentence, at least 2; longer ones are cut into pieces.
        buckets: number of ids that features known from training share.
        unfamiliar: share of the training tasks that are made unfamiliar, from 0 to 1.
        decoder: ``words`` (each word by itself), ``viterbi`` (the best path of allowed tags), ``spans`` (entities
            first, and then the type of each) or ``crf`` (trained by paths, too).
        column: the column of the tag in the user's files, counted from 1; null: the last, in .iob2 files the third.
        scheme: ``iob2`` (entities begin with B-) or ``iob1`` (they may begin with I-), for the user's files.
        device: where the sentences live.
        data_dir: holds the folders of the corpora.
        converter: what a run has learned of words and types, for a later test of it; None: fitted to training.
        embed: a frozen model of sentences that embeds each word alone (see `metarun.data.sources`); null: none.
        components: number of principal components of its features that words have, at least 1.

    Raises:
        UserError: data are missing or damaged; the sentence names the file and the line.
    """
    require(column is None or column >= 2, f"column must be at least 2, since words come first, not {column}")
    sizes = sizes_without_classes(shots, queries, train_shots, train_queries)
    chosen = types if isinstance(types, str) else tuple(types)
    how = How(chosen, ways, longest, buckets, unfamiliar, decoder, embed, components)
    if path is not None:
        require(dataset == "auto", f"path and dataset={dataset} are two data sets; choose one")
        corpus = corpora.of_path(path, data_dir, column, scheme, val, test)
        place = str(found(path, data_dir).resolve())
        family = Entities(corpora.without_copies(corpus), Path(path).name, sizes, how, device, converter, place)
        family.converter = replace(family.converter, column=column, scheme=scheme)
        return family
    if dataset == "auto":
        dataset = "universal_ner" if corpora.is_there(data_dir, "universal_ner") else "toy"
        if dataset == "toy":
            log.info(
                "No Universal NER in %s/universal_ner, so the languages are toys (%s).",
                *(data_dir, corpora.SOURCES["universal_ner"]),
            )
    require(not val, "task.val is for sources of your own; set task.path too")
    require(not test or dataset == "crossner", f"task.test is for crossner and sources of your own, not for {dataset}")
    if dataset == "crossner":
        held_out = test or ("politics",)
        corpus = corpora.without_copies(corpora.crossner(data_dir, held_out))
        return Entities(corpus, f"crossner:{','.join(held_out)}", sizes, how, device, converter, dataset)
    if dataset == "universal_ner":
        if types == "shared":
            how = replace(how, types=LANGUAGE_TYPES)
        return Entities(corpora.universal_ner(data_dir), dataset, sizes, how, device, converter)
    corpus = toy_entities() if dataset == "toy" else corpora.xsid(data_dir)
    return Entities(corpus, dataset, sizes, how, device, converter)
