"""Models against torch's own layers, or against each other."""

from functools import partial

import pytest
import torch
from scenarios import IMAGE_SPEC, class_spec, generator, number_spec
from torch import nn

from metarun.contracts import Seen, Sizes, Spec, Tokens
from metarun.models.adapter import Adapter
from metarun.models.conv4 import Conv4
from metarun.models.coordinate_mlp import CoordinateMLP
from metarun.models.mlp import MLP
from metarun.models.policy import GRUPolicy, happened
from metarun.models.resnet12 import ResNet12
from metarun.models.supernet import MixedConvolution, SupernetConv
from metarun.models.text import TextCNN, TextTransformer
from metarun.models.vit import ViTSmall
from metarun.nn.waves import Waves
from metarun.targets.classes import ACCURACY, Classes
from metarun.tasks.bandit import Bandit

pytestmark = pytest.mark.usefixtures("float64")

TEXT_SPEC = Spec(Tokens(9, 20, 12, 6, torch.ones(20)), Classes(4), Sizes(1, 1, 4), (ACCURACY,))
SENTENCES = torch.tensor([[3, 7, 7, 11, 0, 0, 15, 18, 0], [5, 0, 0, 0, 0, 0, 19, 0, 0], [1, 2, 3, 4, 5, 6, 12, 13, 14]])


def shaken(module):
    """The same module with weights that are neither 0 nor 1 anywhere."""
    with torch.no_grad():
        for place, weight in enumerate(module.parameters()):
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator(place)))
    return module


def test_the_transformer_equals_torchs_own():
    width = 8
    trunk = shaken(TextTransformer(TEXT_SPEC, width, 2)).trunk
    words = SENTENCES[:, :6]
    states = trunk.embedding.table[words] * (words != 0)[..., None] + trunk.position
    for ours in trunk.layers:
        theirs = nn.TransformerEncoderLayer(width, 1, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        given = {
            "self_attn.in_proj_weight": torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]),
            "self_attn.in_proj_bias": torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]),
            "self_attn.out_proj.weight": torch.eye(width),
            "self_attn.out_proj.bias": torch.zeros(width),
            **{f"linear1.{name}": leaf for name, leaf in ours.layers[0].state_dict().items()},
            **{f"linear2.{name}": leaf for name, leaf in ours.layers[2].state_dict().items()},
            **{f"norm1.{name}": leaf for name, leaf in ours.before_attention.state_dict().items()},
            **{f"norm2.{name}": leaf for name, leaf in ours.before_layers.state_dict().items()},
        }
        theirs.load_state_dict(given)
        states = theirs(states, src_key_padding_mask=words == 0)
    expected = torch.stack([row[: int((ids != 0).sum())].amax(0) for row, ids in zip(states, words, strict=True)])
    torch.testing.assert_close(trunk(SENTENCES), expected)


def test_without_hidden_layers_a_model_is_linear():
    x = torch.randn(6, 2, generator=generator())
    line, waves = (
        shaken(MLP(number_spec((2,), 3, 4, 4), widths=[])),
        shaken(CoordinateMLP(number_spec((2,), 3, 4, 4), widths=[])),
    )
    torch.testing.assert_close(line(x), x @ line.head.weight.T + line.head.bias)
    torch.testing.assert_close(waves(x), Waves(2, 6)(x) @ waves.head.weight.T + waves.head.bias)


def test_an_adapter_standardises_by_the_examples_of_its_task():
    x = 3 + torch.randn(7, 4, generator=generator()) * torch.tensor([0.1, 1.0, 10.0, 0.0])
    scaled = (x - x.mean(0)) / (x.var(0, correction=0) + 1).sqrt()
    by_task, plain = (shaken(Adapter(number_spec((4,), 2, 4, 4), 5, norm=norm)).trunk for norm in ("batch", "none"))
    plain.load_state_dict(by_task.state_dict())
    torch.testing.assert_close(by_task(x), plain(scaled))


def test_a_convolution_over_words_equals_looking_through_every_window():
    trunk = shaken(TextCNN(TEXT_SPEC, 5, 3)).trunk
    weight, bias = trunk.convolution.weight, trunk.convolution.bias
    for ids, features in zip(SENTENCES, trunk(SENTENCES), strict=True):
        vectors = [trunk.embedding.table[word] for word in ids[:6] if word != 0]
        nothing = torch.zeros(5)
        padded = [nothing, *vectors, nothing]
        windows = [torch.stack(padded[place : place + 3], 1) for place in range(len(vectors))]
        answers = torch.stack([(weight * window).sum((1, 2)) + bias for window in windows]).relu()
        torch.testing.assert_close(features, answers.amax(0))


@pytest.mark.parametrize("model", [TextCNN, TextTransformer])
def test_a_sentence_without_words_has_features_of_zero_and_n_grams_are_not_read(model):
    trunk = shaken(model(TEXT_SPEC, 8)).trunk
    empty = SENTENCES.clone()
    empty[0, :6] = 0
    assert (trunk(empty)[0] == 0).all()
    other = SENTENCES.clone()
    other[:, 6:] = 17
    torch.testing.assert_close(trunk(other), trunk(SENTENCES))


