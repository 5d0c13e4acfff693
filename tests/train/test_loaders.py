"""Loaders: the same epoch always gives the same batches, and evaluation is exact."""

import gc
import json
import shutil

import numpy as np
import pytest
import torch
from distributed.torchrun import on_two_ranks
from train import pictures, stream_ranks
from train.command import batches, loaded

from ms_optim.errors import CommandLineError, DataError
from ms_optim.train.order import Ranks
from ms_optim.train.workers import WorkerTraining

HEAVY = {
    "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.5, "mixup": 0.2, "cutmix": 1.0, "cutout": 4, "hflip": 0.5, "vflip": 0.1,
    "color_jitter": 0.4, "color_jitter_prob": 0.8, "grayscale_prob": 0.2, "num_classes": 3, "batch_size": 4,
    "in_memory": "no",
}  # fmt: skip


def equal(one, other):
    assert len(one) == len(other)
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(one, other, strict=True))


@pytest.fixture
def root(tmp_path):
    return pictures.splits(tmp_path)


@pytest.mark.parametrize("further", [{}, {"no_prefetcher": True}], ids=["prefetcher", "no prefetcher"])
def test_a_resumed_epoch_is_bitwise_the_uninterrupted_one_with_any_number_of_workers(root, further):
    given = {**HEAVY, "data_dir": str(root), **further}
    whole = loaded(workers=2, **given)
    epochs = [batches(whole.train, epoch) for epoch in range(4)]
    assert whole.train.mixes == (not further)
    assert [len(each) for each in epochs] == [len(whole.train)] * 4
    torch.rand(3)  # the training has drawn numbers in between
    resumed = loaded(workers=2, **given)
    for epoch in (2, 3):
        assert equal(batches(resumed.train, epoch), epochs[epoch])
    assert not equal(epochs[2], epochs[3])
    assert equal(batches(loaded(workers=0, **given).train, 2), epochs[2])
    assert not equal(batches(loaded(workers=0, seed=1, **given).train, 2), epochs[2])
    assert not equal(batches(loaded(workers=0, ranks=Ranks(1, 2), **given).train, 2), epochs[2][:4])


@pytest.mark.parametrize(
    "given",
    [
        {"in_memory": "yes", "crop_padding": 4, "color_jitter": 0.0},
        {"in_memory": "no"},
        {"in_memory": "no", "no_prefetcher": True, "workers": 2},
    ],
    ids=["memory", "this process", "workers"],
)
def test_every_batch_of_every_epoch_and_rank_is_augmented_anew(tmp_path, given):
    # All images are one, so only augmentation makes batches differ.
    for label in "ab":
        pictures.folder(tmp_path / "train" / label, classes=(label,), each=1)
        for copy in range(1, 12):
            shutil.copy(tmp_path / "train" / label / label / "0000.png", tmp_path / "train" / label / f"{copy}.png")
    given = {
        "data_dir": str(tmp_path),
        "batch_size": 3,
        "num_classes": 2,
        "holdout": 0,
        "train_num_samples": 24,
        **given,
    }
    found = []
    for rank in (0, 1):
        train = loaded(ranks=Ranks(rank, 2), **given).train
        found += [x for epoch in range(3) for x, _ in batches(train, epoch)]
    assert len(found) == 24
    assert all(not torch.equal(x, u) for i, x in enumerate(found) for u in found[:i])


def test_workers_do_not_share_the_place_in_a_tar_that_this_process_reads_in(root, monkeypatch):
    tar = pictures.tar(root / "all.tar", root / "train")
    given = {"data_dir": str(tar), "num_classes": 3, "batch_size": 2, "no_aug": True, "in_memory": "no", "holdout": 0}
    found, expected = loaded(workers=2, **given), loaded(workers=0, **given)
    images = found.train.batches.loader.dataset.images
    first = images[0][0]  # opens the tar before there are workers
    assert equal(batches(found.train, 0), batches(expected.train, 0))
    mine = images.source._reader.tar_state.tf
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: -1)  # as in a worker
        assert torch.equal(images[0][0], first)
    assert images.source._reader.tar_state.tf is not mine


def test_an_epoch_that_was_given_up_leaves_no_trace(root):
    given = {**HEAVY, "data_dir": str(root), "workers": 2}
    found, fresh = loaded(**given), loaded(**given)
    found.train.set_epoch(0)
    next(iter(found.train))
    assert equal(batches(found.train, 1), batches(fresh.train, 1))


