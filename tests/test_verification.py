"""Equal error rate and true accepts against their definitions, by trying every threshold."""

import itertools
import math

import pytest
import torch
from scenarios import generator

from metarun.targets import verification


def curve(claims):
    """Return (false accepts, false rejects) at each threshold, as fractions that are counted one by one."""
    impostors = [score for score, genuine in claims if genuine == 0]
    genuine = [score for score, genuine in claims if genuine == 1]
    points = [(0.0, 1.0)]
    for threshold in sorted({score for score, _ in claims}, reverse=True):
        false_accepts = sum(score >= threshold for score in impostors) / len(impostors)
        points.append((false_accepts, sum(score < threshold for score in genuine) / len(genuine)))
    return points


def crossing(points):
    """Return where the straight lines between points have as many false accepts as false rejects."""
    for (a, r), (b, s) in itertools.pairwise(points):
        if b >= s:
            share = (r - a) / ((r - a) + (b - s))
            return a + share * (b - a)
    raise AssertionError


@pytest.mark.parametrize("levels", [3, 1000])
def test_rates_are_those_of_trying_every_threshold(levels):
    """With few levels most scores are tied."""
    noise = generator()
    for _ in range(20):
        genuine = (torch.rand(60, generator=noise) < 0.3).double()
        genuine[:2] = torch.tensor([0.0, 1.0])
        score = (levels * (torch.rand(60, generator=noise) + 0.3 * genuine)).floor().double()
        found = verification.scores(torch.stack([score, genuine], -1)[None])
        points = curve(list(zip(score.tolist(), genuine.tolist(), strict=True)))
        assert found["equal-error-rate"] == pytest.approx(crossing(points), abs=1e-12)
        expected = max(1 - rejects for accepts, rejects in points if accepts <= 0.01)
        assert found["true-accepts-at-1%-false"] == pytest.approx(expected, abs=1e-12)


def test_perfect_and_worthless_scores():
    genuine = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])
    perfect = verification.scores(torch.stack([genuine, genuine], -1)[None])
    assert (perfect["equal-error-rate"], perfect["true-accepts-at-1%-false"]) == (0.0, 1.0)
    equal = verification.scores(torch.stack([torch.zeros(5), genuine], -1)[None])
    assert (equal["equal-error-rate"], equal["true-accepts-at-1%-false"]) == (0.5, 0.0)
    assert all(math.isnan(value) for value in verification.scores(torch.ones(1, 4, 2)).values())


def test_claims_ignore_the_scale_of_the_logits_padding_and_absent_classes():
    output = torch.randn(5, 4, generator=generator(), dtype=torch.float64)
    y = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 1, 0]]
    ways = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64).expand(5, 4)
    data = {"y": y, "ways": ways, "weight": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)}
    found = verification.claims(output, data)
    torch.testing.assert_close(verification.claims(output + torch.arange(5.0)[:, None], data), found)
    kept = found[found[:, 1] >= 0]
    expected = torch.log_softmax(output[:4, :3], -1).flatten()
    torch.testing.assert_close(kept, torch.stack([expected, y[:4, :3].flatten()], -1))
