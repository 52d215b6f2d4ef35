"""Deep kernel transfer against Gaussian processes written out in NumPy."""

import numpy as np
import pytest
import torch
from scenarios import class_spec, classification_loss, generator, number_spec, regression_loss
from torch import nn

from metarun.algos.dependent.dkt import LEAST_NOISE, dkt, self_similarity, similarity
from metarun.contracts import Task
from metarun.engine.batch import meta_gradient, query_loss

pytestmark = pytest.mark.usefixtures("float64")
SIZE, OUTPUTS = 4, 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.head = nn.Sequential(nn.Linear(SIZE, 6), nn.Tanh()), nn.Linear(6, OUTPUTS)

    def forward(self, x):
        return self.head(self.trunk(x))


def between(name, a, b):
    found = np.empty((len(a), len(b)))
    for i, p in enumerate(a):
        for j, q in enumerate(b):
            found[i, j] = {
                "rbf": np.exp(-((p - q) ** 2).sum() / (2 * 0.7**2 * len(p))),
                "linear": p @ q / len(p),
                "cosine": p @ q / np.sqrt((p @ p) * (q @ q)),
                "tanimoto": p @ q / (p @ p + q @ q - p @ q),
            }[name]
    return found + 1.0  # s = c = 1 at the start


def data(classes):
    draw = generator(0)
    x = torch.rand(11, SIZE, generator=draw)
    y = torch.eye(2)[torch.arange(11) % 2] if classes else torch.randn(11, OUTPUTS, generator=draw)
    return {"x": x[:6], "y": y[:6]}, {"x": x[6:], "y": y[6:]}


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("name", ["rbf", "linear", "cosine", "tanimoto"])
def test_predictions_and_meta_loss_are_those_of_a_gaussian_process(name, classes):
    torch.manual_seed(0)
    model = Model()
    spec = class_spec((SIZE,), 2, 3, 3) if classes else number_spec((SIZE,), OUTPUTS, 6, 5)
    algorithm = dkt(model, spec, name, length=0.7, noise=0.3)
    theta, (support, query) = algorithm.init(generator()), data(classes)
    z = model.trunk(torch.cat([support["x"], query["x"]])).detach().numpy()
    y = torch.cat([support["y"], query["y"]]).numpy()
    y = 2 * y - 1 if classes else y
    noise = 0.3 + LEAST_NOISE
    inverse = np.linalg.inv(between(name, z[:6], z[:6]) + noise * np.eye(6))
    across = between(name, z[6:], z[:6])
    mean = across @ inverse @ y[:6]
    variance = np.diag(between(name, z[6:], z[6:]) - across @ inverse @ across.T)[:, None] + noise
    expected = mean / variance if classes else mean
    np.testing.assert_allclose(algorithm.predict(theta, support, query["x"]), expected, atol=1e-9)
    whole = between(name, z, z) + noise * np.eye(11)
    _, logarithm = np.linalg.slogdet(whole)
    fit = np.einsum("io,ij,jo->", y, np.linalg.inv(whole), y) / 2
    nats = (fit / 2 + logarithm / 2) / 11 + np.log(2 * np.pi) / 2
    loss = classification_loss if classes else regression_loss
    found = query_loss(algorithm, theta, Task(support, query), loss)
    np.testing.assert_allclose(found.loss.detach(), nats, atol=1e-9)
    if not classes:
        density = -0.5 * (np.log(2 * np.pi * variance) + (query["y"].numpy() - mean) ** 2 / variance).sum(1)
        np.testing.assert_allclose(algorithm.scores(theta, support, query)["log-likelihood"], density.mean(), atol=1e-9)


