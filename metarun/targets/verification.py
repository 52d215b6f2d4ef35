"""Whether an example is of the class that is claimed, where `metarun.targets.classes` asks of which class it is.

Each query makes a claim for every class of its task: the claim of its own class is genuine, the others are impostors'.
The score of a claim is the log-probability of the claimed class among those of the task, which all methods have,
whatever the scale of their logits. A threshold on it accepts or rejects claims. The curve of false accepts and false
rejects over all thresholds, exact where scores are tied, is read as usual (Jain, Ross, Prabhakar 2004,
https://doi.org/10.1109/TCSVT.2003.818349, §IV).
"""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from metarun.contracts import Tree
from metarun.targets.classes import own_classes
from metarun.targets.metric import Metric
from metarun.targets.ranking import caught

FALSE_ACCEPTS = 0.01
"""Share of impostors' claims that may be accepted where true accepts are counted."""
EQUAL_ERROR = Metric("equal-error-rate", higher_is_better=False, percent=True)
TRUE_ACCEPTS = Metric("true-accepts-at-1%-false", higher_is_better=True, percent=True)
METRICS = (EQUAL_ERROR, TRUE_ACCEPTS)


def claims(output: Tensor, data: Tree) -> Tensor:
    """Return the score of each claim, and 1 if it is genuine or 0 if not: ``[examples × ways, 2]``.

    Claims of padding, or of a class that the task lacks, have −1 in place of the latter.
    """
    score = log_softmax(own_classes(output, data), -1).nan_to_num(nan=-torch.inf)
    there = torch.ones_like(score)
    if "ways" in data:
        there = there * (data["ways"] > 0)
    if "weight" in data:
        there = there * (data["weight"][:, None] > 0)
    return torch.stack([score, torch.where(there > 0, data["y"], -1.0)], -1).flatten(0, 1)


def errors(score: Tensor, genuine: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shares of false accepts and of false rejects at each threshold, from the strictest on.

    Claims of the same score have the same point of the curve, which is there once for each of them.

    Args:
        score: of each claim ``[claims]``.
        genuine: whether it is genuine ``[claims]``; some are, and some are not.
    """
    genuine = genuine.double()
    _, _, accepted, intruded = caught(score, genuine, torch.ones_like(genuine))
    # The strictest threshold accepts nothing.
    shares = [torch.cat([part.new_zeros(1), part / part[-1]]) for part in (intruded, accepted)]
    return shares[0], 1 - shares[1]


def equal_error_rate(false_accepts: Tensor, false_rejects: Tensor) -> float:
    """Return the share at which both errors are equal, on the straight line between two points of the curve."""
    # The curve begins at no accepts at all, where all genuine claims are rejected.
    after = int((false_accepts >= false_rejects).double().argmax())
    ahead = false_accepts - false_rejects
    share = -ahead[after - 1] / (ahead[after] - ahead[after - 1])
    return float(torch.lerp(false_accepts[after - 1], false_accepts[after], share))


def true_accepts(false_accepts: Tensor, false_rejects: Tensor) -> float:
    """Return the share of genuine claims that are accepted where at most ``FALSE_ACCEPTS`` of the impostors' are."""
    return float(1 - false_rejects[false_accepts <= FALSE_ACCEPTS].min())


def scores(counts: Tensor) -> dict[str, float]:
    """Return both metrics over the claims of all tasks ``[tasks, claims, 2]``; NaN without claims of either kind."""
    score, genuine = counts[counts[..., 1] >= 0].T
    if not 0 < int(genuine.sum()) < len(genuine):
        return {metric.name: torch.nan for metric in METRICS}
    curve = errors(score, genuine)
    return {EQUAL_ERROR.name: equal_error_rate(*curve), TRUE_ACCEPTS.name: true_accepts(*curve)}
