"""Saying what a system wants to say: acts with slots and values to an utterance, in a service that is new.

A task is a service, and its support and query turns are of different dialogues. Values are placeholders in prompts and
texts. After adaptation the most likely text is written piece by piece, and its placeholders are filled in. The
texts of all test tasks are scored together: BLEU in lower case, and slot errors. The same scores are given of two ways
to answer without learning.
"""

import logging
from collections.abc import Mapping
from hashlib import sha256
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarun.contracts import Pooled, Predict, Samples, Sequences, Sizes, Spec, Split, Task, Tree
from metarun.data import dialogues, pieces
from metarun.data.acts import Acts, before, draft_of, padded, prompt_of, said
from metarun.data.dialogues import Prompts, Turn, filled, slot_errors
from metarun.data.files import found
from metarun.data.responses import WAYS
from metarun.data.toy_writing import toy_turns
from metarun.errors import require
from metarun.targets.bleu import COUNTS, bleu, bleu_counts
from metarun.targets.decoding import written
from metarun.targets.metric import Metric
from metarun.targets.text import NATS, Text
from metarun.tasks.few_shot import Shots, TaskSizes, sizes_without_classes, units_of
from metarun.tasks.units import with_unit

log = logging.getLogger(__name__)

WRITERS = ("", *(f"{name}-" for name in WAYS))
ABOVE = {name: Metric(f"bleu-above-{name}", True, percent=True) for name in WAYS}
"""The learner's BLEU minus that of each way to answer without learning, on the same turns."""
METRICS = (
    *(
        metric
        for writer in WRITERS
        for metric in (
            Metric(f"{writer}bleu", True, percent=True),
            Metric(f"{writer}slot-error-rate", False, percent=True),
        )
    ),
    *ABOVE.values(),
)
SHOWN = 6
"""Number of query turns that samples show of a task."""


class Services:
    """The turns of one split as rows of ids, and the dialogues of each service.

    Attributes:
        names: of the services.
        dialogues: of each service, the rows of its dialogues' turns.
        prompts: the ids of the acts of each turn.
        texts: rows of ids ``[turns, columns]``.
    """

    def __init__(
        self, services: dict[str, list[list[Turn]]], describe: Prompts, tokenizer: pieces.Pieces, shape: tuple[int, int]
    ) -> None:
        self.names, self.dialogues, self.turns = list(services), list[list[list[int]]](), list[Turn]()
        for of_service in services.values():
            self.dialogues.append([])
            for turns in of_service:
                self.dialogues[-1].append(list(range(len(self.turns), len(self.turns) + len(turns))))
                self.turns += turns
        self.prompts = [tokenizer.encoded(describe.of(turn))[: shape[0]] for turn in self.turns]
        self.texts = tokenizer.rows((turn.text for turn in self.turns), shape[1])

    def draw(self, size: TaskSizes, generator: torch.Generator) -> tuple[list[int], list[int], int]:
        """Draw the support turns, as many as ``size`` has at most, and the query turns of one service; also its number.

        Half of its dialogues are for support, or as many more or fewer as the numbers of turns need.
        """

        def shuffled(rows: list[int]) -> list[int]:
            return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]

        service = int(torch.randint(len(self.dialogues), (), generator=generator))
        own = self.dialogues[service]
        order = torch.randperm(len(own), generator=generator).tolist()
        ends = np.cumsum([len(own[i]) for i in order])
        fitting = np.flatnonzero((ends >= size.shots.most) & (ends[-1] - ends >= size.queries))
        cut = int(fitting[np.abs(fitting + 1 - len(own) / 2).argmin()]) + 1
        support, query = ([row for i in chosen for row in own[i]] for chosen in (order[:cut], order[cut:]))
        return shuffled(support)[: size.shots.most], shuffled(query)[: size.queries], service


