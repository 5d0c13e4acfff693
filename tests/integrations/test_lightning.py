"""Lightning's automatic optimization, and the plain loop that it has to equal, bit for bit.

It calls ``optimizer.step(closure)``, and in ``16-mixed`` runs the closure itself, so that SAM's passes are made in the
forward of a module that returns the loss; see ``examples/with_lightning.py``.
"""

import logging
import runpy

import lightning
import pytest
import torch
from cases import same
from integrations.plain import (
    ALL,
    EXAMPLES,
    STEPS,
    TWO_PASSES,
    Plain,
    WithLoss,
    build,
    left,
    loader,
    network,
)
from lightning.pytorch.plugins import MixedPrecision
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from ms_optim.errors import OptimizerError

pytestmark = [
    # Lightning walks over batches with a class that torch has deprecated, and would rather have worker processes.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:`Trainer.fit` stopped"),
]
every = pytest.mark.parametrize("name", ALL)
two_passes = pytest.mark.parametrize("name", TWO_PASSES)
SCALE = 2.0**22  # overflows in the first steps: they are skipped


@pytest.fixture(autouse=True)
def quiet():
    torch.set_default_dtype(torch.float32)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def scaler(scale):
    return torch.amp.GradScaler("cpu", init_scale=scale)


def precision(kind, scale=SCALE):
    """What the trainer takes and what a plain loop does, for one kind of precision."""
    if kind == "32":
        return {}, {}
    if kind == "bf16":
        return {"precision": "bf16-mixed"}, {"autocast": torch.bfloat16}
    # On the CPU `precision="16-mixed"` becomes bfloat16, with a warning; given its plugin it is float16.
    return (
        {"plugins": [MixedPrecision("16-mixed", "cpu", scaler(scale))]},
        {"autocast": torch.float16, "scaler": scaler(scale)},
    )


