r"""Products of the curvature matrix of a network with vectors: the Hessian of the risk, or its Gauss-Newton matrix.

    hessian        H v = ∂/∂w ⟨∂L/∂w, v⟩                                    a backward pass through a backward pass
    gauss-newton   G v = (1/n) Σ_i J_iᵀ P_i J_i v ,   J v = ∂/∂u ⟨Jᵀ u, v⟩    the same for J v, and one more for Jᵀ

L is the risk (:mod:`~ms_optim.curvature.risk`), which reads labels; J = ∂o/∂w and P = ∂²ℓ/∂o² do not.  Both are those
of the network in evaluation mode.  Where logits are piecewise linear in a tensor its blocks of the two are equal;
blocks between tensors are not.

Vectors are rows of a matrix [m, d] in float64, flat over the parameters of a block in the model's order.  Products have
the precision of the parameters; sums over batches and all that is made of products is float64.

A product takes the time of 3 to 6 gradients of the risk (forward and backward pass over the data), and of 6 to 9 where
there are several batches: data of one batch keep their graph, while the others' is made again for every call, once for
all its vectors.  (LeNet and a small ResNet on one core of a CPU; less for a block without the lower layers.)

Source: Pearlmutter 1994 for H v; Schraudolph 2002 for G v.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..batch import Batch, batches
from . import risk as risks
from .evaluation import evaluation
from .losses.loss import Loss
from .losses.named_loss import loss_of
from .operator import Operator
from .parallel import unwrapped
from .reading import finite_logits
from .request import trainable

Matrix = Literal["hessian", "gauss-newton"]

# v -> M v, one tensor per parameter, for one batch.
Map = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Curvature(ABC):
    """A curvature matrix over data that were read once, of which blocks can be had.

    Attributes:
        parameters: Name → parameter, all that are trainable, in the model's order.
        products: The number of products so far.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.products = 0
        self._root: Tensor | None = None  # what one batch's graph ends in, where there is only one

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of batches."""

    @abstractmethod
    def roots(self) -> Iterator[Tensor]:
        """For each batch, what its graph ends in: its part of the loss, or its logits."""

    @abstractmethod
    def linear(self, root: Tensor, parameters: list[nn.Parameter]) -> Map:
        """One batch's part of the block's product."""

    def block(self, names: Sequence[str] | None = None) -> Operator:
        """The diagonal block of some parameters.

        Args:
            names: The parameters; ``None``: all.

        Returns:
            The operator, over the concatenation of these parameters in the order of the model.

        Raises:
            ValueError: If a name is no trainable parameter's, or there is none.
        """
        wanted = self.chosen(names)
        parameters = [self.parameters[name] for name in wanted]
        sizes = [p.numel() for p in parameters]
        device = parameters[0].device
        kept = [self.linear(root, parameters) for root in self._kept_roots()]

        def apply(vectors: Tensor) -> Tensor:
            self.products += len(vectors)
            total = torch.zeros_like(vectors)
            for linear in kept or (self.linear(root, parameters) for root in self.roots()):
                for row, vector in zip(total, vectors, strict=True):
                    parts = [v.view(p.shape).to(p) for v, p in zip(vector.split(sizes), parameters, strict=True)]
                    row += torch.cat([found.detach().flatten().to(row) for found in linear(parts)])
            return total

        rounding = max(torch.finfo(p.dtype).eps for p in parameters)
        return Operator(apply, sum(sizes), device, rounding)

    def chosen(self, names: Sequence[str] | None) -> tuple[str, ...]:
        """The names, in the order of the model.

        Args:
            names: The parameters; ``None``: all.

        Returns:
            Each once.

        Raises:
            ValueError: If a name is no trainable parameter's, or there is none.
        """
        if names is None:
            return tuple(self.parameters)
        if isinstance(names, str):
            raise ValueError(f"parameters={names!r} is one string; pass a list of names, [{names!r}]")
        unknown = [name for name in names if name not in self.parameters]
        if unknown or not names:
            what = f"holds {unknown[0]!r}, which is no trainable parameter" if unknown else "is empty"
            known = ", ".join(list(self.parameters)[:10]) + (" …" if len(self.parameters) > 10 else "")
            raise ValueError(f"parameters {what}; pass None for all, or some of {known}")
        return tuple(name for name in self.parameters if name in set(names))

    def close(self) -> None:
        """Let go of what was kept."""
        self._root = None

    def _kept_roots(self) -> list[Tensor]:
        """The one batch's, made once; none, where there are several."""
        if self.count != 1:
            return []
        if self._root is None:
            (self._root,) = self.roots()
        return [self._root]


