"""Accelerate's loop, in each way in which an optimizer can be driven, and the plain loop that it has to equal.

Accelerate makes no GradScaler on the CPU (``mixed_precision="fp16"`` is full precision there, without a word), so its
code for float16 runs here with a scaler that is given to it, and as a user has it where there is a CUDA device.
"""

import runpy

import accelerate
import pytest
import torch
from cases import everything, same
from integrations.plain import (
    ALL,
    EXAMPLES,
    STEPS,
    TWO_PASSES,
    Plain,
    WithLoss,
    build,
    group,
    left,
    loader,
    network,
)
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

import ms_optim
from ms_optim.errors import OptimizerError

every = pytest.mark.parametrize("name", ALL)
two_passes = pytest.mark.parametrize("name", TWO_PASSES)
SCALE = 2.0**22  # overflows in the first steps: they are skipped


def reset():
    """Accelerate keeps what the process does, its precision included."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.fixture(autouse=True)
def alone():
    torch.set_default_dtype(torch.float32)
    yield
    reset()


def precision(kind):
    """An accelerator and what a plain loop does, for one kind of precision."""
    if kind == "fp16":
        accelerator = accelerate.Accelerator(mixed_precision="fp16", cpu=True)
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=SCALE)
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        return accelerator, {"autocast": torch.float16, "inside": True, "scaler": scaler}
    plain = {"autocast": torch.bfloat16, "inside": True} if kind == "bf16" else {}
    return accelerate.Accelerator(mixed_precision=kind, cpu=True), plain


class Run:
    """A training loop as Accelerate's documentation has it."""

    def __init__(self, accelerator, name, how="loop", schedule=None):
        self.accelerator, self.how = accelerator, how
        module = WithLoss(network())
        self.network = module.network
        self.optimizer = build(name, self.network)
        if how == "attach":
            self.optimizer.attach(module)
        given = [module, self.optimizer, *([] if schedule is None else [schedule(self.optimizer)])]
        self.module, self.prepared, *schedulers = accelerator.prepare(*given)
        self.scheduler = schedulers[0] if schedulers else None
        self.skipped = 0

    def run(self, steps=STEPS, clip=None, start=0):
        accelerator, prepared = self.accelerator, self.prepared
        count = (start + steps) * accelerator.gradient_accumulation_steps
        batches = accelerator.prepare(loader(count))
        if start:
            batches = accelerator.skip_first_batches(batches, start)
        for batch in batches:
            if self.how == "closure":

                def closure(batch=batch):
                    prepared.zero_grad()
                    loss = self.module(*batch)
                    accelerator.backward(loss)
                    return loss

                prepared.step(closure)
            elif self.how == "passes":
                for gradient_pass in self.optimizer.passes(scaler=accelerator.scaler):
                    with gradient_pass:
                        accelerator.backward(self.module(*batch))
                prepared.step()
            else:
                with accelerator.accumulate(self.module):
                    accelerator.backward(self.module(*batch))
                    if clip is not None and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(self.module.parameters(), clip)
                    prepared.step()
                    if self.scheduler is not None:
                        self.scheduler.step()
                    prepared.zero_grad()
            self.skipped += prepared.step_was_skipped
        return self

    @property
    def left(self):
        return left(self.network, self.optimizer)


@every
@pytest.mark.parametrize("kind", ["no", "bf16"])
@pytest.mark.parametrize("how", ["closure", "passes", "loop"])
def test_every_loop_gives_the_bits_of_a_plain_one(name, kind, how):
    how = "attach" if how == "loop" and name in TWO_PASSES else how
    accelerator, plain = precision(kind)
    assert same(Run(accelerator, name, how).run().left, Plain(name, **plain).run().left)


@every
@pytest.mark.parametrize("how", ["passes", "loop"])
def test_float16_with_its_scaler_gives_the_bits_of_a_plain_loop(name, how):
    how = "attach" if how == "loop" and name in TWO_PASSES else how
    accelerator, plain = precision("fp16")
    run = Run(accelerator, name, how).run()
    expected = Plain(name, how, **plain).run()
    assert same(run.left, expected.left)
    assert run.skipped > 0 and accelerator.scaler.get_scale() == expected.scaler.get_scale() < SCALE


