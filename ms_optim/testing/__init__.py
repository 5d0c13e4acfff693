"""A conformance suite: every law of a sharpness-aware optimizer, for any optimizer.

Describe         Subject: how the optimizer is built and driven
Run              check, assert_conforms; Report, Outcome
Laws             LAWS: name → law, in order; each is a function of a subject and raises ConformanceError

Only torch is needed.  Our own optimizers are described in :mod:`ms_optim.testing.family`.
"""

from ..errors import ConformanceError

# isort: off
from . import definition, restoration, parameters, checkpoints, surroundings  # noqa: F401 - in the order of the table

# isort: on
from .law import LAWS, NotApplicable, law
from .report import Outcome, Report, assert_conforms, check
from .subject import Subject, by_closure, euclidean

__all__ = [
    "LAWS",
    "ConformanceError",
    "NotApplicable",
    "Outcome",
    "Report",
    "Subject",
    "assert_conforms",
    "by_closure",
    "check",
    "euclidean",
    "law",
]
