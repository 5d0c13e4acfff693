"""What a measurement must leave alone: take a snapshot, measure, compare bit for bit."""

import torch


def snapshot(model):
    """Everything that a measurement must leave alone."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "storage": {name: value.data_ptr() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "rng": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_undisturbed(model, before):
    after = snapshot(model)
    for part in ("storage", "modes", "hooks", "grad mode"):
        assert before[part] == after[part], part
    assert torch.equal(before["rng"], after["rng"])
    assert before["state"].keys() == after["state"].keys()
    assert all(torch.equal(value, after["state"][name]) for name, value in before["state"].items())
    for name, grad in before["grads"].items():
        assert (grad is None and after["grads"][name] is None) or torch.equal(grad, after["grads"][name])
