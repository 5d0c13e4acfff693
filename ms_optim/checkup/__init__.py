"""Checkup: what goes wrong without a word in a training loop, found in one dry step of that very loop.

    print(ms_optim.doctor(model, optimizer, step))

Keep        everything a step may change is kept before and put back afterwards       (keeping)
Record      forward passes, backward passes and descents, as they happen              (recording, observation)
Examine     one rule per finding, each with the next move                             (examination, …_rules)
Report      Diagnosis, Finding                                                        (diagnosis)

It relies on nothing but PyTorch, so that the optimizer may be anyone's.
"""

from .diagnosis import Diagnosis, Finding
from .dry_step import doctor

__all__ = ["Diagnosis", "Finding", "doctor"]
