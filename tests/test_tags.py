"""Entities as tags: spans, F1, decoders, and the tagger's gradients, against plain Python and plain autograd."""

from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from scenarios import generator

from metarun.algos.agnostic.maml import maml
from metarun.contracts import Sizes, Spec, Task, Words
from metarun.engine.batch import meta_gradient
from metarun.models.tagger import Tagger
from metarun.targets.scoring import loss_of
from metarun.targets.tags import ENTITY_F1, SPAN_F1, Tags, allowed, counted, path_loss, spans_first, viterbi

pytestmark = pytest.mark.usefixtures("float64")
TYPES = ("LOC", "PER")
NAMES = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def entities_of(names):
    """The entities of a sentence by a scan, as (first word, word after the last, type)."""
    found, start = set(), None
    for place, name in enumerate([*names, "O"]):
        if start is not None and not (name[0] == "I" and name[2:] == names[start][2:]):
            found.add((start, place, names[start][2:]))
            start = None
        if name != "O" and start is None:
            start = place
    return found


def scores_of(predicted, true):
    found, real = ({(i, *e) for i, row in enumerate(rows) for e in entities_of(row)} for rows in (predicted, true))
    untyped = len({e[:3] for e in found} & {e[:3] for e in real})
    total = len(found) + len(real)
    return [2 * hits / total if total else 1.0 for hits in (len(found & real), untyped)]


def data_of(tags, longest=None):
    """Targets of sentences with these tags, padded."""
    longest = longest or max(map(len, tags))
    y = torch.zeros(len(tags), longest, 5)
    for i, row in enumerate(tags):
        for j, tag in enumerate(row):
            y[i, j, tag] = 1
    return {"y": y}


def test_f1_is_that_of_a_scan_over_every_sentence():
    g, target = generator(3), Tags(TYPES)
    for _ in range(50):
        lengths = torch.randint(1, 8, (4,), generator=g).tolist()
        true, found = ([torch.randint(5, (n,), generator=g).tolist() for n in lengths] for _ in range(2))
        found = [a if torch.rand((), generator=g) < 0.5 else b for a, b in zip(true, found, strict=True)]
        output = torch.randn(4, 8, 5, generator=g)
        for i, row in enumerate(found):
            output[i, : len(row)] = 5 * F.one_hot(torch.tensor(row), 5)
        data = data_of(true, 8)
        scores = target.scores(output, data)
        named = [[[NAMES[tag] for tag in row] for row in rows] for rows in (found, true)]
        assert [scores[m.name].item() for m in (ENTITY_F1, SPAN_F1)] == pytest.approx(scores_of(*named))


def test_an_output_that_is_not_finite_finds_nothing():
    data = data_of([[1, 2, 0]])
    perfect = 5 * data["y"]
    assert Tags(TYPES).scores(perfect, data)[ENTITY_F1.name] == 1
    perfect[0, 0, 0] = torch.nan
    assert Tags(TYPES).scores(perfect, data)[ENTITY_F1.name] == 0


def paths(emission, transition):
    """Every path of tags of one sentence with its score."""
    for path in product(range(emission.shape[1]), repeat=len(emission)):
        before = (0, *path[:-1])
        yield (
            path,
            sum(emission[i, tag] + transition[b, tag] for i, (b, tag) in enumerate(zip(before, path, strict=True))),
        )


def test_viterbi_and_the_loss_of_paths_equal_a_sum_over_all_paths():
    g = generator(1)
    transition, emission = torch.randn(3, 3, generator=g), torch.randn(2, 4, 3, generator=g)
    data = {"y": data_of([[1, 2, 0, 1], [1, 2]], 4)["y"][..., :3]}
    weight = data["y"].sum(-1)
    best = viterbi(emission, transition, weight)
    nats = 0.0
    for i, (length, true) in enumerate([(4, (1, 2, 0, 1)), (2, (1, 2))]):
        scored = dict(paths(emission[i, :length], transition))
        assert tuple(best[i, :length].tolist()) == max(scored, key=scored.get)
        nats += torch.stack(list(scored.values())).logsumexp(0) - scored[true]
    torch.testing.assert_close(path_loss(emission, transition, data), nats / 6)


