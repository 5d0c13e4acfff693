"""Networks of one architecture that are trained side by side: the same images in the same order, labels of their own.

The weights of all members are stacked, member by member, and one call of :func:`torch.func.vmap` gives all gradients.
SGD acts on every number by itself, so that ``torch.optim.SGD`` on the stack is that optimizer on every member: only the
order in which numbers are added up differs from training them one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap


@dataclass(frozen=True)
class Training:
    """How to train: SGD with lr_t = lr / (decay·t + 1), t the number of batches so far.

    Attributes:
        epochs: Passes over the images; the last batch of one is smaller where the batch does not divide them.
        batch: Images in a batch.
        lr: The first learning rate.
        momentum: Of SGD.
        weight_decay: Of SGD, biases included.
        decay: How fast the learning rate falls.
        precision: Of products of matrices while training, as of ``torch.set_float32_matmul_precision``: ``"medium"``
            rounds their factors to bfloat16 where the processor has instructions for it.
    """

    epochs: int
    batch: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 1e-5
    decay: float = 1e-4
    precision: str = "highest"


def corrupted(labels: Tensor, ratio: float, draw: torch.Generator) -> Tensor:
    """Labels of which a share changes places: a random permutation of those of a random subset.

    The classes keep their sizes, and about one in ten of these labels stays right by chance.

    Args:
        labels: ``[n]``.
        ratio: The share of the subset, in [0, 1].
        draw: Draws the subset, and then its permutation.

    Returns:
        New labels ``[n]``.

    Raises:
        ValueError: If the share is none.

    >>> corrupted(torch.arange(5), 0.0, torch.Generator())
    tensor([0, 1, 2, 3, 4])
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must be in [0, 1], got {ratio}")
    subset = torch.randperm(len(labels), generator=draw)[: round(ratio * len(labels))]
    moved = labels.clone()
    moved[subset] = labels[subset[torch.randperm(len(subset), generator=draw)]]
    return moved


def train(models: Sequence[nn.Module], x: Tensor, labels: Tensor, training: Training, draw: torch.Generator) -> None:
    """Train all members at once, in place, by the cross-entropy.

    Args:
        models: E networks of one architecture, without buffers and without randomness, on the images' device.
        x: Images ``[n, ...]``, which all members see in the same order.
        labels: ``[E, n]``, each member's own.
        training: How.
        draw: Draws the order of the images, on the CPU.

    Raises:
        ValueError: If there are not as many rows of labels as models, or a model has buffers.
    """
    if len(labels) != len(models):
        raise ValueError(f"there are {len(models)} models and {len(labels)} rows of labels")
    stacked, buffers = stack_module_state(list(models))  # type: ignore[arg-type]  # torch asks for a list of modules
    if buffers:
        raise ValueError(f"the models have buffers, which are not trained here: {', '.join(buffers)}")
    parameters = {name: value.detach() for name, value in stacked.items()}

    def loss(values: dict[str, Tensor], images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(models[0], values, (images,)), targets)

    gradients_of = vmap(grad_and_value(loss), in_dims=(0, None, 0))
    options = {"lr": training.lr, "momentum": training.momentum, "weight_decay": training.weight_decay}
    optimizer = torch.optim.SGD(list(parameters.values()), **options, fused=True)  # type: ignore[arg-type]  # floats
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 / (training.decay * t + 1.0))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(training.precision)
    try:
        for _ in range(training.epochs):
            for chosen in torch.randperm(len(x), generator=draw).to(x.device).split(training.batch):
                gradients, _ = gradients_of(parameters, x[chosen], labels[:, chosen])
                for name, value in parameters.items():
                    value.grad = gradients[name]
                optimizer.step()
                schedule.step()
    finally:
        torch.set_float32_matmul_precision(before)
    for member, model in enumerate(models):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(parameters[name][member])


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch: int = 1024) -> float:
    """The share of images whose largest logit is their label's; 0 where logits are not finite.

    Args:
        model: Measured in evaluation mode.
        x: Images.
        y: Labels.
        batch: Images in a pass.

    Returns:
        The share.
    """
    model.eval()
    right = 0
    for images, targets in zip(x.split(batch), y.split(batch), strict=True):
        logits = model(images)
        right += int((logits.argmax(1).eq(targets) & logits.isfinite().all(1)).sum())
    return right / len(x)
