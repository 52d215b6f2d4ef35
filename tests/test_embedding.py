"""Inputs replaced by the features of a frozen model: equal for families and users, cached, and refused in words."""

import sys
import types

import embedders
import numpy as np
import pytest
import torch
from conftest import composed
from PIL import Image
from scenarios import class_spec, generator
from torch import nn

from metarun import load
from metarun.assemble import assemble
from metarun.command.trust import distrusted
from metarun.data import embedding
from metarun.data.portable import plain, rebuilt
from metarun.errors import UserError
from metarun.loop import meta_train
from metarun.models.pretrained import Pretrained
from metarun.nn.functional import forward_of, parameters_of
from metarun.run import run
from metarun.tasks.images import Images
from metarun.tasks.text import text

SMALL = {"ways": 2, "queries": 2, "embed": "embedders:colours", "embed_size": 16}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METARUN_CACHE_DIR", str(tmp_path / "cache"))
    embedders.calls.clear()
    embedding.frozen.cache_clear()


@pytest.fixture
def pictures(tmp_path):
    noise = np.random.default_rng(0)
    for label in range(9):
        (tmp_path / "data" / f"c{label}").mkdir(parents=True)
        for i in range(5):
            shade = noise.integers(0, 200, 3) + noise.integers(0, 50, (16, 16, 3))
            Image.fromarray(shade.astype(np.uint8)).save(tmp_path / "data" / f"c{label}" / f"{i}.png")
    return tmp_path / "data"


def test_families_sample_what_their_converter_makes_of_pictures(pictures):
    family = Images(str(pictures), **SMALL)
    assert family.spec.inputs.shape == (5,)
    assert family.dataset.split(":")[-2:] == ["embedders", "colours"]
    train = family.pools["train"]
    rows = train.rows[train.order]
    torch.testing.assert_close(rows.mean(0), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(rows.std(0, correction=0), torch.ones(5))
    paths = [pictures / label / f"{i}.png" for label in family.classes["test"] for i in range(5)]
    test = family.pools["test"]
    found = rebuilt(plain(family.converter)).inputs(paths)
    torch.testing.assert_close(found, test.rows[test.order], rtol=1e-4, atol=1e-4)
    x = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in embedding.IMAGENET)
    z = embedders.Colours().linear(((x - mean) / std).mean((2, 3))).detach()
    expected = (z - torch.tensor(family.converter.mean)) / torch.tensor(family.converter.std)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    tasks = family.sample("train", 3, generator())
    assert tasks.support["x"].shape == (3, 2, 5)


def test_features_are_computed_once_unless_the_model_changes(pictures, monkeypatch):
    first = Images(str(pictures), **SMALL)
    assert sum(embedders.calls) == 45 + embedding.PROBE
    embedders.calls.clear()
    again = Images(str(pictures), **SMALL)
    assert sum(embedders.calls) == embedding.PROBE
    torch.testing.assert_close(again.pools["val"].rows, first.pools["val"].rows, rtol=0, atol=0)
    monkeypatch.setattr(embedders, "colours", lambda: lambda x: x.amax((2, 3)))
    embedding.frozen.cache_clear()
    assert Images(str(pictures), **SMALL).spec.inputs.shape == (3,)


def test_a_model_in_a_folder_of_the_user_is_embedded_with_again_when_it_changes(tmp_path, monkeypatch):
    sentences, scale = ["a", "b"], 1.0
    monkeypatch.setattr(embedding, "features", lambda source, kind, x, device: scale * torch.ones(len(x), 3))
    for source, changes in ((f"transformers:{tmp_path}", True), ("transformers:some/model", False)):
        monkeypatch.setattr(embedding, "version", lambda package: "1.0")
        scale = 1.0
        before = embedding._version(source, "sentences", sentences, "cpu")
        scale = 2.0
        assert (embedding._version(source, "sentences", sentences, "cpu") != before) == changes


def test_sentences_are_embedded_as_they_are():
    family = text(ways=3, shots=2, queries=4, dataset="toy", embed="embedders:lengths")
    pool = family.pools["test"]
    counts = torch.tensor([[len(s), s.count("e"), s.count(" ")] for s in pool.texts])
    converter = family.converter
    expected = (counts - torch.tensor(converter.mean)) / torch.tensor(converter.std)
    torch.testing.assert_close(pool.rows, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rebuilt(plain(converter)).inputs(pool.texts[:3]), pool.rows[:3])
    assert family.sample("train", 2, generator()).support["x"].shape == (2, 6, 3)


