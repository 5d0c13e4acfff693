"""Scale symmetries: which positive rescalings of parameters leave the network's function unchanged, read off its graph.

``discover`` turns the graph into a linear system with one rule per operation (``rules``), whose null space
(``linear_system``) is the group (``group``).
"""

from .discover import scale_symmetries
from .group import Check, Opaque, ScaleGroup, Statistics
from .rules import scale_rule

__all__ = ["Check", "Opaque", "ScaleGroup", "Statistics", "scale_rule", "scale_symmetries"]
