"""A batch in pieces gives what it gives whole, in the memory there is, and what cannot be in pieces is refused."""

import gc
import os
import re
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import torch
from curvature.random_networks import FAMILIES, settled, small_mlp
from curvature.undisturbed import assert_undisturbed, snapshot
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import ms_optim
from ms_optim.curvature import budget, hessian_diagonal, hessian_trace, measurement, reading, scheme
from ms_optim.errors import CurvatureError, MemoryBudgetError
from ms_optim.models import cifar_resnet

MEASURES = [hessian_trace, hessian_diagonal]


def stacked(values):
    return torch.cat([torch.as_tensor(value).reshape(-1) for value in values.values()])


def assert_equal_results(found, expected, relative=1e-12):
    """The same values, errors, kinds and counts."""
    torch.testing.assert_close(
        stacked(found), stacked(expected), rtol=relative, atol=relative * float(stacked(expected).max())
    )
    assert found.kind == expected.kind and found.samples == expected.samples and found.generic == expected.generic


def needed_bytes(error):
    """The number of bytes that a MemoryBudgetError asks for."""
    return int(re.search(r"Pass max_memory=(\d+) or more", str(error)).group(1))


def least_budget(measure, model, x, **options):
    """The smallest budget that is accepted, as the error of a smaller one says."""
    with pytest.raises(MemoryBudgetError) as caught:
        measure(model, x, max_memory=1, **options)
    return needed_bytes(caught.value)


def counting(monkeypatch):
    """The sizes of the forward passes with a graph that are made from now on."""
    sizes = []
    original = measurement._Walk._add

    def add(self, reading, noise, group):
        sizes.append((reading.samples, group))
        original(self, reading, noise, group)

    monkeypatch.setattr(measurement._Walk, "_add", add)
    return sizes


def lenet():
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 6)),
    )


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("options", [{}, {"columns": 1}, {"columns": 0, "probes": 3}, {"columns": "rank"}])
def test_every_budget_that_is_accepted_gives_the_same(measure, options, monkeypatch):
    model, x = lenet(), torch.randn(13, 2, 8, 8)
    whole = measure(model, x, **options)
    least = least_budget(measure, model, x, **options)
    sizes = counting(monkeypatch)
    seen = set()
    for factor in (1, 1.1, 1.2, 1.5, 2, 5, 30, 1000):
        sizes.clear()
        assert_equal_results(measure(model, x, max_memory=int(factor * least), **options), whole)
        assert sum(samples for samples, _ in sizes) == 13
        seen.add(max(sizes))
    assert len(seen) > 3 and min(seen)[0] == 1 and max(seen)[0] == 13


@pytest.mark.parametrize("family", FAMILIES)
@given(st.data())
@settings(max_examples=8)
def test_random_networks_in_pieces(family, data):
    model, x = data.draw(FAMILIES[family]())
    assume(len(x) > 1)
    for measure in MEASURES:
        whole = measure(model, x)
        least = least_budget(measure, model, x)
        for room in (least, least + data.draw(st.integers(0, 3 * least))):
            assert_equal_results(measure(model, x, max_memory=room), whole)


def test_a_budget_that_is_too_small_names_the_layer_and_the_bytes_that_are_enough():
    model, x = lenet(), torch.randn(4, 2, 8, 8)
    for measure in MEASURES:
        before = snapshot(model)
        with pytest.raises(
            MemoryBudgetError, match=r"max_memory=99 bytes .* of the layers \d\.\w+ needs most"
        ) as caught:
            measure(model, x, max_memory=99)
        assert_undisturbed(model, before)
        enough = needed_bytes(caught.value)
        assert measure(model, x, max_memory=enough).samples == 4
        with pytest.raises(MemoryBudgetError):
            measure(model, x, max_memory=enough - 2)


def test_pieces_in_a_stream_of_batches_of_different_sizes(monkeypatch):
    model, x = lenet(), torch.randn(40, 2, 8, 8)
    parts = list(x.split([1, 12, 2, 25]))
    whole = hessian_trace(model, x)
    least = least_budget(hessian_trace, model, x)
    sizes = counting(monkeypatch)
    assert_equal_results(hessian_trace(model, parts, max_memory=8 * least), whole)
    # What was planned for one sample does not hold for twenty-five.
    assert len(sizes) < 40 and max(sizes)[0] > 1


