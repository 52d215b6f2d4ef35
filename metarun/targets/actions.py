"""Actions: what a policy's outputs mean. Their loss is the family's, by rolling the policy out."""

from dataclasses import dataclass

from metarun.contracts import Need
from metarun.targets.metric import Metric

RETURN = Metric("return", higher_is_better=True)


@dataclass(frozen=True)
class Actions:
    """Discrete actions, or vectors of numbers."""

    count: int
    """How many discrete actions there are, or numbers in a continuous one."""
    continuous: bool
    """Outputs are means and logarithms of standard deviations, one after the other; else logits."""
    metrics: tuple[Metric, ...] = (RETURN,)
    offers: tuple[Need, ...] = ("loss", "policy")

    @property
    def outputs(self) -> int:
        """Width of a policy's output."""
        return 2 * self.count if self.continuous else self.count
