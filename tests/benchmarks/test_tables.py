"""From raw lines to tables: ratios within rounds, verdicts without tolerance, pages of the newest runs."""

from pathlib import Path

import pytest

from benchmarks.harness import Claim, Summary, evaluate, folder_name, paired, record, verdict
from benchmarks.render import CUDA_MISSING, claims_table, matrix, pages, resumptions, side_by_side

ROOT = Path(__file__).parent.parent.parent


def test_ratios_are_taken_within_rounds():
    seconds = {"reference": [1.0, 10.0, 2.0], "step": [2.0, 20.0, 6.0], "refresh": [100.0, 1000.0, 200.0]}
    runs = [
        {"network": "net", "contender": name, "round": i, "seconds": s}
        for name, values in seconds.items()
        for i, s in enumerate(values)
    ]
    assert evaluate(Claim("net", "", "step", "reference"), runs) == Summary(2.0, 2.0, 2.5, 3)
    assert evaluate(Claim("net", "", {"step": 1.0, "refresh": 0.01}, "reference"), runs) == Summary(3.0, 3.0, 3.5, 3)
    assert evaluate(Claim("other", "", "step", "reference"), runs) == "not measured"


def test_every_contender_runs_once_a_round_and_a_slow_one_in_its_first_rounds():
    calls = {"a": 0, "b": 0, "c": 0}

    def contender(name):
        def count():
            calls[name] += 1
            if name == "c":
                raise ValueError("broken")

        return count

    runs = paired("net", {name: contender(name) for name in calls}, rounds=5, slow={"b": 2})
    assert calls == {"a": 2 + 5, "b": 2, "c": 1}
    assert [run["contender"] for run in runs].count("a") == 5
    assert evaluate(Claim("net", "", "c", "a"), runs) == "ValueError: broken"


@pytest.mark.parametrize(
    ("median", "low", "high", "word"),
    [
        (1.0, 0.9, 1.1, "reached"),
        (1.3, 1.25, 1.4, "**missed**"),
        (1.1, 1.0, 1.3, "reached, but the middle half has both"),
        (1.25, 1.1, 1.3, "**missed**, but the middle half has both"),
    ],
)
def test_verdict_has_no_tolerance(median, low, high, word):
    assert verdict(Summary(median, low, high, 9), 1.2) == word


@pytest.mark.parametrize(
    ("median", "low", "high", "word"),
    [
        (3.0, 3.0, 3.1, "reached"),
        (2.9, 2.8, 2.95, "**missed**"),
        (3.2, 2.9, 3.3, "reached, but the middle half has both"),
        (2.9, 2.8, 3.0, "**missed**, but the middle half has both"),
    ],
)
def test_a_speedup_must_be_at_least_its_goal(median, low, high, word):
    assert verdict(Summary(median, low, high, 9), 3.0, at_least=True) == word


def lines_of(quantity, **values):
    return [
        {"network": "net", "contender": name, "round": i, quantity: value}
        for name, found in values.items()
        for i, value in enumerate(found)
    ]


def test_the_faster_of_two_references_counts():
    runs = lines_of("seconds", ours=[3.0, 3.0, 3.0], looped=[2.0, 2.0, 1.0], batched=[1.5, 1.5, 1.5])
    claim = Claim("net", "", "ours", ("looped", "batched"))
    assert evaluate(claim, runs) == Summary(2.0, 2.0, 2.0, 3)
    only_one = [run for run in runs if run["contender"] != "batched"]
    assert evaluate(claim, only_one) == Summary(1.5, 1.5, 2.25, 3)


def test_the_worst_ratio_counts_where_every_layer_must_reach_the_goal():
    runs = lines_of("rmse", peer=[10.0, 30.0, 8.0], ours=[1.0, 1.0, 2.0])
    claim = Claim("net", "", "peer", "ours", 10.0, "rmse", at_least=True)
    assert evaluate(claim, runs).median == 10.0
    assert evaluate(Claim("net", "", "peer", "ours", 10.0, "rmse", True, worst=True), runs) == Summary(4.0, 4.0, 4.0, 1)
    assert evaluate(Claim("net", "", "peer", "ours", 10.0, "rmse", worst=True), runs).median == 30.0


def test_memory_is_divided_apart_from_time():
    runs = lines_of("seconds", ours=[1.0], peer=[8.0]) + lines_of("peak_bytes", ours=[100], peer=[400])
    assert evaluate(Claim("net", "", "ours", "peer", quantity="peak_bytes"), runs).median == 0.25
    assert evaluate(Claim("net", "", "ours", "peer"), runs).median == 0.125