class Module(lightning.LightningModule):
    def __init__(self, name, attach=False, schedule=None, passed_over=(), **own):
        super().__init__()
        self.passed_over, self.own = passed_over, own
        self.loss = WithLoss(network())
        self.name, self.attach, self.schedule = name, attach, schedule
        self.gradients_seen = 0
        self.losses = []

    def training_step(self, batch, index):
        if index in self.passed_over:
            return None
        loss = self.loss(*batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self.log("loss", self.loss(*batch))

    def on_before_optimizer_step(self, optimizer):
        self.gradients_seen += 1

    def configure_optimizers(self):
        self.optimizer = build(self.name, self.loss.network, **self.own)
        if self.attach:
            self.optimizer.attach(self.loss)
        if self.schedule is None:
            return self.optimizer
        return [self.optimizer], [{"scheduler": self.schedule(self.optimizer), "interval": "step"}]

    @property
    def left(self):
        return left(self.loss.network, self.optimizer)


def fit(module, steps=STEPS, parts=1, resume=None, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=2,
        accumulate_grad_batches=parts,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, loader(STEPS * parts), loader(1), ckpt_path=resume)
    return trainer


@every
@pytest.mark.parametrize("kind", ["32", "bf16", "16"])
def test_the_automatic_loop_gives_the_bits_of_a_plain_one(name, kind):
    ours, plain = precision(kind)
    module = Module(name, attach=name in TWO_PASSES)
    fit(module, **ours)
    how = "passes"
    if kind == "16":
        # The first of two passes has a scale of its own here, so that its gradient is rounded otherwise; and of a step
        # that is skipped, explicit passes have drawn the signs of the trace.
        how = "attach" if name in TWO_PASSES else "loop"
    expected = Plain(name, how, **plain).run()
    assert same(module.left, expected.left)
    if kind == "16":
        assert expected.scaler.get_scale() < SCALE


@two_passes
@pytest.mark.parametrize("kind", ["32", "bf16"])
def test_a_closure_makes_two_passes_where_nothing_is_attached(name, kind):
    ours, plain = precision(kind)
    module = Module(name)
    fit(module, **ours)
    assert same(module.left, Plain(name, **plain).run().left)
    assert module.gradients_seen == len(module.losses) == 2 * STEPS


@two_passes
def test_in_16_bits_there_is_no_closure_and_the_error_names_the_way(name):
    with pytest.raises(OptimizerError, match=r"or optimizer.attach\(module\) once"):
        fit(Module(name), **precision("16")[0])


@every
@pytest.mark.parametrize("kind", ["32", "bf16", "16"])
def test_clipping_acts_on_the_last_gradient_alone(name, kind):
    ours, plain = precision(kind)
    module = Module(name, attach=name in TWO_PASSES)
    fit(module, gradient_clip_val=0.1, **ours)
    expected = Plain(name, "attach" if module.attach else "loop", clip=lambda ps: clip_grad_norm_(ps, 0.1), **plain)
    assert same(module.left, expected.run().left)
    assert not same(module.left, Plain(name, expected.how, **precision(kind)[1]).run().left)


@two_passes
def test_clipping_every_entry_leaves_the_way_to_the_second_pass_alone(name):
    options = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    module = Module(name, attach=True)
    fit(module, **options)
    assert same(module.left, Plain(name, clip=lambda ps: clip_grad_value_(ps, 0.01)).run().left)
    assert module.gradients_seen == len(module.losses) == STEPS


@every
@pytest.mark.parametrize("kind", ["32", "16"])
def test_batches_that_share_a_step(name, kind):
    ours, plain = precision(kind)
    module = Module(name, attach=name in TWO_PASSES)
    fit(module, parts=2, **ours)
    expected = Plain(name, "attach" if module.attach else "loop", parts=2, **plain).run()
    assert same(module.left, expected.left)
    assert module.gradients_seen == STEPS


@every
@pytest.mark.parametrize(
    "own",
    [{"refresh_every": 2}, {"every": 2, "refresh_every": 1}, {"start": 1, "end": 4}, {"buffers": "last"}],
    ids=str,
)
def test_steps_of_three_batches_with_a_window_of_our_own_part(name, own):
    module = Module(name, attach=name in TWO_PASSES, **own)
    fit(module, parts=3, gradient_clip_val=0.1)
    how = "attach" if module.attach else "loop"
    assert same(module.left, Plain(name, how, parts=3, clip=lambda ps: clip_grad_norm_(ps, 0.1), **own).run().left)


@two_passes
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_that_is_passed_over_is_a_step_without_gradients(name):
    module = Module(name, attach=True, passed_over=range(STEPS // 2))
    fit(module)
    assert module.optimizer.steps == STEPS and len(module.losses) == STEPS - STEPS // 2
    assert not same(list(module.loss.network.parameters()), list(network().parameters()))


@two_passes
def test_an_attached_module_that_is_not_called_is_named_and_nothing_is_lost(name):
    class Around(Module):
        def training_step(self, batch, index):
            return torch.nn.functional.cross_entropy(self.loss.network(batch[0]), batch[1])

    module = Around(name, attach=True)
    with pytest.raises(OptimizerError, match="attached to a WithLoss.*did not call that module"):
        fit(module)
    assert same(list(module.loss.network.state_dict().values()), list(network().state_dict().values()))


@two_passes
def test_batches_that_share_a_step_are_not_lost_in_silence(name):
    with pytest.raises((OptimizerError, UserWarning)):
        fit(Module(name), parts=2)


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=2 * STEPS)


@every
def test_a_schedule_of_the_rate(name):
    module = Module(name, attach=name in TWO_PASSES, schedule=one_cycle)
    fit(module)
    assert same(module.left, Plain(name, schedule=one_cycle).run().left)


@every
@pytest.mark.parametrize("kind", ["32", "16"])
def test_a_run_goes_on_from_a_checkpoint(name, kind, tmp_path):
    def module():
        return Module(name, attach=name in TWO_PASSES, schedule=one_cycle)

    def options():
        return precision(kind, 2.0**10)[0]  # torch warns of a schedule whose first step the scaler skips

    whole = module()
    fit(whole, 2 * STEPS, **options())
    fit(module(), STEPS, **options()).save_checkpoint(tmp_path / "half.ckpt")
    resumed = module()
    fit(resumed, 2 * STEPS, resume=tmp_path / "half.ckpt", **options())
    assert same(resumed.left, whole.left)
    assert len(resumed.losses) < len(whole.losses)


@pytest.mark.parametrize("kind", ["32", "bf16-mixed"])
def test_the_example(kind):
    assert runpy.run_path(str(EXAMPLES / "with_lightning.py"))["main"](epochs=3, precision=kind) > 0.9


@pytest.mark.cuda
@every
def test_float16_as_it_is_on_a_gpu(name):
    module = Module(name, attach=name in TWO_PASSES)
    trainer = lightning.Trainer(
        accelerator="cuda",
        devices=1,
        precision="16-mixed",
        max_steps=2 * STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(2 * STEPS))
    assert trainer.precision_plugin.scaler is not None and module.optimizer.steps > 0
    assert module.losses[-1] < module.losses[0]
