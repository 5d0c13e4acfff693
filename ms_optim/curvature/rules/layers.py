r"""Linear maps, and the way from a use to its contraction.

A rule is a function from (use, layout) to a :class:`~.contraction.Contraction`, entered in the table by
:func:`curvature_rule` under the operation and the input slot that the parameter takes.  It says how the operation's
input becomes U or x̂, and the table says which uses it covers.  The rules live with their kind of layer:

    layers        linear maps                      U is the input
    convolutions  convolutions, also transposed    U is the unfolded input, or δ is unfolded
    norms         normalisers                      x̂ is the normalised input
    products      element-wise operations          x̂ is the derivative in the parameter
    lookup        tables of rows                   g is a sum of δ over the positions that take a row

Source: arXiv 2106.12612, App. H (linear and convolution layers, by unfolding); the rest derived.
"""

from __future__ import annotations

from torch import Tensor

from ...errors import NoRuleError
from ..graph.layout import Layout
from ..graph.registry import curvature_rule, has_rule, misplaced, on_rows, require_rows, rule_of
from ..graph.use import Use
from . import convolutions, lookup, norms, products  # noqa: F401 - they enter their rules in the table
from .contraction import Contraction, wide
from .outer import Outer, PlainLinear
from .pullback import Pulled
from .reduction import Broadcast, Reduced

__all__ = ["contraction", "curvature_rule", "has_rule"]


def contraction(use: Use, layout: Layout) -> Contraction:
    """The contraction for one use of a parameter.

    Args:
        use: Where the parameter was used.
        layout: Where the samples are in the operation's output.

    Returns:
        Its contraction.

    Raises:
        NoRuleError: If no rule covers this use.
    """
    rule = rule_of(use)
    if rule is None:
        raise NoRuleError(
            f"parameter {use.parameter} {use.shape} is used by {use.path} (input {use.slot}) with an output "
            f"{use.output_shape}; no curvature rule covers it. Register one with "
            "ms_optim.curvature.rules.layers.curvature_rule, or freeze the parameter (requires_grad_(False)) to leave "
            "it out"
        )
    # One sample has all of every tensor, wherever many were found to lie in what may have been another operation.
    found = rule(use, layout if layout.samples > 1 else Layout(1))
    return found if use.derivation is None else Pulled(use, found)


def _plain(use: Use) -> bool:
    """The rows of the output may belong to samples, and an addmm has no factors of its own."""
    return on_rows(use) and (use.operation == "Mm" or use.node._saved_alpha == use.node._saved_beta == 1)


@curvature_rule(("Addmm", 2), ("Mm", 1), covers=_plain)
def linear_weight(use: Use, layout: Layout) -> Contraction:
    """X W or X Wᵀ: positions are the rows of X that belong to one sample."""
    require_rows(use, layout)
    node = use.node
    x = node._saved_mat1 if use.operation == "Addmm" else node._saved_self
    if x.shape[0] == layout.samples:
        return PlainLinear(use, layout, x, lambda: _over_positions(use, layout, x))
    return _over_positions(use, layout, x)


def _over_positions(use: Use, layout: Layout, x: Tensor) -> Outer:
    """The contraction of ``[N·T, I]`` with one position per row of a sample."""
    x = layout.front(x)  # n v i
    times, inputs = x.shape[1:]
    outputs = use.shape[0] if use.transposed else use.shape[1]

    def unfold(source: Tensor) -> Tensor:
        return source[:, None]

    def arrange(d: Tensor) -> Tensor:  # c n v o
        return wide(d.permute(1, 0, 3, 2).flatten(1, 2)[:, None])

    def shape(g: Tensor) -> Tensor:
        g = g.squeeze(-3)
        return g if use.transposed else g.transpose(-1, -2)

    return Outer(use, layout, x, unfold, arrange, sizes=(1, outputs, inputs, times), shape=shape)


@curvature_rule(("Addmm", 0), covers=_plain)
def linear_bias(use: Use, layout: Layout) -> Contraction:
    """The bias of X Wᵀ + b; one number for several outputs is broadcast along them too."""
    outputs = use.output_shape[1]
    return Reduced(use, layout, axes=(1,)) if use.shape == (outputs,) else Broadcast(use, layout)


def _grouped(use: Use) -> bool:
    """One matrix per group, and one row per sample in each."""
    return use.rearranged and use.output_shape[1] == use.samples


@curvature_rule(("Bmm", 1), covers=_grouped)
def grouped_weight(use: Use, layout: Layout) -> Contraction:
    """X_g W_g for every group g: the samples are the rows of X_g, ``[G, N, I]``."""
    layout = Layout(1, "sequence-first") if layout.samples == 1 else layout
    if layout.order != "sequence-first":
        raise misplaced(use, layout)
    groups, inputs, outputs = use.shape
    x = layout.front(use.node._saved_self)  # n g i

    def unfold(source: Tensor) -> Tensor:
        return source[:, :, None]

    def arrange(d: Tensor) -> Tensor:  # c n g o
        return wide(d.permute(1, 2, 0, 3).flatten(2, 3)[..., None])

    def shape(g: Tensor) -> Tensor:
        return g.transpose(-1, -2)

    return Outer(use, layout, x, unfold, arrange, sizes=(groups, outputs, inputs, 1), shape=shape)
