"""Balancing: from traces, norms and a scale group to one representative of all equivalent networks.

``program`` says what is minimised and minimises it, ``floors`` repairs it where traces are degenerate, ``chain`` knows
the closed form, ``solve`` presents the result, ``rebalance`` takes a network there.  For single hidden units,
``neurons`` is the program, ``flow`` says which of them it decides, and ``osborne`` minimises.
"""

from .chain import chain_log_scales, chain_minimum
from .neurons import NeuronBalance, balance_neurons
from .rebalance import rebalance_
from .solve import Balance, balance, row_balance

__all__ = [
    "Balance",
    "NeuronBalance",
    "balance",
    "balance_neurons",
    "chain_log_scales",
    "chain_minimum",
    "rebalance_",
    "row_balance",
]
