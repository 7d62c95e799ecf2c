"""Does a model read colours and shapes off an image? One masked word of a sentence about a scene with one shape.

    python benchmarks/masked_words.py MODEL [MODEL ...] [--scenes 600]

For unseen scenes and for those of training, the share of colours, kinds and backgrounds that come first of the whole
vocabulary. A third of the unseen scenes have a colour on a kind that training never shows. A kind by chance: 12.5 %.
"""

from __future__ import annotations

import json
from itertools import count, islice

import numpy as np
import torch
import tyro
from tyro.conf import Positional

from vlmo_ray.config import DataConfig
from vlmo_ray.data.decode import decode_eval
from vlmo_ray.data.text import vocabulary
from vlmo_ray.demo.scenes.records import png
from vlmo_ray.demo.scenes.world import scene
from vlmo_ray.runs.load import load
from vlmo_ray.tasks.task import given, pixels

MASKED = {"colour": 2, "kind": 3, "background": 6}  # the place in the sentence, behind [CLS]


@torch.no_grad()
def right(model, split: str, scenes: int) -> dict[str, float]:
    number = {word: i for i, word in enumerate(vocabulary())}
    size = model.config.image_size
    drawn = (scene(1, i, split, size) for i in count())
    shown = list(islice((one for one in drawn if len(one.shapes) == 1), scenes))
    image = np.stack([decode_eval(png(one.image), size, DataConfig()) for one in shown])
    texts = (
        f"[CLS] a {one.shapes[0].colour} {one.shapes[0].kind} on a {one.background.colour} background [SEP]"
        for one in shown
    )
    text = torch.tensor([[number[word] for word in one.split()] for one in texts])
    found = {}
    for name, place in MASKED.items():
        asked = text.clone()
        asked[:, place] = number["[MASK]"]
        states = given(model.encode(image=pixels(model, torch.from_numpy(image)), text=asked).text)
        best = given(model.mlm)(states[:, place]).argmax(dim=1)
        found[name] = float((best == text[:, place]).float().mean())
    return found


def main(models: Positional[tuple[str, ...]], scenes: int = 600) -> None:
    for address in models:
        model = load(address).eval()
        for split in ("eval", "train"):
            print(json.dumps({"model": address, "scenes": split} | right(model, split, scenes)))


if __name__ == "__main__":
    tyro.cli(main)
