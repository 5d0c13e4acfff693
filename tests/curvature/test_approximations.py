"""Estimates of DIAG[H] converge to what their docstrings say, at the rate they say, and disturb nothing.

A mean of m probes is compared with its limit entry by entry, in units of its standard error; the variance of a probe is
known from the full Hessian, and itself checked against independent repeats.  Of a hundred entries none should be 5
standard errors away (all seeds are fixed, so that a pass is a pass everywhere).
"""

import math

import pytest
import torch
from curvature.agreement import assert_same
from curvature.undisturbed import assert_undisturbed, snapshot
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ms_optim.curvature.approximations import (
    hutchinson_diagonal,
    hutchinson_trace,
    tsuzuku2019_diagonal,
    tsuzuku2020_diagonal,
)
from ms_optim.errors import CurvatureError, DataError, UnsupportedError
from ms_optim.reference import curvature as oracle

ALL = [tsuzuku2019_diagonal, tsuzuku2020_diagonal, hutchinson_diagonal, hutchinson_trace]
DIFFERENCES = [tsuzuku2019_diagonal, tsuzuku2020_diagonal]


def relu_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def image_net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3))


def smooth_net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def case(name):
    """A network, inputs and targets, the name of a loss."""
    torch.manual_seed(4)
    if name == "image":
        return image_net(), torch.randn(6, 1, 3, 3), torch.tensor([0, 1, 2, 0, 1, 2]), "cross_entropy"
    if name == "relu":
        return relu_net(), torch.randn(6, 4), torch.tensor([0, 1, 2, 2, 1, 0]), "cross_entropy"
    if name == "smooth":
        return smooth_net(), torch.randn(6, 4), torch.rand(6, 3), "bce_with_logits"
    return smooth_net(), torch.randn(6, 4), torch.randn(6, 3), "mse"


CASES = ["relu", "image", "smooth", "smooth mse"]


def full_hessian(model, x, y, loss):
    """∂²L / ∂w∂w over all parameters together, by double backward, row by row."""
    parameters = list(model.parameters())
    value = oracle.mean_loss(model(x), y, loss)
    first = torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, create_graph=True)])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in first]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def flat(named):
    return torch.cat([torch.as_tensor(value).detach().flatten() for value in named.values()])


def off_diagonal_squares(hessian):
    """Σ_{j≠i} H_ij², the variance of a probe of signs."""
    return hessian.square().sum(1) - hessian.diagonal().square()


def gaussian_variance(hessian):
    """Σ_j H_ij² + H_ii²."""
    return hessian.square().sum(1) + hessian.diagonal().square()


def assert_converged(mean, limit, variance, probes, rounding=1e-8):
    """Every entry within 5 standard errors, and together neither too far nor too near for that standard error."""
    error = (variance / probes).sqrt()
    assert bool(((mean - limit).abs() <= 5 * error + rounding).all())
    z = ((mean - limit) / error)[error > 1e-6]
    assert len(z) > 10
    assert 0.3 < float(z.square().mean().sqrt()) < 2.0


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("name", CASES)
def test_hutchinson_diagonal_converges_to_brute_force(name, distribution):
    model, x, y, loss = case(name)
    hessian, probes = full_hessian(model, x, y, loss), 2000
    expected = flat(oracle.brute_force_hessian_diagonals(model, x, y, loss))
    assert torch.allclose(hessian.diagonal(), expected, rtol=1e-12, atol=1e-14)
    found = hutchinson_diagonal(model, (x, y), loss, probes, distribution, seeded(5))
    assert {name: value.shape for name, value in found.items()} == {n: p.shape for n, p in model.named_parameters()}
    variance = off_diagonal_squares(hessian) if distribution == "rademacher" else gaussian_variance(hessian)
    assert_converged(flat(found), expected, variance, probes)


@pytest.mark.parametrize("name", CASES)
def test_2019_converges_to_brute_force_where_no_kink_is_near(name):
    model, x, y, loss = case(name)
    hessian, probes = full_hessian(model, x, y, loss), 1500
    expected = flat(oracle.brute_force_hessian_diagonals(model, x, y, loss))
    found = flat(tsuzuku2019_diagonal(model, (x, y), loss, probes, generator=seeded(6)))
    assert_converged(found, expected, gaussian_variance(hessian), probes)