# --- statistics of the batch ------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One BatchNorm called twice, another one without running statistics."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), settled(nn.BatchNorm1d(6))
        self.second, self.loose = nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False)
        self.head = nn.Linear(6, 5)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(self.norm(self.second(x)))
        return self.head(self.loose(x))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("statistics", ["running", "batch", "training"])
@pytest.mark.parametrize("columns", [None, 1])
def test_pieces_use_the_statistics_of_the_whole_batch(measure, statistics, columns):
    model, x = Twice().train(), 2 + torch.randn(11, 4)
    before = snapshot(model)
    data = [x, x[:7] ** 2]
    whole = measure(model, data, columns, statistics=statistics)
    least = least_budget(measure, model, x, statistics=statistics)
    for factor in (1, 1.3):
        calls = model.calls
        assert_equal_results(
            measure(model, data, columns, statistics=statistics, max_memory=int(factor * least)), whole
        )
        assert model.calls - calls > 4
    assert_undisturbed(model, before)
    # The statistics of a piece would have given another number.
    pieces = measure(model, [*x.split(3)], columns, statistics=statistics)
    same = torch.allclose(stacked(pieces), stacked(measure(model, x, columns, statistics=statistics)), rtol=1e-6)
    assert not same


def test_training_statistics_in_pieces_are_those_of_each_modules_own_mode():
    model, x = Twice().train(), torch.randn(9, 4)
    model.norm.eval()
    whole = hessian_trace(model, x, statistics="training")
    least = least_budget(hessian_trace, model, x)
    assert_equal_results(hessian_trace(model, x, statistics="training", max_memory=2 * least), whole)
    # loose has no running statistics, so that "running" takes the batch's own for it, as "training" does.
    assert_equal_results(hessian_trace(model, x, statistics="running"), whole)


# --- plans ------------------------------------------------------------------------------------------------------------


def test_plans_are_kept_per_model_and_never_with_a_budget(monkeypatch):
    made = []
    original = budget.plan_chunk

    def plan(*args, **options):
        made.append(options["budget"])
        return original(*args, **options)

    monkeypatch.setattr(measurement, "plan_chunk", plan)
    model, x = small_mlp(), torch.randn(200, 5)
    least = least_budget(hessian_trace, model, x)
    made.clear()
    for _ in range(2):
        hessian_trace(model, x, max_memory=10 * least)
    assert made == 2 * [10 * least]
    hessian_trace(model, x)  # not with the plan of a budget, though it was made before
    hessian_trace(model, x)
    assert len(made) == 3 and made[-1] > 10 * least
    hessian_diagonal(model, x)
    hessian_trace(small_mlp(), x)
    hessian_trace(model, x[:150])
    assert len(made) == 6
    hessian_trace(model.float(), x.float())
    assert len(made) == 7
    hessian_trace(model.double(), x, max_memory=10 * least)
    assert made[-1] == 10 * least


def test_small_batches_are_not_planned_for(monkeypatch):
    def never(*args, **options):
        raise AssertionError("planned")

    monkeypatch.setattr(measurement, "plan_chunk", never)
    assert hessian_trace(small_mlp(), torch.randn(40, 5)).samples == 40
    with pytest.raises(AssertionError, match="planned"):
        hessian_trace(small_mlp(), torch.randn(60, 5))


# --- what cannot be split ---------------------------------------------------------------------------------------------


class Centred(nn.Module):
    """Every sample meets the mean of all: nothing in the graph of the parameters shows it."""

    def __init__(self):
        super().__init__()
        self.body, self.norm = small_mlp(), nn.BatchNorm1d(5)
        self.norm.train()

    def forward(self, x):
        torch.rand(3)
        return self.body(self.norm(x - x.mean(0)))


class Neighbours(nn.Module):
    """Samples meet their neighbours behind the parameters."""

    def __init__(self):
        super().__init__()
        self.body = small_mlp()

    def forward(self, x):
        return self.body(x) + self.body(x).flip(0)


@pytest.mark.parametrize("size", range(1, 8))
def test_pieces_of_every_size_show_that_samples_influence_each_other(size, monkeypatch):
    model, x = Centred(), torch.randn(8, 5)
    assert hessian_trace(model, x).samples == 8  # whole, it is what it is
    monkeypatch.setattr(measurement, "plan_chunk", lambda *args, **options: budget.Chunk(size, 5))
    before = snapshot(model)
    with pytest.raises(CurvatureError, match="change with the samples beside it .*influence each other"):
        hessian_trace(model, x, max_memory=1)
    assert_undisturbed(model, before)


