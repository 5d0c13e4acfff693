"""MSSAM in Accelerate's usual loop, which stays as it is.

    python examples/with_accelerate.py [no | bf16 | fp16]

The module that is prepared returns the loss, and ``optimizer.attach(module)`` has its forward make the first of SAM's
two passes.  So gradient accumulation, clipping and the loss scale of fp16 (which takes a GPU) need no change.  Closures
are no way there: ``step(closure)`` returns no loss, skips batches under ``accumulate``, and with fp16 goes through a
``GradScaler``, which is refused.  An optimizer of one pass (``ascent="momentum"``, ``MSRegularizedSGD``) needs no
``attach``.
"""

import sys

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import ms_optim


class NetworkWithLoss(nn.Module):
    """What is attached and prepared: its forward returns the loss."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The loss of a batch."""
        return cross_entropy(self.network(x), y)


def main(epochs: int = 10, precision: str = "no") -> float:
    """Train on 1000 handwritten digits; the accuracy on the other 797."""
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    images = TensorDataset(torch.tensor(pixels / 8 - 1, dtype=torch.float32), torch.tensor(labels))
    train, test = random_split(images, [1000, 797])

    accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_steps=2)
    network = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
    model = NetworkWithLoss(network)
    optimizer = ms_optim.MSSAM(network, torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    optimizer.attach(model)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(train, batch_size=25, shuffle=True))

    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(x, y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    network.eval()
    with torch.no_grad():
        x, y = (tensor.to(accelerator.device) for tensor in next(iter(DataLoader(test, batch_size=797))))
        accuracy = (network(x).argmax(1) == y).float().mean().item()
    accelerator.print(f"accuracy {accuracy:.1%} on 797 digits after {epochs} epochs")
    return accuracy


if __name__ == "__main__":
    main(precision=sys.argv[1] if len(sys.argv) > 1 else "no")
