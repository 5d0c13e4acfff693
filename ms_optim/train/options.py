"""Options: every flag of a training, by timm's names where timm has one.

A flag's name with underscores is its key in a recipe.  What timm's ``train.py`` calls by a name means the same here,
with the same default.  Three things are decided otherwise:

* ``--device`` is by default a GPU where there is one, and else the CPU.
* What follows from the images (``--input-size``, ``--mean``, ``--hflip``, …) is by default decided by the data set, not
  by ImageNet: see :mod:`ms_optim.train.preset`.  Such options are ``None`` until then.
* The split on which the best checkpoint is chosen is never the test set: see :mod:`ms_optim.train.datasets`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ..cli.command import Parser
from ..cli.models import pair

Add = Callable[..., Any]

#: timm's ways to resize an image.
RESIZING = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


class Pairs(argparse.Action):
    """``key=value`` words as a dictionary; a value is a literal of Python if it can be read as one, else text."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Collect them, on top of a recipe's."""
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), **dict(values)})


def parser() -> argparse.ArgumentParser:
    """The command line of ``python -m ms_optim.train``.

    Returns:
        A parser that raises :class:`~ms_optim.errors.CommandLineError`.
    """
    made = Parser(
        prog="python -m ms_optim.train",
        usage="python -m ms_optim.train [-c recipe.yaml] [options]",
        description="Train a classifier of timm or of your own with any optimizer of timm or of this package.",
        epilog="python -m ms_optim.train -c recipes/digits_mlp_mssam.yaml   (seconds, on a CPU, without any data)",
        allow_abbrev=False,
    )
    made.add_argument("-c", "--config", metavar="FILE", help="recipe (YAML: the options below, with underscores)")
    for section in (_data, _images, _model, _device, _optimizer, _schedule, _augmentation, _average, _run, _output):
        section(made)
    return made


def _group(made: argparse.ArgumentParser, title: str) -> Add:
    """Adds the options of a group: a flag, its default, its type, what it says."""
    group = made.add_argument_group(title)

    def add(*names: str, default: Any = None, type: Any = None, help: str = "", **more: Any) -> None:
        if isinstance(default, bool):  # (there is no --no-no-aug)
            plain = names[0].startswith("--no-")
            action: Any = "store_true" if plain else argparse.BooleanOptionalAction
            group.add_argument(*names, default=default, action=action, help=help, **more)
        elif isinstance(default, dict):
            more = {"nargs": "*", "type": pair, "action": Pairs, "metavar": "KEY=VALUE", **more}
            group.add_argument(*names, default=default, help=help, **more)
        else:
            group.add_argument(*names, default=default, type=type or str, help=help, **more)

    return add


def _data(made: argparse.ArgumentParser) -> None:
    add = _group(made, "the data")
    add("--dataset", default="digits", help="digits, torch/cifar10, hfds/…, wds/…, tfds/…, or '' for folders and tars")
    add("--data-dir", help="where the data lies")
    add("--train-split", default="train", help="as timm's")
    add("--val-split", help="default: a held-out part of the training split where the data has only a test set")
    add("--test-split", help="looked at once, in the end; default: the data set's test set if it has one; '' = none")
    add("--holdout", type=float, help="share (< 1) or number (≥ 1) of training images kept for validation; 0 = none")
    add("--split-seed", default=0, type=int, help="draws the held-out part, a subset and noisy labels; not --seed")
    add("--train-num-samples", type=int, help="train on so many images (of streams: how many there are)")
    add("--val-num-samples", type=int, help="of streams: how many there are")
    add("--label-noise", default=0.0, type=float, help="share of labels redrawn, of training and held-out images")
    add("--dataset-download", default=False, help="let timm fetch the data set into --data-dir")
    add("--class-map", default="", help="file: class → index")
    add("--input-img-mode", help="colours, as RGB or L")
    add("--input-key", help="of a stream's or table's images")
    add("--target-key", help="of a stream's or table's labels")
    add("--dataset-trust-remote-code", default=False, help="let a data set of a hub run its own code")
    add("--in-memory", default="auto", choices=["auto", "yes", "no"], help="decode once, augment on the device")
    add("-j", "--workers", default=4, type=int, help="processes that read images")
    add("--pin-mem", default=False, help="page-locked memory")
    add("--no-prefetcher", default=False, help="normalise in the workers instead of on the device")
    add("--worker-seeding", default="all", choices=["all"], help="as timm's; here by epoch and batch")
    add("-b", "--batch-size", default=128, type=int, help="per process")
    add("-vb", "--validation-batch-size", type=int, help="per process (default: --batch-size)")


