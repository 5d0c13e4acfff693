r"""timm: our optimizers in its registry, and all passes of SAM in its training loop, which stays as it is.

    train.py --device-modules ms_optim.integrations.timm --opt mssam --opt-kwargs rho=0.1 refresh_every=200 ...

Importing this file registers

    mssam             MSSAM                 mssamadamw            MSSAM around AdamW
    msoptimsam        SAM                   msoptimsamadamw       SAM around AdamW
    msoptimasam       ASAM (official)       msoptimasamadamw      ASAM around AdamW
    msreg             MSRegularizedSGD

and of the literature, each around SGD,

    msoptimsamon                SAMON                   msoptimsagm         SAGM *
    msoptimfriendlysam          FriendlySAM             msoptimstablesam    StableSAM *
    msoptimrsam                 RSAM                    msoptimgsam         GSAM *
    msoptimtracesam             TraceSAM                msoptimlooksam      LookSAM *
    msoptimrandomperturbation   RandomPerturbation      msoptimtiltedsam    TiltedSAM *
    msoptimweissi               WEISSI                  msoptimfrobsam      FrobSAM *
                                                        msoptimdetsam       DetSAM *

Those with an asterisk descend along a combination of several passes' gradients.  A loop that calls ``backward`` once
has only the last: they refuse it, and need explicit passes (which ``python -m ms_optim.train`` makes) or a closure.
SAMON finds the normalisation layers itself, and says so where a model has none.  Two are not here: BAR, which has to be
given its pairs of factors, and UniversalSAM, given a triple of functions that no command line can name (Frob and Det
are such triples).

Those without ``adamw`` are built around timm's ``sgd``, so with Nesterov momentum (``nesterov=False`` gives the
classical one).  About the names:

* None has an underscore.  timm's factory keeps what stands after the last one: asked for ``ms_sgd`` it returns plain
  SGD, without a word (for ``ms_sam`` and ``ms_reg`` it finds nothing).  :func:`create_optimizer` refuses them all.
* ``msoptim`` stands for this package: timm may have a ``sam`` or ``asam`` of its own one day.  A name that timm has
  taken is an error here, since registering it again would replace timm's optimizer.
* Where the learning rate comes from ``--lr-base``, timm scales it with the square root of the batch size if the name
  contains ``ada`` or ``lamb``, else linearly.  It looks for the letters anywhere, so a name may contain them by
  accident, as a class AdaptiveSAM around SGD would.  Ours contain ``ada`` where the base optimizer is AdamW and nowhere
  else, so they scale as their base does; a test holds it.

timm gives an optimizer nothing but groups of parameters, and a layer's weight and bias in different ones.  The model
shows itself in the first training forward (:mod:`~ms_optim.optim.binding`).  If it is a :class:`timm.task.TrainingTask`
that calls it, as in the training script since timm 1.0.23, the optimizer attaches itself to the task: a forward pass of
the task that is to be trained on makes all passes of SAM (:mod:`~ms_optim.optim.loss_loop`), under accumulation,
clipping, loss scaling and data parallelism as they are.  The task's average of the weights (``--model-ema``, since
1.0.27) is rescaled along with the weights; of averages elsewhere the optimizer cannot know (``register_rescale_hook``,
or ``rebalance="metric"``, which moves nothing).

In loops without a task, optimizers of one pass work as they are: ``msreg``, ``msoptimtracesam``,
``msoptimrandomperturbation``, ``msoptimweissi``, and every SAM, ASAM and MSSAM with ``ascent="momentum"`` or
``"previous"``.
"""

from __future__ import annotations

import weakref
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..curvature.parallel import unwrapped
from ..errors import OptimizerError
from ..optim import (
    ASAM,
    GSAM,
    MSSAM,
    RSAM,
    SAGM,
    SAM,
    SAMON,
    WEISSI,
    DetSAM,
    FriendlySAM,
    FrobSAM,
    LookSAM,
    MSRegularizedSGD,
    RandomPerturbation,
    SharpnessAware,
    StableSAM,
    TiltedSAM,
    TraceSAM,
    catalogue,
)
from ..optim.binding import LOSS_MODULES
from ..symmetry import Group
from ..symmetry.optimizer_state import STATE_EXPONENTS

try:
    # The last of these is not exported by timm.optim.
    from timm.optim._optim_factory import OptimInfo, create_optimizer_v2, default_registry
except ImportError as error:
    raise ImportError(
        f"timm {timm.__version__} does not keep its optimizers in timm.optim._optim_factory.default_registry, as "
        "releases since 1.0.15 do, so ours cannot be registered; build them directly, as ms_optim.MSSAM(model, ...)"
    ) from error

TASKS: tuple[type[nn.Module], ...] = ()
try:
    from timm.task.task import TrainingTask

    TASKS = (TrainingTask,)
except ImportError:  # before 1.0.23
    pass

_SGD = {"nesterov": True}  # as timm's own "sgd"
_ADAMW = {"base": torch.optim.AdamW}

