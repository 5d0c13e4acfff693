"""The optimizers of the literature, step by step, beside twins that are written from the formulas, in float64.

A twin knows one flat vector of weights, the loss as a function of it, and SGD with momentum; nothing of the engine.
"""

import copy
import math

import pytest
import torch
from cases import BARHere, mlp, samples
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import ms_optim
import ms_optim.models
from ms_optim.optim.literature.bar import bar_factors, pairs_of
from ms_optim.optim.literature.weissi import weissi_penalty
from ms_optim.sharpness.universal import DETERMINANT, FROBENIUS, TRACE

LR, MOMENTUM, STEPS = 0.05, 0.9, 6


class Flat:
    """A network as a function of one vector."""

    def __init__(self, model):
        self.model = model
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def pieces(self, w):
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(self.shapes.items(), w.split(sizes), strict=True)
        }

    def loss(self, w, batch):
        x, y = batch
        return cross_entropy(functional_call(self.model, self.pieces(w), (x,)), y)

    def gradient(self, w, batch):
        w = w.detach().requires_grad_()
        loss = self.loss(w, batch)
        return float(loss.detach()), torch.autograd.grad(loss, w)[0]

    def normal(self, generator):
        """N(0, 1), drawn parameter by parameter as the optimizers do."""
        drawn = [torch.empty(s, dtype=torch.float64).normal_(generator=generator) for s in self.shapes.values()]
        return torch.cat([part.reshape(-1) for part in drawn])

    def uniform(self, generator):
        drawn = [torch.empty(s, dtype=torch.float64).uniform_(-1, 1, generator=generator) for s in self.shapes.values()]
        return torch.cat([part.reshape(-1) for part in drawn])

    def each(self, w, function):
        """A vector of one number for each entry, made of the parameter it belongs to."""
        return torch.cat([function(p).expand(p.shape).reshape(-1) for p in self.pieces(w.detach()).values()])


def filter_norm(p):
    return p.abs() if p.dim() < 2 else p.flatten(1).norm(dim=1).reshape(-1, *[1] * (p.dim() - 1))


def sam(flat, w, batch, rho, t=1.0):
    _, g = flat.gradient(w, batch)
    return flat.gradient(w + rho * t * t * g / (t * g).norm(), batch)[1]


def asam_filter(flat, w, batch, state, stream):
    return sam(flat, w, batch, 0.1, flat.each(w, filter_norm))


def asam_layer(flat, w, batch, state, stream):
    return sam(flat, w, batch, 0.1, flat.each(w, lambda p: p.norm()))


def sagm(flat, w, batch, state, stream):
    _, g = flat.gradient(w, batch)
    _, there = flat.gradient(w + (0.1 / g.norm() - 0.01) * g, batch)
    return (g + there) / 2


def stable(flat, w, batch, state, stream):
    _, g = flat.gradient(w, batch)
    there = sam(flat, w, batch, 0.1)
    return g.norm() / there.norm() * there


def stable_unnormalized(flat, w, batch, state, stream):
    _, g = flat.gradient(w, batch)
    _, there = flat.gradient(w + 0.1 * g, batch)
    return g.norm() / there.norm() * there


def gsam(flat, w, batch, state, stream):
    _, g = flat.gradient(w, batch)
    there = sam(flat, w, batch, 0.1)
    cosine = (g @ there) / (g.norm() * there.norm())
    return there - 0.4 * (g - cosine * g.norm() * there / there.norm())


def look(flat, w, batch, state, stream):
    step = state["step"] = state.get("step", -1) + 1
    _, g = flat.gradient(w, batch)
    if step % 3 == 0:
        there = sam(flat, w, batch, 0.1)
        cosine = (g @ there) / (g.norm() * there.norm())
        state["across"] = there - there.norm() * cosine * g / g.norm()
        return there
    return g + 0.7 * g.norm() / state["across"].norm() * state["across"]


