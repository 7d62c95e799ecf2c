"""How many floating point operations a pre-training step takes, from the shapes alone."""

from __future__ import annotations

from vlmo_ray.config import ModelConfig


def pass_flops(
    config: ModelConfig, text_len: int, image: bool, num_layers: int | None = None, patches: int | None = None
) -> float:
    """FLOPs (2 x multiply-accumulate) of one forward through `num_layers`; None: patch projection and all layers.

    `patches` is how many of an image's patches the layers see; None: all.

    Only matrix products count: qkv, logits, weighted values, output projection, and one expert per token.
    """
    seen = config.num_patches if patches is None else patches
    num_image = 1 + seen if image else 0
    tokens = text_len + num_image
    per_layer = 12 * tokens * config.width**2 + 2 * tokens**2 * config.width
    projection = 0
    if num_layers is None:
        num_layers = config.depth
        if image:
            projection = config.num_patches * 3 * config.patch_size**2 * config.width
    return 2.0 * (num_layers * per_layer + projection)


def forward_flops(config: ModelConfig, text_len: int, patches: int | None = None) -> dict[str, float]:
    """FLOPs per pair of each part of the six-pass pre-training step: forward only, padding included."""
    num_vl = config.depth - config.vl_start
    pair = pass_flops(config, text_len, image=True, patches=patches)
    return {
        "image": pass_flops(config, 0, image=True, patches=patches),
        "text": pass_flops(config, text_len, image=False),
        "image_vl": pass_flops(config, 0, image=True, num_layers=num_vl, patches=patches),
        "text_vl": pass_flops(config, text_len, image=False, num_layers=num_vl),
        "itm_positive": pair,
        "itm_negative_image": pair,
        "itm_negative_text": pair,
        "mlm": pair,
        "mlm_head": 2.0 * text_len * (config.width**2 + config.width * config.vocab_size),
    }


def step_flops(config: ModelConfig, text_len: int, patches: int | None = None) -> float:
    """FLOPs per pair of a whole step: the backward counts as twice the forward, recomputation not at all.

    Utilisation is quoted against this figure even where the implementation does less (the masked word head reads only
    masked positions), so doing less shows as a gain.
    """
    return 3.0 * sum(forward_flops(config, text_len, patches).values())
