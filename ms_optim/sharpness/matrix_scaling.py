r"""Matrix scaling: the smallest sum of two matrices whose rows and columns are rescaled against each other.

    V(H, Q) = inf_{s1, s2 > 0}  Σ_ij H_ij s1_i s2_j + Q_ij / (s1_i s2_j) ,        H, Q ≥ 0 .

*Convex.*  In v = log s1 and u = log s2 it is a sum of exponentials.  The best v is known, e^{2 v_i} = b_i / a_i with
a = H e^u and b = Q e^{−u}, and leaves the convex function

    G(u) = 2 Σ_i √(a_i b_i) ,   ∂G/∂u_j = Σ_i P_ij − R_ij ,   P_ij = H_ij e^{v_i + u_j} ,   R_ij = Q_ij e^{−v_i − u_j} ,

with second derivatives diag(Cᵀ1) − Cᵀ diag(1/C1) C, C = P + R: the Laplacian of a weighted graph, whose only null
vector is u ∝ 1 (which s1 undoes).  At the minimum P and R have equal row sums and equal column sums.

*Method.*  Sweeps set v and u to their best values in turn (Sinkhorn's iteration, here for two matrices); they come
near from anywhere, and then slowly nearer.  Newton's method on G finishes, with a bound on the step because a sum of
exponentials is like its quadratic model only nearby.  The residual is max_j |Σ_i P_ij − R_ij| / Σ_i (P_ij + R_ij):
unchanged by every rescaling of rows and columns, hence as good for a column that holds 10⁻²⁰ of the sum.

*Zeros.*  A row without curvature has s1 → ∞, which costs nothing and makes its Q vanish; and so on wherever potentials
can drift apart.  Along a direction that never increases the sum, x_i = dv_i and y_j = −du_j satisfy x_i ≥ y_j where
Q_ij > 0 and x_i ≤ y_j where H_ij > 0.  These are edges i → j and j → i of a directed graph on rows and columns: within
a strongly connected component all potentials are equal, and an entry from one component to another can be sent to 0.
So V is the sum over components of the minimum within each, and there it is attained.

Source: derived here.  Newton's method with a bound for matrix scaling is Cohen, Madry, Tsipras, Vladu, arXiv 1704.02310
(from memory).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from torch import Tensor

# Sweeps before Newton: enough to come near where all entries are of a size.
_SWEEPS = 10

# Newton's steps; a guard, as ten are enough unless entries differ by tens of powers of ten.
_STEPS = 200

# The largest change of any u_j in one step, in natural logarithms.
_BOUND = 3.0

# Arrived; the step that is then taken squares it, down to rounding.
_RESIDUAL = 1e-12


@dataclass(frozen=True)
class Scaling:
    """The minimum, and how well it was reached.

    Attributes:
        value: V.
        residual: The largest relative difference of the column sums; 0 where the minimum is known in closed form.
        steps: Newton's steps.
    """

    value: float
    residual: float = 0.0
    steps: int = 0


def smallest_sum(h: Tensor, q: Tensor) -> Scaling:
    r"""V(H, Q) = inf over s1, s2 > 0 of Σ_ij H_ij s1_i s2_j + Q_ij / (s1_i s2_j).

    Args:
        h: H ≥ 0, ``[I, J]``, finite.
        q: Q ≥ 0, ``[I, J]``, finite.

    Returns:
        The infimum, computed in float64.

    >>> smallest_sum(torch.tensor([[4.0, 0.0]]), torch.tensor([[9.0, 1.0]])).value  # 2 √(4 · 9), and nothing
    12.0
    """
    h, q = h.detach().double(), q.detach().double()
    if min(h.shape) <= 1:  # each entry has a scale of its own
        return Scaling(float((2.0 * h.sqrt() * q.sqrt()).sum()))
    found = [_minimum(block_h, block_q) for block_h, block_q in _components(h, q)]
    return Scaling(
        value=sum(part.value for part in found),
        residual=max((part.residual for part in found), default=0.0),
        steps=max((part.steps for part in found), default=0),
    )


def _components(h: Tensor, q: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The blocks of rows and columns within which the minimum is attained; all other entries vanish."""
    curved, sized = h > 0, q > 0
    both = curved & sized
    if bool(both.all(1).any()) and bool(both.all(0).any()):  # a row and a column through which all are connected
        yield h, q
        return
    forth, back = sparse.csr_matrix(sized.cpu().numpy()), sparse.csr_matrix(curved.cpu().numpy().T)
    graph = sparse.bmat([[None, forth], [back, None]], format="csr")
    _, labels = connected_components(graph, directed=True, connection="strong")
    label = torch.from_numpy(labels).to(h.device)
    of_row, of_column = label[: h.shape[0]], label[h.shape[0] :]
    members = torch.bincount(of_row, minlength=int(label.max()) + 1)
    for component in torch.unique(of_column).tolist():
        if members[component] > 0:
            rows, columns = of_row == component, of_column == component
            yield h[rows][:, columns], q[rows][:, columns]


