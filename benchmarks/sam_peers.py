"""Who else perturbs weights: the SAMs of other authors, loaded from checkouts of their repositories.

Three of them are one file in a repository and no package, so they come from a folder:

    davda54/sam            SAM                     sam.py
    SamsungLabs/ASAM       ASAM, SAM               asam.py
    moskomule/sam.pytorch  SAMSGD                  sam.py

``pytorch_optimizer`` (kozistr) is a package, and is there if it can be imported.  Nothing of theirs is copied here.

As subjects of :mod:`ms_optim.testing` each is driven as its authors say, and where they offer a function against a
known trouble, with it:

* davda54/sam: a gradient first, then ``step(closure)``; its README's lines for BatchNorm before each.
* SamsungLabs/ASAM: gradient, ``ascent_step``, gradient, ``descent_step``; what a loop saves, schedules and hooks is the
  base optimizer that it was given.
* moskomule/sam.pytorch: ``step(closure)``.
* pytorch_optimizer: SAM, FriendlySAM, LookSAM and BSAM have a gradient first, then ``step(closure)``; the first three
  with its functions for BatchNorm around the passes.  WSAM takes ``step(closure)`` alone, and GSAM one that returns a
  pair.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ms_optim.testing import Subject, euclidean
from ms_optim.testing.subject import Closure, Norm, Tensors

PYTORCH_OPTIMIZER = ("SAM", "FriendlySAM", "LookSAM", "WSAM", "GSAM", "BSAM")
Switches = tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any]]  # running statistics on, and off


def load_davda54(path: str | Path | None) -> type[Any] | None:
    """SAM of davda54/sam.

    Args:
        path: The folder of the checkout; ``None`` if there is none.

    Returns:
        The class, or ``None``.
    """
    return None if path is None else _loaded("davda54_sam", Path(path) / "sam.py").SAM


def load_davda54_running_stats(path: str | Path | None) -> Switches | None:
    """What davda54/sam's README puts around its two passes for BatchNorm.

    Args:
        path: The folder of the checkout; ``None`` if there is none.

    Returns:
        Its functions that enable and disable running statistics, or ``None``.
    """
    if path is None:
        return None
    module = _loaded("davda54_bypass_bn", Path(path) / "example" / "utility" / "bypass_bn.py")
    return module.enable_running_stats, module.disable_running_stats


def load_asam(path: str | Path | None) -> tuple[type[Any], type[Any]] | None:
    """ASAM and SAM of SamsungLabs/ASAM, in this order.

    Args:
        path: The folder of the checkout; ``None`` if there is none.

    Returns:
        The classes, or ``None``.
    """
    if path is None:
        return None
    module = _loaded("samsunglabs_asam", Path(path) / "asam.py")
    return module.ASAM, module.SAM


def load_moskomule(path: str | Path | None) -> type[Any] | None:
    """SAMSGD of moskomule/sam.pytorch.

    Args:
        path: The folder of the checkout; ``None`` if there is none.

    Returns:
        The class, or ``None``.
    """
    return None if path is None else _loaded("moskomule_sam", Path(path) / "sam.py").SAMSGD


def load_pytorch_optimizer() -> dict[str, type[Any]] | None:
    """The sharpness-aware optimizers of the package ``pytorch_optimizer``.

    Returns:
        Name → class, or ``None`` if the package is not installed.
    """
    try:
        module = importlib.import_module("pytorch_optimizer")
    except ModuleNotFoundError:
        return None
    return {name: getattr(module, name) for name in PYTORCH_OPTIMIZER if hasattr(module, name)}


def subjects(
    davda54: str | Path | None = None, asam: str | Path | None = None, moskomule: str | Path | None = None
) -> dict[str, Subject | None]:
    """The peers as subjects.

    Args:
        davda54: The folder of a checkout of davda54/sam.
        asam: The same, of SamsungLabs/ASAM.
        moskomule: The same, of moskomule/sam.pytorch.

    Returns:
        Name → subject; ``None`` for one that is not there.
    """
    package = load_pytorch_optimizer()
    found = [
        _davda54(load_davda54(davda54), load_davda54_running_stats(davda54)),
        *(_samsung(load_asam(asam))),
        _moskomule(load_moskomule(moskomule)),
        *(_of_package(name, package) for name in PYTORCH_OPTIMIZER),
    ]
    return {name: subject for name, subject in found}


def after_a_gradient(switches: Switches | None) -> Callable[[Any, nn.Module, Closure], Any]:
    """A step of an optimizer whose ``step(closure)`` makes the second pass only.

    Args:
        switches: What turns running statistics on and off; ``None`` to leave them alone.

    Returns:
        What drives it.
    """
    on, off = (lambda model: None,) * 2 if switches is None else switches

    def step(optimizer: Any, model: nn.Module, closure: Closure) -> Any:
        on(model)
        closure()
        off(model)
        return optimizer.step(closure)

    return step


def _davda54(kind: Any, switches: Switches | None) -> tuple[str, Subject | None]:
    """SAM of davda54/sam."""
    name = "davda54/sam SAM"

    def build(model: nn.Module, params: Any, base: Any, **options: Any) -> Any:
        return kind(params, base, **options)

    return name, None if kind is None else Subject(name, build, after_a_gradient(switches))


def _samsung(kinds: Any) -> list[tuple[str, Subject | None]]:
    """ASAM and SAM of SamsungLabs/ASAM."""
    names = ("SamsungLabs/ASAM ASAM", "SamsungLabs/ASAM SAM")
    if kinds is None:
        return [(name, None) for name in names]

    def maker(kind: Any) -> Callable[..., Any]:
        def build(model: nn.Module, params: Any, base: Any, rho: float, **options: Any) -> Any:
            return kind(base(params, **options), model, rho=rho)

        return build

    def step(minimizer: Any, model: nn.Module, closure: Closure) -> Any:
        loss = closure()
        minimizer.ascent_step()
        closure()
        minimizer.descent_step()
        return loss

    norms: tuple[Norm, Norm] = (_adaptive_norm, euclidean)
    no_step = {"a_step_returns_the_loss": "it has no step: the loop has the loss"}
    return [
        (
            name,
            Subject(
                name,
                maker(kind),
                step,
                options={"rho": rho},
                norm=norm,
                handle=lambda minimizer: minimizer.optimizer,
                excluded=no_step,
            ),
        )
        for name, kind, rho, norm in zip(names, kinds, (0.5, 0.05), norms, strict=True)
    ]


def _adaptive_norm(minimizer: Any, weights: Tensors, perturbation: Tensors) -> float:
    """‖T_w^{-1} ε‖ with T = |w| + η where the name holds "weight", 1 elsewhere: arXiv 2102.11600 and its code."""
    parts = [
        (e / (weights[name].abs() + minimizer.eta) if "weight" in name else e).square().sum()
        for name, e in perturbation.items()
    ]
    return math.sqrt(float(sum(parts)))


def _moskomule(kind: Any) -> tuple[str, Subject | None]:
    """SAMSGD of moskomule/sam.pytorch, whose ρ must be above 0."""
    name = "moskomule/sam.pytorch SAMSGD"

    def build(model: nn.Module, params: Any, base: Any, **options: Any) -> Any:
        return kind(params, **options)

    one_group = dict.fromkeys(
        ("an_empty_parameter_group_changes_nothing", "parameters_can_be_added_on_the_way", "a_group_keeps_its_radius"),
        "its README: one parameter group only",
    )
    return name, None if kind is None else Subject(name, build, off=None, bases=(torch.optim.SGD,), excluded=one_group)


def _of_package(which: str, package: dict[str, type[Any]] | None) -> tuple[str, Subject | None]:
    """One of the optimizers of ``pytorch_optimizer``."""
    name = f"pytorch_optimizer {which}"
    if package is None or which not in package:
        return name, None
    kind = package[which]
    module = importlib.import_module("pytorch_optimizer")
    guarded = after_a_gradient((module.enable_running_stats, module.disable_running_stats))

    def build(model: nn.Module, params: Any, base: Any, **options: Any) -> Any:
        return kind(params, base, **options)

    def build_wsam(model: nn.Module, params: Any, base: Any, **options: Any) -> Any:
        return kind(model, params, base, **options)

    def build_gsam(model: nn.Module, params: Any, base: Any, rho: float, alpha: float = 0.4, **options: Any) -> Any:
        inner = base(params, **options)
        constant = torch.optim.lr_scheduler.ConstantLR(inner, factor=1.0)
        radius = module.ProportionScheduler(constant, options["lr"], options["lr"], rho, rho)
        return kind(params, inner, model, radius, alpha=alpha)

    def build_bsam(model: nn.Module, params: Any, base: Any, lr: float, rho: float, **options: Any) -> Any:
        taken = {key: value for key, value in options.items() if key in ("maximize", "weight_decay")}
        return kind(params, num_data=1000, lr=lr, rho=rho, **taken)

    def step_of_pairs(optimizer: Any, model: nn.Module, closure: Closure) -> Any:
        def pair() -> tuple[None, Any]:
            with torch.enable_grad():  # as in the closures that its set_closure makes
                return None, closure()

        return optimizer.step(pair)[1]

    along_others = "it ascends along the gradient less its running average"
    made = {
        "SAM": Subject(name, build, guarded),
        "FriendlySAM": Subject(
            name,
            build,
            guarded,
            excluded={"the_ascent_is_the_steepest": along_others, "the_ascent_raises_the_loss": along_others},
        ),
        # It ascends in every tenth step only, and uses what it found in the others.
        "LookSAM": Subject(name, build, guarded, off={"rho": 0.0, "k": 1}, ascent=None, norm=None, last_gradient=False),
        "WSAM": Subject(name, build_wsam, last_gradient=False),
        "GSAM": Subject(
            name,
            build_gsam,
            step_of_pairs,
            off={"rho": 0.0, "alpha": 0.0},
            last_gradient=False,
            excluded={"a_negative_radius_is_refused": "its radius comes from a scheduler"},
        ),
        # Noise, ascent, descent: a gradient before, for the sizes of its state, and two in its step.
        "BSAM": Subject(
            name,
            build_bsam,
            after_a_gradient(None),
            off=None,
            bases=(),
            passes=3,
            ascent=None,
            norm=None,
            last_gradient=False,
            excluded=dict.fromkeys(
                (
                    *("groups_are_shared_after_loading", "a_scheduler_drives_the_descent"),
                    *("tied_weights_are_perturbed_once", "a_gradient_in_the_first_evaluation_only"),
                ),
                "it does not rest at lr=0 (see weights_are_restored_bitwise)",
            ),
        ),
    }
    return name, made[which]


def _loaded(name: str, file: Path) -> ModuleType:
    """The module in a file, under a name by which pickle finds its classes again."""
    if name in sys.modules and sys.modules[name].__file__ == str(file):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise FileNotFoundError(f"{file} is not there; give the folder of a checkout that holds {file.name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
