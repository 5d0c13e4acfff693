"""Every error and warning of the package: the object, its value, the reason, the next move.

A wrong *number* is a plain ``ValueError`` raised where it is read; what needs the vocabulary of the theory has its
own type here.  All of them are raised before anything is changed: weights, buffers, optimizer state and random
streams are as they were before the call.
"""

from __future__ import annotations

from typing import Any


class MsOptimError(Exception):
    """Base class of the errors of ``ms_optim``, for callers who want to catch them all.

    Attributes:
        partial: Where a measurement over many batches failed: the result of the batches before; else ``None``.
    """

    partial: Any = None


class DataError(MsOptimError, ValueError):
    """Data that is not a batch, an empty iterable, non-finite inputs, or logits that are not ``[N, K]``."""


class SymmetryError(MsOptimError, RuntimeError):
    """A model that cannot be read, a group that does not fit a model, or a rescaling that is not exact."""


class CurvatureError(MsOptimError, RuntimeError):
    """A parameter that no curvature rule covers, or a trace that is not finite."""


class NoRuleError(CurvatureError):
    """A use of a parameter that no curvature rule covers: what the generic path is for."""


class MemoryBudgetError(MsOptimError, MemoryError):
    """A byte budget in which not even one sample and one column fit."""


class BalanceError(MsOptimError, ValueError):
    """Traces, norms and a group from which no representative can be computed."""


class OptimizerError(MsOptimError, RuntimeError):
    """An optimizer driven in a way that would not do what it says."""


class StateError(MsOptimError, ValueError):
    """A ``state_dict`` that belongs to another model or to another optimizer."""


class DivergedError(MsOptimError, FloatingPointError):
    """A training whose loss is not finite any more."""


class UnsupportedError(MsOptimError, NotImplementedError):
    """A combination that the package does not support yet, named together with what to do instead."""


class NoEffectWarning(UserWarning):
    """Something that was asked for changes nothing: a model without symmetries, for instance."""


class NonFiniteWarning(UserWarning):
    """A gradient norm that is not finite: the step goes on without a perturbation."""


class LostStateWarning(UserWarning):
    """A checkpoint that lacks what a resumed run needs to go on as if it had not stopped."""


class LostGradientsWarning(UserWarning):
    """Gradients that were taken outside of a step's passes, and are not part of it."""


class ConformanceError(MsOptimError, AssertionError):
    """An optimizer that breaks a law of :mod:`ms_optim.testing`: what was found, and what was expected."""


class OverwrittenWarning(UserWarning):
    """Weights that somebody else wrote to while an optimizer had them perturbed: they are left as they are."""


class CommandLineError(MsOptimError, ValueError):
    """A command line that cannot be carried out: what was given, what is wrong with it, what to give instead."""
