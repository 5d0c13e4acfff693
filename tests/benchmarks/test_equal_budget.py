"""The comparison of optimizers: what is drawn, searched, judged, corrupted and kept."""

import json
import math

import pytest
import torch

import ms_optim
from benchmarks import (
    cost,
    equal_budget,
    equal_budget_page,
    gauge,
    problems,
    training,
    trials,
    weight_noise,
)
from ms_optim.errors import DivergedError
from ms_optim.sweep import Resources, Result, Trial

ROW = "MNIST 2,000, 20 % noise, MLP"
HERE = Resources(0)
# Without its own scalar no line is one of the exploration.
MOMENTUM = {"momentum": 0.8}


@pytest.fixture(autouse=True)
def single():
    torch.set_default_dtype(torch.float32)


def settings_of(optimizer="SGD", seed=0, **further):
    base = {"problem": ROW, "scale": "smoke", "optimizer": optimizer, "options": {}, "lr": 0.1, "weight_decay": 0.0}
    return {**base, "seed": seed, **further}


def test_a_seed_draws_the_same_for_every_optimizer_and_noise_is_never_in_the_test_images():
    problem = problems.problem_of(ROW, "smoke")
    data, again = problems.drawn(problem, 3), problems.drawn(problem, 3)
    assert all(torch.equal(a, b) for a, b in zip(data.train, again.train, strict=True))
    clean = problems.drawn(problems.replace(problem, noise=0.0), 3)
    everything = problems.drawn(problems.replace(problem, noise=1.0), 3)
    assert torch.equal(clean.train[0], everything.train[0])
    assert not torch.equal(clean.train[1], everything.train[1])
    assert not torch.equal(clean.held_out[1], everything.held_out[1])
    assert torch.equal(clean.test[1], everything.test[1])


def test_held_out_images_are_not_trained_on():
    data = problems.drawn(problems.problem_of(ROW, "smoke"), 0)
    held = {tuple(x.flatten().tolist()) for x in data.held_out[0]}
    assert not any(tuple(x.flatten().tolist()) in held for x in data.train[0])


@pytest.mark.parametrize("name", list(problems.PROBLEMS))
def test_every_network_takes_images_of_its_row_and_has_a_symmetry(name):
    problem = problems.PROBLEMS[name]
    x = torch.randn(4, *((1, 28, 28) if problem.data == "mnist" else (3, 16, 16)))
    model = problem.build()
    assert model(x).shape == (4, 10)
    assert len(ms_optim.scale_symmetries(model, x)) > 0


def test_a_training_is_that_of_a_plain_loop():
    asked = settings_of(options={"momentum": 0.5}, test=True)
    found = training.trained(asked)
    problem, data = training.read(asked)
    torch.manual_seed(0)
    model = problem.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    shuffle = torch.Generator().manual_seed(0)
    total, step = problem.epochs * math.ceil(40 / problem.batch), 0
    for _ in range(problem.epochs):
        for chosen in torch.randperm(40, generator=shuffle).split(problem.batch):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * step / total)) / 2
            step += 1
            loss = torch.nn.functional.cross_entropy(model(data.train[0][chosen]), data.train[1][chosen])
            model.zero_grad()
            loss.backward()
            optimizer.step()
    right = model(data.train[0]).argmax(1).eq(data.train[1]).double().mean()
    assert found["train"] == float(right)
    assert set(found) == {"held_out", "train", "test"}


def test_test_images_are_looked_at_only_when_asked_for():
    assert "test" not in training.trained(settings_of())
    assert "withstood" in training.trained(settings_of(withstood=True))


def test_a_loss_that_is_not_finite_ends_the_training():
    model = problems.problem_of(ROW, "smoke").build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    data = problems.drawn(problems.problem_of(ROW, "smoke"), 0)
    with pytest.raises(DivergedError, match="the loss is nan after epoch"):
        training.descend(model, optimizer, data.train, 4, 16, 0)


