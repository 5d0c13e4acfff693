"""Optimizers: sharpness-aware training on one engine."""

from .asam import ASAM
from .bar import BAR
from .engine import SharpnessAware
from .friendly_sam import FriendlySAM
from .gradient_pass import GradientPass
from .gsam import GSAM
from .look_sam import LookSAM
from .ms_sgd import MSRegularizedSGD
from .mssam import MSSAM
from .rsam import RSAM
from .sagm import SAGM
from .sam import SAM
from .sam_on import SAMON
from .stable_sam import StableSAM
from .tilted_sam import TiltedSAM
from .trace_sam import RandomPerturbation, TraceSAM
from .universal_sam import DetSAM, FrobSAM, UniversalSAM
from .weissi import WEISSI

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