def friendly(flat, w, batch, state, stream):
    _, g = flat.gradient(w, batch)
    d = g - state["m"] if "m" in state else g
    state["m"] = 0.9 * state["m"] + 0.1 * g if "m" in state else g
    return flat.gradient(w + 0.1 * d / d.norm(), batch)[1]


def rsam(order):
    def twin(flat, w, batch, state, stream):
        _, g = flat.gradient(w, batch)
        s1, sa = (g**2).sum() + 1e-16, (g.abs() ** (2 * order)).sum() + 1e-16
        c = (1.0 if order < 1 else -1.0) * 0.05 * sa / s1 ** (order + 1)
        return flat.gradient(w - c * g, batch)[1]

    return twin


def tilted(flat, w, batch, state, stream):
    losses, grads = [], []
    for _ in range(3):
        z = 0.01 * flat.normal(stream)
        _, g = flat.gradient(w + z, batch)
        loss, there = flat.gradient(w + z + 0.05 * g / g.norm(), batch)
        losses.append(loss)
        grads.append(there)
    weights = torch.softmax(5.0 * torch.tensor(losses, dtype=torch.float64), 0)
    return sum(weight * g for weight, g in zip(weights, grads, strict=True))


def trace(flat, w, batch, state, stream):
    return flat.gradient(w + 0.02 * flat.normal(stream), batch)[1]


def layer_noise(flat, w, batch, state, stream):
    deviation = flat.each(w, lambda p: 0.1 * p.norm() / math.sqrt(p.numel()))
    return flat.gradient(w + deviation * flat.normal(stream), batch)[1]


def filter_noise(flat, w, batch, state, stream):
    deviation = flat.each(w, lambda p: 0.1 * filter_norm(p) / math.sqrt(p.numel() / p.shape[0] if p.dim() > 1 else 1))
    return flat.gradient(w + deviation * flat.normal(stream), batch)[1]


def frobenius(flat, w, batch, state, stream):
    """For two samples the covariance is half the product of the differences."""
    _, g = flat.gradient(w, batch)
    (first, g1), (second, g2) = (flat.gradient(w + 0.05 * flat.normal(stream), batch) for _ in range(2))
    return g + 0.01 / (2 * 0.05**2) * (first - second) * (g1 - g2)


def determinant(flat, w, batch, state, stream):
    here, g = flat.gradient(w, batch)
    there, g1 = flat.gradient(w + 0.05 * flat.uniform(stream), batch)
    return g + 0.5 * math.exp(there - here) * (g1 - g)


def weissi(flat, w, batch, state, stream):
    w = w.detach().requires_grad_()
    penalty = 0.0
    for p in flat.pieces(w).values():
        if p.dim() > 1:
            penalty = penalty + 0.01 * p.norm().log() + 0.002 * (p / p.norm()).abs().sum()
    return torch.autograd.grad(flat.loss(w, batch) + penalty, w)[0]


TWINS = [
    pytest.param(ms_optim.ASAM, {"rho": 0.1, "operator": "filter"}, asam_filter, id="ASAM[filter]"),
    pytest.param(ms_optim.ASAM, {"rho": 0.1, "operator": "layer"}, asam_layer, id="ASAM[layer]"),
    pytest.param(ms_optim.SAGM, {"rho": 0.1, "alpha": 0.01}, sagm, id="SAGM"),
    pytest.param(ms_optim.StableSAM, {"rho": 0.1}, stable, id="StableSAM"),
    pytest.param(ms_optim.StableSAM, {"rho": 0.1, "normalized": False}, stable_unnormalized, id="StableSAM[plain]"),
    pytest.param(ms_optim.GSAM, {"rho": 0.1, "alpha": 0.4}, gsam, id="GSAM"),
    pytest.param(ms_optim.LookSAM, {"rho": 0.1, "k": 3, "alpha": 0.7}, look, id="LookSAM"),
    pytest.param(ms_optim.FriendlySAM, {"rho": 0.1, "sigma": 1.0, "decay": 0.9}, friendly, id="FriendlySAM"),
    pytest.param(ms_optim.RSAM, {"rho": 0.05, "order": 1.2}, rsam(1.2), id="RSAM[1.2]"),
    pytest.param(ms_optim.RSAM, {"rho": 0.05, "order": 0.5}, rsam(0.5), id="RSAM[0.5]"),
    pytest.param(ms_optim.TiltedSAM, {"rho": 0.05, "sigma": 0.01, "tilt": 5.0, "samples": 3}, tilted, id="TiltedSAM"),
    pytest.param(ms_optim.TraceSAM, {"rho": 0.02}, trace, id="TraceSAM"),
    pytest.param(ms_optim.RandomPerturbation, {"rho": 0.1}, layer_noise, id="RandomPerturbation[layer]"),
    pytest.param(
        ms_optim.RandomPerturbation, {"rho": 0.1, "scale": "filter"}, filter_noise, id="RandomPerturbation[filter]"
    ),
    pytest.param(ms_optim.FrobSAM, {"rho": 0.05, "strength": 0.01}, frobenius, id="FrobSAM"),
    pytest.param(ms_optim.DetSAM, {"rho": 0.05, "strength": 0.5}, determinant, id="DetSAM"),
    pytest.param(ms_optim.WEISSI, {"strength": 0.01, "sparsity": 0.002}, weissi, id="WEISSI"),
]


