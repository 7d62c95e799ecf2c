"""Two data sets for `vlmo train vqa_tiny` from the package `easy-vqa`: questions about coloured shapes, on 64 px.

pip download easy-vqa --no-deps -d . && unzip easy_vqa-*.whl
python benchmarks/easy_vqa.py easy_vqa/data OUT        # writes OUT/train and OUT/test
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import tyro
from tyro.conf import Positional

from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.schema import Field, Schema


def main(source: Positional[Path], out: Positional[str]) -> None:
    answers = tuple((source / "answers.txt").read_text().split())
    schema = Schema((Field("image", "image"), Field("text", "text"), Field("answers", "answers", answers)))
    for split in ("train", "test"):
        asked = json.loads((source / split / "questions.json").read_text())

        def rows(asked=asked, split=split):
            for number, (question, answer, image) in enumerate(asked):
                yield {
                    "id": f"{split}-{number}",
                    "image_id": f"{split}-{image}",
                    "image": (source / split / "images" / f"{image}.png").read_bytes(),
                    "text": question,
                    "answers": [{"answer": answer, "score": 1.0}],
                    "forbid": ["color"],
                }

        write_dataset(f"{out}/{split}", rows(), schema=schema)
        most, count = Counter(answer for _, answer, _ in asked).most_common(1)[0]
        print(f"{split}: {len(asked):,} questions, {count / len(asked):.1%} of them with the answer {most!r}")


if __name__ == "__main__":
    tyro.cli(main)