class Generation:
    """Tasks of one service each: ``x [turns, prompt + text]`` and ``y [turns, text]`` are token ids.

    ``turn [turns]`` is the number of each turn, by which test tasks find what was really said.

    Args:
        shots: number of support turns, at least 1, or a range from which each task draws it.
        queries: number of query turns of a validation or test task, at least 1.
        train_shots: the same as ``shots`` in training; null: ``shots``.
        train_queries: the same as ``queries`` in training; null: ``queries``.
        dataset: ``sgd`` (the Schema-Guided Dialogue data set), ``toy``, or ``auto``: sgd if it is there, else toy.
        path: a folder of the user's with files of the same form, in place of ``dataset``.
        merges: number of word pieces longer than a character, at least 0.
        length: most tokens of a text, its end included, at least 2; longer ones are cut off for learning.
        prompt: most tokens of a prompt, at least 1; longer ones are cut off.
        draft: a way to answer without learning whose text follows the acts in a prompt, so that a learner may copy and
            edit it: ``nearest`` or ``template`` (see `metarun.data.responses`); ``none``: acts alone.
        margin: what a learner writes is said if it is likelier than the draft by this many nats per token, and
            otherwise the draft; null: it is always said. Without a draft there is nothing to choose.
        once: whether each value of a prompt is said once (see `metarun.targets.decoding.each_once`).
        temperature: that of the samples, above 0.
        device: where the turns live.
        data_dir: holds the folder ``sgd_subset``.
        converter: what a run has learned of words and acts, for a later test of it; None: fitted to training.

    Raises:
        UserError: data are missing or damaged.
    """

    def __init__(
        self,
        shots: Shots = 20,
        queries: int = 20,
        train_shots: Shots | None = None,
        train_queries: int | None = None,
        dataset: Literal["auto", "sgd", "toy"] = "auto",
        path: str | None = None,
        merges: int = 600,
        length: int = 32,
        prompt: int = 24,
        draft: Literal["none", "nearest", "template"] = "template",
        margin: float | None = None,
        once: bool = True,
        temperature: float = 0.7,
        device: str = "cpu",
        data_dir: str = "data",
        converter: Acts | None = None,
    ) -> None:
        self.device, self.temperature = device, temperature
        self.sizes = sizes_without_classes(shots, queries, train_shots, train_queries)
        require(merges >= 0, f"merges must be at least 0, not {merges}")
        require(length >= 2, f"length must be at least 2, not {length}")
        require(prompt >= 1, f"prompt must be at least 1, not {prompt}")
        require(temperature > 0, f"temperature must be above 0, not {temperature}")
        turns, name = corpus(dataset, path, data_dir)
        parts = dialogues.by_service(turns, name)
        content = sha256(repr(sorted(parts.items())).encode()).hexdigest()[:6]
        train = [turn for own in parts["train"].values() for turn in own]
        describe = Prompts(dialogues.acts_of(train) if converter is None else converter.acts)
        if converter is None:
            texts = [text for turn in train for text in (turn.text, describe.of(turn))]
            tokenizer = pieces.fit(texts, merges, describe.alphabet)
        else:
            tokenizer = converter.tokenizer
        self.tokenizer, self.length, self.draft = tokenizer, length, WAYS.get(draft)
        self.margin = margin if self.draft else None
        self.converter = Acts(tokenizer, tuple(describe.acts), prompt, length, draft, once, temperature, self.margin)
        self.columns = self.converter.columns
        self.rule = self.converter.rule if once else None
        self.splits = dict[str, Services]()
        for part, services in parts.items():
            size = self.sizes[part == "train"]
            large = dialogues.of_size(services, size.shots.most, size.queries, f"{name} ({part})")
            self.splits[part] = Services(large, describe, self.tokenizer, (prompt, length))
        source = name if path is None else found(path, data_dir).resolve()
        self.units = {part: units_of(source, own.names) for part, own in self.splits.items()}
        self.different_tests = len(self.splits["test"].names)
        self.dataset = ":".join(
            [
                name,
                *self.sizes[False].text(),
                f"merges={merges}",
                f"length={length}",
                f"draft={draft}",
                *([] if self.margin is None else [f"margin={margin}"]),
                *["once"] * once,
                content,
            ]
        )
        self.spec = Spec(
            Sequences(self.columns, length, self.tokenizer.ids),
            Text(self.tokenizer.ids),
            Sizes(self.sizes[False].shots.most, queries),
            metrics=(NATS,),
        )
        self.pooled = Pooled(METRICS, self._counts, self._scores)
        self.samples = Samples(self._write, self._show)
        self._known: dict[bytes, NDArray[np.float64]] = {}

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Draw ``count`` tasks; leaves ``[count, turns, ...]``."""
        own, size = self.splits[split], self.sizes[split == "train"]
        drawn = [own.draw(size, generator) for _ in range(count)]
        support, query, service = (torch.tensor(rows) for rows in zip(*drawn, strict=True))
        real = None
        if not size.shots.fixed:
            real = torch.arange(size.shots.most) < size.shots.draw((count, 1), generator)
        shown = support if real is None else support.masked_fill(~real, -1)
        asked = self._part(own, query, None if real is None else query >= 0, shown)
        return Task(self._part(own, support, real, shown), with_unit(asked, service) if split == "test" else asked)

    def _draft(self, own: Services, row: int, support: list[int]) -> list[int] | None:
        """Return the ids of the draft for a turn, made from the other turns of ``support``, or None."""
        if self.draft is None:
            return None
        others = [own.turns[other] for other in support if other not in (row, -1)]
        return draft_of(self.draft(own.turns[row], others), self.tokenizer, self.length)

    def _part(self, own: Services, rows: Tensor, real: Tensor | None, support: Tensor) -> dict[str, Tensor]:
        """Return the leaves of one part of tasks, given its turns ``[tasks, turns]``; all zero where it is padding.

        ``support [tasks, turns]`` are the support turns from which drafts are made, −1 for padding.
        """
        pairs = list(zip(rows.tolist(), support.tolist(), strict=True))
        drafts = [[self._draft(own, row, shown) for row in task] for task, shown in pairs]
        prompts = torch.tensor(
            [
                [prompt_of(own.prompts[row], draft, self.columns) for row, draft in zip(task, ready, strict=True)]
                for (task, _), ready in zip(pairs, drafts, strict=True)
            ]
        )
        text = own.texts[rows]
        leaves = {"x": torch.cat([prompts, before(text)], -1), "y": text, "turn": rows}
        if self.margin is not None:
            leaves["draft"] = torch.tensor([[padded(draft or [], self.length) for draft in task] for task in drafts])
        if real is not None:
            leaves = {name: leaf * real.view(*real.shape, *[1] * (leaf.ndim - 2)) for name, leaf in leaves.items()}
            leaves["weight"] = real.to(torch.get_default_dtype())
        return {name: leaf.to(self.device) for name, leaf in leaves.items()}

    def _said(self, predict: Predict, data: Tree) -> Tensor:
        """Return the texts that are said ``[turns, length]``: those that a learner writes, or drafts."""
        prompt = data["x"][:, : self.columns]
        if self.margin is None:
            return written(predict, prompt, self.length, rule=self.rule)
        return said(predict, prompt, data["draft"], self.length, self.rule, self.margin)

    def _counts(self, predict: Predict, task: Task) -> Tensor:
        """Return the text of each query turn, its number, and the numbers of the support turns (−1: padding)."""
        text = self._said(predict, task.query)
        support = task.support["turn"]
        if "weight" in task.support:
            support = support.masked_fill(task.support["weight"] == 0, -1)
        return torch.cat([text.flatten(), task.query["turn"], support])

    def _scores(self, counts: Tensor) -> dict[str, float]:
        """Return all metrics of the texts of tasks ``[tasks, numbers]``."""
        total = sum((self._of_task(row) for row in counts.numpy()), np.zeros((len(WRITERS), COUNTS + 2)))
        found = {}
        for writer, (*of_bleu, errors, values) in zip(WRITERS, total, strict=True):
            found[f"{writer}bleu"] = bleu(np.array(of_bleu))
            found[f"{writer}slot-error-rate"] = errors / max(values, 1)
        return found | {metric.name: found["bleu"] - found[f"{name}-bleu"] for name, metric in ABOVE.items()}

    def _of_task(self, row: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the counts of one task by writer, from which its scores are computed: ``[writers, COUNTS + 2]``."""
        key = row.tobytes()
        if key not in self._known:
            turns = self.splits["test"].turns
            queries = self.sizes[False].queries
            ids, asked, shown = np.split(row, [queries * self.length, queries * (self.length + 1)])
            support = [turns[i] for i in shown if i >= 0]
            found = np.zeros((len(WRITERS), COUNTS + 2))
            for i, own in zip(asked, ids.reshape(-1, self.length), strict=True):
                texts = [self.tokenizer.decoded(own), *(answer(turns[i], support) for answer in WAYS.values())]
                found += [of_text(text, turns[i]) for text in texts]
            self._known[key] = found
        return self._known[key]

    def _write(self, predict: Predict, task: Task) -> Tree:
        """Return the most likely text and a sample for some query turns, each ``[SHOWN, length]``."""
        first = {name: leaf[:SHOWN] for name, leaf in task.query.items()}
        prompt = first["x"][:, : self.columns]
        return {
            "likely": self._said(predict, first),
            "sample": written(predict, prompt, self.length, self.temperature, self.rule),
        }

    def _show(self, made: Mapping[str, Tree], tasks: Task) -> str:
        """Return what the learner says before and after adaptation next to what was really said."""
        turns, text = self.splits["test"].turns, [f"Samples are drawn with temperature {self.temperature:g}."]
        for task, asked in enumerate(tasks.query["turn"][:, :SHOWN].tolist()):
            text += ["", f"## Task {task + 1}: {turns[asked[0]].service}"]
            for place, turn in enumerate(turns[i] for i in asked):
                acts = (f"{a.act}({', '.join([a.slot] * bool(a.slot) + list(a.values))})" for a in turn.actions)
                text += ["", f"- **{' '.join(acts)}**", f"    - said: {turn.utterance}"]
                for when, tree in made.items():
                    for name, ids in tree.items():
                        said = filled(self.tokenizer.decoded(ids[task, place].tolist()), turn.values)
                        text.append(f"    - {name} {when} adaptation: {said}")
        return "\n".join(text) + "\n"


def of_text(text: str, turn: Turn) -> tuple[int, ...]:
    """Return what BLEU and the slot error rate of a text with placeholders are computed from."""
    return (*bleu_counts(filled(text, turn.values), turn.utterance), *slot_errors(text, turn))


def corpus(
    dataset: Literal["auto", "sgd", "toy"], path: str | None, data_dir: str
) -> tuple[dict[str, list[Turn]] | list[Turn], str]:
    """Return the turns, by split if the data have splits, and the name of the data.

    Raises:
        UserError: data are missing or damaged.
    """
    if path is not None:
        require(dataset == "auto", f"path and dataset={dataset} are two data sets; choose one")
        return dialogues.read(path, data_dir)
    if dataset == "auto":
        dataset = "sgd" if dialogues.is_there(data_dir) else "toy"
        if dataset == "toy":
            log.info("No %s in %s, so the services are toys (%s).", dialogues.FOLDER, data_dir, dialogues.SOURCE)
    if dataset == "toy":
        return toy_turns(), "toy"
    return dialogues.read(dialogues.FOLDER, data_dir)[0], "sgd"
