"""The table of rules: (operation, input slot) → the contraction of a parameter that stands there, and when it holds.

A rule covers a use if its shapes say that the samples can be told apart; which axis they lie along in fact is found out
later (:func:`ms_optim.curvature.graph.backprop.find_layouts`) and is an error if it is another one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import NoRuleError
from .layout import Layout
from .use import Use

if TYPE_CHECKING:
    from ..rules.contraction import Contraction

Rule = Callable[[Use, Layout], "Contraction"]
Predicate = Callable[[Use], bool]


@dataclass(frozen=True)
class Entry:
    """A rule and where it holds.

    Attributes:
        rule: From a use and the layout of its operation's output to the contraction.
        holds: Which real uses it holds for.
        broadcasts: Whether the operation broadcasts its inputs, so that an expansion before it can be left to it.
    """

    rule: Rule
    holds: Predicate
    broadcasts: bool

    def covers(self, use: Use) -> bool:
        """Whether the rule holds for a use; none does among complex numbers, whose conjugates it would have to take."""
        return not use.node._input_metadata[0].dtype.is_complex and self.holds(use)


_RULES: dict[tuple[str, int], Entry] = {}


def everywhere(use: Use) -> bool:
    """A rule without conditions."""
    return True


def on_rows(use: Use) -> bool:
    """The samples can lie along the first axis of the output."""
    shape = use.output_shape
    return len(shape) > 0 and shape[0] % use.samples == 0


def on_axis(use: Use) -> bool:
    """The samples can lie along the first or the second axis of the output."""
    shape = use.output_shape
    return on_rows(use) or (len(shape) > 1 and shape[1] == use.samples)


def on_broadcast(use: Use) -> bool:
    """What is used can be the same for all samples, after broadcasting to the output."""
    output = use.output_shape
    shape = (1,) * (len(output) - len(use.shape)) + use.shape
    rows = on_rows(use) and shape[0] == 1
    return rows or (len(output) > 1 and output[1] == use.samples and shape[1] == 1)


def curvature_rule(
    *places: tuple[str, int], covers: Predicate = everywhere, broadcasts: bool = False
) -> Callable[[Rule], Rule]:
    """Enter a rule for parameters that stand in the given (operation, input slot) places of autograd's graph.

    Args:
        *places: Operation as in :func:`ms_optim.curvature.graph.use.operation`, and slot.
        covers: Which of the uses there the rule holds for.
        broadcasts: Whether the operation broadcasts its inputs.

    Returns:
        The decorator; it returns the rule unchanged.
    """

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(places, Entry(rule, covers, broadcasts)))
        return rule

    return register


def has_rule(use: Use) -> bool:
    """Whether a registered rule covers this use."""
    entry = _RULES.get((use.operation, use.slot))
    return entry is not None and entry.covers(use)


def entry_at(operation: str, slot: int) -> Entry | None:
    """What the table says of a place, if anything."""
    return _RULES.get((operation, slot))


def rule_of(use: Use) -> Rule | None:
    """The rule that covers a use, if there is one."""
    return _RULES[use.operation, use.slot].rule if has_rule(use) else None


def require_rows(use: Use, layout: Layout) -> None:
    """Refuse samples along the second axis, where the operation has its channels.

    Args:
        use: The use.
        layout: Of the operation's output.

    Raises:
        NoRuleError: If that is where they are.
    """
    if layout.order == "sequence-first":
        raise misplaced(use, layout)


def misplaced(use: Use, layout: Layout) -> NoRuleError:
    """The error of a use whose samples turned out to lie where its rule cannot have them."""
    return NoRuleError(
        f"parameter {use.parameter} {use.shape} is used by {use.path} (input {use.slot}) on a tensor "
        f"{use.output_shape} that holds the {layout.samples} samples in {layout.order} order, which its curvature rule "
        "does not cover. Freeze the parameter (requires_grad_(False)) to leave it out"
    )
