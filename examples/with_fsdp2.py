"""MSSAM with weights sharded by FSDP2.

    torchrun --nproc-per-node 2 examples/with_fsdp2.py

The scale group is read before sharding, since torch.export does not read a sharded model, and passed as group=.  A
refresh gathers the weights for a moment.
"""

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import ms_optim


def main() -> None:
    """Train on 1500 handwritten digits, and print the accuracy on the other 297."""
    distributed.init_process_group("gloo")  # "nccl" on GPUs
    rank, world = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    group = ms_optim.scale_symmetries(model, x[:8])
    mesh = init_device_mesh("cpu", (world,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = ms_optim.MSSAM(model, torch.optim.AdamW, rho=0.1, lr=0.003, group=group)
    for _ in range(20):
        for part in torch.randperm(1500).split(100):
            mine = part[rank::world]
            for gradient_pass in optimizer.passes():
                with gradient_pass:
                    cross_entropy(model(x[mine]), y[mine]).backward()
            optimizer.step()
    correct = (model.eval()(x[1500:]).argmax(1) == y[1500:]).float().mean()  # on all ranks: each has a part
    if rank == 0:
        print(f"test accuracy {100 * correct:.1f} %")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
