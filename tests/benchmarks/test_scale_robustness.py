"""Scale robustness: the starts are equivalent and as large as said, distances see what differs, and verdicts follow."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import ms_optim
from benchmarks import scale_robustness
from benchmarks.equivalent import (
    ROUNDING,
    changed,
    compared,
    decades,
    distance,
    element_of,
    group_of,
    probabilities,
    started,
    trajectory,
)
from benchmarks.flatness import Curve, curve_of, verdict
from benchmarks.problems import Data, Problem
from benchmarks.trials import line_of
from ms_optim import models
from ms_optim.sweep import Result

ROOT = Path(__file__).parent.parent.parent
PROBLEM = Problem("random", 40, 0.0, lambda: models.MLP((6, 7, 5, 10)), 3, 10)


def data():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=draw), torch.randint(0, 10, (40,), generator=draw)
    return Data((x, y), (x[:9], y[:9]), (x[9:], y[9:]))


def settings(optimizer, granularity="layer", /, **options):
    told = {"optimizer": optimizer, "options": options, "lr": 0.05, "weight_decay": 5e-4, "seed": 0}
    return told | {"granularity": granularity, "starts": [0.0, ROUNDING, 1.0], "dtype": "float64"}


@hypothesis.settings(max_examples=8)
@hypothesis.given(
    widths=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    bias=st.booleans(),
    granularity=st.sampled_from(["layer", "neuron"]),
    size=st.floats(0.1, 4.0),
    seed=st.integers(0, 2**16),
)
def test_starts_are_as_large_as_said_and_compute_the_same(widths, bias, granularity, size, seed):
    torch.manual_seed(seed)
    usual = models.MLP((3, *widths, 10), bias=bias).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    group = group_of(usual, x, granularity)
    model = started(usual, group, size, seed)
    factors = [(new / old).detach()[old != 0] for new, old in zip(model.parameters(), usual.parameters(), strict=True)]
    found = torch.cat([each.flatten() for each in factors])
    assert math.isclose(float(found.max() / found.min()), 10**size, rel_tol=1e-9)
    # Products over at most four layers, of factors that are rounded once each.
    assert changed(usual, model, x, training=False) < 1e-12


def test_sizes_of_one_seed_are_multiples_of_one_direction():
    model = models.MLP((3, 5, 4, 2))
    group = ms_optim.scale_symmetries(model, torch.ones(2, 3))
    one, two = (element_of(group, size, seed=3) for size in (1.0, 2.0))
    torch.testing.assert_close(2 * one, two)
    assert decades(group, two) == pytest.approx(2.0)
    assert not torch.allclose(one, element_of(group, 1.0, seed=4))


@pytest.mark.parametrize("seed", range(3))
def test_inputs_of_batch_norms_grow(seed):
    torch.manual_seed(0)
    usual = models.small_resnet(channels=4)
    x = torch.randn(8, 1, 8, 8)
    group = ms_optim.scale_symmetries(usual, x)
    t = element_of(group, 4.0, seed)
    assert decades(group, t) == pytest.approx(4.0)
    grown = torch.stack([statistics.row for statistics in group.statistics]) @ t
    assert float(grown.min()) > -1e-12 and float(grown.max()) > 0.1
    model = started(usual, group, 4.0, seed)
    assert changed(usual, model, x, training=False) < 1e-4
    # ε stands still: that the variances grew is all that keeps the function in training mode.
    assert 0 < changed(usual, model, x, training=True) < 1e-3


@pytest.mark.parametrize(
    ("granularity", "optimizer", "options"),
    [
        ("layer", "MSSAM", {"rho": 0.05}),
        ("layer", "MSRegularizedSGD", {"strength": 1e-3}),
        ("layer", "MSRegularizedSGD", {"strength": 1e-4, "gradient": "noise"}),
        ("neuron", "MSSAM", {"rho": 0.05, "granularity": "neuron"}),
        ("neuron", "MSRegularizedSGD", {"strength": 1e-3, "granularity": "neuron"}),
    ],
)
def test_move_follows_one_trajectory_from_equivalent_starts(granularity, optimizer, options):
    lines = compared(settings(optimizer, granularity, **options), PROBLEM, data())["starts"]
    usual, rounding, scaled = lines
    assert usual["distances"] == [0.0] * 3
    assert max(scaled["distances"]) < 1e-8 < rounding["distances"][-1]
    assert scaled["test"] == usual["test"] and not scaled["diverged"]


@pytest.mark.parametrize("granularity", ["layer", "neuron"])
def test_sgd_follows_another(granularity):
    *_, scaled = compared(settings("SGD", granularity), PROBLEM, data())["starts"]
    assert scaled["distances"][-1] > 1e-2


def test_layers_are_not_enough_for_units():
    *_, scaled = compared(settings("MSSAM", "neuron", rho=0.05), PROBLEM, data())["starts"]
    assert scaled["distances"][-1] > 1e-2


def test_a_training_that_diverges_is_one_that_guesses():
    given = data()
    model = PROBLEM.build()
    with torch.no_grad():
        next(model.parameters()).mul_(math.inf)
    found, diverged = trajectory(model, settings("SGD"), PROBLEM, given, 3, None)
    assert diverged and len(found) == 3
    assert all(torch.equal(p, torch.full((9, 10), 0.1, dtype=torch.float64)) for p in found)


def test_a_refresh_that_finds_weights_that_are_not_finite_is_a_divergence():
    given = data()
    model = PROBLEM.build()
    group = ms_optim.scale_symmetries(model, given.train[0])
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    _, diverged = trajectory(model, settings("MSSAM", rho=0.1), PROBLEM, given, 3, group)
    assert diverged


def test_distances():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert distance(a, a) == 0.0
    assert distance(a, b) == pytest.approx(math.sqrt(2))
    broken = torch.nn.Linear(1, 2)
    torch.nn.init.constant_(broken.weight, math.inf)
    assert probabilities(broken, torch.ones(3, 1)).tolist() == [[0.5, 0.5]] * 3


def curve(accuracies, rounding=0.1, apart=0.1, training_error=0.0, diverged=0):
    """A contender with three seeds: accuracy at the usual start and at each size."""
    usual, *scaled = accuracies
    starts = {0.0: (usual, 0.0), ROUNDING: (usual, rounding), **{d: (a, apart) for d, a in enumerate(scaled, 1)}}
    values = {
        start if start == ROUNDING else float(start): {
            "test": test,
            **{name: [far] * 3 for name in ("distance_end", "distance_mean")},
            "training_error": [training_error if start not in (0.0, ROUNDING) else 0.0] * 3,
        }
        for start, (test, far) in starts.items()
    }
    return Curve(values, dict.fromkeys(values, 0) | {0.0: diverged}, {})


USUAL = [0.900, 0.905, 0.910]


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (curve([USUAL, [0.901, 0.904, 0.911]]), "flat"),
        (curve([USUAL, USUAL]), "flat"),  # no spread, and no interval
        (curve([USUAL, [0.906, 0.911, 0.916]]), "accuracy changes"),  # no spread, and more than half a point
        (curve([USUAL, [0.898, 0.9031, 0.9079]]), "accuracy changes"),  # a fifth of a point, every time
        (curve([USUAL, USUAL, [0.88, 0.90, 0.91]]), "accuracy changes"),  # noisy, at one of two sizes
        (curve([USUAL, USUAL], apart=0.19), "flat"),
        (curve([USUAL, USUAL], apart=0.21), "trajectory changes"),
        (curve([USUAL, [0.1, 0.1, 0.1]], apart=0.9), "accuracy and trajectory change"),
        (curve([USUAL, [0.1, 0.1, 0.1]], training_error=2e-3), "no size counts"),
        (curve([USUAL, USUAL], diverged=1), "diverges as it is"),
    ],
)
def test_verdicts(found, word):
    assert verdict(found) == word


def made(row, contender, granularity, seed, scaled, **more):
    starts = [0.0, ROUNDING, 2.0]
    trial = scale_robustness.trial(row, contender, 0.05, None, seed, "cpu", granularity=granularity, starts=starts)
    common = {"held_out": 0.7, "function_error": 0.0, "training_error": 0.0, "diverged": False}
    lines = [
        {"start": 0, "test": 0.9, "distances": [0.0, 0.0], **common},
        {"start": ROUNDING, "test": 0.9, "distances": [0.1, 0.2], **common},
        {"start": 2, "test": scaled, "distances": [0.1, 0.2], **common, **more},
    ]
    return Result(trial, "finished", {"test": 0.9, "held_out": 0.7, "starts": lines}, seconds=1.0)


def test_tables_are_made_of_the_lines():
    row = scale_robustness.MLP
    results = [made(row, "MSSAM, move, κ = 0", "layer", seed, 0.9) for seed in range(3)]
    results += [made(row, "SGD", "layer", seed, 0.1, diverged=True) for seed in range(3)]
    found = curve_of(results, row, "layer", "SGD")
    assert found.sizes == (2.0,) and found.diverged == {0.0: 0, ROUNDING: 0, 2.0: 3}
    assert found.mean(2.0, "distance_mean") == pytest.approx(0.15)
    assert curve_of(results, row, "neuron", "SGD") is None
    page = "\n".join(scale_robustness.body([line_of(result) for result in results]))
    assert "1 of 1 comparisons are flat; reached" in page
    sentence = scale_robustness.in_short([line_of(result) for result in results])
    assert "trajectory in 1 of 1 comparisons" in sentence and sentence.endswith("SGD, SAM and ASAM in 0 of 1.")
    assert "| SGD | 90.00 ± 0.00 | 10.00 ± 0.00, 3× | -80.00 |" in page
    worse = [made(row, "MSSAM, move, κ = 0", "layer", seed, 0.8) for seed in range(3)]
    assert "0 of 1 comparisons are flat; **missed**" in scale_robustness.body([line_of(r) for r in worse])[0]


def test_it_runs_and_renders(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    done = run("benchmarks.scale_robustness", "--scale", "smoke", "--threads", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "scale_robustness").iterdir()
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert lines and not [line for line in lines if "failed" in line]
    rendered = run("benchmarks.render", "--results", str(tmp_path))
    assert rendered.returncode == 0, rendered.stderr
    page = (tmp_path / "scale_robustness" / "table.md").read_text()
    assert page.startswith(done.stdout[done.stdout.index("# Trained") :].removesuffix("\n"))
    assert (folder / "figure.svg").exists()