@pytest.mark.parametrize("value", [math.nan, 1e200])  # of which the second has a square that is not finite
def test_a_refresh_that_cannot_measure_what_has_diverged_ends_the_training_alike(value):
    given = problems.drawn(problems.problem_of(ROW, "smoke"), 0)
    x, y = given.train[0].double(), given.train[1]
    model = ms_optim.models.MLP((64, 8, 10)).double()
    group = ms_optim.scale_symmetries(model, x)
    with torch.no_grad():
        next(model.parameters()).fill_(value)
    optimizer = ms_optim.MSSAM(model, lr=0.1, rho=0.1, group=group)
    with pytest.raises(DivergedError, match="a refresh in epoch 1: "):
        training.descend(model, optimizer, (x, y), 2, 16, 0)


def test_a_refresh_that_fails_for_another_reason_is_no_divergence():
    given = problems.drawn(problems.problem_of(ROW, "smoke"), 0)
    model, other = ms_optim.models.MLP((64, 8, 10)), ms_optim.models.MLP((64, 9, 10))
    optimizer = ms_optim.MSSAM(model, lr=0.1, rho=0.1, group=ms_optim.scale_symmetries(other, given.train[0]))
    with pytest.raises(ms_optim.errors.MsOptimError) as caught:
        training.descend(model, optimizer, given.train, 2, 16, 0)
    assert not isinstance(caught.value, DivergedError)


@pytest.mark.parametrize("name", list(equal_budget.CONTENDERS))
def test_every_contender_trains(name):
    method = equal_budget.CONTENDERS[name]
    assert len(method.values) == 5 and list(method.values) == sorted(method.values)
    trial = equal_budget.trial(ROW, name, 0.05, 0.0, method.values[2], 0, "smoke")
    assert 0.0 <= equal_budget.trained(trial.settings)["train"] <= 1.0


def test_mssam_is_that_of_the_package_s_defaults():
    """The trainings name their options in full; where a default changes, this comparison is of another optimizer."""
    model = ms_optim.models.MLP((4, 3, 2))
    for optimizer, name in ((ms_optim.MSSAM, "MSSAM"), (ms_optim.MSRegularizedSGD, "MSRegularizedSGD, trace")):
        named, default = optimizer(model, **equal_budget.CONTENDERS[name].options), optimizer(model)
        for what in ("rebalance", "every", "columns", "gauge", "granularity"):
            assert getattr(named.representative, what) == getattr(default.representative, what), what
        assert getattr(named, "gradient", None) == getattr(default, "gradient", None)


def done(name, seed, stage="fresh", held_out=0.5, status="finished", value=None, lr=0.05, **outcome):
    method = equal_budget.CONTENDERS[name]
    value = method.values[2] if value is None else value
    trial = equal_budget.trial(ROW, name, lr, 5e-4, value, seed, "cpu", stage)
    return Result(trial, status, {"held_out": held_out, **outcome}, seconds=1.0)


def test_the_reference_is_the_best_of_sam_and_the_asams_and_differences_are_paired():
    results = [done(name, 1_000, "tuning") for name in ("SAM", "ASAM, layer", "MSSAM", "SGD")]
    for seed in range(3):
        base = 0.9 + 0.01 * seed
        results += [done("SAM", seed, test=base - 0.02), done("ASAM, layer", seed, test=base)]
        results += [done("MSSAM", seed, test=base + 0.01 + 0.0001 * seed), done("SGD", seed, test=base - 0.1)]
    assert equal_budget_page.reference(results, ROW) == "ASAM, layer"
    apart = equal_budget_page.Judged.of(results, ROW).apart
    assert apart["MSSAM"].mean == pytest.approx(1.01) and apart["SGD"].mean == pytest.approx(-10.0)
    page = "\n".join(equal_budget.body([trials.line_of(result) for result in results]))
    assert "| ASAM, layer | ρ 0.01, lr 0.05, wd 0.0005 | 91.00 ± 0.58 (3) |  |  | the reference |  |  |" in page
    assert "+1.01 [+0.99, +1.03]" in page and "| better |" in page


