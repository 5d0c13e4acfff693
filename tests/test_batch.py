"""What is a batch, what are its logits, and what is neither."""

import math
from collections import OrderedDict
from types import SimpleNamespace

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


def test_tensors_are_found_one_level_deep():
    batch = Batch((X, [MASK, 1], {"a": Y, "b": "text"}), {"k": X, "flag": True})
    assert [id(tensor) for tensor in batch.tensors] == [id(t) for t in (X, MASK, Y, X)]


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


def test_finite_and_integer_inputs_pass():
    Batch((X, torch.arange(3), torch.tensor([True]))).check_finite()


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
