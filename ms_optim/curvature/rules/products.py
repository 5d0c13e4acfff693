r"""Element-wise operations between a parameter and an activation: sums, products, quotients, powers, slopes.

For out = f(p, x), entry by entry after broadcasting, g = Σ δ ⊙ ∂f/∂p over the axes along which p was broadcast.

    f          p + αx, x + αp    p·x   p/x    x/p      p + v·x·y   p, v·p·x   x^p        slope p          c ? p : x
    ∂f/∂p      1, α              x     1/x    −x/p²    1           v·x        x^p ln x   min(x, 0)        c

A parameter that is repeated for every sample (a class token, the weight of an instance norm) is the same with f = p.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..graph.layout import Layout
from ..graph.registry import curvature_rule, misplaced, on_broadcast
from ..graph.use import Use
from .contraction import Contraction, wide
from .reduction import Reduced, broadcast_axes


class Elementwise(Reduced):
    """g = δ ⊙ ∂f/∂p, summed over the axes along which p was broadcast, the samples' among them.

    Args:
        use: The use.
        layout: Of the operation's output.
        derivative: ∂f/∂p, of a shape that broadcasts to the output's; ``None`` for 1.

    Raises:
        NoRuleError: If the parameter has an axis along the samples.
    """

    def __init__(self, use: Use, layout: Layout, derivative: Tensor | float | None = None) -> None:
        output = use.output_shape
        lead = len(output) - len(use.shape)
        if layout.samples == 1 and len(output) > 1 and lead == 0 and use.shape[0] != 1:
            layout = Layout(1, "sequence-first")  # one sample is on every axis of length 1
        broadcast_axes(use, layout)
        # An axis of length 1 on both sides is as good as broadcast.
        axes = tuple(lead + axis for axis, size in enumerate(use.shape) if size != 1)
        factor: Tensor | Callable[[slice], Tensor] | None
        if isinstance(derivative, Tensor):
            factor = derivative.expand(output)
        elif derivative is None or derivative == 1:
            factor = None
        else:
            constant = torch.as_tensor(derivative)
            factor = lambda part: constant  # noqa: E731
        super().__init__(use, layout, axes, factor)

    def part_gradients(self, columns: Tensor, part: slice) -> Tensor:
        """See the base class; a number is a vector of length 1."""
        g = super().part_gradients(columns, part)
        return g if g.ndim > 2 else g[..., None]


@curvature_rule(
    *((name, slot) for name in ("Add", "Sub", "Rsub") for slot in (0, 1)), covers=on_broadcast, broadcasts=True
)
def added(use: Use, layout: Layout) -> Contraction:
    """Biases outside a linear map, positional embeddings: p + α x, p − α x, and the same with slots exchanged."""
    scaled = 0 if use.operation == "Rsub" else 1  # rsub(x, y) = y − α x
    if use.slot != scaled:
        return Elementwise(use, layout)
    alpha = use.node._saved_alpha
    return Elementwise(use, layout, alpha if use.operation == "Add" else -alpha)


@curvature_rule(("Expand", 0), covers=on_broadcast)
def expanded(use: Use, layout: Layout) -> Contraction:
    """A parameter repeated for every sample, such as a class token."""
    return Elementwise(use, layout)


@curvature_rule(("Mul", 0), ("Mul", 1), covers=on_broadcast, broadcasts=True)
def multiplied(use: Use, layout: Layout) -> Contraction:
    """Layer scales, gains of decomposed norms, temperatures."""
    return Elementwise(use, layout, use.node._saved_other if use.slot == 0 else use.node._saved_self)


def _true_division(use: Use) -> bool:
    """Not one that rounds, whose derivative is zero."""
    return on_broadcast(use) and getattr(use.node, "_saved_rounding_mode", None) is None


@curvature_rule(("Div", 0), ("Div", 1), covers=_true_division, broadcasts=True)
def divided(use: Use, layout: Layout) -> Contraction:
    """p / x, and x / p."""
    other = wide(use.node._saved_other)
    return Elementwise(use, layout, 1 / other if use.slot == 0 else -wide(use.node._saved_self) / other.square())


@curvature_rule(("Addcmul", 0), ("Addcmul", 1), ("Addcmul", 2), covers=on_broadcast, broadcasts=True)
def multiplied_and_added(use: Use, layout: Layout) -> Contraction:
    """p + v x y, and x + v p y."""
    if use.slot == 0:
        return Elementwise(use, layout)
    other = use.node._saved_tensor2 if use.slot == 1 else use.node._saved_tensor1
    return Elementwise(use, layout, wide(other) * use.node._saved_value)


@curvature_rule(("Lerp", 2), covers=on_broadcast, broadcasts=True)
def interpolated(use: Use, layout: Layout) -> Contraction:
    """x + p (y − x): a gate between two activations."""
    return Elementwise(use, layout, wide(use.node._saved_end) - wide(use.node._saved_self))


@curvature_rule(("Pow", 1), covers=on_broadcast, broadcasts=True)
def exponent(use: Use, layout: Layout) -> Contraction:
    """x^p, the exponent of a generalised mean."""
    base = wide(use.node._saved_self)
    return Elementwise(use, layout, torch.xlogy(wide(use.node._saved_result), base))  # 0 at x = 0, as autograd has it


@curvature_rule(("PreluKernel", 1), covers=on_broadcast, broadcasts=True)
def slope(use: Use, layout: Layout) -> Contraction:
    """The slope of a PReLU where its input is negative."""
    return Elementwise(use, layout, use.node._saved_self.clamp_max(0))


@curvature_rule(("Where", 0), ("Where", 1), covers=on_broadcast, broadcasts=True)
def chosen(use: Use, layout: Layout) -> Contraction:
    """A parameter in some places of a tensor, such as a mask token."""
    condition = use.node._saved_condition
    return Elementwise(use, layout, condition if use.slot == 0 else ~condition)


def _repeats_samples(use: Use) -> bool:
    """The parameter is repeated along the samples, N times or a multiple of it."""
    shape, repeats = _repetition(use)
    if len(shape) > 1 and shape[1] == 1 and repeats[1] == use.samples:
        return True
    return repeats[0] % use.samples == 0


def _repetition(use: Use) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The parameter's shape, filled up with ones in front, and how often each axis is repeated."""
    repeats = tuple(use.node._saved_repeats)
    return (1,) * (len(repeats) - len(use.shape)) + use.shape, repeats