def test_a_learner_embeds_the_pictures_of_its_user(pictures, tmp_path, without_pictures):
    out, told = tmp_path / "run", ("task.embed=embedders:colours", "task.embed_size=16", f"task.path={pictures}")
    config, names = composed(
        *("algo=protomaml", "task=images", "model=adapter", "task.ways=2", "task.queries=2", *told),
        *("train.steps=2", "train.eval_every=2", "train.val_episodes=2", "eval.episodes=2", "device=cpu"),
        "task.train_queries=2",
        "task.train_ways=2",
        f"hydra.run.dir={out}",
    )
    run(config, names, out)
    with pytest.raises(UserError, match="names a module to be imported"):
        load(out)
    learner = load(out, trust=True)
    paths = [pictures / label / f"{i}.png" for label in ("c0", "c1") for i in range(5)]
    adapted = learner.adapt(paths[:2] + paths[5:7], ["a", "a", "b", "b"])
    assert set(adapted.predict(paths)) <= {"a", "b"}


@pytest.mark.parametrize(
    ("embed", "words"),
    [
        ("resnet18", "embed must be LIBRARY:NAME"),
        ("minilm", "embeds sentences, and this task has pictures"),
        ("sentence-transformers:x", "embeds sentences"),
        ("timm:resnet18", r"pip install timm\."),
        ("no_such_package:x", "put it where Python finds it"),
        ("embedders:nothing", "cannot be loaded"),
        ("embedders:failing", "no network"),
        ("embedders:unfit", r"cannot embed pictures of \[3, 16, 16\] .*224.*set task.embed_size"),
        ("embedders:flat", r"must return finite numbers \[2, d\] for 2 pictures"),
    ],
)
def test_what_cannot_embed_is_refused_in_a_sentence(pictures, embed, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises((UserError, ValueError), match=words):
        Images(str(pictures), **{**SMALL, "embed": embed})


def test_libraries_are_asked_for_features_instead_of_classes(pictures, monkeypatch):
    """Stand-ins with the interfaces of the libraries, whose weights would have to be fetched."""

    def classifier(name, weights):
        assert (name, weights) == ("small", "DEFAULT")
        body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
        return nn.Sequential(body, nn.Sequential(nn.Dropout(), nn.Linear(4, 1000)))

    module = types.SimpleNamespace(get_model=classifier)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", module)
    assert Images(str(pictures), **{**SMALL, "embed": "torchvision:small"}).spec.inputs.shape == (4,)

    def timm_model(name, pretrained, num_classes):
        model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        return model

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=timm_model))
    x = torch.full((2, 3, 16, 16), 255, dtype=torch.uint8)
    torch.testing.assert_close(embedding.features("timm:any", "pictures", x), torch.ones(2, 3))


def test_features_of_eight_views_do_not_change_when_a_picture_is_turned(pictures):
    x = torch.rand(3, 3, 16, 16, generator=generator())
    turned, mirrored = x.rot90(1, (2, 3)), x.flip(3)
    for views, same in {1: [x], 2: [x, mirrored], 8: [x, mirrored, turned, turned.flip(2), x.rot90(2, (2, 3))]}.items():
        found = [embedding.features("embedders:beside_the_corner", "pictures", y, views=views) for y in same]
        for z in found:
            torch.testing.assert_close(z, found[0])
        other = embedding.features("embedders:beside_the_corner", "pictures", turned, views=views)
        assert torch.allclose(other, found[0]) == (views == 8)
    how = {**SMALL, "embed": "embedders:beside_the_corner", "embed_views": 8}
    family = Images(str(pictures), **how)
    assert family.dataset != Images(str(pictures), **{**how, "embed_views": 1}).dataset
    path = pictures / family.classes["test"][0] / "0.png"
    picture = Image.open(path)
    picture.rotate(90).save(pictures.parent / "turned.png")
    again = rebuilt(plain(family.converter)).inputs([path, pictures.parent / "turned.png"])
    torch.testing.assert_close(again[0], again[1])
    test = family.pools["test"]
    torch.testing.assert_close(again[0], test.rows[test.order][0])
    with pytest.raises(ValueError, match="embed_views must be one of 1, 2, 8"):
        Images(str(pictures), **{**how, "embed_views": 4})


