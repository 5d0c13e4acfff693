"""Law: a function of a subject that returns if the subject keeps it, and says what it found if not.

A law stands in the table :data:`LAWS` under its own name; the first line of its docstring is the law in words.  Each
runs in float64 with seeds of its own, without a subject's warnings, and leaves the global random streams and the
default dtype as they were.
"""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import ConformanceError
from .subject import Subject

Law = Callable[[Subject], None]
ROUNDING = 1e-10  # of sums of numbers around 1 in float64, and far below what a step does
LAWS: dict[str, Law] = {}


class NotApplicable(Exception):  # noqa: N818 - it is no error
    """Raised by a law that has nothing to say about a subject, with the reason."""


def law(function: Law) -> Law:
    """Enter a law into the table.

    Args:
        function: The law.

    Returns:
        The law, undisturbed by and not disturbing what is global, and with the subject's exclusions.
    """
    name = function.__name__

    @functools.wraps(function)
    def undisturbed_law(subject: Subject) -> None:
        if name in subject.excluded:
            raise NotApplicable(subject.excluded[name])
        with undisturbed():
            function(subject)

    LAWS[name] = undisturbed_law
    return undisturbed_law


@contextmanager
def undisturbed() -> Iterator[None]:
    """Float64, seeds and no warnings inside; the global random streams and the default dtype as before afterwards."""
    stream, python, dtype = torch.get_rng_state(), random.getstate(), torch.get_default_dtype()
    try:
        torch.default_generator.manual_seed(0)
        random.seed(0)
        torch.set_default_dtype(torch.float64)
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_rng_state(stream)
        random.setstate(python)
        torch.set_default_dtype(dtype)


def applies(condition: bool, reason: str) -> None:
    """End a law that does not apply.

    Args:
        condition: Whether it does.
        reason: Why not.

    Raises:
        NotApplicable: If it does not.
    """
    if not condition:
        raise NotApplicable(reason)


def require(condition: bool, message: str) -> None:
    """End a law that is broken.

    Args:
        condition: Whether it is kept.
        message: Object, value, what was expected and what was found.

    Raises:
        ConformanceError: If it is not.
    """
    if not condition:
        raise ConformanceError(message)


def require_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str, otherwise: str) -> None:
    """Bit for bit.

    Args:
        found: By name.
        expected: By the same names.
        what: What they are, for the message.
        otherwise: What the expected ones are.

    Raises:
        ConformanceError: If one differs, with the name and the largest difference.
    """
    for name, tensor in expected.items():
        require(name in found, f"{what} {name} is gone; expected {otherwise}")
        if not torch.equal(found[name], tensor):
            difference = (found[name].double() - tensor.double()).abs().max().item()
            require(False, f"{what} {name} differs from {otherwise} by up to {difference:.3g}; expected the same bits")


def require_close(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str, otherwise: str, tolerance: float = ROUNDING
) -> None:
    """Up to rounding: a largest difference within ``tolerance`` of the largest entry.

    Args:
        found: By name.
        expected: By the same names.
        what: What they are, for the message.
        otherwise: What the expected ones are.
        tolerance: Relative to the largest entry of each.

    Raises:
        ConformanceError: If one differs by more, with the name and the largest difference.
    """
    for name, tensor in expected.items():
        difference = (found[name].double() - tensor.double()).abs().max().item()
        bound = tolerance * max(tensor.double().abs().max().item(), 1.0)
        require(
            difference <= bound,  # false for NaN
            f"{what} {name} differs from {otherwise} by up to {difference:.3g}; expected at most {bound:.1g}",
        )


def stepped(found: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> list[str]:
    """The names of those that have moved by more than rounding.

    Args:
        found: By name.
        before: By the same names.

    Returns:
        Names.
    """
    return [name for name, tensor in before.items() if not bool((found[name] - tensor).abs().max() <= ROUNDING)]


def moved(found: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> list[str]:
    """The names of those that are not bitwise what they were.

    Args:
        found: By name.
        before: By the same names.

    Returns:
        Names.
    """
    return [name for name, tensor in before.items() if not torch.equal(found[name], tensor)]
