"""What single scripts compute: the numbers between a measurement and its line."""

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
from benchmarks.harness import Summary, evaluate
from ms_optim.sweep import Result, Trial


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
