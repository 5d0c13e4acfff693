"""A SAM as a textbook would write it, correct and slow."""

from __future__ import annotations

import torch

from ms_optim.testing import Subject


class Textbook(torch.optim.Optimizer):
    """Two evaluations, a perturbation of norm ρ along the gradient, and everything put back."""

    raises = None  # what a defect raises where its law finds it, if it raises

    def __init__(self, params, base, model, rho=0.05, **options):
        self.validate(rho)
        super().__init__(params, {"rho": rho})
        self.model = model
        self.base = base(self.param_groups, **options)
        self.share()

    def validate(self, rho):
        if rho < 0:
            raise ValueError(f"rho={rho}")

    def share(self):
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    def active(self):
        return any(group["rho"] > 0 for group in self.param_groups)

    # One step.

    @torch.no_grad()
    def step(self, closure=None, scaler=None):
        if closure is None:
            raise RuntimeError("step needs a closure")
        weights, buffers, stream = self.kept_weights(), self.kept_buffers(), torch.get_rng_state()
        try:
            loss, second = self.evaluate(closure), None
            if self.active():
                seen, there = self.kept_buffers(), torch.get_rng_state()
                self.ascend()
                self.clear()
                self.rewind(stream)
                second = self.evaluate(closure)
                self.restore(weights)
                self.clear()
                self.put_back(seen)
                self.rewind(there)
        except BaseException as error:
            self.undo(weights, buffers, error)
            raise
        self.unscale(scaler)
        self.base.step()
        return self.returned(loss, second)

    def evaluate(self, closure):
        with torch.enable_grad():
            return closure()

    def kept_weights(self):
        return [(p, p.clone()) for p in self.parameters()]

    def kept_buffers(self):
        return [(b, b.clone()) for b in self.model.buffers()]

    def ascend(self):
        norm = self.norm()
        if norm is not None:
            for p, e in self.perturbation(norm):
                p.add_(e)

    def norm(self):
        squares = [g.square().sum() for g in (self.dense(p) for p in self.parameters()) if g is not None]
        norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
        return norm if norm > 0 and torch.isfinite(norm) else None

    def perturbation(self, norm):
        for group in self.param_groups:
            sign = -1.0 if group.get("maximize") else 1.0
            for p in group["params"]:
                if p.grad is not None:
                    yield p, sign * group["rho"] * self.dense(p) / norm

    def dense(self, p):
        return p.grad.to_dense() if p.grad is not None and p.grad.is_sparse else p.grad

    def restore(self, weights):
        for p, kept in weights:
            p.copy_(kept)

    def put_back(self, buffers):
        for b, kept in buffers:
            b.copy_(kept)

    def undo(self, weights, buffers, error):
        Textbook.restore(self, weights)
        Textbook.put_back(self, buffers)
        torch.clear_autocast_cache()

    def clear(self):
        torch.clear_autocast_cache()

    def rewind(self, stream):
        torch.set_rng_state(stream)

    def unscale(self, scaler):
        if scaler is not None:
            for p in self.parameters():
                if p.grad is not None:
                    p.grad.div_(scaler.get_scale())

    def returned(self, loss, second):
        return loss

    # What surrounds it.

    @property
    def _step_supports_amp_scaling(self):  # GradScaler.step asks before it calls `step`
        raise RuntimeError("use step(closure, scaler)")

    def add_param_group(self, group):
        if hasattr(self, "base"):
            self.base.add_param_group({**group, "rho": group.get("rho", self.defaults["rho"])})
        else:
            super().add_param_group(group)

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state):
        self.base.load_state_dict(state)
        self.share()

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if not k.startswith("_optimizer_")}


def subject(kind=Textbook) -> Subject:
    def build(model, params, base, **options):
        return kind(params, base, model, **options)

    return Subject(
        kind.__name__, build, scaled_step=lambda optimizer, model, closure, scaler: optimizer.step(closure, scaler)
    )