_MSSAM = "sharpness-aware minimization at the representative with the smallest Hessian trace"
_SAM = "sharpness-aware minimization"
_ASAM = "adaptive sharpness-aware minimization"
_MSREG = "SGD on the loss plus its minimum sharpness, the smallest Hessian trace of all equivalent networks"

OPTIMIZERS: dict[str, tuple[type[SharpnessAware], dict[str, Any], str]] = {
    "mssam": (MSSAM, _SGD, _MSSAM),
    "mssamadamw": (MSSAM, _ADAMW, f"{_MSSAM}, around AdamW"),
    "msreg": (MSRegularizedSGD, _SGD, _MSREG),
    "msoptimsam": (SAM, _SGD, _SAM),
    "msoptimsamadamw": (SAM, _ADAMW, f"{_SAM}, around AdamW"),
    "msoptimasam": (ASAM, _SGD, _ASAM),
    "msoptimasamadamw": (ASAM, _ADAMW, f"{_ASAM}, around AdamW"),
}
_LITERATURE: tuple[type[SharpnessAware], ...] = (
    *(SAMON, FriendlySAM, RSAM, TraceSAM, RandomPerturbation, WEISSI),
    *(SAGM, StableSAM, GSAM, LookSAM, TiltedSAM, FrobSAM, DetSAM),
)
for _kind in _LITERATURE:
    _row = catalogue.OPTIMIZERS[_kind.__name__]
    _said = f"{_kind.__name__}: {_row.formula} (arXiv {_row.source.removeprefix('after ')})"
    OPTIMIZERS[f"msoptim{_kind.__name__.lower()}"] = (_kind, _SGD, _said)


def register(registry: Any = default_registry) -> None:
    """Register our optimizers; importing this file has done so for timm's own registry.

    Args:
        registry: A :class:`timm.optim.OptimizerRegistry`.

    Raises:
        OptimizerError: If one of the names belongs to another optimizer; none is registered then.
    """
    known = set(registry.list_optimizers())
    for name in known & set(OPTIMIZERS):
        kind, theirs = OPTIMIZERS[name][0], registry.get_optimizer_info(name).opt_class
        if theirs is not kind:
            raise OptimizerError(
                f"timm {timm.__version__} has an optimizer named {name!r} already ({theirs}), which is not to be "
                f"replaced; build ours directly, as ms_optim.{kind.__name__}(model, ...)"
            )
    for name, (kind, defaults, description) in OPTIMIZERS.items():
        if name not in known:
            adam = defaults is _ADAMW
            info = OptimInfo(
                name,
                kind,
                f"{description} (ms_optim)",
                has_eps=adam,
                has_momentum=not adam,
                has_betas=adam,
                defaults=dict(defaults),
            )
            registry.register(info)


def create_optimizer(model: nn.Module, opt: str, **options: Any) -> SharpnessAware:
    """``timm.optim.create_optimizer_v2`` for our optimizers, which then know their model from the beginning.

    So a refresh by hand is possible before the first step, and the model may be called with keyword arguments.

    Args:
        model: The model, or a :class:`timm.task.TrainingTask` (timm ≥ 1.0.27) that trains it, to which the optimizer is
            attached; wrapped for data parallelism or not.
        opt: One of the registered names.
        **options: As of ``create_optimizer_v2``: ``lr``, ``weight_decay``, ``layer_decay``, ``param_group_fn`` …, and
            the optimizer's own.

    Returns:
        The optimizer.

    Raises:
        ValueError: If it is none of the registered names.
    """
    if opt.lower() not in OPTIMIZERS:
        reason = "; of a name with an underscore timm would build what stands after it" if "_" in opt else ""
        raise ValueError(f"opt must be one of {', '.join(OPTIMIZERS)}, got {opt!r}{reason}")
    task: Any = model if isinstance(model, TASKS) else None
    trained = model if task is None else task.get_trainable_module()
    optimizer: Any = create_optimizer_v2(unwrapped(trained), opt, model=trained, **options)
    if task is not None:
        _rescale_average(optimizer, task)
        optimizer.attach(task)
    assert isinstance(optimizer, SharpnessAware)
    return optimizer


def _model_inside(optimizer: SharpnessAware, task: nn.Module) -> nn.Module:
    """The part of a task that owns all the parameters; its average is rescaled along."""
    _rescale_average(optimizer, task)
    wanted = {id(p) for p in optimizer.parameters()}
    parts = (part for part in task.children() if wanted <= {id(p) for p in part.parameters()})
    return next(parts, task)


def _rescale_average(optimizer: SharpnessAware, task: Any) -> None:
    """Whenever the weights are rescaled, rescale a task's average of them, if it has one by then."""
    found = weakref.ref(task)

    def rescale(group: Group, t: Tensor) -> None:
        average = getattr(found(), "trainable_module_ema", None)
        if average is not None:
            group.rescale_(unwrapped(average.module), t, clamp=True)

    optimizer.register_rescale_hook(rescale)


register()
for exponents in STATE_EXPONENTS.values():
    exponents["lookahead_slow_buff"] = 1  # of `lookahead_mssam`: weights, kept as state of our base optimizer
LOSS_MODULES.update(dict.fromkeys(TASKS, _model_inside))
