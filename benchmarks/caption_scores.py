"""Our caption scores beside pycocoevalcap's, of which the tokenizer needs Java: on all captions of a Karpathy JSON.

    pip install pycocoevalcap
    python benchmarks/caption_scores.py dataset_flickr8k.json

Prints how many captions have the same tokens, and the scores of the first caption of each image of the split val
against its others, by both.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import tyro
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from tyro.conf import Positional

from vlmo_ray.tasks.metrics.captions import caption_scores, tokens


def main(dataset: Positional[Path]) -> None:
    entries = json.loads(dataset.read_text())["images"]
    texts = {entry["imgid"]: [sentence["raw"] for sentence in entry["sentences"]] for entry in entries}
    theirs = PTBTokenizer().tokenize({i: [{"caption": text} for text in some] for i, some in texts.items()})
    pairs = [
        (tokens(text), own.split()) for i, some in texts.items() for text, own in zip(some, theirs[i], strict=True)
    ]
    print(f"same tokens: {sum(a == b for a, b in pairs):,} of {len(pairs):,} captions")
    val = [entry["imgid"] for entry in entries if entry["split"] == "val"]
    first, others = {i: theirs[i][:1] for i in val}, {i: theirs[i][1:] for i in val}
    with contextlib.redirect_stdout(io.StringIO()):
        (*bleu,), _ = Bleu(4).compute_score(others, first)
        found = {"cider": Cider().compute_score(others, first)[0], "rouge_l": Rouge().compute_score(others, first)[0]}
    found |= {f"bleu_{n}": value for n, value in enumerate(bleu, 1)}
    for name, value in caption_scores([texts[i][0] for i in val], [texts[i][1:] for i in val]).items():
        print(f"{name:8} {value:.6f}  pycocoevalcap {found[name]:.6f}")


if __name__ == "__main__":
    tyro.cli(main)
