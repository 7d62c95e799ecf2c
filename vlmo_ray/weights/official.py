"""Released state dicts: their names and ours, and the configuration that their shapes imply."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmo_ray.config import HEADS, MODEL_SIZES, ModelConfig
from vlmo_ray.errors import UserError
from vlmo_ray.model.embeddings import relative_position_index
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.weights.resize import NUM_CLS_ROWS, NUM_CROSS_ROWS

OURS = "vlmo_ray"  # beside the wrapper in a file that this program exported
WRAPPERS = ("state_dict", "module", "model")  # keys under which a released file may hold its state dict
MODULE = "module."  # prefix of every key under the wrapper `module`

# released name, or its prefix up to a dot -> ours
_NAMES = {
    "relative_position_bias_table": "relative.table",
    "text_embeddings.word_embeddings": "text_embed.word",
    "text_embeddings.token_type_embeddings": "text_embed.token_type",
    "text_embeddings.position_embeddings": "text_embed.position",
    "text_embeddings.LayerNorm": "text_embed.norm",
    "token_type_embeddings": "modality",
    "transformer.cls_token": "image_embed.cls",
    "transformer.pos_embed": "image_embed.position",
    "transformer.patch_embed.proj": "image_embed.patch",
    "transformer.norm": "norm",
    "itc_image_proj.fc": "itc.image_projection",
    "itc_text_proj.fc": "itc.text_projection",
    "logit_scale": "itc.log_scale",
    "itc_vl_image_proj.fc": "itc_vl.image_projection",
    "itc_vl_text_proj.fc": "itc_vl.text_projection",
    "logit_vl_scale": "itc_vl.log_scale",
    "pooler.dense": "pooler.dense",
    "itm_score.fc": "itm",
    "mlm_score.transform.dense": "mlm.dense",
    "mlm_score.transform.LayerNorm": "mlm.norm",
    "mlm_score.decoder.weight": "mlm.decoder.weight",
    "mlm_score.bias": "mlm.decoder.bias",
    "vqa_classifier.0": "vqa.hidden",
    "vqa_classifier.1": "vqa.norm",
    "vqa_classifier.3": "vqa.out",
    "nlvr2_classifier.0": "nlvr2.hidden",
    "nlvr2_classifier.1": "nlvr2.norm",
    "nlvr2_classifier.3": "nlvr2.out",
}
# the same within `transformer.blocks.<i>` and `layers.<i>`
_LAYER_NAMES = {
    "gamma_1": "attention_scale",
    "gamma_2": "expert_scale",
    "norm1": "attention_norm",
    "attn.qkv": "attention.qkv",
    "attn.q_bias": "attention.q_bias",
    "attn.v_bias": "attention.v_bias",
    "attn.proj": "attention.out",
    "norm2_text": "experts.text.norm",
    "norm2_imag": "experts.image.norm",
    "norm2_vl": "experts.vl.norm",
    **{
        f"mlp_{theirs}.{layer}": f"experts.{ours}.{layer}"
        for theirs, ours in {"text": "text", "imag": "image", "vl": "vl"}.items()
        for layer in ("fc1", "fc2")
    },
}
_OUR_NAMES = {ours: theirs for theirs, ours in _NAMES.items()}
_OUR_LAYER_NAMES = {ours: theirs for theirs, ours in _LAYER_NAMES.items()}

# Keys of released files that not every model has weights for: index tables, text positions, which a model with relative
# positions never reads, and the pooler, which not all heads read.
_CARRIED = re.compile(
    r"relative_position_index|text_relative_position_index|text_imag_relative_position_index|"
    r"text_embeddings\.(position_ids|token_type_ids|position_embeddings\.weight)|pooler\.dense\.(weight|bias)"
)
# Keys of a BEiT checkpoint that belong to image-only pre-training or to ImageNet classification.
_BEIT_ONLY = re.compile(
    r"(fc_norm|head|lm_head)\.(weight|bias)|mask_token|(blocks\.\d+\.attn|rel_pos_bias)\.relative_position_index"
)


@dataclasses.dataclass(frozen=True)
class Official:
    """A released state dict in our names; every tensor of the file is in `state`, `carried` or `dropped`."""

    config: ModelConfig  # implied by the shapes
    state: dict[str, Tensor]  # under our names, dtypes as in the file
    carried: dict[str, Tensor]  # under released names: not weights of this model, kept for an export
    dropped: tuple[str, ...]  # not kept: the classifier of a BEiT checkpoint
    wrapper: str  # one of WRAPPERS, or "" for a bare state dict
    keys: tuple[str, ...]  # of the file, in its order; empty for BEiT, which cannot be exported


def our_name(name: str) -> str | None:
    """Our name of a released parameter, or None if there is no such parameter."""
    if match := re.fullmatch(r"transformer\.blocks\.(\d+)\.(.+)", name):
        inner = _renamed(match[2], _LAYER_NAMES)
        return None if inner is None else f"layers.{match[1]}.{inner}"
    return _renamed(name, _NAMES)


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under their released names; temperatures are 0-d there. Raises UserError for an ablation's."""
    if other := [name for name in state if ".experts.all." in name or ".text_attention." in name]:
        raise UserError(f"the released form has no place for {other[0]}, which an ablation's model has")
    return {
        official_name(name): value.reshape(()) if name.endswith(".log_scale") else value
        for name, value in state.items()
    }


