"""Data as streams: of any length, in one pass, watched, interrupted, broken off, with what was measured so far."""

import builtins
import sys

import pytest
import torch
from curvature.agreement import assert_same
from curvature.random_networks import small_mlp
from curvature.undisturbed import assert_undisturbed, snapshot
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ms_optim.curvature import hessian_diagonal, hessian_trace, measurement
from ms_optim.errors import CurvatureError, DataError, MemoryBudgetError

MEASURES = [hessian_trace, hessian_diagonal]


class Stream(IterableDataset):
    """Samples without a length."""

    def __init__(self, x):
        super().__init__()
        self.x = x

    def __iter__(self):
        return iter(self.x)


def stacked(values):
    return torch.cat([torch.as_tensor(value).reshape(-1) for value in values.values()])


def assert_equal(found, expected, relative=1e-13):
    torch.testing.assert_close(stacked(found), stacked(expected), rtol=relative, atol=1e-16)
    assert found.samples == expected.samples and found.kind == expected.kind
    assert found.backpropagations == pytest.approx(expected.backpropagations)


@pytest.mark.parametrize("measure", MEASURES)
def test_every_kind_of_stream_is_read_once(measure):
    model, x = small_mlp(), torch.randn(12, 5)
    whole = measure(model, x)
    read = []

    def generator():
        for part in x.split(5):
            read.append(len(part))
            yield part, "labels are never read"

    assert_equal(measure(model, generator()), whole)
    assert read == [5, 5, 2]
    for data in (
        list(x.split(7)),
        DataLoader(TensorDataset(x), batch_size=5),
        DataLoader(Stream(x), batch_size=5),
        iter(x.split(1)),
    ):
        assert_equal(measure(model, data), whole)


def test_a_thousand_tiny_batches_are_one_pass():
    model, x = small_mlp(), torch.randn(1000, 5)
    count = 0

    def generator():
        nonlocal count
        for part in x.split(1):
            count += 1
            yield part

    found = hessian_trace(model, generator())
    assert count == found.samples == 1000
    assert_same(found, dict(hessian_trace(model, x)), relative=1e-12)


# --- what breaks off --------------------------------------------------------------------------------------------------


class Failing(nn.Module):
    """Buffers, modes and random numbers of its own; raises in its n-th forward pass, or returns what is not finite."""

    def __init__(self, error=None, at=None):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(), nn.ReLU(), nn.Linear(7, 4))
        self.body[1].eval()
        self.calls, self.error, self.at = 0, error, at

    def forward(self, x):
        self.calls += 1
        torch.rand(2)
        if self.calls == self.at and self.error is not None:
            raise self.error
        logits = self.body(x)
        return logits * (float("nan") if self.calls == self.at else 1.0)


def interrupted(parts, error):
    """Batches, and then an error."""
    yield from parts
    raise error


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("options", [{}, {"columns": 0, "probes": 2}, {"tolerance": 0.2}])
def test_non_finite_inputs_are_told_by_their_batch_with_the_result_so_far(measure, options):
    model, x = Failing(), torch.randn(4, 3, 5)
    x[2, 1, 3] = float("inf")
    before = snapshot(model)
    with pytest.raises(DataError, match="batch 2 holds 1 non-finite values of 15") as caught:
        measure(model, list(x), **options)
    assert_undisturbed(model, before)
    assert_equal(caught.value.partial, measure(model, list(x[:2]), **options))


@pytest.mark.parametrize("measure", MEASURES)
def test_non_finite_logits_are_told_by_their_batch_with_the_result_so_far(measure):
    model, x = Failing(at=3), torch.randn(4, 3, 5)
    before = snapshot(model)
    with pytest.raises(
        DataError, match=r"logits of batch 2 are not finite for 3 of 3 samples \(the first is sample 0\)"
    ) as caught:
        measure(model, list(x))
    assert_undisturbed(model, before)
    assert_equal(caught.value.partial, measure(model, list(x[:2])))


