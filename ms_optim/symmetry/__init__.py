"""Scale symmetries: which positive rescalings of parameters leave the network's function unchanged, read off its graph.

``discover`` turns the graph into a linear system with one rule per operation (``rules``), whose null space
(``linear_system``) is the group (``group``).  ``channels`` does the same for every hidden unit (``labels``,
``channel_rules``), with the group in ``unit_group``.
"""

from .channels import neuron_symmetries
from .discover import scale_symmetries
from .group import Opaque, ScaleGroup, Statistics
from .invariance import Check
from .rules import scale_rule
from .unit_group import Factor, LogScales, NeuronGroup, UnitStatistics, multiply_

#: Rescalings of whole layers, or of single hidden units.
Group = ScaleGroup | NeuronGroup

__all__ = [
    "Check",
    "Factor",
    "Group",
    "LogScales",
    "NeuronGroup",
    "Opaque",
    "ScaleGroup",
    "Statistics",
    "UnitStatistics",
    "multiply_",
    "neuron_symmetries",
    "scale_rule",
    "scale_symmetries",
]
