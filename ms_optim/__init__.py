"""Sharpness-aware training that does not depend on how a network happens to be scaled.

Symmetry      scale_symmetries, ScaleGroup
Curvature     hessian_trace, hessian_diagonal, LayerTraces, LayerDiagonals
Balancing     balance, rebalance_, Balance
Sharpness     minimum_sharpness, trace_sharpness, Sharpness
Optimizers    MSSAM, MSRegularizedSGD, SAM, ASAM, SharpnessAware
Checkup       doctor, Diagnosis, Finding: what goes wrong in a training loop without a word
Beside        ms_optim.testing (laws for any optimizer), ms_optim.integrations.timm, ms_optim.compat (davda54's SAM)
Command line  ms-optim, or python -m ms_optim: measure, symmetries, balance, doctor
Errors        ms_optim.errors
"""

from . import errors
from .balancing import Balance, balance, rebalance_
from .checkup import Diagnosis, Finding, doctor
from .curvature import LayerDiagonals, LayerTraces, hessian_diagonal, hessian_trace
from .optim import ASAM, MSSAM, SAM, MSRegularizedSGD, SharpnessAware
from .sharpness import Sharpness, minimum_sharpness, trace_sharpness
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
    "Sharpness",
    "SharpnessAware",
    "balance",
    "doctor",
    "errors",
    "hessian_diagonal",
    "hessian_trace",
    "minimum_sharpness",
    "rebalance_",
    "scale_symmetries",
    "trace_sharpness",
]