@pytest.mark.parametrize("classes", [False, True])
def test_padding_changes_neither_predictions_nor_the_meta_gradient(classes):
    torch.manual_seed(0)
    spec = class_spec((SIZE,), 2, 4, 4) if classes else number_spec((SIZE,), OUTPUTS, 8, 7)
    algorithm, parts = dkt(Model(), spec), data(classes)
    theta = algorithm.init(generator())

    def padded(part):
        n = len(part["x"])
        x = torch.cat([torch.full((1, SIZE), 9.0), part["x"], torch.zeros(1, SIZE)])
        y = torch.cat([torch.zeros(1, 2), part["y"], torch.zeros(1, 2)])
        return {"x": x, "y": y, "weight": torch.tensor([0.0] + [1.0] * n + [0.0])}

    def batch(support, query):
        return Task(*({name: leaf[None] for name, leaf in part.items()} for part in (support, query)))

    loss = classification_loss if classes else regression_loss
    a = meta_gradient(algorithm, theta, batch(*parts), loss)
    b = meta_gradient(algorithm, theta, batch(*map(padded, parts)), loss)
    torch.testing.assert_close(a.grads, b.grads)
    torch.testing.assert_close(a.scores, b.scores)
    x = parts[1]["x"]
    torch.testing.assert_close(algorithm.predict(theta, parts[0], x), algorithm.predict(theta, padded(parts[0]), x))


def test_inputs_themselves_are_compared_with_a_weight_each():
    algorithm = dkt(Model(), number_spec((SIZE,), 1, 3, 1), "tanimoto", deep=False, noise=0.2)
    theta = algorithm.init(generator())
    theta["weights"]["log_weight"][0] = -40.0  # the first bit no longer counts
    bits = torch.tensor([[1.0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]])
    support = {"x": bits, "y": torch.tensor([[2.0], [2.0], [-1.0]])}
    same = algorithm.predict(theta, support, torch.tensor([[1.0, 1, 1, 0], [0, 1, 1, 0]]))
    torch.testing.assert_close(same[0], same[1])


def test_classes_that_a_task_lacks_have_no_process():
    """The meta-loss of a task of two classes, cut out and with a column for a third one."""
    torch.manual_seed(0)
    model, (support, query) = Model(), data(classes=True)
    small, large = dkt(model, class_spec((SIZE,), 2, 3, 3)), dkt(model, class_spec((SIZE,), 3, 3, 3))

    def widened(part):
        y = torch.cat([part["y"], torch.zeros(len(part["y"]), 1)], 1)
        return {**part, "y": y, "weight": torch.ones(len(y)), "ways": torch.tensor([1.0, 1, 0]).expand(len(y), 3)}

    theta, task = small.init(generator()), Task(widened(support), widened(query))
    expected = query_loss(small, theta, Task(support, query), classification_loss)
    torch.testing.assert_close(query_loss(large, theta, task, classification_loss).loss, expected.loss)


@pytest.mark.parametrize("name", ["cosine", "tanimoto"])
def test_the_prior_variance_is_the_kernel_itself_where_a_feature_vector_is_zero(name):
    z = torch.tensor([[0.0, 0], [3, 4], [1, 0]])
    own = similarity(name, z, z, torch.tensor(1.0)).diagonal()
    torch.testing.assert_close(self_similarity(name, z), own)
    assert own.tolist() == pytest.approx([0, 1, 1])


def test_a_radial_kernel_compares_inputs_far_from_zero():
    """In float32, squared lengths of a million leave nothing of distances of about one."""
    z = torch.randn(6, SIZE, generator=generator())
    one = torch.tensor(1.0, dtype=torch.float32)
    found = similarity("rbf", (z + 1000).float(), (z + 1000).float(), one)
    torch.testing.assert_close(found.double(), similarity("rbf", z, z, one.double()), rtol=0, atol=1e-3)


def test_the_likelihood_leaves_padding_out_of_batch_statistics():
    torch.manual_seed(0)
    model = Model()
    model.trunk.append(nn.BatchNorm1d(6, track_running_stats=False))
    algorithm, (support, query) = dkt(model, number_spec((SIZE,), OUTPUTS, 6, 5)), data(classes=False)
    theta = algorithm.init(generator())
    padded = {name: torch.cat([leaf, torch.zeros_like(leaf[:2])]) for name, leaf in query.items()}
    padded["weight"] = torch.tensor([1.0] * 5 + [0.0] * 2)
    torch.testing.assert_close(algorithm.scores(theta, support, padded), algorithm.scores(theta, support, query))
