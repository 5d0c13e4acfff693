"""Which ranks train together, and how it is found: in one process that takes itself for one of several."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import by_passes, mlp, samples
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import ms_optim
from ms_optim.optim.distributed import Ranks

tensor = pytest.importorskip("torch.distributed.tensor")
fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")


@pytest.fixture
def world():
    """Four ranks, of which there is one; what the others send is never waited for."""
    dist.init_process_group("fake", rank=0, world_size=4, store=fake.FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


class Counting(nn.Sequential):
    """Counts how often its modules are looked through."""

    looks = 0

    def named_modules(self, *args, **kwargs):
        Counting.looks += 1
        return super().named_modules(*args, **kwargs)


def test_modules_are_looked_through_once_a_step(world):
    def looks(**options):
        model = Counting(mlp())
        optimizer = ms_optim.SAM(model, lr=0.1, rho=0.1, m="local", **options)
        counts = []
        for _ in range(3):
            Counting.looks = 0
            by_passes(model, optimizer, samples(mlp(), 1))
            counts.append(Counting.looks)
        return counts

    pairs = zip(looks(), looks(process_group=None), strict=True)
    # For wrappers, and, since there are none, for parameters that are sharded.
    assert [together - alone for together, alone in pairs] == [2, 2, 2]


@pytest.mark.parametrize("size", [1, 2])
def test_a_model_that_is_wrapped_later_is_seen_from_the_next_step_on(world, size):
    group = dist.new_group(list(range(size)))
    model = nn.Sequential(mlp())
    optimizer = ms_optim.SAM(model, lr=0.1, rho=0.1)
    by_passes(model, optimizer, samples(mlp(), 1))
    assert optimizer.ranks.group is world
    model[0] = DistributedDataParallel(model[0], process_group=group)
    by_passes(model, optimizer, samples(mlp(), 1), inside=model[0].no_sync)
    assert optimizer.ranks.group is (group if size > 1 else None)
    assert optimizer.ranks.wrappers() == [model[0]]
    model[0] = model[0].module
    by_passes(model, optimizer, samples(mlp(), 1))
    assert optimizer.ranks.group is world and optimizer.ranks.wrappers() == []


def test_what_was_found_is_not_copied(world):
    ranks = Ranks([mlp()])
    assert ranks.group is world
    assert copy.deepcopy(ranks).group is world


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_sharded_parameters_are_those_of_their_mesh(world, shape):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("all",) if len(shape) == 1 else ("replicas", "shards"))
    for chosen in [mesh] + ([mesh["shards"]] if len(shape) > 1 else []):
        model = mlp()
        for layer in (model[0], model[2], model[4]):
            for name, p in list(layer.named_parameters()):
                with torch.no_grad():
                    whole = tensor.distribute_tensor(p.detach(), chosen, [tensor.Replicate()] * chosen.ndim)
                layer.register_parameter(name, nn.Parameter(whole))
        expected = chosen.get_group() if chosen.ndim == 1 else world
        assert Ranks([model]).group is expected
        assert Ranks([model], None).group is None