def test_a_training_that_diverged_has_the_accuracy_of_chance():
    results = [done("SAM", 0, test=0.9), done("SAM", 1, status="diverged"), done("SAM", 2, status="failed")]
    assert equal_budget_page.accuracies(results, ROW, "SAM") == {0: 90.0, 1: 10.0}
    page = gauge.body([trials.line_of(result) for result in [done("SAM", 1_000, "tuning"), *results]])
    assert any(line.startswith(f"| {ROW} | SAM |") and line.endswith("| 50.00 ± 40.00 |  | 2 |") for line in page)
    cells = weight_noise.found([trials.line_of(result) for result in results[1:]])
    assert {(c, size) for _, _, c, size in cells} == {*weight_noise.columns()}
    assert all(by_seed == {1: 10.0} for by_seed in cells.values())


def test_an_edge_of_a_grid_is_marked():
    results = [done("SAM", 1_000, "tuning", held_out=0.4 + 0.1 * i, value=v) for i, v in enumerate((0.24, 0.48))]
    results += [done("SAM", 0, test=0.9, value=0.48), done("SAM", 1, test=0.8, value=0.48)]
    page = "\n".join(equal_budget.body([trials.line_of(result) for result in results]))
    assert "ρ 0.48 (edge), lr 0.05, wd" in page
    results += [done("SAM", 1_000, "tuning", held_out=0.4 + lr, value=0.48, lr=lr) for lr in (0.05 / 3, 0.15)]
    results += [done("SAM", 0, test=0.9, value=0.48, lr=0.15)]
    page = "\n".join(equal_budget.body([trials.line_of(result) for result in results]))
    assert "ρ 0.48 (edge), lr 0.15 (edge), wd" in page


def test_the_stages_of_a_row_search_what_the_protocol_says(monkeypatch):
    asked = []

    class Fake:
        scale = "cpu"

        def __call__(self, wanted):
            asked.append(wanted)
            return [Result(t, "finished", {"held_out": 0.5 + (t.settings.get("lr") == 0.05)}) for t in wanted]

    equal_budget.judged(Fake(), ROW)
    rates, scalars, around, *outside, fresh, weighed = asked
    assert len(rates) == 3 * 2 * 2 and {t.method for t in rates} == {"SGD"}
    methods = len(equal_budget.CONTENDERS)
    assert len(scalars) == methods * 5 * 2 and {t.settings["lr"] for t in scalars} == {0.05}
    # All scalars are level and the first is taken, SGD's 0.9: of the others one neighbour is outside.
    points = {t.setting_key: t for t in around}.values()
    count = {name: sum(t.method == name for t in points) for name in equal_budget.CONTENDERS}
    assert count == {name: 5 if name == "SGD" else 4 for name in equal_budget.CONTENDERS}
    assert len(around) == len(points) * 2 and {t.seed for t in around} == set(equal_budget.SEEDS)
    # The first scalar is at an edge (no momentum is none); one beyond it is no better, and that is the end.
    assert {t.method for t in outside[0]} == {n for n in equal_budget.CONTENDERS if not n.startswith("SGD")}
    assert {t.settings["options"]["rho"] for t in outside[0] if t.method == "SAM"} == {0.015}
    assert len(outside) == equal_budget.FURTHER and not any(outside[1:])
    assert len(fresh) == methods * 6 and not {t.seed for t in fresh} & set(equal_budget.SEEDS)
    assert all(t.settings["test"] and t.settings["withstood"] for t in fresh)
    assert not any("test" in t.settings for t in (*rates, *scalars, *around, *outside[0]))
    assert weighed[0].stage == "cost"


