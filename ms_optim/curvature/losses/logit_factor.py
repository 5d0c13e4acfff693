r"""The logit factor S: the curvature of the loss in logit space, as columns that backpropagate.

For cross-entropy the Hessian in the logits o is P = diag(p) − p pᵀ with p = softmax(o); the labels do not enter.
Any S with S Sᵀ = P turns a trace of Gauss-Newton blocks into squared norms of backpropagated columns,

    Tr(Jᵀ P J) = ‖Sᵀ J‖²_F .

P has rank K − 1, and eliminating one class leaves a matrix of the same form on the others, so that its Cholesky factor
is known in closed form.  With the classes in any order and q_k = Σ_{j≥k} p_j,

    S_kk = √(p_k q_{k+1} / q_k) ,     S_jk = −(p_j / q_{k+1}) S_kk   (j > k) .

*Leading columns and one signed column.*  With ε_k = ±1 the single column Σ_{k≥r} ε_k S_k has the remaining columns'
S Sᵀ in expectation, and costs O(K) because its entries are a running sum.  r exact columns and that one are unbiased
for every r and need r + 1 backpropagations whatever K is.  The likeliest classes are eliminated first, in descending
order of p:

* the leading columns are then the large ones (a confident sample has next to nothing left after one or two);
* each column is a class against the mean of those behind it, as in a Helmert contrast, so that the columns that share
  the signed one are nearly orthogonal after backpropagation, and the error is in what is not.  Against the r largest of
  the K symmetric columns √p_k (e_k − p) the standard error is 1.1 to 3.5 times smaller.

*The tail.*  Any factor of what is left is as unbiased, and sorting 1000 classes takes longer than all the rest.  So
with many classes only the first h are ordered.  Behind them is q_h diag(u) (I − u uᵀ) diag(u) with u_j = √(p_j / q_h),
‖u‖ = 1, and the reflection H = I − v vᵀ / (1 + u_h), v = u + e_h, sends e_h to −u: the other columns of
√q_h diag(u) H are a factor, one for each class j behind the pivot h,

    S_jj = √p_j (1 − u_j² / (1 + u_h)) ,   S_ij = −√p_i u_i u_j / (1 + u_h)   (i > h) ,   S_hj = −√p_h u_j ,

whose signed sum needs neither an order nor a running sum.  It is as good where no class behind h is a large part of
q_h: with h = 14, against all classes in descending order, K = 1000 and r = 2, the standard error below the last layer
is larger by less than 1 % from uniform to confident p.  For the last layer alone, where Tr(Jᵀ P J) = |x|² Tr P and
columns in descending order are all but orthogonal, it is up to 4 times larger: 0.04 % of the trace and not 0.01 %
(256 samples).

*What is left.*  After the r likeliest classes are eliminated, what the other columns have to make up is the Schur
complement R^{(r)} = diag(p_{≥r}) − p_{≥r} p_{≥r}ᵀ / q_r, positive semidefinite with

    Tr R^{(r)} = q_r − Σ_{k≥r} p_k² / q_r = q_{r+1} ( 1 + p_r / q_r ) − Σ_{k>r} p_k² / q_r ,

the second form being free of cancellation: in descending order the subtrahend is at most half of q_{r+1}.

The probe and the columns in the order of the classes come from log p, where √p has a finite slope; the detached ones in
descending order from p, which is faster.  In both a tail of 10⁻³⁰ keeps its digits: q_k is summed from the far end, and
no product leaves the range of the type.

Source: arXiv 2106.12612, Prop. 1, for P; the factors are derived above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# exp(floor) is nothing beside the Σ p = 1 it stands in (1.8e-35, 1e-304), and 1/√(exp(floor)), which a signed column
# multiplies by at most exp(floor / 2), stays within the type with room for the slopes.
_LOG_FLOOR = {torch.float32: -80.0, torch.float64: -700.0}

# Up to so many classes all are sorted, which is then as fast as finding a few.
_SORTED_CLASSES = 128

# h, where more classes than that need no more leading columns.  With the pivot 15: the largest number that
# ``torch.topk`` still finds in 1000 without partitioning the others, four times as fast as 17.
_ORDERED_HEAD = 14

# Below, drawing them one by one costs less than the operations that unpack words.
_FEW_SIGNS = 8192

# The lowest bit of each byte of a word.
_LOW_BITS = 0x0101010101010101


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax, in float32 or better.

    Args:
        logits: ``[N, K]``.

    Returns:
        ``[N, K]``, differentiable.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide, dim=-1).clamp_min(_LOG_FLOOR[wide.dtype])


def coins(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Independent ±1 as int8, drawn and left where the generator lives.

    Args:
        shape: The shape to draw.
        generator: The source of randomness; the global streams are not touched.

    Returns:
        An int8 tensor of ±1.
    """
    count, device = math.prod(shape), generator.device
    if count < _FEW_SIGNS:
        return torch.randint(0, 2, shape, generator=generator, device=device, dtype=torch.int8).mul_(2).sub_(1)
    # A generated word is then 64 signs, and not one: 0.1 ms instead of 0.9 ms for 256 000 of them.
    words = torch.empty(-(-count // 64), 1, dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    bits = (words >> torch.arange(8, device=device)).bitwise_and_(_LOW_BITS).view(torch.int8)
    return bits.view(-1)[:count].view(shape).mul_(2).sub_(1)


def signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent ±1, drawn where the generator lives (so that every device sees the same) and moved.

    Args:
        shape: The shape to draw.
        like: A tensor with the dtype and device of the result.
        generator: The source of randomness; the global streams are not touched.

    Returns:
        A tensor of ±1.
    """
    return coins(shape, generator).to(device=like.device, dtype=like.dtype)


def cholesky_columns(log_p: Tensor, start: int, stop: int) -> Tensor:
    """Columns ``start … stop − 1`` of the Cholesky factor of diag(p) − p pᵀ, in the order of the classes.

    Args:
        log_p: ``[N, K]``.
        start: The first column.
        stop: One past the last, at most K − 1.

    Returns:
        ``[stop − start, N, K]``.
    """
    log_q = _log_tails(log_p)
    diagonal = _log_diagonal(log_p, log_q)[:, start:stop].exp()
    ratio = (log_p[:, None, :] - log_q[:, start + 1 : stop + 1, None]).clamp_max_(0.0).exp_()
    unit = ratio.neg_().triu_(start + 1)  # N k j: nothing for j < k
    unit.diagonal(start, 1, 2).fill_(1.0)
    return unit.mul_(diagonal[:, :, None]).transpose(0, 1)


def signed_column(log_p: Tensor, start: int, eps: Tensor) -> Tensor:
    """Σ_{k≥start} ε_k S_k for Cholesky columns S_k and given signs ε_k, differentiable in ``log_p``.

    Args:
        log_p: ``[N, K]``.
        start: The first column that takes part.
        eps: ±1, ``[..., N, K − 1 − start]``: any number of patterns of signs.

    Returns:
        ``[..., N, K]``.
    """
    log_q = _log_tails(log_p)
    half = _log_diagonal(log_p, log_q)[:, start:]
    # s_j = ε_j d_j − p_j Σ_{k<j} ε_k d_k / q_{k+1}
    running = (eps * (half - log_q[:, start + 1 :]).exp()).cumsum(-1)
    own = F.pad(eps * half.exp(), (start, 1))
    behind = F.pad(running, (start + 1, 0))
    return own - log_p.exp() * behind


def exact_columns(logits: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """S with S Sᵀ = P exactly, or some of its K − 1 columns.

    Args:
        logits: ``[N, K]``.
        start: The first column.
        stop: One past the last; ``None`` is K − 1.

    Returns:
        ``[stop − start, N, K]``, detached from the graph.
    """
    with torch.no_grad():
        last = logits.shape[-1] - 1 if stop is None else stop
        p = _probabilities(logits)
        # From the far end, so that small tails keep their digits, and wide, so that a thousand terms lose none.
        q = p.flip(-1).cumsum(-1, dtype=torch.float64).flip(-1)[:, start : last + 1].to(p.dtype)
        diagonal = p[:, start:last].sqrt().mul_((q[:, 1:] / q[:, :-1]).sqrt_())
        columns = (-diagonal / q[:, 1:])[:, :, None] * p[:, None]  # N k j
        columns.triu_(start + 1).diagonal(start, 1, 2).copy_(diagonal)
        return columns.transpose(0, 1)


def _probabilities(logits: Tensor) -> Tensor:
    """p in float32 or better, not below the floor: ``[N, K]``."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.softmax(wide, dim=-1).clamp_min_(math.exp(_LOG_FLOOR[wide.dtype]))


def leading_columns(logits: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Columns ``start … stop − 1`` of S where each sample eliminates its classes in descending order of probability.

    Args:
        logits: ``[N, K]``.
        start: The first column.
        stop: One past the last; ``None`` is K − 1, which makes S Sᵀ = P.

    Returns:
        ``[stop − start, N, K]``, detached; the last axis is in the order of the logits.
    """
    with torch.no_grad():
        last = logits.shape[-1] - 1
        return _Elimination.of(logits, 0, last).leading(start, last if stop is None else stop)


def split_columns(logits: Tensor, columns: int, eps: Tensor) -> tuple[Tensor, Tensor]:
    """The leading columns of each sample, and the signed sums of those behind them.

    Args:
        logits: ``[N, K]``.
        columns: r < K, the number of leading columns.
        eps: ±1, ``[probes, N, K − 1]``.  Where all classes are sorted sign k is that of column k, and else of class k,
            the last class having that of the pivot, which needs none: sorting signs would take as long as making them.

    Returns:
        ``[r, N, K]`` and ``[probes, N, K]``, detached.
    """
    with torch.no_grad():
        last = logits.shape[-1] - 1
        eps = eps.to(logits.device)
        if last < _SORTED_CLASSES:
            elimination = _Elimination.of(logits, columns, last)
            ordered, tail = eps[..., columns:], F.pad(eps, (0, 1))
        else:
            elimination = _Elimination.of(logits, columns, min(last, max(columns, _ORDERED_HEAD)))
            order = elimination.order.expand(len(eps), -1, -1)
            tail = torch.cat([eps, eps.gather(-1, order[..., -1:].clamp_max(last - 1))], -1)
            ordered = tail.gather(-1, order[..., columns:-1])
        return elimination.leading(0, columns), elimination.signed(columns, ordered, tail)


def remaining_traces(logits: Tensor) -> Tensor:
    """Σ_i Tr R_i^{(r)}, the trace that r leading columns leave out, for r = 0 … K − 1.

    Args:
        logits: ``[N, K]``.

    Returns:
        ``[K]`` in float64, from Σ_i Tr P_i down to 0.
    """
    with torch.no_grad():
        # exp(-2000) is 0: a far lower floor than that of the columns, so that saturated samples add nothing here.
        log_p, _ = torch.log_softmax(logits.double(), dim=-1).clamp_min(-2000.0).sort(dim=-1, descending=True)
        log_q, log_t = _log_tails(log_p), _log_tails(2 * log_p)
        share = (log_p - log_q)[:, :-1].exp() - (log_t[:, 1:] - log_q[:, :-1] - log_q[:, 1:]).exp()
        left = log_q[:, 1:].exp() * (1 + share)
        return F.pad(left.sum(0), (0, 1))


def sampled_columns(logits: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    """The ``columns`` leading columns of each sample exactly, and one signed column for the rest.

    Args:
        logits: ``[N, K]``.
        columns: r ≥ 0, the number of exact columns; from r = K − 2 on nothing is left to sample.
        generator: Draws the signs.

    Returns:
        ``[min(r + 1, K − 1), N, K]``, detached; E S Sᵀ = P over the signs.
    """
    samples, classes = logits.shape
    if columns >= classes - 2:
        return exact_columns(logits)
    return torch.cat(split_columns(logits, columns, coins((samples, classes - 1), generator)[None]))


def probe(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One signed column s with E s sᵀ = P, differentiable in the logits.

    Args:
        logits: ``[N, K]``, in the graph.
        generator: Draws the signs.

    Returns:
        ``[N, K]``, in the graph.
    """
    log_p, order = _descending(logits)
    eps = signs((logits.shape[0], logits.shape[1] - 1), log_p, generator)
    return _in_place(signed_column(log_p, 0, eps), order)


@dataclass(frozen=True)
class _Elimination:
    """The columns of each sample's h likeliest classes, and what is left of P behind them, in probabilities.

    Attributes:
        p: p, not below the floor, ``[N, K]``.
        root: √p, and 0 for the classes in ``order``, ``[N, K]``.
        order: The h likeliest classes in descending order and the pivot, ``[N, h + 1]``.
        head: p of those, ``[N, h + 1]``.
        last: q_h, ``[N, 1]``.
        diagonal: S_kk, ``[N, h]``.
        below: S_kk / q_{k+1}, so that S_jk = −p_j ``below``_k, ``[N, h]``.
    """

    p: Tensor
    root: Tensor
    order: Tensor
    head: Tensor
    last: Tensor
    diagonal: Tensor
    below: Tensor

    @classmethod
    def of(cls, logits: Tensor, leading: int, head: int) -> _Elimination:
        """Eliminate h = ``head`` classes, of which the first ``leading`` stand in the order of the classes in ties."""
        p = _probabilities(logits)
        order = _likeliest(p, leading, head + 1)
        first = p.gather(-1, order)
        root = p.sqrt().scatter_(-1, order, 0.0)
        behind = torch.linalg.vector_norm(root, dim=-1, keepdim=True).square_()
        q = first.flip(-1).cumsum(-1).flip(-1).add_(behind)  # from the far end: all terms are positive
        diagonal = first[:, :-1].sqrt().mul_((q[:, 1:] / q[:, :-1]).sqrt_())
        return cls(p, root, order, first, q[:, -1:], diagonal, diagonal / q[:, 1:])

    def leading(self, start: int, stop: int) -> Tensor:
        """Columns ``start … stop − 1`` of the h: ``[stop − start, N, K]``."""
        above = -self.below[:, start:stop]
        columns = above.T[:, :, None] * self.p
        # N k j, over the eliminated classes: nothing for j < k.
        places = (above[:, :, None] * self.head[:, None, :stop]).triu_(start + 1)
        places.diagonal(start, 1, 2).copy_(self.diagonal[:, start:stop])
        return columns.scatter_(-1, self.order[:, :stop].expand(len(columns), -1, -1), places.transpose(0, 1))

    def signed(self, start: int, ordered: Tensor, tail: Tensor) -> Tensor:
        """The signed sum of the columns from ``start`` on, ``[probes, N, K]``.

        Args:
            start: At most h.
            ordered: ±1 for the columns of ordered classes, ``[probes, N, h − start]``.
            tail: ±1 for each class behind the pivot, ``[probes, N, K]``; those of other classes do not matter.

        Returns:
            ``[probes, N, K]``.
        """
        running = (ordered * self.below[:, start:]).cumsum(-1)
        places = F.pad(ordered * self.diagonal[:, start:], (start, 1))
        places[..., start + 1 :].addcmul_(running, self.head[:, start + 1 :], value=-1.0)
        column = self.root * tail
        # The reflection: −p_j Σ_i √p_i ε_i / (q_h (1 + u_h)) for a class j behind the pivot, −u_h Σ_i √p_i ε_i for it.
        root, pivot = self.last.sqrt(), self.head[:, -1:].sqrt()
        total = column.sum(-1, keepdim=True) / root
        places[..., -1:].addcmul_(total, pivot, value=-1.0)
        factor = total / (root + pivot)
        if ordered.shape[-1]:
            factor += running[..., -1:]
        column.addcmul_(self.p, factor, value=-1.0)
        return column.scatter_(-1, self.order.expand(len(column), -1, -1), places)


def _likeliest(p: Tensor, leading: int, count: int) -> Tensor:
    """The likeliest classes in descending order; in ties the first ``leading`` are in the order of the classes.

    Args:
        p: ``[N, K]``, positive.
        leading: Fewer than ``count``.
        count: At most K.

    Returns:
        ``[N, count]``.
    """
    # Positive numbers have the order of their bits, which torch compares in half the time as it looks for no NaN.
    bits = p.view(torch.int64 if p.dtype == torch.float64 else torch.int32)
    # Elsewhere than on the CPU sorting is fast, and what ``topk`` makes of ties may depend on N.
    if p.shape[-1] <= _SORTED_CLASSES or p.device.type != "cpu":
        return bits.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    values, order = bits.topk(count, dim=-1)
    tied = (values[:, 1 : leading + 1] == values[:, :leading]).any(-1).nonzero()[:, 0]
    if len(tied):
        order[tied] = bits[tied].sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return order


def _descending(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log p in descending order, and the class at each place: ``[N, K]`` both."""
    log_p, order = log_probabilities(logits).sort(dim=-1, descending=True, stable=True)
    return log_p, order


def _in_place(columns: Tensor, order: Tensor) -> Tensor:
    """Columns ``[..., N, K]`` over places as columns over classes."""
    return torch.zeros_like(columns).scatter(-1, order.expand_as(columns), columns)


def _log_tails(log_p: Tensor) -> Tensor:
    """log q_k = log Σ_{j≥k} p_j, summed from the far end so that small tails keep their digits: ``[N, K]``.

    In float64, in whose range even the floors of log p are, a plain sum of positive terms loses nothing and takes half
    the time of ``logcumsumexp``.
    """
    return log_p.double().exp().flip(-1).cumsum(-1).flip(-1).log().to(log_p.dtype)


def _log_diagonal(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log S_kk = ½ (log p_k + log q_{k+1} − log q_k): ``[N, K − 1]``."""
    return 0.5 * (log_p[:, :-1] + log_q[:, 1:] - log_q[:, :-1])
