"""Curvature: exact per-layer traces of the loss Hessian, read off autograd's own graph."""

from .trace import LayerTraces, hessian_trace

__all__ = ["LayerTraces", "hessian_trace"]
