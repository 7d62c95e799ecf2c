"""The image path of a model as timm's BEiT."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.weights.resize import NUM_CLS_ROWS

_LAYER = {  # ours -> timm's
    "attention_norm": "norm1", "attention.qkv": "attn.qkv", "attention.q_bias": "attn.q_bias",
    "attention.v_bias": "attn.v_bias", "attention.out": "attn.proj", "attention_scale": "gamma_1",
    "expert_scale": "gamma_2",
}  # fmt: skip


def to_timm(model: VLMo) -> dict[str, Tensor]:
    """The weights under timm's names. The modality of images, which BEiT has not, is in its patches and its CLS."""
    config, state = model.config, model.state_dict()
    expert = "all" if config.experts == "one" else "image"
    names = _LAYER | {f"experts.{expert}.norm": "norm2"} | {f"experts.{expert}.{x}": f"mlp.{x}" for x in ("fc1", "fc2")}
    found = {}
    for name, value in state.items():
        _, inside, rest = name.partition("layers.")
        if not inside:
            continue
        layer, _, rest = rest.partition(".")
        for ours, theirs in names.items():
            if rest == ours or rest.startswith(f"{ours}."):
                found[f"blocks.{layer}.{theirs}{rest.removeprefix(ours)}"] = value
    modality = state["modality.weight"][1]
    found |= {
        "cls_token": state["image_embed.cls"] + modality,
        "patch_embed.proj.weight": state["image_embed.patch.weight"],
        "patch_embed.proj.bias": state["image_embed.patch.bias"] + modality,
        "norm.weight": state["norm.weight"],
        "norm.bias": state["norm.bias"],
    }
    if config.position == "absolute":
        return found | {"pos_embed": state["image_embed.position"]}
    grid = config.image_size // config.patch_size
    rows = (2 * grid - 1) ** 2 + NUM_CLS_ROWS
    tables = state["relative.table"][:rows].split(config.num_heads, dim=1)
    return found | {f"blocks.{i}.attn.relative_position_bias_table": table for i, table in enumerate(tables)}


def export_timm(model: VLMo, folder: Path) -> None:
    """A folder for `timm.create_model("local-dir:FOLDER")`: `config.json` and `model.safetensors`."""
    config = model.config
    relative = config.position == "relative"
    described = {
        "architecture": "beit_base_patch16_224",
        "num_classes": 0,
        "num_features": config.width,
        "global_pool": "token",
        "model_args": {
            "img_size": config.image_size, "patch_size": config.patch_size, "embed_dim": config.width,
            "depth": config.depth, "num_heads": config.num_heads, "init_values": config.layer_scale,
            "use_rel_pos_bias": relative, "use_abs_pos_emb": not relative, "global_pool": "token",
        },
        "pretrained_cfg": {
            "input_size": [3, config.image_size, config.image_size], "fixed_input_size": True,
            "interpolation": "bicubic", "crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0,
            "pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }  # fmt: skip
    state = {name: value.detach().cpu().clone() for name, value in to_timm(model).items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n")
