"""Whatever fails, and wherever in a step: everything is bitwise as before it, and training goes on."""

import functools

import pytest
import torch
from cases import EVERY as CASES
from cases import convnet, mlp
from contract.faults import Bench, forms
from hypothesis import given, settings
from hypothesis import strategies as st

ERRORS = (ValueError, KeyboardInterrupt, torch.OutOfMemoryError)
EVERY = [
    (case, network, form, steps)
    for case in CASES
    for network in (mlp, convnet)
    for form in forms(case)
    for steps in (0, 1)  # with the first refresh, and without one
]


@functools.cache
def bench(case, network, form, steps, buffers="first"):
    found = Bench(CASES[case], network, form, steps, {"buffers": buffers})
    return found, found.operations()


@settings(max_examples=150)
@given(
    case=st.integers(0, len(CASES) - 1),
    network=st.sampled_from([mlp, convnet]),
    form=st.integers(0, 3),
    steps=st.integers(0, 3),
    buffers=st.sampled_from(["first", "last"]),
    place=st.floats(0, 1, exclude_max=True),
    error=st.sampled_from(ERRORS),
)
def test_a_fault_in_any_operation_of_a_step_leaves_everything_as_before(
    case, network, form, steps, buffers, place, error
):
    ways = forms(CASES[case])
    tried, operations = bench(case, network, ways[form % len(ways)], steps, buffers)
    assert tried.fail(int(place * operations), error) is None


@pytest.mark.slow
def test_ten_thousand_faults(capsys):
    """In every case, network, form and step, every seventh operation, beginning with another one each time."""
    count = 0
    for index, (case, network, form, steps) in enumerate(EVERY):
        tried, operations = bench(CASES.index(case), network, form, steps)
        for at in range(index % 7, operations, 7):
            found = tried.fail(at, ERRORS[count % len(ERRORS)])
            assert found is None, f"{case}, {network.__name__}, {form}, step {steps}, operation {at}: {found}"
            count += 1
    with capsys.disabled():
        print(f"\n{count} faults planted, {count} steps undone")
    assert count >= 10_000