def network():
    torch.manual_seed(0)
    return mlp().double()


def doubled(count=STEPS, seed=0):
    return [(x.double(), y) for x, y in samples(mlp(), count, seed)]


def closure_of(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def trained(model, optimizer, batches):
    for x, y in batches:
        optimizer.step(closure_of(model, optimizer, x, y))
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize(("kind", "options", "twin"), TWINS)
def test_step_by_step_as_the_formula(kind, options, twin):
    model = network()
    flat = Flat(network())
    optimizer = kind(model, lr=LR, momentum=MOMENTUM, seed=3, **options)
    w, velocity, state, stream = flat.start.clone(), None, {}, torch.Generator().manual_seed(3)
    for batch in doubled():
        optimizer.step(closure_of(model, optimizer, *batch))
        direction = twin(flat, w, batch, state, stream)
        velocity = direction if velocity is None else MOMENTUM * velocity + direction
        w = w - LR * velocity
        ours = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        torch.testing.assert_close(ours, w, rtol=1e-11, atol=1e-12)


SAME = [
    pytest.param((ms_optim.GSAM, {"alpha": 0.0}), (ms_optim.SAM, {}), id="GSAM without the gap"),
    pytest.param((ms_optim.LookSAM, {"k": 1}), (ms_optim.SAM, {}), id="LookSAM in every step"),
    pytest.param((ms_optim.FriendlySAM, {"sigma": 0.0}), (ms_optim.SAM, {}), id="FriendlySAM without the average"),
    pytest.param(
        (ms_optim.TiltedSAM, {"sigma": 0.0, "samples": 1}), (ms_optim.SAM, {}), id="TiltedSAM at one point"
    ),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_what_it_is_in_a_limit(one, other):
    found = []
    for kind, options in (one, other):
        model = network()
        optimizer = kind(model, rho=0.1, lr=LR, momentum=MOMENTUM, **options)
        found.append(trained(model, optimizer, doubled()))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


UNIVERSAL = [
    pytest.param(TRACE, 1, ms_optim.TraceSAM, {}, 1.0, id="trace"),
    pytest.param(FROBENIUS, 3, ms_optim.FrobSAM, {"strength": 0.01, "samples": 3}, 0.01, id="frobenius"),
]


@pytest.mark.parametrize(("member", "count", "kind", "options", "strength"), UNIVERSAL)
def test_a_member_of_the_class_is_its_own_class(member, count, kind, options, strength):
    model, other = network(), network()
    general = ms_optim.UniversalSAM(
        model, member=member, rho=0.02, strength=strength, samples=count, lr=LR, momentum=MOMENTUM
    )
    own = kind(other, rho=0.02, lr=LR, momentum=MOMENTUM, **options)
    torch.testing.assert_close(
        trained(model, general, doubled()), trained(other, own, doubled()), rtol=1e-10, atol=1e-12
    )


def test_slopes_are_the_derivative_and_the_determinants_are_its_own():
    t = [0.3, -0.2, 0.9]
    for member in (TRACE, FROBENIUS, DETERMINANT):
        for i, slope in enumerate(member.slopes(t)):
            ahead, behind = ([v + h * (i == j) for j, v in enumerate(t)] for h in (1e-6, -1e-6))
            assert slope == pytest.approx((member.value(ahead) - member.value(behind)) / 2e-6, rel=1e-7)
    assert DETERMINANT.slopes([0.7]) == pytest.approx([math.exp(0.7)])
    mean = sum(t) / 3
    assert FROBENIUS.value(t) == pytest.approx(0.5 * sum((v - mean) ** 2 for v in t) / 2)


def test_the_covariance_goes_against_the_frobenius_norm():
    """E (λ/ρ²) Cov(L_i, g_i) → the gradient of (λ/2) ‖g‖² + (λ ρ²/4) ‖H‖_F², on a quartic of two variables."""
    w = nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))

    def loss_of(v):
        return v[0] ** 4 + v[0] ** 2 * v[1] ** 2 + 0.5 * v[1] ** 2

    def objective(v):
        hessian = torch.autograd.functional.hessian(loss_of, v, create_graph=True)
        (g,) = torch.autograd.grad(loss_of(v), v, create_graph=True)
        return 0.5 * (g @ g) + rho**2 / 4 * hessian.square().sum()

    rho = 0.02
    optimizer = ms_optim.FrobSAM([w], rho=rho, strength=1.0, samples=20_000, lr=0.0, momentum=0.0, model=None)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(w)
        loss.backward()
        return loss

    optimizer.step(closure)
    v = w.detach().requires_grad_()
    plain = torch.autograd.grad(loss_of(v), v)[0]
    expected = torch.autograd.grad(objective(v), v)[0]
    torch.testing.assert_close(w.grad - plain, expected, rtol=0.05, atol=0.01)