def test_augmentation_gives_way_only_if_the_user_did_not_type_it(pictures):
    with pytest.raises(ValueError, match="set augment="):
        Images(str(pictures), **SMALL, augment=["flip"])
    Images(str(pictures), **SMALL, augment=["flip"], typed=["embed"])


PICTURES = class_spec((1, 20, 20), 3, 1, 2)


@pytest.mark.parametrize("size", [None, 30])
def test_a_pretrained_network_answers_as_it_does_alone(size):
    """Grey pictures as three equal channels, and with the statistics of pre-training although tasks are small."""
    model = Pretrained(PICTURES, "embedders:network", size=size)
    x = torch.randn(7, 1, 20, 20, generator=generator())
    shown = x.repeat(1, 3, 1, 1)
    if size:
        shown = nn.functional.interpolate(shown, size=(size, size), mode="bilinear")
    expected = embedders.Network().eval()(shown)
    assert expected.std() > 0.01
    torch.testing.assert_close(forward_of(model.trunk)({}, x), expected)
    torch.testing.assert_close(model(x), model.head(expected))


@pytest.mark.parametrize(
    ("trainable", "learned"),
    [
        ("all", {"stem.0", "stem.1", "layer1.0", "layer1.1"}),
        ("none", set()),
        (["layer1"], {"layer1.0", "layer1.1"}),
        (["layer1.1", "stem.0.weight"], {"layer1.1", "stem.0"}),
    ],
)
def test_the_layers_that_are_named_can_learn(trainable, learned):
    model = Pretrained(PICTURES, "embedders:network", trainable)
    names = {f"trunk.network.{name}" for name in learned} | {"head"}
    assert {name.rpartition(".")[0] for name in parameters_of(model)} == names


def test_the_layers_that_are_named_learn_and_the_others_are_constants(tmp_path):
    """Trained as a run is, which compares the first meta-gradient with that of plain autograd."""
    experiment = assemble(
        *composed(
            *("algo=maml", "task=omniglot", "task.dataset=procedural", "task.image_size=16", "task.queries=2"),
            *("model=pretrained", "model.source=embedders:network", "model.trainable=[layer1]", "engine=eager"),
            *("train.steps=2", "train.meta_batch=2", "train.eval_every=2", "train.val_episodes=2", "device=cpu"),
        )
    )
    network = dict(experiment.model.trunk.network.named_parameters())
    before = {name: p.detach().clone() for name, p in network.items()}
    best = meta_train(experiment, tmp_path, resume=False).best[0].theta["weights"]
    after = {name.rpartition("network.")[2]: leaf for name, leaf in best.items() if "head" not in name}
    assert {name.partition(".")[0] for name in after} == {"layer1"}
    assert not any(torch.equal(leaf, before[name]) for name, leaf in after.items())
    torch.testing.assert_close(network, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"source": None}, "needs the name of a network: model.source=torchvision:resnet18"),
        ({"source": "resnet18"}, "model.source must be LIBRARY:NAME"),
        ({"source": "minilm"}, "model.source=minilm embeds sentences"),
        ({"source": "timm:resnet18"}, r"model.source=timm:resnet18 cannot be imported .*pip install timm\."),
        ({"source": "embedders:flat"}, "must give a torch.nn.Module, not function"),
        ({"source": "embedders:maps"}, r"must return features \[pictures, d\]"),
        ({"source": "embedders:network", "trainable": ["layer4"]}, "there is no layer4; .* are stem, layer1"),
        ({"source": "embedders:network", "trainable": "last"}, "all, none, or names of layers, and there is no last"),
        ({"source": "embedders:network", "size": 8}, "size must be at least 16"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_in_a_sentence(keys, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises((UserError, ValueError), match=words):
        Pretrained(PICTURES, **keys)
    with pytest.raises(ValueError, match="needs pictures of one or three channels"):
        Pretrained(class_spec((4,), 3, 1, 2), "embedders:network")


def test_checkpoints_and_directories_may_name_models_but_no_code():
    assert distrusted("model.source=timm:resnet18") is None
    assert distrusted("model.source=evil:run")
    for source in ("timm:resnet18", "efficientnet-lite0", "null"):
        assert distrusted(f"task.embed={source}") is None
    assert distrusted("task.embed=evil:run")
    assert distrusted("task.embed=timm:a,evil:run")
