"""Hugging Face's Trainer, unmodified, and the plain loop that it has to equal, bit for bit.

Its models return the loss themselves, so the model is what SAM is attached to.  On the CPU ``fp16=True`` is full
precision, without a word: the code for float16 is Accelerate's (``test_accelerate.py``), and runs here on a GPU.
"""

from __future__ import annotations

import functools
import runpy

import accelerate
import pytest
import torch
import transformers
from cases import same
from integrations.plain import EXAMPLES, ONE_PASS, STEPS, TWO_PASSES, build, left
from sklearn.datasets import load_digits
from torch.nn.utils import clip_grad_norm_

import ms_optim
from ms_optim.errors import OptimizerError
from ms_optim.reference import curvature as oracle

every = pytest.mark.parametrize("name", [*TWO_PASSES, *ONE_PASS])
BATCH = 16


@pytest.fixture(autouse=True)
def alone():
    torch.set_default_dtype(torch.float32)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def bert():
    """A text classifier, whose words are the gray values of an image, without dropout."""
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=17,
            max_position_embeddings=64,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=10,
        )
    )


def vit():
    """A vision transformer for images of 8 × 8 pixels."""
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=10,
        )
    )


def texts(count):
    """A batch as models take it: named, with labels; every third text is shorter than the others."""
    pixels, labels = load_digits(return_X_y=True)
    mask = torch.ones(count, 64, dtype=torch.long)
    mask[::3, 40:] = 0
    words, labels = torch.tensor(pixels[:count]).long(), torch.tensor(labels[:count])
    return {"input_ids": words, "attention_mask": mask, "labels": labels}


def images(count):
    """The same as images."""
    batch = texts(count)
    pixels = batch["input_ids"].to(torch.get_default_dtype()) / 8 - 1
    return {"pixel_values": pixels.view(count, 1, 8, 8), "labels": batch["labels"]}


@functools.cache
def dataset():
    batch = texts(2 * STEPS * BATCH)
    return [{key: value[i] for key, value in batch.items()} for i in range(2 * STEPS * BATCH)]


@functools.cache
def group():
    """The scale group of the first model, discovered once for all tests."""
    return ms_optim.scale_symmetries(bert(), texts(2))


class Collector:
    """Puts batches together, and keeps those of training (others are smaller) in their order."""

    def __init__(self):
        self.batches = []

    def __call__(self, features):
        batch = transformers.default_data_collator(features)
        if len(features) == BATCH:
            self.batches.append(batch)
        return dict(batch)


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=2 * STEPS)


class Run:
    """One training by Trainer."""

    def __init__(self, name, folder, attach=None, steps=STEPS, resume=None, own=None, **options):
        self.model = bert()
        self.optimizer = build(name, self.model, group=group(), **(own or {}))
        if name in TWO_PASSES if attach is None else attach:
            self.optimizer.attach(self.model)
        self.collector = Collector()
        settings = {"use_cpu": True, "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 2, **options}
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH // 2,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **settings,
        )
        self.trainer = transformers.Trainer(
            self.model,
            arguments,
            data_collator=self.collector,
            train_dataset=dataset(),
            eval_dataset=dataset()[:BATCH],
            optimizers=(self.optimizer, one_cycle(self.optimizer)),
        )
        self.trainer.train(resume_from_checkpoint=resume)

    @property
    def left(self):
        return left(self.model, self.optimizer)


def plain(name, batches, parts=1, clip=1.0, autocast=None, **own):
    """The loop that Trainer runs, on the same batches."""
    model = bert()
    optimizer = build(name, model, group=group(), **own)
    scheduler = one_cycle(optimizer)
    if autocast is not None:
        model.forward = torch.autocast("cpu", dtype=autocast)(model.forward)
    for step in range(STEPS):
        optimizer.zero_grad()
        if name in TWO_PASSES and parts == 1:
            for gradient_pass in optimizer.passes():
                with gradient_pass:
                    model(**batches[step]).loss.backward()
        else:
            if name in TWO_PASSES:
                optimizer.attach(model)
            for batch in batches[parts * step : parts * (step + 1)]:
                model(**batch).loss.backward()  # Trainer leaves it to a model as BERT to divide by their number
        clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
    return left(model, optimizer)


