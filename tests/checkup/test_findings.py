"""Every rule finds what is wrong in a loop that is wrong, and nothing in its healthy twin."""

import gc

import pytest
import torch
from cases import CASES, convnet, mlp, samples
from checkup.loops import LOOPS, NOTES, Loop, ours, plain, positional, scaled, single, two_step
from checkup.optimizers import TwoStepSAM
from torch import nn
from torch.nn.functional import cross_entropy

import ms_optim
from ms_optim.checkup import Diagnosis, doctor
from ms_optim.checkup.examination import RULES
from ms_optim.errors import OptimizerError, UnsupportedError

PAIRS = [(rule, index) for rule, loops in LOOPS.items() for index in range(len(loops))]
OF_RANKS = {"no_sync_too_late", "ranks_start_apart", "gradients_apart", "perturbations_apart"}


def names(findings):
    return {finding.name for finding in findings}


def test_every_rule_has_a_loop_that_breaks_it():
    assert set(LOOPS) | OF_RANKS == set(RULES)
    assert set(PAIRS) >= NOTES


@pytest.mark.parametrize(("rule", "index"), PAIRS)
def test_a_sick_loop_is_found_out(rule, index):
    diagnosis = LOOPS[rule][index][0]().examined()
    found = diagnosis.notes if (rule, index) in NOTES else diagnosis.problems
    assert rule in names(found), str(diagnosis)
    assert bool(diagnosis) is diagnosis.healthy is (not diagnosis.problems)
    for finding in diagnosis.findings:
        assert finding.what and finding.next_move and finding.name in str(diagnosis)


@pytest.mark.parametrize(("rule", "index"), PAIRS)
def test_its_healthy_twin_is_not(rule, index):
    diagnosis = LOOPS[rule][index][1]().examined()
    assert rule not in names(diagnosis.findings), str(diagnosis)


def by_closure(optimizer, model, x, y):
    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)


def by_passes(optimizer, model, x, y):
    def step():
        for gradient_pass in optimizer.passes():
            with gradient_pass:
                cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("drive", [by_closure, by_passes])
@pytest.mark.parametrize("network", [mlp, convnet])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_our_optimizers_have_no_problem_before_and_after_the_first_step(case, network, drive):
    model = network()
    optimizer = case.build(model)
    step = drive(optimizer, model, *samples(model, 1)[0])
    for _ in range(2):
        diagnosis = doctor(model, optimizer, step)
        assert diagnosis.healthy, str(diagnosis)
        step()
    first = diagnosis.passes[0]
    assert len(diagnosis.passes) == case.passes
    if case.passes == 2 and case.kind is not ms_optim.MSRegularizedSGD:
        assert first.perturbation == 0.0
        assert diagnosis.loss_gap > 0
        assert -1 <= diagnosis.cosine <= 1


# All but the antithetic noise, whose two passes are no matter of one loss.
LOOSE = [case for case in CASES if case.passes == 1 or case.kind is not ms_optim.MSRegularizedSGD]


class WithLoss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return cross_entropy(self.model(x), y)


@pytest.mark.parametrize("outer", [True, False], ids=["the module with the loss", "the model inside"])
@pytest.mark.parametrize("case", LOOSE, ids=str)
def test_unmodified_loops_have_no_problem(case, outer):
    module = WithLoss(mlp())
    optimizer = case.build(module.model)
    optimizer.attach(module)
    x, y = samples(module.model, 1)[0]

    def step():
        optimizer.zero_grad()
        module(x, y).backward()
        optimizer.step()

    for _ in range(2):
        diagnosis = doctor(module if outer else module.model, optimizer, step)
        assert diagnosis.healthy, str(diagnosis)
        assert len(diagnosis.passes) == case.passes
        step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_torchs_optimizers_have_nothing_to_be_told(kind):
    for _ in range(2):
        assert single(kind=kind, network=convnet, lr=0.1).examined().findings == ()


