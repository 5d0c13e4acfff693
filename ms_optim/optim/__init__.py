"""Optimizers: sharpness-aware training on one engine."""

from .asam import ASAM
from .engine import SharpnessAware
from .gradient_pass import GradientPass
from .ms_sgd import MSRegularizedSGD
from .mssam import MSSAM
from .sam import SAM

__all__ = ["ASAM", "MSSAM", "SAM", "GradientPass", "MSRegularizedSGD", "SharpnessAware"]