@pytest.mark.parametrize("step", ["relative", "uniform"])
@pytest.mark.parametrize("name", ["relu", "image"])
def test_2020_converges_to_its_documented_limit(name, step):
    model, x, y, loss = case(name)
    probes, radius, floor = 1500, 1e-5, 1e-8
    sizes = flat(dict(model.named_parameters())).abs()
    divisors = sizes + floor / (2 * radius)
    hessian = full_hessian(model, x, y, loss)
    scaled = (hessian * sizes if step == "relative" else hessian) / divisors[:, None]
    found = flat(tsuzuku2020_diagonal(model, (x, y), loss, probes, radius, floor, step, seeded(7)))
    assert bool((found >= 0).all())
    limit, variance = scaled.diagonal(), off_diagonal_squares(scaled)
    assert float(limit.min()) > -1e-12  # so that the positive part is the last step of the limit, too
    # The positive part brings no entry further from a limit that is not negative; it does shrink the spread.
    error = (variance / probes).sqrt()
    assert bool(((found - limit).abs() <= 5 * error + 1e-8).all())
    plain = full_hessian(model, x, y, loss).diagonal()
    beyond = (limit - plain).abs() > 10 * error + 1e-8
    if step == "uniform":  # not an estimate of the diagonal, by more than its noise
        assert bool(beyond.any()) and bool(((found - plain).abs() > 5 * error)[beyond].all())
    else:
        assert not bool(beyond.any())
    z = ((found - limit) / error)[limit > 4 * error]  # where the positive part does nothing
    assert len(z) > 5
    assert 0.3 < float(z.square().mean().sqrt()) < 2.0


def test_2020_takes_the_positive_part_of_the_average():
    model, x, y, loss = case("smooth mse")
    exact = full_hessian(model, x, y, loss).diagonal()
    found = flat(tsuzuku2020_diagonal(model, (x, y), loss, 3, generator=seeded(8)))
    assert float(found.min()) == 0.0 and int((found == 0).sum()) > int((exact < 0).sum())
    model, data = OneWeight(1.0), (torch.ones(1, 1), torch.zeros(1, 1))
    assert tsuzuku2020_diagonal(model, data, cosine)["w"].item() == 0.0  # H = −cos 1
    assert tsuzuku2019_diagonal(model, data, cosine, 400)["w"].item() < -0.3


