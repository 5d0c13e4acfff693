"""Families: the settings of every recipe, and where each number is from.

A family is data, a model and how it is trained; its five recipes differ in ``opt`` and ``opt_kwargs`` and in nothing
else.  A number is followed by where it is from; one of our own that no sweep in this repository has chosen says "not
yet measured".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OPEN = "not yet measured"

OPTIMIZERS = {"sgd": "SGD", "sam": "SAM", "asam": "ASAM", "mssam": "MSSAM", "msreg": "MSRegularizedSGD"}
OPT = {"sgd": "sgd", "sam": "msoptimsam", "asam": "msoptimasam", "mssam": "mssam", "msreg": "msreg"}

ASAM_PAPER, SAM_PAPER = "arXiv 2102.11600", "arXiv 2010.01412"


@dataclass(frozen=True)
class Said:
    """A value, and where it is from.

    Attributes:
        value: As YAML has it.
        source: Why this value; empty where that goes without saying.
    """

    value: Any
    source: str = ""


Settings = dict[str, Said]


@dataclass(frozen=True)
class Family:
    """What the recipes of one data set and model have in common, and how the optimizers differ.

    Attributes:
        title: Data and model.
        settings: Key → value, but for the optimizer.
        own: Optimizer → its arguments.
        device: What it is written for.
        commands: For which case → what follows the recipe on the command line; the first is what it is written for.
        start: What starts it.
    """

    title: str
    settings: Settings
    own: Mapping[str, Said]
    device: str = "a CPU"
    commands: Mapping[str, str] = field(default_factory=lambda: {"": ""})
    start: str = "python"


def optimizers(
    sam: Said,
    asam: Said,
    mssam: Said,
    msreg: Said,
    gradient: str = "noise",
    common: Mapping[str, Any] | None = None,
) -> dict[str, Said]:
    """The arguments of each optimizer.

    Args:
        sam: ρ.
        asam: ρ.
        mssam: ρ.
        msreg: λ.
        gradient: Of MSRegularizedSGD.
        common: Of all of them.

    Returns:
        Optimizer → arguments and their source.
    """
    common, refreshes = dict(common or {}), {"refresh_every": 100, "columns": 2}
    return {
        "sgd": Said(common),
        "sam": Said({"rho": sam.value, **common}, sam.source),
        "asam": Said({"rho": asam.value, **common}, asam.source),
        "mssam": Said({"rho": mssam.value, **refreshes, **common}, mssam.source),
        "msreg": Said({"strength": msreg.value, "gradient": gradient, **refreshes, **common}, msreg.source),
    }


# λ = ρ² / 2 is noise of standard deviation ρ at the representative.
_NOISE = Said(0.00005, f"{OPEN}; noise of deviation √(2λ) = 0.01, as Trace-SAM's (arXiv 2406.03682)")
_TUNED = "chosen on other seeds: benchmarks/results/choosing"


def _digits() -> Family:
    settings = {
        "dataset": Said("digits"),
        "model": Said("ms_optim.models:digits_mlp"),
        "label_noise": Said(0.2, "this setting is the demo's: ms_optim/demo/training.py"),
        "batch_size": Said(50),
        "epochs": Said(20),
        "lr": Said(0.1),
        "momentum": Said(0.9),
        "weight_decay": Said(0.0005),
        "warmup_epochs": Said(0),
        "smoothing": Said(0.0),
    }
    # Classical momentum: what the demo has, and its radii were chosen with.
    own = optimizers(
        *(Said(0.4, _TUNED), Said(2.0, _TUNED), Said(0.4, _TUNED), Said(0.01, _TUNED)),
        gradient="trace",
        common={"nesterov": False},
    )
    return Family("scikit-learn's handwritten digits with noisy labels, MLP 64-128-128-10", settings, own)


def _mnist(title: str, model: str, own: Mapping[str, Said], rate: str) -> Family:
    settings = {
        "dataset": Said("torch/mnist"),
        "model": Said(model),
        "batch_size": Said(128),
        "epochs": Said(10),
        "lr": Said(0.05, rate),
        "momentum": Said(0.9),
        "weight_decay": Said(0.0005, OPEN),
        "warmup_epochs": Said(0),
        "smoothing": Said(0.0),
    }
    return Family(f"MNIST, {title}", settings, own, commands=_DOWNLOADED)


_SWEPT = "best of recipes/sweeps/mnist_mlp (one seed, half the epochs: differences below 0.3 are noise)"
_DOWNLOADED = {"": "--data-dir data", "the first time": "--data-dir data --dataset-download"}


def _on_a_gpu(more: str = "") -> dict[str, str]:
    """Mixed precision is of the command, not of the recipe: on a CPU it is slower."""
    fast = f"--data-dir data --amp --amp-dtype bfloat16{more}"
    return {"": fast, "the first time": f"{fast} --dataset-download", "on a CPU": "--data-dir data"}


def _cifar_radii(classes: int) -> dict[str, Said]:
    sam = {10: 0.05, 100: 0.1}[classes]
    return optimizers(
        Said(sam, f"{SAM_PAPER}, WRN-28-10"),
        Said({10: 0.5, 100: 1.0}[classes], ASAM_PAPER),
        Said(sam, f"{OPEN}; SAM's radius"),
        _NOISE,
    )


def _cifar(classes: int, title: str, model: str, **arguments: Any) -> Family:
    """A convolutional network, trained as in the papers of SAM and ASAM."""
    settings = {
        "dataset": Said(f"torch/cifar{classes}", "padded by 4, cropped and flipped: the preset of this data set"),
        "model": Said(model),
        **({"model_kwargs": Said(arguments)} if arguments else {}),
        "batch_size": Said(128, ASAM_PAPER),
        "epochs": Said(200, f"{ASAM_PAPER}; for SGD as for the others, which take two passes a step"),
        "lr": Said(0.1, ASAM_PAPER),
        "momentum": Said(0.9, ASAM_PAPER),
        "weight_decay": Said(0.0005, f"{ASAM_PAPER}; not on biases and gains, as timm does"),
        "sched": Said("cosine", ASAM_PAPER),
        "warmup_epochs": Said(0),
        "smoothing": Said(0.1, ASAM_PAPER),
    }
    commands = _on_a_gpu(" --channels-last")
    return Family(f"CIFAR-{classes}, {title}", settings, _cifar_radii(classes), "one GPU", commands)


def _cifar_patches(classes: int, title: str, model: str) -> Family:
    """A network on patches: SGD with clipped gradients and a warm-up."""
    settings = {
        "dataset": Said(f"torch/cifar{classes}", "padded by 4, cropped and flipped: the preset of this data set"),
        "model": Said(model),
        "batch_size": Said(128),
        "epochs": Said(200),
        "lr": Said(0.05, f"with weight decay, warm-up and clipping: {OPEN}"),
        "momentum": Said(0.9),
        "weight_decay": Said(0.0001),
        "clip_grad": Said(1.0),
        "warmup_epochs": Said(10),
        "smoothing": Said(0.1),
    }
    own = optimizers(Said(0.05, OPEN), Said(0.5, OPEN), Said(0.05, OPEN), _NOISE)
    return Family(f"CIFAR-{classes}, {title}", settings, own, "one GPU", _on_a_gpu())


def _cifar_on_a_cpu() -> Family:
    settings = {
        "dataset": Said("torch/cifar10"),
        "train_num_samples": Said(5000, "a tenth of the training images, always the same ones"),
        "model": Said("ms_optim.models:small_resnet"),
        "model_kwargs": Said({"in_channels": 3}),
        "batch_size": Said(128),
        "epochs": Said(10),
        "lr": Said(0.1),
        "momentum": Said(0.9),
        "weight_decay": Said(0.0005),
        "warmup_epochs": Said(0),
        "smoothing": Said(0.0),
    }
    own = optimizers(
        *(Said(0.1, OPEN), Said(0.5, OPEN), Said(0.1, OPEN)),
        Said(0.001, f"{OPEN} here; the best for this network on the digits (benchmarks/results/choosing)"),
        gradient="trace",
    )
    title = "CIFAR-10, a tenth of it, a ResNet of 19,000 parameters"
    copied = {"a copy of CIFAR-10 as JPEG, in data/cifar10/train.tar and test.tar": _COPY}
    return Family(title, settings, own, commands={**copied, "CIFAR-10 itself": _DOWNLOADED["the first time"]})


_COPY = "--dataset \"\" --preset cifar10 --data-dir data/cifar10"


def _imagenet(title: str, model: str, own: Mapping[str, Said], **training: Said) -> Family:
    settings = {
        "dataset": Said("torch/imagenet"),
        "holdout": Said(10000, "the best epoch is chosen on training images,"),
        "test_split": Said("validation", "and the published validation set is the test set, as in the papers"),
        "model": Said(model),
        "batch_size": Said(128, "per GPU: 1,024 a step"),
        **training,
        "smoothing": Said(0.1),
        "amp": Said(True),
        "amp_dtype": Said("bfloat16"),
        "workers": Said(8, "per GPU"),
    }
    stream = "--train-num-samples 1281167 --val-num-samples 50000 --holdout 0 --val-split validation --test-split ''"
    commands = {
        "": "--data-dir DIR",
        "shards of WebDataset, which are read in one direction": f"--dataset wds/imagenet --data-dir DIR {stream}",
        "from Hugging Face": "--dataset hfds/ILSVRC/imagenet-1k --data-dir DIR",
    }
    start = "torchrun --nproc_per_node=8"
    return Family(f"ImageNet, {title}", settings, own, "8 GPUs", commands, start)


def _families() -> dict[str, Family]:
    chosen = optimizers(*(Said(value, _SWEPT) for value in (0.025, 0.125, 0.025, 0.0001)), gradient="trace")
    rate = "best of three for SGD (recipes/sweeps/mnist_mlp)"
    unchosen = optimizers(
        *(Said(0.05, f"{SAM_PAPER}, its default"), Said(0.5, f"{ASAM_PAPER}, for CIFAR-10"), Said(0.05, OPEN)),
        Said(0.001, OPEN),
        gradient="trace",
    )
    found = {
        "digits_mlp": _digits(),
        "mnist_mlp": _mnist("MLP 784-512-128-512-10", "ms_optim.models:mlp", chosen, rate),
        "mnist_lenet": _mnist("LeNet", "ms_optim.models:lenet", unchosen, OPEN),
        "cifar10_small_resnet": _cifar_on_a_cpu(),
    }
    for classes in (10, 100):
        name = f"cifar{classes}"
        found |= {
            f"{name}_resnet18": _cifar(classes, "ResNet-18", "ms_optim.models:resnet18"),
            f"{name}_resnet56": _cifar(classes, "ResNet-56", "ms_optim.models:cifar_resnet", depth=56),
            f"{name}_preact_resnet18": _cifar(classes, "PreAct-ResNet-18", "ms_optim.models:preact_resnet18"),
            f"{name}_wrn28_10": _cifar(classes, "WRN-28-10", "ms_optim.models:wide_resnet", depth=28, width=10),
            f"{name}_resmlp": _cifar_patches(classes, "ResMLP-S12 in patches of 4×4", "ms_optim.models:resmlp"),
            f"{name}_mixer": _cifar_patches(classes, "Mixer-S in patches of 4×4", "ms_optim.models:mixer"),
            f"{name}_vit_tiny": _cifar_patches(classes, "ViT-Ti in patches of 4×4", "ms_optim.models:vit_tiny"),
        }
    goyal = "arXiv 1706.02677"
    found["imagenet_resnet50"] = _imagenet(
        *("ResNet-50", "resnet50"),
        optimizers(
            Said(0.05, f"{SAM_PAPER}, and {ASAM_PAPER}"),
            Said(1.0, ASAM_PAPER),
            Said(0.05, f"{OPEN}; SAM's radius"),
            _NOISE,
        ),
        epochs=Said(90, goyal),
        lr_base=Said(0.1, f"per 256 images ({goyal}): 0.4 for 1,024"),
        momentum=Said(0.9, goyal),
        weight_decay=Said(0.0001, goyal),
        warmup_epochs=Said(5, goyal),
        channels_last=Said(True),
    )
    found["imagenet_vit_s"] = _imagenet(
        *("ViT-S in patches of 16×16", "vit_small_patch16_224"),
        optimizers(Said(0.05, OPEN), Said(1.0, OPEN), Said(0.05, OPEN), _NOISE),
        epochs=Said(300, f"with rate, decay, warm-up and clipping: {OPEN}"),
        lr_base=Said(0.1, "per 256 images"),
        momentum=Said(0.9),
        weight_decay=Said(0.0001),
        clip_grad=Said(1.0),
        warmup_epochs=Said(10),
    )
    return found


FAMILIES = _families()
