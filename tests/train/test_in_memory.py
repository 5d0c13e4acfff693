"""Data in memory: the same batches as from workers, what takes the fast path, and what does not."""

import numpy as np
import pytest
import torch
from PIL import Image
from train import pictures
from train.command import batches, loaded

from ms_optim.errors import CommandLineError
from ms_optim.train import in_memory
from ms_optim.train.in_memory import MemoryEvaluation, MemoryTraining
from ms_optim.train.workers import WorkerTraining

CROPPED = {"crop_padding": 2, "color_jitter": 0.0}


@pytest.fixture
def gray(tmp_path):
    """MNIST-like: gray pictures in a folder of splits."""
    return pictures.splits(tmp_path, size=(28, 28), channels=1)


@pytest.fixture
def coloured(tmp_path):
    return pictures.splits(tmp_path)


def equal(one, other):
    assert len(one) == len(other)
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", ["gray", "coloured", "digits", "gray in colours"])
def test_batches_from_memory_are_those_of_the_workers_bit_for_bit(kind, request, monkeypatch):
    given = {"batch_size": 8, "no_aug": True, "num_classes": 10}
    if kind == "digits":
        given |= {"dataset": "digits"}
    else:
        name = "gray" if kind.startswith("gray") else kind
        given |= {"data_dir": str(request.getfixturevalue(name)), "crop_pct": 1.0}
        given |= {"gray": {"preset": "mnist"}, "gray in colours": {"preset": "mnist", "in_chans": 3}}.get(kind, {})
    memory, workers = loaded(in_memory="yes", **given), loaded(in_memory="no", **given)
    assert isinstance(memory.train, MemoryTraining)
    assert isinstance(workers.train, WorkerTraining)
    for epoch in (0, 3):
        one, other = batches(memory.train, epoch), batches(workers.train, epoch)
        assert len(one) == len(memory.train) > 1
        assert equal(one, other)
    for name in ("validation", "test"):
        assert equal(batches(getattr(memory, name)), batches(getattr(workers, name)))
    assert equal([memory.sample(9)], [workers.sample(9)])


@pytest.mark.slow
def test_mnist_from_memory_is_mnist_from_workers(data_root):
    given = {"dataset": "torch/mnist", "data_dir": str(data_root), "no_aug": True, "train_num_samples": 3000}
    memory, workers = loaded(**given), loaded(in_memory="no", **given)
    assert equal(batches(memory.train, 1), batches(workers.train, 1))
    assert equal(batches(memory.validation), batches(workers.validation))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_cifar10_from_memory_is_cifar10_from_workers(data_root):
    given = {"data_dir": str(data_root / "cifar10"), "preset": "cifar10", "no_aug": True, "test_split": ""}
    given |= {"train_num_samples": 1000, "val_num_samples": 500}
    memory, workers = loaded(**given), loaded(in_memory="no", **given)
    assert isinstance(memory.train, MemoryTraining)
    assert equal(batches(memory.train, 1), batches(workers.train, 1))
    assert equal(batches(memory.validation), batches(workers.validation))


def test_a_random_crop_and_flip_move_pixels_and_nothing_else(coloured):
    given = {"data_dir": str(coloured), "batch_size": 36, "num_classes": 3, "hflip": 0.5, "vflip": 0.5, **CROPPED}
    found = loaded(**given)
    x, _ = batches(found.train, 0)[0]
    plain, _ = batches(loaded(**{**given, "no_aug": True}).train, 0)[0]
    assert not torch.equal(x, plain)
    black = (0 - 0.5) / 0.25
    kept = x[:, :, 2:-2, 2:-2]  # a shift of at most two pixels reaches no further
    for image, original in zip(kept, plain, strict=True):
        assert set(image.flatten().tolist()) <= {*original.flatten().tolist(), black}


@pytest.mark.parametrize(
    "augmentation",
    [
        {"hflip": 0.5, **CROPPED, "cutout": 5, "reprob": 0.5},
        {"hflip": 0.5, **CROPPED, "reprob": 1.0, "remode": "pixel", "recount": 3, "resplit": True},
        {"hflip": 0.5, **CROPPED, "aug_repeats": 3.0},
    ],
)
def test_a_resumed_epoch_from_memory_is_bitwise_the_uninterrupted_one(coloured, augmentation):
    given = {"data_dir": str(coloured), "batch_size": 4, "num_classes": 3, "in_memory": "yes", **augmentation}
    whole = loaded(**given)
    epochs = [batches(whole.train, epoch) for epoch in range(4)]
    assert isinstance(whole.train, MemoryTraining)
    resumed = loaded(**given)
    torch.rand(3)  # the training has drawn numbers in between
    for epoch in (2, 3):
        assert equal(batches(resumed.train, epoch), epochs[epoch])
    assert not equal(epochs[2], epochs[3])
    assert not equal(batches(loaded(**given, seed=1).train, 2), epochs[2])
    resumed.train.set_epoch(3)
    next(iter(resumed.train))  # given up after one batch
    assert equal(batches(resumed.train, 2), epochs[2])