def test_a_larger_rate_is_tried_with_a_larger_radius_or_a_smaller_momentum():
    third = pytest.approx(0.02)
    assert equal_budget.coupled("SAM", 0.06, 0.12) == [(third, 0.12), (third, 0.06), (0.18, 0.12), (0.18, 0.24)]
    assert equal_budget.coupled("SAM", 0.06, 0.48) == [(third, 0.48), (third, 0.24), (0.18, 0.48)]
    assert equal_budget.coupled("SGD", 0.06, 0.9) == [(third, 0.9), (third, 0.95), (0.18, 0.9), (0.18, 0.8)]


def test_a_search_goes_on_beyond_the_edges_that_its_best_is_at_and_only_there():
    def asked(*tried):
        results = [done("SAM", 1_000, "tuning", held_out=h, value=v, lr=lr) for v, lr, h in tried]
        return equal_budget.beyond(equal_budget_page.best_of(results)[0], results)

    inside = [(v, lr, 0.5) for v in (0.06, 0.24) for lr in (0.05, 0.45)]
    assert asked(*inside, (0.12, 0.15, 0.6)) == []
    assert asked(*inside, (0.03, 0.15, 0.6)) == [(0.15, 0.015)]
    assert asked(*inside, (0.48, 0.15, 0.6)) == [(0.15, 0.96)]
    assert asked(*inside, (0.12, 1.35, 0.6)) == [(pytest.approx(4.05), 0.12)]
    assert asked(*inside, (0.03, 0.03, 0.6)) == [(pytest.approx(0.01), 0.03), (0.03, 0.015)]
    trace = equal_budget.CONTENDERS["MSRegularizedSGD, trace"]
    assert [equal_budget.further(trace, 1e-4, False), equal_budget.further(trace, 1e-2, True)] == [3.33e-5, 0.0333]
    assert equal_budget.further(equal_budget.CONTENDERS["SGD"], 0.95, True) == 0.975


def test_a_search_that_goes_on_follows_what_is_better_three_times_at_most():
    class Fake:
        scale = "cpu"
        fresh = ()

        def __call__(self, wanted):
            self.fresh = [t for t in wanted if t.stage == "fresh"] or self.fresh
            rho = [t.settings.get("options", {}).get("rho", 1.0) for t in wanted]
            return [Result(t, "finished", {"held_out": 0.5 - 0.01 * r}) for t, r in zip(wanted, rho, strict=True)]

    fake = Fake()
    equal_budget.judged(fake, ROW)
    assert {t.settings["options"]["rho"] for t in fake.fresh if t.method == "SAM"} == {0.00375}


def test_a_method_that_never_ends_is_left_out_and_the_others_are_judged():
    results = [done("SAM", seed, "tuning") for seed in (0, 1)]
    results += [done("MSSAM", seed, "tuning", held_out=None, status="failed") for seed in (0, 1)]
    assert [choice.setting.method for choice in equal_budget_page.best_of(results)] == ["SAM"]


def test_what_an_optimizer_draws_depends_on_the_seed_if_the_settings_say_so():
    def penalised(seed, **more):
        settings = dict(equal_budget.trial(ROW, "MSRegularizedSGD, noise", 0.05, 0.0, 1e-4, seed, "smoke").settings)
        settings["problem"] = ROW
        problem, data = training.read({**settings, "seed": 0})
        model, _ = training.begun(problem, {**settings, "seed": 0}, data)
        return training.optimizer_in({**settings, **more}, model, problem, data).state_dict()

    assert str(penalised(0)) == str(penalised(0)) != str(penalised(1))
    assert str(penalised(0, own_stream=False)) == str(penalised(1, own_stream=False))


