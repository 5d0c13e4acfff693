"""Sharpness: measures that do not depend on how a network happens to be scaled, and those they are compared with."""

from .determinant import logdet_sharpness
from .eigenvalue import top_eigenvalue
from .minimum import minimum_sharpness
from .renyi import renyi_sharpness
from .riemannian import riemannian_sharpness
from .universal import Member, frobenius_sharpness, universal_sharpness
from .value import Sharpness

__all__ = [
    "Member",
    "Sharpness",
    "frobenius_sharpness",
    "logdet_sharpness",
    "minimum_sharpness",
    "renyi_sharpness",
    "riemannian_sharpness",
    "top_eigenvalue",
    "universal_sharpness",
]
