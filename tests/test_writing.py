"""The target of texts, word pieces, BLEU, n-grams, decoders and the loop that writes."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scenarios import TinyImages, generator
from torch import nn
from torch.nn.functional import cross_entropy

from metarun.algos.agnostic.maml import maml
from metarun.contracts import Sequences, Sizes, Spec, Task
from metarun.data import pieces
from metarun.data.ngrams import Ngrams
from metarun.engine.batch import meta_gradient
from metarun.models.decoder import GRUDecoder, TransformerDecoder
from metarun.nn.functional import forward_of
from metarun.random import drawing
from metarun.targets.bleu import bleu, bleu_counts
from metarun.targets.decoding import each_once, written
from metarun.targets.text import BITS, NATS, Text
from metarun.tree import tree_map

IDS, PROMPT, TEXT = 11, 4, 6


def spec(prompt=PROMPT, ids=IDS):
    return Spec(Sequences(prompt, TEXT, ids), Text(ids), Sizes(5, 5), metrics=(NATS,))


def decoders(prompt=PROMPT):
    torch.manual_seed(0)
    return (
        GRUDecoder(spec(prompt), 8, ngrams=2, buckets=7, dropout=0.0),
        TransformerDecoder(spec(prompt), 8, 1, 2, ngrams=2, buckets=7, dropout=0.0),
    )


def texts(count, prompt=PROMPT, seed=0):
    """Random prompts and texts of different lengths: ``x`` and ``y``."""
    draw = generator(seed)
    ids = torch.randint(2, IDS, (count, prompt + TEXT), generator=draw)
    y = ids[:, prompt:]
    ends = torch.randint(1, TEXT, (count, 1), generator=draw)
    place = torch.arange(TEXT)
    y = torch.where(place < ends, y, torch.where(place == ends, pieces.BOUNDARY, 0))
    before = torch.cat([torch.full((count, 1), pieces.BOUNDARY), y[:, :-1]], 1)
    if not prompt:
        return {"x": before, "y": y}
    there = torch.arange(prompt) < torch.randint(1, prompt + 1, (count, 1), generator=draw)
    return {"x": torch.cat([ids[:, :prompt] * there, before], 1), "y": y}


def test_text_is_scored_as_by_torch_in_nats_per_token_and_bits_per_character():
    data, output = texts(7), torch.randn(7, TEXT, IDS, generator=generator())
    expected = cross_entropy(output.flatten(0, 1), data["y"].flatten(), ignore_index=0)
    torch.testing.assert_close(Text(IDS).loss(output, data), expected)
    torch.testing.assert_close(Text(IDS).scores(output, data), {NATS.name: expected})
    lengths = torch.rand(IDS, generator=generator(1)) + 1
    characters = lengths[data["y"][data["y"] > 0]].sum()
    bits = expected * (data["y"] > 0).sum() / math.log(2) / characters
    torch.testing.assert_close(Text(IDS, lengths).scores(output, data), {BITS.name: bits})


@pytest.mark.usefixtures("float64")
def test_padded_texts_and_tokens_change_nothing():
    data, lengths = texts(5), torch.rand(IDS) + 1
    padded = {name: torch.cat([leaf[:2], leaf[:3] * 0, leaf[2:]]) for name, leaf in data.items()}
    padded["weight"] = torch.tensor([1.0, 1, 0, 0, 0, 1, 1, 1])
    target = Text(IDS, lengths)
    for model in decoders():
        for score in (target.loss, lambda output, data: target.scores(output, data)[BITS.name]):
            torch.testing.assert_close(score(model(padded["x"]), padded), score(model(data["x"]), data))
        # Tokens after the end of a text, whose targets are padding, do not change what comes before.
        beyond = torch.where((data["x"] == 0) & (torch.arange(PROMPT + TEXT) >= PROMPT), 5, data["x"])
        torch.testing.assert_close(target.loss(model(beyond), data), target.loss(model(data["x"]), data))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("prompt", [0, PROMPT])
def test_no_output_depends_on_later_tokens(prompt):
    data = texts(3, prompt)
    for model in decoders(prompt):
        for place in range(TEXT - 1):
            later = data["x"].clone()
            later[:, prompt + place + 1 :] = 3
            torch.testing.assert_close(model(later)[:, : place + 1], model(data["x"])[:, : place + 1])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        earlier = data["x"].clone()
        earlier[:, prompt + 1] = 3
        assert not torch.allclose(model(earlier)[:, 2:], model(data["x"])[:, 2:])


@pytest.mark.usefixtures("float64")
def test_padding_of_a_prompt_changes_nothing():
    """Prompts of two tokens in four columns are those in two columns."""
    data = texts(5, 2)
    data["x"][:, :2] = torch.tensor([5, 7])
    wide = torch.cat([data["x"][:, :2], torch.zeros(5, 2, dtype=torch.int64), data["x"][:, 2:]], 1)
    for narrow_model, model in zip(decoders(2), decoders(4), strict=True):
        weights = dict(narrow_model.named_parameters())
        if "trunk.0.position" in weights:
            own = weights["trunk.0.position"]
            weights["trunk.0.position"] = torch.cat([own[:2], torch.randn(2, 8), own[2:]])
        found = torch.func.functional_call(model, weights, (wide,))
        torch.testing.assert_close(found, narrow_model(data["x"]))


@pytest.mark.usefixtures("float64")
def test_outputs_are_a_mixture_of_the_head_and_of_the_tokens_of_the_prompt():
    data = texts(4)
    for model in decoders():
        p = model(data["x"]).exp()
        torch.testing.assert_close(p.sum(-1), torch.ones(4, TEXT), atol=1e-6, rtol=0)
        nn.init.constant_(model.copy_gate.bias, -50.0)
        copied = model(data["x"]).exp() > 1e-6
        in_prompt = torch.zeros(4, IDS).scatter_(1, data["x"][:, :PROMPT], 1.0) > 0
        in_prompt[:, 0] = False
        assert (copied == in_prompt[:, None]).all()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("prompt", [0, PROMPT])
def test_meta_gradient_of_maml_equals_an_autograd_loop(prompt):
    """With torch's own layers, losses of class indices and weights, and no transform of torch.func."""
    data = texts(40, prompt)
    data = {name: leaf.view(2, 2, 10, -1) for name, leaf in data.items()}
    weight = torch.ones(2, 2, 10)
    weight[:, :, 7:] = 0
    support, query = ({"x": data["x"][i], "y": data["y"][i], "weight": weight[i]} for i in range(2))
    tasks = Task(support, query, torch.arange(2))
    target = Text(IDS)

    def loss(predict, data):
        return target.loss(predict(data["x"]), data), {}

    for model in decoders(prompt):
        algorithm = maml(model, 0.3, 2)
        theta = algorithm.init(generator())
        ours = meta_gradient(algorithm, theta, tasks, loss).grads["weights"]
        leaves = {name: w.clone().requires_grad_() for name, w in theta["weights"].items()}
        total = 0

        def plain(weights, part, i, model=model):
            x, y = part["x"][i, :7], part["y"][i, :7]
            output = torch.func.functional_call(model, weights, (x,))
            return cross_entropy(output.flatten(0, 1), y.flatten(), ignore_index=0)

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            for i in range(2):
                fast = dict(leaves)
                for _ in range(2):
                    slope = torch.autograd.grad(
                        plain(fast, support, i), list(fast.values()), create_graph=True, materialize_grads=True
                    )
                    fast = {name: w - 0.3 * g for (name, w), g in zip(fast.items(), slope, strict=True)}
                total = total + plain(fast, query, i) / 2
            expected = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        for (name, found), own in zip(ours.items(), expected, strict=True):
            assert (found - own).abs().max() <= 1e-9 * own.abs().max().clamp(min=1e-3), name


