"""MSSAM in Hugging Face's Trainer, which stays as it is.

    python examples/with_trainer.py

A model of ``transformers`` returns the loss itself, so ``optimizer.attach(model)`` is all: its forward makes the first
of SAM's two passes, in every precision, with accumulation, clipping and checkpoints.  (With ``label_smoothing_factor``
or ``compute_loss_func`` the loss is made outside the model; then take an optimizer of one pass, ``ascent="momentum"``
or ``MSRegularizedSGD``, which needs no ``attach``.)

The model is a vision transformer of 27,000 weights, built here from its configuration: nothing is downloaded.

Learning rate, ρ and the size of the first weights were chosen by the accuracy on the validation digits, once, with the
seed below: the best of 0.003, 0.01, 0.03 × 0.05, 0.1 × 0.02, 0.2 after 10 epochs.  The test digits chose nothing, so
that the accuracy on them is the one to quote; that on the validation digits is printed beside it.
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch.utils.data import random_split
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import ms_optim


def main(epochs: int = 10) -> float:
    """Train on 1000 handwritten digits; the accuracy on 400 others, which chose nothing."""
    set_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    digits = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, labels, strict=True)]
    train, validation, test = random_split(digits, [1000, 397, 400])

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    # 0.2: about 1 / √32; the default is that of wide models.
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, initializer_range=0.2, **size)
    model = ViTForImageClassification(config)

    decays = {True: [], False: []}
    for parameter in model.parameters():
        decays[parameter.ndim > 1].append(parameter)
    groups = [{"params": decays[True], "weight_decay": 0.01}, {"params": decays[False], "weight_decay": 0.0}]
    optimizer = ms_optim.MSSAM(groups, torch.optim.AdamW, model=model, rho=0.05, lr=1e-2)
    optimizer.attach(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=20 * epochs)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=50,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
        )
        trainer = Trainer(model, arguments, train_dataset=train, optimizers=(optimizer, scheduler))
        trainer.train()
        predicted = {"validation": trainer.predict(validation), "test": trainer.predict(test)}
    accuracies = {name: float((p.predictions.argmax(1) == p.label_ids).mean()) for name, p in predicted.items()}
    for name, accuracy in accuracies.items():
        print(f"accuracy {accuracy:.1%} on {len(predicted[name].label_ids)} {name} digits after {epochs} epochs")
    return accuracies["test"]


if __name__ == "__main__":
    main()