def test_the_penalty_is_the_one_of_the_formula():
    weights = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)]
    value = weissi_penalty(weights, 0.3, 0.2).detach()
    matrix = weights[0].detach()
    expected = 0.3 * matrix.norm().log() + 0.2 * (matrix / matrix.norm()).abs().sum()
    assert float(value) == pytest.approx(float(expected))


def test_the_penalty_of_the_product_of_norms_does_not_see_a_rescaling():
    model, x = network(), doubled(1)[0][0]
    group = ms_optim.scale_symmetries(model, x)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    before = float(weissi_penalty(matrices, 1.0, 1.0).detach())
    t = torch.randn(len(group.generators), dtype=torch.float64)
    group.rescale_(model, t)
    scale = group.log_scale(t)
    total = sum(scale[name] for name, p in model.named_parameters() if p.dim() > 1)
    assert float(weissi_penalty(matrices, 1.0, 1.0).detach()) == pytest.approx(before + total, rel=1e-10)


@pytest.mark.parametrize("kind", ["n", "o"])
def test_bar_multiplies_its_pairs_before_the_step(kind):
    model, other = network(), network()
    pair = (model[0].weight, model[2].weight)
    optimizer = ms_optim.BAR(model, strength=0.5, pairs=[pair], kind=kind, lr=LR, momentum=MOMENTUM)
    plain = torch.optim.SGD(other.parameters(), lr=LR, momentum=MOMENTUM)
    for x, y in doubled():
        plain.zero_grad()
        cross_entropy(other(x), y).backward()
        x_weight, y_weight = other[0].weight, other[2].weight
        sizes = [p.grad.norm() if kind == "n" else p.norm() for p in (x_weight, y_weight)]
        larger = sizes[0] >= sizes[1]
        up = larger if kind == "n" else not larger
        with torch.no_grad():
            x_weight.mul_(1 + LR * 0.5 if up else 1 - LR * 0.5)
            y_weight.mul_(1 - LR * 0.5 if up else 1 + LR * 0.5)
        plain.step()
        optimizer.step(closure_of(model, optimizer, x, y))
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_bar_takes_the_pairs_of_a_scale_group():
    model = network()
    group = ms_optim.scale_symmetries(model, doubled(1)[0][0])
    pairs = pairs_of(group, model)
    assert len(pairs) == 2
    optimizer = ms_optim.BAR(model, pairs=pairs, lr=LR)
    trained(model, optimizer, doubled(2))
    assert bar_factors(2.0, 1.0, 0.1, "n") == (1.1, 0.9) and bar_factors(2.0, 1.0, 0.1, "o") == (0.9, 1.1)