def test_copying_goes_on_from_where_it_is():
    """With the gate shut, a fresh model copies a prompt that begins with a boundary from there to its end."""
    prompt = torch.tensor([[9, 1, 5, 7, 5, 1], [1, 6, 8, 1, 0, 0]])
    for model in decoders(6):
        nn.init.constant_(model.copy_gate.bias, -50.0)
        nn.init.constant_(model.copy_on, 30.0)
        with torch.no_grad():
            found = written(model, prompt, TEXT)
        assert found[0, :4].tolist() == [5, 7, 5, 1]
        assert found[1, :3].tolist() == [6, 8, 1]


def test_text_is_written_token_by_token():
    """The most likely text is what a loop finds; a sample comes from the task's seed, and a cold one is most likely."""
    prompt = texts(3)["x"][:, :PROMPT]
    for model in decoders():
        text = torch.empty(3, 0, dtype=torch.int64)
        for step in range(TEXT):
            before = torch.cat([torch.full((3, 1), pieces.BOUNDARY), text, torch.zeros(3, TEXT, dtype=torch.int64)], 1)
            logits = model(torch.cat([prompt, before[:, :TEXT]], 1))[:, step]
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
        predict = torch.no_grad()(lambda x, model=model: forward_of(model)({}, x))
        assert torch.equal(written(predict, prompt, TEXT), text)
        drawn = []
        for seed, temperature in ((1, 1.0), (1, 1.0), (2, 1.0), (1, 1e-4)):
            with drawing(torch.tensor(seed), training=False):
                drawn.append(written(predict, prompt, TEXT, temperature))
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
        assert torch.equal(drawn[3], text)
        together = torch.vmap(lambda prompt, predict=predict: written(predict, prompt, TEXT))(
            torch.stack([prompt, prompt])
        )
        assert torch.equal(together[1], text)