def test_preparing_images_in_this_process_draws_nothing_from_the_training(root):
    found = loaded(**{**HEAVY, "data_dir": str(root), "workers": 0})
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    drawn = [torch.rand(())]
    batches(found.train, 0)
    batches(found.validation)
    found.sample(5)
    drawn.append(torch.rand(()))
    assert torch.equal(torch.stack(drawn), expected)


def test_the_ranks_batches_together_are_one_process_joint_batch(root):
    given = {"data_dir": str(root), "num_classes": 3, "no_aug": True, "in_memory": "no"}
    joint = loaded(batch_size=8, **given)
    parts = [loaded(batch_size=4, ranks=Ranks(rank, 2), **given) for rank in (0, 1)]
    for (x, y), (u, v), (w, z) in zip(
        batches(joint.train, 1), *(batches(part.train, 1) for part in parts), strict=True
    ):
        assert torch.equal(x, torch.stack([u, w], 1).flatten(0, 1))
        assert torch.equal(y, torch.stack([v, z], 1).flatten())


@pytest.mark.parametrize("in_memory", ["yes", "no"])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_evaluation_on_ranks_sees_every_image_once(root, in_memory, world):
    given = {"data_dir": str(root), "num_classes": 3, "batch_size": 4, "in_memory": in_memory, "crop_pct": 1.0}
    given |= {"val_num_samples": 23, "train_crop_mode": "pad", "validation_batch_size": 3}
    whole = torch.cat([x for x, _ in batches(loaded(**given).validation)])
    seen, lengths = [], set()
    for rank in range(world):
        part = loaded(ranks=Ranks(rank, world), **given).validation
        found = batches(part)
        lengths.add((len(part), len(found)))
        seen.append(torch.cat([x for x, _ in found])[: part.real])
    assert len(whole) == sum(map(len, seen)) == 23
    assert len(lengths) == 1
    assert all(torch.equal(whole[rank::world], each) for rank, each in enumerate(seen))


def test_mixing_stops_at_its_epoch_in_workers_that_live_on(root):
    given = {"data_dir": str(root), "num_classes": 3, "batch_size": 8, "in_memory": "no", "smoothing": 0.0}
    found = loaded(mixup=1.0, mixup_off_epoch=1, workers=1, **given)
    assert found.train.mixes
    mixed, plain = (torch.cat([y for _, y in batches(found.train, epoch)]) for epoch in (0, 1))
    assert (mixed.max(1).values < 1).any()
    assert torch.equal(plain.max(1).values, torch.ones(len(plain), dtype=plain.dtype))
    with pytest.raises(CommandLineError, match="mixup and cutmix mix pairs of images, and --batch-size 7 is odd"):
        loaded(mixup=1.0, **{**given, "batch_size": 7})


def test_training_images_are_erased_and_cut_and_evaluation_images_are_not(root):
    given = {"data_dir": str(root), "num_classes": 3, "batch_size": 36, "in_memory": "no", "crop_pct": 1.0}
    given |= {"train_crop_mode": "pad", "crop_padding": 0, "hflip": 0.0, "color_jitter": 0.0, "cutout": 6}
    for further in ({}, {"no_prefetcher": True}):
        found = loaded(**given, **further)
        x, _ = batches(found.train, 0)[0]
        blank = (x == 0).all(1).sum((1, 2))
        assert blank.min() >= 9  # a quarter of the square is inside at least
        assert blank.max() == 36
        assert not (torch.cat([x for x, _ in batches(found.validation)]) == 0).all(1).any()
        untouched = batches(loaded(**given, **further, no_aug=True).train, 0)[0][0]
        assert not (untouched == 0).all(1).any()


def test_a_sample_is_the_same_for_every_seed_and_is_not_augmented(root):
    given = {**HEAVY, "data_dir": str(root)}
    x, y = loaded(**given).sample(9)
    u, v = loaded(**given, seed=5).sample(9)
    assert torch.equal(x, u)
    assert torch.equal(y, v)
    assert y.bincount().tolist() == [3, 3, 3]
    everything, _ = loaded(**given).sample(1000)
    assert len(everything) == 36
    assert all((everything == image).flatten(1).all(1).any() for image in x)
    assert not torch.equal(loaded(**given, split_seed=5).sample(9)[0], x)