class Hessian(Curvature):
    """The Hessian of the risk.

    Args:
        risk: The risk.
    """

    def __init__(self, risk: risks.Risk) -> None:
        super().__init__(risk.parameters)
        self.risk = risk

    @property
    def count(self) -> int:
        """The number of batches."""
        return len(self.risk.batches)

    def roots(self) -> Iterator[Tensor]:
        """The summands of L."""
        return self.risk.terms()

    def linear(self, root: Tensor, parameters: list[nn.Parameter]) -> Map:
        """v ↦ ∂/∂w ⟨∂L_b/∂w, v⟩."""
        first = torch.autograd.grad(root, parameters, create_graph=True, materialize_grads=True, allow_unused=True)
        curved = [index for index, grad in enumerate(first) if grad.requires_grad]

        def product(vector: Sequence[Tensor]) -> Sequence[Tensor]:
            if not curved:  # L is linear in all of them
                return [torch.zeros_like(p) for p in parameters]
            return torch.autograd.grad(
                [first[index] for index in curved],
                parameters,
                [vector[index] for index in curved],
                retain_graph=True,
                materialize_grads=True,
                allow_unused=True,
            )

        return product


class GaussNewton(Curvature):
    """The Gauss-Newton matrix.

    Args:
        model: The model.
        read: The inputs.
        loss: The loss, of which P.
    """

    def __init__(self, model: nn.Module, read: list[Batch], loss: Loss) -> None:
        super().__init__(trainable(model))
        risks.require_precise(self.parameters)
        device = next(iter(self.parameters.values())).device
        self.model, self.loss = model, loss
        self.batches = [batch.to(device).outside_inference() for batch in read]
        for index, batch in enumerate(self.batches):
            batch.check_finite(index)
        if self.count == 1:
            samples = len(self._kept_roots()[0])
        else:
            with torch.no_grad():
                samples = sum(len(finite_logits(b.logits(model), i, loss, False)) for i, b in enumerate(self.batches))
        self.share = 1.0 / samples if loss.mean else 1.0

    @property
    def count(self) -> int:
        """The number of batches."""
        return len(self.batches)

    def roots(self) -> Iterator[Tensor]:
        """The logits of each batch."""
        for index, batch in enumerate(self.batches):
            yield finite_logits(batch.logits(self.model), index, self.loss)

    def linear(self, root: Tensor, parameters: list[nn.Parameter]) -> Map:
        """v ↦ Jᵀ P J v / n: Jᵀ u is linear in u, so that its derivative in u, applied to v, is J v."""
        dual = torch.zeros_like(root, requires_grad=True)
        options: Any = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
        pulled = torch.autograd.grad(root, parameters, dual, create_graph=True, **options)
        moving = [index for index, grad in enumerate(pulled) if grad.requires_grad]
        logits = root.detach()

        def product(vector: Sequence[Tensor]) -> Sequence[Tensor]:
            if not moving:  # the logits depend on none of them
                return [torch.zeros_like(p) for p in parameters]
            pushed = [pulled[index] for index in moving]
            (tangent,) = torch.autograd.grad(pushed, dual, [vector[index] for index in moving], **options)
            column = self.share * self.loss.product(logits, tangent.detach())
            return torch.autograd.grad(root, parameters, column.to(root.dtype), **options)

        return product


@contextmanager
def curvature_of(model: nn.Module, data: Any, loss: risks.Loss, matrix: Matrix) -> Iterator[Curvature]:
    """Open the curvature matrix of a model over data; nothing is disturbed once it is closed.

    Args:
        model: The model; inside it is in evaluation mode, without dropout. Of a wrapper the module inside is taken.
        data: For the Hessian ``(inputs, targets)``, or an iterable of those (a DataLoader); for the Gauss-Newton matrix
            targets may be missing, as in :func:`ms_optim.hessian_trace`. Read once and kept.
        loss: ``"cross_entropy"``, ``"bce_with_logits"`` or ``"mse"``; for the Hessian any ``loss(logits, targets)``
        that
            returns the mean over its batch; for the Gauss-Newton matrix torch's modules for those names.
        matrix: ``"hessian"`` or ``"gauss-newton"``.

    Yields:
        The matrix, whose blocks are to be used inside only.

    Raises:
        CurvatureError: If no parameter is trainable, or the outputs are not in autograd's graph.
        DataError: If data is not batches, is empty, not finite, or lacks targets that are needed.
        UnsupportedError: If the loss is not supported, or a parameter is neither float32 nor float64.
        ValueError: If the matrix has another name.
    """
    if matrix not in ("hessian", "gauss-newton"):
        raise ValueError(f"matrix must be 'hessian' or 'gauss-newton', got {matrix!r}")
    model = unwrapped(model)
    with evaluation(model), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        curvature: Curvature
        if matrix == "hessian":
            curvature = Hessian(risks.read_risk(model, data, loss))
        else:
            named: Any = loss
            curvature = GaussNewton(model, list(batches(data, model)), loss_of(named))
        try:
            yield curvature
        finally:
            curvature.close()
