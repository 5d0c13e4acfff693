r"""Sweeps: many trainings, the best setting of each optimizer, and whether the optimizers differ.

    python -m ms_optim.sweep -c recipe.yaml --grid opt=sgd,mssam lr=0.05,0.1 mssam:rho=0.05,0.1,0.2 \
        --seeds 0 1 2 --fresh-seeds 10 11 12 13 14 --output out/sweep

A *trial* is a function and its settings; by default the function trains (:mod:`ms_optim.train`), and it can be any
other one that takes a mapping and returns one.  A *pool* runs trials in processes, one per GPU or core, and each leaves
a *record*, so that a sweep that was stopped in whatever way goes on where it was.  A *choice* is made for each method
by validation, and never by test; *paired* differences to a baseline are tested over seeds; the *report* says it all.

    results = run_trials([Trial({"rho": rho, "seed": s}, method="sam") for rho in (0.05, 0.1) for s in range(3)],
                         "mine:train", "out/sweep")
    print(Report.of(results).text())
"""

from .choice import Choice, Comparison, Setting, at_edge, choose, compare, settings_of
from .paired import Difference, holm, sign_flips
from .pool import Resources, run_trials
from .protocol import choose_and_report
from .report import Report
from .trial import Result, Trial

__all__ = [
    "Choice",
    "Comparison",
    "Difference",
    "Report",
    "Resources",
    "Result",
    "Setting",
    "Trial",
    "at_edge",
    "choose",
    "choose_and_report",
    "compare",
    "holm",
    "run_trials",
    "settings_of",
    "sign_flips",
]
