"""Peaks of memory are those of a call, taken in a process of its own."""

import torch

from benchmarks.memory import lift, peak_above


def take(megabytes):
    """Prepare something that allocates that much, after having held and let go of more."""
    held = torch.ones(40 * 2**17, dtype=torch.float64)
    del held
    return lambda: torch.ones(megabytes * 2**17, dtype=torch.float64)


def test_peak_above_is_what_the_call_takes_and_nothing_before_it():
    found = peak_above(take, 64)
    assert found["method"] in ("VmHWM", "ru_maxrss")
    if found["method"] == "VmHWM":
        # Linux counts resident pages in batches for each thread, so that both readings are off by a few hundred KiB.
        assert 63 < found["peak_bytes"] / 2**20 < 68


def test_lift_without_a_high_water_mark_that_can_be_reset(monkeypatch):
    monkeypatch.setattr("benchmarks.memory._reset_high_water", lambda: False)
    peak, method = lift(take(1))
    assert method == "ru_maxrss" and peak >= 0


def fail():
    raise ValueError("cannot | do it")


def test_a_call_that_fails_in_its_own_process_says_how():
    assert peak_above(fail) == {"failed": "ValueError: cannot | do it"}