def _images(made: argparse.ArgumentParser) -> None:
    add = _group(made, "the images; by default as the data set's are, else as the model's configuration says")
    add("--preset", default="auto", help="what the images are like: cifar10, mnist, …; auto = by --dataset; none")
    add("--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="channels, height, width")
    add("--img-size", type=int, help="height and width, if equal")
    add("--in-chans", type=int, help="channels")
    add("--mean", type=float, nargs="+", help="of pixels, per channel")
    add("--std", type=float, nargs="+", help="of pixels, per channel")
    add("--interpolation", default="", choices=["", *RESIZING], help="of evaluation")
    add("--crop-pct", type=float, help="part of the resized image that evaluation keeps")


def _model(made: argparse.ArgumentParser) -> None:
    add = _group(made, "the model")
    add("--model", default="resnet50", help="timm's name, or module:function (ms_optim.models:resnet18)")
    add("--model-kwargs", default={}, help="further arguments of the model")
    add("--stem", default="auto", choices=["auto", "model", "small"], help="small: ResNets for 32×32; auto: if small")
    add("--num-classes", type=int, help="number of logits")
    add("--pretrained", default=False, help="start from timm's weights")
    add("--pretrained-path", help="file with pretrained weights, adapted as timm's")
    add("--initial-checkpoint", default="", help="weights to start from")
    add("--gp", help="global pooling")
    add("--drop", default=0.0, type=float, help="dropout")
    add("--drop-path", type=float, help="stochastic depth")
    add("--drop-block", type=float, help="DropBlock, of models that have it")
    add("--bn-momentum", type=float, help="of BatchNorm, of models that take it")
    add("--bn-eps", type=float, help="of BatchNorm, of models that take it")
    add("--grad-checkpointing", default=False, help="recompute activations (BatchNorm counts twice)")
    add("--head-init-scale", type=float, help="factor on the classifier's first weights")
    add("--head-init-bias", type=float, help="the classifier's first bias")


def _device(made: argparse.ArgumentParser) -> None:
    add = _group(made, "the device")
    add("--device", default="auto", help="cuda, cpu, mps, …; auto: cuda if it is there, else cpu")
    add("--device-modules", nargs="+", help="modules to import first")
    add("--amp", default=False, help="mixed precision")
    add("--amp-dtype", default="float16", choices=["float16", "bfloat16"], help="float16 gets a loss scaler")
    add("--channels-last", default=False, help="memory layout of convolutions")
    add("--torchcompile", nargs="?", const="inductor", help="compile the model, with a backend")
    add("--torchcompile-mode", help="mode of torch.compile")
    add("--sync-bn", default=False, help="statistics of BatchNorm over all processes")
    add("--dist-bn", default="reduce", choices=["reduce", "broadcast", ""], help="running statistics after an epoch")
    add("--no-ddp-bb", default=False, help="do not broadcast buffers before forward")
    add("--fsdp", default=False, help="shard the weights (FSDP2)")
    add("--synchronize-step", default=False, help="wait for the device after each step")
    add("--threads", type=int, help="of torch on the CPU")
    add("--deterministic", default=False, help="only operations that give the same bits each time")
    add("--local-rank", "--local_rank", default=0, type=int, help=argparse.SUPPRESS)


def _optimizer(made: argparse.ArgumentParser) -> None:
    add = _group(made, "the optimizer")
    add("--opt", default="sgd", help="timm's, or mssam, msreg, msoptimsam, msoptimasam, …")
    add("--opt-kwargs", default={}, help="its own arguments, as rho=0.1")
    add("--opt-eps", type=float, help="ε of the optimizer")
    add("--opt-betas", type=float, nargs="+", help="β of the optimizer")
    add("--momentum", default=0.9, type=float, help="of the optimizer")
    add("--weight-decay", default=2e-5, type=float, help="not of biases and normalisers")
    add("--layer-decay", type=float, help="factor on the learning rate from layer to layer")
    add("--layer-decay-min-scale", default=0.0, type=float, help="smallest of those factors")
    add("--layer-decay-no-opt-scale", type=float, help="layers with a smaller factor are frozen")
    add("--clip-grad", type=float, help="of the gradient that is descended along")
    add("--clip-mode", default="norm", choices=["norm", "value", "agc"], help="norm, value or adaptive (agc)")
    add("--grad-accum-steps", default=1, type=int, help="micro-batches of a step; each pass of SAM takes all of them")


def _schedule(made: argparse.ArgumentParser) -> None:
    add = _group(made, "the learning rate")
    add("--lr", type=float, help="default: --lr-base, scaled by the batch size")
    add("--lr-base", default=0.1, type=float, help="learning rate for --lr-base-size images a step")
    add("--lr-base-size", default=256, type=int, help="images a step that --lr-base is for")
    add("--lr-base-scale", default="", choices=["", "linear", "sqrt"], help="default: by the optimizer's name")
    add("--sched", default="cosine", help="timm's schedule: cosine, step, multistep, poly, plateau, none, …")
    add("--sched-on-updates", default=False, help="after every step, not every epoch")
    add("--epochs", default=300, type=int, help="epochs of the schedule")
    add("--epoch-repeats", default=0.0, type=float, help="of streams")
    add("--start-epoch", type=int, help="begin with this epoch, whatever the checkpoint says")
    add("--warmup-epochs", default=5, type=int, help="epochs of linear warm-up")
    add("--warmup-lr", default=1e-5, type=float, help="where it starts")
    add("--warmup-prefix", default=False, help="warming up comes before --epochs")
    add("--min-lr", default=0.0, type=float, help="where the schedule ends")
    add("--cooldown-epochs", default=0, type=int, help="epochs at --min-lr in the end")
    add("--patience-epochs", default=10, type=int, help="of plateau")
    add("--decay-epochs", default=90.0, type=float, help="of step: epochs between decays")
    add("--decay-milestones", default=[90, 180, 270], type=int, nargs="+", help="of multistep: epochs of decays")
    add("--decay-rate", "--dr", default=0.1, type=float, help="factor of each decay")
    add("--lr-noise", type=float, nargs="+", help="share of the schedule between which the rate is noisy")
    add("--lr-noise-pct", default=0.67, type=float, help="largest relative noise")
    add("--lr-noise-std", default=1.0, type=float, help="deviation of the noise")
    add("--lr-cycle-mul", default=1.0, type=float, help="factor on the length of each cycle")
    add("--lr-cycle-decay", default=0.5, type=float, help="factor on the rate after each cycle")
    add("--lr-cycle-limit", default=1, type=int, help="number of cycles")
    add("--lr-k-decay", default=1.0, type=float, help="k of k-decay (cosine, poly)")


def _augmentation(made: argparse.ArgumentParser) -> None:
    add = _group(made, "augmentation and the loss")
    add("--no-aug", default=False, help="none at all")
    add("--crop-padding", type=int, help="pixels around the image before a crop of its size (CIFAR: 4)")
    add("--cutout", default=0, type=int, help="side of a blank square in pixels (arXiv 1708.04552)")
    modes = ["pad", "rrc", "rkrc", "rkrr"]
    add("--train-crop-mode", choices=modes, help="pad (--crop-padding), or timm's: rrc, rkrc, rkrr")
    add("--scale", type=float, nargs="+", help="of timm's random resized crop (default where it is used: 0.08 1)")
    add("--ratio", default=[3 / 4, 4 / 3], type=float, nargs="+", help="aspect ratios of timm's random resized crop")
    add("--hflip", type=float, help="probability")
    add("--vflip", default=0.0, type=float, help="probability")
    add("--color-jitter", type=float, help="strength")
    add("--color-jitter-prob", type=float, help="probability")
    add("--grayscale-prob", type=float, help="probability")
    add("--gaussian-blur-prob", type=float, help="probability")
    add("--aa", help="AutoAugment or RandAugment, as timm's")
    add("--aug-repeats", default=0.0, type=float, help="how often an image is in a batch (arXiv 1901.09335)")
    add("--reprob", default=0.0, type=float, help="random erasing")
    add("--remode", default="pixel", choices=["pixel", "rand", "const"], help="what erased parts are filled with")
    add("--recount", default=1, type=int, help="most parts erased")
    add("--resplit", default=False, help="erase in the second half of a batch only")
    resizing = ["random", *RESIZING]
    add("--train-interpolation", default="random", choices=resizing, help="of resizing in training")
    add("--mixup", default=0.0, type=float, help="α")
    add("--cutmix", default=0.0, type=float, help="α")
    add("--cutmix-minmax", type=float, nargs="+", help="least and largest share of the area, instead of α")
    add("--mixup-prob", default=1.0, type=float, help="probability of either")
    add("--mixup-switch-prob", default=0.5, type=float, help="probability of cutmix where both are on")
    add("--mixup-mode", default="batch", choices=["batch", "pair", "elem"], help="one draw per batch, pair or image")
    add("--mixup-off-epoch", default=0, type=int, help="no mixing from this epoch; 0 = always")
    add("--smoothing", default=0.1, type=float, help="of labels")
    add("--bce-loss", default=False, help="binary cross-entropy, one class against the rest")
    add("--bce-sum", default=False, help="sum it over classes")
    add("--bce-target-thresh", type=float, help="soft targets above it are 1, others 0")
    add("--bce-pos-weight", type=float, help="weight of positive targets")


def _average(made: argparse.ArgumentParser) -> None:
    add = _group(made, "the moving average of the weights")
    add("--model-ema", default=False, help="keep one, and choose the best checkpoint by it")
    add("--model-ema-force-cpu", default=False, help="keep it on the CPU; it is not validated then")
    add("--model-ema-decay", default=0.9998, type=float, help="per step")
    add("--model-ema-warmup", default=False, help="less decay in the beginning")


def _run(made: argparse.ArgumentParser) -> None:
    add = _group(made, "the run")
    add("--seed", default=42, type=int, help="of weights, order and augmentation")
    add("--resume", default="", help="checkpoint, or the folder of a run; auto: this run's own, if there is one")
    add("--no-resume-opt", default=False, help="only the weights")
    add("--eval-metric", default="top1", choices=["top1", "top5", "loss"], help="of the best checkpoint")
    add("--val-interval", default=1, type=int, help="epochs between validations, each with a checkpoint")
    add("--sharpness-interval", default=0, type=int, help="epochs between measurements (0: none), with validation")
    add("--sharpness-samples", default=1000, type=int, help="training images it is measured on")
    add("--sharpness-columns", type=int, help="exact columns of each sample (default: all, which is exact)")


def _output(made: argparse.ArgumentParser) -> None:
    add = _group(made, "output")
    add("--output", default="", help="folder of all runs (default: output/train)")
    add("--experiment", default="", help="folder of this run in it (default: time, model and resolution)")
    add("--checkpoint-hist", default=10, type=int, help="checkpoints to keep")
    add("--log-interval", default=50, type=int, help="steps between lines")
    add("--log-tensorboard", default=False, help="if tensorboard is installed")
    add("--log-wandb", default=False, help="if wandb is installed")
    add("--wandb-project", help="its name there")
    add("--wandb-tags", default=[], nargs="+", help="tags there")
    add("--wandb-resume-id", default="", help="the run there to go on with")
    add("--traceback", default=False, help="show where an error comes from")
