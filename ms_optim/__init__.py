"""Sharpness-aware training that does not depend on how a network happens to be scaled.

Symmetry      scale_symmetries, ScaleGroup; of single hidden units: neuron_symmetries, NeuronGroup
Curvature     hessian_trace, hessian_diagonal, LayerTraces, LayerDiagonals
Balancing     balance, rebalance_, Balance; of single hidden units: balance_neurons, NeuronBalance
Sharpness     minimum_sharpness, Sharpness
Optimizers    MSSAM, MSRegularizedSGD, SAM, ASAM, SharpnessAware
Checkup       doctor, Diagnosis, Finding: what goes wrong in a training loop without a word
Beside        ms_optim.testing (laws for any optimizer), ms_optim.integrations.timm, ms_optim.compat (davda54's SAM)
Errors        ms_optim.errors
"""

from . import errors
from .balancing import Balance, NeuronBalance, balance, balance_neurons, rebalance_
from .checkup import Diagnosis, Finding, doctor
from .curvature import LayerDiagonals, LayerTraces, hessian_diagonal, hessian_trace
from .optim import ASAM, MSSAM, SAM, MSRegularizedSGD, SharpnessAware
from .sharpness import Sharpness, minimum_sharpness
from .symmetry import NeuronGroup, ScaleGroup, neuron_symmetries, scale_symmetries

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
    "NeuronBalance",
    "NeuronGroup",
    "ScaleGroup",
    "Sharpness",
    "SharpnessAware",
    "balance",
    "balance_neurons",
    "doctor",
    "errors",
    "hessian_diagonal",
    "hessian_trace",
    "minimum_sharpness",
    "neuron_symmetries",
    "rebalance_",
    "scale_symmetries",
]
