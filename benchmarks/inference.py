"""Images, texts and pairs per second without gradients: the dual encoder beside open_clip's ViT-B/16, and fusion.

    python benchmarks/inference.py [--size base] [--batch 16] [--device cpu] [--repeats 5] [--out FILE.md]

Random weights, 224 pixels. Texts have 8 to 19 tokens; open_clip pads to 77, as it always does, and its text tower is
narrower (512). Both take turns in one process. Needs the package's `benchmark` extra.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import open_clip
import torch
import tyro
from report import publish, table
from train_step import make_batch, settle

from vlmo_ray.config import MODEL_SIZES
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.tasks.retrieval import Retrieval
from vlmo_ray.tasks.task import given, pooled


def main(size: str = "base", batch: int = 16, device: str = "cpu", repeats: int = 5, out: str = "") -> None:
    place = torch.device(device)
    model = VLMo(MODEL_SIZES[size])
    init_weights(model, 0)
    model.to(place)
    peer = open_clip.create_model("ViT-B-16").eval().to(place)
    rows = make_batch(model.config, batch, 0).to(place)
    evaluation = Retrieval(model)
    shown = rows.image.float() / 127.5 - 1
    texts = torch.zeros(batch, 77, dtype=torch.int64, device=place)
    texts[:, 0], texts[:, 1:15], texts[:, 15] = 49406, 400, 49407
    trimmed = rows.trimmed()

    def ours_text() -> torch.Tensor:
        state = given(model.encode(text=trimmed.text_ids, text_mask=trimmed.text_mask, read=1).text)
        return evaluation.head.text(state[:, 0])

    def ours_image() -> torch.Tensor:
        pixels = rows.image.to(model.dtype) / 127.5 - 1
        return evaluation.head.image(given(model.encode(image=pixels, read=1).image)[:, 0])

    candidates: dict[str, Callable[[], torch.Tensor]] = {
        "images": ours_image,
        "images, open_clip": lambda: peer.encode_image(shown, normalize=True),
        "texts": ours_text,
        "texts, open_clip": lambda: peer.encode_text(texts, normalize=True),
        "pairs, fused": lambda: given(model.itm)(pooled(model, trimmed)),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.inference_mode(), torch.autocast(place.type, torch.bfloat16, enabled=place.type == "cuda"):
        for turn in range(repeats + 1):
            for name, compute in candidates.items():
                settle(place)
                began = time.perf_counter()
                compute()
                settle(place)
                if turn:
                    times[name].append(time.perf_counter() - began)
    rates = [[name, f"{batch / statistics.median(seconds):.1f}"] for name, seconds in times.items()]
    lines = []
    for kind in ("images", "texts"):
        ratios = [b / a for a, b in zip(times[kind], times[f"{kind}, open_clip"], strict=True)]
        lines.append(
            f"- {kind}: {statistics.median(ratios):.2f} times open_clip's rate ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    text = table(["", "per second"], rates) + "\n\n" + "\n".join(lines)
    publish(f"Inference of {size}, batches of {batch}", text, out)


if __name__ == "__main__":
    tyro.cli(main)
