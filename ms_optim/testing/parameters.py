"""Parameters: tied, absent, sparse, added on the way; and numbers that no optimizer can mean."""

from __future__ import annotations

import torch
from torch import nn

from . import networks
from .definition import NORM_TOLERANCE, settled
from .driver import Training, base_options, copies
from .law import applies, law, moved, require, require_close, stepped
from .subject import Subject


@law
def tied_weights_are_perturbed_once(subject: Subject) -> None:
    """A weight that two layers share is one weight: perturbed once, restored."""
    training, batches = settled(subject, networks.tied(), 2, lr=0.0)
    before = training.weights()
    for batch in batches:
        training.step(batch)
        require_close(training.weights(), before, "weight", "itself before a step at lr=0")
        if subject.norm is not None and subject.ascent is not None:
            seen = training.evaluations[subject.ascent].weights
            found = subject.norm(training.built, before, {name: seen[name] - before[name] for name in before})
            right = abs(found - subject.radius) <= NORM_TOLERANCE * subject.radius
            require(right, f"the perturbation has norm {found:.10g}; expected rho={subject.radius}")
    tied = training.model
    assert isinstance(tied, nn.Sequential)
    require(tied[0].weight is tied[2].weight, "the layers share no weight any more")


@law
def an_empty_parameter_group_changes_nothing(subject: Subject) -> None:
    """A parameter group without parameters, as a filter may leave one, changes nothing."""
    model, twin = networks.mlp(), networks.mlp()
    twin.load_state_dict(model.state_dict())
    batches = networks.batches(model, 3)
    plain = Training(subject, model, params=[{"params": list(model.parameters())}]).run(batches, seed=1)
    groups = [{"params": []}, {"params": list(twin.parameters())}]
    found = Training(subject, twin, params=groups).run(batches, seed=1)
    require_close(found.weights(), plain.weights(), "weight", "that without the empty group")


@law
def sparse_gradients_are_gradients(subject: Subject) -> None:
    """A sparse gradient does what the same gradient does when it is dense."""
    sparse, dense = networks.Embedded(sparse=True), networks.Embedded(sparse=False)
    dense.load_state_dict(sparse.state_dict())
    batches = networks.batches(dense, 3)
    before = copies(dict(sparse.named_parameters()))
    expected = Training(subject, dense).run(batches, seed=1)
    found = Training(subject, sparse).run(batches, seed=1)
    require("words.weight" in stepped(found.weights(), before), "the word vectors have not moved; expected steps")
    require_close(found.weights(), expected.weights(), "weight", "that of the dense gradient")


@law
def parameters_can_be_added_on_the_way(subject: Subject) -> None:
    """Parameters of a group that is added between two steps are perturbed and descended along; before, left alone."""
    model = networks.mlp()
    assert isinstance(model, nn.Sequential)
    early, late = [*model[0].parameters(), *model[2].parameters()], list(model[4].parameters())
    training = Training(subject, model, params=early)
    batches = networks.batches(model, 4 + subject.settles)
    before = training.weights()
    training.run(batches[:2])
    names = ("4.weight", "4.bias")
    found = training.weights()
    require_close(found, {name: before[name] for name in names}, "weight", "itself before it was added")
    require("0.weight" in stepped(found, before), "no weight moved; expected steps")
    training.optimizer.add_param_group({"params": late})
    training.run(batches[2 : 2 + subject.settles])
    for batch in batches[2 + subject.settles :]:
        before = training.weights()
        training.step(batch)
        still = {*names} - {*stepped(training.weights(), before)}
        require(not still, f"{', '.join(sorted(still))} did not move after it was added; expected steps")
        if subject.ascent is not None:
            seen = training.evaluations[subject.ascent].weights
            calm = {*names} - {*stepped(seen, before)}
            require(not calm, f"{', '.join(sorted(calm))} is not perturbed after it was added; expected it to be")


@law
def weights_need_not_be_contiguous(subject: Subject) -> None:
    """A weight that is stored column by column takes the steps of the same weight that is stored row by row."""
    model, twin = networks.mlp(), networks.mlp()
    twin.load_state_dict(model.state_dict())
    for module in twin.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().t().contiguous().t())
    batches = networks.batches(model, 3)
    rows, columns = (Training(subject, net).run(batches, seed=1) for net in (model, twin))
    require_close(columns.weights(), rows.weights(), "weight", "that stored row by row")


@law
def a_group_keeps_its_radius(subject: Subject) -> None:
    """A parameter group with ρ = 0 is not perturbed, and another one is."""
    key = subject.rho_key
    applies(key is not None and subject.ascent is not None, "its perturbation has no radius")
    groups = Training(subject, networks.mlp()).optimizer.param_groups
    applies(key in groups[0], f"{key} is no option of parameter groups")
    model = networks.mlp()
    calm = ("0.weight", "0.bias")
    named = dict(model.named_parameters())
    first, rest = [named[name] for name in calm], [p for name, p in named.items() if name not in calm]
    training = Training(subject, model, params=[{"params": first, key: 0.0}, {"params": rest}])
    batches = networks.batches(model, subject.settles + 2)
    training.run(batches[: subject.settles])
    for batch in batches[subject.settles :]:
        before = training.weights()
        training.step(batch)
        assert subject.ascent is not None
        names = moved(training.evaluations[subject.ascent].weights, before)
        disturbed = [name for name in names if name in calm]
        require(not disturbed, f"{', '.join(disturbed)} is perturbed in a group with {key}=0; expected it not to be")
        require(bool(names), f"nothing is perturbed in a group with {key}={subject.radius}; expected it to be")


@law
def a_negative_radius_is_refused(subject: Subject) -> None:
    """A ρ below zero, which would descend instead of ascend, is an error when the optimizer is built."""
    applies(subject.rho_key is not None, "there is no radius")
    assert subject.rho_key is not None
    model = networks.mlp()
    base = subject.bases[0] if subject.bases else torch.optim.SGD
    options = {**subject.options, **base_options(subject, base), subject.rho_key: -0.1}
    try:
        subject.build(model, list(model.parameters()), base, **options)
    except Exception:  # noqa: BLE001 - of whatever type: assertions are common
        return
    require(False, f"{subject.rho_key}=-0.1 was accepted; expected an error")
