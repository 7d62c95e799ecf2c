"""Image-text retrieval: the dual encoder fine-tuned by contrast alone (paper section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from vlmo_ray.config import MODEL_SIZES, ClusterConfig, Config, OptimConfig, Phase
from vlmo_ray.fields import setting
from vlmo_ray.recipes.pretraining import PretrainingConfig
from vlmo_ray.recipes.tiny import tiny


@dataclass(frozen=True)
class RetrievalConfig(PretrainingConfig):
    """The main contrast. With `itm` above 0 (and the head itm) matching is trained too, for re-ranking by it."""

    kind: ClassVar[str] = "retrieval"

    itm: float = setting(0.0, at_least=0)
    mlm: float = setting(0.0, at_least=0)
    vl_contrast: bool = False


def retrieval_coco_base() -> Config:
    """VLMo-Base on COCO at 384 px; aim: R@1 of texts 74.8, of images 57.2 on 5k (paper section 4.3).

    `vlmo train retrieval_coco_base --data s3://... --set init=imported/`. Not run at this size.
    """
    return Config(
        name="retrieval_coco_base",
        model=replace(MODEL_SIZES["base"], heads=("itc",), image_size=384, drop_path=0.2),
        task=RetrievalConfig(),
        phases=(Phase(steps=3000, global_batch=3072),),
        slice_size=16,
        micro_batch=64,
        optim=OptimConfig(peak_lr=3e-5, warmup_steps=300),
        cluster=ClusterConfig(max_workers=8, cpus_per_worker=2, data_cpus_per_worker=8),
        search=("optim.peak_lr=log:1e-5..1e-4",),
    )


def _of_size(base: Config, size: str, peak_lr: float, micro_batch: int = 64) -> Config:
    """`base` with another model; its name ends in the size."""
    own = base.model
    model = replace(MODEL_SIZES[size], heads=own.heads, image_size=own.image_size, drop_path=0.2)
    name = f"{base.name.removesuffix('base')}{size}"
    return replace(base, name=name, model=model, micro_batch=micro_batch, optim=replace(base.optim, peak_lr=peak_lr))


def retrieval_coco_base_plus() -> Config:
    """VLMo-Base-Plus on COCO; aim: R@1 76.3 and 58.6 (model card of the released weights). Not run at this size."""
    return _of_size(retrieval_coco_base(), "base_plus", 3e-5)


def retrieval_coco_large() -> Config:
    """VLMo-Large on COCO; aim: R@1 78.2 and 60.6 (paper section 4.3). Not run at this size."""
    return _of_size(retrieval_coco_base(), "large", 2e-5, micro_batch=32)


def retrieval_flickr_base() -> Config:
    """VLMo-Base on Flickr30k, from the model tuned on COCO; aim: R@1 92.3 and 79.3. Not run at this size."""
    coco = retrieval_coco_base()
    return replace(
        coco,
        name="retrieval_flickr_base",
        model=replace(coco.model, drop_path=0.15),
        phases=(Phase(steps=1500, global_batch=3072),),
        optim=replace(coco.optim, warmup_steps=150),
    )


def retrieval_flickr_base_plus() -> Config:
    """VLMo-Base-Plus on Flickr30k; aim: R@1 93.2 and 81.8. Not run at this size."""
    return _of_size(retrieval_flickr_base(), "base_plus", 3e-5)


def retrieval_flickr_large() -> Config:
    """VLMo-Large on Flickr30k, from the model tuned on COCO; aim: R@1 95.3 and 84.5. Not run at this size."""
    return _of_size(retrieval_flickr_base(), "large", 2e-5, micro_batch=32)


def retrieval_coco_base_224() -> Config:
    """VLMo-Base on COCO at 224 px, the size of the paper's ablations. Not run at this size."""
    coco = retrieval_coco_base()
    return replace(
        coco,
        name="retrieval_coco_base_224",
        model=replace(coco.model, image_size=224),
        phases=(Phase(steps=5_530, global_batch=1024),),  # 10 epochs of 566,435 captions
        optim=replace(coco.optim, peak_lr=5e-5, warmup_steps=553),
    )


def retrieval_tiny() -> Config:
    """The model of `tiny` for a CPU: minutes on pairs of photographs or scenes. Start it from a run of `tiny`."""
    small = tiny()
    return replace(
        small,
        name="retrieval_tiny",
        model=replace(small.model, heads=("itc",)),
        task=RetrievalConfig(),
        phases=(Phase(steps=200, global_batch=96),),
        slice_size=16,
        micro_batch=96,
        optim=OptimConfig(peak_lr=3e-4, warmup_steps=20),
        checkpoint_every=50,
        log_every=20,
        search=("optim.peak_lr=log:1e-4..3e-3",),
    )