def test_spans_come_before_types():
    g = generator(3)
    output, length = torch.randn(6, 4, 7, generator=g), torch.tensor([4, 4, 4, 3, 2, 1])
    weight = (torch.arange(4) < length[:, None]).double()
    found = spans_first(output, weight).tolist()
    for row, words, number in zip(output.softmax(-1), found, length.tolist(), strict=True):
        # The most likely path of three steps, whose probabilities are sums over types.
        three = torch.stack([row[:, 0], row[:, 1::2].sum(-1), row[:, 2::2].sum(-1)], -1).log()[:number]
        scored = dict(paths(three, allowed(3)))
        best = max(scored, key=scored.get)
        assert tuple(0 if tag == 0 else 2 - tag % 2 for tag in words[:number]) == best
        begins = [i for i, step in enumerate(best) if step == 1]
        for begin in begins:
            end = next((i for i in range(begin + 1, number) if best[i] != 2), number)
            given = [row[i, best[i] :: 2] / row[i, best[i] :: 2].sum() for i in range(begin, end)]
            kind = int(torch.stack(given).prod(0).argmax())
            assert [(tag - 1) // 2 for tag in words[begin:end]] == [kind] * (end - begin)
        assert words[number:] == [0] * (4 - number)


def test_a_word_that_is_an_entity_of_uncertain_type_is_found_with_spans_alone():
    output = torch.tensor([[[0.4, 0.25, 0.0, 0.35, 0.0]]]).log()
    data = data_of([[3]])
    assert Tags(TYPES).decoded(output, data).tolist() == [[0]]
    assert Tags(TYPES, "spans").decoded(output, data).tolist() == [[3]]


def test_decoders_find_no_entity_that_begins_inside_one():
    output = torch.randn(40, 6, 5, generator=generator(2))
    data = data_of([[0] * 6] * 40)
    for target in (Tags(TYPES, "viterbi"), Tags(TYPES, "spans"), Tags(TYPES, "crf", allowed(5))):
        for row in target.decoded(output, data).tolist():
            names = ["O", *(NAMES[tag] for tag in row)]
            assert all(now[0] != "I" or before[2:] == now[2:] for before, now in pairwise(names))


def test_transitions_are_counted_by_kinds_of_steps():
    tags = torch.tensor([[0, 1, 2, 0, 0, 3]])
    scores = counted(tags, torch.ones(1, 6), 5).exp()
    # From outside: 1 step outside and 2 to a first word; from inside: 1 outside, 0 to a first word, 1 on. One is added.
    torch.testing.assert_close(scores[0], torch.tensor([2 / 5, 3 / 10, 0, 3 / 10, 0]))
    torch.testing.assert_close(scores[4], torch.tensor([2 / 5, 1 / 10, 0, 1 / 10, 2 / 5]))


def test_types_that_a_task_lacks_are_never_found_and_get_no_gradient():
    output = torch.randn(3, 5, 5, generator=generator(1)).requires_grad_()
    data = {**data_of([[0, 1, 2, 0, 1]] * 3), "ways": torch.tensor([1.0, 1, 1, 0, 0]).expand(3, -1)}
    target = Tags(TYPES)
    assert target.decoded(output, data).max() < 3
    (slope,) = torch.autograd.grad(target.loss(output, data), output)
    assert (slope[..., 3:] == 0).all()
    torch.testing.assert_close(
        target.loss(output, data), F.cross_entropy(output[..., :3].flatten(0, 1), data["y"].argmax(-1).flatten())
    )


class Bare:
    """A few random sentences of one to three words, with entities of one type."""

    def __init__(self, decoder):
        scores = counted(torch.randint(3, (9, 5), generator=generator()), torch.ones(9, 5), 3)
        target = Tags(TYPES[:1], decoder, scores)
        self.spec = Spec(Words(4, 3, 12), target, Sizes(4, 3), target.metrics)

    def sample(self, count, generator):
        def part(size):
            there = torch.arange(4) < torch.randint(1, 4, (count, size, 1), generator=generator)
            x = torch.randint(1, 12, (count, size, 4, 3), generator=generator) * there[..., None]
            y = F.one_hot(torch.randint(3, (count, size, 4), generator=generator), 3) * there[..., None]
            return {"x": x, "y": y.double()}

        return Task(part(4), part(3), torch.arange(count))


def plain_loss(weights, data, task, target):
    """The loss of one task, word by word, with written-out layers."""
    x, y = data["x"][task], data["y"][task]
    table = torch.cat([torch.zeros(1, weights["trunk.0.table"].shape[1]), weights["trunk.0.table"]])
    total, words = 0.0, 0
    for sentence, tags in zip(x, y, strict=True):
        length = int((sentence[:, 0] > 0).sum())
        z = table[sentence[:length]].sum(1)
        for name in ("trunk.2", "trunk.5"):
            blank = torch.zeros(1, z.shape[1])
            around = torch.cat([torch.cat([blank, z[:-1]]), z, torch.cat([z[1:], blank])], 1)
            z = F.relu(F.linear(around, weights[f"{name}.weight"], weights[f"{name}.bias"]))
        output, tag = F.linear(z, weights["head.weight"], weights["head.bias"]), tags[:length].argmax(-1)
        words += length
        if target.decoder == "crf":
            scored = dict(paths(output, target.transitions))
            total = total + torch.stack(list(scored.values())).logsumexp(0) - scored[tuple(tag.tolist())]
        else:
            total = total + F.cross_entropy(output, tag, reduction="sum")
    return total / words


@pytest.mark.parametrize("decoder", ["words", "crf"])
def test_the_meta_gradient_of_maml_equals_a_loop_over_words(decoder):
    torch.manual_seed(0)
    family = Bare(decoder)
    model = Tagger(family.spec, 4, 4)
    tasks = family.sample(2, generator(1))
    algorithm = maml(model, 0.5, 2)
    theta = algorithm.init(generator())
    found = meta_gradient(algorithm, theta, tasks, loss_of(family)).grads["weights"]
    leaves, total = {n: w.clone().requires_grad_() for n, w in theta["weights"].items()}, 0.0
    for task in range(2):
        fast = dict(leaves)
        for _ in range(2):
            loss = plain_loss(fast, tasks.support, task, family.spec.target)
            slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {name: w - 0.5 * slope for (name, w), slope in zip(fast.items(), slopes, strict=True)}
        total = total + plain_loss(fast, tasks.query, task, family.spec.target) / 2
    expected = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    for name, slope in expected.items():
        assert (found[name] - slope).abs().max() < 1e-9 * slope.abs().max().clamp(min=1e-3), name


def padded(part, words, sentences):
    """A part of tasks with empty words at the end of sentences, and empty sentences."""
    x = F.pad(part["x"], (0, 0, 0, words, 0, sentences))
    y = F.pad(part["y"], (0, 0, 0, words, 0, sentences))
    return {"x": x, "y": y, "weight": F.pad(torch.ones(part["x"].shape[:2]), (0, sentences))}


@pytest.mark.parametrize("context", ["convolution", "gru"])
@pytest.mark.parametrize("decoder", ["words", "viterbi", "spans", "crf"])
def test_padded_words_and_sentences_change_nothing(context, decoder):
    torch.manual_seed(0)
    family = Bare(decoder)
    model = Tagger(family.spec, 4, 4, context=context)
    tasks = family.sample(2, generator(1))
    algorithm = maml(model, 0.5, 1)
    theta = algorithm.init(generator())
    plain = meta_gradient(algorithm, theta, tasks, loss_of(family))
    more = Task(padded(tasks.support, 2, 3), padded(tasks.query, 2, 1), tasks.seed)
    wide = meta_gradient(algorithm, theta, more, loss_of(family))
    torch.testing.assert_close(plain.loss, wide.loss)
    torch.testing.assert_close(plain.grads, wide.grads)
    torch.testing.assert_close(plain.scores, wide.scores)
