"""When two measurements of the same traces agree, and when brute force may be trusted."""

from hypothesis import assume

from ms_optim.reference import curvature as oracle


def assert_same(actual, expected, names=None, relative=1e-10):
    """Agreement to 1e-10 of each trace; a trace that is zero, up to rounding in the largest."""
    largest = max((abs(value) for value in expected.values()), default=0.0)
    wrong = {
        name: (actual[name], expected[name])
        for name in (expected if names is None else names)
        if not abs(actual[name] - expected[name]) <= relative * abs(expected[name]) + 1e-14 * largest
    }
    assert not wrong


def assume_unsaturated(model, inputs):
    """Where p is within 10⁻⁶ of 0 and 1, brute force subtracts all of its digits away; ours does not."""
    curvature = oracle.logit_hessian(oracle.logits_of(model, inputs).detach())
    assume(float(curvature.diagonal(dim1=1, dim2=2).sum(1).min()) > 1e-4)