def test_what_was_kept_is_read_again_and_not_run_again(tmp_path):
    kept = []
    run = trials.Trainings("smoke", "benchmarks.training:trained", HERE, lambda runs: kept.append(runs.lines))
    wanted = [Trial(settings_of(seed=seed), "SGD", ROW) for seed in (0, 1)]
    first = run(wanted)
    lines = [json.loads(json.dumps(line)) for line in kept[-1]]
    assert len(lines) == 2 and [trials.line_of(trials.result_of(line)) for line in lines] == lines
    never = trials.Trainings("smoke", "benchmarks.training:nowhere", HERE, lambda runs: None, lines)
    assert [r.outcome for r in never(wanted)] == [r.outcome for r in first]
    lines[0] |= {"status": "failed", "failed": "killed"}
    again = trials.Trainings("smoke", "benchmarks.training:trained", HERE, lambda runs: None, lines)
    assert [r.outcome for r in again(wanted)] == [r.outcome for r in first]


def test_an_interrupted_run_goes_on_in_its_folder(tmp_path):
    equal = ["--scale", "smoke", "--out", str(tmp_path)]

    def one(run):
        run([Trial(settings_of(seed=0, options=MOMENTUM), "SGD", ROW)])

    def two(run):
        run([Trial(settings_of(seed=seed, options=MOMENTUM), "SGD", ROW) for seed in (0, 1)])

    trials.main(None, "gauge", "benchmarks.training:trained", one, equal)
    (folder,) = (tmp_path / "gauge").iterdir()
    before = (folder / "runs.jsonl").read_text().splitlines()
    trials.main(None, "gauge", "benchmarks.training:trained", two, ["--scale", "smoke", "--resume", str(folder)])
    after = (folder / "runs.jsonl").read_text().splitlines()
    assert len(before) == 1 and len(after) == 2 and after[0] == before[0]
    described = json.loads((folder / "environment.json").read_text())
    assert described["hosts"] and [sorted(each) for each in described["resumed"]] == [
        ["commit", "cpu", "date", "torch", "uncommitted_changes"]
    ]
    assert sorted(path.name for path in folder.iterdir()) == ["environment.json", "runs.jsonl"]

    # With other settings the former training is no result any more, and is not lost.
    trials.main(None, "gauge", "benchmarks.training:trained", one, ["--scale", "smoke", "--resume", str(folder)])
    assert (folder / "runs.jsonl").read_text().splitlines() == after[:1]
    assert (folder / "not_asked_for.jsonl").read_text().splitlines() == after[1:]


def test_a_run_is_not_overwritten_nor_mixed_with_another(tmp_path, capsys):
    def one(run):
        run([Trial(settings_of(seed=0, options=MOMENTUM), "SGD", ROW)])

    def never(run):
        raise AssertionError("it has begun")

    trials.main(None, "gauge", "benchmarks.training:trained", one, ["--scale", "smoke", "--out", str(tmp_path)])
    (folder,) = (tmp_path / "gauge").iterdir()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    resume = ["--resume", str(folder)]
    for name, options, word in (
        ("gauge", ["--scale", "smoke", "--out", str(tmp_path)], "go on with it by --resume"),
        ("equal_budget", ["--scale", "smoke", *resume], "a run of gauge, and equal_budget was called"),
        ("gauge", ["--scale", "cpu", *resume], "a run with --scale smoke, and --scale cpu was asked for"),
        ("gauge", ["--scale", "smoke", "--resume", str(tmp_path / "gauge")], "No such file"),
    ):
        with pytest.raises(SystemExit, match="2"):
            trials.main(None, name, "benchmarks.training:trained", never, options)
        assert word in " ".join(capsys.readouterr().err.split())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_two_stages_ask_for_is_trained_and_kept_once():
    kept = []
    run = trials.Trainings("smoke", "benchmarks.training:trained", HERE, lambda runs: kept.append(len(runs.lines)))
    wanted = [Trial(settings_of(), "SGD", ROW)]
    assert run(wanted)[0].outcome == run(wanted)[0].outcome and kept == [1]
    run([Trial(settings_of(), "SGD", ROW, "fresh")])  # by another name it is another line
    assert kept == [1, 2]


