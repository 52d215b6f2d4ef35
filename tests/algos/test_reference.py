"""Answers without a learner."""

import pytest
import torch
from scenarios import class_spec, generator, number_spec

from metarun.algos.baselines.reference import reference
from metarun.contracts import Facts, Numbers, Sizes, Spec
from metarun.targets.real import MSE, Real

SPEC = number_spec((2,), 1, 3, 2)


def answers(algorithm, support, x):
    *_, state = list(zip(range(2), algorithm.adapt({}, support, None), strict=False))[-1]
    return algorithm.predict({}, state, x)


def test_the_nearest_example_and_the_mean_answer_without_padding():
    x = torch.tensor([[0.0, 0.0], [9.0, 9.0], [1.0, 1.0], [5.0, 5.0]])
    support = {"x": x, "y": torch.tensor([[1.0], [0.0], [3.0], [8.0]]), "weight": torch.tensor([1.0, 0, 1, 1])}
    asked = torch.tensor([[0.2, 0.1], [8.0, 9.0], [0.9, 0.8]])
    assert answers(reference(SPEC), support, asked).flatten().tolist() == [1, 8, 3]
    assert answers(reference(SPEC, "mean"), support, asked).flatten().tolist() == [4, 4, 4]


def test_a_family_names_its_own_references_first():
    facts = Facts(references={"zero": lambda support, x: 0 * support["y"][:1].expand(len(x), -1)})
    spec = Spec(Numbers((2,)), Real(1), Sizes(3, 2), (MSE,), facts)
    support = {"x": torch.randn(3, 2, generator=generator()), "y": torch.ones(3, 1)}
    assert answers(reference(spec), support, torch.zeros(2, 2)).tolist() == [[0], [0]]
    assert answers(reference(spec, "nearest"), support, torch.zeros(2, 2)).tolist() == [[1], [1]]
    with pytest.raises(ValueError, match="of must be one of zero, nearest, mean, not best"):
        reference(spec, "best")


def test_classes_have_no_reference():
    with pytest.raises(ValueError, match="choose another baseline"):
        reference(class_spec((2,), 3, 1, 1))