def test_a_model_that_is_found_in_the_step_is_no_problem():
    model = mlp()
    optimizer = ms_optim.MSSAM(model.parameters(), lr=0.1)
    diagnosis = doctor(model, optimizer, by_closure(optimizer, model, *samples(model, 1)[0]))
    assert diagnosis.healthy
    assert optimizer.model is None and optimizer.looks_for_its_model and optimizer.group is None


def test_a_scaler_as_documented_is_no_problem():
    def documented(optimizer, scaler, closure, model):
        for gradient_pass in optimizer.passes(scaler=scaler):
            with gradient_pass:
                closure()
        scaler.step(optimizer)

    diagnosis = scaled(documented, kind=lambda p, **o: ms_optim.SAM(p, rho=0.1, **o)).examined()
    assert diagnosis.findings == ()
    assert [seen.perturbation for seen in diagnosis.passes] == [0.0, pytest.approx(0.1, rel=1e-5)]
    assert 0 < diagnosis.passes[0].loss < 3  # and not a thousand times that


def test_autocast_around_a_step_of_ours_is_no_problem():
    model = mlp().float()
    optimizer = ms_optim.SAM(model, rho=0.5, lr=0.1)
    x, y = samples(model, 1)[0]
    step = by_closure(optimizer, lambda x: model(x.float()).float(), x, y)

    def around():
        with torch.autocast("cpu", torch.bfloat16):
            step()

    assert doctor(model, optimizer, around).healthy


def test_micro_batches_with_perturbations_of_their_own_are_no_problem():
    model = convnet()
    optimizer = ms_optim.SAM(model, rho=0.1, lr=0.1, m=4)
    x, y = samples(model, 1)[0]

    def closure(part):
        optimizer.zero_grad()
        loss = cross_entropy(model(x[part]), y[part])
        loss.backward()
        return loss

    diagnosis = doctor(model, optimizer, lambda: optimizer.step(closure, samples=len(x)))
    assert diagnosis.healthy, str(diagnosis)
    assert [seen.perturbation > 0 for seen in diagnosis.passes] == [False, True, False, True]


def test_accumulation_is_one_pass():
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = samples(model, 1)[0]

    def step():
        optimizer.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):
            (cross_entropy(model(x[part]), y[part]) / 2).backward()
        optimizer.step()

    diagnosis = doctor(model, optimizer, step)
    assert diagnosis.findings == ()
    assert [seen.forwards for seen in diagnosis.passes] == [2]


def test_a_compiled_model_is_watched_from_outside():
    gc.collect()  # torch warns of hooks on all modules, as optimizers have that have not found their model yet
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    optimizer = TwoStepSAM(model.parameters(), lr=0.1)
    x, y = samples(model, 1)[0]
    step = by_closure(optimizer, compiled, x, y)
    diagnosis = doctor(compiled, optimizer, step)
    assert diagnosis.healthy
    assert [round(seen.perturbation, 10) for seen in diagnosis.passes] == [0.0, 0.05]


def test_the_numbers_are_those_of_the_step():
    loop = two_step(rho=0.125, dtype=torch.float64)
    diagnosis = loop.examined()
    model = loop.model
    x, y = samples(model, 1)[0]
    clean = cross_entropy(model(x), y)
    first = torch.autograd.grad(clean, list(model.parameters()))
    norm = torch.cat([g.flatten() for g in first]).norm()
    with torch.no_grad():
        for p, g in zip(model.parameters(), first, strict=True):
            p.add_(0.125 * g / norm)
    raised = cross_entropy(model(x), y)
    second = torch.autograd.grad(raised, list(model.parameters()))
    cosine = nn.functional.cosine_similarity(*(torch.cat([g.flatten() for g in gs]) for gs in (first, second)), dim=0)
    assert [seen.perturbation for seen in diagnosis.passes] == [0.0, pytest.approx(0.125)]
    assert diagnosis.passes[0].loss == pytest.approx(clean.item(), rel=1e-6)  # the loop's losses are float32
    assert diagnosis.loss_gap == pytest.approx((raised - clean).item(), rel=1e-4)
    assert diagnosis.cosine == pytest.approx(cosine.item(), rel=1e-6)


