"""What is a batch, what are its logits, and what is neither."""

import math
from collections import OrderedDict
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import ms_optim
from ms_optim.batch import Batch, batches, class_logits, logits_of, peek
from ms_optim.errors import DataError, MsOptimError


class Positional(nn.Module):
    def forward(self, x, mask=None):
        return x if mask is None else x * mask


class OneDictionary(nn.Module):
    def forward(self, inputs):
        return inputs["x"] * inputs["mask"]


class Anything(nn.Module):
    def forward(self, **inputs):
        return inputs["x"]


X, MASK, Y = torch.ones(2, 3), torch.full((2, 3), 2.0), torch.zeros(2)


@pytest.mark.parametrize(
    ("example", "model", "logits"),
    [
        (X, Positional(), X),
        ((X, Y), Positional(), X),
        ([X, Y], Positional(), X),
        ((X,), Positional(), X),
        (((X, MASK), Y), Positional(), X * MASK),
        (([X, MASK],), Positional(), X * MASK),
        ({"x": X}, Positional(), X),
        ({"x": X, "mask": MASK}, Positional(), X * MASK),
        (({"x": X, "mask": MASK}, Y), Positional(), X * MASK),
        ({"x": X, "mask": MASK}, OneDictionary(), X * MASK),
        ({"x": X, "more": MASK}, Anything(), X),
        (OrderedDict(x=X), Positional(), X),
        (Batch((X,), {"mask": MASK}), Positional(), X * MASK),
    ],
)
def test_a_batch_is_read_in_each_of_its_forms(example, model, logits):
    assert torch.equal(Batch.of(example, model).logits(model), logits)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (3, "a batch is a int"),
        ("text", "a batch is a str"),
        (None, "a batch is a NoneType"),
        ((), "a batch is an empty tuple"),
        ([], "a batch is an empty list"),
        ((3, 4), "a batch is a int"),
    ],
)
def test_what_is_no_batch_is_refused(example, message):
    with pytest.raises(DataError, match=message):
        Batch.of(example, Positional())


class Pair(NamedTuple):
    """Two inputs by name."""

    pixels: torch.Tensor
    mask: torch.Tensor


def test_tensors_are_found_however_deep_and_in_order():
    batch = Batch((X, [MASK, 1], {"a": Y, "b": "text"}), {"k": X, "flag": True, "n": {"p": [Pair(MASK, Y)]}})
    assert [id(tensor) for tensor in batch.tensors] == [id(t) for t in (X, MASK, Y, X, MASK, Y)]
    assert Batch().tensors == [] and Batch((3,), {"k": None}).tensors == []


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (Batch((X,)), 2),
        (Batch((X, [Y, MASK]), {"k": {"deep": (Y,)}, "flag": 3}), 2),
        (Batch((torch.zeros(0, 3),)), 0),
        (Batch((X, torch.zeros(3))), None),
        (Batch((X,), {"k": {"deep": [torch.zeros(1, 3)]}}), None),
        (Batch((X, torch.tensor(1.0))), None),
        (Batch((torch.tensor(1.0),)), None),
        (Batch((3,)), None),
    ],
)
def test_the_number_of_samples_is_the_first_axis_that_all_share(batch, samples):
    assert batch.samples == samples


def test_rows_are_views_of_some_of_the_samples_in_the_same_containers():
    x, mask = torch.arange(12.0).view(4, 3), torch.arange(4)
    batch = Batch((x, [mask, 7], Pair(x, mask)), {"k": {"deep": (x,)}, "text": "as it is"})
    rows = batch.rows(slice(1, 3))
    assert rows.samples == 2 and batch.samples == 4
    assert torch.equal(rows.args[0], x[1:3]) and rows.args[0].data_ptr() == x[1:].data_ptr()
    assert rows.args[1] == [rows.args[1][0], 7] and torch.equal(rows.args[1][0], mask[1:3])
    assert isinstance(rows.args[2], Pair) and torch.equal(rows.args[2].mask, mask[1:3])
    assert torch.equal(rows.kwargs["k"]["deep"][0], x[1:3]) and rows.kwargs["text"] == "as it is"
    model = Positional()
    parts = [Batch((x, mask[:, None])).rows(slice(i, i + 1)).logits(model) for i in range(4)]
    assert torch.equal(torch.cat(parts), Batch((x, mask[:, None])).logits(model))


def test_a_batch_that_has_nowhere_to_go_is_itself():
    batch = Batch((X, [MASK]), {"k": X})
    assert batch.to(torch.device("cpu")) is batch


