"""The trainings of the demo: one is a model, an optimizer, a start and a seed, and its outcome is a few numbers.

All that an optimizer sees (data, initial weights, order of batches, rescaling) follows from the seed alone, so two runs
of one seed differ by their optimizer or by their start and by nothing else.
"""

from __future__ import annotations

import copy
import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ms_optim
from ms_optim import models

BATCH = 50
TRAINING_IMAGES = 1000
STARTS = ("usual", "rescaled")

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": models.digits_mlp,
    "resnet": models.small_resnet,
}

BASE: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}

# ρ or λ of each optimizer, for both starts alike: what was best from the usual start on other seeds
# (benchmarks/results/choosing; a test compares).
TUNED: dict[str, dict[str, float]] = {
    "mlp": {"SAM": 0.4, "ASAM": 2.0, "MSSAM": 0.4, "MSRegularizedSGD": 0.01},
    "resnet": {"SAM": 0.4, "ASAM": 2.0, "MSSAM": 0.4, "MSRegularizedSGD": 0.001},
}

OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "SGD": lambda model, _: torch.optim.SGD(model.parameters(), **BASE),
    "SAM": lambda model, rho: ms_optim.SAM(model, torch.optim.SGD, rho=rho, **BASE),
    "ASAM": lambda model, rho: ms_optim.ASAM(model, torch.optim.SGD, rho=rho, **BASE),
    "MSSAM": lambda model, rho: ms_optim.MSSAM(model, torch.optim.SGD, rho=rho, **BASE),
    "MSRegularizedSGD": lambda model, strength: ms_optim.MSRegularizedSGD(model, strength=strength, **BASE),
}


@dataclass(frozen=True)
class Run:
    """One training: everything it depends on."""

    model: str
    optimizer: str
    start: str
    seed: int
    epochs: int
    scale: float
    label_noise: float

    def __str__(self) -> str:
        return f"{self.model}, {self.optimizer}, {self.start} start, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What one training gave; measures are those of the loss on all training images, in eval mode.

    Attributes:
        run: Its description.
        test_accuracy: On the images held out.
        train_accuracy: On the training images, with the labels it was trained on.
        trace: Tr H, summed over the parameters, after training.
        sharpness_before: Minimum sharpness of the start.
        sharpness_after: Minimum sharpness after training.
        start_layers: Trace of each parameter at the start.
        balanced_layers: The same with the start's weights moved to the balanced representative, measured there.
    """

    run: Run
    test_accuracy: float
    train_accuracy: float
    trace: float
    sharpness_before: float
    sharpness_after: float
    start_layers: dict[str, float]
    balanced_layers: dict[str, float]


@dataclass(frozen=True)
class Digits:
    """Images ``[N, 1, 8, 8]`` in units of the training pixels' standard deviation, and labels ``[N]``."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def digits(seed: int, label_noise: float = 0.0) -> Digits:
    """Split the handwritten digits, standardise them, and redraw a share of the training labels uniformly.

    Args:
        seed: Of the split and of the noise.
        label_noise: Share of the training labels that are redrawn (a tenth of those stay right by chance).

    Returns:
        Training and test set.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    x = torch.tensor(pixels, dtype=torch.get_default_dtype()).view(-1, 1, 8, 8)[order]
    y = torch.tensor(labels, dtype=torch.long)[order]
    train, test = slice(None, TRAINING_IMAGES), slice(TRAINING_IMAGES, None)
    # One mean and deviation for all pixels: some pixels at the border are always blank.
    x = (x - x[train].mean()) / x[train].std()
    y_train = y[train].clone()
    noisy = torch.rand(TRAINING_IMAGES, generator=generator) < label_noise
    y_train[noisy] = torch.randint(10, (int(noisy.sum()),), generator=generator)
    return Digits(x[train], y_train, x[test], y[test])


@functools.cache
def symmetries(model: str) -> ms_optim.ScaleGroup:
    """The scale group of a model; it depends on the graph alone, so each process finds it once."""
    return ms_optim.scale_symmetries(MODELS[model](), torch.zeros(2, 1, 8, 8))


def initial(run: Run) -> nn.Module:
    """The network a run starts from: drawn by the seed, and moved along its scale group if the run says so."""
    torch.manual_seed(run.seed)
    model = MODELS[run.model]()
    if run.start == "rescaled":
        group = symmetries(run.model)
        t = group.random(std=run.scale, generator=torch.Generator().manual_seed(run.seed))
        group.rescale_(model, group.bound(model, t))
    return model


def epochs(data: Digits, seed: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The batches of one epoch after another, each epoch in an order of its own, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data.y), generator=generator)
        yield [(data.x[index], data.y[index]) for index in order.split(BATCH)]


def optimizer_for(name: str, model: str, network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of that name on the network, with the setting for that model."""
    return OPTIMIZERS[name](network, TUNED[model].get(name, 0.0))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """One step of any of the optimizers: the closure is all that they need."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]  # torch asks for a float, and documents a tensor


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the images whose largest logit is their label's; 0 where logits are not finite."""
    logits = model.eval()(x)
    return float((logits.argmax(1).eq(y) & logits.isfinite().all(1)).double().mean())


