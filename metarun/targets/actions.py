"""Actions: what a policy's outputs mean. The family defines their loss, by rolling out the policy."""

from dataclasses import dataclass

from metarun.contracts import Need
from metarun.data.portable import portable
from metarun.targets.metric import Metric

RETURN = Metric("return", higher_is_better=True)


@portable
@dataclass(frozen=True)
class Actions:
    """Discrete actions, or vectors of numbers."""

    count: int
    """Number of discrete actions, or of dimensions of a continuous action."""
    continuous: bool
    """Whether outputs are means followed by logarithms of standard deviations; otherwise they are logits."""
    metrics: tuple[Metric, ...] = (RETURN,)
    offers: tuple[Need, ...] = ("loss", "policy")

    @property
    def outputs(self) -> int:
        """Width of a policy's output."""
        return 2 * self.count if self.continuous else self.count
