"""Inputs replaced by the features of a frozen model: equal for families and users, cached, and refused in words."""

import sys
import types

import embedders
import numpy as np
import pytest
import torch
from conftest import composed
from PIL import Image
from scenarios import generator
from torch import nn

from metarun import load
from metarun.command.trust import distrusted
from metarun.data import embedding
from metarun.data.portable import plain, rebuilt
from metarun.errors import UserError
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


def test_augmentation_gives_way_only_if_the_user_did_not_type_it(pictures):
    with pytest.raises(ValueError, match="set augment="):
        Images(str(pictures), **SMALL, augment=["flip"])
    Images(str(pictures), **SMALL, augment=["flip"], typed=["embed"])


def test_checkpoints_and_directories_may_name_models_but_no_code():
    for source in ("timm:resnet18", "efficientnet-lite0", "null"):
        assert distrusted(f"task.embed={source}") is None
    assert distrusted("task.embed=evil:run")
    assert distrusted("task.embed=timm:a,evil:run")
