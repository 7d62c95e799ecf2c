"""AdamW groups by kind of parameter, and the learning rate as a function of the step."""

from __future__ import annotations

import torch
from torch import nn

from vlmo_ray.config import Config

# Matrices that place a token rather than transform it: decay would pull all places together.
_PLACES = ("position", "modality", "token_type", "cls", "table")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for the matrices of linear maps, convolutions and word embeddings.

    Not for anything one-dimensional (norms, biases, LayerScale), scalars (temperatures), nor the embeddings of
    position and modality. The original excluded by substrings of names, which missed several norms.
    """
    return parameter.ndim >= 2 and not set(name.split(".")) & set(_PLACES)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups that hold every trainable parameter once."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted({id(p) for p in model.parameters() if p.requires_grad})
    return groups


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW as in paper section 4.1; fused where the device has it."""
    optim = config.optim
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.AdamW(
        parameter_groups(model, optim.weight_decay),
        lr=lr_at(0, config),
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=on_gpu,
        foreach=None if on_gpu else True,
    )


def lr_at(step: int, config: Config) -> float:
    """Of optimizer step `step` (from 0): linear warm-up to the peak, then one linear decay to 0 over all phases."""
    optim, total = config.optim, config.total_steps
    if step < optim.warmup_steps:
        return optim.peak_lr * (step + 1) / optim.warmup_steps
    return optim.peak_lr * (total - step) / (total - optim.warmup_steps)
