"""MSSAM under DistributedDataParallel.

    torchrun --nproc-per-node 2 examples/with_ddp.py

m="local" gives every rank a perturbation of its own, from its own part of the batch, and saves an all-reduce;
m="global" (the default) gives all ranks the one of the whole batch.  The representative is the same on all ranks.
"""

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import ms_optim


def main() -> None:
    """Train on 1500 handwritten digits, and print the accuracy on the other 297."""
    distributed.init_process_group("gloo")  # "nccl" on GPUs
    rank, world = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    wrapped = DistributedDataParallel(model)
    optimizer = ms_optim.MSSAM(wrapped, torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, m="local")
    for _ in range(20):
        for part in torch.randperm(1500).split(100):  # the same on all ranks, each of which takes its share
            mine = part[rank::world]
            for gradient_pass in optimizer.passes():
                with gradient_pass:
                    cross_entropy(wrapped(x[mine]), y[mine]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)  # the final gradient; the ascent has no length to clip
            optimizer.step()
    if rank == 0:
        accuracy = (model(x[1500:]).argmax(1) == y[1500:]).float().mean()
        print(f"test accuracy {100 * accuracy:.1f} %")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