def test_bar_needs_pairs_of_its_own():
    with pytest.raises(ms_optim.errors.OptimizerError, match="no pairs"):
        ms_optim.BAR(network(), lr=LR)
    with pytest.raises(ms_optim.errors.OptimizerError, match="not parameters of this optimizer"):
        ms_optim.BAR(network(), pairs=[(torch.zeros(2), torch.zeros(2))], lr=LR)


def test_bar_leaves_a_pair_with_a_frozen_factor_alone():
    model = network()
    model[2].weight.requires_grad_(False)
    before = [p.detach().clone() for p in (model[0].weight, model[2].weight)]
    optimizer = ms_optim.BAR(model, strength=1.0, pairs=[(model[0].weight, model[2].weight)], lr=1e-30)
    trained(model, optimizer, doubled(3))
    assert torch.equal(before[0], model[0].weight) and torch.equal(before[1], model[2].weight)
    with pytest.raises(ms_optim.errors.OptimizerError, match="both sides"):
        ms_optim.BAR(model, pairs=[(model[0].weight, model[0].weight)], lr=LR)


def test_bar_puts_its_factors_back_where_the_second_cannot_be_multiplied(monkeypatch):
    model = network()
    optimizer = ms_optim.BAR(model, strength=0.5, pairs=[(model[0].weight, model[2].weight)], lr=LR)
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError("planted")
        return bar_factors(*arguments)

    monkeypatch.setattr("ms_optim.optim.literature.bar.bar_factors", failing)
    with pytest.raises(MemoryError, match="planted"):
        trained(model, optimizer, doubled(1))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def counted(model, optimizer, batches):
    counts = []
    for x, y in batches:
        counts.append(0)
        for gradient_pass in optimizer.passes():
            with gradient_pass:
                cross_entropy(model(x), y).backward()
            counts[-1] += 1
        optimizer.step()
    return counts


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"k": 3}, [2, 1, 1, 2, 1, 1, 2, 1, 1]),
        ({"k": 2, "every": 2}, [2, 1, 1, 1, 2, 1, 1, 1, 2]),
        ({"k": 2, "every": 2, "start": 1}, [1, 2, 1, 1, 1, 2, 1, 1, 1]),
    ],
)
def test_look_sam_counts_its_own_steps(options, expected):
    model = network()
    assert counted(model, ms_optim.LookSAM(model, rho=0.1, lr=LR, **options), doubled(9)) == expected


class Normalized(nn.Module):
    """A normaliser of torch's, one that is none of torch's, and a name that lies."""

    def __init__(self):
        super().__init__()
        self.batchnorm_like_name = nn.Linear(6, 8)
        self.first = nn.LayerNorm(8)
        self.second = Rms(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.second(torch.relu(self.first(self.batchnorm_like_name(x)))))


