"""What a checkpoint may hold of a family's spec and converter, and what it may not."""

from dataclasses import dataclass, is_dataclass
from importlib import import_module
from pkgutil import iter_modules

import pandas as pd
import pytest
import torch
from PIL import Image

from metarun import targets
from metarun.contracts import Facts, Numbers, Sizes, Spec
from metarun.data.converters import Arrays, Drawings
from metarun.data.portable import MARKED, name_of, plain, portable, rebuilt
from metarun.errors import UserError
from metarun.system import sealed
from metarun.targets.real import MSE
from metarun.tasks.omniglot import Omniglot
from metarun.tasks.sinusoid import Sinusoid
from metarun.tasks.text import text


def kept(value, tmp_path):
    """A value after its plain form has been written and read as a checkpoint is."""
    sealed.save(tmp_path / "kept.pt", plain(value))
    return rebuilt(sealed.load(tmp_path / "kept.pt"))


def test_specs_and_converters_survive_a_checkpoint(tmp_path):
    sentences = text(ways=3, shots=2, queries=4, dataset="toy", buckets=64)
    spec, converter = kept((sentences.spec, sentences.converter), tmp_path)
    assert (spec, converter) == (sentences.spec, sentences.converter)
    rows = converter.inputs(["the same words, and unheard-of ones", ""])
    torch.testing.assert_close(rows, sentences.converter.inputs(["the same words, and unheard-of ones", ""]))
    assert rows.shape == (2, *spec.inputs.shape)
    features = spec.facts.features(rows)
    torch.testing.assert_close(features, sentences.spec.facts.features(rows))
    torch.testing.assert_close(spec.inputs.weights, sentences.spec.inputs.weights)
    waves = kept(Sinusoid().spec, tmp_path)
    assert waves.facts.truth is Sinusoid().spec.facts.truth
    assert kept(Omniglot(dataset="procedural", image_size=16).converter, tmp_path) == Drawings(16)


@dataclass(frozen=True)
class Unmarked:
    outputs: int = 1
    metrics = (MSE,)
    offers = ("loss",)


def test_what_is_not_marked_is_refused_in_words(tmp_path):
    def learned_features(x):
        return x

    with pytest.raises(UserError, match=r"cannot hold test_portable\.Unmarked.*portable.*train again"):
        kept(Spec(Numbers((1,)), Unmarked(), Sizes(1, 1), (MSE,)), tmp_path)
    facts = kept(Facts(features=learned_features), tmp_path)
    with pytest.raises(UserError, match="learned_features"):  # only where it is needed
        facts.features(torch.ones(1))


def test_every_target_can_be_held_by_a_checkpoint():
    found = []
    for module in iter_modules(targets.__path__):
        for thing in vars(import_module(f"metarun.targets.{module.name}")).values():
            if is_dataclass(thing) and thing.__module__.startswith("metarun.targets") and hasattr(thing, "offers"):
                found.append(thing)
    assert len(found) >= 3
    assert [thing for thing in found if MARKED.get(name_of(thing)) is not thing] == []


@pytest.mark.parametrize(
    "form",
    [
        {"made by": "subprocess.Popen", "from": {"args": ["touch", "executed"]}},
        {"made by": "builtins.eval", "from": {"source": "1"}},
        {"named": "os.system"},
        {"named": "metarun.data.portable.portable"},
        {"made by": "metarun.targets.real.Real", "from": {"outputs": 1, "other": 2}},
        {"made by": "metarun.targets.real.Real"},
        {},
    ],
)
def test_a_checkpoint_can_name_only_what_is_marked(form):
    with pytest.raises(UserError):
        rebuilt(form)


@portable
@dataclass(frozen=True)
class Marked:
    outputs: int
    names: dict[str, tuple[float, ...]]


def test_a_class_of_ones_own_can_be_marked(tmp_path):
    mine = Marked(3, {"a": (1, 2.0)})
    assert kept([mine, None], tmp_path) == [mine, None]


def test_arrays_take_what_holds_numbers_and_refuse_the_rest(tmp_path):
    arrays = Arrays((2,))
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for given in (expected, expected.double().numpy(), expected.tolist(), pd.DataFrame(expected.numpy())):
        torch.testing.assert_close(arrays.inputs(given), expected)
    torch.testing.assert_close(Arrays((1,)).inputs([1, 2]), torch.tensor([[1.0], [2.0]]))
    for wrong in ([1, 2], [[1.0, float("nan")]], [["a", "b"]], [[1, 2, 3]]):
        with pytest.raises(ValueError, match=r"x must|numbers"):
            arrays.inputs(wrong)
    file = tmp_path / "table.csv"
    file.write_text("height,Y,weight\n1,10,2\n3,30,4\n")
    found = arrays.read(file)
    assert (found.x.to_numpy().tolist(), found.y, found.names) == ([[1, 2], [3, 4]], [10, 30], ["1", "2"])
    file.write_text("a,b\n1,2\n")
    assert arrays.read(file).y is None
    assert Arrays((1,)).read(file).y == [2]
    assert Arrays((1,), outputs=1).read(file).x.to_numpy().tolist() == [[1]]
    with pytest.raises(ValueError, match="2 columns of inputs, and the learner takes 3"):
        Arrays((3,)).read(file)


def test_drawings_are_read_from_folders_of_classes(tmp_path):
    for label, ink in (("bar", (2, 3)), ("dot", (10, 10))):
        (tmp_path / label).mkdir()
        picture = Image.new("L", (32, 32), 255)
        picture.putpixel(ink, 0)
        picture.save(tmp_path / label / "1.png")
    found = Drawings(32).read(tmp_path)
    assert (found.y, found.names) == (["bar", "dot"], ["bar/1.png", "dot/1.png"])
    x = Drawings(32).inputs(found.x)
    assert x.shape == (2, 1, 32, 32)
    assert (x[0, 0, 3, 2], x[1, 0, 10, 10], x.sum()) == (1, 1, 2)
    torch.testing.assert_close(Drawings(32).inputs(x[:, 0].numpy()), x)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither pictures"):
        Drawings(32).read(tmp_path / "empty")
