"""Optimizers and modules of the loops that the checkup looks at: a right one, and what goes wrong in others."""

from __future__ import annotations

import copy

import torch
from torch import nn


class TwoStepSAM(torch.optim.Optimizer):
    """SAM as it is widely written: two functions that the loop calls between its two backward passes."""

    def __init__(self, params, base=torch.optim.SGD, rho=0.05, check=False, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.check = check

    @torch.no_grad()
    def first_step(self):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([g.norm() for g in grads]).norm()
        if self.check and not torch.isfinite(norm):
            return
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old_p"] = p.clone()
                    p.add_(p.grad, alpha=float(group["rho"] / norm))

    @torch.no_grad()
    def restore(self):
        for group in self.param_groups:
            for p in group["params"]:
                if "old_p" in self.state[p]:
                    p.copy_(self.state[p].pop("old_p"))

    def second_step(self):
        self.restore()
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        loss = closure()
        self.first_step()
        closure()
        self.second_step()
        return loss


class SubtractingSAM(TwoStepSAM):
    """Puts the weights back by subtracting what it has added."""

    @torch.no_grad()
    def first_step(self):
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        self.taken = [(p, self.param_groups[0]["rho"] * p.grad / norm) for p in parameters]
        for p, e in self.taken:
            p.add_(e)

    @torch.no_grad()
    def restore(self):
        for p, e in self.taken:
            p.sub_(e)


class ForgetfulSAM(TwoStepSAM):
    """Descends from where the second gradient was taken."""

    def restore(self):
        pass


class Downhill(TwoStepSAM):
    """Goes down where it should go up."""

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.neg_()
        super().first_step()


class Restless(torch.optim.Optimizer):
    """Has a step size of its own."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(1e-3 * p.grad.sign())


class Frozen(nn.Module):
    """Computes with a copy of its weights."""

    def __init__(self, model, fresh):
        super().__init__()
        self.model, self.fresh = model, fresh
        self.copy = [copy.deepcopy(model)]

    def forward(self, x):
        if self.fresh:
            return self.model(x)
        found = self.model(x)
        return self.copy[0].to(x.dtype)(x) + (found - found.detach())


class Scale(nn.Module):
    """One weight that nothing uses, beside a model."""

    def __init__(self, model):
        super().__init__()
        self.model, self.unused = model, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.model(x)
