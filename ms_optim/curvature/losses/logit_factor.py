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

*The tail.*  With many classes only the first few are ordered (:mod:`~ms_optim.curvature.losses.elimination`): any
factor of what is left is as unbiased, and sorting 1000 classes takes longer than all the rest.

*What is left.*  After the r likeliest classes are eliminated, what the other columns have to make up is the Schur
complement R^{(r)} = diag(p_{≥r}) − p_{≥r} p_{≥r}ᵀ / q_r, positive semidefinite with

    Tr R^{(r)} = q_r − Σ_{k≥r} p_k² / q_r = q_{r+1} ( 1 + p_r / q_r ) − Σ_{k>r} p_k² / q_r ,

the second form being free of cancellation: in descending order the subtrahend is at most half of q_{r+1}.

The probe, which is differentiated, comes from log p, where √p has a finite slope; the detached columns from p, which
is faster.  In both a tail of 10⁻³⁰ keeps its digits: q_k is summed from the far end, and no product leaves the range of
the type.

Source: arXiv 2106.12612, Prop. 1, for P; the factors are derived above.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .elimination import Elimination
from .probabilities import SORTED_CLASSES, log_probabilities, probabilities

# h, where more classes than that need no more leading columns.  With the pivot 15: the largest number that
# ``torch.topk`` still finds in 1000 without partitioning the others, four times as fast as 17.
_ORDERED_HEAD = 14

# Below, drawing them one by one costs less than the operations that unpack words.
_FEW_SIGNS = 8192

# The lowest bit of each byte of a word.
_LOW_BITS = 0x0101010101010101


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
        p = probabilities(logits)
        # From the far end, so that small tails keep their digits, and wide, so that a thousand terms lose none.
        q = p.flip(-1).cumsum(-1, dtype=torch.float64).flip(-1)[:, start : last + 1].to(p.dtype)
        # (At least half of the smaller of p_k and q_{k+1}: nothing underflows.)
        diagonal = (q[:, 1:] / q[:, :-1]).mul_(p[:, start:last]).sqrt_()
        columns = (-diagonal / q[:, 1:])[:, :, None] * p[:, None]  # N k j
        columns.triu_(start + 1).diagonal(start, 1, 2).copy_(diagonal)
        return columns.transpose(0, 1)


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
        return Elimination.of(logits, 0, last).leading(start, last if stop is None else stop)


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
        if last < SORTED_CLASSES:
            elimination = Elimination.of(logits, columns, last)
            ordered, tail = eps[..., columns:], F.pad(eps, (0, 1))
        else:
            elimination = Elimination.of(logits, columns, min(last, max(columns, _ORDERED_HEAD)))
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
