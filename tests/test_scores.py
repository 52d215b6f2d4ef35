"""Scores against their definitions written out with loops."""

import pytest
import torch
from scenarios import generator
from torch.func import vmap

from metarun.targets.certainty import BINS, calibration_error, confusion, macro_f1
from metarun.targets.labels import Labels
from metarun.targets.ranking import auroc, average_precision
from metarun.targets.real import MSE, Measured, r_squared

pytestmark = pytest.mark.usefixtures("float64")


def ranked(tasks: int = 40, examples: int = 12):
    """Scores with many ties, positives and weights of 0, 1 and more."""
    draw = generator(0)
    score = torch.randint(5, (tasks, examples), generator=draw).double() / 4
    positive = torch.randint(2, (tasks, examples), generator=draw).double()
    weight = torch.randint(3, (tasks, examples), generator=draw).double()
    return score, positive, weight


def pairs(score, positive, weight):
    won = total = 0.0
    for i in range(len(score)):
        for j in range(len(score)):
            if positive[i] and not positive[j]:
                pair = float(weight[i] * weight[j])
                total += pair
                won += pair * (float(score[i] > score[j]) + 0.5 * float(score[i] == score[j]))
    return won / total if total else 0.5


def stepwise(score, positive, weight):
    area = recall = 0.0
    positives = float((weight * positive).sum())
    for threshold in sorted(set(score.tolist()), reverse=True):
        passed = (score >= threshold).double() * weight
        true = float((passed * positive).sum())
        if positives and passed.sum() > 0:
            area += (true / positives - recall) * true / float(passed.sum())
            recall = true / positives
    return area


@pytest.mark.parametrize(("fast", "slow"), [(auroc, pairs), (average_precision, stepwise)])
def test_ranking_scores_with_ties_and_weights_are_those_of_a_count(fast, slow):
    data = ranked()
    expected = torch.tensor([slow(*task) for task in zip(*data, strict=True)])
    torch.testing.assert_close(vmap(fast)(*data), expected)


def test_area_is_half_where_one_class_is_missing_and_padding_changes_nothing():
    score, weight = torch.tensor([0.1, 0.9, 0.4, 7.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert auroc(score, torch.zeros(4), weight) == 0.5
    assert auroc(score, torch.tensor([0.0, 1.0, 0.0, 1.0]), weight) == 1


def test_calibration_error_is_that_of_a_loop_over_bins():
    draw = generator(1)
    probability = (3 * torch.randn(200, 3, generator=draw)).softmax(-1)
    y = torch.eye(3, dtype=torch.float64)[torch.randint(3, (200,), generator=draw)]
    weight = (torch.rand(200, generator=draw) > 0.2).double()
    confidence, chosen = probability.max(-1)
    total = 0.0
    for b in range(BINS):
        inside = (confidence > b / BINS) & (confidence <= (b + 1) / BINS) & (weight > 0)
        if inside.any():
            accuracy = (chosen == y.argmax(-1))[inside].double().mean()
            total += float(inside.sum() * (confidence[inside].mean() - accuracy).abs())
    assert float(calibration_error(probability, y, weight)) == pytest.approx(total / float(weight.sum()))


def test_macro_f1_is_the_mean_over_classes_of_precision_and_recall():
    draw = generator(2)
    y = torch.eye(4, dtype=torch.float64)[torch.randint(3, (50,), generator=draw)]  # nobody is of class 3
    chosen, weight = torch.randint(3, (50,), generator=draw), torch.ones(50)
    found, of_class = macro_f1(confusion(chosen, y, weight)), []
    for c in range(3):
        hit = float(((chosen == c) & (y[:, c] > 0)).sum())
        precision, recall = hit / float((chosen == c).sum()), hit / float(y[:, c].sum())
        of_class.append(2 * precision * recall / (precision + recall))
    assert float(found) == pytest.approx(sum(of_class) / 3)


def test_scores_of_numbers_are_in_their_unit():
    y, output = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[1.5], [2.0], [3.0]])
    target = Measured(shift=10.0, scale=3.0)
    found = {**target.scores(output, {"y": y}), **target.further(output, {"y": y})}
    assert float(found[MSE.name]) == pytest.approx(9 * (0.25 + 1) / 3)
    assert float(found["mae"]) == pytest.approx(3 * 1.5 / 3)
    assert float(found["r2"]) == pytest.approx(1 - 1.25 / float((y - y.mean()).square().sum()))
    assert r_squared(y[:, 0], torch.full((3,), 0.1), torch.ones(3)) == 0


def test_labels_score_what_padding_and_broken_outputs_do_not_change():
    target = Labels.of(("no", "yes"))
    output = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.5], [5.0, -5.0]])
    y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    padded = {"y": y, "weight": torch.tensor([1.0, 1.0, 1.0, 0.0])}
    whole = {"y": y[:3]}
    for score in (target.scores, target.further):
        a, b = score(output, padded), score(output[:3], whole)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name])
    assert target.scores(output[:3], whole)["auroc"] == 1
    broken = output[:3].clone()
    broken[1] = torch.nan
    assert target.scores(broken, whole)["auroc"] == 0.5


@pytest.mark.parametrize("names", [("no", "yes"), ("no", "perhaps", "yes")])
def test_a_learner_that_diverged_is_neither_calibrated_nor_right_about_any_class(names):
    target, y = Labels.of(names), torch.eye(len(names)).repeat(4, 1)
    for value in (torch.nan, torch.inf):
        output = torch.full_like(y, value)
        found = {**target.scores(output, {"y": y}), **target.further(output, {"y": y})}
        assert found["negative-log-likelihood"].isnan()
        assert found["calibration-error"] == 1
        assert found.get("macro-f1", 0) == 0
        assert target.confusion(output, {"y": y}).sum() == 0
