r"""The weighted trace as a penalty: an unbiased estimate of Σ_p w_p c_p that can be differentiated.

One signed column s with E s sᵀ = P is sent to the outputs of the layers with a graph of its own, and
Σ_p w_p ‖sᵀ J_p‖² is formed there; a backward pass through all of it is the gradient of the penalty.  The column depends
on the probabilities, and that dependence is part of the gradient.

Source: derived from arXiv 2106.12612, Prop. 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..batch import Batch
from .evaluation import Statistics, evaluation
from .graph.backprop import deltas, find_layouts, no_layout
from .graph.tape import read_tape
from .losses.loss import Loss
from .losses.named_loss import loss_of
from .reading import finite_logits
from .request import trainable
from .rules.layers import contraction


def weighted_trace(
    model: nn.Module,
    batch: Batch,
    weights: Mapping[str, float],  # w_p
    generator: torch.Generator,
    statistics: Statistics = "training",
    loss: Loss | None = None,
) -> Tensor:
    r"""An unbiased, differentiable estimate of Σ_p w_p c_p from one signed column s, E s sᵀ = P.

    To be called inside :func:`~ms_optim.curvature.evaluation.evaluation`, where it may be differentiated with respect
    to the parameters.

    Args:
        model: The model.
        batch: The inputs.
        weights: Parameter name → w_p; what is missing or 0 is left out.
        generator: Draws the signs.
        statistics: As in :func:`ms_optim.hessian_trace`.
        loss: The loss; ``None`` for cross-entropy.

    Returns:
        A scalar in the graph of the parameters.

    Raises:
        CurvatureError: If a parameter is used where no curvature rule applies.
        DataError: If the logits are not ``[N, K]`` or not finite.
    """
    loss = loss_of("cross_entropy") if loss is None else loss
    # Fused attention kernels have no second derivative.
    with evaluation(model, statistics), sdpa_kernel(SDPBackend.MATH):
        logits = finite_logits(batch.logits(model), None, loss)
        samples = logits.shape[0]
        wanted = {name: p for name, p in trainable(model).items() if weights.get(name, 0.0) != 0.0}
        tape = read_tape(logits, wanted)
        uses = [use for found in tape.uses.values() for use in found]
        if not uses:
            return logits.new_zeros(())
        doubtful = [use for use in uses if use.node not in tape.layouts]
        layouts = dict(tape.layouts)
        for node, fitting in find_layouts(logits, doubtful).items():
            if not fitting:
                raise no_layout(next(use for use in uses if use.node is node), samples)
            layouts[node] = fitting[0]
        nodes = list(dict.fromkeys(use.node for use in uses))
        found = deltas(logits, nodes, loss.probe(logits, generator)[None], create_graph=True)
        at = dict(zip(nodes, found, strict=True))
        terms = []
        for name, each in tape.uses.items():
            rules = [contraction(use, layouts[use.node]) for use in each]
            if len(rules) == 1:
                terms.append(weights[name] * rules[0].squared_norm(at[rules[0].use.node]))
            elif rules:
                gradient = torch.stack([rule.gradients(at[rule.use.node]) for rule in rules]).sum(0)
                terms.append(weights[name] * gradient.square().sum())
        total = torch.stack(terms).sum()
        return total / samples if loss.mean else total
