"""Literature: optimizers of other authors, each a plan of passes on this engine, written from its paper's formula."""

from .bar import BAR
from .friendly_sam import FriendlySAM
from .gsam import GSAM
from .look_sam import LookSAM
from .rsam import RSAM
from .sagm import SAGM
from .sam_on import SAMON
from .stable_sam import StableSAM
from .tilted_sam import TiltedSAM
from .trace_sam import RandomPerturbation, TraceSAM
from .universal_sam import DetSAM, FrobSAM, UniversalSAM
from .weissi import WEISSI

__all__ = [
    "BAR",
    "GSAM",
    "RSAM",
    "SAGM",
    "SAMON",
    "WEISSI",
    "DetSAM",
    "FriendlySAM",
    "FrobSAM",
    "LookSAM",
    "RandomPerturbation",
    "StableSAM",
    "TiltedSAM",
    "TraceSAM",
    "UniversalSAM",
]
