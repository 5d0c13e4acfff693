"""Evaluation counts every image once, and nothing else."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ms_optim import models
from ms_optim.train.evaluation import evaluate
from ms_optim.train.process import Process

HERE = Process(torch.device("cpu"))


class Split(list):
    """Batches, of which the first ``real`` samples count."""

    def __init__(self, batches, real):
        super().__init__(batches)
        self.real = real


def data(count, size):
    torch.manual_seed(1)
    x, y = torch.randn(count, 1, 8, 8), torch.randint(10, (count,))
    return x, y, list(zip(x.split(size), y.split(size), strict=True))


def none():
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.parametrize("size", [1, 7, 50, 64])
def test_batches_make_no_difference(size):
    model = models.digits_mlp()
    x, y, batches = data(50, size)
    found = evaluate(model, Split(batches, 50), HERE, none)
    logits = model(x).detach()
    assert found["loss"] == pytest.approx(float(cross_entropy(logits, y)), rel=1e-6)
    assert found["top1"] == pytest.approx(100 * float((logits.argmax(1) == y).double().mean()), abs=1e-9)
    five = logits.topk(5).indices.eq(y[:, None]).any(1)
    assert found["top5"] == pytest.approx(100 * float(five.double().mean()), abs=1e-9)


def test_padding_does_not_count():
    model = models.digits_mlp()
    x, y, batches = data(50, 10)
    padded = [*batches, (x[:10] + 100, (y[:10] + 1) % 10)]
    assert evaluate(model, Split(padded, 50), HERE, none) == evaluate(model, Split(batches, 50), HERE, none)
    half = evaluate(model, Split(batches, 25), HERE, none)
    assert half["loss"] == pytest.approx(float(cross_entropy(model(x[:25]).detach(), y[:25])), rel=1e-6)


def test_a_logit_that_is_not_a_number_is_no_answer():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 10), torch.nan)

    x, _, _ = data(8, 8)
    found = evaluate(Broken(), Split([(x, torch.zeros(8, dtype=torch.long))], 8), HERE, none)
    assert found["top1"] == 0 and found["top5"] == 0 and found["loss"] != found["loss"]


def test_the_mode_and_the_statistics_of_the_model_are_as_before():
    model = models.small_resnet().train()
    before = [buffer.clone() for buffer in model.buffers()]
    _, _, batches = data(20, 10)
    evaluate(model, Split(batches, 20), HERE, none)
    assert model.training and all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_fewer_than_five_classes_have_a_top_five():
    model = models.MLP((64, 3))
    x, _, _ = data(9, 9)
    found = evaluate(model, Split([(x, torch.tensor([0, 1, 2] * 3))], 9), HERE, none)
    assert found["top5"] == 100
