"""x."""
from .pool import Resources, run_trials
from .trial import Result, Trial
