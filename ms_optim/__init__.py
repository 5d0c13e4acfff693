"""Sharpness-aware training that does not depend on how a network happens to be scaled.

Symmetry      scale_symmetries, ScaleGroup; of single hidden units: neuron_symmetries, NeuronGroup
Curvature     hessian_trace, hessian_diagonal, LayerTraces, LayerDiagonals
Balancing     balance, rebalance_, Balance; of single hidden units: balance_neurons, NeuronBalance
Sharpness     minimum_sharpness; normalized_sharpness, renyi_sharpness, fisher_rao_norm, riemannian_sharpness,
              sam_sharpness, adaptive_sharpness, bn_invariant_sharpness, pac_bayes_flatness, trace_sharpness,
              frobenius_sharpness, logdet_sharpness, universal_sharpness with a Member, top_eigenvalue; Sharpness, the
              type of their values
Optimizers    MSSAM, MSRegularizedSGD; SAM, ASAM, SAMON; SAGM, StableSAM, GSAM, LookSAM, FriendlySAM, TiltedSAM; RSAM;
              TraceSAM, FrobSAM, DetSAM, UniversalSAM; RandomPerturbation; BAR, WEISSI; SharpnessAware
Checkup       doctor, Diagnosis, Finding: what goes wrong in a training loop without a word
Command line  ms-optim measure | symmetries | balance | doctor
Beside        ms_optim.testing (laws for any optimizer), ms_optim.integrations.timm, ms_optim.compat (davda54's SAM)
Errors        ms_optim.errors
"""

from . import errors
from .balancing import Balance, NeuronBalance, balance, balance_neurons, rebalance_
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
from .sharpness import (
    Member,
    Sharpness,
    adaptive_sharpness,
    bn_invariant_sharpness,
    fisher_rao_norm,
    frobenius_sharpness,
    logdet_sharpness,
    minimum_sharpness,
    normalized_sharpness,
    pac_bayes_flatness,
    renyi_sharpness,
    riemannian_sharpness,
    sam_sharpness,
    top_eigenvalue,
    trace_sharpness,
    universal_sharpness,
)
from .symmetry import NeuronGroup, ScaleGroup, neuron_symmetries, scale_symmetries

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
    "Member",
    "NeuronBalance",
    "NeuronGroup",
    "RandomPerturbation",
    "ScaleGroup",
    "Sharpness",
    "SharpnessAware",
    "StableSAM",
    "TiltedSAM",
    "TraceSAM",
    "UniversalSAM",
    "adaptive_sharpness",
    "balance",
    "balance_neurons",
    "bn_invariant_sharpness",
    "doctor",
    "errors",
    "fisher_rao_norm",
    "frobenius_sharpness",
    "hessian_diagonal",
    "hessian_trace",
    "logdet_sharpness",
    "minimum_sharpness",
    "neuron_symmetries",
    "normalized_sharpness",
    "pac_bayes_flatness",
    "rebalance_",
    "renyi_sharpness",
    "riemannian_sharpness",
    "sam_sharpness",
    "scale_symmetries",
    "top_eigenvalue",
    "trace_sharpness",
    "universal_sharpness",
]
