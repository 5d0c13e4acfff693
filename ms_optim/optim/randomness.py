"""Randomness: the global random streams that a forward pass draws from, on the CPU and on the devices of a model.

Every pass of a step begins where the first one began, so that dropout and stochastic depth draw the same masks in all
of them, and the step leaves the streams where one pass leaves them.  Otherwise the second gradient would be that of
another network than the one whose ascent was taken.

Source: as in the authors' code of SAM (arXiv 2010.01412), which gives both passes the same key.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Streams:
    """The states of the global streams at some moment.

    Attributes:
        cpu: Of the CPU's.
        cuda: Of each CUDA device's.
    """

    cpu: Tensor
    cuda: dict[torch.device, Tensor]

    @classmethod
    def now(cls, parameters: Iterable[Tensor]) -> Streams:
        """Read the streams of the CPU and of the devices of some tensors.

        Args:
            parameters: The tensors.

        Returns:
            The states.
        """
        devices = {p.device for p in parameters if p.device.type == "cuda"}
        return cls(torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices})

    def restore(self) -> None:
        """Set the streams back."""
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)