def test_what_is_measured_is_reported():
    loop = scaled(positional, scale=256.0)
    (finding,) = loop.examined().problems
    assert finding.measured["scale"] == 256.0
    x, y = samples(loop.model, 1)[0]
    grads = torch.autograd.grad(cross_entropy(loop.model(x.float()), y), list(loop.model.parameters()))
    norm = torch.cat([g.flatten() for g in grads]).norm().item()
    assert finding.measured["norm"] == pytest.approx(256 * norm, rel=1e-5)


def test_non_finite_gradients_are_named():
    model = mlp()
    model[4].bias.register_hook(lambda grad: grad * float("nan"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diagnosis = doctor(model, optimizer, by_closure(optimizer, model, *samples(model, 1)[0]))
    assert {"4.bias"} == {finding.where.rpartition(" ")[2] for finding in diagnosis.problems}


def test_the_report_can_be_read():
    report = str(two_step(convnet, autocast="step").examined())
    assert "pass 1: at W, loss" in report and "‖ε‖ = 0.05" in report and "→ restore the model's buffers" in report
    assert report.splitlines()[-1] == "  2 problems"
    assert str(ours().examined()).splitlines()[-1] == "  healthy"
    assert max(map(len, report.splitlines())) <= 100


def test_the_error_of_a_step_is_kept():
    diagnosis = LOOPS["step_raised"][0][0]().examined()
    assert isinstance(diagnosis.error, RuntimeError) and str(diagnosis.error) == "planted"


class Wrapped(torch.optim.Optimizer):
    """What frameworks put around an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_an_optimizer_of_ours_is_seen_inside_that_of_a_framework():
    model = mlp()
    optimizer = Wrapped(ms_optim.SAM(model, rho=0.0, lr=0.1, start=3))
    diagnosis = doctor(model, optimizer, by_closure(optimizer.optimizer, model, *samples(model, 1)[0]))
    assert diagnosis.healthy and names(diagnosis.notes) == {"zero_radius", "window_closed"}


def test_misuse_is_refused():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(OptimizerError, match="step is a Tensor"):
        doctor(model, optimizer, torch.zeros(()))
    with pytest.raises(OptimizerError, match="optimizer is a list"):
        doctor(model, list(model.parameters()), lambda: None)
    with pytest.raises(OptimizerError, match="model is a function"):
        doctor(mlp, optimizer, lambda: None)
    with pytest.raises(OptimizerError, match="model is None"):
        doctor(None, optimizer, lambda: None)
    with pytest.raises(OptimizerError, match="none of the 6 parameters of SGD is one of Sequential's"):
        doctor(mlp(), optimizer, lambda: None)
    with pytest.raises(UnsupportedError, match="DataParallel"):
        doctor(nn.DataParallel(model), optimizer, lambda: None)


def test_it_is_refused_in_the_middle_of_a_step():
    model = mlp()
    optimizer = ms_optim.SAM(model, rho=0.1, lr=0.1)
    x, y = samples(model, 1)[0]
    for gradient_pass in optimizer.passes():
        with gradient_pass:
            cross_entropy(model(x), y).backward()
            with pytest.raises(OptimizerError, match="middle of a step"):
                doctor(model, optimizer, lambda: None)
    with pytest.raises(OptimizerError, match="middle of a step"):
        doctor(model, optimizer, lambda: None)
    optimizer.step()
    assert isinstance(doctor(model, optimizer, lambda: None), Diagnosis)


def test_a_keyboard_interrupt_is_not_swallowed():
    loop = ours()

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Loop(loop.model, loop.optimizer, interrupted).examined()
    assert isinstance(plain(loop.model), nn.Sequential) and loop.examined().healthy
