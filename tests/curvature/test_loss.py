"""S Sᵀ is the second derivative of torch's own losses; samples are unbiased, ranks are proved, and the rest is refused.

The judge is ``torch.autograd.functional.hessian`` of the loss modules themselves, targets and all.
"""

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from ms_optim.curvature.losses.loss import BinaryCrossEntropy, CrossEntropy, SquaredError
from ms_optim.curvature.losses.named_loss import loss_of
from ms_optim.errors import DataError, UnsupportedError

LOSSES = [
    CrossEntropy(),
    BinaryCrossEntropy(),
    BinaryCrossEntropy(mean=False, weight=(0.5,)),
    SquaredError(),
    SquaredError(mean=False),
]


def outer(columns):
    """Σ_c S_c S_cᵀ, ``[N, K, K]``."""
    return torch.einsum("cnk,cnl->nkl", columns, columns)


def curvature(loss, logits):
    """P by its formula, ``[N, K, K]``, with nothing shared with the code but the constants."""
    classes = logits.shape[1]
    if isinstance(loss, CrossEntropy):
        p = logits.softmax(-1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    m = 1 / classes if loss.mean else 1.0
    if isinstance(loss, SquaredError):
        return 2 * m * torch.eye(classes).expand(len(logits), -1, -1)
    weight = torch.tensor(loss.weight or (1.0,))
    return torch.diag_embed(m * weight * logits.sigmoid() * (-logits).sigmoid())


@st.composite
def cases(draw, max_samples=3, max_classes=5):
    """A loss and logits from uniform to saturated, ``[N, K]``."""
    loss = draw(st.sampled_from(LOSSES))
    samples = draw(st.integers(1, max_samples))
    classes = draw(st.integers(2 if isinstance(loss, CrossEntropy) else 1, max_classes))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return loss, draw(st.sampled_from([0.0, 1.0, 4.0, 20.0])) * torch.randn(samples, classes)


def targets_for(module, logits):
    if isinstance(module, nn.MSELoss):
        return torch.randn_like(logits)
    if isinstance(module, SoftTargetCrossEntropy):
        return torch.randn_like(logits).softmax(-1)
    if isinstance(module, nn.BCEWithLogitsLoss):
        return torch.rand_like(logits)
    return torch.randint(logits.shape[1], (len(logits),))


MODULES = [
    *(nn.CrossEntropyLoss(reduction=r, label_smoothing=s) for r in ("mean", "sum") for s in (0.0, 0.3)),
    LabelSmoothingCrossEntropy(0.2),
    SoftTargetCrossEntropy(),
    *(nn.MSELoss(reduction=r) for r in ("mean", "sum")),
    *(
        nn.BCEWithLogitsLoss(reduction=r, weight=w)
        for r in ("mean", "sum")
        for w in (None, torch.tensor(0.3), torch.rand(4), torch.rand(1, 4), torch.tensor([2.0]))
    ),
]


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("module", MODULES, ids=lambda m: f"{type(m).__name__}-{getattr(m, 'reduction', '')}")
def test_columns_multiply_out_to_the_second_derivative_of_torchs_loss(module, scale):
    loss, logits = loss_of(module), scale * torch.randn(3, 4)
    targets = targets_for(module, logits)
    hessian = torch.autograd.functional.hessian(lambda o: module(o, targets), logits)
    block = torch.einsum("nknl->nkl", hessian)
    assert torch.equal(hessian, torch.einsum("nkl,nm->nkml", block, torch.eye(3)))  # no sample bends another's loss
    factor = 1 / len(logits) if loss.mean else 1.0
    for columns in (loss.exact(logits), loss.leading(logits)):
        torch.testing.assert_close(factor * outer(columns), block, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("module", [nn.BCEWithLogitsLoss, nn.MSELoss])
def test_one_output_per_sample_may_have_no_axis_of_its_own(module, reduction):
    module, output = module(reduction=reduction), torch.randn(5)
    hessian = torch.autograd.functional.hessian(lambda o: module(o, torch.full((5,), 0.3)), output)
    loss = loss_of(module)
    logits = loss.logits(output)
    assert logits.shape == (5, 1)
    ours = outer(loss.exact(logits))[:, 0, 0] / (5 if loss.mean else 1)
    torch.testing.assert_close(ours, hessian.diagonal(), rtol=1e-13, atol=0.0)


@given(cases())
def test_exact_and_leading_columns_multiply_out_to_the_curvature(case):
    loss, logits = case
    rank = loss.rank(logits.shape[1])
    for columns in (loss.exact(logits), loss.leading(logits)):
        assert columns.shape == (rank, *logits.shape)
        torch.testing.assert_close(outer(columns), curvature(loss, logits), rtol=0.0, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("logits", [[[300.0, -300.0], [0.0, 300.0]], [[-300.0, 299.0, 300.0], [1e4, 0.0, -1e4]]])
def test_saturated_outputs_have_finite_columns(loss, logits):
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)):
        o = torch.tensor(logits, dtype=dtype)
        noise = loss.noise(*o.shape, 1, torch.Generator())
        for columns in (loss.exact(o), loss.leading(o), *loss.sampled(o, 0, noise)):
            assert columns.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert bool(torch.isfinite(columns).all())
        torch.testing.assert_close(outer(loss.exact(o)).double(), curvature(loss, o.double()), rtol=0.0, atol=tolerance)
        o.requires_grad_()
        column = loss.probe(o, torch.Generator())
        assert bool(torch.isfinite(column).all())
        if column.requires_grad:
            assert bool(torch.isfinite(torch.autograd.grad(column.square().sum(), o)[0]).all())


def test_saturated_curvature_keeps_its_digits_in_float64():
    # P_kk = s (1 − s) = e^{−300}, and p (1 − p) of the classes behind.
    root = BinaryCrossEntropy(mean=False).exact(torch.tensor([[300.0, -300.0]]))
    torch.testing.assert_close(root.square().sum(0), torch.full((1, 2), -300.0).exp(), rtol=1e-12, atol=0.0)
    small = CrossEntropy().leading(torch.tensor([[300.0, 0.0, -1.0]]))[:, 0, 1:].square().sum(0)
    p = torch.tensor([-300.0, -301.0]).exp()
    torch.testing.assert_close(small, p, rtol=1e-12, atol=0.0)


@given(cases(), st.data())
def test_columns_made_in_parts_are_the_same_columns(case, data):
    loss, logits = case
    cut = data.draw(st.integers(0, loss.rank(logits.shape[1])))
    for columns in (loss.exact, loss.leading):
        assert torch.equal(torch.cat([columns(logits, 0, cut), columns(logits, cut)]), columns(logits))


@given(cases())
def test_the_first_leading_column_is_that_of_the_likeliest_class_or_of_the_largest_entry(case):
    loss, logits = case
    diagonal = curvature(loss, logits).diagonal(dim1=1, dim2=2)
    first = (logits if isinstance(loss, CrossEntropy) else diagonal).argmax(-1, keepdim=True)
    entry = loss.leading(logits, 0, 1)[0].gather(-1, first)
    torch.testing.assert_close(entry.square(), diagonal.gather(-1, first), rtol=1e-10, atol=1e-15)


@given(cases())
def test_leading_columns_of_diagonal_losses_descend(case):
    loss, logits = case
    norms = loss.leading(logits).square().sum(-1)
    if not isinstance(loss, CrossEntropy):
        assert torch.equal(norms, norms.sort(0, descending=True).values)


@given(cases(max_samples=2, max_classes=4), st.integers(0, 4))
def test_leading_and_signed_columns_are_unbiased_over_all_signs(case, columns):
    loss, logits = case
    samples, classes = logits.shape
    rank = loss.rank(classes)
    patterns = torch.tensor(list(itertools.product([-1, 1], repeat=samples * rank)), dtype=torch.int8)
    leading, signed = loss.sampled(logits, columns, patterns.view(-1, samples, rank))
    assert torch.equal(leading, loss.leading(logits, 0, len(leading)))
    if columns >= rank - 1:
        assert len(leading) == rank and signed.shape == (0, samples, classes)
        mean = outer(leading)
    else:
        assert len(leading) == columns and signed.shape == (len(patterns), samples, classes)
        mean = outer(leading) + outer(signed) / len(patterns)
    torch.testing.assert_close(mean, curvature(loss, logits), rtol=0.0, atol=1e-14)


@given(cases(), st.integers(0, 3), st.data())
def test_a_signed_column_is_the_signed_sum_of_the_others(case, columns, data):
    loss, logits = case
    rank = loss.rank(logits.shape[1])
    assume(columns < rank - 1)
    noise = loss.noise(*logits.shape, 3, torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    leading, signed = loss.sampled(logits, columns, noise)
    if isinstance(loss, CrossEntropy):
        rest = torch.einsum("pnc,cnk->pnk", noise[..., columns:].double(), loss.leading(logits, columns))
    else:  # one output a column, and its sign is the output's
        rest = torch.where(leading.any(0), 0.0, torch.einsum("pnk,knk->pnk", noise.double(), loss.exact(logits)))
    torch.testing.assert_close(signed, rest, rtol=0.0, atol=1e-14)


@given(cases(max_samples=5), st.integers(0, 4), st.data())
def test_sampled_columns_do_not_depend_on_how_the_batch_is_cut(case, columns, data):
    loss, logits = case
    cut = data.draw(st.integers(0, len(logits)))
    noise = loss.noise(*logits.shape, 2, torch.Generator().manual_seed(1))
    whole = loss.sampled(logits, columns, noise)
    parts = [
        loss.sampled(logits[i:j], columns, noise[:, i:j]) for i, j in ((0, cut), (cut, len(logits))) if i < j
    ]
    for k in range(2):
        torch.testing.assert_close(torch.cat([part[k] for part in parts], 1), whole[k], rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_noise_is_plus_and_minus_one_from_the_generator_alone(loss):
    state = torch.get_rng_state()
    drawn = loss.noise(40, 6, 5, torch.Generator().manual_seed(2))
    assert torch.equal(state, torch.get_rng_state())
    assert drawn.dtype == torch.int8 and drawn.shape == (5, 40, loss.rank(6))
    assert set(drawn.unique().tolist()) == {-1, 1}
    assert torch.equal(drawn, loss.noise(40, 6, 5, torch.Generator().manual_seed(2)))
    assert abs(float(drawn.double().mean())) < 5 / drawn.numel() ** 0.5


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_the_probe_is_unbiased(loss):
    logits = torch.tensor([[1.0, -0.5, 0.0]]).expand(4000, 3)
    column = loss.probe(logits, torch.Generator().manual_seed(0))
    product = column[:, :, None] * column[:, None, :]
    error = product.mean(0) - curvature(loss, logits[:1])[0]
    assert bool((error.abs() <= 5 * product.std(0) / 4000**0.5 + 1e-14).all())


@pytest.mark.parametrize("loss", LOSSES[:3], ids=str)
def test_the_probe_is_differentiable_in_the_logits(loss):
    logits = (2 * torch.randn(3, 4)).requires_grad_()
    assert torch.autograd.gradcheck(lambda o: loss.probe(o, torch.Generator().manual_seed(3)), logits)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_columns_are_detached(loss):
    logits = torch.randn(3, 4, requires_grad=True)
    noise = loss.noise(3, 4, 2, torch.Generator())
    for columns in (loss.exact(logits), loss.leading(logits), *loss.sampled(logits, 1, noise)):
        assert not columns.requires_grad


def left_out(loss, logits, columns):
    """Σ_i ‖P_i − S_{i,r} S_{i,r}ᵀ‖_* from the eigenvalues of the matrices."""
    rest = curvature(loss, logits) - outer(loss.leading(logits, 0, columns))
    return float(torch.linalg.eigvalsh(rest).abs().sum())


@given(cases(max_samples=4), st.sampled_from([0.9, 0.5, 0.1, 1e-2, 1e-4, 1e-7]))
def test_the_numerical_rank_is_valid_and_minimal(case, tolerance):
    loss, logits = case
    whole = left_out(loss, logits, 0)
    assume(whole > 1e-6)  # below, the matrices of the judge are rounding
    r = loss.numerical_rank(logits, tolerance)
    slack = 1e-13 * max(1.0, whole)
    assert left_out(loss, logits, r) <= tolerance * whole + slack
    assert r == 0 or left_out(loss, logits, r - 1) > tolerance * whole - slack


@given(cases(), st.lists(st.floats(0.0, 1.5), min_size=2, max_size=5))
def test_the_numerical_rank_falls_as_the_tolerance_grows(case, tolerances):
    loss, logits = case
    ranks = [loss.numerical_rank(logits, t) for t in sorted(tolerances)]
    assert ranks == sorted(ranks, reverse=True)
    assert loss.numerical_rank(logits, 1.0) == 0
    assert ranks[0] <= loss.rank(logits.shape[1])


@given(cases())
def test_what_is_left_is_what_the_columns_leave(case):
    loss, logits = case
    left = loss.remaining(logits)
    rank = loss.rank(logits.shape[1])
    assert left.shape == (rank + 1,) and float(left[rank]) == 0.0
    for r in range(rank):
        behind = loss.leading(logits, r).square().sum()
        torch.testing.assert_close(left[r], behind, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("gap", [20.0, 50.0, 200.0])
def test_confident_samples_have_a_small_rank_and_digits_far_below_rounding(gap):
    # Three classes behind the first with p = e^{−gap}, e^{−2 gap}, e^{−3 gap}: each column takes a factor e^{−gap}.
    logits = -gap * torch.arange(4.0).expand(5, 4)
    loss = CrossEntropy()
    left = loss.remaining(logits) / 5
    expected = 2 * (-gap * torch.arange(1.0, 4.0)).exp()
    torch.testing.assert_close(left[:3], expected, rtol=1e-8, atol=0.0)
    assert [loss.numerical_rank(logits, t) for t in (1e-8, 1e-90 if gap == 200.0 else 1e-40)] == [
        1,
        {20.0: 3, 50.0: 2, 200.0: 2}[gap],
    ]


def test_the_numerical_rank_is_zero_where_the_curvature_vanishes_and_full_for_the_squared_error():
    saturated = 1e4 * torch.eye(3)
    assert CrossEntropy().numerical_rank(saturated, 0.0) == 0
    assert BinaryCrossEntropy(weight=(0.0,)).numerical_rank(saturated, 0.0) == 0
    assert SquaredError().numerical_rank(saturated, 0.1) == 3
    assert SquaredError().numerical_rank(torch.zeros(2, 10), 0.25) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numerical_rank_is_that_of_float64_for_every_type(dtype):
    logits = (5 * torch.randn(6, 8)).to(dtype)
    for loss in LOSSES:
        for tolerance in (0.3, 1e-3, 1e-9, 0.0):
            assert loss.numerical_rank(logits, tolerance) == loss.numerical_rank(logits.double(), tolerance)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce_with_logits", "mse", "squared_error"])
def test_names_are_the_modules_with_their_defaults(loss):
    modules = {"cross_entropy": nn.CrossEntropyLoss(), "bce_with_logits": nn.BCEWithLogitsLoss()}
    assert loss_of(loss) == loss_of(modules.get(loss, nn.MSELoss()))
    assert loss_of(loss).mean and loss_of(loss_of(loss)) == loss_of(loss)


def test_a_subclass_that_only_fixes_arguments_is_its_parent_and_one_with_a_forward_is_refused():
    class Smoothed(nn.CrossEntropyLoss):
        def __init__(self):
            super().__init__(label_smoothing=0.1, reduction="sum")

    class Focal(nn.CrossEntropyLoss):
        def forward(self, logits, target):
            return (1 - logits.softmax(-1).amax(-1)).mean() * super().forward(logits, target)

    assert loss_of(Smoothed()) == CrossEntropy(mean=False)
    with pytest.raises(UnsupportedError, match="loss=Focal has no exact curvature here; supported are 'cross_entropy'"):
        loss_of(Focal())


def test_a_class_that_only_shares_timms_name_is_refused():
    impostor = type("SoftTargetCrossEntropy", (nn.Module,), {})()
    with pytest.raises(UnsupportedError, match="loss=SoftTargetCrossEntropy has no exact curvature"):
        loss_of(impostor)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("hinge", "loss='hinge' has no exact curvature here; supported are .*'mse'.* timm's LabelSmoothing"),
        (nn.L1Loss(), "loss=L1Loss has no exact curvature here; supported are"),
        (nn.functional.cross_entropy, "loss=cross_entropy has no exact curvature here; supported are"),
        (None, "loss=None has no exact curvature here; supported are"),
        (nn.MSELoss, r"loss is the class MSELoss; pass a loss module, such as MSELoss\(\)"),
        (nn.MSELoss(reduction="none"), r"MSELoss\(reduction='none'\) is not a number.*'mean' or 'sum'"),
        (nn.CrossEntropyLoss(reduction="none"), r"CrossEntropyLoss\(reduction='none'\) is not a number"),
        (nn.BCEWithLogitsLoss(reduction="none"), r"BCEWithLogitsLoss\(reduction='none'\) is not a number"),
        (
            nn.CrossEntropyLoss(weight=torch.ones(3)),
            r"weight=<tensor of shape \(3,\)>.*depends on the labels, which are never read; pass loss='cross_entropy'",
        ),
        (nn.CrossEntropyLoss(ignore_index=2), r"ignore_index=2\) leaves out the samples of class 2.*drop those"),
        (
            nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)),
            r"pos_weight=<tensor of shape \(3,\)>.*targets, which are never read; pass loss='bce_with_logits'",
        ),
        (nn.BCEWithLogitsLoss(weight=torch.ones(5, 1)), r"shape \(5, 1\)>\) has a batch axis.*shape \[K\]"),
        (nn.BCEWithLogitsLoss(weight=torch.ones(1, 1, 3)), r"shape \(1, 1, 3\)>\) has a batch axis"),
        (nn.BCEWithLogitsLoss(weight=torch.tensor([1.0, -1.0])), r"weight=\[1.0, -1.0\]\) is negative or not finite"),
        (nn.BCEWithLogitsLoss(weight=torch.tensor(float("nan"))), r"weight=\[nan\]\) is negative or not finite"),
    ],
)
def test_what_has_no_exact_curvature_is_refused_with_the_reason_and_the_next_move(loss, message):
    with pytest.raises(UnsupportedError, match=message):
        loss_of(loss)


