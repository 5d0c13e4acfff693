"""Products with the curvature matrix are those of the matrix written out, in whatever batches, and disturb nothing."""

import math

import pytest
import torch
from curvature.random_networks import FAMILIES
from curvature.undisturbed import assert_undisturbed, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ms_optim.curvature.losses.named_loss import loss_of
from ms_optim.curvature.operator import Operator
from ms_optim.curvature.products import curvature_of
from ms_optim.errors import CurvatureError, DataError, UnsupportedError
from ms_optim.reference import curvature as oracle
from ms_optim.reference import spectrum as dense

MATRICES = ["hessian", "gauss-newton"]


def relu_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))


def labelled():
    torch.manual_seed(2)
    return torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])


def written_out(model, data, loss="cross_entropy", matrix="hessian", names=None):
    with curvature_of(model, data, loss, matrix) as curvature:
        return curvature.block(names).dense()


def expected(model, x, y, loss, matrix):
    if matrix == "hessian":
        return dense.hessian(model, x, y, loss)
    return dense.gauss_newton(model, x, loss)


def assert_close(found, right):
    assert float((found - right).abs().max()) <= 1e-12 * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8)
@given(data=st.data())
def test_products_are_those_of_the_matrix_written_out(family, matrix, data):
    model, x = data.draw(FAMILIES[family]())
    loss = data.draw(st.sampled_from(["cross_entropy", "bce_with_logits", "mse"]))
    logits = model(x)
    y = torch.arange(len(logits)) % logits.shape[1] if loss == "cross_entropy" else torch.rand(logits.shape)
    right = expected(model, x, y, loss, matrix)
    with curvature_of(model, (x, y), loss, matrix) as curvature:
        operator = curvature.block()
        vectors = operator.draw(3, torch.Generator().manual_seed(1), "normal")
        assert_close(operator(vectors), vectors @ right)
        assert curvature.products == 3


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_block_is_that_of_the_named_parameters(matrix):
    model, (x, y) = relu_net(), labelled()
    right = expected(model, x, y, "cross_entropy", matrix)
    for names in (["2.weight"], ["2.bias", "0.weight"], ["0.bias"]):  # in the order of the model
        found = written_out(model, (x, y), matrix=matrix, names=names)
        assert_close(found, dense.block(right, model, names))


@pytest.mark.parametrize("matrix", MATRICES)
def test_batches_are_averaged_by_their_numbers_of_samples(matrix):
    model, (x, y) = relu_net(), labelled()
    whole = written_out(model, (x, y), matrix=matrix)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    for data in ([(x[:1], y[:1]), (x[1:], y[1:])], loader, iter([[x[:4], y[:4]], [x[4:], y[4:]]]), [(x, y)]):
        assert_close(written_out(model, data, matrix=matrix), whole)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum"), "bce_with_logits"])
def test_the_gauss_newton_matrix_needs_no_labels(loss):
    model, (x, _) = relu_net(), labelled()
    name = loss if isinstance(loss, str) else loss_of(loss).name
    right = dense.gauss_newton(model, x, name) * (1 if isinstance(loss, str) or loss.reduction == "mean" else 3 * 6)
    for data in (x, [x[:2], x[2:]]):
        assert_close(written_out(model, data, loss, "gauss-newton"), right)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce_with_logits", "mse"])
def test_the_curvature_of_the_loss_times_a_vector_is_that_matrix_times_it(loss):
    logits, vectors = 3 * torch.randn(5, 4), torch.randn(5, 4)
    found = loss_of(loss).product(logits, vectors)
    assert torch.allclose(found, torch.einsum("nkl,nl->nk", oracle.logit_hessian(logits, loss), vectors), rtol=1e-12)


def test_a_loss_may_be_a_function_of_ones_own():
    model, (x, y) = relu_net(), labelled()

    def doubled(logits, targets):
        return 2 * F.cross_entropy(logits, targets)

    assert_close(written_out(model, (x, y), doubled), 2 * written_out(model, (x, y)))


@pytest.mark.parametrize("matrix", MATRICES)
def test_float32_parameters_give_products_of_their_precision(matrix):
    model, (x, y) = relu_net(), labelled()
    right = written_out(model, (x, y), matrix=matrix)
    with curvature_of(model.float(), (x.float(), y), "cross_entropy", matrix) as curvature:
        operator = curvature.block()
        found = operator.dense()
    assert found.dtype == torch.float64 and operator.rounding == torch.finfo(torch.float32).eps
    assert float((found - right).abs().max()) < 1e-5 * float(right.abs().max())


