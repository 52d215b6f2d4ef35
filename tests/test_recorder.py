"""A recording is the function: on other inputs, time after time, with everything that may be left out left out."""

import pytest
import torch
from torch.func import grad, vmap

from metarun.engine.recorder import CannotRecord
from metarun.engine.recording import Recording

NUMBER = torch.tensor(2.5)


def written_constant(x):
    total = torch.tensor([0.0, 1.0, 2.0, 3.0])
    total += x[0]
    return total * NUMBER


def written_view(x):
    rows = x * 1.0
    first = rows[0]
    before = rows.sum()
    first.mul_(3.0)
    return rows.sum() - before


def the_same_before_and_after_it_is_written(x):
    y = x.clone()
    before = torch.sin(y)
    y.add_(1.0)
    return before + torch.sin(y)


def a_part_of_a_list_is_written(x):
    y = x.clone()
    _, second = y.split(2)
    second.fill_(7.0)
    return y.sum(0)


def views_of_views(x):
    return x.view(12).view(2, 6).view(3, 4).expand(3, 4).contiguous().view(12) * 2.0


def twice(x):
    return torch.exp(x) + torch.exp(x) * torch.exp(x)


def whole_and_not(x):
    return x / 2 + (x > 0) * 1 + (x > 0) * 1.0 + torch.full_like(x, 2) + torch.full_like(x, 2.0)


def curvature(x):
    return vmap(grad(lambda row: grad(lambda v: (v.tanh() ** 3).sum())(row).square().sum()))(x)


FUNCTIONS = (
    *(written_constant, written_view, the_same_before_and_after_it_is_written, a_part_of_a_list_is_written),
    *(views_of_views, twice, whole_and_not, curvature),
)


def recorded(function, x):
    return Recording(lambda given: {"y": function(given["x"])}, {"x": x})


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_recording_gives_what_the_function_gives_to_the_bit_at_every_call(function):
    recording = recorded(
        function, torch.randn(3, 4) if function is not a_part_of_a_list_is_written else torch.randn(4, 4)
    )
    for shape in [recording.graph.find_nodes(op="placeholder")[0].meta["shape"]] * 3:
        x = torch.randn(shape)
        kept = x.clone()
        assert torch.equal(recording({"x": x})["y"], function(x))
        assert torch.equal(x, kept)


def test_what_is_there_already_is_not_computed_again():
    assert recorded(twice, torch.randn(3, 4)).operations == 3
    # A view and a product.
    assert recorded(views_of_views, torch.randn(3, 4)).operations == 2
    assert recorded(lambda x: torch.rand(3) + torch.rand(3), torch.randn(1)).operations == 3


def test_a_number_that_is_no_float_stays_one():
    """1 and 1.0 are equal in Python, and give different types."""
    whole = torch.tensor([1, 2])
    recording = recorded(
        lambda x: torch.cat([whole * 2, (whole * 2.0).long(), (whole * 2).true_divide(3).long()]), NUMBER
    )
    assert recording({"x": NUMBER})["y"].tolist() == [2, 4, 2, 4, 0, 1]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0].sum(),
        lambda x: torch.nonzero(x).sum(),
        lambda x: x + torch.randn(4, generator=torch.Generator().manual_seed(0)),
        lambda x: x if x.sum() > 0 else -x,
    ],
    ids=["item", "mask", "nonzero", "generator", "branch"],
)
def test_what_depends_on_values_is_refused(function):
    with pytest.raises(CannotRecord, match=r"depends on values|generator"):
        recorded(function, torch.randn(3, 4))
