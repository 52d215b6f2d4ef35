"""What the benchmarks compare is the same problem."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.own import Own
from benchmarks.problems import PROBLEMS
from benchmarks.torch_peers import plain_torch


@pytest.fixture(autouse=True)
def as_it_was():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", PROBLEMS)
def test_metarun_and_plain_torch_have_the_same_meta_gradient(name):
    whole = PROBLEMS[name]
    problem = replace(whole, tasks=min(whole.tasks, 2), ways=min(whole.ways, 10), queries=3)
    expected = plain_torch(problem, "cpu").gradient()
    assert np.linalg.norm(Own(problem, "cpu", "eager").gradient() - expected) < 1e-3 * np.linalg.norm(expected)