class Repeated(Contraction):
    """g = δ summed over the copies of the parameter that one sample has."""

    def __init__(self, use: Use, layout: Layout) -> None:
        super().__init__(use, layout)
        shape, repeats = _repetition(use)
        first = repeats[0] * shape[0]
        if layout.order == "sequence-first":
            self.split = [(repeats[0], shape[0]), *zip(repeats[2:], shape[2:], strict=True)]
            fits = len(shape) > 1 and shape[1] == 1 and repeats[1] == layout.samples
        else:
            self.split = [(first // layout.samples // shape[0], shape[0]), *zip(repeats[1:], shape[1:], strict=True)]
            fits = repeats[0] % layout.samples == 0 and (layout.order == "sample-major" or shape[0] == 1)
        if not fits:
            raise misplaced(use, layout)

    def gradients(self, delta: Tensor) -> Tensor:
        """See the base class."""
        d = wide(self.layout.front(delta, lead=1))  # c n (r s) (r s) …
        d = d.reshape(*d.shape[:2], *(size for pair in self.split for size in pair))
        d = d.sum([2 + 2 * axis for axis in range(len(self.split))])
        return d.reshape(*d.shape[:2], *self.use.shape)


@curvature_rule(("Repeat", 0), covers=_repeats_samples)
def repeated(use: Use, layout: Layout) -> Contraction:
    """A parameter copied for every sample: the weight of an instance norm, an additional key."""
    return Repeated(use, layout)
