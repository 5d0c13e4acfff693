"""Training, validation and test sets: which images they are, and what is said when they cannot be had."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from train import pictures
from train.command import command

from ms_optim.errors import CommandLineError, DataError
from ms_optim.train import splits
from ms_optim.train.datasets import open_data
from ms_optim.train.images import held_out, stratified, with_label_noise
from ms_optim.train.order import Purpose


def opened(classes=10, channels=3, **given):
    return open_data(command(**given), channels, classes)


def filled(**given):
    options = command(**given)
    splits.fill(options)
    once = (options.holdout, options.val_split, options.test_split)
    splits.fill(options)
    assert (options.holdout, options.val_split, options.test_split) == once
    return once


def pixels(images):
    return np.stack([np.asarray(images[place][0]) for place in range(len(images))])


@pytest.fixture
def root(tmp_path):
    return pictures.splits(tmp_path)


@pytest.fixture
def one_folder(tmp_path):
    pictures.folder(tmp_path, each=20)
    return tmp_path


@hypothesis.given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=80), share=st.floats(0, 1), seed=st.integers(0, 9)
)
def test_a_stratified_choice_has_every_class_by_its_share(labels, share, seed):
    labels = np.asarray(labels)
    count = round(share * len(labels))
    chosen = stratified(labels, count, Purpose.CHOICE, seed)
    assert len(chosen) == count == len(set(chosen.tolist()))
    for label in np.unique(labels):
        exact = (labels == label).sum() * count / len(labels)
        assert abs((labels[chosen] == label).sum() - exact) < 1
    assert np.array_equal(chosen, stratified(labels, count, Purpose.CHOICE, seed))


def test_choices_differ_by_seed_and_by_purpose():
    labels = np.repeat(np.arange(3), 50)
    keys = [(Purpose.CHOICE, 0), (Purpose.CHOICE, 1), (Purpose.HELD_OUT, 0)]
    assert len({tuple(stratified(labels, 30, *key)) for key in keys}) == 3


@pytest.mark.parametrize(("holdout", "count"), [(0.1, 6), (7, 7), (0.5, 30)])
def test_what_is_held_out_is_not_trained_on(holdout, count):
    left, out = held_out(np.repeat(np.arange(3), 20), holdout, seed=0)
    assert len(out) == count
    assert sorted([*left, *out]) == list(range(60))


def test_label_noise_relabels_its_share_whatever_else_is_chosen():
    labels = np.repeat(np.arange(10), 2000)
    noisy = with_label_noise(labels, 0.3, 10, seed=0)
    changed = (noisy != labels).mean()
    assert abs(changed - 0.27) < 6 * (0.27 * 0.73 / len(labels)) ** 0.5  # a tenth of the redrawn stays right
    more = with_label_noise(labels, 0.6, 10, seed=0)
    assert np.array_equal(more[noisy != labels], noisy[noisy != labels])
    assert np.array_equal(with_label_noise(labels, 0.0, 10, seed=0), labels)
    assert np.bincount(with_label_noise(labels, 1.0, 10, seed=1)).min() > 1700


def test_digits_hold_a_tenth_of_their_training_images_out():
    assert filled(dataset="digits") == (0.1, "", "test")
    found = opened(dataset="digits", channels=1)
    assert [len(part) for part in (found.train, found.validation, found.test)] == [900, 100, 797]
    assert set(found.train.indices).isdisjoint(found.validation.indices)
    assert found.validation.source is found.train.source
    assert found.test.source is not found.train.source
    again = opened(dataset="digits", channels=1, seed=7)
    assert np.array_equal(found.validation.indices, again.validation.indices)
    other = opened(dataset="digits", channels=1, split_seed=7)
    assert not np.array_equal(found.validation.indices, other.validation.indices)


def test_digits_are_those_of_the_demo():
    from ms_optim.demo.training import digits

    both, found = digits(seed=0), opened(dataset="digits", channels=1, holdout=0)
    for images, x, y in ((found.train, both.x, both.y), (found.test, both.x_test, both.y_test)):
        assert images.labels.tolist() == y.tolist()
        ours = pixels(images).astype(float)
        standardised = (ours - 255 * 0.28652) / (255 * 0.35353)
        assert np.abs(standardised - x.squeeze(1).numpy()).max() < 1e-4


@pytest.mark.parametrize("split", ["validation", "test", "val"])
def test_validation_on_the_test_set_is_refused(split):
    with pytest.raises(CommandLineError, match=r"is its test set.*--holdout"):
        filled(dataset="digits", val_split=split)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (None, "validation", "test")),
        ({"holdout": 0.2}, (0.2, "", "test")),
        ({"holdout": 0}, (0, "", "test")),
        ({"val_split": ""}, (0, "", "test")),
        ({"test_split": ""}, (None, "validation", "")),
        ({"test_split": "validation", "holdout": 5}, (5, "", "validation")),
    ],
)
def test_a_folder_with_a_validation_split_uses_it_unless_told_otherwise(root, given, expected):
    assert filled(data_dir=str(root), **given) == expected


def test_a_folder_of_classes_is_a_training_split_of_which_a_part_is_held_out(one_folder):
    assert filled(data_dir=str(one_folder)) == (0.1, "", "")
    found = opened(data_dir=str(one_folder))
    assert (len(found.train), len(found.validation), found.test) == (54, 6, None)
    assert np.bincount(found.validation.labels).tolist() == [2, 2, 2]


def test_folders_and_tars_of_the_same_images_are_read_alike(root, tmp_path_factory):
    tars = tmp_path_factory.mktemp("tars")
    for name in ("train", "test"):
        pictures.tar(tars / f"{name}.tar", root / name)
    (root / "validation").rename(root / "elsewhere")
    folders, archives = (opened(data_dir=str(where)) for where in (root, tars))
    assert "held out" in archives.description
    for name in ("train", "validation", "test"):
        one, other = getattr(folders, name), getattr(archives, name)
        assert np.array_equal(one.labels, other.labels)
        assert np.array_equal(pixels(one), pixels(other))
    single = opened(data_dir=str(tars / "train.tar"), holdout=0)
    assert len(single.train) == 36
    assert single.validation is single.test is None


def test_another_name_of_a_split_is_found(root):
    (root / "validation").rename(root / "val")
    (root / "train").rename(root / "few")
    assert filled(data_dir=str(root), train_split="few") == (None, "validation", "test")
    assert len(opened(data_dir=str(root), train_split="few", val_split="val").validation) == 36
    with pytest.raises(DataError, match=r"has validation, test but no train.*--train-split"):
        filled(data_dir=str(root))
    with pytest.raises(DataError, match=r"--test-split nothing: .* has no such split; it has"):
        filled(data_dir=str(root), train_split="few", test_split="nothing")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"val_split": "train"}, "is what is trained on"),
        ({"val_split": "test"}, "is its test set"),
        ({"val_split": "validation", "holdout": 0.1}, "two validation sets"),
        ({"test_split": "train"}, "is what is trained on"),
        ({"holdout": -0.1}, "share below 1 or a count"),
        ({"holdout": 1.5}, "share below 1 or a count"),
        ({"dataset": "cifar10"}, "is not one of '' .*torch/NAME"),
        ({"dataset": "torch/cifar11"}, "none of torchvision's that timm opens: cifar10"),
        ({"data_dir": None}, "needs --data-dir DIR"),
        ({"dataset": "torch/cifar10", "data_dir": None}, "--dataset-download"),
        ({"dataset": "torch/cifar10", "train_split": "test"}, "would be its test set"),
    ],
)
def test_wrong_splits_and_names_are_refused(root, given, message):
    with pytest.raises(CommandLineError, match=message):
        filled(**{"data_dir": str(root), **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_num_samples": 100}, r"--train-num-samples 100 must be between 1 and the 36 images"),
        ({"epoch_repeats": 2.0}, "--epoch-repeats"),
        ({"label_noise": 1.5}, "--label-noise must be a share"),
        ({"dataset_download": True}, "--dataset-download cannot fetch"),
        ({"input_img_mode": "L"}, "need an --input-img-mode of as many"),
        ({"input_img_mode": "nothing"}, "no mode of PIL"),
        ({"classes": 2}, "labels up to 2, and the model has 2 classes; pass --num-classes 3"),
        ({"holdout": 36}, "both parts need one"),
        ({"dataset": "torch/imagenet", "dataset_download": True}, "ILSVRC2012_devkit_t12.tar.gz"),
        ({"dataset": "digits", "class_map": "map.txt", "channels": 1}, "--class-map is not read"),
    ],
)
def test_options_that_do_not_fit_the_data_are_refused(root, given, message):
    with pytest.raises((CommandLineError, DataError), match=message):
        opened(**{"data_dir": str(root), **given})


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("torch/cifar10", "--dataset-download"),
        ("torch/mnist", "--dataset-download"),
        ("torch/imagenet", "ILSVRC2012_img_train.tar"),
    ],
)
def test_data_that_are_not_there_are_named_with_what_fetches_them(tmp_path, dataset, message):
    with pytest.raises(DataError, match=message) as caught:
        opened(dataset=dataset, data_dir=str(tmp_path), classes=1000, channels=1 if dataset == "torch/mnist" else 3)
    assert dataset in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_that_is_not_there_or_empty_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere is not there.*CLASS/IMAGE"):
        opened(data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"cannot be opened in .*CLASS/IMAGE"):
        opened(data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("dataset", "package"),
    [
        ("digits", "scikit-learn"),
        ("torch/cifar10", "torchvision"),
        ("hfds/someone/something", "datasets"),
        ("wds/shards", "webdataset"),
        ("tfds/something", "tensorflow tensorflow-datasets"),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(dataset, package, monkeypatch, tmp_path):
    monkeypatch.setattr(splits, "find_spec", lambda name: None)
    with pytest.raises(CommandLineError, match=rf"not installed: pip install {package}$"):
        filled(dataset=dataset, data_dir=str(tmp_path))


def test_an_image_that_cannot_be_read_is_an_error_and_not_its_neighbour(one_folder):
    found = opened(data_dir=str(one_folder), holdout=0)
    (one_folder / "a" / "0003.png").write_bytes(b"not an image")
    assert len(pixels(found.train.chosen(np.array([2])))) == 1
    with pytest.raises(DataError, match=r"image 3 of .*0003\.png, cannot be read"):
        found.train[3]


def test_a_training_subset_is_taken_of_what_is_left(one_folder):
    given = {"data_dir": str(one_folder), "holdout": 0.2}
    everything, few = opened(**given), opened(train_num_samples=12, val_num_samples=6, **given)
    assert np.bincount(few.train.labels).tolist() == [4, 4, 4]
    assert set(few.train.indices) < set(everything.train.indices)
    assert set(few.validation.indices) < set(everything.validation.indices)
    assert len(few.validation) == 6


def test_label_noise_reaches_training_and_held_out_images_and_never_the_test(root):
    given = {"data_dir": str(root), "holdout": 12, "classes": 3}
    clean, noisy = opened(**given), opened(label_noise=1.0, **given)
    for name in ("train", "validation", "test"):
        one, other = getattr(clean, name), getattr(noisy, name)
        assert np.array_equal(one.indices, other.indices)
        assert np.array_equal(one.labels, other.labels) == (name == "test")
    everything = opened(label_noise=1.0, **{**given, "holdout": 0})
    together = np.empty(36, dtype=int)
    for part in (noisy.train, noisy.validation):
        together[part.indices] = part.labels
    assert np.array_equal(everything.train.labels, together)


def test_classes_of_two_splits_are_numbered_alike(tmp_path):
    pictures.folder(tmp_path / "train", classes=("a", "b", "c"))
    pictures.folder(tmp_path / "test", classes=("b", "c"))
    assert np.unique(opened(data_dir=str(tmp_path)).test.labels).tolist() == [1, 2]
    pictures.folder(tmp_path / "test", classes=("d",))
    with pytest.raises(DataError, match=r"classes of test .* d are new"):
        opened(data_dir=str(tmp_path))


def test_hugging_face_data_sets_are_read_with_their_splits(root, monkeypatch):
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_OFFLINE", True)
    given = {"dataset": f"hfds/{root}", "data_dir": str(root.parent / "cache")}
    assert filled(**given) == (None, "validation", "test")
    found = opened(**given)
    assert np.bincount(found.train.labels).tolist() == [12, 12, 12]
    assert np.array_equal(pixels(found.test), pixels(opened(data_dir=str(root)).test))
    with pytest.raises(DataError, match="cannot be found"):
        opened(dataset=f"hfds/{root}/nowhere")


def test_mnist_is_split_in_three(data_root):
    found = opened(dataset="torch/mnist", data_dir=str(data_root), channels=1)
    assert [len(part) for part in (found.train, found.validation, found.test)] == [54000, 6000, 10000]
    with pytest.raises(CommandLineError, match="is its test set"):
        opened(dataset="torch/mnist", data_dir=str(data_root), channels=1, val_split="validation")


@pytest.mark.slow
def test_cifar10_is_read_from_its_tars(data_root):
    found = opened(data_dir=str(data_root / "cifar10"))
    assert [len(part) for part in (found.train, found.validation, found.test)] == [45000, 5000, 10000]
    assert np.bincount(found.validation.labels).tolist() == [500] * 10
    assert found.test[0][0].size == (32, 32)
