"""Fits weights to a model with another image size, text length or set of heads."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo_ray.config import ModelConfig
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo

NUM_CLS_ROWS = 3  # in the image and text blocks of the relative bias table: CLS as query, as key, with itself
NUM_CROSS_ROWS = 2  # text-to-image, image-to-text


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Weights that fit a model, and the names without a counterpart."""

    state: dict[str, Tensor]
    missing: list[str]  # parameters of the model that the weights lack
    dropped: list[str]  # weights that the model has no parameter for


def fit_state(state: dict[str, Tensor], source: ModelConfig, target: ModelConfig) -> Fitted:
    """The weights `state` of a `source` model in the shapes of a `target` model.

    Image positions are resampled and text positions are cut. The modality of NLVR2's second image starts as a copy of
    the first one's. Load the result with `strict=False` after `init_weights`. Raises UserError for other differences.
    """
    same = ["width", "depth", "num_heads", "position", "patch_size", "experts", "attention"]
    same += ["bias_text_len"] if target.position == "relative" else []
    for name in same:
        if getattr(source, name) != getattr(target, name):
            raise UserError(
                f"The weights are of a model with {name} {getattr(source, name)!r}, the model asked for has "
                f"{getattr(target, name)!r}: only image size, text length and heads can change."
            )
    if (source.layer_scale is None) != (target.layer_scale is None):
        raise UserError("Only one of the weights and the model has LayerScale: set layer_scale alike.")

    state = dict(state)
    grids = source.image_size // source.patch_size, target.image_size // target.patch_size
    if grids[0] != grids[1]:
        if "relative.table" in state:
            state["relative.table"] = resample_table(state["relative.table"], *grids, target.bias_text_len)
        if "image_embed.position" in state:
            state["image_embed.position"] = resample_positions(state["image_embed.position"], *grids)
    if "text_embed.position.weight" in state:
        state["text_embed.position.weight"] = state["text_embed.position.weight"][: target.max_text_len]
    if "modality.weight" in state:
        rows = state["modality.weight"]
        if "nlvr2" not in target.heads:
            state["modality.weight"] = rows[:2]
        elif len(rows) == 2:
            state["modality.weight"] = torch.cat([rows, rows[1:]])

    with torch.device("meta"):  # shapes only
        wanted = VLMo(target).state_dict()
    for name in sorted(state.keys() & wanted.keys()):
        if state[name].shape != wanted[name].shape:
            raise UserError(
                f"{name} has shape {tuple(state[name].shape)} in the weights and {tuple(wanted[name].shape)} "
                "in the model: set the model's sizes to those of the weights."
            )
    missing = [name for name in wanted if name not in state]
    dropped = [name for name in state if name not in wanted]
    return Fitted({name: state[name] for name in wanted if name in state}, missing, dropped)


def resample_table(table: Tensor, old_grid: int, new_grid: int, text_len: int) -> Tensor:
    """The relative bias table `[rows, L*H]` with its image distances resampled to `new_grid` patches a side.

    BEiT's rule: the old distances are stretched as a geometric progression, so near distances, which carry most detail,
    move least. A cubic spline through them is evaluated at the new distances. All other rows stay.
    """
    from scipy.interpolate import RectBivariateSpline  # the import takes half a second, and few processes need it

    old, new = 2 * old_grid - 1, 2 * new_grid - 1
    num_others = NUM_CLS_ROWS + NUM_CROSS_ROWS + 2 * text_len
    assert len(table) == old * old + num_others, (len(table), old, num_others)
    if old == 1:
        raise UserError(f"A model with a single patch has no distances to resample to {new_grid} patches a side.")
    at = geometric_distances(old, new)
    wanted = np.arange(-(new // 2), new // 2 + 1, dtype=np.float64)
    degree = min(3, old - 1)
    columns = table[: old * old].T.reshape(-1, old, old).double().numpy(force=True)
    columns = [RectBivariateSpline(at, at, z, kx=degree, ky=degree)(wanted, wanted) for z in columns]
    image = torch.from_numpy(np.stack(columns).reshape(len(columns), -1).T).to(table)
    return torch.cat([image, table[old * old :]])


def geometric_distances(old: int, new: int) -> np.ndarray:
    """The places of `old` distances on the axis of `new` ones, float64 `[old]`, symmetric about 0.

    The positive ones are 1, 1 + q, 1 + q + q^2, ...; q is bisected so that the last one reaches `new // 2`.
    """
    terms = old // 2
    low, high = 1.01, 1.5
    q = low
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q**terms) / (1 - q) > new // 2:
            high = q
        else:
            low = q
    half = np.cumsum(q ** np.arange(terms, dtype=np.float64))
    return np.concatenate([-half[::-1], [0.0], half])


def resample_positions(position: Tensor, old_grid: int, new_grid: int) -> Tensor:
    """Absolute image positions [1, 1 + old_grid^2, D] -> [1, 1 + new_grid^2, D] by bicubic resampling; CLS stays."""
    cls, patches = position[:, :1], position[:, 1:]
    patches = patches.unflatten(1, (old_grid, old_grid)).permute(0, 3, 1, 2).float()  # [1,D,h,w]
    patches = F.interpolate(patches, size=(new_grid, new_grid), mode="bicubic", align_corners=False)
    return torch.cat([cls, patches.permute(0, 2, 3, 1).flatten(1, 2).to(position)], dim=1)
