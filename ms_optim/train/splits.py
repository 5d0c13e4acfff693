"""Splits: which images a run trains on, which choose its best checkpoint, and which are only looked at: three sets.

timm reads `validation` of CIFAR, MNIST and their kin from the test set, so that the best checkpoint is chosen on it.
Here a data set without a validation split has a part of its training images held out instead, and a validation split
that is the test set is refused.

    validation split there      it is taken                              val_split = its name
    none                        a tenth of the training images           holdout = 0.1
    --val-split NAME            that one                                 val_split = NAME
    --holdout SHARE or COUNT    so many of the training images           holdout
    --holdout 0, --val-split '' nothing: the last checkpoint is kept     holdout = 0
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import CommandLineError, DataError

HOLDOUT = 0.1
TRAINING = ("train", "training")
VALIDATION = ("validation", "val", "valid", "eval", "evaluation")
TEST = ("test", "testing")
# Of torchvision's data sets: those that timm opens as (train, test), and those that have a validation split.
TRAIN_AND_TEST = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
TRAIN_AND_VALIDATION = ("imagenet", "places365", "inaturalist", "inat")
FOLDERS = ("image_folder", "folder")
ITERABLE = ("hfids", "wds", "tfds")
_LIBRARIES = {
    "digits": ("sklearn", "scikit-learn"),
    "torch": ("torchvision", "torchvision"),
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "wds": ("webdataset", "webdataset"),
    "tfds": ("tensorflow_datasets", "tensorflow tensorflow-datasets"),
}
_KNOWN = "'' (a folder or tar in --data-dir), digits, torch/NAME, hfds/NAME, hfids/NAME, wds/NAME or tfds/NAME"


def kind(options: argparse.Namespace) -> tuple[str, str]:
    """What sort of data set is asked for.

    Args:
        options: ``dataset``.

    Returns:
        ``("folder", "")``, ``("digits", "")``, or timm's prefix and the name after it.

    Raises:
        CommandLineError: If there is no such sort, or the library that reads it is not installed.
    """
    prefix, slash, name = (options.dataset or "").partition("/")
    sort = prefix.lower() if slash else {"": "folder", "digits": "digits"}.get(prefix, "")
    if sort not in _LIBRARIES and (slash or sort != "folder"):
        raise CommandLineError(f"--dataset {options.dataset} is not one of {_KNOWN}")
    if sort == "torch":
        name = name.lower()
        known = (*TRAIN_AND_TEST, *TRAIN_AND_VALIDATION, *FOLDERS)
        if name not in known:
            raise CommandLineError(
                f"--dataset torch/{name} is none of torchvision's that timm opens: {', '.join(known)}"
            )
    if sort in _LIBRARIES:
        module, package = _LIBRARIES[sort]
        if find_spec(module) is None:
            raise CommandLineError(
                f"--dataset {options.dataset} is read by {package.split()[-1]}, which is not installed: "
                f"pip install {package}"
            )
    if options.data_dir is None and sort in ("folder", "torch", "wds"):
        where = f" with --dataset-download, or where {options.dataset} lies" if sort == "torch" else ""
        raise CommandLineError(
            f"--dataset {options.dataset or repr('')} needs --data-dir DIR: "
            + (f"where it is put{where}" if where else "where the images lie")
        )
    return sort, name


def is_folder(sort: str, name: str) -> bool:
    """Whether a sort of data set is made of images in folders or tars.

    Args:
        sort: As of :func:`kind`.
        name: As of :func:`kind`.

    Returns:
        Whether.
    """
    return sort == "folder" or (sort == "torch" and name in FOLDERS)


def locate(root: Path, split: str) -> Path | None:
    """The folder or tar that holds a split: of its name, or else of one that timm takes to mean the same.

    Args:
        root: ``--data-dir``.
        split: Its name.

    Returns:
        ``root/split``, ``root/split.tar``, or the like; ``None``: there is none.
    """
    same = next((group for group in (TRAINING, VALIDATION, TEST) if split in group), ())
    for name in (split, *same):
        for path in (root / name, root / f"{name}.tar"):
            if path.is_dir() or path.is_file() and path.suffix == ".tar":
                return path
    return None


def fill(options: argparse.Namespace) -> None:
    """Give values to ``holdout``, ``val_split`` and ``test_split`` where the user gave none.

    A second call changes nothing.

    Args:
        options: The command line; changed.

    Raises:
        CommandLineError: If what is asked for contradicts itself or would validate on the test set.
        DataError: If the data set or a split of it is not there.
    """
    sort, name = kind(options)
    holdout = options.holdout
    if holdout is not None and (holdout < 0 or (holdout >= 1 and holdout != int(holdout))):
        raise CommandLineError(
            f"--holdout must be a share below 1 or a count of training images, got {holdout}; 0 holds none out"
        )
    if holdout and sort in ITERABLE:
        raise CommandLineError(
            f"--holdout {holdout} takes images out of a training split, and {sort}/ data sets are read in one "
            "direction only; give a validation split with --val-split NAME, or --holdout 0 to train without one"
        )
    if holdout and options.val_split:
        raise CommandLineError(
            f"--holdout {holdout} and --val-split {options.val_split} are two validation sets; give one of them"
        )
    there = available(options)
    train_and_test = sort == "digits" or (sort == "torch" and name in TRAIN_AND_TEST)
    title = options.dataset or str(options.data_dir)
    if train_and_test and options.train_split not in TRAINING:
        raise CommandLineError(
            f"--train-split {options.train_split} of {title} would be its test set; its training split is train"
        )
    _check_there(options.train_split, "--train-split", there, title)
    if options.val_split:
        _check_validation(options.val_split, options.train_split, train_and_test, title)
        _check_there(options.val_split, "--val-split", there, title)
    elif options.val_split == "":
        options.holdout = 0 if holdout is None else holdout
    elif holdout is not None:
        options.val_split = ""
    else:
        found = next((each for each in VALIDATION if there is not None and each in there), None)
        if found is None and sort in ITERABLE:
            has = "what splits it has is not known" if there is None else f"it has {', '.join(there) or 'none'}"
            raise CommandLineError(
                f"{title} has no validation split by a usual name ({has}), and nothing can be held out of a data set "
                "that is read in one direction; give one with --val-split NAME, or --holdout 0 to train without"
            )
        options.val_split = found or ""
        options.holdout = None if found else HOLDOUT
    if options.test_split is None:
        options.test_split = next((each for each in TEST if there is not None and each in there), "")
    elif options.test_split:
        if options.test_split == options.train_split:
            raise CommandLineError(f"--test-split {options.test_split} is what is trained on; --test-split '' has none")
        _check_there(options.test_split, "--test-split", there, title)


def _check_validation(split: str, train: str, train_and_test: bool, title: str) -> None:
    """Refuse a validation split that is another one."""
    if split in TRAINING or split == train:
        raise CommandLineError(
            f"--val-split {split} of {title} is what is trained on; --holdout {HOLDOUT} holds a part of it out instead"
        )
    if train_and_test or split in TEST:
        raise CommandLineError(
            f"--val-split {split} of {title} is its test set, on which the best checkpoint would be chosen; leave it "
            "out: a tenth of the training images is held out, or as many as --holdout says; the test set is scored too"
        )


def _check_there(split: str, option: str, there: tuple[str, ...] | None, title: str) -> None:
    """Refuse a split that is not there; expressions such as ``train[:10%]`` are left to those who read them."""
    if there is None or not split.replace("_", "").replace("-", "").isalnum():
        return
    same = next((group for group in (TRAINING, VALIDATION, TEST) if split in group), (split,))
    if split not in there and not set(same) & set(there):
        raise DataError(f"{option} {split}: {title} has no such split; it has {', '.join(there) or 'none'}")


def available(options: argparse.Namespace) -> tuple[str, ...] | None:
    """The names of a data set's splits.

    Args:
        options: The command line.

    Returns:
        The names; ``None``: they are not known before it is opened.

    Raises:
        DataError: If the data set is not there.
    """
    sort, name = kind(options)
    if sort == "digits" or (sort == "torch" and name in TRAIN_AND_TEST):
        return ("train", "test")
    if is_folder(sort, name):
        return _in_folder(Path(options.data_dir), options.train_split)
    if sort == "torch":
        return ("train", "val")
    if sort in ("hfds", "hfids"):
        return _of_hugging_face(name, options)
    return _of_shards(str(options.data_dir)) if sort == "wds" else None


def _in_folder(root: Path, train: str) -> tuple[str, ...]:
    """The splits that folders or tars are named for; without any all images are the training split."""
    if root.is_file():
        return ("train",)
    if not root.is_dir():
        raise DataError(
            f"--data-dir {root} is not there; it should hold train/CLASS/IMAGE and so on, train.tar, or CLASS/IMAGE"
        )
    names = [group[0] for group in (TRAINING, VALIDATION, TEST) if locate(root, group[0]) is not None]
    if locate(root, train) is not None and train not in TRAINING:
        names.append(train)
    elif "train" not in names:
        if names:
            raise DataError(
                f"{root} has {', '.join(names)} but no {train}, so what to train on is not known; name the folder or "
                "tar with --train-split"
            )
        names = ["train"]
    others = [path.name.removesuffix(".tar") for path in root.iterdir() if path.is_dir() or path.suffix == ".tar"]
    # In a folder of classes the sub-folders are classes; beside train/ they may be further splits.
    known = {*TRAINING, *VALIDATION, *TEST, *names}
    return (*names, *sorted(set(others) - known)) if locate(root, train) is not None else tuple(names)


def _of_hugging_face(name: str, options: argparse.Namespace) -> tuple[str, ...]:
    library: Any = import_module("datasets")
    trust = {"trust_remote_code": True} if options.dataset_trust_remote_code else {}
    try:
        splits = library.load_dataset_builder(name, cache_dir=options.data_dir, **trust).info.splits
        return tuple(splits or library.get_dataset_split_names(name, **trust))
    except Exception as error:
        raise DataError(
            f"{options.dataset} cannot be found: {type(error).__name__}: {' '.join(str(error).split())}; check its "
            "name (hfds/OWNER/NAME, or hfds/ and a folder), the network, and whether `hf auth login` is needed"
        ) from error


def _of_shards(root: str) -> tuple[str, ...] | None:
    """Of the file that describes shards, where it is there and on this machine."""
    for file in (Path(root) / "_info.json", Path(root) / "info.json"):
        if file.is_file():
            return tuple(json.loads(file.read_text(encoding="utf-8")).get("splits", {}))
    if "://" not in root and not root.startswith("pipe:") and not Path(root).is_dir():
        raise DataError(
            f"--data-dir {root} is not there; a wds/ data set is a folder of shards (NAME-train-0000.tar, …) with "
            "_info.json, which names its splits, or with --train-split 'NAME-train-{0000..0099}.tar|SAMPLES'"
        )
    return None
