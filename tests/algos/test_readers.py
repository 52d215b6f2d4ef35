"""SNAIL, memory-augmented networks and in-context learning, against second derivations and properties."""

import math

import pytest
import torch
import torch.nn.functional as F
from scenarios import TinyImages, generator

from metarun.algos.dependent.incontext import incontext
from metarun.algos.dependent.mann import instance_of, mann
from metarun.algos.dependent.matching import FullContext
from metarun.algos.dependent.snail import Attend, Dense, Sequences, Snail, snail
from metarun.contracts import Task
from metarun.models.mlp import MLP

pytestmark = pytest.mark.usefixtures("float64")


def task_of(algorithm_of, **named):
    torch.manual_seed(0)
    family = TinyImages()
    model = MLP(family.spec, (8,))
    algorithm = algorithm_of(model, family.spec, **named)
    tasks = family.sample("test", 1, generator(1))
    support, query = ({name: value[0] for name, value in part.items()} for part in tasks[:2])
    return algorithm, algorithm.init(generator()), support, query


def test_snail_equals_convolutions_and_attention_over_each_whole_sequence():
    """Every query in a sequence of its own, by torch's padded convolution and attention with a causal mask."""
    torch.manual_seed(0)
    network, support, queries = Snail(6, 3, 8, 8), torch.randn(7, 6), torch.randn(4, 6)

    def whole(sequence):
        x = sequence
        for block in network.blocks:
            if isinstance(block, Dense):
                kernel = torch.stack([block.before.weight, block.now.weight], -1)
                padded = F.pad(x.T[None], (block.dilation, 0))
                value, gate = F.conv1d(padded, kernel, block.now.bias, dilation=block.dilation)[0].T.chunk(2, -1)
                x = torch.cat([x, value.tanh() * gate.sigmoid()], -1)
            else:
                assert isinstance(block, Attend)
                parts = (layer(x)[None] for layer in (block.query, block.key, block.value))
                x = torch.cat([x, F.scaled_dot_product_attention(*parts, is_causal=True)[0]], -1)
        return network.out(x)[-1]

    expected = torch.stack([whole(torch.cat([support, query[None]])) for query in queries])
    torch.testing.assert_close(network(Sequences(support, queries)), expected)
    assert sum(isinstance(block, Dense) for block in network.blocks) == 2 * math.ceil(math.log2(8))


@pytest.mark.parametrize("algorithm_of", [snail, incontext])
def test_many_queries_are_answered_in_parts(algorithm_of, monkeypatch):
    algorithm, theta, support, query = task_of(algorithm_of)
    together = algorithm.predict(theta, support, query["x"])
    monkeypatch.setattr("metarun.algos.dependent.snail.AT_ONCE", 2)
    torch.testing.assert_close(algorithm.predict(theta, support, query["x"]), together)


@pytest.mark.parametrize("algorithm_of", [snail, incontext, mann])
def test_a_query_is_answered_without_the_others(algorithm_of):
    algorithm, theta, support, query = task_of(algorithm_of)
    together = algorithm.predict(theta, support, query["x"])
    torch.testing.assert_close(algorithm.predict(theta, support, query["x"][3:4]), together[3:4])


def test_incontext_does_not_care_about_the_order_of_the_support_set_and_snail_does():
    for algorithm_of, same in ((incontext, True), (snail, False)):
        algorithm, theta, support, query = task_of(algorithm_of)
        order = torch.randperm(len(support["x"]), generator=generator(3))
        shuffled = {name: value[order] for name, value in support.items()}
        first, second = (algorithm.predict(theta, s, query["x"]) for s in (support, shuffled))
        assert torch.allclose(first, second) == same


def memory_by_loops(w, tokens, controller, slots, width, heads, key_strength):
    """Santoro et al., equations 2 to 8, element by element, with a key strength, and read before written."""
    h, c, read = torch.zeros(controller), torch.zeros(controller), torch.zeros(heads * width)
    rows, usage = torch.zeros(slots, width), torch.zeros(slots)
    attention, outputs = torch.zeros(heads, slots), []
    for token in tokens:
        gates = w["gates.weight"] @ torch.cat([token, read, h]) + w["gates.bias"]
        i, f, o, g = (gates[n * controller : (n + 1) * controller] for n in range(4))
        c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        keys = torch.tanh(w["keys.weight"] @ h + w["keys.bias"]).view(heads, width)
        alpha = torch.sigmoid(w["alpha.weight"] @ h + w["alpha.bias"])
        before, similar = attention, torch.stack([F.cosine_similarity(key[None], rows, eps=1e-30) for key in keys])
        attention = (key_strength * similar).exp() / (key_strength * similar).exp().sum(1, keepdim=True)
        read = torch.cat([sum(attention[n, s] * rows[s] for s in range(slots)) for n in range(heads)])
        least = sorted(range(slots), key=lambda slot: usage[slot].item())[:heads]
        for slot in least:
            rows[slot] = 0
        written = torch.zeros(heads, slots)
        for n in range(heads):
            for slot in range(slots):
                written[n, slot] = alpha[n] * before[n, slot] + (1 - alpha[n]) * (slot in least)
        for slot in range(slots):
            rows[slot] += sum(written[n, slot] * keys[n] for n in range(heads))
        usage = 0.99 * usage + attention.sum(0) + written.sum(0)
        outputs.append(w["out.weight"] @ torch.cat([h, read]) + w["out.bias"])
    return torch.stack(outputs)


