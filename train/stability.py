"""Loss spikes: how one is told, and anticipatory routing, which the run goes on with after going back.

Technical report, section 4.2.3: routing by somewhat older parameters breaks the loop between router and backbone that
makes a spike grow. It costs a forward pass, so it is switched on by a spike, for a while.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any


@dataclasses.dataclass
class SpikeDetector:
    """Running mean and variance of the loss.

    Attributes:
      threshold: standard deviations above the mean that make a spike; None for never.
      window: steps over which they are taken, and before which nothing is a spike.
      count: steps seen.
      mean: of the loss.
      variance: of the loss.
    """

    threshold: float | None
    window: int
    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def spiked(self, loss: float) -> bool:
        """Whether a step's loss is a spike; if not, it counts into mean and variance."""
        if not math.isfinite(loss):
            return True
        if self.threshold is not None and self.count >= self.window:
            # The floor keeps a loss that hardly moves from making a spike of every breath.
            deviation = max(math.sqrt(self.variance), 1e-3 * abs(self.mean))
            if loss > self.mean + self.threshold * deviation:
                return True
        self.count += 1
        share = 1 / min(self.count, self.window)
        before = self.mean
        self.mean += share * (loss - before)
        self.variance = (1 - share) * (self.variance + share * (loss - before) ** 2)
        return False

    def state(self) -> dict[str, Any]:
        """What `restore` needs; JSON."""
        return {"count": self.count, "mean": self.mean, "variance": self.variance}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` saved."""
        self.count, self.mean, self.variance = state["count"], state["mean"], state["variance"]


@dataclasses.dataclass
class Recovery:
    """What a run does about spikes.

    Attributes:
      hold: steps that anticipatory routing stays on after going back.
      most: times that the run goes back without passing the step of the spike.
      until: the step at which anticipatory routing ends; 0 while it is off.
      spike: the last spike's step.
      rollbacks: times in a row.
    """

    hold: int
    most: int
    until: int = 0
    spike: int = 0
    rollbacks: int = 0

    def anticipates(self, step: int) -> bool:
        """Whether a step takes its experts from older parameters."""
        return step < self.until

    def back(self, spike: int, to: int) -> bool:
        """Notes a spike and the step gone back to; returns whether that makes sense once more."""
        self.rollbacks = self.rollbacks + 1 if spike <= self.spike else 1
        self.spike, self.until = max(spike, self.spike), max(to, spike) + self.hold
        return self.rollbacks <= self.most

    def state(self) -> dict[str, Any]:
        """What `restore` needs; JSON."""
        return {"until": self.until, "spike": self.spike, "rollbacks": self.rollbacks}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` saved."""
        self.until, self.spike, self.rollbacks = state["until"], state["spike"], state["rollbacks"]