def _minimum(h: Tensor, q: Tensor) -> Scaling:
    """The minimum of one block, where it is attained."""
    if h.shape[0] < h.shape[1]:  # the longer side is eliminated
        h, q = h.T, q.T
    if h.shape[1] == 1:
        return Scaling(float((2.0 * h.sqrt() * q.sqrt()).sum()))
    unit_h, unit_q = h.max(), q.max()
    h, q = (h / unit_h).contiguous(), (q / unit_q).contiguous()
    point = _Point.at(h, q, torch.zeros_like(h[0]))
    for _ in range(_SWEEPS):
        point = _Point.at(h, q, point.u + point.sweep)
    best, steps = point, 0
    while steps < _STEPS:
        arrived = point.residual <= _RESIDUAL
        moved = _step(h, q, point)
        steps += 1
        if moved is None:
            break
        point = moved
        best = point if point.residual < best.residual else best
        if arrived:
            break
    return Scaling(float(best.value * unit_h.sqrt() * unit_q.sqrt()), best.residual, steps)


@dataclass(frozen=True)
class _Point:
    """G at u.

    Attributes:
        u: ``[J]``.
        v: The best for this u, ``[I]``.
        rows: Σ_j P_ij = Σ_j R_ij = √(a_i b_i), ``[I]``.
        up: Σ_i P_ij, ``[J]``.
        down: Σ_i R_ij, ``[J]``.
    """

    u: Tensor
    v: Tensor
    rows: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def at(cls, h: Tensor, q: Tensor, u: Tensor) -> _Point:
        """By four products of a matrix and a vector."""
        u = u - u.mean()  # s1 undoes it
        grown, shrunk = u.exp(), (-u).exp()
        a, b = h @ grown, q @ shrunk
        v = 0.5 * (b.log() - a.log())
        return cls(u, v, a.sqrt() * b.sqrt(), grown * (h.T @ v.exp()), shrunk * (q.T @ (-v).exp()))

    @property
    def value(self) -> Tensor:
        """G(u)."""
        return 2.0 * self.rows.sum()

    @property
    def gradient(self) -> Tensor:
        """∂G/∂u, ``[J]``."""
        return self.up - self.down

    @property
    def residual(self) -> float:
        """max_j |Σ_i P_ij − R_ij| / Σ_i (P_ij + R_ij)."""
        return float((self.gradient.abs() / (self.up + self.down)).max())

    @property
    def sweep(self) -> Tensor:
        """What takes every u_j to its best value at this v."""
        return 0.5 * (self.down.log() - self.up.log())


def _step(h: Tensor, q: Tensor, point: _Point) -> _Point | None:
    """A step of Newton's as long as it helps; ``None`` where none does."""
    direction = _direction(h, q, point)
    slope = float(point.gradient @ direction)
    if not slope < 0.0:
        return None
    length = min(1.0, _BOUND / float(direction.abs().max()))
    for _ in range(40):
        moved = _Point.at(h, q, point.u + length * direction)
        end = float(moved.gradient @ direction)
        # G is convex: while the slope has not turned it fell all the way. Past the minimum along the line both the
        # slope and G must have fallen, G up to its rounding.
        if end <= 0.0 or (end <= -0.5 * slope and bool(moved.value <= point.value * (1.0 + 1e-13))):
            return moved
        length *= 0.5
    return None


def _direction(h: Tensor, q: Tensor, point: _Point) -> Tensor:
    """Newton's direction; where the Laplacian is singular to rounding, that of a sweep, which also descends."""
    weights = point.up + point.down
    root = weights.sqrt()
    c = torch.exp(point.v[:, None] + point.u).mul_(h)
    c += torch.exp(-point.v[:, None] - point.u).mul_(q)
    k = c / (2.0 * point.rows).sqrt()[:, None] / root
    # I − Kᵀ K has the null vector √weights; with its projector added it is positive definite.
    null = root / torch.linalg.vector_norm(root)
    matrix = torch.eye(len(root), dtype=h.dtype, device=h.device) - k.T @ k + torch.outer(null, null)
    right = (-point.gradient / root)[:, None]
    for damping in (0.0, 1e-14, 1e-12, 1e-10):
        matrix.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not bool(failed):
            solution = torch.cholesky_solve(right, factor)[:, 0] / root
            if bool(torch.isfinite(solution).all()) and float(point.gradient @ solution) < 0.0:
                return solution
    return point.sweep
