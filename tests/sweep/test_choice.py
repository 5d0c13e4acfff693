"""The choice: by validation, never by test; what breaks comes last; the edge of a grid is marked."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_optim.errors import CommandLineError
from ms_optim.sweep import Report, Resources, Result, Trial, at_edge, choose, choose_and_report, compare, settings_of
from ms_optim.sweep.choice import TEST
from ms_optim.sweep.trial import DIVERGED, FAILED, FINISHED


def result(method, rho, seed, validation, test=0.0, stage="tuning", problem="digits", status=FINISHED):
    trial = Trial({"lr": 0.1, "opt_kwargs": {"rho": rho}, "seed": seed}, method, problem, stage)
    return Result(trial, status, {"validation_top1": validation, "test_top1": test})


def grid_of(method, table, test=0.0):
    """ρ → validation accuracy of each seed; ``None``: failed; NaN: diverged."""
    found = []
    for rho, values in table.items():
        for seed, value in enumerate(values):
            lost = FAILED if value is None else DIVERGED if math.isnan(value) else FINISHED
            found.append(result(method, rho, seed, value, test, status=lost))
    return found


def rho_of(choice):
    return choice.setting.settings["opt_kwargs"]["rho"]


def test_the_best_mean_over_seeds_is_chosen_and_the_first_of_equals():
    (choice,) = choose(grid_of("sam", {0.1: [90, 80], 0.2: [84, 88], 0.4: [86, 86]}))
    assert rho_of(choice) == 0.2 and choice.tried == 3 and choice.searched == ("opt_kwargs.rho",)
    (choice,) = choose(grid_of("sam", {0.1: [90, 80], 0.2: [84, 88]}), largest=False)
    assert rho_of(choice) == 0.1


def test_methods_and_problems_are_chosen_for_on_their_own():
    results = grid_of("sam", {0.1: [1], 0.2: [2]}) + grid_of("asam", {0.1: [9], 0.2: [8]})
    results += [replace(r, trial=replace(r.trial, problem="mnist")) for r in grid_of("sam", {0.1: [4], 0.2: [3]})]
    found = {(c.setting.problem, c.setting.method): rho_of(c) for c in choose(results)}
    assert found == {("digits", "sam"): 0.2, ("digits", "asam"): 0.1, ("mnist", "sam"): 0.1}


@pytest.mark.parametrize("lost", [None, math.nan])
def test_a_setting_of_which_a_seed_is_lost_comes_after_all_others(lost):
    (choice,) = choose(grid_of("sam", {0.1: [70, 70], 0.2: [99, lost], 0.4: [60, 60]}))
    assert rho_of(choice) == 0.1
    # Where every setting has lost one, those that lost fewest come first.
    (choice,) = choose(grid_of("sam", {0.1: [99, lost, lost], 0.2: [50, 50, lost]}))
    assert rho_of(choice) == 0.2
    # A seed that was never run is as missing as one that failed.
    (choice,) = choose(grid_of("sam", {0.1: [99], 0.2: [50, 50]}))
    assert rho_of(choice) == 0.2


@given(st.lists(st.tuples(st.integers(0, 100), st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=6))
def test_the_choice_does_not_read_the_test_set(rows):
    def chosen(column):
        return rho_of(choose([result("sam", i, 0, row[0], row[column]) for i, row in enumerate(rows)])[0])

    assert chosen(1) == chosen(2)
    # Nor what came of fresh seeds.
    fresh = [result("sam", i, 9, 1e6 - row[0], stage="fresh") for i, row in enumerate(rows)]
    tuned = [result("sam", i, 0, row[0]) for i, row in enumerate(rows)]
    assert rho_of(choose(tuned + fresh)[0]) == chosen(1)


def test_choosing_by_the_test_set_is_refused():
    for metric in ("test_top1", "test_top1_last", "TEST"):
        with pytest.raises(CommandLineError, match="hold out a part of the training set"):
            choose(grid_of("sam", {0.1: [1]}), metric)


def test_there_has_to_be_something_to_choose_by_where_there_is_a_choice():
    with pytest.raises(CommandLineError, match="no outcome has validation_loss"):
        choose(grid_of("sam", {0.1: [1], 0.2: [2]}), "validation_loss")
    with pytest.raises(CommandLineError, match="every trial has failed or diverged"):
        choose(grid_of("sam", {0.1: [None], 0.2: [math.nan]}))
    assert rho_of(choose(grid_of("sam", {0.1: [1]}), "validation_loss")[0]) == 0.1


def test_edges_are_those_of_numbers_that_vary():
    for best, edge in ((0.1, True), (0.2, False), (0.4, True)):
        table = {rho: [float(rho == best)] for rho in (0.1, 0.2, 0.4)}
        assert choose(grid_of("sam", table))[0].edges == (("opt_kwargs.rho",) if edge else ())
    assert not at_edge(0, [0, 1, 2]) and at_edge(2, [0, 1, 2]) and at_edge(-1, [-1, 0])
    assert not at_edge("a", ["a", "b"]) and not at_edge(True, [True, False]) and not at_edge(3, [3])
    assert choose(grid_of("sam", {0.1: [1]}))[0].edges == ()


def test_a_failed_value_is_part_of_the_grid_when_edges_are_marked():
    (choice,) = choose(grid_of("sam", {0.1: [1], 0.2: [2], 0.4: [math.nan]}))
    assert rho_of(choice) == 0.2 and choice.edges == ()


def fresh(method, rho, accuracies):
    return [result(method, rho, 100 + i, 0.0, a, "fresh") for i, a in accuracies.items()]


def test_chosen_settings_are_compared_by_fresh_seeds_and_by_common_ones_alone():
    tuned = grid_of("sgd", {0.0: [1]}, test=99) + grid_of("sam", {0.1: [1], 0.2: [2]}, test=99)
    results = tuned + fresh("sgd", 0.0, {0: 80, 1: 81, 2: 85, 3: 70}) + fresh("sam", 0.2, {0: 81, 1: 83, 2: 88, 9: 0})
    (comparison,) = compare(results, choose(results), "sgd")
    assert (comparison.method, comparison.baseline, comparison.difference.n, comparison.unpaired) == (
        "sam",
        "sgd",
        3,
        2,
    )
    assert comparison.difference.mean == pytest.approx(2.0)
    assert compare(results, choose(results), "adam") == []


def test_without_fresh_seeds_the_seeds_of_the_choice_are_compared():
    results = grid_of("sgd", {0.0: [1, 1]}, test=80) + grid_of("sam", {0.1: [3, 3], 0.2: [2, 2]}, test=81)
    (comparison,) = compare(results, choose(results), "sgd")
    assert comparison.difference.n == 2 and comparison.difference.mean == 1


def test_p_values_are_corrected_for_the_methods_of_a_problem():
    results = fresh("sgd", 0.0, {0: 80, 1: 81, 2: 85})
    results += fresh("sam", 0.1, {0: 81, 1: 82.1, 2: 86.2}) + fresh("asam", 0.1, {0: 80.5, 1: 80, 2: 88})
    tuned = [r for method, rho in (("sgd", 0.0), ("sam", 0.1), ("asam", 0.1)) for r in grid_of(method, {rho: [1]})]
    sam, asam = compare(tuned + results, choose(tuned), "sgd")
    assert sam.holm_t == pytest.approx(2 * sam.difference.p_t) and asam.holm_t == pytest.approx(asam.difference.p_t)


def test_the_report_has_the_choice_its_edge_the_differences_and_what_was_lost(tmp_path):
    tuned = grid_of("SGD", {0.0: [70, 72]}) + grid_of("sam", {0.1: [80, 80], 0.2: [90, math.nan], 0.05: [60, 60]})
    results = tuned + fresh("SGD", 0.0, {0: 80, 1: 81, 2: 85}) + fresh("sam", 0.1, {0: 83, 1: 84.1, 2: 88.2})
    report = Report.of(results)
    assert report.baseline == "SGD"
    text, page = report.text(), report.page()
    for shown in (text, page):
        assert "rho = 0.1" in shown and "edge of its grid" not in shown
        assert "82 ± 1.5 (3)" in shown and "3.1 ± 0.058" in shown and "larger" in shown
        assert "diverged" in shown and "digits, sam, rho = 0.2" in shown
    assert page.startswith("# Summary of the sweep") and "## All settings" in page
    report.write(tmp_path)
    assert (tmp_path / "summary.md").read_text() == page
    rows = report.rows()
    assert [row["chosen"] for row in rows] == [1, 1, 0, 0]
    assert [(row["n"], row["diverged"]) for row in rows] == [(2, 0), (2, 0), (1, 1), (2, 0)]
    assert rows[1]["pairs"] == 3 and rows[1]["difference"] == pytest.approx(3.1) and "difference" not in rows[0]
    header = (tmp_path / "summary.csv").read_text().splitlines()[0].split(",")
    assert header[:4] == ["problem", "method", "settings.lr", "settings.opt_kwargs.rho"]
    (edge,) = (r for r in Report.of(grid_of("sam", {0.1: [1], 0.2: [2]})).rows() if r["chosen"])
    assert edge["edges"] == "opt_kwargs.rho"


def test_settings_hold_the_seeds_together():
    found = settings_of(grid_of("sam", {0.1: [1, 3], 0.2: [None, 5]}))
    assert [setting.mean("validation_top1")[0] for setting in found] == [2, 5]
    assert [setting.count(FAILED) for setting in found] == [0, 1]
    assert found[0].mean("validation_top1")[1] == 1.0  # s / √n = √2 / √2


def test_choosing_by_the_test_set_is_refused_before_anything_is_run(tmp_path):
    with pytest.raises(CommandLineError, match="cannot be chosen by test_top1"):
        choose_and_report([Trial({"rho": 0.1})], [1], "sweep.trials:accuracy", tmp_path, Resources(0), metric=TEST)
    assert list(tmp_path.iterdir()) == []
