"""Teacher networks: what the tasks are made of."""

import pytest
import torch
from scenarios import generator

from metarun.tasks.teachers import Teachers


@pytest.mark.usefixtures("float64")
def test_a_task_is_linear_in_the_units_of_its_own_operation_and_of_no_other():
    """Least squares on the shared hidden units leaves nothing with the right operation, and something with others."""
    family = Teachers(shots=30, queries=40, units=4, scale=1.5, operations=("relu", "tanh", "sine"))
    tasks = family.sample("test", 60, generator())
    operations = {"relu": lambda h: h.clamp(min=0), "tanh": torch.tanh, "sine": torch.sin}
    assert family.spec.facts.groups == tuple(operations)
    for i in range(60):
        x, y = (torch.cat([part[name][i] for part in tasks[:2]]) for name in ("x", "y"))
        hidden = 1.5 * (x @ family.first.to(x).T + family.bias.to(x))
        left = {}
        for name, operation in operations.items():
            units = operation(hidden)
            left[name] = (units @ torch.linalg.pinv(units) @ y - y).square().mean().item()
        own = family.spec.facts.groups[tasks.support["group"][i, 0]]
        assert left.pop(own) < 1e-12
        assert min(left.values()) > 1e-6


def test_operations_come_equally_often_and_can_be_chosen():
    group = Teachers(operations=("sine", "tanh", "relu")).sample("train", 3000, generator()).support["group"]
    assert group.shape == (3000, 20)
    assert (group == group[:, :1]).all()
    assert (group[:, 0].bincount(minlength=3) / 3000 - 1 / 3).abs().max() < 0.03
    assert Teachers(operations=["sine"]).dataset != Teachers().dataset
    for wrong in ({"operations": ["cube"]}, {"operations": []}, {"scale": 0.0}, {"units": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Teachers(**wrong)