class Rms(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), 1e-6

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize("operator", ["sam", "elementwise"])
def test_sam_on_perturbs_normalisers_by_what_they_are(operator):
    torch.manual_seed(0)
    model = Normalized().double()
    optimizer = ms_optim.SAMON(model, rho=0.5, operator=operator, lr=LR)
    (x, y), *_ = doubled(1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    passes = optimizer.passes()
    with next(passes):
        cross_entropy(model(x), y).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    moved = {}
    with next(passes):
        moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
        cross_entropy(model(x), y).backward()
    norms = ("first.weight", "first.bias", "second.weight")
    scale = {n: before[n].abs() if operator == "elementwise" else torch.ones_like(before[n]) for n in norms}
    length = torch.cat([(scale[n] * grads[n]).reshape(-1) for n in norms]).norm()
    for name, step in moved.items():
        expected = 0.5 * scale[name] ** 2 * grads[name] / length if name in norms else torch.zeros_like(step)
        torch.testing.assert_close(step, expected, rtol=1e-10, atol=1e-13)


def test_sam_on_needs_a_normaliser():
    model = network()
    optimizer = ms_optim.SAMON(model, lr=LR)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ms_optim.errors.OptimizerError, match="no normalisation layer"):
        optimizer.step(closure_of(model, optimizer, *doubled(1)[0]))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", [ms_optim.TiltedSAM, ms_optim.FrobSAM, ms_optim.DetSAM])
def test_a_loss_that_is_needed_and_not_said_is_asked_for(kind):
    model = network()
    optimizer = kind(model, lr=LR)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = doubled(1)[0]
    with pytest.raises(ms_optim.errors.OptimizerError, match=r"gradient_pass\.loss = loss\.detach"):
        for gradient_pass in optimizer.passes():
            with gradient_pass:
                cross_entropy(model(x), y).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "kind", [ms_optim.SAGM, ms_optim.StableSAM, ms_optim.GSAM, ms_optim.LookSAM, ms_optim.TiltedSAM, ms_optim.FrobSAM]
)
def test_what_combines_passes_is_not_attached(kind):
    model = network()
    with pytest.raises(ms_optim.errors.UnsupportedError, match="combination of the gradients"):
        kind(model, lr=LR).attach(model)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ms_optim.RSAM, {"order": 1.0}),
        (ms_optim.RSAM, {"order": -1.0}),
        (ms_optim.LookSAM, {"k": 0}),
        (ms_optim.FrobSAM, {"samples": 1}),
        (ms_optim.TiltedSAM, {"samples": 0}),
        (ms_optim.TiltedSAM, {"tilt": -1.0}),
        (ms_optim.FriendlySAM, {"decay": 1.0}),
        (ms_optim.SAGM, {"alpha": -1.0}),
        (ms_optim.ASAM, {"operator": "channel"}),
        (ms_optim.RandomPerturbation, {"scale": "entry"}),
        (ms_optim.SAMON, {"operator": "bn"}),
    ],
)
def test_numbers_out_of_range_are_refused(kind, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        kind(network(), lr=LR, **options)


def test_what_look_sam_keeps_is_saved():
    """Resumed between two of its steps with two passes, it goes on bit for bit."""
    batches = doubled(6)
    model = network()
    optimizer = ms_optim.LookSAM(model, rho=0.1, k=4, lr=LR, momentum=MOMENTUM)
    trained(model, optimizer, batches[:2])
    saved = {k: v.clone() for k, v in model.state_dict().items()}, copy.deepcopy(optimizer.state_dict())
    expected = trained(model, optimizer, batches[2:])
    other = network()
    other.load_state_dict(saved[0])
    resumed = ms_optim.LookSAM(other, rho=0.1, k=4, lr=LR, momentum=MOMENTUM)
    resumed.load_state_dict(saved[1])
    assert torch.equal(trained(other, resumed, batches[2:]), expected)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ms_optim.RSAM, {}),
        (ms_optim.SAGM, {}),
        (ms_optim.StableSAM, {}),
        (ms_optim.GSAM, {}),
        (ms_optim.LookSAM, {"k": 2}),
        (ms_optim.FriendlySAM, {}),
        (ms_optim.TiltedSAM, {}),
        (ms_optim.TraceSAM, {}),
        (ms_optim.FrobSAM, {}),
    ],
)
def test_at_the_representative_equivalent_starts_stay_equivalent(kind, options):
    """rebalance="move" makes every one of them independent of how the network is scaled."""
    x, _ = doubled(1)[0]
    functions = []
    for start in (0.0, 1.0):
        model = network()
        group = ms_optim.scale_symmetries(model, x)
        group.rescale_(model, start * torch.tensor([0.8, -1.1], dtype=torch.float64))
        optimizer = kind(
            model, rebalance="move", group=group, columns=None, refresh_every=2, lr=LR, momentum=MOMENTUM, **options
        )
        trained(model, optimizer, doubled())
        functions.append(model(x).detach())
    torch.testing.assert_close(*functions, rtol=1e-8, atol=1e-9)


