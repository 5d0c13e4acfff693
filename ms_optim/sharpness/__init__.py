"""Sharpness: measures that do not depend on how a network happens to be scaled."""

from .minimum import minimum_sharpness

__all__ = ["minimum_sharpness"]