def test_samples_that_influence_each_other_behind_the_parameters_are_refused_anyway():
    model, x = Neighbours(), torch.randn(8, 5)
    before = snapshot(model)
    for options in ({}, {"max_memory": 10_000}, {"generic": False}):
        with pytest.raises(CurvatureError, match="influence each other"):
            hessian_trace(model, x, **options)
    assert_undisturbed(model, before)


class Scaled(nn.Module):
    """Takes named inputs, a list of them or a pair, and a scale that may be one for all samples."""

    def __init__(self):
        super().__init__()
        self.body = small_mlp()

    def forward(self, pixels, scale=None):
        if isinstance(pixels, (list, tuple)):
            pixels, scale = pixels
        return self.body(pixels * (1.0 if scale is None else scale))


def test_dictionaries_and_tuples_are_split(monkeypatch):
    model, x, scale = Scaled(), torch.randn(9, 5), torch.rand(9, 1)
    whole = hessian_trace(model.body, x * scale)
    least = least_budget(hessian_trace, model, x)
    sizes = counting(monkeypatch)
    for data in (
        {"pixels": x, "scale": scale},
        ((x, scale), torch.zeros(9)),
        [({"pixels": x, "scale": scale}, torch.zeros(9))],
        [(([x, scale],), torch.zeros(9))],
    ):
        sizes.clear()
        found = hessian_trace(model, data, max_memory=2 * least)
        assert len(sizes) > 1
        torch.testing.assert_close(stacked(found), stacked(whole), rtol=1e-12, atol=1e-15)


def test_inputs_without_a_common_first_axis_are_refused_with_a_budget_and_measured_without():
    model, x, scale = Scaled(), torch.randn(60, 5), torch.tensor(0.5)
    for other in (scale, torch.full((1, 5), 0.5)):
        data = {"pixels": x, "scale": other}
        torch.testing.assert_close(
            stacked(hessian_trace(model, data)), stacked(hessian_trace(model.body, 0.5 * x)), rtol=1e-12, atol=0
        )
        before = snapshot(model)
        with pytest.raises(CurvatureError, match="Scaled takes inputs of different first axes.*leave max_memory out"):
            hessian_trace(model, data, max_memory=2**30)
        assert_undisturbed(model, before)


class Pairs(nn.Module):
    """Two rows make one sample."""

    def __init__(self, strict):
        super().__init__()
        self.body, self.strict = small_mlp(features=10), strict

    def forward(self, x):
        if self.strict and len(x) < 3:
            raise IndexError("too few rows")
        return self.body(x.view(-1, 10))


@pytest.mark.parametrize(
    ("strict", "message"),
    [(False, "returned 1 rows of logits for inputs of 2 rows"), (True, "IndexError.*too few rows")],
)
def test_a_model_whose_rows_are_not_samples_is_refused_with_a_budget_and_measured_without(strict, message):
    model, x = Pairs(strict), torch.randn(100, 5)
    expected = hessian_trace(model.body, x.view(50, 10))
    found = hessian_trace(model, x)
    assert found.samples == 50
    torch.testing.assert_close(stacked(found), stacked(expected), rtol=1e-12, atol=0)
    with pytest.raises(CurvatureError, match=f"Pairs .*{message}.*cannot be split"):
        hessian_trace(model, x, max_memory=2**30)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_columns_are_made_in_pieces_whatever_the_number_of_classes(monkeypatch):
    sizes, living, together = [], weakref.WeakSet(), []
    original = scheme._in_pieces

    def in_pieces(make, logits):
        def made(*arguments):
            piece = make(*arguments)
            sizes.append(piece.numel() * piece.element_size())
            living.add(piece)
            together.append(len(living))
            return piece

        return original(made, logits)

    monkeypatch.setattr(scheme, "_in_pieces", in_pieces)
    monkeypatch.setattr(scheme, "_COLUMN_BYTES", 2**16)
    results = {}
    for classes in (20, 400):
        torch.manual_seed(0)
        model, x = small_mlp(classes), torch.randn(8, 5)
        sizes.clear()
        results[classes] = hessian_trace(model, x)
        assert max(sizes) <= 2**16 and sum(sizes) == 8 * (classes - 1) * 8 * classes
    assert max(together) <= 2  # the next one is made while the last one is let go
    monkeypatch.setattr(scheme, "_COLUMN_BYTES", 2**40)
    assert_equal_results(hessian_trace(model, x), results[400])


