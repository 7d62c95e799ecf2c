"""Evaluation on Ray: zero-shot image-text retrieval."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.pipeline import eval_dataset
from vlmo_ray.data.prefetch import user_error
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.tasks.metrics import chance_recall, recall_at_k


@dataclass(frozen=True)
class Retrieval:
    """Recall at 1, 5 and 10 in both directions, the same for a random ranking, and what it was measured on."""

    reached: dict[str, float]
    chance: dict[str, float]
    num_images: int
    num_texts: int
    problems: tuple[str, ...]  # pairs left out, with their address and reason
    subset: dict[str, float] | None = None  # queries of the named images alone, over the same candidates


class Encoder:
    """A Ray Data actor: images and texts apart, as the dual encoder of the main contrastive branch."""

    def __init__(self, config, state_ref, on_gpu: bool):
        import ray
        import torch

        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.model = VLMo(config)
        self.model.load_state_dict(ray.get(state_ref))
        self.model.to(self.device).eval()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        with torch.inference_mode():
            image = torch.from_numpy(np.ascontiguousarray(batch["image"])).to(self.device)
            text = torch.from_numpy(np.ascontiguousarray(batch["text_ids"])).long().to(self.device)
            mask = torch.from_numpy(np.ascontiguousarray(batch["text_mask"])).to(self.device)
            images = self.model.encode(image=image.to(self.model.dtype) / 127.5 - 1.0).image[:, 0]
            texts = self.model.encode(text=text, text_mask=mask).text[:, 0]
            kept = {name: batch[name] for name in ("image_id", "valid", "problem")}
            return kept | {
                "image_feature": self.model.itc.image(images).float().cpu().numpy(),
                "text_feature": self.model.itc.text(texts).float().cpu().numpy(),
            }


def retrieval(
    model: VLMo,
    data: str,
    *,
    num_workers: int | None = None,
    subset: Collection[str] = (),
) -> Retrieval:
    """Zero-shot retrieval over all pairs of a data set (paper section 3.5), by Ray Data batch inference.

    Every distinct image of the data set is a candidate for every text and the other way round. `num_workers`
    (default: one per GPU, or half the CPUs) changes nothing but the time: the rows of a batch are those of a
    chunk. `subset`: image ids whose queries are also reported alone. Ray must be initialised.
    """
    import ray

    if model.itc is None:
        raise UserError(
            "this model has no contrastive head ('itc'), which retrieval needs; load a pre-trained one"
        )
    manifest = load_manifest(data)
    cpus, gpus = (ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU"))
    on_gpu = gpus >= 1
    workers = num_workers or int(max(1, gpus if on_gpu else cpus // 2))
    state = ray.put({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    rows = eval_dataset(
        manifest, image_size=model.config.image_size, max_text_len=model.config.max_text_len
    ).map_batches(
        Encoder,
        fn_constructor_args=(model.config, state, on_gpu),
        batch_size=None,  # a batch is a chunk, whatever the number of workers
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=1 if on_gpu else 0,
        num_cpus=0 if on_gpu else min(1.0, cpus / 2 / workers),
    )
    columns = {}
    try:
        for batch in rows.iter_batches(batch_size=None, batch_format="numpy"):
            for name, values in batch.items():
                columns.setdefault(name, []).append(values)
    except Exception as error:
        raise user_error(error) or error from None
    if not columns:
        raise UserError(f"the data set at {data} has no rows to evaluate")
    found = {name: np.concatenate(values) for name, values in columns.items()}
    valid = found["valid"].astype(bool)
    if not valid.any():
        raise UserError(f"no pair of {data} can be read; the first: {found['problem'][0]}")
    names, first, image_of_text = np.unique(found["image_id"][valid], return_index=True, return_inverse=True)
    images, texts = found["image_feature"][valid][first], found["text_feature"][valid]
    asked = np.isin(names, list(subset)) if subset else None
    return Retrieval(
        reached=recall_at_k(images, texts, image_of_text),
        chance=chance_recall(image_of_text, len(names)),
        num_images=len(names),
        num_texts=len(texts),
        problems=tuple(found["problem"][~valid]),
        subset=recall_at_k(images, texts, image_of_text, asked=asked) if subset else None,
    )


def table(result: Retrieval, title: str):
    """A `rich` table of a retrieval result beside chance, in per cent."""
    from rich.table import Table

    out = Table(title=f"{title}: {result.num_images:,} images, {result.num_texts:,} texts")
    out.add_column("retrieval")
    heads = ["chance", "reached"] + (["held-out combinations alone"] if result.subset else [])
    for head in heads:
        out.add_column(head, justify="right")
    for name, value in result.reached.items():
        direction, k = name.rsplit("_", 1)
        cells = [result.chance[name], value] + ([result.subset[name]] if result.subset else [])
        label = {"text_retrieval": "image to text", "image_retrieval": "text to image"}[direction]
        out.add_row(f"{label} {k.upper()}", *(f"{cell:.1%}" for cell in cells))
    return out