def test_the_ranks_batches_together_are_one_process_joint_batch(coloured):
    from ms_optim.train.order import Ranks

    given = {"data_dir": str(coloured), "num_classes": 3, "no_aug": True}
    joint = loaded(batch_size=8, **given)
    parts = [loaded(batch_size=4, ranks=Ranks(rank, 2), **given) for rank in (0, 1)]
    for epoch in (0, 1):
        one = batches(joint.train, epoch)
        for (x, y), *each in zip(one, *(batches(part.train, epoch) for part in parts), strict=True):
            assert torch.equal(x[0::2], each[0][0])
            assert torch.equal(x[1::2], each[1][0])
            assert torch.equal(y, torch.stack([each[0][1], each[1][1]], 1).flatten())


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"aa": "rand-m9-mstd0.5", **CROPPED}, "--aa rand-m9-mstd0.5"),
        ({}, "random resized crop, colour jitter"),
        ({"grayscale_prob": 0.2, **CROPPED}, "--grayscale-prob"),
        ({"gaussian_blur_prob": 0.2, **CROPPED}, "--gaussian-blur-prob"),
    ],
)
def test_what_batches_cannot_do_is_done_to_single_images_from_memory(coloured, given, reason, monkeypatch):
    found = loaded(data_dir=str(coloured), batch_size=8, num_classes=3, crop_pct=1.0, in_memory="yes", **given)
    assert isinstance(found.train, WorkerTraining)
    assert isinstance(found.validation, MemoryEvaluation)
    assert reason in found.description
    assert "decoded in memory" in found.description
    (coloured / "train").rename(coloured / "gone")  # decoded once: the files are read no more
    first = batches(found.train, 0)
    assert len(first) == len(found.train) == 4
    assert not equal(first, batches(found.train, 1))
    assert equal(first, batches(found.train, 0))


def test_evaluation_that_resizes_is_done_to_single_images_from_memory(coloured):
    given = {"data_dir": str(coloured), "batch_size": 8, "num_classes": 3, **CROPPED, "crop_pct": 0.875}
    memory, workers = loaded(in_memory="yes", **given), loaded(in_memory="no", **given)
    assert isinstance(memory.train, MemoryTraining)
    assert not isinstance(memory.validation, MemoryEvaluation)
    assert equal(batches(memory.validation), batches(workers.validation))
    assert equal([memory.sample(7)], [workers.sample(7)])


def test_images_of_another_size_are_left_to_workers_and_refused_where_memory_is_asked_for(coloured):
    Image.fromarray(np.zeros((16, 20, 3), np.uint8)).save(coloured / "train" / "c" / "9999.png")
    given = {"data_dir": str(coloured), "batch_size": 8, "num_classes": 3, **CROPPED}
    found = loaded(**given)
    assert isinstance(found.train, WorkerTraining)
    assert "has to be resized" in found.description
    assert len(batches(found.train, 0)) == len(found.train)
    with pytest.raises(CommandLineError, match=r"--in-memory yes: image 36 .* is \[3, 16, 20\], not \[3, 16, 16\]"):
        loaded(in_memory="yes", **given)


def test_what_exceeds_the_budget_is_left_to_workers_and_refused_where_memory_is_asked_for(coloured, monkeypatch):
    given = {"data_dir": str(coloured), "batch_size": 8, "num_classes": 3, **CROPPED}
    monkeypatch.setattr("ms_optim.train.loaders.BUDGET", 2 * 36 * 16 * 16 * 3)  # two of three splits
    assert isinstance(loaded(**given).train, WorkerTraining)
    with pytest.raises(CommandLineError, match="--in-memory yes: .* GiB"):
        loaded(in_memory="yes", **given)
    monkeypatch.setattr("ms_optim.train.loaders.BUDGET", 3 * 36 * 16 * 16 * 3)
    assert isinstance(loaded(**given).train, MemoryTraining)


def test_a_device_without_room_leaves_the_bytes_on_the_host(coloured, monkeypatch):
    monkeypatch.setattr(in_memory, "fits_on", lambda device, size: False)
    given = {"data_dir": str(coloured), "batch_size": 8, "num_classes": 3, **CROPPED}
    found = loaded(**given)
    assert found.train.pixels.device.type == "cpu"
    assert len(batches(found.train, 0)) == 4


@pytest.mark.cuda
def test_batches_on_a_gpu_are_those_on_the_cpu_and_resume_bit_for_bit(coloured):
    given = {"data_dir": str(coloured), "batch_size": 8, "num_classes": 3}
    plain = {**given, "no_aug": True}
    gpu, cpu = batches(loaded(device="cuda:0", **plain).train, 1), batches(loaded(**plain).train, 1)
    assert all(x.device.type == y.device.type == "cuda" for x, y in gpu)
    for (x, y), (u, v) in zip(gpu, cpu, strict=True):
        torch.testing.assert_close(x.cpu(), u, rtol=1e-6, atol=1e-6)
        assert torch.equal(y.cpu(), v)
    heavy = {**given, "hflip": 0.5, **CROPPED, "cutout": 5, "reprob": 0.5}
    whole = loaded(device="cuda:0", **heavy).train
    epochs = [batches(whole, epoch) for epoch in range(3)]
    torch.rand(3, device="cuda")
    assert equal(batches(loaded(device="cuda:0", **heavy).train, 2), epochs[2])