def test_a_rule_lets_a_text_say_each_thing_of_its_prompt_once():
    """Tokens 4 and 5 hold a thing each, and 6 both; the model prefers 6, 5, 4, 3 and the end, in this order."""
    holds = torch.tensor([[0, 0], [0, 0], [0, 0], [0, 0], [1, 0], [0, 1], [1, 1]])
    prompt = torch.tensor([[4, 5], [5, 3], [3, 0]])
    likely = torch.tensor([-9.0, 1.0, -9.0, 2.0, 3.0, 4.0, 5.0])
    found = written(lambda x: likely.expand(len(x), 4, 7), prompt, 4, rule=each_once(holds))
    assert found.tolist() == [[6, 3, 3, 3], [5, 3, 3, 3], [3, 3, 3, 3]]
    # A text that wants to end says what it has left out first.
    ends = likely.index_fill(0, torch.tensor([1]), 9.0)
    found = written(lambda x: ends.expand(len(x), 4, 7), prompt, 4, rule=each_once(holds))
    assert found.tolist() == [[6, 1, 1, 1], [5, 1, 1, 1], [1, 1, 1, 1]]


def test_samples_have_the_frequencies_of_their_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    with drawing(torch.tensor(3), training=False):
        found = written(lambda x: logits.expand(len(x), 1, 4), torch.zeros(20_000, 0, dtype=torch.int64), 1, 0.5)
    shares = torch.bincount(found.flatten(), minlength=4) / len(found)
    torch.testing.assert_close(shares, (logits / 0.5).softmax(0), atol=0.01, rtol=0)


def test_pieces_are_merged_by_frequency_and_read_back():
    """The merges of a small corpus, found by hand: "lo" and "low" occur 4 times, "er" 3 times."""
    corpus = ["low low lower", "lower newer", "né"]
    tokenizer = pieces.fit(corpus, 4)
    assert tokenizer.merges[:2] == (("l", "o"), ("lo", "w"))
    assert tokenizer.merges[2:] == (("e", "r"), (" ", "low"))
    assert [tokenizer.strings[i] for i in tokenizer.encoded("low lower slow")] == [
        *("low", " low", "er", " ", pieces.UNREADABLE, "low"),
    ]
    rows = tokenizer.rows(corpus, 12)
    assert [tokenizer.decoded(row) for row in rows.tolist()] == corpus
    assert pieces.fit(corpus, 0).rows(["low"], 5).tolist()[0][3:] == [pieces.BOUNDARY, pieces.PADDING]
    lengths = tokenizer.lengths()
    assert lengths[rows].sum(1).tolist() == [len(text) + 1 for text in corpus]