@pytest.mark.parametrize("statistics", ["running", "batch"])
@pytest.mark.parametrize("at", range(4, 12))
def test_a_batch_that_fails_in_one_of_its_pieces_leaves_nothing_behind(statistics, at, monkeypatch):
    # Pieces of two samples: whichever forward pass it is, the result is that of whole batches.
    monkeypatch.setattr(measurement, "plan_chunk", lambda *args, **options: measurement.Chunk(2, 5))
    x = torch.randn(4, 6, 5)
    model = Failing(at=at)
    before = snapshot(model)
    with pytest.raises(DataError, match=r"logits of batch \d are not finite") as caught:
        hessian_trace(model, list(x), statistics=statistics, max_memory=1)
    assert_undisturbed(model, before)
    index = int(str(caught.value).split("batch ")[1][0])
    partial = caught.value.partial
    if index == 0:
        assert partial is None
    else:
        model.at = None
        assert_equal(partial, hessian_trace(model, list(x[:index]), statistics=statistics))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_a_keyboard_interrupt_of_the_data_keeps_the_result_so_far(measure, statistics):
    model, x = Failing(), torch.randn(3, 4, 5)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt) as caught:
        measure(model, interrupted(x, KeyboardInterrupt()), statistics=statistics)
    assert_undisturbed(model, before)
    assert_equal(caught.value.partial, measure(model, list(x), statistics=statistics))


@pytest.mark.parametrize("measure", MEASURES)
def test_a_keyboard_interrupt_inside_the_model_keeps_the_result_so_far(measure):
    model, x = Failing(KeyboardInterrupt(), at=3), torch.randn(4, 4, 5)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt) as caught:
        measure(model, list(x))
    assert_undisturbed(model, before)
    assert_equal(caught.value.partial, measure(model, list(x[:2])))


def test_a_keyboard_interrupt_between_two_sums_leaves_whole_batches(monkeypatch):
    # At every line of the code that adds: the totals are those of one batch or of two, never something between.
    model, x = small_mlp(), torch.randn(2, 3, 5)
    results = [hessian_trace(model, list(x[:1])), hessian_trace(model, list(x))]
    seen, line = set(), 0
    finished = False
    while not finished:
        line += 1
        count = 0
        batch = 0

        def trace(frame, event, argument, line=line):
            nonlocal count, batch
            if frame.f_code.co_filename != measurement.__file__:
                return None
            if event == "call" and frame.f_code.co_name == "batch":
                batch += 1
            if event in ("line", "return") and batch == 2 and frame.f_code.co_name in ("batch", "_add_batch", "_add"):
                count += 1
                if count == line:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            hessian_trace(model, list(x))
            finished = True
        except KeyboardInterrupt as error:
            sys.settrace(None)
            partial = error.partial
            assert_equal(partial, results[0] if partial.samples == 3 else results[1])
            seen.add(partial.samples)
        finally:
            sys.settrace(None)
        assert line < 200
    assert seen == {3, 6} and line > 20


@pytest.mark.parametrize(
    "error", [KeyError("inside"), CurvatureError("inside"), MemoryBudgetError("inside"), KeyboardInterrupt("inside")]
)
def test_an_error_in_the_first_batch_has_no_partial_result(error):
    model, x = Failing(error, at=1), torch.randn(3, 5)
    before = snapshot(model)
    with pytest.raises(type(error), match="inside") as caught:
        hessian_trace(model, x)
    assert_undisturbed(model, before)
    assert getattr(caught.value, "partial", None) is None


def test_a_stream_that_ends_badly_by_an_error_of_its_own_raises_it():
    with pytest.raises(OSError, match="disk"):
        hessian_trace(small_mlp(), interrupted(torch.randn(2, 3, 5), OSError("disk")))


# --- progress ---------------------------------------------------------------------------------------------------------


