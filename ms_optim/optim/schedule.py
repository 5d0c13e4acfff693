"""Schedule: in which steps an optimizer takes its own part, and in which it is the base optimizer.

    step − start ∈ {0, k, 2k, …},   start ≤ step < end

A window that never opens is a sharpness-aware run in name only: people have trained for days without noticing.  So it
is refused where that can be known beforehand, and said where the run is over before it opened.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from ..errors import NoEffectWarning


@dataclass(frozen=True)
class Schedule:
    """The steps with a part of our own.

    Attributes:
        every: k.
        start: The first.
        end: The first that is none any more; ``None``: they go on.
        total: The number of steps of the whole run, if it is known.

    Raises:
        ValueError: If there is no such step.
    """

    every: int = 1
    start: int = 0
    end: int | None = None
    total: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be >= 1 step, got {self.every}; rho=0 or strength=0 switches our part off")
        if self.start < 0:
            raise ValueError(f"start must be >= 0 steps, got {self.start}")
        if self.end is not None and self.end <= self.start:
            raise ValueError(
                f"the window from step {self.start} to step {self.end} never opens; end must be > start, or None"
            )
        if self.total is not None and self.total <= self.start:
            raise ValueError(
                f"start={self.start} lies beyond the run's {self.total} steps, so our part would never be taken; "
                "count optimizer steps, not epochs or samples"
            )

    def number(self, step: int) -> int:
        """The number of a step among those with a part of our own.

        Args:
            step: One of them.

        Returns:
            From 0.
        """
        return (step - self.start) // self.every

    def active(self, step: int) -> bool:
        """Whether a step has a part of our own.

        Args:
            step: Its number, from 0.

        Returns:
            Whether it has.
        """
        since = step - self.start
        return since >= 0 and since % self.every == 0 and (self.end is None or step < self.end)


class Watch:
    """Says at the end of a run whose length was not known that the window was never reached.

    Args:
        name: Of the optimizer.
        schedule: Its schedule.

    Attributes:
        steps: How many were taken.
    """

    def __init__(self, name: str, schedule: Schedule) -> None:
        self.name, self.schedule = name, schedule
        self.steps = 0

    def end(self) -> None:
        """The run is over."""
        if 0 < self.steps <= self.schedule.start:
            warnings.warn(
                f"{self.name} was dropped after {self.steps} steps, and its own part was to begin at step "
                f"{self.schedule.start}: this was the base optimizer; count optimizer steps, or pass total_steps, with "
                "which such a window is refused at once",
                NoEffectWarning,
                stacklevel=2,
            )
            self.steps = 0