class OneWeight(nn.Module):
    """o = w x: one parameter, so that smoothed curvatures have closed forms."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x):
        return self.w * x


def cosine(logits, targets):
    return (logits - targets).cos().mean()


def repeats(estimate, count):
    """Mean and standard error over independent repeats."""
    values = torch.stack([estimate(seeded(100 + repeat)) for repeat in range(count)])
    return values.mean(0), values.std(0) / math.sqrt(count)


@pytest.mark.parametrize("radius", [0.3, 1.0])
def test_the_mean_of_2019_is_the_curvature_of_the_smoothed_loss(radius):
    model, data = OneWeight(2.5), (torch.ones(1, 1), torch.zeros(1, 1))
    mean, error = repeats(lambda g: tsuzuku2019_diagonal(model, data, cosine, 10, radius, g)["w"], 300)
    smoothed = -math.cos(2.5) * math.exp(-(radius**2) / 2)  # E cos″(w + r e)
    assert abs(float(mean) - smoothed) < 5 * float(error)
    assert abs(-math.cos(2.5) - smoothed) > 1.5 * float(error)


def test_2019_counts_a_kink_near_the_weights_as_curvature_of_order_one_over_radius():
    model, data = OneWeight(0.51), (torch.ones(1, 1), torch.full((1, 1), 0.5))
    assert hutchinson_diagonal(model, data, F.l1_loss, 3)["w"].item() == 0.0  # |w − y|: no curvature but at the kink
    for radius in (0.01, 0.02):
        mean, error = repeats(lambda g, r=radius: tsuzuku2019_diagonal(model, data, F.l1_loss, 10, r, g)["w"], 300)
        distance = 0.01 / radius
        smoothed = 2 / radius * math.exp(-(distance**2) / 2) / math.sqrt(2 * math.pi)
        assert abs(float(mean) - smoothed) < 5 * float(error) < 0.2 * smoothed
    assert tsuzuku2019_diagonal(model, data, F.l1_loss, 10, 1e-4)["w"].item() == 0.0


def test_2020_with_one_weight_is_a_difference_quotient():
    w, x, data = -0.7, 1.3, (torch.full((1, 1), 1.3), torch.full((1, 1), 2.5))

    def slope(weight):
        return -x * math.sin(weight * x - 2.5)

    model = OneWeight(w)
    uniform = tsuzuku2020_diagonal(model, data, cosine, 3, 0.2, 0.05, "uniform")["w"].item()
    relative = tsuzuku2020_diagonal(model, data, cosine, 3, 0.2, 0.05, "relative")["w"].item()
    divisor, moved = 2 * 0.2 * 0.7 + 0.05, 0.2 * 0.7
    assert uniform == pytest.approx((slope(w + 0.2) - slope(w - 0.2)) / divisor, rel=1e-13)
    assert relative == pytest.approx((slope(w + moved) - slope(w - moved)) / divisor, rel=1e-13)


def test_the_bias_of_a_smooth_loss_falls_with_the_square_of_the_radius():
    model, x, y, loss = case("smooth")
    # The same seed draws the same Gaussian vectors, so the difference is the error of the quotient alone.
    exact = flat(hutchinson_diagonal(model, (x, y), loss, 20, "gaussian", seeded(9)))
    errors = [
        float((flat(tsuzuku2019_diagonal(model, (x, y), loss, 20, radius, seeded(9))) - exact).norm())
        for radius in (1e-2, 1e-3)
    ]
    assert errors[0] > 1e-6
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_and_its_variance_is_the_documented_one(distribution):
    model, x, y, loss = case("smooth")
    hessian, count = full_hessian(model, x, y, loss), 600
    values = torch.stack(
        [flat(hutchinson_diagonal(model, (x, y), loss, 1, distribution, seeded(1000 + k))) for k in range(count)]
    )
    mean, error = values.mean(0), values.std(0) / math.sqrt(count)
    assert bool(((mean - hessian.diagonal()).abs() <= 5 * error + 1e-12).all())
    variance = off_diagonal_squares(hessian) if distribution == "rademacher" else gaussian_variance(hessian)
    deviations = (values - hessian.diagonal()).square().sum(1)
    spread = float(deviations.std()) / math.sqrt(count)
    assert abs(float(deviations.mean()) - float(variance.sum())) < 5 * spread < 0.5 * float(variance.sum())


@pytest.mark.parametrize("name", CASES)
def test_hutchinson_trace_is_unbiased_per_layer_and_its_variance_is_the_documented_one(name):
    model, x, y, loss = case(name)
    expected, count = oracle.hessian_traces(model, x, y, loss), 600
    values = {name: [] for name in expected}
    for k in range(count):
        for layer, value in hutchinson_trace(model, (x, y), loss, 1, generator=seeded(2000 + k)).items():
            values[layer].append(value)
    hessian, start = full_hessian(model, x, y, loss), 0
    off = hessian - hessian.diagonal().diag()
    for layer, parameter in model.named_parameters():
        inside = slice(start, start + parameter.numel())
        start += parameter.numel()
        sample = torch.tensor(values[layer])
        assert abs(float(sample.mean()) - expected[layer]) < 5 * float(sample.std()) / math.sqrt(count)
        own, all_ = off[inside, inside].square().sum(), off[inside].square().sum()
        squares = (sample - expected[layer]).square()
        assert abs(float(squares.mean()) - float(own + all_)) < 5 * float(squares.std()) / math.sqrt(count)


def test_hutchinson_trace_sums_the_diagonal_of_the_same_probes():
    model, x, y, loss = case("relu")
    diagonal = hutchinson_diagonal(model, (x, y), loss, 7, generator=seeded(3))
    traces = hutchinson_trace(model, (x, y), loss, 7, generator=seeded(3))
    assert_same(traces, {name: float(value.sum()) for name, value in diagonal.items()}, relative=1e-13)


def call(estimator, *args, **options):
    found = estimator(*args, **options)
    return {name: torch.as_tensor(value) for name, value in found.items()}


@pytest.mark.parametrize("estimator", ALL)
def test_batches_are_averaged_by_their_numbers_of_samples(estimator):
    model, x, y, loss = case("relu")
    whole = call(estimator, model, (x, y), loss, 3)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    for data in ([(x[:4], y[:4]), (x[4:], y[4:])], loader, iter([[x[:1], y[:1]], [x[1:], y[1:]]])):
        parts = call(estimator, model, data, loss, 3)
        assert all(torch.allclose(parts[name], value, rtol=1e-6, atol=1e-9) for name, value in whole.items())


@pytest.mark.parametrize("estimator", ALL)
def test_the_same_call_gives_the_same_numbers_and_a_generator_moves_on(estimator):
    model, x, y, loss = case("relu")
    first, again = (call(estimator, model, (x, y), loss, 2) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    generator = seeded(0)
    start, later = (call(estimator, model, (x, y), loss, 2, generator=generator) for _ in range(2))
    assert all(torch.equal(first[name], start[name]) for name in first)
    assert any(not torch.equal(first[name], later[name]) for name in first)


@pytest.mark.parametrize("estimator", ALL)
def test_a_loss_may_be_a_name_a_function_or_a_module(estimator):
    model, x, y, loss = case("relu")
    named = call(estimator, model, (x, y), "cross_entropy", 2)
    for same in (F.cross_entropy, nn.CrossEntropyLoss(), lambda o, t: -o.log_softmax(1)[range(len(o)), t].mean()):
        other = call(estimator, model, (x, y), same, 2)
        assert all(torch.allclose(other[name], value, rtol=1e-5, atol=1e-9) for name, value in named.items())


class Restless(nn.Module):
    """Dropout, BatchNorm, mixed modes, a frozen and an unused parameter; draws a random number in every forward."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.ReLU(inplace=True))
        self.head = nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.randn(2))
        self.head.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.body.train()
        self.head.eval()

    def forward(self, x):
        self.calls += 1
        torch.rand(3)
        return self.head(self.body(x))