def test_bleu_of_a_sentence_computed_by_hand():
    """Of "the cat sat on the mat ." against "the cat is on the mat .": 6/7, 4/6, 2/5 and 1/8 (none of 4, smoothed)."""
    counts = np.array(bleu_counts("The cat sat on the mat.", "the cat is on the mat."), dtype=float)
    assert counts.tolist() == [6, 4, 2, 1, 7, 6, 5, 4, 7, 7]
    assert bleu(counts) == pytest.approx((6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)
    short = np.array(bleu_counts("on the mat there", "the cat is on the mat, where else?"), dtype=float)
    assert short.tolist() == [3, 2, 1, 0, 4, 3, 2, 1, 4, 10]
    assert bleu(short) == pytest.approx(math.exp(1 - 10 / 4) * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)


def test_bleu_equals_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    references = [
        "Is $1,234.50 (or 3-4%) OK for you & me?", "Please confirm: P.f. Chang's, 12:30 pm.", 
        "It's 9.5-ish, e.g. 4,000.",
        "Have a great day!", "The 1st one -- really -- is &quot;good&quot; [sic]/{no}~", "no overlap here at all",
    ]  # fmt: skip
    outputs = [
        "is $1,234.5 (or 3-4 %) ok for you?", "please confirm p.f. chang's at 12:30 pm.", "it's 9.5, e.g. 4,000.",
        "have a nice day!", "the 1st one - really - is \"good\" [sic]", "something else",
    ]  # fmt: skip
    for size in (1, 3, 6):
        ours = np.sum([bleu_counts(*pair) for pair in zip(outputs[-size:], references[-size:], strict=True)], 0)
        theirs = sacrebleu.corpus_bleu(outputs[-size:], [references[-size:]], lowercase=True).score
        assert 100 * bleu(ours.astype(float)) == pytest.approx(theirs, abs=1e-9)


def test_n_grams_equal_witten_and_bell_with_dictionaries():
    draw = generator()
    rows = torch.randint(2, 6, (30, 8), generator=draw).numpy()
    rows[:, 6] = pieces.BOUNDARY
    rows[:, 7] = pieces.PADDING
    train, further, asked = rows[:15], rows[15:22], rows[22:]
    ids, order = 6, 3

    def by_dictionary(texts):
        follow = {}
        for text in texts.tolist():
            padded = [pieces.BOUNDARY] * (order - 1) + [i for i in text if i]
            for place in range(order - 1, len(padded)):
                for n in range(order):
                    follow.setdefault(tuple(padded[place - n : place]), Counter())[padded[place]] += 1
        return follow

    def probability(follow, history, token):
        lower = probability(follow, history[1:], token) if history else 1 / (ids - pieces.RESERVED + 2)
        counts = follow.get(history, Counter())
        total = counts.total() + len(counts)
        return (counts[token] + len(counts) * lower) / total if total else lower

    for shown, more in ((train, None), (np.concatenate([train, further]), Ngrams(further, order, ids))):
        follow = by_dictionary(shown)
        found = Ngrams(train, order, ids).nats(asked, more)
        for row, text in zip(found, asked.tolist(), strict=True):
            padded = [pieces.BOUNDARY] * (order - 1) + text
            expected = [
                -math.log(probability(follow, tuple(padded[i : i + order - 1]), token)) if token else 0.0
                for i, token in enumerate(text)
            ]
            assert row.tolist() == pytest.approx(expected)


def test_decoders_refuse_what_they_cannot_read():
    with pytest.raises(ValueError, match="heads must divide width=8"):
        TransformerDecoder(spec(), 8, heads=3)
    with pytest.raises(ValueError, match="needs texts to be continued"):
        GRUDecoder(TinyImages().spec)


def test_leaves_of_a_batch_keep_their_shapes():
    data = tree_map(lambda leaf: leaf[:2], texts(3))
    assert all(model(data["x"]).shape == (2, TEXT, IDS) for model in decoders())
