r"""Normalised sharpness: curvature against magnitude, after the best rescaling of every layer's rows and columns.

    NS = Σ_d min_{s1, s2 > 0} ⟨s1, DIAG[H_d] s2⟩ + ⟨s1^{−1}, W_d² s2^{−1}⟩

over the weight matrices W_d, squares and inverses entry by entry; of a convolution DIAG[H] and W² are first summed over
the positions of its kernel.  A neuron that is multiplied by a multiplies a row of one layer and divides a column of
the next; DIAG[H] moves against W², and s1, s2 undo both.  So the measure is unchanged by rescaling neurons one by one,
where minimum sharpness claims whole layers only.  It is not unchanged by what mixes neurons: a rotation between two
linear layers leaves the function, every trace and every norm as they are, but not the diagonal.

Biases and vectors (normalisers' γ and β) are left out, as in the paper.  DIAG[H] is exact (Gauss-Newton, where a layer
is not followed by piecewise linear operations alone), and the minimum is reached to rounding.

Source: Tsuzuku, Sato, Sugiyama, arXiv 1901.04653, in the form of arXiv 2106.12612, App. G, and its code.  Differs from
that code: (1) the minimum is found by Newton's method, where 10,000 steps of SGD stop short of it; (2) units without
curvature contribute their infimum, which is 0; (3) a grouped convolution counts as a matrix per group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..curvature import hessian_diagonal
from ..curvature.parallel import unwrapped
from ..errors import CurvatureError, UnsupportedError
from .matrix_scaling import smallest_sum
from .value import Sharpness

# The residual above which a value is said to be short of the minimum.
_REACHED = 1e-9


def normalized_sharpness(
    model: nn.Module,
    data: Any,
    columns: int | None = None,  # r: exact columns of S per sample; None: all
    form: str = "arxiv",
    *,
    loss: str | nn.Module = "cross_entropy",
) -> Sharpness:
    r"""Normalised sharpness, :math:`\sum_d \min_{s_1, s_2} s_1^\top D_d s_2 + s_1^{-\top} W_d^2 s_2^{-1}`, D = DIAG[H].

    Costs an exact diagonal (:func:`ms_optim.hessian_diagonal`), and then per layer with I × J channels a few Cholesky
    factorisations of size min(I, J), in float64.

    Args:
        model: Measured in evaluation mode, unchanged; its trainable parameters with two or more axes are the matrices.
        data: Inputs or batches, as in :func:`ms_optim.hessian_trace`.
        columns: ``None`` is exact; ``r`` samples the diagonals, and the minimum of noisy ones is biased downwards.
        form: ``"arxiv"``. The ICML paper's form has other values, and its text was not available.
        loss: As in :func:`ms_optim.hessian_diagonal`.

    Returns:
        The sum, in units of loss; ``layers`` holds its terms, and ``details`` the largest ``residual`` (relative
        difference of column sums that are equal at a minimum) and the number of Newton's ``steps``.

    Raises:
        CurvatureError: If the model has no trainable weight matrix, or as in :func:`ms_optim.hessian_diagonal`.
        DataError: As there.
        UnsupportedError: If ``form`` is another one, or as there.

    Source: arXiv 1901.04653; arXiv 2106.12612, App. G.
    """
    if form != "arxiv":
        raise UnsupportedError(
            f"form={form!r} is not known; pass form='arxiv', the form of arXiv 1901.04653 (the text of the ICML form, "
            "which has other values, was not available)"
        )
    model = unwrapped(model)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad and p.ndim >= 2}
    if not weights:
        raise CurvatureError(
            f"{type(model).__name__} has no trainable parameter with two or more axes, and normalised sharpness is a "
            "sum over weight matrices; pass a model with linear or convolutional layers"
        )
    groups = {id(m.weight): m.groups for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)}
    diagonals = hessian_diagonal(model, data, columns, loss)
    layers: dict[str, float] = {}
    residual, steps = 0.0, 0
    for name, weight in weights.items():
        count = groups.get(id(weight), 1)
        squares = weight.detach().double().square()
        pairs = zip(_matrices(diagonals[name], count), _matrices(squares, count), strict=True)
        found = [smallest_sum(h, q) for h, q in pairs]
        layers[name] = sum(part.value for part in found)
        residual = max(residual, *(part.residual for part in found))
        steps = max(steps, *(part.steps for part in found))
    notes = []
    smooth = [name for name in layers if diagonals.kind.get(name) != "hessian"]
    if smooth:
        notes.append(f"Gauss-Newton diagonals, which are not the Hessian's, of {', '.join(smooth)}")
    if columns is not None:
        notes.append(f"diagonals sampled with {columns} columns: the minimum is biased downwards")
    if residual > _REACHED:
        notes.append(f"the minimum was not reached: the residual is {residual:.1e}, and the value above the minimum")
    return Sharpness(
        sum(layers.values()), layers=layers, notes=notes, details={"residual": residual, "steps": float(steps)}
    )


def _matrices(entries: Tensor, groups: int) -> Iterator[Tensor]:
    """A tensor shaped as a weight as matrices of channels, one per group, summed over the positions of a kernel."""
    wide = entries.double()
    yield from (wide.flatten(2).sum(2) if wide.ndim > 2 else wide).chunk(groups)