@pytest.mark.parametrize("estimator", ALL)
def test_nothing_is_disturbed(estimator):
    model, x, y = Restless(), torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    F.cross_entropy(model(x), y).backward()
    before = snapshot(model)
    with torch.no_grad():
        found = call(estimator, model, DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True), "cross_entropy", 2)
    assert_undisturbed(model, before)
    assert "head.bias" not in found and not any(value.requires_grad for value in found.values())
    assert float(found["unused"].abs().max()) == 0.0
    assert all(float(found[name].abs().max()) > 0.0 for name in ("body.0.weight", "head.weight"))


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_weights_and_buffers_are_restored_after_an_exception_inside_the_loss(estimator, fails_at):
    model, x, y = Restless(), torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    F.cross_entropy(model(x), y).backward()
    calls = []

    def loss(logits, targets):
        calls.append(model.head.weight.detach().clone())
        if len(calls) == fails_at:
            raise KeyError("inside the loss")
        return F.cross_entropy(logits, targets)

    before = snapshot(model)
    with pytest.raises(KeyError, match="inside the loss"):
        estimator(model, [(x, y), (x, y), (x, y)], loss, 2)
    assert_undisturbed(model, before)
    moved = not torch.equal(calls[-1], model.head.weight)
    assert moved == (estimator in DIFFERENCES)  # else there was nothing to restore, and this test would prove nothing


@pytest.mark.parametrize("estimator", ALL)
def test_float32_stays_float32(estimator):
    model, x, y, loss = case("relu")
    options = {"radius": 1e-3} if estimator in DIFFERENCES else {}
    if estimator is tsuzuku2019_diagonal:
        probes, tolerance = 800, 0.3  # Gaussian numbers of another type are other numbers
    else:
        probes, tolerance = 20, 5e-3
    exact = flat(call(estimator, model, (x, y), loss, probes, **options))
    found = call(estimator, model.float(), (x.float(), y), loss, probes, **options)
    if estimator is not hutchinson_trace:
        assert {value.dtype for value in found.values()} == {torch.float32}
    assert float((flat(found) - exact).norm()) < tolerance * float(exact.norm())


@pytest.mark.cuda
@pytest.mark.parametrize("estimator", ALL)
def test_the_device_does_not_matter(estimator):
    model, x, y, loss = case("relu")
    here = flat(call(estimator, model, (x, y), loss, 5))
    there = flat(call(estimator, model.cuda(), (x, y), loss, 5)).cpu()
    assert torch.allclose(here, there, rtol=1e-6, atol=1e-8)


