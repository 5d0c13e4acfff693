"""Sharpness-aware training that does not depend on how a network happens to be scaled.

Symmetry      scale_symmetries, ScaleGroup
Curvature     hessian_trace, hessian_diagonal, LayerTraces, LayerDiagonals
Balancing     balance, rebalance_, Balance
Sharpness     minimum_sharpness, normalized_sharpness, sam_sharpness, adaptive_sharpness, bn_invariant_sharpness,
              fisher_rao_norm, pac_bayes_flatness
Optimizers    MSSAM, MSRegularizedSGD, SAM, ASAM, SharpnessAware
Checkup       doctor, Diagnosis, Finding: what goes wrong in a training loop without a word
Beside        ms_optim.testing (laws for any optimizer), ms_optim.integrations.timm, ms_optim.compat (davda54's SAM)
Errors        ms_optim.errors
"""

from . import errors
from .balancing import Balance, balance, rebalance_
from .checkup import Diagnosis, Finding, doctor
from .curvature import LayerDiagonals, LayerTraces, hessian_diagonal, hessian_trace
from .optim import ASAM, MSSAM, SAM, MSRegularizedSGD, SharpnessAware
from .sharpness import (
    adaptive_sharpness,
    bn_invariant_sharpness,
    fisher_rao_norm,
    minimum_sharpness,
    normalized_sharpness,
    pac_bayes_flatness,
    sam_sharpness,
)
from .symmetry import ScaleGroup, scale_symmetries

__version__ = "0.1.0"

__all__ = [
    "ASAM",
    "MSSAM",
    "SAM",
    "Balance",
    "Diagnosis",
    "Finding",
    "LayerDiagonals",
    "LayerTraces",
    "MSRegularizedSGD",
    "ScaleGroup",
    "SharpnessAware",
    "adaptive_sharpness",
    "balance",
    "bn_invariant_sharpness",
    "doctor",
    "errors",
    "fisher_rao_norm",
    "hessian_diagonal",
    "hessian_trace",
    "minimum_sharpness",
    "normalized_sharpness",
    "pac_bayes_flatness",
    "rebalance_",
    "sam_sharpness",
    "scale_symmetries",
]