def test_the_first_refresh_of_a_prepared_network_reaches_the_representative():
    (x, _), *_ = loader(1)
    totals = []
    for kind in ("no", "bf16"):
        accelerator, _ = precision(kind)
        model = accelerator.prepare(network())
        ms_optim.MSSAM(model, torch.optim.SGD, lr=0.1, columns=None, group=group()).refresh(x)
        plain = network()
        plain.load_state_dict(model.state_dict())
        totals.append(ms_optim.hessian_trace(plain, x).total)
        reset()
    assert totals[1] == pytest.approx(totals[0], rel=1e-3)


@two_passes
def test_a_small_gradient_of_the_first_pass_is_not_lost_in_float16(name):
    module = WithLoss(network(), factor=1e-8)  # without a scale all gradients are zero
    accelerator, _ = precision("fp16")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    # At the representative itself ρ is a Euclidean length.
    optimizer = build(name, module.network, diagnose=True, **({"rebalance": "move"} if name == "MSSAM" else {}))
    optimizer.attach(module)
    module, prepared = accelerator.prepare(module, optimizer)
    for batch in loader(1):
        accelerator.backward(module(*batch))
        prepared.step()
    assert optimizer.diagnostics.norm == pytest.approx(0.1, rel=1e-5)


@every
def test_a_closure_in_float16_is_refused_and_changes_nothing(name):
    accelerator, _ = precision("fp16")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    run = Run(accelerator, name, "passes").run()
    before = everything(run.network, run.optimizer)
    for gradient_pass in run.optimizer.passes(scaler=accelerator.scaler):
        with gradient_pass:
            accelerator.backward(run.module(*next(iter(loader()))))
    passed = everything(run.network, run.optimizer)
    with pytest.raises(OptimizerError, match="a closure was passed through GradScaler.step"):
        run.prepared.step(lambda: None)
    assert same(passed, everything(run.network, run.optimizer))
    run.prepared.step()
    assert not same(before, everything(run.network, run.optimizer))


@two_passes
def test_an_unmodified_loop_without_attach_is_refused(name):
    with pytest.raises(OptimizerError, match=r"or optimizer.attach\(module\) once"):
        Run(precision("no")[0], name).run()


@every
@pytest.mark.parametrize("kind", ["no", "bf16", "fp16"])
def test_clipping_acts_on_the_last_gradient_alone(name, kind):
    how = "attach" if name in TWO_PASSES else "loop"
    accelerator, plain = precision(kind)
    run = Run(accelerator, name, how).run(clip=0.1)
    expected = Plain(name, how, clip=lambda ps: clip_grad_norm_(ps, 0.1), **plain).run()
    assert same(run.left, expected.left)


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=2 * STEPS)


@every
def test_batches_that_share_a_step_and_a_schedule_of_the_rate(name):
    how = "attach" if name in TWO_PASSES else "loop"
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    run = Run(accelerator, name, how, one_cycle).run()
    assert same(run.left, Plain(name, how, parts=2, schedule=one_cycle).run().left)


@every
@pytest.mark.parametrize("kind", ["no", "fp16"])
def test_a_run_goes_on_from_a_checkpoint(name, kind, tmp_path):
    how = "attach" if name in TWO_PASSES else "loop"

    def start():
        return Run(precision(kind)[0], name, how, one_cycle)

    whole = start().run(2 * STEPS)
    start().run(STEPS).accelerator.save_state(tmp_path)
    resumed = start()
    resumed.accelerator.load_state(tmp_path)
    assert same(resumed.run(STEPS, start=STEPS).left, whole.left)


@pytest.mark.parametrize("kind", ["no", "bf16"])
def test_the_example(kind):
    assert runpy.run_path(str(EXAMPLES / "with_accelerate.py"))["main"](epochs=3, precision=kind) > 0.9


@pytest.mark.cuda
@every
@pytest.mark.parametrize("how", ["passes", "loop"])
def test_float16_as_it_is_on_a_gpu(name, how):
    how = "attach" if how == "loop" and name in TWO_PASSES else how
    accelerator = accelerate.Accelerator(mixed_precision="fp16")
    run = Run(accelerator, name, how).run(2 * STEPS)
    x, y = (t.to(accelerator.device) for t in next(iter(loader())))
    start = cross_entropy(network().to(x)(x), y)
    assert accelerator.scaler is not None and run.skipped < 2 * STEPS
    assert cross_entropy(run.network(x), y) < start