@pytest.mark.parametrize("measure", MEASURES)
def test_a_column_leaves_no_tensor_behind(measure, monkeypatch):
    # Small ones that stay keep large ones from using the same memory again: a thousand classes once took 8 GB.
    living = []
    original = scheme._in_pieces

    def in_pieces(make, logits):
        def made(*arguments):
            living.append(sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()))
            return make(*arguments)

        return original(made, logits)

    monkeypatch.setattr(scheme, "_in_pieces", in_pieces)
    monkeypatch.setattr(scheme, "_COLUMN_BYTES", 1)  # column by column
    monkeypatch.setattr(reading, "columns_together", lambda nodes, device: 1)
    measure(cifar_resnet(8, num_classes=40), torch.randn(2, 3, 8, 8))
    assert len(living) == 39 and len(set(living[3:])) == 1


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("options", [{}, {"columns": 0, "probes": 2}, {"tolerance": 0.1}])
def test_a_graph_is_gone_before_the_next_forward_pass(measure, options, monkeypatch):
    living = weakref.WeakSet()
    original = measurement.Reading.__init__

    def init(self, *args):
        living.add(self)
        original(self, *args)

    monkeypatch.setattr(measurement.Reading, "__init__", init)
    monkeypatch.setattr(measurement, "plan_chunk", lambda *args, **options: budget.Chunk(3, 2))
    model, x = small_mlp(), torch.randn(10, 5)
    at_forward = []
    model.register_forward_pre_hook(lambda module, args: at_forward.append(len(living)))
    gc.disable()  # by reference counts alone
    try:
        measure(model, [x, x], max_memory=1, **options)
    finally:
        gc.enable()
    assert len(at_forward) > 8 and not any(at_forward)


PEAK = """
import sys, torch
from torch import nn
from ms_optim.curvature import budget, hessian_trace, hessian_diagonal
budget._CACHE_BYTES = 2**40  # the budget alone decides
measure = {"trace": hessian_trace, "diagonal": hessian_diagonal}[sys.argv[1]]
limit, classes = int(sys.argv[2]) or None, int(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes),
)
x = torch.randn(512, 3, 16, 16)
measure(model, x[:2], columns=1)  # kernels, pools and lazy imports are there before
if limit:
    measure(model, x[:64], columns=1, max_memory=limit)

def status(key):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
measure(model, x, columns=int(sys.argv[4]) if len(sys.argv) > 4 else None, max_memory=limit)
print(status("VmHWM") - before)
"""


def peak(*arguments):
    """Bytes above what was there before, at the peak of one measurement, in a process of its own."""
    root = str(Path(ms_optim.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


linux = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="resets VmHWM through /proc")
# What no plan sees: workspaces inside the convolutions, the logits' own graph, fragments of the heap.
SLACK = 4 * 2**20


@linux
@pytest.mark.slow
@pytest.mark.parametrize("measure", ["trace", "diagonal"])
def test_the_peak_stays_below_the_budget(measure):
    # Whole, it takes more than 250 MB.
    for limit in (10 * 2**20, 80 * 2**20):
        used = peak(measure, limit, 10)
        assert limit / 3 < used <= limit + SLACK


@linux
@pytest.mark.slow
def test_the_peak_does_not_grow_with_the_number_of_classes():
    few, many = (peak("trace", 0, classes, 2) for classes in (10, 1000))
    logits = 512 * 1000 * 4
    # Logits, leading and signed columns, what they are made of; S itself would be a thousand times the logits.
    assert many <= few + 20 * logits



def test_as_much_as_a_pass_keeps_is_split_and_finds_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10),
    )  # fmt: skip
    x = torch.randn(64, 3, 32, 32)
    whole = hessian_trace(model, x, 2, statistics="batch", generator=torch.Generator().manual_seed(0))
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    parts = hessian_trace(
        model, x, 2, statistics="batch", generator=torch.Generator().manual_seed(0), max_memory="pass"
    )
    assert 64 in seen and any(2 < rows < 64 for rows in seen)  # recorded whole, measured in parts
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-10)
    with pytest.raises(ValueError, match="max_memory must be a whole number, 'pass' or None, got 'all'"):
        hessian_trace(model, x, max_memory="all")