class Restless(nn.Module):
    """Dropout, BatchNorm, mixed modes, a frozen and an unused parameter; draws a random number in every forward."""

    def __init__(self, raises=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.ReLU(inplace=True))
        self.head = nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.randn(2))
        self.head.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.raises = raises
        self.body.train()
        self.head.eval()

    def forward(self, x):
        self.calls += 1
        torch.rand(3)
        if self.raises and len(x) == 2:
            raise KeyError("inside the model")
        return self.head(self.body(x))


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
def test_nothing_is_disturbed(matrix, raises):
    model, (x, y) = Restless(), labelled()
    F.cross_entropy(model(x), y).backward()
    model.raises = raises
    before = snapshot(model)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    with torch.no_grad():
        if raises:
            with pytest.raises(KeyError, match="inside the model"):
                written_out(model, loader, matrix=matrix)
        else:
            found = written_out(model, loader, matrix=matrix)
    assert_undisturbed(model, before)
    if not raises:
        assert len(found) == 12 + 4 + 4 + 4 + 12 + 2 and not found.requires_grad  # without the frozen bias
        assert float(found[:2].abs().max()) == 0.0 and float(found.abs().sum(1)[2:].min()) > 0  # the first is unused
        model.eval()
        assert_close(found, expected(model, x, y, "cross_entropy", matrix))


@pytest.mark.parametrize("matrix", MATRICES)
def test_the_module_inside_a_wrapper_is_measured(matrix):
    model, data = relu_net(), labelled()
    inside = nn.DataParallel(model) if not torch.cuda.is_available() else model
    assert_close(written_out(inside, data, matrix=matrix), written_out(model, data, matrix=matrix))


def test_what_is_linear_has_no_curvature():
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    assert float(written_out(model, (x, y), lambda o, t: (o * t).mean()).abs().max()) == 0.0
    model.unused = nn.Parameter(torch.randn(2))
    for matrix in MATRICES:
        assert float(written_out(model, (x, y), "mse", matrix, ["unused"]).abs().max()) == 0.0


def test_random_vectors_have_the_distributions_they_are_named_for():
    operator = Operator(lambda v: v, 500)
    signs, normal, uniform = (operator.draw(40, torch.Generator().manual_seed(1), d) for d in
                              ("rademacher", "normal", "uniform"))
    assert set(signs.unique().tolist()) == {-1.0, 1.0} and abs(float(signs.mean())) < 5 / math.sqrt(20000)
    assert abs(float(normal.var()) - 1) < 5 * math.sqrt(2 / 20000)
    assert float(uniform.abs().max()) <= 1 and abs(float(uniform.var()) - 1 / 3) < 0.01
    assert signs.dtype == normal.dtype == uniform.dtype == torch.float64
    assert sum(operator.together(10**6)) == 10**6 and max(operator.together(10**6)) < 10**5


def test_what_cannot_be_measured_is_named():
    model, (x, y) = relu_net(), labelled()
    with pytest.raises(ValueError, match="matrix must be 'hessian' or 'gauss-newton', got 'fisher'"):
        written_out(model, (x, y), matrix="fisher")
    with pytest.raises(DataError, match="data is a Tensor, without targets"):
        written_out(model, x)
    with pytest.raises(UnsupportedError, match="loss=cross_entropy has no exact curvature here"):
        written_out(model, (x, y), F.cross_entropy, "gauss-newton")
    with pytest.raises(ValueError, match="parameters holds '1.weight', which is no trainable parameter; .* 0.weight"):
        written_out(model, (x, y), names=["0.weight", "1.weight"])
    with pytest.raises(ValueError, match="parameters is empty"):
        written_out(model, (x, y), names=[])
    with pytest.raises(ValueError, match="parameters='0.weight' is one string; pass a list"):
        written_out(model, (x, y), names="0.weight")
    for matrix in MATRICES:
        with pytest.raises(UnsupportedError, match="parameter 0.weight is torch.bfloat16, too coarse"):
            written_out(relu_net().bfloat16(), (x.bfloat16(), y), matrix=matrix)
        with pytest.raises(CurvatureError, match="no parameter with requires_grad"):
            written_out(relu_net().requires_grad_(False), (x, y), matrix=matrix)
        with pytest.raises(DataError, match="non-finite"):
            written_out(model, (x * math.nan, y), matrix=matrix)
    with pytest.raises(CurvatureError, match="not finite; check data and weights"):
        written_out(model, (x, y), lambda o, t: (o * 1e300).square().mean())


@pytest.mark.cuda
@pytest.mark.parametrize("matrix", MATRICES)
def test_the_device_does_not_matter(matrix):
    model, data = relu_net(), labelled()
    here = written_out(model, data, matrix=matrix)
    there = written_out(model.cuda(), data, matrix=matrix)
    assert there.is_cuda
    assert_close(there.cpu(), here)
