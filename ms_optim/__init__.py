"""Sharpness-aware training that does not depend on how a network happens to be scaled.

Symmetry      scale_symmetries, ScaleGroup
Curvature     hessian_trace, hessian_diagonal, LayerTraces, LayerDiagonals
Balancing     balance, rebalance_, Balance
Sharpness     minimum_sharpness
Optimizers    MSSAM, MSRegularizedSGD; SAM, ASAM, SAMON; SAGM, StableSAM, GSAM, LookSAM, FriendlySAM, TiltedSAM; RSAM;
              TraceSAM, FrobSAM, DetSAM, UniversalSAM; RandomPerturbation; BAR, WEISSI; SharpnessAware
Checkup       doctor, Diagnosis, Finding: what goes wrong in a training loop without a word
Beside        ms_optim.testing (laws for any optimizer), ms_optim.integrations.timm, ms_optim.compat (davda54's SAM)
Errors        ms_optim.errors
"""

from . import errors
from .balancing import Balance, balance, rebalance_
from .checkup import Diagnosis, Finding, doctor
from .curvature import LayerDiagonals, LayerTraces, hessian_diagonal, hessian_trace
from .optim import (
    ASAM,
    BAR,
    GSAM,
    MSSAM,
    RSAM,
    SAGM,
    SAM,
    SAMON,
    WEISSI,
    DetSAM,
    FriendlySAM,
    FrobSAM,
    LookSAM,
    MSRegularizedSGD,
    RandomPerturbation,
    SharpnessAware,
    StableSAM,
    TiltedSAM,
    TraceSAM,
    UniversalSAM,
)
from .sharpness import minimum_sharpness
from .symmetry import ScaleGroup, scale_symmetries

__version__ = "0.1.0"

__all__ = [
    "ASAM",
    "BAR",
    "GSAM",
    "MSSAM",
    "RSAM",
    "SAGM",
    "SAM",
    "SAMON",
    "WEISSI",
    "Balance",
    "DetSAM",
    "Diagnosis",
    "Finding",
    "FriendlySAM",
    "FrobSAM",
    "LayerDiagonals",
    "LayerTraces",
    "LookSAM",
    "MSRegularizedSGD",
    "RandomPerturbation",
    "ScaleGroup",
    "SharpnessAware",
    "StableSAM",
    "TiltedSAM",
    "TraceSAM",
    "UniversalSAM",
    "balance",
    "doctor",
    "errors",
    "hessian_diagonal",
    "hessian_trace",
    "minimum_sharpness",
    "rebalance_",
    "scale_symmetries",
]
