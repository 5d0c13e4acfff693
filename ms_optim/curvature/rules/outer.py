r"""Outer products: the weights of linear maps, g_oi = Σ_v δ_ov U_vi.

With one position, ‖g‖² = ‖δ‖² ‖x‖².  With more, ‖g‖² is computed directly, V·I·O operations a column, or for all C
columns together through the Gram matrices ⟨U Uᵀ, Σ_c δ_cᵀδ_c⟩, V²(I + C·O), whichever is cheaper.

Source: arXiv 2106.12612, App. H, for g; the Gram form is our own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..graph.layout import Layout
from ..graph.lift import Lift, Pooled
from ..graph.use import Use
from . import contraction
from .contraction import Accumulator, Contraction, Piece, RowNorms, Running, row_squares, slices, square_sum, wide

# With so many rows a product with a sample's U is efficient; to put columns together for more costs what it saves.
_ROWS = 128


class PlainLinear(Contraction):
    """g_oi = δ_o x_i: one position, so that ‖g‖² = ‖δ‖² ‖x‖².

    Args:
        use: The use.
        layout: Of the rows.
        x: The input ``[N, I]``.
        as_outer: Gives the same as an :class:`Outer` with one position, to be joined with other uses.
    """

    def __init__(self, use: Use, layout: Layout, x: Tensor, as_outer: Callable[[], Outer] | None = None) -> None:
        super().__init__(use, layout)
        self.x, self.as_outer = x, as_outer

    def input_squares(self) -> Tensor:
        """‖x_n‖², ``[N]``."""
        return torch.linalg.vector_norm(wide(self.x), dim=-1).square()

    def trace(self, columns: int) -> Accumulator:
        """See the base class."""
        return RowNorms(self.input_squares)

    def diagonal(self, columns: int) -> Accumulator:
        """See the base class."""
        return _PlainLinearDiagonal(self)

    def squared_norm(self, delta: Tensor) -> Tensor:
        """See the base class."""
        return torch.dot(torch.linalg.vector_norm(wide(delta), dim=-1).square().sum(0), self.input_squares())

    def gradients(self, delta: Tensor) -> Tensor:
        """See the base class."""
        order = "cno,ni->cnoi" if self.use.transposed else "cno,ni->cnio"
        return torch.einsum(order, wide(delta), wide(self.x))

    def temporary_bytes(self, item: int) -> int:
        """See the base class."""
        return 0


class _PlainLinearDiagonal(Accumulator):
    """Σ_n (Σ_c δ_cno²) x_ni²: one matrix product in the end."""

    def __init__(self, rule: PlainLinear) -> None:
        self.rule = rule
        self.total: Tensor | None = None

    def add(self, piece: Piece) -> None:
        """See the base class."""
        for column in wide(piece.delta):
            self.total = column.square() if self.total is None else self.total.addcmul_(column, column)

    def result(self) -> Tensor:
        """See the base class."""
        assert self.total is not None
        squares = self.total.t() @ wide(self.rule.x).square()
        return squares if self.rule.use.transposed else squares.t()


class Outer(Contraction):
    """g_goi = Σ_v δ_gov U_gvi.

    Args:
        use: The use.
        layout: Of the operation's output.
        source: What U is made of, ``[N, …]``.
        unfold: Gives U as ``[n, G, V, I]`` for some samples of the source.
        arrange: Gives δ as ``[n, G, c·O, V]`` for the columns ``[c, n, T, …]`` of the same samples, in float32 or
            better.
        sizes: (G, O, I, V).
        shape: Gives g of the parameter's shape from ``[…, G, O, I]``, for a parameter laid out in another way.
        plane: Whether v runs over the plane of the operation's output ``[N, G·O, H, W]``.
    """

    def __init__(
        self,
        use: Use,
        layout: Layout,
        source: Tensor,
        unfold: Callable[[Tensor], Tensor],
        arrange: Callable[[Tensor], Tensor],
        sizes: tuple[int, int, int, int],
        shape: Callable[[Tensor], Tensor] | None = None,
        plane: bool = False,
    ) -> None:
        super().__init__(use, layout)
        self.plane = plane
        self.source, self.unfold, self.arrange, self.sizes = source, unfold, arrange, sizes
        self.shape = shape or (lambda g: g.reshape(*g.shape[:-3], *use.shape))

    def prefers_gram(self, columns: int) -> bool:
        """Whether the Gram matrices take fewer operations than the direct product."""
        _, o, i, v = self.sizes
        return v * (i + o * columns) < i * o * columns

    def trace(self, columns: int) -> Accumulator:
        """See the base class."""
        return _GramTrace(self) if self.prefers_gram(columns) else _OuterDirect(self, columns, entries=False)

    def diagonal(self, columns: int) -> Accumulator:
        """See the base class."""
        return _OuterDirect(self, columns, entries=True)

    def squared_norm(self, delta: Tensor) -> Tensor:
        """See the base class."""
        norm: Tensor = _OuterNorm.apply(self.source, delta, self)
        return norm

    def norm_of(self, source: Tensor, delta: Tensor) -> Tensor:
        """Σ_cn ‖g_cn‖² of some samples, in one go.

        Args:
            source: Those samples of the source.
            delta: Their columns, ``[c, n, T, …]``.

        Returns:
            A scalar.
        """
        u, d = wide(self.unfold(source)), self.arrange(delta)
        if not self.prefers_gram(delta.shape[0]):
            return square_sum(d @ u)
        return torch.dot((u @ u.transpose(-1, -2)).reshape(-1), (d.transpose(-1, -2) @ d).reshape(-1))

    def parts(self, columns: int) -> Iterator[slice]:
        """Slices of the samples whose temporaries fit in the chunk."""
        groups, o, i, v = self.sizes
        floats = groups * (v * i + columns * o * (v + i))
        return slices(self.samples, floats * max(4, self.source.element_size()))

    def gradients(self, delta: Tensor) -> Tensor:
        """See the base class."""
        d = self.arrange(self.layout.front(delta, lead=1)).unflatten(2, (delta.shape[0], -1))  # n g c o v
        return self.shape(torch.einsum("ngcov,ngvi->cngoi", d, wide(self.unfold(self.source))))

    def keeps_input(self, columns: int) -> bool:
        """Whether U is no larger than δ of all columns, so that it is U that the direct route keeps."""
        _, o, i, _ = self.sizes
        return i <= columns * o

    def kept_bytes(self, columns: int, item: int) -> int:
        """See the base class."""
        groups, o, i, v = self.sizes
        return groups * v * max(4, item) * (v if self.prefers_gram(columns) else min(i, columns * o))

    def temporary_bytes(self, item: int) -> int:
        """See the base class."""
        groups, o, i, v = self.sizes
        item = max(4, item)
        dense = groups * item * (v * i + o * v + o * i)
        if not self.plane:
            return dense
        # Over the windows of a pooling U is there twice, and then what is gathered of it.
        return dense + groups * item * v * i + min(contraction._CHUNK_BYTES, groups * item * o * v * i)


class _GramTrace(Accumulator):
    """⟨U Uᵀ, Σ_c δ_cᵀδ_c⟩: one V×V matrix per sample and group between the columns."""

    def __init__(self, rule: Outer) -> None:
        self.rule = rule
        self.gram: Tensor | None = None

    def add(self, piece: Piece) -> None:
        """See the base class."""
        rule = self.rule
        columns = rule.layout.front(piece.delta, lead=1)
        if self.gram is None:
            d = rule.arrange(columns[:, :1])
            self.gram = d.new_zeros(rule.samples, d.shape[1], d.shape[3], d.shape[3])
        for part in rule.parts(piece.delta.shape[0]):
            d = rule.arrange(columns[:, part]).flatten(0, 1)
            self.gram[part].flatten(0, 1).baddbmm_(d.transpose(-1, -2), d)

    def result(self) -> Tensor:
        """See the base class."""
        assert self.gram is not None
        found = []
        for part in self.rule.parts(1):
            u = wide(self.rule.unfold(self.rule.source[part]))
            found.append(torch.linalg.vecdot((u @ u.transpose(-1, -2)).flatten(1), self.gram[part].flatten(1)))
        return torch.cat(found)


class _OuterDirect(Accumulator):
    """g itself for a slice of the samples at a time; keeps U or δ between the columns, whichever is smaller."""

    def __init__(self, rule: Outer, columns: int, entries: bool) -> None:
        self.rule, self.columns, self.entries = rule, columns, entries
        self.inputs: list[tuple[slice, Tensor]] | None = None
        self.keeps_input = rule.keeps_input(columns)
        self.deltas: list[Tensor] = []
        self.pooled: list[Pooled] = []
        self.squares = Running(inplace=entries)

    def prefers(self, lift: Lift) -> bool:
        """A sum over the winners of windows, where it is so much shorter that gathering U there is worth it.

        To copy a number of U costs about as much as to multiply six columns by it, and small products half as much
        again as large ones; with few inputs, or more than a cache holds, more than is saved. On a GPU neither has been
        measured.
        """
        rule = self.rule
        groups, outputs, inputs, _ = rule.sizes
        chosen = groups * outputs * lift.windows * inputs
        if not rule.plane or rule.source.is_cuda or inputs < 16 or 4 * chosen > contraction._CHUNK_BYTES:
            return False
        gathers = -(-self.columns // self._brackets_together(lift))
        return lift.windows * (1.5 * self.columns + 6 * gathers) < lift.places * self.columns

    def _brackets_together(self, lift: Lift) -> int:
        """How many columns are kept for one gathering: no more than are as large as U."""
        _, outputs, inputs, positions = self.rule.sizes
        return max(1, positions * inputs // (outputs * lift.windows))

    def add(self, piece: Piece) -> None:
        """See the base class."""
        if piece.pooled is not None and self.prefers(piece.pooled.lift):
            self.pooled.append(piece.pooled)
            if len(self.pooled) >= self._brackets_together(piece.pooled.lift):
                self._contract_pooled()
            return
        columns = self.rule.layout.front(piece.delta, lead=1)
        if not self.keeps_input:
            self.deltas.append(columns)
            return
        if self.inputs is None:
            self.inputs = list(self._inputs(len(columns)))
        self._contract([columns], self.inputs)

    def result(self) -> Tensor:
        """See the base class."""
        if self.pooled:
            self._contract_pooled()
        if self.deltas:
            self._contract(self.deltas, self._inputs(sum(len(delta) for delta in self.deltas)))
        return self.rule.shape(self.squares.total) if self.entries else self.squares.total

    def _inputs(self, columns: int) -> Iterator[tuple[slice, Tensor]]:
        """U, slice by slice."""
        for part in self.rule.parts(columns):
            yield part, wide(self.rule.unfold(self.rule.source[part]))

    def _contract(self, columns: Sequence[Tensor], inputs: Iterable[tuple[slice, Tensor]]) -> None:
        """Add Σ g² of columns ``[c, N, T, …]``, per sample ``[n]`` or per entry ``[G, O, I]``."""
        outputs, found = self.rule.sizes[1], []
        for part, u in inputs:
            squares = []
            for some in _with_rows(columns, -(-_ROWS // outputs)):
                each = [self.rule.arrange(piece[:, part]) for piece in some]
                d = torch.cat(each, dim=2) if len(each) > 1 else each[0]
                # The product with the longer side first, which is up to a third faster.
                wide_input = not self.entries and u.shape[-1] > d.shape[-2]
                g = (u.transpose(-1, -2) @ d.transpose(-1, -2)).transpose(-1, -2) if wide_input else d @ u
                if self.entries:
                    g = g.unflatten(2, (-1, outputs))
                    squares.append(torch.einsum("ngcoi,ngcoi->goi", g, g))
                elif wide_input:
                    squares.append(row_squares(g.transpose(-1, -2)))
                else:
                    squares.append(row_squares(g))
            total = torch.stack(squares).sum(0) if len(squares) > 1 else squares[0]
            if self.entries:
                self.squares.add(total)
            else:
                found.append(total)
        if not self.entries:
            self.squares.add(torch.cat(found) if len(found) > 1 else found[0])

    def _contract_pooled(self) -> None:
        """Add Σ g² of the columns by their brackets: each output channel meets U at the winners of its windows."""
        rule, lift, found = self.rule, self.pooled[0].lift, []
        groups, outputs, inputs, positions = rule.sizes
        brackets = torch.cat([pooled.bracket for pooled in self.pooled]).flatten(3)  # c n go p
        self.pooled = []
        count, _, channels, windows = brackets.shape
        floats = 2 * groups * positions * inputs + channels * windows * (inputs + 2 + count) + channels * count * inputs
        for part in slices(rule.samples, floats * max(4, rule.source.element_size())):
            u = wide(rule.unfold(rule.source[part])).contiguous()  # n g v i
            group = torch.arange(len(u) * groups, device=u.device).view(-1, groups, 1, 1)
            places = lift.winners[part].unflatten(1, (groups, outputs)) + group * positions  # n g o p
            chosen = u.view(-1, inputs).index_select(0, places.flatten()).view(-1, windows, inputs)
            g = wide(brackets[:, part]).permute(1, 2, 0, 3).flatten(0, 1) @ chosen  # (n g o) c i
            if self.entries:
                g = g.view(len(u), groups, outputs, count, inputs)
                self.squares.add(torch.einsum("ngoci,ngoci->goi", g, g))
            else:
                found.append(row_squares(g.view(len(u), -1)))
        if not self.entries:
            self.squares.add(torch.cat(found))


def _with_rows(columns: Sequence[Tensor], enough: int) -> Iterator[list[Tensor]]:
    """Pieces of columns put together until there are ``enough`` columns for an efficient matrix product."""
    some: list[Tensor] = []
    for piece in columns:
        some.append(piece)
        if sum(map(len, some)) >= enough:
            yield some
            some = []
    if some:
        yield some


class _OuterNorm(torch.autograd.Function):
    """Σ_cn ‖g_cn‖² with a derivative that goes through the samples in the same small parts.

    Left to autograd, every part's unfolded input would be kept, and every slice of the source would cost a gradient of
    the size of the whole: time quadratic in the batch.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, delta: Tensor, outer: Outer) -> Tensor:
        """Keep the input and δ only."""
        ctx.save_for_backward(source, delta)
        ctx.outer = outer
        columns = outer.layout.front(delta, lead=1)
        parts = outer.parts(delta.shape[0])
        return torch.stack([outer.norm_of(source[part], columns[:, part]) for part in parts]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Make each part again and differentiate it."""
        source, delta = ctx.saved_tensors
        outer = ctx.outer
        by_source, by_delta = torch.empty_like(source), torch.empty_like(delta)
        columns, by_columns = outer.layout.front(delta, lead=1), outer.layout.front(by_delta, lead=1)
        for part in outer.parts(delta.shape[0]):
            with torch.enable_grad():
                inputs = source[part].detach().requires_grad_(), columns[:, part].detach().requires_grad_()
                term = outer.norm_of(*inputs)
            by_source[part], by_columns[:, part] = torch.autograd.grad(term, inputs, grad.to(term.dtype))
        return by_source, by_delta, None
