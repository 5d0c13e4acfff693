"""Sharpness: measures that do not depend on how a network happens to be scaled."""

from .minimum import minimum_sharpness
from .value import Sharpness

__all__ = ["Sharpness", "minimum_sharpness"]
