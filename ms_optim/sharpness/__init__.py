"""Sharpness: measures, most of them unchanged by how a network happens to be scaled."""

from .adaptive import adaptive_sharpness, sam_sharpness
from .bn_invariant import bn_invariant_sharpness
from .fisher_rao import fisher_rao_norm
from .minimum import minimum_sharpness
from .normalized import normalized_sharpness
from .pac_bayes import pac_bayes_flatness

__all__ = [
    "adaptive_sharpness",
    "bn_invariant_sharpness",
    "fisher_rao_norm",
    "minimum_sharpness",
    "normalized_sharpness",
    "pac_bayes_flatness",
    "sam_sharpness",
]
