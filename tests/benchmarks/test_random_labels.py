"""The claim about random labels: ensembles that are plain SGD, labels that move, and rank correlations by seed."""

import json
import math
import xml.etree.ElementTree as ElementTree

import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from benchmarks import networks, random_labels, random_labels_page
from benchmarks.ensembles import Training, accuracy, corrupted, train
from benchmarks.random_labels_page import ARCHIVE, RATIO, Point, overall, verdict, within
from benchmarks.ranks import Rank, correlation, kendall, mean_correlation
from benchmarks.render import figures, pages


def images(count=40):
    return torch.randn(count, 1, 8, 8), torch.randint(0, 10, (3, count))


def members(name, count=3):
    return [networks.NETWORKS[name].tiny(10) for _ in range(count)]


def plain_sgd(model, x, y, training, draw):
    """The same training by a loop over batches."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=training.lr, momentum=training.momentum, weight_decay=training.weight_decay
    )
    t = 0
    for _ in range(training.epochs):
        for chosen in torch.randperm(len(x), generator=draw).split(training.batch):
            for group in optimizer.param_groups:
                group["lr"] = training.lr / (training.decay * t + 1)
            t += 1
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()


@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_every_member_of_an_ensemble_is_trained_as_if_alone(name):
    (x, labels), together, alone = images(), members(name), members(name)
    for one, other in zip(together, alone, strict=True):
        other.load_state_dict(one.state_dict())
    before = [weight.clone() for model in together for weight in model.parameters()]
    # 40 images in batches of 16: the last of an epoch is smaller; a decay large enough to be seen.
    training = Training(3, 16, 0.1, weight_decay=1e-2, decay=0.1)
    train(together, x, labels, training, torch.Generator().manual_seed(5))
    for one, other, y in zip(together, alone, labels, strict=True):
        plain_sgd(other, x, y, training, torch.Generator().manual_seed(5))
        for weight, twin in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(weight, twin, rtol=1e-10, atol=1e-12)
    after = [weight for model in together for weight in model.parameters()]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_the_precision_of_a_training_is_its_own(monkeypatch):
    (x, labels), seen = images(), []
    before = torch.get_float32_matmul_precision()
    step = torch.optim.SGD.step

    def noted(self, *arguments):
        seen.append(torch.get_float32_matmul_precision())
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    train(members("mlp"), x, labels, Training(1, 20, 0.1, precision="medium"), torch.Generator())
    assert seen == ["medium"] * 2
    assert torch.get_float32_matmul_precision() == before


def test_an_ensemble_needs_labels_for_each_and_no_buffers():
    (x, labels), draw = images(), torch.Generator()
    with pytest.raises(ValueError, match="2 models and 3 rows"):
        train(members("mlp", 2), x, labels, Training(1, 8, 0.1), draw)
    normalised = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.BatchNorm1d(10))]
    with pytest.raises(ValueError, match="running_mean"):
        train(normalised, x, labels[:1], Training(1, 8, 0.1), draw)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_exactly_the_share_of_labels_is_permuted(ratio):
    y = torch.arange(1000)  # all different, so that each move is seen
    moved = corrupted(y, ratio, torch.Generator().manual_seed(0))
    assert moved.sort().values.equal(y)
    # A random permutation leaves one place as it is on average, whatever its size.
    assert ratio * 1000 - 6 <= int(moved.ne(y).sum()) <= ratio * 1000


def test_a_tenth_of_the_moved_labels_stays_right():
    y = torch.arange(10_000) % 10
    moved = corrupted(y, 0.5, torch.Generator().manual_seed(0))
    assert moved.bincount().equal(y.bincount())
    assert float(moved.ne(y).double().mean()) == pytest.approx(0.45, abs=0.01)
    with pytest.raises(ValueError, match="1.5"):
        corrupted(y, 1.5, torch.Generator())


def test_accuracy_counts_batches_of_any_size_and_nothing_of_infinite_logits():
    model, x = torch.nn.Identity(), torch.eye(10)
    assert accuracy(model, x, torch.arange(10), batch=3) == 1.0
    assert accuracy(model, x.roll(1, 1), torch.arange(10), batch=4) == 0.0
    assert accuracy(model, torch.full((4, 10), torch.inf), torch.zeros(4, dtype=torch.long)) == 0.0


def test_tau_is_scipys_with_ties_and_with_repeated_runs():
    x, y = torch.randint(0, 8, (30,)).tolist(), torch.randint(0, 8, (30,)).tolist()
    assert kendall(x, y).item() == pytest.approx(scipy.stats.kendalltau(x, y).statistic)
    weights = torch.randint(0, 4, (1, 30)).double()
    again = [i for i, count in enumerate(weights[0].int().tolist()) for _ in range(count)]
    expected = scipy.stats.kendalltau([x[i] for i in again], [y[i] for i in again]).statistic
    assert kendall(x, y, weights).item() == pytest.approx(expected)
    assert math.isnan(kendall([1.0, 1.0], [1.0, 2.0]).item())


def test_intervals_of_order_and_of_its_absence():
    seeds = [i // 5 for i in range(50)]
    x = torch.rand(50).tolist()
    same = correlation(x, [2.0 * value for value in x], seeds)
    assert (same.value, same.n, str(same)) == (1.0, 50, "1.00")  # no seed makes a difference
    chance = correlation(x, torch.rand(50).tolist(), seeds)
    assert chance.low < 0.0 < chance.high and chance.low < chance.value < chance.high
    few = correlation(x[:10], torch.rand(10).tolist(), seeds[:10])  # of two seeds
    assert math.isnan(few.low) and not math.isnan(few.value)
    nothing = mean_correlation([])
    assert math.isnan(nothing.value) and str(nothing) == "—"


def test_the_interval_is_the_jackknife_over_seeds():
    x, y, seeds = torch.rand(12).tolist(), torch.rand(12).tolist(), [i % 4 for i in range(12)]
    found = correlation(x, y, seeds)
    left = [
        scipy.stats.kendalltau(*zip(*((a, b) for a, b, s in zip(x, y, seeds, strict=True) if s != k), strict=True))[0]
        for k in range(4)
    ]
    error = math.sqrt(3 / 4 * sum((value - sum(left) / 4) ** 2 for value in left))
    reach = 3.1824463 * error  # Student's t with three degrees of freedom, 97.5 %
    assert (found.low, found.high) == pytest.approx((max(found.value - reach, -1), min(found.value + reach, 1)))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """τ of two normal numbers of correlation r is 2/π asin r; ten seeds of eleven members."""
    r, hits = 0.6, 0
    truth = 2 / math.pi * math.asin(r)
    for _ in range(60):
        x = torch.randn(110)
        y = r * x + math.sqrt(1 - r * r) * torch.randn(110)
        found = correlation(x.tolist(), y.tolist(), [i // 11 for i in range(110)])
        hits += found.low <= truth <= found.high
    assert hits >= 51  # 95 % of 60 is 57, with a standard error of 1.7


def made(gap_of, value_of, ratios=(0.0, 0.5, 1.0), seeds=10):
    """Networks whose gap and measure are functions of ratio and seed."""
    return [
        Point(seed, ratio, gap_of(ratio, seed), 1.0, {"normalized": value_of(ratio, seed)})
        for ratio in ratios
        for seed in range(seeds)
    ]


def lines_of(found):
    """Lines of a run that holds these networks."""
    runs = []
    for seed in {p.seed for p in found}:
        mine = [{"ratio": p.ratio, "gap": p.gap, "values": p.values} for p in found if p.seed == seed]
        runs.append({"network": "MLP", "round": seed, "members": [{**each, "train_accuracy": 1.0} for each in mine]})
    return runs


def test_a_measure_that_knows_the_ratio_alone_is_found_out():
    found = made(lambda ratio, seed: ratio + 0.01 * seed, lambda ratio, seed: 10 * ratio - 0.1 * seed)
    # Of 435 pairs 300 are of different ratios, and all in order; the others are all the wrong way round.
    assert overall(found, "normalized").value == pytest.approx((300 - 135) / 435)
    assert within(found, "normalized").value == pytest.approx(-1.0)
    assert within(found, "normalized", 0.5).n == 10
    assert overall(found, RATIO).value == pytest.approx(300 / math.sqrt(435 * 300))


def test_in_short_says_what_is_left_of_an_order_within_a_ratio():
    found = made(lambda ratio, seed: ratio + 0.01 * seed, lambda ratio, seed: 10 * ratio - 0.1 * seed)
    said = random_labels.in_short(lines_of(found))
    assert f"MLPs that fitted random labels (n = {len(found)})" in said
    assert f"normalized sharpness {overall(found, 'normalized')}, and the share" in said
    assert f"within a share, minimum sharpness {within(found, 'minimum, layer')}" in said
    assert random_labels.in_short([]) == ""


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_report_says_of_which_measures_an_order_within_a_ratio_is_shown(sign):
    noise = [3, 7, 1, 0, 9, 4, 8, 2, 6, 5]
    # Nearly in order: where nothing is out of it there is no interval.
    found = made(lambda ratio, seed: ratio + 0.01 * seed, lambda ratio, seed: ratio + sign * (seed + 0.2 * noise[seed]))
    (row,) = (row for row in random_labels.summary(lines_of(found)) if "within a ratio" in row.claim)
    said = "shown to be above 0: normalized" if sign > 0 else "none is shown to be above 0"
    assert row.verdict == f"{said}; the largest is that of normalized"


def test_what_has_no_value_is_left_out():
    found = made(lambda ratio, seed: ratio, lambda ratio, seed: None if seed else ratio)
    assert overall(found, "normalized").n == 3
    assert overall(found, "minimum, layer").n == 0


def test_verdicts():
    assert verdict(0.5, Rank(0.4, 0.3, 0.6, 9)) == "in our interval"
    assert verdict(0.5, Rank(0.8, 0.7, 0.9, 9)) == "ours is higher"
    assert verdict(0.5, Rank(0.2, 0.1, 0.3, 9)) == "ours is lower"
    assert verdict(0.5, Rank(math.nan, math.nan, math.nan, 0)) == "not measured"
    assert verdict(0.5, Rank(1.0, math.nan, math.nan, 3)) == "too few runs for an interval"


def test_what_cannot_be_measured_of_a_dead_network_is_said_and_stops_nothing():
    model, (x, labels) = members("mlp", 1)[0].float(), images(8)
    with torch.no_grad():
        model[1].bias.fill_(math.nan)
    found = random_labels.measured(model, x.float(), labels[0], 8, 8, (8, 1, 2))
    assert set(found["values"].values()) == {None}
    assert all("not finite" in note or "nan" in note for (note,) in found["notes"].values())
    json.dumps(found, allow_nan=False)


def test_every_seed_is_asked_for_once_and_the_paper_is_its_set_up():
    class Asked:
        scale = "paper"

        def __call__(self, wanted):
            self.wanted = wanted

    asked = Asked()
    random_labels.plan(asked)
    assert [trial.problem for trial in asked.wanted] == ["MLP"] * 10 + ["LeNet"] * 10
    settings = asked.wanted[0].settings
    assert (settings["images"], settings["training"]["epochs"], settings["training"]["batch"]) == (60_000, 3_000, 1_024)
    assert len(settings["ratios"]) == 11 and settings["device"] == "cuda"
    assert {trial.seed for trial in asked.wanted} == set(range(10))


def test_the_smoke_run_renders_its_page_and_its_figure(tmp_path, capsys):
    torch.set_default_dtype(torch.float32)  # as in a process of its own; the fixture sets it back
    random_labels.main(["--scale", "smoke", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    (folder,) = (tmp_path / "random_labels").iterdir()
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert [run["status"] for run in runs] == ["finished"] * len(runs)
    for run in runs:
        for member in run["members"]:
            assert member["gap"] == pytest.approx(member["train_accuracy"] - member["test_accuracy"])
            known = {name for name, value in member["values"].items() if value is not None}
            assert known >= set(random_labels_page.MEASURES) - {"Rényi", "Rényi, by layer"}, member["notes"]
    assert printed.endswith(pages("random_labels", tmp_path / "random_labels").split("\n![")[0] + "\n")
    assert "| LeNet | minimum, layer | ratio 0.5 | 0.2 | — | 1 | not measured |" in printed  # of a single run
    for network, measure in ARCHIVE:
        assert f"| {network} | {measure} | all runs |" in printed
    figures("random_labels", tmp_path / "random_labels")
    assert ElementTree.parse(folder / "figure.svg").getroot().tag.endswith("svg")
