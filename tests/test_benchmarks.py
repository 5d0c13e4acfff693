"""Every benchmark runs, at a scale of seconds, and its table is made of its raw results alone."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ms_optim
from benchmarks import (
    conformance,
    contenders,
    diagonal_error,
    equal_time,
    networks,
    paper_efficiency,
    sam_peers,
    throughput,
    trace_growth,
    universal_class,
)
from benchmarks.harness import Claim, Summary, evaluate, folder_name, paired, record, verdict
from benchmarks.memory import lift, peak_above
from benchmarks.render import CUDA_MISSING, claims_table, matrix, pages, side_by_side
from ms_optim.sweep import Result, Trial

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    *("trace_speed", "overhead", "refresh_memory", "paper_efficiency", "diagonal_error"),
    *("peers", "equal_time", "trace_limit", "conformance"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("trace_growth", "throughput")),
    pytest.param("flat_minima", marks=pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")),
    pytest.param("universal_class", marks=pytest.mark.skipif(not hasattr(ms_optim, "FrobSAM"), reason="no FrobSAM")),
]


def run(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


OTHERS = ("curvlinops", "PyHessian", "davda54", "SamsungLabs", "moskomule")


def absent_or_unable(line):
    """Peers are optional, and BackPACK cannot do a vision transformer."""
    return line["failed"] == "not installed" or "BackPACK" in line["contender"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_benchmark_runs_and_renders(script, tmp_path):
    done = run(f"benchmarks.{script}", "--scale", "smoke", "--threads", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / script).iterdir()
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    described = (folder / "environment.json").read_text()
    failed = [line for line in lines if "failed" in line and not absent_or_unable(line)]
    assert lines and not failed
    assert str(Path.home()) not in described and str(ROOT) not in described
    rendered = run("benchmarks.render", "--results", str(tmp_path))
    assert rendered.returncode == 0, rendered.stderr
    page = (tmp_path / script / "table.md").read_text()
    table = done.stdout.removesuffix("\n")
    assert page.startswith(table)
    module = importlib.import_module(f"benchmarks.{script}")
    assert page.endswith(CUDA_MISSING) == ("cuda" in getattr(module, "DEVICES", ()))
    assert (folder / "figure.svg").exists() == hasattr(module, "draw")
    ours = [row for row in table.splitlines() if "BackPACK" not in row and not any(peer in row for peer in OTHERS)]
    assert not any("| not measured |" in row for row in ours)


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


def law_line(contender, law, verdict, message=""):
    return {"network": "", "contender": contender, "law": law, "verdict": verdict, "message": message}


def test_conformance_shows_what_is_not_kept_and_who_is_not_there():
    runs = [
        law_line("SAM", "a_law", "passed"),
        law_line("SAM", "another_law", "crashed", "KeyError: 'old_p' | *"),
        law_line("peer", "a_law", "failed", "1 differs from 2; expected the same bits"),
        law_line("peer", "another_law", "not applicable", "it has no step"),
        {"network": "", "contender": "absent", "failed": "not installed"},
        {"network": "", "contender": "davda54/sam", "commit": "0123456789abcdef"},
    ]
    page = "\n".join(conformance.body(runs))
    assert "| SAM | 1 | 2 | **missed** |\n| peer | 0 | 1 | for comparison |\n\nNot measured: absent." in page
    assert "| law | SAM |\n| --- | :-: |\n| a law | ✓ |\n| another law | error |" in page
    assert "| law | peer |\n| --- | :-: |\n| a law | ✗ |\n| another law | – |" in page
    assert "**SAM**\n\n- *another law*: KeyError: 'old\\_p' \\| \\*\n" in page
    assert "**peer**\n\n- *a law*: 1 differs from 2; expected the same bits\n" in page
    assert "**peer**\n\n- it has no step: *another law*\n" in page
    assert page.endswith("Checkouts: davda54/sam 0123456789.")
    kept = "\n".join(conformance.body(runs[:1]))
    assert "| SAM | 1 | 1 | reached |" in kept and "Every law that applies is kept." in kept and "Peers" not in kept


def test_a_peer_comes_from_its_checkout_and_is_driven_as_its_authors_say(tmp_path):
    assert sam_peers.load_davda54(None) is sam_peers.load_asam(None) is sam_peers.load_moskomule(None) is None
    with pytest.raises(FileNotFoundError, match="give the folder of a checkout that holds asam.py"):
        sam_peers.load_asam(tmp_path)
    (tmp_path / "asam.py").write_text(
        "class ASAM:\n"
        "    def __init__(self, optimizer, model, rho):\n"
        "        self.optimizer, self.rho, self.done = optimizer, rho, []\n"
        "    def ascent_step(self):\n        self.done.append('up')\n"
        "    def descent_step(self):\n        self.done.append('down')\n"
        "class SAM(ASAM):\n    pass\n"
    )
    subject = sam_peers.subjects(asam=tmp_path)["SamsungLabs/ASAM SAM"]
    model = torch.nn.Linear(2, 2)
    minimizer = subject.build(model, list(model.parameters()), torch.optim.SGD, lr=0.1, **subject.options)
    assert minimizer.rho == 0.05 and isinstance(subject.handle(minimizer), torch.optim.SGD)
    subject.step(minimizer, model, lambda: minimizer.done.append("gradient"))
    assert minimizer.done == ["gradient", "up", "gradient", "down"]
    assert sam_peers.subjects(asam=tmp_path)["davda54/sam SAM"] is None


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


def test_images_per_second_are_those_of_a_hundred_steps_of_which_one_has_a_refresh():
    runs = throughput.timed("resnet18", False, "cpu", throughput.Effort(3, 2, 1, 1, 1, "eager"))
    found = {run["contender"]: run for run in runs}
    assert set(found) == set(throughput.ORDER)
    for method in (throughput.MOVE, throughput.NOISE):
        without, with_one = (found[method + kind]["seconds"] for kind in (throughput.WITHOUT, throughput.WITH))
        assert found[method]["seconds"] == pytest.approx(0.99 * without + 0.01 * with_one)
    assert all(run["images_per_second"] == 3 / run["seconds"] for run in runs)


def test_time_of_naive_is_extrapolated_linearly_in_the_entries():
    # 2 s for forward and gradient, and half a second for each entry
    assert paper_efficiency.extrapolated(2.0 + 0.5 * 200, 200, 2.0, 16330) == pytest.approx(2.0 + 0.5 * 16330)


def test_entries_are_spread_over_all_layers_without_repetition():
    sizes = {"large": 15000, "middle": 1000, "bias": 10}
    chosen = paper_efficiency.spread(sizes, 200, seed=0)
    assert {name: len(entries) for name, entries in chosen.items()} == {"large": 187, "middle": 12, "bias": 1}
    for name, entries in chosen.items():
        assert len(set(entries)) == len(entries) and max(entries) < sizes[name]
    assert sorted(paper_efficiency.spread({"tiny": 3}, 200, seed=0)["tiny"]) == [0, 1, 2]


def test_naive_traces_are_exact_and_so_is_the_algorithm_of_the_paper():
    model = ms_optim.models.MLP((6, 4, 3)).double()
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    exact = dict(ms_optim.hessian_trace(model, x))
    assert paper_efficiency.naive_traces(model, x, y) == pytest.approx(exact, rel=1e-10)
    assert paper_efficiency.paper_algorithm(model, x) == pytest.approx(exact, rel=1e-10)
    none = paper_efficiency.naive_traces(model, x, y, dict.fromkeys(exact, ()))
    assert none == dict.fromkeys(exact, 0.0)
    diagonals = diagonal_error.paper_algorithm(model, x)
    assert diagonal_error.error(ms_optim.hessian_diagonal(model, x), diagonals) < 1e-12


def test_deviation_is_the_worst_layer_and_leaves_out_dead_ones():
    truth = {"a": 2.0, "b": 1.0, "dead": 0.0}
    assert paper_efficiency.deviation({"a": 2.2, "b": 0.8, "dead": 0.0}, truth) == pytest.approx(0.2)


def test_probes_that_fit_into_a_time():
    # a call takes 1 + 0.5 probes
    assert equal_time.affordable(10.0, (1, 1.5), (4, 3.0), 1) == 18
    assert equal_time.affordable(10.0, (3, 2.5), (12, 7.0), 3) == 18
    assert equal_time.affordable(10.0, (2, 2.0), (8, 5.0), 4) == 16
    assert equal_time.affordable(1.0, (3, 2.5), (12, 7.0), 3) == 3  # too dear already
    assert equal_time.affordable(3.0, (1, 1.5), (4, 1.4), 1) == 4  # noise: what was measured to fit


def test_errors_are_root_mean_squares_relative_to_the_truth():
    truth = {"a": 2.0, "b": 4.0, "dead": 0.0}
    estimates = [{"a": 1.0, "b": 4.0, "dead": 0.0}, {"a": 3.0, "b": 8.0, "dead": 0.0}]
    found = equal_time.errors(estimates, truth)
    assert found == pytest.approx({"a": 0.5, "b": 8.0**0.5 / 4, "total": ((1 + 25) / 2) ** 0.5 / 6})
    assert equal_time.errors([{"total": 9.0}], truth) == pytest.approx({"total": 0.5})


def test_growth_divides_by_the_pass_of_the_same_round():
    runs = []
    for classes, seconds in ((10, 2.0), (100, 3.0), (1000, 4.0)):
        network = trace_growth.label("mlp", classes, 256)
        for i, unit in enumerate((1.0, 2.0)):
            runs.append({"network": network, "contender": contenders.PASS, "round": i, "seconds": unit})
            runs.append({"network": network, "contender": contenders.SAMPLED, "round": i, "seconds": seconds * unit})
    found = trace_growth.growth(runs)
    assert [line["passes"] for line in found] == [2.0, 2.0, 3.0, 3.0, 4.0, 4.0]
    assert evaluate(trace_growth.CLAIMS[0], found) == Summary(2.0, 2.0, 2.0, 2)


def test_points_of_the_figure_are_medians_over_the_seeds():
    shared = {"network": "net", "contender": "ours, exact"}
    runs = [{**shared, "round": i, "passes": i, "seconds": 2 * i, "error": 3 * i} for i in (1, 2, 9)]
    assert diagonal_error.points(runs, "net") == [("ours, exact", 2, 4, 6)]


def fresh(optimizer, setting, *accuracies):
    shared = {"network": "20 % label noise", "contender": optimizer, "stage": "fresh", "setting": setting}
    return [{**shared, "round": i, "train": 1.0, "held_out": 0.5, "test": a} for i, a in enumerate(accuracies)]


def test_every_optimizer_has_as_many_settings_and_the_edge_of_its_grid_is_marked():
    assert {len(grid) for _, grid in universal_class.GRIDS.values()} == {9}
    assert universal_class.at_edge("SAM", {"rho": 3.2}) and not universal_class.at_edge("SAM", {"rho": 0.2})
    assert not universal_class.at_edge("SGD", {"weight_decay": 0.0})


def test_a_line_says_what_the_sweep_found_or_how_it_failed():
    settings = {"problem": "p", "optimizer": "SAM", "setting": {"rho": 0.1}, "seed": 3, "full": True}
    trial = Trial(settings, "SAM", "p", "fresh")
    shared = {"network": "p", "contender": "SAM", "round": 3, "stage": "fresh", "setting": {"rho": 0.1}}
    assert universal_class.line_of(Result(trial, "finished", {"test": 0.5})) == {**shared, "test": 0.5}
    lost = universal_class.line_of(Result(trial, "failed", error="killed"))
    assert lost == {**shared, "failed": "killed"}
    assert universal_class.fresh([lost], "p", "SAM") == {}


def test_a_difference_to_sam_is_paired_by_seed_and_counts_beyond_two_standard_errors():
    runs = fresh("SAM", {"rho": 0.2}, 0.90, 0.80, 0.70) + fresh("RSAM", {"rho": 0.9, "order": 1.2}, 0.91, 0.81, 0.711)
    page = "\n".join(universal_class.body(runs))
    assert "| 20 % label noise | SAM | rho = 0.2 | 80.00 ± 5.77 |  | 3 | the reference |" in page
    chosen = "rho = 0.9, order = 1.2 (edge of its grid)"
    assert f"| 20 % label noise | RSAM | {chosen} | 81.03 ± 5.74 | +1.03 ± 0.03 | 3 | better |" in page
    assert universal_class.found_difference(-0.1, 0.06) == "no difference shown"
    assert universal_class.found_difference(-0.2, 0.06) == "worse"


def test_noise_is_in_the_labels_to_train_and_to_choose_on_and_not_in_the_test_set():
    noisy = universal_class.drawn(universal_class.Problem(10, 1.0, 1), seed=0, full=False)
    clean = universal_class.drawn(universal_class.Problem(10, 0.0, 1), seed=0, full=False)
    assert len(noisy.train[0]) == 10 and len(noisy.held_out[0]) == 16
    for part in ("train", "held_out"):
        (x, y), (same, other) = getattr(noisy, part), getattr(clean, part)
        assert torch.equal(x, same) and not torch.equal(y, other)
    assert torch.equal(noisy.test[1], clean.test[1])


def test_the_floor_forms_no_gradient_of_a_weight_and_ours_are_the_reference_traces():
    torch.set_default_dtype(torch.float32)
    model, x, y = networks.problem("small_cnn", full=False)
    for batched in (False, True):
        contenders.floor(batched)(model, x, y)(1)
    assert all(parameter.grad is None for parameter in model.parameters())
    exact = contenders.estimator(contenders.EXACT, (model, x, y))()
    assert dict(exact) == pytest.approx(ms_optim.reference.curvature.paper_traces(model, x), rel=1e-4)


def test_sampled_columns_differ_from_call_to_call():
    torch.set_default_dtype(torch.float32)
    sampled = contenders.estimator(contenders.SAMPLED, networks.problem("small_cnn", full=False))
    assert dict(sampled()) != dict(sampled())


def test_data_that_are_not_there_are_asked_for(monkeypatch):
    monkeypatch.setenv("MS_OPTIM_DATA", "nowhere")
    with pytest.raises(FileNotFoundError, match="--scale smoke does without"):
        networks.mnist(full=True)
