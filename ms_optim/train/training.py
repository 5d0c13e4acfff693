"""Run: a whole training, from the options to the outcome.

Model, data, optimizer; epochs; a checkpoint after each validation; the test set once, in the end.  Everything random in
an epoch is seeded when the epoch begins, so a run that is resumed ends as if it had not been killed.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Mapping
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import CommandLineError
from ..optim.distributed import Ranks as WrappedRanks
from ..symmetry import ScaleGroup, scale_symmetries
from . import checkpoint
from .config import read_settings, write_args
from .epoch import Loop
from .evaluation import evaluate
from .loaders import Data, load
from .network import data_configuration, make_network, require_logits
from .optimizer import (
    decide_learning_rate,
    make_criterion,
    make_optimizer,
    make_scheduler,
    needs_group,
    ours,
)
from .order import Purpose, Ranks, seed_everything, streams
from .pipeline import mixing
from .preset import fill
from .process import Process, device_name, environment, process
from .progress import log_to, logger
from .record import Record, require_loggers
from .sharding import load_model, shard, spread, whole, whole_model
from .sharpness_log import SharpnessLog
from .steps import Steps

Outcome = dict[str, Any]


def run(settings: Mapping[str, Any]) -> Outcome:
    """Train once.

    Args:
        settings: Keys and values as in a recipe; ``config`` may name one that they are laid over.

    Returns:
        Numbers: ``validation_top1`` and so on of the epoch that was best on the held-out images, ``test_top1`` of the
        same weights, ``test_top1_last`` of the last ones, ``train_loss``, ``epochs``, ``best_epoch``, ``seconds``,
        ``images_per_second``, ``trace`` and ``minimum_sharpness`` (of the last measurement). What there was no data
        for is missing.

    Raises:
        CommandLineError: If a setting is unknown or wrong, or the data is not there.
        DivergedError: If the loss is not finite any more.
    """
    return train(read_settings(settings))


def train(options: argparse.Namespace, command: str = "") -> Outcome:
    """Train once.

    Args:
        options: As of :func:`~ms_optim.train.config.read_arguments`; what they leave open is filled in.
        command: How it was started, for ``result.json``.

    Returns:
        As of :func:`run`.

    Raises:
        CommandLineError: If an option is wrong, or the data is not there.
        DivergedError: If the loss is not finite any more.
    """
    for module in options.device_modules or ():
        import_module(module)
    fill(options)
    # The streams of the caller are as before afterwards: seed_everything seeds them for the run.
    with process(options) as here, streams(Purpose.EVERYTHING, options.seed, device=here.device):
        if here.primary:
            require_loggers(options)
        folder, resumed = here.of_primary(_place(options) if here.primary else None)
        begun = folder.exists()
        if here.primary:
            folder.mkdir(parents=True, exist_ok=True)
        with log_to(folder, here.primary):
            try:
                training = Training(options, here, folder, resumed)
            except BaseException:
                if here.primary and not begun:
                    shutil.rmtree(folder, ignore_errors=True)  # nothing has begun, and nothing is to be left of it
                raise
            try:
                return training.run(command)
            finally:
                training.close()


def _place(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """The folder of the run, and the checkpoint that it goes on from."""
    above = Path(options.output or "output/train")
    folder = above / options.experiment if options.experiment else None
    path = checkpoint.checkpoint_to_resume(options.resume, folder)
    if folder is None and path is not None:
        folder = path.parent
    if folder is None:
        name = options.model.replace("/", "_").replace(":", "_")
        folder = above / f"{datetime.now().strftime('%Y%m%d-%H%M%S')}-{name}-{(options.input_size or ['model'])[-1]}"
    last = folder / f"last{checkpoint.ENDING}"
    if path is None and last.exists():
        raise CommandLineError(
            f"{folder} holds a run already; --resume auto goes on with it, another --experiment begins a new one"
        )
    return folder, path


class Training:
    """A training with all its parts.

    Args:
        options: The options; what they leave open is filled in.
        here: This process.
        folder: Where results go.
        resumed: The checkpoint to go on from.
    """

    def __init__(self, options: argparse.Namespace, here: Process, folder: Path, resumed: Path | None) -> None:
        self.options, self.here, self.folder = options, here, folder
        self.record: Record | None = None
        self.seconds, self.start = 0.0, 0
        device = here.device
        seed_everything(options.seed, -1, 0)  # the same weights on all ranks
        self.model = make_network(options)
        configuration = data_configuration(options, self.model)
        options.num_classes = require_logits(self.model, options, configuration["input_size"])
        self.model.to(device)
        if options.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if options.sync_bn and (not here.distributed or device.type == "cpu"):
            raise CommandLineError("--sync-bn is for several processes with a GPU each; leave it out")
        if options.sync_bn:
            from timm.layers import convert_sync_batchnorm

            self.model = convert_sync_batchnorm(self.model)
        keys = ("input_size", "mean", "std", "interpolation", "crop_pct")
        self.data: Data = load(
            options,
            **{key: configuration[key] for key in keys},
            num_classes=options.num_classes,
            device=device,
            ranks=Ranks(here.rank, here.world),
        )
        content = None if resumed is None else checkpoint.read(resumed)
        if content is not None and not options.no_resume_opt:
            _keep_settings(options, content.get("args"))
        decide_learning_rate(options, here.world)
        self.sharpness = None
        if options.sharpness_interval:
            images, _ = self.data.sample(options.sharpness_samples)
            self.sharpness = SharpnessLog(self.model, images, options.sharpness_columns)
        group = self._sharded() if options.fsdp else None
        self.optimizer = make_optimizer(self.model, options, group)
        if content is not None:
            self._load(content)
        self.average = self._average(content)
        self.loop = self._loop()
        self.best_is_less = self.data.validation is None or options.eval_metric == "loss"
        updates = self.loop.updates
        self.loop.scheduler, self.epochs = make_scheduler(self.optimizer, options, updates, self.best_is_less)
        if content is not None:
            self._go_on(content)
        self._open(content, resumed)

    def _sharded(self) -> ScaleGroup | None:
        """Shard the model, having read its symmetries first: a sharded model cannot be read."""
        group = scale_symmetries(self.model, self.data.sample(2)[0]) if needs_group(self.options) else None
        shard(self.model, self.here.device, self.here.world)
        return group

    def _load(self, content: Mapping[str, Any]) -> None:
        """Weights and optimizer of a checkpoint."""
        load_model(self.model, content["state_dict"])
        if not self.options.no_resume_opt:
            parameters = [p for entry in self.optimizer.param_groups for p in entry["params"]]
            self.optimizer.load_state_dict(spread(content["optimizer"], parameters))

    def _average(self, content: Mapping[str, Any] | None) -> Any:
        """timm's moving average of the weights; rescaled whenever the weights are."""
        if not self.options.model_ema:
            return None
        from timm.utils import ModelEmaV3

        average = ModelEmaV3(
            self.model,
            decay=self.options.model_ema_decay,
            use_warmup=self.options.model_ema_warmup,
            device="cpu" if self.options.model_ema_force_cpu else None,
        )
        if content is not None and "state_dict_ema" in content:
            average.module.load_state_dict(content["state_dict_ema"])
        inner = ours(self.optimizer)
        if inner is not None:
            inner.register_rescale_hook(lambda group, t: group.rescale_(average.module, t, clamp=True))
        return average

    def _loop(self) -> Loop:
        """The epochs' loop, with the model as it is called: compiled, and in DistributedDataParallel."""
        options, here = self.options, self.here
        called: nn.Module = self.model
        if options.torchcompile:
            compiled: Any = torch.compile(called, backend=options.torchcompile, mode=options.torchcompile_mode)
            called = compiled
        if here.distributed and not options.fsdp:
            ids = [here.device] if here.device.type == "cuda" else None
            called = DistributedDataParallel(called, device_ids=ids, broadcast_buffers=not options.no_ddp_bb)
            inner = ours(self.optimizer)
            if inner is not None:  # which has to keep the wrapper from averaging what each rank has for itself
                inner.ranks = WrappedRanks([*inner.ranks.modules, called], inner.ranks.choice)
        arguments = mixing(options, options.num_classes)
        criterion = make_criterion(options, arguments is not None).to(here.device)
        steps = Steps(called, self.optimizer, criterion, options, here)
        return Loop(steps, self.model, self.data.train, options, here, None, self.average, _mixup(arguments))

    def _go_on(self, content: Mapping[str, Any]) -> None:
        """Epoch, learning rate and loss scale of a checkpoint."""
        options, scheduler, scaler = self.options, self.loop.scheduler, self.loop.steps.scaler
        self.start = content["epoch"] + 1
        own = content.get("run", {})
        self.seconds = own.get("seconds", 0.0)
        if not options.no_resume_opt:
            if scaler is not None and "amp_scaler" in content:
                scaler.load_state_dict(content["amp_scaler"])
            if own.get("plateau") is not None and hasattr(scheduler, "lr_scheduler"):
                scheduler.lr_scheduler.load_state_dict(own["plateau"])
                scheduler.restore_lr = own.get("restore_lr")  # the rates beneath the noise
                for entry, saved in zip(self.optimizer.param_groups, content["optimizer"]["param_groups"], strict=True):
                    entry["lr"] = saved["lr"]  # the one schedule that does not follow from the epoch
        if own and own["world"] != self.here.world:
            logger.info("resumed with %d processes instead of %d: other batches", self.here.world, own["world"])

    def _open(self, content: Mapping[str, Any] | None, resumed: Path | None) -> None:
        """Open the run's folder, and set the learning rate of the first epoch."""
        options, scheduler = self.options, self.loop.scheduler
        if options.start_epoch is not None:
            self.start = options.start_epoch
        if scheduler is not None and self.start and not hasattr(scheduler, "lr_scheduler"):
            if options.sched_on_updates:
                scheduler.step_update(self.start * self.loop.updates)
            else:
                scheduler.step(self.start, None if content is None else content.get("metric"))
        if not self.here.primary:
            return
        self.saver = checkpoint.Saver(self.folder, self.best_is_less, options.checkpoint_hist)
        self.record = Record(self.folder, options)
        if content is not None and resumed is not None:
            if self.start > content["epoch"]:
                self.saver.resume(content, resumed)
            self.record.load(content.get("run", {}), self.start)
            _say_differences(options, content.get("args"))
        write_args(options, self.folder / "args.yaml")
        count = sum(p.numel() for p in self.model.parameters())
        logger.info("model: %s, %s parameters", options.model, f"{count:,}")
        logger.info("data: %s", self.data.description)
        settings = {"lr": options.lr, "weight_decay": options.weight_decay, **options.opt_kwargs}
        told = ", ".join(f"{key} {value}" for key, value in settings.items())
        logger.info("optimizer: %s (%s), %s", options.opt, type(self.optimizer).__name__, told)
        on = f"{self.here.world} × {device_name(self.here.device)}"
        logger.info("epochs: %d to %d, on %s, results in %s", self.start, self.epochs, on, self.folder)

    def run(self, command: str) -> Outcome:
        """Train to the end, test, and write the result.

        Args:
            command: How it was started.

        Returns:
            As of :func:`run`.
        """
        options, found = self.options, dict[str, float]()
        begin = time.perf_counter()
        before = self.seconds
        for epoch in range(self.start, self.epochs):
            seed_everything(options.seed, epoch, self.here.rank)
            self.data.train.set_epoch(epoch)
            found = self.loop.run(epoch, self.epochs)
            self._same_statistics()
            self.seconds = before + time.perf_counter() - begin
            if self._is_due(epoch, options.val_interval) or self._is_due(epoch, options.sharpness_interval):
                self._validate(epoch, found)
            elif self.loop.scheduler is not None:
                self.loop.scheduler.step(epoch + 1, None)
        outcome = self._tested()
        self.seconds = before + time.perf_counter() - begin
        outcome |= {"epochs": self.epochs, "seconds": self.seconds}
        if self.record is not None:
            self._finish(outcome, command)
        self.here.wait()
        return outcome if self.here.primary else {}

    def _is_due(self, epoch: int, interval: int) -> bool:
        """Whether something is done after an epoch that is done every so many epochs (0: never), and after the last."""
        return interval > 0 and ((epoch + 1) % interval == 0 or epoch + 1 == self.epochs)

    def _same_statistics(self) -> None:
        """Running statistics of BatchNorm, the same on all ranks."""
        options, here = self.options, self.here
        if here.distributed and options.dist_bn and not options.sync_bn:
            from timm.utils import distribute_bn

            # An average on the CPU is not validated, and NCCL knows no CPU.
            shared = self.average is not None and not options.model_ema_force_cpu
            for model in (self.model, *([self.average.module] if shared else [])):
                distribute_bn(model, here.world, options.dist_bn == "reduce")

    def _validate(self, epoch: int, trained: Mapping[str, float]) -> None:
        """Evaluate, set the next learning rate, write tables and checkpoint."""
        options, scheduler = self.options, self.loop.scheduler
        row = {"epoch": epoch, "train_loss": trained["loss"]}
        metric = trained["loss"]
        if self.data.validation is not None:
            evaluated = self._evaluate(self.model, self.data.validation)
            if self.average is not None and not options.model_ema_force_cpu:
                row |= {f"eval_{key}_plain": value for key, value in evaluated.items()}
                evaluated = self._evaluate(self.average.module, self.data.validation)
            row |= {f"eval_{key}": value for key, value in evaluated.items()}
            metric = evaluated[options.eval_metric]
        row |= {"lr": self.loop.learning_rate(), "images_per_second": trained["images_per_second"]}
        row["seconds"] = self.seconds
        rows = []
        if self.sharpness is not None and self._is_due(epoch, options.sharpness_interval):
            measured = self.sharpness.measure(self.model, epoch)
            row |= {"trace": measured.trace, "minimum_sharpness": measured.minimum}
            rows = measured.rows
        if scheduler is not None:
            scheduler.step(epoch + 1, metric)
        content = self._content()  # sharded weights are put together by all ranks
        if self.record is not None:
            self.record.add(row)
            self.record.sharpness += rows
            content["run"]["summary"], content["run"]["sharpness"] = self.record.state().values()
            self.saver.save(content, epoch, metric)
            self.record.write()
            told = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "epoch")
            logger.info("epoch %d/%d: %s", epoch, self.epochs, told)

    def _evaluate(self, model: nn.Module, split: Any) -> dict[str, float]:
        return evaluate(model, split, self.here, self.loop.steps.autocast, self.options.channels_last)

    def _content(self) -> dict[str, Any]:
        """All that the run needs to go on; the rows and the saver's books come with the writing."""
        scheduler, scaler = self.loop.scheduler, self.loop.steps.scaler
        plateau = getattr(scheduler, "lr_scheduler", None)
        content = {
            "arch": self.options.model,
            "args": argparse.Namespace(**vars(self.options)),
            "state_dict": whole_model(self.model),
            "optimizer": whole(self.optimizer.state_dict()),
            "run": {
                "plateau": None if plateau is None else plateau.state_dict(),
                "restore_lr": getattr(scheduler, "restore_lr", None),
                "world": self.here.world,
                "seconds": self.seconds,
            },
        }
        if scaler is not None:
            content["amp_scaler"] = scaler.state_dict()
        if self.average is not None:
            content["state_dict_ema"] = self.average.module.state_dict()
        return content

    def _tested(self) -> Outcome:
        """The test set, for the last weights and for those that were best on the held-out images."""
        outcome: Outcome = {}
        last, best = self.epochs - 1, None
        if self.record is not None:
            rows = self.record.summary
            if rows:
                outcome["train_loss"] = rows[-1]["train_loss"]
                speeds = [row["images_per_second"] for row in rows]
                outcome["images_per_second"] = sum(speeds) / len(speeds)
            for key in ("trace", "minimum_sharpness"):
                found = [row[key] for row in rows if key in row]
                # Of a network whose symmetries cannot be read there is no minimum: not a number that has diverged.
                outcome |= {key: found[-1]} if found and not math.isnan(found[-1]) else {}
            best = self.saver.best_epoch if self.data.validation is not None else None
            chosen = next((row for row in rows if row["epoch"] == best), {})
            outcome |= {key.replace("eval_", "validation_"): value for key, value in chosen.items() if "eval_" in key}
        best = self.here.of_primary(best)
        if best is not None:
            outcome["best_epoch"] = best
        if self.data.test is None:
            return outcome
        average = self.average is not None and not self.options.model_ema_force_cpu
        model = self.average.module if average else self.model
        now = self._evaluate(model, self.data.test)
        outcome |= {f"test_{key}_last": value for key, value in now.items()}
        if best is not None and best != last:
            path = self.folder / f"model_best{checkpoint.ENDING}"
            content = checkpoint.read(path)
            plain = content["state_dict"]
            load_model(model, content.get("state_dict_ema", plain) if average else plain)  # an average may begin later
            now = self._evaluate(model, self.data.test)
        return outcome | {f"test_{key}": value for key, value in now.items()}

    def _finish(self, outcome: Outcome, command: str) -> None:
        """Write and say the result."""
        options = self.options
        config = getattr(options, "config", None)
        about = {
            "recipe": Path(config).stem if config else None,
            "command": command or None,
            "model": options.model,
            "opt": options.opt,
            "opt_kwargs": options.opt_kwargs,
            "seed": options.seed,
            "device": f"{self.here.world} × {device_name(self.here.device)}",
            "environment": environment(self.here.device),
        }
        assert self.record is not None
        self.record.finish(about | outcome)
        for key, value in outcome.items():
            logger.info("%s: %.6g", key, value if value is not None else math.nan)

    def close(self) -> None:
        """Let go of what was opened."""
        if self.record is not None:
            self.record.close()


