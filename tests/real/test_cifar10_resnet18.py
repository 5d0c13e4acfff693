"""A real model on real images: timm's ResNet-18 with a CIFAR stem, on CIFAR-10 read from its tar by timm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import ms_optim
from ms_optim.models import resnet18

STEPS, BATCH = 100, 32


def loader(root, seed):
    data = pytest.importorskip("timm.data", reason="needs timm")
    dataset = data.create_dataset("", root=str(root / "cifar10" / "train.tar"))
    dataset.transform = data.create_transform(
        (3, 32, 32), is_training=True, no_aug=True, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
    )
    stream = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size=BATCH, shuffle=True, generator=stream, drop_last=True)


@pytest.mark.slow
# timm's tar reader leaves its file to the garbage collector, which says so whenever it comes by.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "build",
    [
        lambda model: ms_optim.MSSAM(model, torch.optim.SGD, rho=0.05, lr=0.05, momentum=0.9, refresh_every=50),
        lambda model: ms_optim.MSRegularizedSGD(model, lr=0.05, momentum=0.9, strength=1e-3, refresh_every=50),
    ],
    ids=["MSSAM", "MSRegularizedSGD"],
)
def test_a_resnet18_trains_on_cifar10_and_its_minimum_sharpness_is_a_property_of_the_function(build, data_root):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = resnet18()
    optimizer = build(model)
    losses = []
    batches = iter(loader(data_root, seed=0))
    for _ in range(STEPS):
        x, y = next(batches)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    assert sum(losses[-20:]) / 20 < 0.9 * sum(losses[:10]) / 10
    assert all(math.isfinite(loss) for loss in losses)

    x, _ = next(batches)
    model.double().eval()
    x = x[:16].double()
    group = ms_optim.scale_symmetries(model, x)
    assert len(group) == 32
    logits = model(x)
    sharpness = ms_optim.minimum_sharpness(model, x, group=group)
    total = ms_optim.hessian_trace(model, x).total
    t = group.bound(model, group.random(std=0.5, generator=torch.Generator().manual_seed(1)))
    group.rescale_(model, t)
    torch.testing.assert_close(model(x), logits, rtol=1e-9, atol=1e-10)
    assert math.isfinite(sharpness)
    assert sharpness > 0
    assert ms_optim.minimum_sharpness(model, x, group=group) == pytest.approx(sharpness, rel=1e-8)
    # … which the trace itself is not, so the line above could have failed.
    assert abs(ms_optim.hessian_trace(model, x).total / total - 1) > 0.05