def test_images_of_one_channel_are_read_as_such(tmp_path):
    pictures.splits(tmp_path, channels=1)
    found = loaded(data_dir=str(tmp_path), preset="mnist", img_size=16, batch_size=6, in_memory="no")
    x, _ = batches(found.train, 0)[0]
    assert x.shape == (6, 1, 16, 16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"batch_size": 37}, "36 training images are less than one batch of 37"),
        ({"cutout": -1}, "--cutout is the side of a square"),
        ({"worker_seeding": "part"}, "--worker-seeding part"),
        ({"in_memory": "perhaps"}, "auto, yes or no, got perhaps"),
        ({"mean": [0.5, 0.5]}, "need a mean for each or for all"),
        ({"num_classes": 2}, "pass --num-classes 3"),
    ],
)
def test_what_cannot_be_loaded_is_refused(root, given, message):
    with pytest.raises((CommandLineError, DataError), match=message):
        loaded(**{"data_dir": str(root), "num_classes": 3, **given})


def test_an_error_in_a_worker_names_the_image(root):
    found = loaded(data_dir=str(root), num_classes=3, batch_size=4, in_memory="no", workers=1)
    (root / "train" / "a" / "0003.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"0003\.png, cannot be read"):
        batches(found.train, 0)


@pytest.fixture
def shards(tmp_path):
    pytest.importorskip("webdataset")
    splits = {
        name: pictures.shards(tmp_path, count, 8, seed=seed, name=name)
        for seed, (name, count) in enumerate({"train": 4, "validation": 3}.items())
    }
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    yield {"dataset": "wds/pictures", "data_dir": str(tmp_path), "num_classes": 3, "batch_size": 4}
    gc.collect()  # while the test's filter of warnings is in force


# webdataset leaves its files to the garbage collector, which says so whenever it comes by.
leaves_files_open = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def numbers(found):
    """Which images of the shards these are."""
    return sorted(int(n) for x, _ in found for n in (x[:, 0, 0, 0] * 0.25 + 0.5).mul(255).round())


@leaves_files_open
@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset_epochs_are_resumed_bit_for_bit(shards, workers):
    given = {**HEAVY, **shards, "workers": workers, "in_memory": "auto"}
    whole = loaded(**given)
    assert isinstance(whole.train, WorkerTraining)
    epochs = [batches(whole.train, epoch) for epoch in range(3)]
    assert [len(each) for each in epochs] == [len(whole.train)] * 3
    assert equal(batches(loaded(**given).train, 2), epochs[2])
    assert not equal(epochs[1], epochs[2])


@leaves_files_open
@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset_is_evaluated_once_and_sampled_in_order(shards, workers):
    found = loaded(**shards, workers=workers, crop_pct=1.0)
    for _ in range(2):
        assert numbers(batches(found.validation)) == list(range(24))
        assert found.validation.real >= 24  # nothing is padding
    assert numbers(batches(loaded(**shards, workers=workers, no_aug=True).train, 0)) == list(range(32))
    x, y = found.sample(5)
    assert numbers([(x, y)]) == [0, 1, 2, 3, 4]
    assert y.tolist() == [0, 1, 2, 0, 1]
    assert found.test is None


@leaves_files_open
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"holdout": 0.1}, "read in one direction only"),
        ({"label_noise": 0.1}, "--label-noise 0.1 relabels images by their place"),
        ({"aug_repeats": 3.0}, "--aug-repeats 3.0 repeats images by their places"),
        ({"in_memory": "yes"}, "--in-memory yes: .* is read in one direction"),
        ({"val_split": "nothing"}, "no such split; it has train, validation"),
        ({"data_dir": "nowhere"}, "_info.json"),
        ({"num_classes": 2}, "label 2, and the model has 2 classes"),
    ],
)
def test_what_streams_cannot_do_is_refused(shards, given, message):
    with pytest.raises((CommandLineError, DataError), match=message):
        batches(loaded(**{**shards, **given}).train, 0)


@leaves_files_open
@pytest.mark.slow
def test_webdataset_is_evaluated_once_on_two_ranks_of_unequal_shards(shards):
    seen = [json.loads(line) for line in on_two_ranks(stream_ranks.__file__, shards["data_dir"]).splitlines()]
    assert sorted(number for each in seen for number in each["numbers"]) == list(range(24))
    assert len({each["batches"] for each in seen}) == 1
    assert sorted(each["real"] for each in seen) == [8, 16]


def test_a_hugging_face_data_set_is_loaded(root, monkeypatch):
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_OFFLINE", True)
    given = {"num_classes": 3, "batch_size": 6, "no_aug": True, "in_memory": "no"}
    hugging_face = loaded(dataset=f"hfds/{root}", data_dir=str(root.parent / "cache"), **given)
    assert equal(batches(hugging_face.train, 1), batches(loaded(data_dir=str(root), **given).train, 1))
    assert np.isfinite(batches(hugging_face.validation)[0][0].numpy()).all()
