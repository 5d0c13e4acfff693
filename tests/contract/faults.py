"""Faults: an exception planted in any operation of torch that a step runs before its descent.

Operations are counted where they are dispatched, so that those of the forward and backward passes, of a perturbation,
of a refresh and of putting things back are all among them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from cases import COMBINED, Case, everything, same, samples
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode


class Planted(TorchDispatchMode):
    """Counts operations, and raises in one of them.

    Attributes:
        count: How many there were.
    """

    def __init__(self, at: int | None = None, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.count, self.at, self.error = 0, at, error
        self.stopped = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.stopped and func.namespace != "profiler":  # what torch wraps around `step` is none of ours
            if self.count == self.at:
                self.count += 1
                raise self.error("planted")
            self.count += 1
        return func(*args, **(kwargs or {}))


class WithLoss(nn.Module):
    """A module whose forward returns the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(self.model(x), y)


def drive(form: str, model: nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor, planted: Planted) -> None:
    """One step in one of its forms; nothing is planted in the descent itself."""
    descend = type(optimizer).descend

    def unplanted() -> None:
        planted.stopped = True
        descend(optimizer)

    optimizer.descend = unplanted
    try:
        with planted:
            if form == "closure":

                def closure() -> torch.Tensor:
                    optimizer.zero_grad()
                    loss = cross_entropy(model(x), y)
                    loss.backward()
                    return loss

                optimizer.step(closure)
            elif form == "loss module, closure":

                def once() -> torch.Tensor:
                    optimizer.zero_grad()
                    loss = optimizer.loss_module(x, y)
                    loss.backward()
                    return loss

                optimizer.step(once)
            elif form == "loop, closure":
                optimizer.zero_grad()
                planted.stopped = True  # of what comes before the step, see "loop"
                cross_entropy(model(x[:4]), y[:4]).backward()
                planted.stopped = False

                def last() -> torch.Tensor:
                    loss = cross_entropy(model(x[4:]), y[4:])
                    loss.backward()
                    return loss

                optimizer.step(last)
            elif form == "passes":
                for gradient_pass in optimizer.passes():
                    with gradient_pass:
                        loss = cross_entropy(model(x), y)
                        gradient_pass.loss = loss.detach()
                        loss.backward()
                optimizer.step()
            else:
                optimizer.zero_grad()
                if form == "loop":
                    logits = model(x)
                    # Behind the forward pass of a one-pass loop all is torch's own, and what fails there leaves what
                    # it leaves without us, but for the weights, which are not perturbed for long: test_loops.py.
                    planted.stopped = True
                    loss = cross_entropy(logits, y)
                else:
                    loss = optimizer.loss_module(x, y)
                loss.backward()
                optimizer.step()
    finally:
        planted.stopped = True
        del optimizer.descend


def forms(case: Case) -> list[str]:
    """The ways in which a case can be driven."""
    loop = "loop" if case.passes == 1 else "loss module"
    alone = "antithetic" in case.name or case in COMBINED  # which no loop drives
    return ["closure", "passes", *([] if alone else [loop, f"{loop}, closure"])]


@dataclass
class Bench:
    """A case some steps into its training, from which steps are tried again and again."""

    case: Case
    network: Any
    form: str
    steps: int  # taken before
    options: dict[str, Any]

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        model = self.network()
        optimizer = self.case.build(model, **self.options)
        if "loss module" in self.form:
            optimizer.attach(WithLoss(model))
        self.batches = samples(model, self.steps + 2)
        for x, y in self.batches[: self.steps]:
            drive(self.form, model, optimizer, x, y, Planted())
        self._origin = (model, optimizer)
        with _streams():
            twin, its_optimizer = self.fresh()
            torch.manual_seed(5)
            self._go_on(twin, its_optimizer)
            self._expected = everything(twin, its_optimizer)

    def _go_on(self, model: nn.Module, optimizer: Any) -> None:
        """The step that fails, and one more, unharmed."""
        for x, y in self.batches[self.steps :]:
            drive(self.form, model, optimizer, x, y, Planted())

    def fresh(self) -> tuple[nn.Module, Any]:
        """A copy of what is there."""
        model, optimizer = copy.deepcopy(self._origin)
        return model, optimizer

    def operations(self) -> int:
        """How many operations the next step runs before its descent."""
        planted = Planted()
        with _streams():
            drive(self.form, *self.fresh(), *self.batches[self.steps], planted)
        return planted.count

    def fail(self, at: int, error: type[BaseException]) -> str | None:
        """Fail in one operation.

        Returns:
            What was not as before; ``None`` if all was.
        """
        model, optimizer = self.fresh()
        torch.manual_seed(5)
        before, random = everything(model, optimizer), torch.get_rng_state()
        balance, steps = optimizer.balance, optimizer.steps
        try:
            drive(self.form, model, optimizer, *self.batches[self.steps], Planted(at, error))
        except error as raised:
            if "planted" not in str(raised):
                return f"another error: {raised}"
        else:
            # Where columns cannot be sent together, they are sent one by one: another order of the same sums.
            with _streams():
                for x, y in self.batches[self.steps + 1 :]:
                    drive(self.form, model, optimizer, x, y, Planted())
            pairs = zip(everything(model, optimizer), self._expected, strict=True)
            went_on = error is not KeyboardInterrupt and all(torch.allclose(a, b, 1e-9, 1e-10) for a, b in pairs)
            return None if went_on else "the error was swallowed"
        with _streams():
            if not same(before, everything(model, optimizer)):
                return "weights, buffers, state or the generator differ"
            if optimizer.balance is not balance or optimizer.steps != steps:
                return "the balance or the count of steps differs"
            if not torch.equal(random, torch.get_rng_state()):
                return "the random stream differs"
            self._go_on(model, optimizer)  # as if nothing had happened
        if not same(everything(model, optimizer), self._expected):
            return "the steps after it differ"
        return None


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Leave the global random stream alone."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)