EVERYBODY = [
    pytest.param(kind, options, id=name)
    for name, kind, options in [
        ("ASAM[filter]", ms_optim.ASAM, {"rho": 0.05, "operator": "filter"}),
        ("ASAM[layer]", ms_optim.ASAM, {"rho": 0.05, "operator": "layer"}),
        ("SAGM", ms_optim.SAGM, {}),
        ("StableSAM", ms_optim.StableSAM, {}),
        ("GSAM", ms_optim.GSAM, {}),
        ("LookSAM", ms_optim.LookSAM, {"k": 2}),
        ("FriendlySAM", ms_optim.FriendlySAM, {}),
        ("TiltedSAM", ms_optim.TiltedSAM, {"samples": 2}),
        ("RSAM", ms_optim.RSAM, {"rho": 0.05}),
        ("TraceSAM", ms_optim.TraceSAM, {}),
        ("RandomPerturbation[layer]", ms_optim.RandomPerturbation, {}),
        ("RandomPerturbation[filter]", ms_optim.RandomPerturbation, {"scale": "filter"}),
        ("FrobSAM", ms_optim.FrobSAM, {}),
        ("DetSAM", ms_optim.DetSAM, {"strength": 0.1}),
        ("UniversalSAM", ms_optim.UniversalSAM, {"member": FROBENIUS}),
        ("WEISSI", ms_optim.WEISSI, {}),
        ("SAMON", ms_optim.SAMON, {}),
        ("BAR", BARHere, {"strength": 0.1}),
        ("MSSAM[neuron]", ms_optim.MSSAM, {"granularity": "neuron"}),
        ("MSRegularizedSGD[neuron]", ms_optim.MSRegularizedSGD, {"granularity": "neuron"}),
    ]
]
NETWORKS = {
    "mlp": lambda: ms_optim.models.MLP([64, 32, 10]),
    "lenet": ms_optim.models.lenet,
    "resnet": ms_optim.models.small_resnet,
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("kind", "options"), EVERYBODY)
def test_every_one_of_them_learns_a_batch(network, kind, options):
    """An MLP, LeNet and a ResNet with BatchNorm; in a few steps the loss on one batch falls."""
    if kind is ms_optim.SAMON and network != "resnet":
        pytest.skip("there is no normaliser")
    torch.manual_seed(0)
    model = NETWORKS[network]()
    shape = {"mlp": (64,), "lenet": (1, 28, 28), "resnet": (1, 8, 8)}[network]
    x, y = torch.randn(8, *shape), torch.arange(8) % 10
    optimizer = kind(model, lr=0.05, momentum=0.9, **options)
    losses = [float(optimizer.step(closure_of(model, optimizer, x, y)).detach()) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.02
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.filterwarnings("ignore:no module that owns all the parameters")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ms_optim.TiltedSAM, {"rho": 0.1, "sigma": 0.1}),
        (ms_optim.MSRegularizedSGD, {"gradient": "antithetic", "rebalance": None, "strength": 1e-3}),
    ],
    ids=["TiltedSAM", "MSReg[antithetic]"],
)
def test_noise_that_several_passes_share_is_drawn_for_a_loss_of_no_module_from_the_second_step_on(kind, options):
    torch.manual_seed(0)
    weight, x = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5)
    optimizer = kind([weight], lr=0.01, momentum=0.0, **options)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(weight.detach().clone())
        loss = (x @ weight.T).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    second = seen[len(seen) // 2 :]
    assert not any(torch.equal(point, second[0]) for point in second[1:])
    assert closure().item() < (x @ seen[0].T).square().sum().item()
