"""The policy that knows the task: a ceiling, not a competitor."""

from collections.abc import Callable, Iterator
from typing import Any

from metarun.algos.baselines.random_policy import environment_of, fixed_policy
from metarun.contracts import Algorithm, Loss, Seen, Spec, Tree
from metarun.errors import require


def optimal(spec: Spec) -> Algorithm:
    """The optimal policy, given the task's parameters from the support set.

    Args:
        spec: that of a control task that names its best policy.
    """
    best = environment_of(spec, "optimal").optimal
    require(best is not None, "optimal play is not known for this task; choose another reference, such as algo=random")
    assert best is not None

    def adapt(theta: Tree, support: Tree, loss: Loss) -> Iterator[Callable[[Seen], Any]]:
        # Parameters are the same in all episodes of a task, so those of the first serve any number of episodes.
        yield best({name: leaf[:1] for name, leaf in support.items()})

    def predict(theta: Tree, state: Callable[[Seen], Any], x: Seen) -> Any:
        return state(x)

    return fixed_policy(lambda seen: None)._replace(adapt=adapt, predict=predict)
