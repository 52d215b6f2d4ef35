"""The learner that knows the family's form and fits only a task's parameters: a ceiling, not a competitor.

Where every target of a family is linear in known features, as A sin(x − φ) is in sin x and cos x, least squares on
the support set is all that remains to be learned; without noise it recovers the task exactly. With fewer examples than
features the solution of least norm is taken.

Expected: MSE below 1e-10 (``metarun algo=oracle task=sinusoid``).
"""

from typing import Any, cast

import torch
from torch import Tensor

from metarun.contracts import Algorithm, Spec, Tree
from metarun.errors import require
from metarun.inner import keep_support
from metarun.nn.ops import without_padding


def oracle(spec: Spec) -> Algorithm:
    """Least squares in the features that the family names.

    Args:
        spec: that of a family that names its ``truth``.
    """
    require(
        spec.facts.truth is not None,
        "oracle needs a family whose targets have a known form, such as task=sinusoid, and the form is not known for "
        "this task; choose another reference, such as algo=scratch",
    )
    truth = cast(Any, spec.facts.truth)

    def init(generator: torch.Generator) -> Tree:
        return {"carried": {}}

    def predict(theta: Tree, state: Tree, x: Any) -> Tensor:
        known = without_padding(truth(state["x"]), state.get("weight"))
        return cast(Tensor, truth(x) @ (torch.linalg.pinv(known) @ state["y"]))

    return Algorithm(
        init,
        keep_support,
        predict,
        approach="baseline",
        needs="numbers",
        paper="",
        meta_learns=False,
        adapted_parameters=lambda theta: 0,
    )
