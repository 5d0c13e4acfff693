"""Sharpness: measures that do not depend on how a network happens to be scaled, and those they are compared with."""

from .adaptive import adaptive_sharpness, sam_sharpness
from .bn_invariant import bn_invariant_sharpness
from .determinant import logdet_sharpness
from .eigenvalue import top_eigenvalue
from .fisher_rao import fisher_rao_norm
from .minimum import minimum_sharpness
from .normalized import normalized_sharpness
from .pac_bayes import pac_bayes_flatness
from .renyi import renyi_sharpness
from .riemannian import riemannian_sharpness
from .trace import trace_sharpness
from .universal import Member, frobenius_sharpness, universal_sharpness
from .value import Sharpness

__all__ = [
    "Member",
    "Sharpness",
    "adaptive_sharpness",
    "bn_invariant_sharpness",
    "fisher_rao_norm",
    "frobenius_sharpness",
    "logdet_sharpness",
    "minimum_sharpness",
    "normalized_sharpness",
    "pac_bayes_flatness",
    "renyi_sharpness",
    "riemannian_sharpness",
    "sam_sharpness",
    "top_eigenvalue",
    "trace_sharpness",
    "universal_sharpness",
]