def _mixup(arguments: Mapping[str, Any] | None) -> Any:
    """timm's mixup and cutmix, for batches that the loader does not mix."""
    if arguments is None:
        return None
    from timm.data import Mixup

    return Mixup(**arguments)


#: Options that are in an optimizer's state, which replaces what they say when it is loaded.
_OF_OPTIMIZER = (
    *("opt", "opt_kwargs", "opt_eps", "opt_betas", "momentum", "weight_decay", "lr"),
    *("layer_decay", "layer_decay_min_scale", "layer_decay_no_opt_scale"),
)


def _keep_settings(options: argparse.Namespace, before: argparse.Namespace | None) -> None:
    """Refuse settings that the checkpoint's would replace without a word; a rate that is not given is its own."""
    old = {} if before is None else vars(before)
    if options.lr is None:
        options.lr = old.get("lr")
    changed = [key for key in _OF_OPTIMIZER if key in old and old[key] != getattr(options, key)]
    if changed:
        told = ", ".join(f"--{key.replace('_', '-')} {getattr(options, key)} (was {old[key]})" for key in changed)
        raise CommandLineError(
            f"{told}: a resumed optimizer goes on with the settings of its checkpoint; leave them as they were, or add "
            "--no-resume-opt, which resumes the weights alone"
        )


def _say_differences(options: argparse.Namespace, before: argparse.Namespace | None) -> None:
    """Say which options are not those of the checkpoint."""
    old = {} if before is None else vars(before)
    silent = ("resume", "output", "experiment", "config", "data_dir", "log_interval", "workers", "device")
    changed = [key for key, value in vars(options).items() if key in old and old[key] != value and key not in silent]
    told = ", ".join(f"{key} {old[key]} → {getattr(options, key)}" for key in changed)
    logger.info("resumed%s", f"; other options than before: {told}" if told else "")