def official_name(name: str) -> str:
    """The released name of one of our parameters."""
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
        return f"transformer.blocks.{match[1]}.{_renamed(match[2], _OUR_LAYER_NAMES)}"
    renamed = _renamed(name, _OUR_NAMES)
    assert renamed is not None, name
    return renamed


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    end = len(name)
    while end > 0:  # the longest known prefix wins
        if name[:end] in names:
            return names[name[:end]] + name[end:]
        end = name.rfind(".", 0, end)
    return None


def translate(
    checkpoint: Mapping[str, Any],
    *,
    num_heads: int | None = None,
    bias_text_len: int | None = None,
    max_text_len: int | None = None,
) -> Official:
    """A released checkpoint, wrapped or bare, under our names. Raises UserError naming the keys that are not VLMo's.

    `num_heads` is needed for absolute positions at a width that no released model has, `max_text_len` for a file that
    does not imply it (BEiT). `bias_text_len` is the text length that the relative bias table was sized for; None:
    what a file that this program exported states, or 196.
    """
    wrapper, tensors = unwrap(checkpoint)
    stated = dict(checkpoint.get(OURS, {}))
    num_heads, bias_text_len = num_heads or stated.get("num_heads"), bias_text_len or stated.get("bias_text_len")
    keys = () if stated else tuple(tensors)
    named = {key.removeprefix(MODULE): value for key, value in tensors.items()}
    dropped: tuple[str, ...] = ()
    if any(re.fullmatch(r"blocks\.\d+\.mlp\.fc1\.weight", name) for name in named):
        dropped = tuple(name for name in named if _BEIT_ONLY.fullmatch(name))
        named = _from_beit({name: v for name, v in named.items() if name not in dropped}, bias_text_len or 196)
        keys = ()

    config = infer_config(named, num_heads=num_heads, bias_text_len=bias_text_len, max_text_len=max_text_len)
    with torch.device("meta"):
        ours = VLMo(config).state_dict().keys()
    state, carried, unknown = {}, {}, []
    for name, value in named.items():
        renamed = our_name(name)
        if renamed is not None and renamed in ours:
            state[renamed] = value.reshape(1) if renamed.endswith(".log_scale") else value
        elif _CARRIED.fullmatch(name):
            carried[name] = value
        else:
            unknown.append(name)
    if unknown:
        raise UserError(f"The state dict has keys that are not VLMo's: {shorten(unknown)}. Nothing was loaded.")
    return Official(config, state, carried, dropped, wrapper, keys)