@every
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_trainer_gives_the_bits_of_a_plain_loop(name, kind, tmp_path):
    ours, theirs = ({"bf16": True}, {"autocast": torch.bfloat16}) if kind == "bfloat16" else ({}, {})
    run = Run(name, tmp_path, **ours)
    assert same(run.left, plain(name, run.collector.batches, **theirs))


@every
def test_clipping_acts_on_the_last_gradient_alone(name, tmp_path):
    run = Run(name, tmp_path, max_grad_norm=0.05)
    assert same(run.left, plain(name, run.collector.batches, clip=0.05))
    assert not same(run.left, plain(name, run.collector.batches))


@every
def test_batches_that_share_a_step(name, tmp_path):
    run = Run(name, tmp_path, gradient_accumulation_steps=2)
    assert same(run.left, plain(name, run.collector.batches, parts=2))


@pytest.mark.parametrize("name", TWO_PASSES)
def test_steps_of_the_base_optimizer_between_those_of_two_passes(name, tmp_path):
    window = {"start": 1, "every": 2, "refresh_every": 1}
    run = Run(name, tmp_path, own=window)
    assert same(run.left, plain(name, run.collector.batches, **window))


@every
def test_a_run_goes_on_from_a_checkpoint(name, tmp_path):
    whole = Run(name, tmp_path, steps=2 * STEPS, save_strategy="steps", save_steps=STEPS)
    resumed = Run(name, tmp_path, steps=2 * STEPS, resume=str(tmp_path / f"checkpoint-{STEPS}"))
    assert same(resumed.left, whole.left)


@pytest.mark.parametrize("name", TWO_PASSES)
def test_without_attach_two_passes_are_refused(name, tmp_path):
    with pytest.raises(OptimizerError, match=r"or optimizer.attach\(module\) once"):
        Run(name, tmp_path, attach=False)


def test_a_loss_that_trainer_computes_itself_is_refused(tmp_path):
    with pytest.raises(OptimizerError, match="was attached as a module whose training forward returns the loss"):
        Run("SAM", tmp_path, label_smoothing_factor=0.1)
    Run("MSSAM[momentum]", tmp_path, label_smoothing_factor=0.1)  # of one pass: no matter where the loss is made


@pytest.mark.parametrize("model, batch", [(vit, images), (bert, texts)])
def test_traces_of_a_batch_with_labels_are_those_of_the_definition(model, batch):
    torch.set_default_dtype(torch.float64)
    network, given = model().double(), batch(4)
    expected = oracle.gauss_newton_traces(network.eval(), given)
    assert dict(ms_optim.hessian_trace(network, given, columns=None)) == pytest.approx(expected, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("model, batch", [(vit, images), (bert, texts)])
def test_the_representative_of_a_model_with_labels_is_the_same_network(model, batch):
    network, given = model().eval(), batch(8)
    before = network(**given)
    optimizer = ms_optim.MSSAM(network, lr=0.1, columns=None)
    optimizer.refresh(given)
    after = network(**given)
    assert max(map(abs, optimizer.representative.log_scale.values())) > 0.1
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-4, atol=1e-5)


def test_the_example():
    accuracy = runpy.run_path(str(EXAMPLES / "with_trainer.py"))["main"](epochs=4)
    assert accuracy > 0.5


@pytest.mark.cuda
@every
def test_float16_as_it_is_on_a_gpu(name, tmp_path):
    run = Run(name, tmp_path, fp16=True, use_cpu=False, steps=2 * STEPS)
    assert run.trainer.accelerator.scaler is not None and run.optimizer.steps > 0
    batch = {key: value.to(run.model.device) for key, value in texts(BATCH).items()}
    assert run.model.eval()(**batch).loss < bert().to(run.model.device).eval()(**batch).loss
