"""Curvature: exact traces and diagonals of the loss Hessian, layer by layer, read off autograd's own graph."""

from .diagonal import LayerDiagonals, hessian_diagonal
from .trace import LayerTraces, hessian_trace

__all__ = ["LayerDiagonals", "LayerTraces", "hessian_diagonal", "hessian_trace"]
