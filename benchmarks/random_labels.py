r"""Random labels: generalization gap against minimum sharpness and its rivals, over all runs and within each ratio.

Figures 2 and 4 of arXiv 2106.12612: networks that fit MNIST with a share of the labels permuted, the MLP
784-512-128-512-10 and LeNet.  The gap is the training accuracy, on the labels as they are trained on, minus that on the
10,000 test images.  A seed draws images, corruption, weights and the order of batches; its members differ in the ratio.

An overall τ is carried by the ratio: all that grows with the share of wrong labels is ordered as the gap is, whatever
happens among runs of one ratio.  So the ratio itself is a row of the table, and τ is given within each ratio as well.
The archive of the authors' code has, for minimum and normalised sharpness, 0.864 and 0.942 over all runs of the MLP
and 0.677 and 0.722 of LeNet; within a ratio most of that is gone.

Intervals: 95 %, by the jackknife over seeds (:mod:`benchmarks.ranks`).  Dead runs, with training accuracy at chance,
stay in the raw data and are counted; τ is given with and without them.

Scales.  ``paper`` is the published set-up (written, not run yet): all 60,000 images, batch 1024, momentum 0.9, weight
decay 1e-5, lr_t = lr/(1e-4 t + 1) per batch, 3,000 epochs from lr 0.1 for the MLP and 1,000 from 0.01 for LeNet, 11
ratios × 10 seeds.  ``cpu`` has fewer images and epochs, and smaller batches, that the labels are fitted all the same:

* MLP: 10,000 images, 300 epochs, 11 ratios × 10 seeds, lr as in the paper, batch 512 in the place of 1024.  With 1024
  there are only 3,000 steps: in a trial of ratios 0, 0.5 and 1 random labels were fitted to 87 % after 200 epochs and
  99.99 % after 300, and the network of ratio 0 died; with 512 all three were at 100 % from 230 epochs on.
  Products of matrices in training, and there alone, have factors in bfloat16 where the processor has instructions for
  it: twice as fast, and the labels are fitted.
* LeNet: 2,000 images, 70 epochs, 5 seeds and the 5 ratios of which the archive's τ within a ratio is known; batch 128
  and lr 0.02 in the place of 1024 and 0.01.  In trials of ratio 1 labels were fitted to 99.9 % after 50 to 60 epochs.

Measures: on the training images with the labels as trained on, weights as trained, float32, traces and diagonals exact
and over all images.  Three take a subset at ``cpu``: adaptive sharpness (elementwise, ρ = 0.5) and SAM's (ρ = 0.05),
each the worst case in ℓ2 by 10 steps on pieces of m = 128 of the first 1,024 images (LeNet: 512), and Rényi sharpness
(order 1.2) on the first 1,024 (LeNet: 128), of the Hessian as in its paper, of the Gauss-Newton matrix, which has no
negative eigenvalues, and as the mean over the weight matrices.  It has few probes and steps, and so a standard error
and an error of the quadrature, which the page shows.

    MS_OPTIM_DATA=... python -m benchmarks.random_labels       about three to four hours on one idle core
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ms_optim.sharpness import (
    Sharpness,
    adaptive_sharpness,
    fisher_rao_norm,
    minimum_sharpness,
    normalized_sharpness,
    renyi_sharpness,
    sam_sharpness,
)
from ms_optim.sweep import Trial

from . import networks, random_labels_page, trials
from .ensembles import Training, accuracy, corrupted, train

body, details, draw = random_labels_page.body, random_labels_page.details, random_labels_page.draw
in_short, summary = random_labels_page.in_short, random_labels_page.summary


@dataclass(frozen=True)
class Problem:
    """A network and how much is done with it.

    Attributes:
        network: Of :data:`benchmarks.networks.NETWORKS`.
        images: To train on, of those that there are.
        ratios: Shares of permuted labels.
        seeds: How many.
        training: How it is trained.
        together: Whether the members of a seed are trained in one ensemble, or one after another.
        chunk: Images in a batch of the exact measures.
        subset: Images of the searches for a worst perturbation.
        renyi: Images, probes and steps of Rényi sharpness.
        full: MNIST and the network itself, or random images and a tiny one.
        device: Where all is computed.
    """

    network: str
    images: int
    ratios: tuple[float, ...]
    seeds: int
    training: Training
    together: bool = True
    chunk: int = 1_000
    subset: int = 1_024
    renyi: tuple[int, int, int] = (1_024, 4, 12)
    full: bool = True
    device: str = "cpu"


TENTHS = tuple(i / 10 for i in range(11))
_TINY: dict[str, Any] = {"subset": 64, "renyi": (32, 2, 3), "chunk": 32, "full": False}
_GPU: dict[str, Any] = {"chunk": 4_096, "renyi": (10_000, 20, 15), "subset": 10_000, "device": "cuda"}
DEVICES = ("cpu", "cuda")
SCALES: dict[str, dict[str, Problem]] = {
    "smoke": {
        "MLP": Problem("mlp", 48, (0.0, 1.0), 2, Training(30, 16, 0.1), **_TINY),
        "LeNet": Problem("lenet", 48, (0.5,), 1, Training(5, 16, 0.1), together=False, **_TINY),
    },
    "cpu": {
        "MLP": Problem("mlp", 10_000, TENTHS, 10, Training(300, 512, 0.1, precision="medium")),
        "LeNet": Problem(
            *("lenet", 2_000, TENTHS[1::2], 5, Training(70, 128, 0.02)),
            together=False,  # grouped convolutions are slower than one network after another on a CPU
            chunk=250,
            subset=512,
            renyi=(128, 3, 8),
        ),
    },
    "paper": {
        "MLP": Problem("mlp", 60_000, TENTHS, 10, Training(3_000, 1_024, 0.1), **_GPU),
        "LeNet": Problem("lenet", 60_000, TENTHS, 10, Training(1_000, 1_024, 0.01), **_GPU),
    },
}


def measures(
    chunk: int, subset: int, renyi: Sequence[int]
) -> dict[str, Callable[[nn.Module, Tensor, Tensor], Sharpness]]:
    """What is measured of a network.

    Args:
        chunk: As in :class:`Problem`.
        subset: As there.
        renyi: As there.

    Returns:
        Name → measure of a network on images and labels. Tr H is beside the first, ``details["trace"]``.
    """

    def whole(measure: Callable[..., Sharpness], **options: Any) -> Callable[[nn.Module, Tensor, Tensor], Sharpness]:
        return lambda model, x, y: measure(model, list(zip(x.split(chunk), y.split(chunk), strict=True)), **options)

    def first(
        count: int, measure: Callable[..., Sharpness], **options: Any
    ) -> Callable[[nn.Module, Tensor, Tensor], Sharpness]:
        return lambda model, x, y: measure(model, (x[:count], y[:count]), **options)

    worst = functools.partial(first, subset, m=min(128, subset), steps=10)
    spectral = functools.partial(first, renyi[0], renyi_sharpness, probes=renyi[1], steps=renyi[2])
    return {
        "minimum, layer": whole(minimum_sharpness),
        "minimum, neuron": whole(minimum_sharpness, granularity="neuron"),
        "normalized": whole(normalized_sharpness),
        "Fisher–Rao": whole(fisher_rao_norm),
        "adaptive": worst(adaptive_sharpness, rho=0.5),
        "SAM": worst(sam_sharpness, rho=0.05),
        "Rényi": spectral(),
        "Rényi, Gauss-Newton": spectral(matrix="gauss-newton"),
    }


def measured(
    model: nn.Module, x: Tensor, y: Tensor, chunk: int, subset: int, renyi: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """All measures of a network.

    Args:
        model: The network.
        x: The images that it was trained on.
        y: The labels that it was trained on.
        chunk: As in :class:`Problem`.
        subset: As there.
        renyi: As there.

    Returns:
        ``values``, ``errors`` (standard errors, where there are some), ``seconds`` and ``notes``, by measure; a value
        that is not finite, or could not be had, is ``None``, and a note says why.
    """
    found: dict[str, dict[str, Any]] = {"values": {}, "errors": {}, "seconds": {}, "notes": {}}

    def keep(name: str, value: float, error: float | None = None) -> None:
        found["values"][name] = float(value) if math.isfinite(value) else None
        if error is not None and math.isfinite(error):
            found["errors"][name] = float(error)

    for name, measure in measures(chunk, subset, renyi).items():
        begun = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of dead networks; what matters is in the notes
                value = measure(model, x, y)
        except Exception as error:  # one measure of one dead network is not worth a seed's training
            keep(name, math.nan)
            found["notes"][name] = [f"{type(error).__name__}: {error}"[:200]]
            continue
        finally:
            found["seconds"][name] = round(time.perf_counter() - begun, 2)
        keep(name, value, value.standard_error)
        found["notes"] |= {name: [note[:200] for note in value.notes]} if value.notes else {}
        if name == "minimum, layer":
            keep("Tr H", value.details["trace"])
        if name.startswith("Rényi"):
            if name == "Rényi":  # a layer's Hessian is its Gauss-Newton matrix: all is piecewise linear in one layer
                keep(f"{name}, by layer", sum(value.layers.values()) / len(value.layers))
            found["errors"][f"{name}, steps"] = value.details["steps_error"]
    return found


def trained(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train all members of a seed, and measure each: the function of the sweep.

    Args:
        settings: The fields of a :class:`Problem`, and ``seed``.

    Returns:
        Means over the members, seconds, and ``members``: for each its ratio, accuracies, gap and measures.
    """
    torch.set_num_threads(1)
    device, full, seed = settings["device"], settings["full"], settings["seed"]
    (x, y), (test_x, test_y) = networks.mnist(full), networks.mnist(full, "t10k")
    draw_ = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(x), generator=draw_)[: settings["images"]]
    x, y = x[chosen].to(device), y[chosen]
    labels = torch.stack([corrupted(y, ratio, draw_) for ratio in settings["ratios"]]).to(device)
    network = networks.NETWORKS[settings["network"]]
    models = []
    for _ in settings["ratios"]:
        torch.manual_seed(seed)
        models.append((network.build if full else network.tiny)(10).to(device))
    training = Training(**settings["training"])
    begun = time.perf_counter()
    groups = [slice(None)] if settings["together"] else [slice(i, i + 1) for i in range(len(models))]
    for group in groups:
        train(models[group], x, labels[group], training, torch.Generator().manual_seed(seed))
    took = time.perf_counter() - begun
    test_x, test_y = test_x.to(device), test_y.to(device)
    members = []
    for ratio, model, mine in zip(settings["ratios"], models, labels, strict=True):
        train_accuracy, test_accuracy = accuracy(model, x, mine), accuracy(model, test_x, test_y)
        member = {"ratio": ratio, "train_accuracy": train_accuracy, "test_accuracy": test_accuracy}
        member["gap"] = train_accuracy - test_accuracy
        how = (settings[name] for name in ("chunk", "subset", "renyi"))
        members.append(member | measured(model, x, mine, *how))
    return {
        "train_accuracy": sum(member["train_accuracy"] for member in members) / len(members),
        "training_seconds": round(took, 1),
        "members": members,
    }


def plan(trainings: trials.Trainings) -> None:
    """All seeds of both networks; nothing is chosen.

    Args:
        trainings: Runs them.
    """
    wanted = []
    for name, problem in SCALES[trainings.scale].items():
        shared = asdict(problem)
        for seed in range(shared.pop("seeds")):
            wanted.append(Trial(shared | {"seed": seed}, "SGD", name, "fresh"))
    trainings(wanted)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring.

    Args:
        arguments: Of the command line; ``None``: the process's own.
    """
    trials.main(__doc__, "random_labels", "benchmarks.random_labels:trained", plan, arguments)


if __name__ == "__main__":
    main()