def test_mann_equals_its_equations():
    sizes = {"controller": 6, "slots": 9, "width": 4, "heads": 2, "key_strength": 3.0}
    algorithm, theta, support, query = task_of(mann, **sizes)

    def inputs(x):
        w, pixels = theta["weights"], x.flatten(1)
        z = F.relu(F.linear(pixels, *(w[name] for name in sorted(w, reverse=True))))
        centred = z - z.mean(1, keepdim=True)
        return torch.cat([centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt(), pixels], 1)

    late = torch.cat([torch.zeros(1, 3), support["y"]])
    for i in (0, 5):
        tokens = torch.cat([torch.cat([inputs(support["x"]), inputs(query["x"][i : i + 1])]), late], 1)
        expected = memory_by_loops(theta["memory"], tokens, **sizes)[-1]
        torch.testing.assert_close(algorithm.predict(theta, support, query["x"])[i], expected, rtol=1e-6, atol=1e-8)


def test_mann_predicts_an_example_before_it_sees_its_label():
    """Another label of the third example changes nothing that was predicted up to it."""
    algorithm, theta, support, _ = task_of(mann)
    seen = []

    def spy(predict, data):
        seen.append(predict(data["x"]))
        return seen[-1].sum(), seen[-1].sum()

    for label in (support["y"][2], support["y"][2].roll(1)):
        y = support["y"].clone()
        y[2] = label
        changed = {**support, "y": y}
        algorithm.meta_loss(theta, Task(changed, support), spy)
    first, second = seen[0], seen[2]
    torch.testing.assert_close(first[:3], second[:3], rtol=0, atol=0)
    assert not torch.allclose(first[3:], second[3:])


def test_instances_are_counted_along_the_sequence():
    y = torch.eye(3)[torch.tensor([2, 0, 2, 2, 1, 0])]
    assert instance_of(y).tolist() == [1, 1, 2, 3, 1, 2]
    algorithm, theta, support, query = task_of(mann)
    by_instance = algorithm.report.measure(theta, Task(support, query), None, 1)
    assert by_instance.shape == (2,)
    assert all(value in torch.tensor([0, 1 / 3, 2 / 3, 1]) for value in by_instance)


def test_full_context_embeddings_equal_torchs_lstms():
    """Support embeddings by a bidirectional nn.LSTM, queries by nn.LSTMCell and attention as the paper writes them."""
    torch.manual_seed(0)
    width, reads = 4, 3
    module, z, queries = FullContext(width, reads), torch.randn(5, width), torch.randn(6, width)

    def like_torchs(weight, bias):
        """Torch orders gates as input, forget, new, output; ours adds one to the forget gate."""
        i, f, o, g = weight.chunk(4)
        bi, bf, bo, bg = bias.chunk(4)
        return torch.cat([i, f, g, o]), torch.cat([bi, bf + 1, bg, bo])

    bidirectional = torch.nn.LSTM(width, width, bidirectional=True)
    cell = torch.nn.LSTMCell(2 * width, width)
    with torch.no_grad():
        for suffix, layer in (("l0", module.forwards), ("l0_reverse", module.backwards)):
            weight, bias = like_torchs(layer.weight, layer.bias)
            getattr(bidirectional, f"weight_ih_{suffix}").copy_(weight[:, :width])
            getattr(bidirectional, f"weight_hh_{suffix}").copy_(weight[:, width:])
            getattr(bidirectional, f"bias_ih_{suffix}").copy_(bias)
            getattr(bidirectional, f"bias_hh_{suffix}").zero_()
        weight, bias = like_torchs(module.reading.weight, module.reading.bias)
        cell.weight_ih.copy_(torch.cat([weight[:, :width], weight[:, 2 * width :]], 1))
        cell.weight_hh.copy_(weight[:, width : 2 * width])
        cell.bias_ih.copy_(bias)
        cell.bias_hh.zero_()
    both = bidirectional(z)[0]
    support = z + both[:, :width] + both[:, width:]
    h, c = queries, torch.zeros_like(queries)
    for _ in range(reads):
        r = torch.softmax(h @ support.T, 1) @ support
        h, c = cell(torch.cat([queries, r], 1), (h, c))
        h = h + queries
    torch.testing.assert_close(module((z, queries, None)), (support, h))