def test_a_batch_moves_with_everything_in_it():
    moved = Batch((X, [MASK, 1], {"a": Y}), {"k": X, "flag": True}).to(torch.device("meta"))
    assert all(tensor.is_meta for tensor in moved.tensors) and len(moved.tensors) == 4
    assert moved.args[1][1] == 1 and moved.kwargs["flag"] is True


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_inputs_are_refused_with_their_number_and_place(value):
    bad = X.clone()
    bad[1, 2] = value
    with pytest.raises(DataError, match=r"the batch holds 1 non-finite values of 6 in an input of shape \(2, 3\)"):
        Batch((X, bad)).check_finite()
    with pytest.raises(DataError, match="batch 4 holds"):
        Batch((), {"x": bad}).check_finite(4)


def test_non_finite_inputs_are_found_however_deep():
    bad = torch.tensor([[1.0, math.nan]], dtype=torch.bfloat16)
    for batch in (Batch(([Pair(X, bad)],)), Batch((), {"k": {"deep": (bad,)}})):
        with pytest.raises(DataError, match=r"batch 2 holds 1 non-finite values of 2 in an input of shape \(1, 2\)"):
            batch.check_finite(2)


def test_finite_and_integer_inputs_pass():
    Batch((X, torch.arange(3), torch.tensor([True]))).check_finite()
    Batch((torch.zeros(0, 3), torch.zeros(()))).check_finite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_inputs_whose_sum_overflows_pass(dtype):
    Batch((torch.full((8,), torch.finfo(dtype).max, dtype=dtype),)).check_finite()


@pytest.mark.parametrize(
    "output", [X, {"logits": X, "loss": Y}, SimpleNamespace(logits=X), OrderedDict(loss=Y, logits=X)]
)
def test_logits_are_found_in_what_models_return(output):
    assert logits_of(output) is X


@pytest.mark.parametrize("output", [(X, Y), [X], {"loss": Y}, SimpleNamespace(logits=None), None, 3.0])
def test_an_output_without_logits_is_refused(output):
    with pytest.raises(DataError, match=f"returned a {type(output).__name__} without a tensor `.logits`"):
        logits_of(output)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (0, 3), (4, 3, 2), (4, 3, 2, 2), ()])
def test_logits_of_another_shape_are_refused(shape):
    with pytest.raises(DataError, match="logits have shape .*K >= 2"):
        class_logits(torch.zeros(shape))


def test_logits_of_the_right_shape_pass():
    logits = torch.zeros(1, 2)
    assert class_logits(logits) is logits


class Squares(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.full((2,), float(index)), index


class Stream(IterableDataset):
    def __iter__(self):
        return iter([torch.zeros(2)])


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (X, 1),
        ((X, Y), 1),
        ({"x": X}, 1),
        (Batch((X,)), 1),
        ([X, X], 2),
        ([(X, Y)], 1),
        (iter([X, X, X]), 3),
        (DataLoader(Squares(), batch_size=2), 2),
        (DataLoader(Stream(), batch_size=1), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_data_are_read_as_batches(data, count):
    found = list(batches(data, Positional()))
    assert len(found) == count and all(isinstance(batch, Batch) for batch in found)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TensorDataset(X), "TensorDataset.*samples, not batches.*DataLoader"),
        (Squares(), "Squares.*samples, not batches"),
        (Stream(), "Stream.*samples, not batches"),
        ([], "list.*holds no batch"),
        (iter(()), "tuple_iterator.*holds no batch"),
        (DataLoader(TensorDataset(torch.zeros(0, 2))), "DataLoader.*holds no batch"),
        ([torch.zeros(3, 2), torch.tensor([0, 1, 2])], r"inputs \(3, 2\) and integers \(3,\).*pass tuple\(data\)"),
        (3.0, "data is a float"),
        (None, "data is a NoneType"),
    ],
)
def test_what_are_no_batches_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        list(batches(data, Positional()))


def test_a_data_error_can_be_caught_as_a_value_error_and_as_one_of_ours():
    assert issubclass(DataError, ValueError) and issubclass(DataError, MsOptimError)


@pytest.mark.parametrize("make", [lambda: [X, MASK], lambda: iter([X, MASK]), lambda: (t for t in (X, MASK))])
def test_peeking_loses_no_batch(make):
    first, rest = peek(make(), Positional())
    assert first.args[0] is X
    assert [id(batch.args[0]) for batch in batches(rest, Positional())] == [id(X), id(MASK)]


def test_peeking_into_nothing_is_refused():
    for data in ([], iter([])):
        with pytest.raises(DataError, match="holds no batch"):
            peek(data, Positional())


def test_measuring_on_a_shuffling_loader_leaves_the_random_stream_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    loader = DataLoader(TensorDataset(torch.randn(8, 3)), batch_size=4, shuffle=True)
    before = torch.get_rng_state()
    ms_optim.minimum_sharpness(model, loader)
    assert torch.equal(before, torch.get_rng_state())