def test_torchs_default_ignored_index_is_no_class():
    assert loss_of(nn.CrossEntropyLoss(ignore_index=-1)) == loss_of(nn.CrossEntropyLoss()) == CrossEntropy()


def test_a_weight_that_does_not_fit_the_outputs_is_refused():
    loss = loss_of(nn.BCEWithLogitsLoss(weight=torch.ones(5)))
    with pytest.raises(UnsupportedError, match=r"has 5 entries and the model 1 output\(s\).*not one per sample"):
        loss.exact(loss.logits(torch.zeros(5)))


@pytest.mark.parametrize("shape", [(3,), (3, 1), (0, 4), (2, 4, 5)])
def test_cross_entropy_takes_samples_by_classes_alone(shape):
    with pytest.raises(DataError, match=r"the trace needs \[N, K\] with K >= 2"):
        CrossEntropy().logits(torch.zeros(shape))


@pytest.mark.parametrize("loss", LOSSES[1:], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 0), (2, 4, 5)])
def test_elementwise_losses_take_samples_by_outputs_or_samples_alone(loss, shape):
    with pytest.raises(DataError, match=rf"trace for loss='{loss.name}' needs \[N, K\] or \[N\]: flatten"):
        loss.logits(torch.zeros(shape))


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_wrong_numbers_are_refused(loss):
    logits = torch.zeros(3, 4)
    noise = loss.noise(3, 4, 1, torch.Generator())
    with pytest.raises(ValueError, match="columns must be >= 0, got -1; 0 leaves every column"):
        loss.sampled(logits, -1, noise)
    with pytest.raises(ValueError, match=r"noise has shape .*need \[probes, 2, .*noise\[:, i:j\] for logits\[i:j\]"):
        loss.sampled(logits[:2], 1, noise)
    for tolerance in (-1e-3, float("nan")):
        with pytest.raises(ValueError, match="tolerance must be >= 0, got"):
            loss.numerical_rank(logits, tolerance)