def shorten(names: Sequence[str], most: int = 20) -> str:
    """The first `most` names in one line, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def unwrap(checkpoint: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """(wrapper, state dict) of a checkpoint; whatever else a wrapped checkpoint holds is ignored."""
    wrapper = next((w for w in WRAPPERS if isinstance(checkpoint.get(w), Mapping)), "")
    tensors = dict(checkpoint[wrapper] if wrapper else checkpoint)
    others = [str(key) for key, value in tensors.items() if not isinstance(value, Tensor)]
    if others or not tensors:
        raise UserError(
            f"This is not a state dict: {shorten(others) or 'nothing in it'} is not a tensor. Expected are "
            f"tensors by name, bare or under one of {', '.join(WRAPPERS)}."
        )
    return wrapper, tensors


def infer_config(
    state: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    bias_text_len: int | None = None,
    max_text_len: int | None = None,
) -> ModelConfig:
    """The configuration that released names and shapes imply; fields that no shape shows keep their defaults."""
    blocks = [re.match(r"transformer\.blocks\.(\d+)\.", name) for name in state]
    cls, patch = state.get("transformer.cls_token"), state.get("transformer.patch_embed.proj.weight")
    if cls is None or patch is None or not any(blocks):
        raise UserError(
            "This is not a VLMo state dict: it has no transformer.cls_token, patch projection or blocks, but "
            f"{shorten(list(state))}."
        )
    width = cls.shape[-1]
    depth = 1 + max(int(match[1]) for match in blocks if match)
    vl_layers = [int(match[1]) for match in blocks if match and ".mlp_vl." in match.string]
    table, positions = state.get("relative_position_bias_table"), state.get("transformer.pos_embed")
    if (table is None) == (positions is None):
        raise UserError(
            "A VLMo state dict has relative_position_bias_table or transformer.pos_embed; this one has "
            f"{'neither' if table is None else 'both'}."
        )
    bias_text_len = bias_text_len or 196
    if table is not None:
        num_image_rows = len(table) - NUM_CLS_ROWS - NUM_CROSS_ROWS - 2 * bias_text_len
        side = math.isqrt(max(num_image_rows, 0))
        if side * side != num_image_rows or side % 2 == 0 or table.shape[1] % depth:
            raise UserError(
                f"relative_position_bias_table of shape {tuple(table.shape)} does not fit {depth} layers and "
                f"texts of {bias_text_len} tokens: give the bias_text_len that it was made for."
            )
        grid, heads_of_table = (side + 1) // 2, table.shape[1] // depth
        if num_heads not in (None, heads_of_table):
            raise UserError(f"num_heads is {num_heads}, but the relative bias table has {heads_of_table} per layer.")
        num_heads = heads_of_table
    else:
        assert positions is not None  # one of the two is there
        grid = math.isqrt(positions.shape[1] - 1)
        if grid * grid != positions.shape[1] - 1:
            raise UserError(f"transformer.pos_embed has {positions.shape[1] - 1} patches, which is no square.")
        if num_heads is None:
            num_heads = {size.width: size.num_heads for size in MODEL_SIZES.values()}.get(width)
        if num_heads is None:
            raise UserError(f"The number of attention heads at width {width} is not known: give num_heads.")

    def rows(name: str, default: int) -> int:
        return len(state[name]) if name in state else default

    text_positions = state.get("text_embeddings.position_embeddings.weight")
    if max_text_len is None:
        max_text_len = ModelConfig.max_text_len if text_positions is None else len(text_positions)
        if text_positions is None and "text_relative_position_index" in state:
            max_text_len = len(state["text_relative_position_index"])
    names = {our_name(name) for name in state}
    present = {name.split(".")[0] for name in names if name is not None}
    return ModelConfig(
        width=width,
        depth=depth,
        num_heads=num_heads,
        vl_start=min(vl_layers, default=depth),
        position="absolute" if table is None else "relative",
        layer_scale=ModelConfig.layer_scale if "transformer.blocks.0.gamma_1" in state else None,
        image_size=grid * patch.shape[-1],
        patch_size=patch.shape[-1],
        vocab_size=rows("text_embeddings.word_embeddings.weight", ModelConfig.vocab_size),
        max_text_len=max_text_len,
        bias_text_len=bias_text_len,
        heads=tuple(head for head in HEADS if head in present),
        num_answers=rows("vqa_classifier.3.weight", ModelConfig.num_answers),
    )


def index_buffers(config: ModelConfig) -> dict[str, Tensor]:
    """The index tables that the released program expects beside the weights, to resize or cut them."""
    text_len = config.max_text_len
    buffers = {"text_embeddings.position_ids": torch.arange(text_len)[None]}
    if config.position == "relative":
        index = relative_position_index(config.image_size // config.patch_size, config.bias_text_len)
        image = index[config.bias_text_len :, config.bias_text_len :]
        tokens = torch.cat([torch.arange(text_len), torch.arange(config.bias_text_len, len(index))])
        buffers |= {
            "relative_position_index": image.clone(),
            "text_relative_position_index": index[:text_len, :text_len].clone(),
            "text_imag_relative_position_index": index[tokens][:, tokens].float(),
        }
    return buffers


def _from_beit(state: dict[str, Tensor], bias_text_len: int) -> dict[str, Tensor]:
    """BEiT's state dict under released VLMo names: its feed-forward networks become vision experts.

    The relative bias tables of the layers (or the one that they share) become the image rows of ours. Cross and text
    rows start at 0.
    """
    named, tables = {}, {}
    for name, value in state.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.relative_position_bias_table", name):
            tables[int(match[1])] = value
        elif name != "rel_pos_bias.relative_position_bias_table":
            name = re.sub(r"^(blocks\.\d+)\.(mlp|norm2)\.", r"\1.\2_imag.", name)
            named[f"transformer.{name}"] = value
    shared = state.get("rel_pos_bias.relative_position_bias_table")
    if shared is not None:
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        tables = dict.fromkeys(range(depth), shared)
    if tables:
        image = torch.cat([tables[layer] for layer in sorted(tables)], dim=1)
        others = image.new_zeros(NUM_CROSS_ROWS + 2 * bias_text_len, image.shape[1])
        named["relative_position_bias_table"] = torch.cat([image, others])
    return named