def train(run: Run) -> Outcome:
    """Train once and measure before and after, with a progress bar of the epochs.

    Args:
        run: What to train.

    Returns:
        Accuracies, traces and minimum sharpness.
    """
    from tqdm import tqdm

    data = digits(run.seed, run.label_noise)
    group = symmetries(run.model)
    model = initial(run)
    start_layers = ms_optim.hessian_trace(model.eval(), data.x)
    balanced = copy.deepcopy(model)
    before = ms_optim.rebalance_(balanced, data.x, group=group).minimum_sharpness
    balanced_layers = ms_optim.hessian_trace(balanced, data.x)

    optimizer = optimizer_for(run.optimizer, run.model, model.train())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.epochs)
    batches = epochs(data, run.seed)
    for _ in tqdm(range(run.epochs), desc=str(run), unit="epoch", position=_bar, leave=False):
        for x, y in next(batches):
            step(model, optimizer, x, y)
        scheduler.step()

    traces = ms_optim.hessian_trace(model.eval(), data.x)
    return Outcome(
        run,
        test_accuracy=accuracy(model, data.x_test, data.y_test),
        train_accuracy=accuracy(model, data.x, data.y),
        trace=traces.total,
        sharpness_before=before,
        sharpness_after=ms_optim.balance(model, traces, group).minimum_sharpness,
        start_layers=dict(start_layers),
        balanced_layers=dict(balanced_layers),
    )


def relative_seconds(model: str, optimizers: Sequence[str], steps_per_block: int, blocks: int) -> dict[str, float]:
    """Time of a step relative to SGD's, side by side in one process and on one thread.

    The optimizers take turns step by step, so that a slow moment of the machine falls on all of them. A block is as
    long as the default ``refresh_every``, so each holds one refresh; the first step, which discovers, is left out.

    Args:
        model: Key of ``MODELS``.
        optimizers: Keys of ``OPTIMIZERS``; SGD is always timed.
        steps_per_block: Steps whose mean is one measurement.
        blocks: Measurements.

    Returns:
        Median over the blocks of (mean seconds per step) / (that of SGD), for each optimizer.
    """
    data = digits(seed=0)
    x, y = data.x[:BATCH], data.y[:BATCH]
    torch.manual_seed(0)
    networks = {name: MODELS[model]() for name in dict.fromkeys(["SGD", *optimizers])}
    made = {name: optimizer_for(name, model, network) for name, network in networks.items()}
    for name, network in networks.items():
        step(network, made[name], x, y)
    ratios: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(blocks):
        seconds = dict.fromkeys(networks, 0.0)
        for _ in range(steps_per_block):
            for name, network in networks.items():
                begin = time.perf_counter()
                step(network, made[name], x, y)
                seconds[name] += time.perf_counter() - begin
        for name in networks:
            ratios[name].append(seconds[name] / seconds["SGD"])
    return {name: statistics.median(values) for name, values in ratios.items()}


_bar = 1  # line of this process's bar below the one of the whole; _start_worker gives each worker its own


def _start_worker(lock: Any, started: Any) -> None:
    """Prepare a worker process: one thread, and a line of its own for its progress bar."""
    from tqdm import tqdm

    global _bar
    torch.set_num_threads(1)  # as many processes as cores; more threads would only wait for each other
    tqdm.set_lock(lock)
    with started.get_lock():
        started.value += 1
        _bar = started.value


def train_all(runs: Sequence[Run], workers: int) -> list[Outcome]:
    """Train all runs, with a progress bar for the whole and one per worker.

    Args:
        runs: What to train.
        workers: Number of processes; 0 trains in this one.

    Returns:
        The outcomes, in the order of the runs.
    """
    from tqdm import tqdm

    if workers == 0:
        return [train(run) for run in tqdm(runs, desc="all runs", unit="run")]
    # Not by fork: a process forked after torch has started its threads can hang.
    context = multiprocessing.get_context("spawn")
    tqdm.set_lock(context.RLock())
    settings = (tqdm.get_lock(), context.Value("i", 0))
    with ProcessPoolExecutor(workers, context, _start_worker, settings) as pool:
        futures = [pool.submit(train, run) for run in runs]
        try:
            for future in tqdm(as_completed(futures), total=len(runs), desc="all runs", unit="run"):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]