def test_a_peer_that_fails_is_unsupported_with_its_error():
    runs = [*lines_of("seconds", ours=[1.0]), {"network": "net", "contender": "peer", "failed": "ValueError: a | b"}]
    for claim in (
        Claim("net", "faster", "peer", "ours", 3.0, at_least=True),
        Claim("net", "smaller", "ours", "peer", 0.5, "peak_bytes"),
    ):
        row = claims_table([claim], runs)[-1]
        assert row.endswith("| unsupported: ValueError: a / b | nothing to compare with |")
    assert "| net | peer | unsupported: ValueError: a / b | — | — |" in side_by_side(runs, "ours")


def test_side_by_side_shows_seconds_ratio_and_memory():
    runs = lines_of("seconds", unit=[1.0, 1.0], ours=[3.0, 5.0]) + [
        {"network": "net", "contender": "ours", "round": 0, "peak_bytes": 3 * 2**20, "method": "VmHWM"}
    ]
    rows = side_by_side(runs, "unit", ("ours", "unit"))
    assert rows[2] == "| net | ours | 4 (2) | 4.00× [3.50, 4.50] (2) | 3 (1) |"
    assert rows[3].startswith("| net | unit | 1 (2) | 1.00×")
    assert rows[-1] == "Peak memory by VmHWM."


def test_a_matrix_has_a_row_per_law_and_a_column_per_optimizer():
    rows = matrix({("first", "a"): "✓", ("second", "b"): "–"}, ["first", "second"], ["a", "b"], "law")
    assert rows == ["| law | a | b |", "| --- | :-: | :-: |", "| first | ✓ |  |", "| second |  | – |"]


def test_a_folder_of_results_is_named_by_date_and_device():
    described = {"date": "2026-11-21 05:00 UTC", "threads": 2, "device": "cpu"}
    assert folder_name(described) == "2026-11-21_cpu2"
    assert folder_name({**described, "device": "NVIDIA H200 (SXM)"}) == "2026-11-21_cuda_nvidia-h200-sxm"


def test_a_page_has_the_newest_run_of_each_device(tmp_path):
    described = {"date": "", "cpu": "processor", "cpu_capability": "", "threads": 1, "torch": "", "python": ""}
    described |= {"load_average_before": 0, "load_average_after": 0, "commit": "", "uncommitted_changes": False}
    old, new = ([{"network": "mlp", "contender": "old run", "seconds": s, "round": 0}] for s in (1.0, 2.0))
    record(tmp_path / "2026-11-20_cpu2", described, old)
    record(tmp_path / "2026-11-21_cpu2", described, [{**new[0], "contender": "new run"}])
    page = pages("trace_limit", tmp_path)
    assert "new run" in page and "old run" not in page and page.endswith("\n## CUDA: not measured\n")
    record(tmp_path / "2026-11-19_cuda_card", {**described, "device": "card"}, [{**new[0], "contender": "on the card"}])
    page = pages("trace_limit", tmp_path)
    assert "on the card" in page and "\n## The exact trace" in page and "not measured\n" not in page[-20:]


def test_a_claim_that_was_measured_nowhere_says_so_in_every_row(tmp_path):
    page = pages("throughput", tmp_path)
    assert page.startswith("# On a GPU two passes train on half as many") and page.endswith(CUDA_MISSING)
    rows = [line for line in page.splitlines() if line.startswith("| resnet")]
    assert len(rows) == 8 and all("| not measured |" in row for row in rows)
    committed = ROOT / "benchmarks" / "results" / "throughput"
    assert (committed / "table.md").read_text(encoding="utf-8") == pages("throughput", committed)


def test_a_run_that_went_on_names_its_machines():
    assert resumptions({}) == []
    described = {"date": "2026-01-02", "cpu": "a processor", "torch": "2.14", "commit": "0123456789abcdef"}
    lines = resumptions({"resumed": [described, {**described, "cpu": "another"}]})
    assert lines[1].startswith("Gone on with: 2026-01-02, a processor, torch 2.14, commit 0123456789; ")
    assert "another" in lines[1]
    del described["cpu"]
    assert resumptions({"resumed": [described]})[1] == "Gone on with: 2026-01-02, torch 2.14, commit 0123456789."
