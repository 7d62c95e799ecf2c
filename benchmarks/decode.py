"""The two decoders: milliseconds of CPU time per picture, and how far their pixels are apart.

    python benchmarks/decode.py [FOLDER] [--count 300] [--sizes 64 224]

Time: the whole augmentation of photo-like JPEGs of 500 x 375 pixels, made here, at 224 pixels. Pixels: of the JPEGs in
FOLDER (default: those made here), whole, at each size, without augmentation; of 255.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import tyro
from data import make_picture
from report import publish, table

from vlmo_ray.config import DataConfig
from vlmo_ray.data.decode import decode_eval, decode_train
from vlmo_ray.data.encoders import Draw

DECODERS = {name: DataConfig(decoder=name) for name in ("fast", "pillow")}


def milliseconds(pictures: list[bytes], data: DataConfig) -> float:
    began = time.process_time()
    for i, picture in enumerate(pictures):
        decode_train(picture, 224, data, (), Draw(1, i, 0))
    return (time.process_time() - began) / len(pictures) * 1e3


def main(
    folder: tyro.conf.Positional[str] = "", count: int = 300, sizes: tuple[int, ...] = (64, 224), out: str = ""
) -> None:
    with tempfile.TemporaryDirectory() as made:
        for i in range(100):
            make_picture(Path(made, f"{i:06d}.jpg"))
        timed = [file.read_bytes() for file in sorted(Path(made).iterdir())]
    files = sorted(Path(folder).rglob("*.jpg"))[:count] if folder else []
    compared = [file.read_bytes() for file in files] or timed
    taken = {name: min(milliseconds(timed, data) for _ in range(3)) for name, data in DECODERS.items()}
    text = table(["decoder", "ms per picture"], [[name, f"{value:.2f}"] for name, value in taken.items()])
    rows = []
    for size in sizes:
        apart = [
            abs(np.subtract(*(decode_eval(picture, size, data).astype(int) for data in DECODERS.values())))
            for picture in compared
        ]
        means = [each.mean() for each in apart]
        rows.append([str(size), f"{np.mean(means):.2f}", f"{max(means):.2f}", str(max(each.max() for each in apart))])
    text += f"\n\n{len(compared)} pictures:\n\n" + table(["size", "mean", "mean of the worst picture", "most"], rows)
    publish("Decoders", text, out)


if __name__ == "__main__":
    tyro.cli(main)