def test_a_loss_that_is_linear_in_the_weights_has_no_curvature():
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)

    def linear(logits, targets):
        return (logits * targets).mean()

    assert hutchinson_trace(model, (x, y), linear, 3) == {"weight": 0.0, "bias": 0.0}
    assert float(flat(tsuzuku2019_diagonal(model, (x, y), linear, 3)).abs().max()) < 1e-9


@pytest.mark.parametrize("estimator", ALL)
def test_missing_targets_are_named(estimator):
    model, x, y, loss = case("relu")
    bare = TensorDataset(x)
    for data, message in [
        (x, "data is a Tensor, without targets; .* pass the tuple \\(inputs, targets\\)"),
        ({"x": x}, "data is a dict, without targets"),
        ((x,), "data is a tuple of 1, without targets"),
        ((x, None), "data is a tuple of 2 whose targets are None, without targets"),
        ([(x, y), x], "batch 1 of data is a Tensor, without targets"),
        (DataLoader(bare, batch_size=3), "batch 0 of data is a list of 1, without targets"),
        (bare, "data is a Dataset"),
        ([], "data \\(list\\) holds no batch"),
        (3, "data is a int"),
        (("x", y), "a batch is a str"),
        ((x[:0], y[:0]), "batch 0 of data \\(Tensor\\) has no tensor with samples"),
        ([(x, y), (x * math.nan, y)], "batch 1 holds .* non-finite values"),
    ]:
        with pytest.raises(DataError, match=message):
            estimator(model, data, loss, 2)


@pytest.mark.parametrize("estimator", ALL)
def test_wrong_numbers_and_losses_are_refused(estimator):
    model, x, y, loss = case("relu")
    data = (x, y)
    for probes in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"probes must be an integer >= 1, got {probes}"):
            estimator(model, data, loss, probes)
    with pytest.raises(UnsupportedError, match="loss='hinge' has no name here; pass one of cross_entropy"):
        estimator(model, data, "hinge")
    with pytest.raises(ValueError, match="loss must be a name or a callable"):
        estimator(model, data, 3)
    with pytest.raises(ValueError, match="loss has reduction='sum'"):
        estimator(model, data, nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(ValueError, match="the loss must return one number, .* got shape \\(6,\\)"):
        estimator(model, data, lambda o, t: F.cross_entropy(o, t, reduction="none"))
    with pytest.raises(ValueError, match="got type float"):
        estimator(model, data, lambda o, t: 1.0)
    with pytest.raises(CurvatureError, match="the loss is not in autograd's graph"):
        estimator(model, data, lambda o, t: F.cross_entropy(o.detach(), t))
    with pytest.raises(CurvatureError, match="the estimated diagonal of 0.weight, .* is not finite"):
        estimator(model, data, lambda o, t: F.cross_entropy(o, t) * math.inf, 1)
    with pytest.raises(UnsupportedError, match="parameter 0.weight is torch.bfloat16"):
        estimator(relu_net().bfloat16(), (x.bfloat16(), y), loss)
    with pytest.raises(CurvatureError, match="has no parameter with requires_grad=True"):
        estimator(relu_net().requires_grad_(False), data, loss)


def test_wrong_options_are_refused():
    model, x, y, loss = case("relu")
    for bad in (0.0, -1.0, math.nan, math.inf):
        for estimator in DIFFERENCES:
            with pytest.raises(ValueError, match="radius must be > 0 and finite"):
                estimator(model, (x, y), loss, radius=bad)
        with pytest.raises(ValueError, match="floor must be > 0 and finite"):
            tsuzuku2020_diagonal(model, (x, y), loss, floor=bad)
    with pytest.raises(ValueError, match="step must be 'relative' or 'uniform', got 'absolute'"):
        tsuzuku2020_diagonal(model, (x, y), loss, step="absolute")
    for estimator in (hutchinson_diagonal, hutchinson_trace):
        with pytest.raises(ValueError, match="distribution must be 'rademacher' or 'gaussian', got 'uniform'"):
            estimator(model, (x, y), loss, distribution="uniform")
