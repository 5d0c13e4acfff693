"""MSSAM in Lightning, whose automatic optimization stays as it is.

    python examples/with_lightning.py [32 | bf16-mixed | 16-mixed]

A module whose forward returns the loss, and ``optimizer.attach(module)``: that forward then makes the first of SAM's
two passes itself, in every precision, and Lightning's closure is called once: with ``accumulate_grad_batches`` all
batches count, and ``gradient_clip_val`` clips the last gradient alone.  (Without ``attach`` the closure is called once
per pass: batches before the last are lost, with a warning, clipping acts in every pass, and in "16-mixed", which takes
a GPU, there is no closure, which is refused.)  An optimizer of one pass (``ascent="momentum"``,
``MSRegularizedSGD``) needs no ``attach``.
"""

import sys

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import ms_optim


class NetworkWithLoss(nn.Module):
    """What is attached: its forward returns the loss."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The loss of a batch."""
        return cross_entropy(self.network(x), y)


class Digits(lightning.LightningModule):
    """A network, its loss and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        network = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
        self.model = NetworkWithLoss(network)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """The loss, by a call of the attached module, which is what the optimizer sees."""
        return self.model(*batch)

    def test_step(self, batch: list[torch.Tensor], index: int) -> None:
        """The share of right answers."""
        x, y = batch
        self.log("accuracy", (self.model.network(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """MSSAM around SGD, attached."""
        optimizer = ms_optim.MSSAM(self.model.network, torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
        optimizer.attach(self.model)
        return optimizer


def main(epochs: int = 10, precision: str = "32") -> float:
    """Train on 1000 handwritten digits; the accuracy on the other 797."""
    lightning.seed_everything(0)
    pixels, labels = load_digits(return_X_y=True)
    images = TensorDataset(torch.tensor(pixels / 8 - 1, dtype=torch.float32), torch.tensor(labels))
    train, test = random_split(images, [1000, 797])

    model = Digits()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=epochs, precision=precision, **quiet)
    trainer.fit(model, DataLoader(train, batch_size=50, shuffle=True))
    accuracy = trainer.test(model, DataLoader(test, batch_size=797), verbose=False)[0]["accuracy"]
    print(f"accuracy {accuracy:.1%} on 797 digits after {epochs} epochs")
    return accuracy


if __name__ == "__main__":
    main(precision=sys.argv[1] if len(sys.argv) > 1 else "32")
