"""Choosing ρ and λ: the demo trains with what was best, its optimizers are the ones that were swept, tables hold it."""

import pytest

pytest.importorskip("sklearn", reason="the demo's data need scikit-learn: pip install 'ms_optim[demo]'")

from benchmarks import choosing, trials
from benchmarks.harness import RESULTS
from benchmarks.render import newest
from benchmarks.training import optimizer_of
from ms_optim.demo import training
from ms_optim.sweep import Result


def done(value, seed, held_out, name="SAM"):
    return trials.line_of(Result(choosing.trial("mlp", name, value, seed), "finished", {"held_out": held_out}))


def test_the_demo_trains_with_what_was_best():
    runs = newest(RESULTS / "choosing", "cpu").runs
    found = {
        network: {name: choosing.best(choosing.accuracies(runs, network, name)) for name in tuned}
        for network, tuned in training.TUNED.items()
    }
    assert found == training.TUNED
    assert {seed for seeds in choosing.SEEDS.values() for seed in seeds}.isdisjoint(range(3))  # which the demo's are


@pytest.mark.parametrize("name", ["SAM", "ASAM", "MSSAM", "MSRegularizedSGD"])
def test_the_optimizers_of_the_demo_are_the_ones_that_were_swept(name):
    sweep, network = choosing.SWEEPS[name], training.MODELS["mlp"]()
    value = training.TUNED["mlp"][name]
    theirs = training.optimizer_for(name, "mlp", network)
    base = training.BASE
    options = {**sweep.options, sweep.scalar: value, "momentum": base["momentum"]}
    ours = optimizer_of(network, sweep.optimizer, base["lr"], base["weight_decay"], options)
    assert type(ours) is type(theirs) and ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
    for what in ("operator", "eta", "gradient"):
        assert getattr(ours, what, None) == getattr(theirs, what, None)
    if theirs.representative is not None:
        for what in ("rebalance", "every", "columns", "gauge", "granularity"):
            assert getattr(ours.representative, what) == getattr(theirs.representative, what), what


def test_the_best_value_is_in_bold_and_a_lost_training_leaves_a_blank():
    runs = [done(0.1, 100, 0.8), done(0.1, 101, 0.9), done(0.2, 100, 0.9), done(0.2, 101, 0.9)]
    runs.append(trials.line_of(Result(choosing.trial("mlp", "MSSAM", 0.1, 100), "finished", {"held_out": 0.7})))
    body = choosing.body(runs)
    assert "| mlp | SAM | 85.0 ± 5.0 | **90.0 ± 0.0** | 2 |" in body
    assert "| mlp | MSSAM | **70.0** |  | 1 |" in body
    (row,) = choosing.summary([*runs, done(0.1, 101, 0.75, "MSSAM")])
    assert row.ours.startswith("-17.50")


def test_equal_values_choose_the_smaller_one():
    assert choosing.best({0.2: {0: 1.0}, 0.1: {0: 1.0}, 0.4: {0: 0.5}}) == 0.1