def withstood(name, seed, value):
    result = done(name, seed, withstood={"none": {"0": 0.9}, "gaussian": {"0.1": value}})
    return trials.line_of(result)


def test_the_page_of_noise_marks_what_is_above_sam():
    runs = [withstood("SAM", seed, 0.8 + 0.01 * seed) for seed in range(4)]
    runs += [withstood("MSSAM", seed, 0.85 + 0.0101 * seed) for seed in range(4)]
    signs = weight_noise.significant(weight_noise.found(runs), ROW)
    assert signs == {("MSSAM", "gaussian", "0.1"): 1}


def test_the_report_says_better_only_where_it_is_so_after_a_correction_for_all_rows_and_sizes():
    """One of four sizes at p = 0.03 is what chance gives; at p < 0.05 / 4 it is not."""

    def made(first):
        runs = []
        for seed, noise in enumerate((-0.02, 0.0, 0.02)):
            values = {"SAM": dict.fromkeys(("0.1", "0.2", "0.4", "0.8"), 0.5)}
            values["MSSAM"] = {size: 0.5 + noise for size in values["SAM"]} | {"0.1": 0.5 + first + 0.3 * noise}
            for name, sizes in values.items():
                runs.append(trials.line_of(done(name, seed, withstood={"none": {"0": 0.9}, "gaussian": sizes})))
        (row,) = (row for row in weight_noise.summary(runs) if "gaussian noise on weights" in row.claim)
        ahead = [{**run, "withstood": {**run["withstood"], "none": {"0": 0.8}}} for run in runs[::2]]
        (level,) = (row for row in weight_noise.summary([*ahead, *runs[1::2]]) if "gaussian noise on" in row.claim)
        # Ten points less without corruption are ten points more that were withstood.
        assert float(level.ours.split("losses ")[1].split()[0]) == pytest.approx(first_mean(row) + 10)
        counted = row.ours.split(" (row, size)")[0].replace(", more", " and more")
        assert f"gaussian noise on weights, {counted}." in weight_noise.in_short(runs)
        return row.ours.split(";")[0], row.verdict

    def first_mean(row):
        return float(row.ours.split("losses ")[1].split()[0])

    # The mean of three differences 0.006 apart is t = mean √3 / 0.006: p = 0.03 at 0.02, and 0.005 at 0.05.
    assert made(0.02) == ("less in 0, more in 0 of 4 (row, size)", "no difference shown")
    assert made(0.05) == ("less in 1, more in 0 of 4 (row, size)", "better")
    assert made(-0.05) == ("less in 0, more in 1 of 4 (row, size)", "worse")


def test_cost_is_relative_to_sgd_and_counts_gradients():
    asked = {"cost": {"SGD": ["SGD", {}], "SAM": ["SAM", {}]}, "problem": ROW, "scale": "smoke", "seed": 0}
    found = cost.measured(asked)["methods"]
    assert found["SGD"]["ratio"] == 1.0 and found["SGD"]["gradients"] == 1.0 and found["SAM"]["gradients"] == 2.0


