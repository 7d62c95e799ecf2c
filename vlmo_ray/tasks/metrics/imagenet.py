"""Accuracy on ImageNet's validation images by the ReaL labels (Beyer et al. 2020), from the files of the package timm.

Such an image has any number of right classes, or none and is left out. timm is not imported, which would take seconds.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlmo_ray.tasks.task import Score

_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})")
_WORDNET = re.compile(r"n\d{8}")
_NUM_CLASSES = 1000


def has_wordnet_ids(names: Sequence[str]) -> bool:
    """Whether the classes are called as the 1,000 folders of ImageNet are, n01440764 and so on."""
    return len(names) == _NUM_CLASSES and all(_WORDNET.fullmatch(name) for name in names)


@functools.cache
def real_labels() -> tuple[tuple[str, ...], ...] | None:
    """The right classes, by WordNet id, of each of the 50,000 images in order; None without timm's files."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        return None
    files = Path(spec.submodule_search_locations[0]) / "data" / "_info"
    names = (files / "imagenet_synsets.txt").read_text().split()
    labels = json.loads((files / "imagenet_real_labels.json").read_text())
    return tuple(tuple(names[i] for i in each) for each in labels)


def real_top1(ids: Sequence[str], predicted: np.ndarray, names: Sequence[str]) -> Score | None:
    """The share of images whose predicted class, an index into `names`, is one of the right ones.

    Counts the images that have a right class. None if the classes are not ImageNet's, if an id is not of a validation
    image (it holds ILSVRC2012_val_00000001, say), or without timm's files.
    """
    images = [_IMAGE.search(name) for name in ids]
    if not has_wordnet_ids(names) or not all(images) or (labels := real_labels()) is None:
        return None
    right = [labels[int(image[1]) - 1] for image in images if image]
    known = [(names[best] in each, len(each)) for best, each in zip(predicted, right, strict=True) if each]
    if not known:
        return None
    hits, sizes = np.array(known).mean(axis=0)
    return Score(float(hits), float(sizes) / _NUM_CLASSES, len(known))
