"""Folders and tars of small pictures, as users have them."""

from __future__ import annotations

import io
import tarfile

import numpy as np
from PIL import Image


def random_images(count, size=(16, 16), channels=3, seed=0):
    shape = (count, *size) if channels == 1 else (count, *size, channels)
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def folder(root, classes=("a", "b", "c"), each=12, **images):
    """CLASS/NUMBER.png; the pixels, ``[N, H, W(, 3)]``, in timm's order."""
    pixels = random_images(len(classes) * each, **images)
    for index, picture in enumerate(pixels):
        place = root / classes[index // each]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{index:04d}.png")
    return pixels


def splits(root, names=("train", "validation", "test"), **images):
    """A folder of splits."""
    for seed, name in enumerate(names):
        folder(root / name, seed=seed, **images)
    return root


def tar(file, source):
    """A tar of a folder of classes."""
    with tarfile.open(file, "w") as archive:
        for path in sorted(source.rglob("*.png")):
            archive.add(path, path.relative_to(source))
    return file


def shards(root, count, each, classes=3, seed=0, name="train"):
    """WebDataset shards; the first pixel of each image is its number."""
    pixels = random_images(count * each, seed=seed)
    names = []
    for shard in range(count):
        names.append(f"{name}-{shard:04d}.tar")
        with tarfile.open(root / names[-1], "w") as archive:
            for index in range(shard * each, (shard + 1) * each):
                pixels[index, 0, 0] = index
                file = io.BytesIO()
                Image.fromarray(pixels[index]).save(file, "png")
                for suffix, content in (("png", file.getvalue()), ("cls", str(index % classes).encode())):
                    entry = tarfile.TarInfo(f"{index:06d}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return {"name": name, "filenames": names, "shard_lengths": [each] * count, "num_samples": count * each}
