"""Plain loops of PyTorch: what a framework's own loop has to give, bit for bit, with the same optimizer and data.

The network has BatchNorm, so that buffers count; all is in float32, as it is in the frameworks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from cases import everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import ms_optim
from ms_optim.demo.training import digits

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 6
BATCH = 32

TWO_PASSES = {
    "SAM": (ms_optim.SAM, {"rho": 0.1}),
    "MSSAM": (ms_optim.MSSAM, {"rho": 0.1, "refresh_every": 4}),
}
ONE_PASS = {
    "MSSAM[momentum]": (ms_optim.MSSAM, {"rho": 0.1, "refresh_every": 4, "ascent": "momentum"}),
    "MSReg[noise]": (ms_optim.MSRegularizedSGD, {"strength": 1e-4, "refresh_every": 4, "gradient": "noise"}),
    "MSReg[trace]": (ms_optim.MSRegularizedSGD, {"strength": 1e-3, "refresh_every": 4}),
}
ALL = {**TWO_PASSES, **ONE_PASS}


class WithLoss(nn.Module):
    """A module whose forward returns the loss: what ``optimizer.attach`` takes."""

    def __init__(self, network: nn.Module, factor: float = 1.0) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.factor * cross_entropy(self.network(x), y)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)).float()


@functools.cache
def group() -> ms_optim.ScaleGroup:
    """The network's scale group, discovered once for all tests."""
    return ms_optim.scale_symmetries(network(), torch.zeros(2, 1, 8, 8))


def build(name: str, model: nn.Module, **options: Any) -> ms_optim.SharpnessAware:
    kind, settings = ALL[name]
    base = {} if kind is ms_optim.MSRegularizedSGD else {"base": torch.optim.SGD}
    return kind(model, **base, lr=0.05, momentum=0.9, **{"group": group(), **settings, **options})


@functools.cache
def _images() -> TensorDataset:
    found = digits(0)
    return TensorDataset(found.x.float(), found.y)


def loader(batches: int = STEPS) -> DataLoader[Any]:
    """The first batches of the digits, in their order."""
    dataset = torch.utils.data.Subset(_images(), range(batches * BATCH))
    return DataLoader(dataset, batch_size=BATCH)


class Plain:
    """A plain loop, and what it leaves.

    Args:
        name: The optimizer.
        how: ``"passes"``: explicitly; ``"loop"``: in an unmodified loop; ``"attach"``: in one around a module that
            returns the loss and was attached.
        autocast: The data type of mixed precision.
        inside: Whether autocast is part of the module's forward, where some frameworks put it, and not around the call.
        scaler: A scaler for it.
        clip: Applied to the parameters before the descent.
        parts: Batches to a step.
        schedule: Makes a scheduler, stepped after each step.
        **own: Arguments of the optimizer.
    """

    def __init__(
        self,
        name: str,
        how: Literal["passes", "loop", "attach"] = "passes",
        autocast: torch.dtype | None = None,
        inside: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        clip: Callable[[list[nn.Parameter]], Any] = lambda parameters: None,
        parts: int = 1,
        schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
        **own: Any,
    ) -> None:
        self.model = network()
        self.optimizer = build(name, self.model, **own)
        self.module = WithLoss(self.model)
        if how == "attach":
            self.optimizer.attach(self.module)
        self.around: Any = contextlib.nullcontext()
        if autocast is not None:
            self.around = torch.autocast("cpu", dtype=autocast, cache_enabled=False)
        if inside:
            self.module.forward, self.around = self.around(self.module.forward), contextlib.nullcontext()
        self.how, self.scaler, self.clip, self.parts = how, scaler, clip, parts
        self.scheduler = None if schedule is None else schedule(self.optimizer)
        self.losses: list[float] = []

    def _backward(self, batch: list[Tensor]) -> None:
        with self.around:
            loss = self.module(*batch)
        self.losses.append(loss.item())
        loss = loss / self.parts
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def run(self, steps: int = STEPS) -> Plain:
        batches = iter(loader(steps * self.parts))
        for _ in range(steps):
            window = [next(batches) for _ in range(self.parts)]
            self.optimizer.zero_grad()
            one = [contextlib.nullcontext()]
            for gradient_pass in self.optimizer.passes(scaler=self.scaler) if self.how == "passes" else one:
                with gradient_pass:
                    for batch in window:
                        self._backward(batch)
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            self.clip(list(self.model.parameters()))
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            if self.scheduler is not None:
                self.scheduler.step()
        return self

    @property
    def left(self) -> list[Tensor]:
        return left(self.model, self.optimizer)


def left(model: nn.Module, optimizer: ms_optim.SharpnessAware) -> list[Tensor]:
    """All that training changes, the learning rates included."""
    return [*everything(model, optimizer), torch.tensor([entry["lr"] for entry in optimizer.param_groups])]