@pytest.mark.parametrize("name", [name for name, method in equal_budget.CONTENDERS.items() if method.epochs == 1])
def test_a_refresh_is_in_the_memory_of_whatever_is_balanced(name, monkeypatch):
    asked = []
    monkeypatch.setattr(cost, "stepping", lambda problem, data, name, options: asked.append(options) or (lambda: 0))
    method = equal_budget.CONTENDERS[name]
    monkeypatch.setattr(cost.torch, "set_num_threads", lambda count: None)
    cost.prepared({"problem": ROW, "scale": "smoke", "seed": 0}, method.optimizer, method.options)
    optimizer = training.optimizer_of(ms_optim.models.MLP((4, 3, 2)), method.optimizer, 0.1, 0.0, asked[0])
    balanced = getattr(optimizer, "rebalance", None) is not None
    assert balanced == (asked[0].get("refresh_every") == cost.STEPS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:MSSAM was dropped", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_variant_of_the_gauge_trains():
    for name, variant in gauge.VARIANTS.items():
        assert "test" in training.trained(gauge.trial(ROW, name, 0.05, variant.values[1], 0, "smoke", "fresh").settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", [equal_budget, weight_noise])
def test_the_scale_of_papers_asks_for_a_gpu_at_once(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--scale", "paper"])
    assert "--scale paper is for a GPU" in capsys.readouterr().err


def test_settings_of_another_size_are_refused():
    settings = dict(equal_budget.trial(ROW, "SAM", 0.05, 0.0, 0.1, 0, "smoke").settings)
    settings["row"] = {**settings["row"], "epochs": 99}
    with pytest.raises(ValueError, match="begin a run of its own"):
        equal_budget.trained(settings)


def test_noise_on_weights_is_no_more_complete_than_the_trainings_it_takes_over(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_noise, "RESULTS", tmp_path)
    all_of_it = {}
    for corruption, size in weight_noise.columns():
        all_of_it.setdefault(corruption, {})[size] = 0.8
    results = [done(name, seed, withstood=all_of_it) for name in ("SAM", "MSSAM") for seed in range(2)]
    lines = [trials.line_of(result) for result in results]
    for complete in (False, True):
        described = {"commit": "0" * 40, "date": "2026-01-01", "complete": complete}
        trials.record(tmp_path / "equal_budget" / "2026-01-01_cpu1", described, lines)
        out = tmp_path / f"out {complete}"
        weight_noise.main(["--workers", "0", "--out", str(out)])
        (folder,) = (out / "weight_noise").iterdir()
        found = json.loads((folder / "environment.json").read_text())
        assert found["complete"] == complete and found["taken_from"]["run"] == "equal_budget/2026-01-01_cpu1"
        assert [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()] == lines


def test_the_figure_has_the_methods_and_says_what_is_too_far_below(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    accuracies = {"SAM": 0.9, "MSSAM": 0.91, "RSAM": 0.5}
    results = [done(name, s, test=value + 0.001 * s * s) for name, value in accuracies.items() for s in range(3)]
    results += [done("SGD", s, test=0.88 + 0.002 * s) for s in range(3)]
    path = tmp_path / "figure.svg"
    equal_budget.draw([trials.line_of(result) for result in results], path)
    drawn = path.read_text()
    assert "◂ -40.0" in drawn and f"{ROW}" in drawn and "against SAM" in drawn and "MSRegularizedSGD, noise" in drawn
    equal_budget.draw([], tmp_path / "nothing.svg")
    assert not (tmp_path / "nothing.svg").exists()


def test_of_two_choices_the_one_that_holds_is_judged():
    """A run that was stopped and went on chose otherwise, and what was judged before is still among its lines."""
    results = [done("SAM", seed, "tuning", held_out=0.5, value=0.06) for seed in (0, 1)]
    results += [done("SAM", seed, "tuning", held_out=0.6, value=0.12) for seed in (0, 1)]
    now = [done("SAM", seed, value=0.12, test=0.9) for seed in range(2)]
    before = [done("SAM", seed, value=0.06, test=0.8) for seed in range(3)]
    for lines in (results + now + before, before + results + now):
        assert equal_budget_page.accuracies(lines, ROW, "SAM") == {0: 90.0, 1: 90.0}
        assert equal_budget_page.judged_of(lines) == now
    assert equal_budget_page.accuracies(results + before, ROW, "SAM") == {}  # chosen, and not judged yet


def test_the_page_tells_the_protocol_and_edges_are_of_what_was_tried():
    results = [done("SAM", seed, "tuning", held_out=0.5 + v, value=v) for seed in (0, 1) for v in (0.06, 0.12)]
    results += [done("SAM", seed, value=0.12, test=0.9) for seed in range(2)]
    lines = equal_budget.body([trials.line_of(result) for result in results])
    assert lines[0].startswith("*Search.*") and not any("MS_OPTIM_DATA" in line for line in lines)
    (row,) = (line for line in lines if line.startswith("| SAM "))
    assert "ρ 0.12 (edge), lr 0.05, wd 0.0005" in row and "the reference" in row


def test_in_short_rows_are_counted_by_their_verdicts(monkeypatch):
    monkeypatch.setitem(globals(), "ROW", "MNIST 10,000, 60 % noise, MLP")
    results = [done(name, seed, "tuning") for name in ("SAM", "MSSAM") for seed in (0, 1)]
    results += [done("SAM", seed, test=0.9 + 0.001 * seed) for seed in range(3)]
    for shift, expected in ((0.02, "better on 1, worse on 0, and no"), (-0.02, "better on 0, worse on 1, and no")):
        ours = [done("MSSAM", seed, test=0.9 + shift + 0.0011 * seed) for seed in range(3)]
        sentence = equal_budget.in_short([trials.line_of(result) for result in results + ours])
        assert f"on 1 of 4 judging problems, against the best of SAM and three ASAMs: MSSAM is {expected}" in sentence
    plain = [done("SGD", seed, test=0.8 + 0.001 * seed) for seed in range(3)]
    sentence = equal_budget.in_short([trials.line_of(result) for result in results + ours + plain])
    assert "Against SGD of as many epochs, half the passes, MSSAM is better on 1, worse on 0" in sentence
    assert "on 0 of 4 judging problems" in equal_budget.in_short([])
    searched = equal_budget.body([trials.line_of(result) for result in results[:2]])
    assert searched[-1] == "Searched so far, and not judged."


def test_the_overview_has_a_row_per_judged_problem_and_marks_what_is_better_or_worse():
    results = [done("ASAM, layer", seed, test=0.8 + 0.0021 * seed) for seed in range(3)]
    results += [done("SAM", seed, test=0.9 + 0.002 * seed) for seed in range(3)]
    results += [done("MSSAM", seed, test=0.92 + 0.0021 * seed) for seed in range(3)]
    runs = [trials.line_of(result) for result in results]
    row = next(line for line in equal_budget.overview(runs) if line.startswith(f"| {ROW}"))
    head = equal_budget.overview(runs)[0]
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["SAM"] == "90.20 ± 0.12 *" and cells["MSSAM"] == "92.21 ± 0.12 ▲"
    assert cells["ASAM, layer"].endswith("▼") and cells["SGD"] == ""
    assert equal_budget.overview(runs[:0]) == []


def test_what_ours_were_chosen_by_does_not_count_in_short():
    results = [done("SAM", seed, test=0.9 + 0.002 * seed) for seed in range(3)]
    results += [done("MSSAM", seed, test=0.92 + 0.0021 * seed) for seed in range(3)]
    sentence = equal_budget.in_short([trials.line_of(result) for result in results])
    assert "on 0 of 4 judging problems" in sentence and "MSSAM is better on 0" in sentence


def test_the_report_has_one_row_of_ours_and_one_of_the_others_for_a_problem():
    results = [done("SAM", seed, test=0.9 + 0.002 * seed) for seed in range(3)]
    results += [done("MSSAM", seed, test=0.92 + 0.0021 * seed) for seed in range(3)]
    results += [done("RSAM", seed, test=0.9 + 0.0021 * seed) for seed in range(3)]
    ours, others = equal_budget.summary([trials.line_of(result) for result in results])
    assert ours.claim == others.claim and "points over the 90.20 % of SAM" in ours.claim
    assert (ours.verdict, others.verdict) == ("better: MSSAM", "no difference shown: RSAM")
    assert ours.ours.startswith("MSSAM +2.01 [") and (ours.detail, others.detail) == (False, True)
