"""Optimizers: sharpness-aware training on one engine."""

from .asam import ASAM
from .engine import SharpnessAware
from .gradient_pass import GradientPass
from .literature import (
    BAR,
    GSAM,
    RSAM,
    SAGM,
    SAMON,
    WEISSI,
    DetSAM,
    FriendlySAM,
    FrobSAM,
    LookSAM,
    RandomPerturbation,
    StableSAM,
    TiltedSAM,
    TraceSAM,
    UniversalSAM,
)
from .ms_sgd import MSRegularizedSGD
from .mssam import MSSAM
from .sam import SAM

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
    "DetSAM",
    "FriendlySAM",
    "FrobSAM",
    "GradientPass",
    "LookSAM",
    "MSRegularizedSGD",
    "RandomPerturbation",
    "SharpnessAware",
    "StableSAM",
    "TiltedSAM",
    "TraceSAM",
    "UniversalSAM",
]