class Terminal:
    """A stderr that says that it is a terminal."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return True


def test_a_bar_is_shown_where_it_is_wanted(capsys):
    pytest.importorskip("tqdm")
    model, x = small_mlp(), torch.randn(4, 3, 5)
    hessian_trace(model, list(x), progress=True)
    shown = capsys.readouterr()
    assert "curvature" in shown.err and "/4" in shown.err and shown.out == ""
    for progress in (False, None):  # here stderr is no terminal
        hessian_trace(model, list(x), progress=progress)
        assert capsys.readouterr() == ("", "")
    hessian_diagonal(model, x[0], progress=True)  # one batch needs no bar
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_a_bar_is_shown_only_when_it_takes_long(monkeypatch):
    pytest.importorskip("tqdm")
    model, x = small_mlp(), torch.randn(3, 3, 5)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    hessian_trace(model, list(x))
    assert "curvature" not in terminal.text
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(clock)))  # ten seconds a look
    hessian_trace(model, list(x))
    assert "curvature" in terminal.text and "/3" in terminal.text
    terminal.text = ""
    hessian_trace(model, list(x), progress=False)
    assert terminal.text == ""


@pytest.mark.parametrize("progress", [True, False, None])
def test_a_stream_without_a_length_has_a_bar_too(progress, capsys):
    pytest.importorskip("tqdm")
    model, x = small_mlp(), torch.randn(6, 5)
    expected = hessian_trace(model, x)
    for data in (DataLoader(Stream(x), batch_size=2), iter(x.split(2))):
        assert_equal(hessian_trace(model, data, progress=progress), expected)
        assert ("batch" in capsys.readouterr().err) == (progress is True)


@pytest.mark.parametrize("progress", [True, False, None])
def test_tqdm_is_not_needed(progress, monkeypatch, capsys):
    original = builtins.__import__

    def without_tqdm(name, *args, **options):
        if name.partition(".")[0] == "tqdm":
            raise ImportError("no tqdm")
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    model, x = small_mlp(), torch.randn(6, 5)
    assert_equal(hessian_trace(model, list(x.split(2)), progress=progress), hessian_trace(model, x))
    assert capsys.readouterr() == ("", "")


def test_an_interrupted_bar_is_closed(capsys):
    tqdm = pytest.importorskip("tqdm")
    before = len(tqdm.tqdm._instances)
    with pytest.raises(KeyboardInterrupt) as caught:
        hessian_trace(small_mlp(), interrupted(torch.randn(2, 3, 5), KeyboardInterrupt()), progress=True)
    assert caught.value.partial.samples == 6
    assert len(tqdm.tqdm._instances) == before
    assert "curvature" in capsys.readouterr().err


# --- precision and format ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_the_call_changes_nothing(measure, dtype):
    model, x = small_mlp().float(), torch.randn(6, 5).float()
    expected = measure(model, x)
    with torch.autocast("cpu", dtype=dtype):
        found = measure(model, x)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(stacked(found), stacked(expected))


@pytest.mark.parametrize("measure", MEASURES)
def test_no_grad_around_the_call_changes_nothing(measure):
    model, x = small_mlp(), torch.randn(6, 5)
    with torch.no_grad():
        found = measure(model, x)
    assert torch.equal(stacked(found), stacked(measure(model, x)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_give_close_traces(dtype):
    model, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6)).to(dtype), torch.randn(16, 5).to(dtype)
    found = hessian_trace(model, x)
    expected = hessian_trace(model.double(), x.double())  # of the same rounded weights
    assert_same(found, dict(expected), relative=0.05 if dtype == torch.bfloat16 else 0.005)


@pytest.mark.parametrize("measure", MEASURES)
def test_channels_last_changes_nothing(measure):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    x = torch.randn(5, 3, 6, 6)
    expected = stacked(measure(model, x))
    for parts in (1, 2):
        if parts == 2:
            model = model.to(memory_format=torch.channels_last)
        found = measure(model, x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(stacked(found), expected, rtol=1e-12, atol=1e-15)
        chunked = measure(model, [*x.to(memory_format=torch.channels_last).split(2)])
        torch.testing.assert_close(stacked(chunked), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.cuda
@pytest.mark.parametrize("measure", MEASURES)
def test_inputs_go_where_the_model_is(measure):
    model, x = small_mlp(), torch.randn(100, 5)
    expected = stacked(measure(model, x))
    model = model.cuda()
    for data in (x, list(x.split(30)), [(x, torch.zeros(100))]):
        torch.testing.assert_close(stacked(measure(model, data)).cpu(), expected, rtol=1e-10, atol=1e-14)
    for options in ({"columns": 1}, {"columns": 0, "probes": 2}, {"columns": "rank"}, {"tolerance": 0.1}):
        assert bool(torch.isfinite(stacked(measure(model, x, **options))).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_with_statistics_of_the_batch(dtype):
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 6)).to(dtype)
    x = torch.randn(64, 5).to(dtype)
    found = hessian_trace(model, x, statistics="batch")
    expected = hessian_trace(model.double(), x.double(), statistics="batch")
    assert_same(found, dict(expected), relative=0.05 if dtype == torch.bfloat16 else 0.005)
