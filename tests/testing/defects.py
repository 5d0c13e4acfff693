"""Defects: the textbook's optimizer with one thing wrong in each, and the law that says so.

A law that no optimizer can break says nothing: each has a defect here that it must find.  A defect is the smallest
change of the textbook's optimizer that breaks its law; many are what is found in the wild.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from testing.textbook import Textbook, subject

from ms_optim.testing import Subject

# What is wrong with a step.


class PerturbsAtZero(Textbook):
    def active(self):
        return True

    def perturbation(self, norm):
        return [(p, e + 1e-3) for p, e in super().perturbation(norm)]


class AlwaysTwice(Textbook):
    def active(self):
        return True

    def put_back(self, buffers):
        pass

    def rewind(self, stream):
        pass


class NeedsGradients(Textbook):
    raises = AssertionError

    def evaluate(self, closure):
        assert any(p.grad is not None for p in self.parameters()), "no gradients"
        return super().evaluate(closure)


class RestsWithoutGradients(Textbook):
    def active(self):
        return self.there and super().active()

    def step(self, closure=None, scaler=None):
        self.there = any(p.grad is not None for p in self.parameters())
        return super().step(closure, scaler)


class ReturnsTheSecondLoss(Textbook):
    def returned(self, loss, second):
        return loss if second is None else second


class ReturnsNothing(Textbook):
    def returned(self, loss, second):
        return None


class EvaluatesThrice(Textbook):
    def evaluate(self, closure):
        super().evaluate(closure)
        return super().evaluate(closure)


class NormPerTensor(Textbook):
    def perturbation(self, norm):
        return [(p, e * norm / self.dense(p).norm()) for p, e in super().perturbation(norm)]


class LeavesBiasesOut(Textbook):
    def perturbation(self, norm):
        weights = [(p, e) for p, e in super().perturbation(norm) if p.ndim > 1]
        length = sum(e.square().sum() for _, e in weights).sqrt()
        return [(p, e * self.defaults["rho"] / length) for p, e in weights]


class AlongTheSign(Textbook):
    def perturbation(self, norm):
        signs = [(p, e.sign()) for p, e in super().perturbation(norm)]
        length = sum(e.square().sum() for _, e in signs).sqrt()
        return [(p, e * self.defaults["rho"] / length) for p, e in signs]


class Downhill(Textbook):
    def perturbation(self, norm):
        return [(p, -e) for p, e in super().perturbation(norm)]


class IgnoresMaximize(Textbook):
    def perturbation(self, norm):
        sign = -1.0 if self.param_groups[0].get("maximize") else 1.0
        return [(p, sign * e) for p, e in super().perturbation(norm)]


class DescendsAlongTheFirst(Textbook):
    def ascend(self):
        self.first = [(p, p.grad) for p in self.parameters()]
        super().ascend()

    def unscale(self, scaler):
        super().unscale(scaler)
        for p, grad in getattr(self, "first", ()):
            p.grad = grad


# What is wrong with its restoring.


class Subtracts(Textbook):
    def ascend(self):
        self.taken = []
        super().ascend()

    def perturbation(self, norm):
        self.taken = list(super().perturbation(norm))
        return self.taken

    def restore(self, weights):
        for p, e in self.taken:
            p.sub_(e)


class Rebinds(Textbook):
    def restore(self, weights):
        for p, kept in weights:
            p.data = kept.clone()


class UndoesNothing(Textbook):
    def undo(self, weights, buffers, error):
        pass


class UndoesExceptionsOnly(Textbook):
    def undo(self, weights, buffers, error):
        if isinstance(error, Exception):
            super().undo(weights, buffers, error)


class UndoesWeightsOnly(Textbook):
    def undo(self, weights, buffers, error):
        super().undo(weights, [], error)


class ChecksNoNorm(Textbook):
    def norm(self):
        return sum(
            (self.dense(p).square().sum() for p in self.parameters() if p.grad is not None), torch.zeros(())
        ).sqrt()


class StacksNothing(Textbook):
    raises = RuntimeError

    def norm(self):
        return torch.stack([self.dense(p).square().sum() for p in self.parameters() if p.grad is not None]).sum().sqrt()


class DividesByZero(Subtracts):
    norm = ChecksNoNorm.norm

    def perturbation(self, norm):
        gradients = [(p, torch.zeros_like(p) if p.grad is None else self.dense(p)) for p in self.parameters()]
        self.taken = [(p, self.defaults["rho"] * g / norm) for p, g in gradients]
        return self.taken


class RestoresWhatHasAGradient(Textbook):
    def restore(self, weights):
        super().restore([(p, kept) for p, kept in weights if p.grad is not None])


class KeepsWhatHasAGradient(Textbook):
    raises = KeyError

    def ascend(self):
        self.old = {p: p.clone() for p in self.parameters() if p.grad is not None}
        super().ascend()

    def restore(self, weights):
        for p in self.parameters():
            if p.grad is not None:
                p.copy_(self.old[p])


class SubtractsStale(Textbook):
    def perturbation(self, norm):
        self.taken = {**getattr(self, "taken", {}), **dict(super().perturbation(norm))}
        return [(p, e) for p, e in self.taken.items() if p.grad is not None]

    def restore(self, weights):
        for p, e in self.taken.items():
            p.sub_(e)


# What is wrong with its parameters.


class PerturbsEveryName(Textbook):
    def perturbation(self, norm):
        names = self.model.named_parameters(remove_duplicate=False)
        return [(p, self.defaults["rho"] * self.dense(p) / norm) for _, p in names]


class AsksTheFirstParameter(Textbook):
    raises = IndexError

    def norm(self):
        device = self.param_groups[0]["params"][0].device
        return super().norm().to(device)


class SkipsSparse(Textbook):
    def dense(self, p):
        return None if p.grad is not None and p.grad.is_sparse else p.grad

    def perturbation(self, norm):
        return [(p, self.defaults["rho"] * p.grad / norm) for p in self.parameters() if self.dense(p) is not None]


class KnowsTheFirstParametersOnly(Textbook):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.known = {id(p) for p in self.parameters()}

    def perturbation(self, norm):
        return [(p, e) for p, e in super().perturbation(norm) if id(p) in self.known]


class FlattensByView(Textbook):
    raises = RuntimeError

    def perturbation(self, norm):
        return [(p.view(-1), e.reshape(-1)) for p, e in super().perturbation(norm)]


class FlattensCopies(Textbook):
    def perturbation(self, norm):
        return [(p.reshape(-1), e.reshape(-1)) for p, e in super().perturbation(norm)]


class OneRadiusForAll(Textbook):
    def perturbation(self, norm):
        return [(p, self.defaults["rho"] * self.dense(p) / norm) for p in self.parameters() if p.grad is not None]


class AcceptsAnyRadius(Textbook):
    def validate(self, rho):
        pass


# What is wrong with its checkpoints.


class SavesNoState(Textbook):
    def state_dict(self):
        return {**super().state_dict(), "state": {}}


class SavesAnObject(Textbook):
    def state_dict(self):
        return {**super().state_dict(), "rho": functools.partial(float, self.defaults["rho"])}

    def load_state_dict(self, state):
        super().load_state_dict({key: state[key] for key in ("state", "param_groups")})


class SavesTheWeights(Textbook):
    def state_dict(self):
        return {**super().state_dict(), "old": [p.clone() for p in self.parameters()]}


class CopiesLikeItsBaseClass(Textbook):
    raises = AttributeError

    def __getstate__(self):
        return torch.optim.Optimizer.__getstate__(self)


class LoadsWhatFits(Textbook):
    def load_state_dict(self, state):
        for p, (_, found) in zip(self.parameters(), sorted(state["state"].items()), strict=False):
            self.base.state[p] = found


class LosesItsGroups(Textbook):
    def load_state_dict(self, state):
        torch.optim.Optimizer.load_state_dict(self, state)


# What is wrong with its surroundings.


class HasGroupsOfItsOwn(Textbook):
    def share(self):
        self.base.param_groups = [dict(group) for group in self.param_groups]


class DrawsOtherMasks(Textbook):
    def rewind(self, stream):
        pass


class MovesBuffersTwice(Textbook):
    def put_back(self, buffers):
        pass


class PutsBackStatisticsOnly(Textbook):
    def put_back(self, buffers):
        super().put_back([(b, kept) for b, kept in buffers if b.is_floating_point()])


class KeepsTheAutocastCache(Textbook):
    def clear(self):
        pass


class TakesClosuresFromAScaler(Textbook):
    _step_supports_amp_scaling = False


class DescendsAlongScaledGradients(Textbook):
    _step_supports_amp_scaling = True

    def step(self, closure=None, scaler=None):
        return self.base.step() if closure is None else super().step(closure, scaler)


class ForgetsTheScale(Textbook):
    def unscale(self, scaler):
        pass


def without_step(optimizer, model, closure):
    """Drives a step past ``step``, as an interface of two functions does."""
    return Textbook.step.__wrapped__(optimizer, closure)


# Law → the optimizers that break it.
DEFECTS: dict[str, tuple[type[Textbook] | Subject, ...]] = {
    "off_is_the_base_optimizer_on_weights": (PerturbsAtZero,),
    "off_is_the_base_optimizer_on_buffers": (AlwaysTwice,),
    "off_is_the_base_optimizer_on_random_streams": (AlwaysTwice,),
    "a_closure_is_enough": (NeedsGradients, RestsWithoutGradients),
    "a_step_returns_the_loss": (ReturnsTheSecondLoss, ReturnsNothing),
    "a_step_evaluates_as_often_as_it_says": (EvaluatesThrice,),
    "the_perturbation_has_norm_rho": (NormPerTensor,),
    "the_ascent_is_the_steepest": (AlongTheSign, LeavesBiasesOut, Downhill),
    "the_ascent_raises_the_loss": (Downhill,),
    "the_descent_is_along_the_last_gradient": (DescendsAlongTheFirst,),
    "maximize_is_the_negated_loss": (IgnoresMaximize,),
    "weights_are_restored_bitwise": (Subtracts,),
    "weights_keep_their_storage": (Rebinds,),
    "nothing_drifts_in_float32": (Subtracts,),
    "nothing_drifts_in_bfloat16": (Subtracts,),
    "an_exception_restores_the_model": (UndoesNothing, UndoesWeightsOnly),
    "a_keyboard_interrupt_restores_the_model": (UndoesExceptionsOnly,),
    "a_nan_in_the_first_gradient_poisons_nothing": (ChecksNoNorm,),
    "no_gradients_change_nothing": (StacksNothing, DividesByZero),
    "a_gradient_in_the_first_evaluation_only": (RestoresWhatHasAGradient,),
    "a_gradient_in_later_evaluations_only": (KeepsWhatHasAGradient,),
    "a_parameter_frozen_midway_stays": (SubtractsStale,),
    "tied_weights_are_perturbed_once": (PerturbsEveryName,),
    "an_empty_parameter_group_changes_nothing": (AsksTheFirstParameter,),
    "sparse_gradients_are_gradients": (SkipsSparse,),
    "parameters_can_be_added_on_the_way": (KnowsTheFirstParametersOnly,),
    "weights_need_not_be_contiguous": (FlattensByView, FlattensCopies),
    "a_group_keeps_its_radius": (OneRadiusForAll,),
    "a_negative_radius_is_refused": (AcceptsAnyRadius,),
    "a_resumed_run_is_the_uninterrupted_one_with_sgd": (SavesNoState,),
    "a_resumed_run_is_the_uninterrupted_one_with_adam": (SavesNoState,),
    "a_resumed_run_is_the_uninterrupted_one_with_adamw": (SavesNoState,),
    "a_state_dict_loads_with_weights_only": (SavesAnObject,),
    "a_state_dict_holds_no_weights": (SavesTheWeights,),
    "a_deep_copy_goes_on_alike": (CopiesLikeItsBaseClass,),
    "a_pickle_goes_on_alike": (CopiesLikeItsBaseClass,),
    "a_wrong_state_dict_is_refused": (LoadsWhatFits,),
    "groups_are_shared_after_loading": (LosesItsGroups,),
    "step_hooks_fire_once": (replace(subject(), name="without_step", step=without_step),),
    "a_scheduler_drives_the_descent": (
        HasGroupsOfItsOwn,
        replace(subject(), name="without_step", step=without_step),
    ),
    "all_evaluations_draw_the_same_masks": (DrawsOtherMasks,),
    "moving_averages_move_once_a_step": (MovesBuffersTwice, PutsBackStatisticsOnly),
    "averages_of_all_batches_move_once_a_step": (MovesBuffersTwice, PutsBackStatisticsOnly),
    "autocast_around_a_step_sees_the_perturbation": (KeepsTheAutocastCache,),
    "a_scaler_with_a_closure_is_right_or_refused": (TakesClosuresFromAScaler,),
    "a_scaler_in_an_unmodified_loop_is_right_or_refused": (DescendsAlongScaledGradients,),
    "a_scaler_as_documented_changes_nothing": (ForgetsTheScale,),
}