def test_a_gated_unit_equals_torchs_own_where_the_candidate_is_diagonal():
    """Torch resets behind the candidate's product and we before it, as the paper: alike if it mixes nothing."""
    spec = Bandit(arms=3, pulls=4, shots=2, queries=2).spec
    policy = shaken(GRUPolicy(spec, 6))
    with torch.no_grad():
        policy.candidate.weight.mul_(torch.eye(6))
    theirs = nn.GRU(6, 6)
    theirs.load_state_dict(
        {
            "weight_ih_l0": policy.inputs.weight,
            "bias_ih_l0": policy.inputs.bias,
            "weight_hh_l0": torch.cat([policy.gates.weight, policy.candidate.weight]),
            "bias_hh_l0": torch.zeros(18),
        }
    )
    observation = torch.randn(4, 2, *spec.inputs.shape, generator=generator())
    action = nn.functional.one_hot(torch.randint(3, (4, 2), generator=generator(1)), 3).double()
    reward, done = (torch.randint(2, (4, 2, 1), generator=generator(n)).double() for n in (2, 3))
    seen = Seen(observation, action, reward, done, torch.zeros(4, 2, dtype=torch.long))
    expected, last = theirs(policy.encoder(happened(seen)))
    output, carry = policy(seen)
    torch.testing.assert_close(output, policy.head(expected))
    torch.testing.assert_close(carry, last[0])


def test_a_supernet_of_one_operation_is_the_four_blocks():
    ours, theirs = SupernetConv(IMAGE_SPEC, 8, ("conv3",)), shaken(Conv4(IMAGE_SPEC, 8))
    given = {}
    for block, place in enumerate((0, 3, 6, 9)):
        layer = f"trunk.{2 * block}"
        given[f"{layer}.architecture"] = torch.zeros(1)
        given[f"{layer}.paths.0.0.weight"] = theirs.trunk[place].weight
        given[f"{layer}.paths.0.1.weight"] = theirs.trunk[place + 1].weight
        given[f"{layer}.paths.0.1.bias"] = theirs.trunk[place + 1].bias
    ours.load_state_dict({**given, "head.weight": theirs.head.weight, "head.bias": theirs.head.bias})
    x = torch.randn(5, 1, 16, 16, generator=generator())
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_mixed_convolution_is_the_weighted_sum_of_its_operations():
    mixed = MixedConvolution(3, 4, ("conv3", "conv5", "separable", "pool"))
    x = torch.randn(5, 3, 7, 7, generator=generator())
    with torch.no_grad():
        mixed.architecture.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
    expected = sum(share * path(x) for share, path in zip((0.1, 0.2, 0.3, 0.4), mixed.paths, strict=True))
    torch.testing.assert_close(mixed(x), expected)
    weights = mixed.paths[2][0][0].weight
    by_channel = [nn.functional.conv2d(x[:, c : c + 1], weights[c : c + 1], stride=2, padding=1) for c in range(3)]
    torch.testing.assert_close(mixed.paths[2][0][0](x), torch.cat(by_channel, 1))


def test_from_a_head_of_zeros_the_first_gradient_is_a_sum_of_features_and_leaves_the_trunk_alone():
    """The softmax is uniform, so that row c has Σ (1/ways − [label = c]) features (https://arxiv.org/abs/2106.15367)."""
    model = Conv4(IMAGE_SPEC, 4, zero_head=True)
    images = torch.randn(6, *IMAGE_SPEC.inputs.shape, generator=generator())
    labels = torch.arange(6) % IMAGE_SPEC.target.outputs
    nn.functional.cross_entropy(model(images), labels, reduction="sum").backward()
    features = model.trunk(images)
    assert model.head.weight.grad is not None
    assert model.head.weight.grad.any()
    for row, gradient in enumerate(model.head.weight.grad):
        own = features[labels == row].sum(0)
        torch.testing.assert_close(gradient, features.sum(0) / IMAGE_SPEC.target.outputs - own)
    assert all((weight.grad == 0).all() for weight in model.trunk.parameters())


def test_the_residual_network_is_that_of_the_literature():
    """12.4 million weights without the head (Lee et al. 2019), and activations in their places."""
    model = ResNet12(class_spec((3, 84, 84), 5, 1, 1), widths=(64, 160, 320, 640))
    assert sum(p.numel() for p in model.trunk.parameters()) == 12_424_320
    model = shaken(ResNet12(class_spec((3, 20, 28), 5, 1, 1), widths=(2, 3, 4, 5), norm="none"))
    images = x = torch.randn(2, 3, 20, 28, generator=generator())
    leaky = partial(nn.functional.leaky_relu, negative_slope=0.1)
    for block in model.trunk[:4]:
        first, second, third = (layer for layer in block.layers if isinstance(layer, nn.Conv2d))
        x = nn.functional.max_pool2d(leaky(third(leaky(second(leaky(first(x))))) + block.around[0](x)), 2)
    torch.testing.assert_close(model(images), model.head(x.mean((2, 3))))


def test_a_vision_transformer_sees_each_patch_at_its_place():
    """The embedding of each patch is a linear map of its pixels, zero where a picture ends; order matters."""
    model = shaken(ViTSmall(class_spec((2, 5, 6), 3, 1, 1), patch=4, width=8, layers=1, heads=2))
    x = torch.randn(1, 2, 5, 6, generator=generator())
    padded = torch.zeros(1, 2, 8, 8)
    padded[..., :5, :6] = x
    embed = model.trunk[0]
    weight, bias = embed.map.weight.flatten(1), embed.map.bias
    corners = [(0, 0), (0, 4), (4, 0), (4, 4)]
    rows = [padded[0, :, i : i + 4, j : j + 4].flatten() @ weight.T + bias for i, j in corners]
    torch.testing.assert_close(embed(x)[0], torch.stack(rows) + embed.positions)
    assert not torch.allclose(model(x), model(x.flip(2)))
