"""The memory of a step: the formula against saved tensors that are counted, and every recipe against an 80 GB GPU."""

import dataclasses

import pytest
import torch

from vlmo_ray import rng
from vlmo_ray.config import ModelConfig
from vlmo_ray.errors import UserError
from vlmo_ray.model import attention
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.recipes import RECIPES, recipe
from vlmo_ray.tasks.task import Pass
from vlmo_ray.train.memory import SAVED, check_memory, memory_of, on_meta, saved_bytes


class Fused(torch.autograd.Function):
    """Attention that keeps what fused kernels keep: its inputs, its output and a logarithm for each query."""

    @staticmethod
    def forward(ctx, q, k, v, bias, scale):
        out, sums = torch.empty_like(v), torch.empty(q.shape[:-1])
        ctx.save_for_backward(q, k, v, bias, out, sums)
        return out


@pytest.fixture
def fused(monkeypatch):
    def replacement(q, k, v, attn_mask=None, scale=None):
        assert attn_mask is None or len(attn_mask) == 1, "the bias is expanded over the batch"
        return Fused.apply(q, k, v, attn_mask, scale)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", replacement)


def counted(config: ModelConfig, rows: int, some: Pass) -> int:
    """Bytes of the distinct storages that a pass over `rows` rows saves, without the weights'."""
    model = VLMo(config)
    init_weights(model, 0)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    image = torch.zeros(rows, 3, config.image_size, config.image_size) if some.image else None
    ids = torch.full((rows, some.text_len), 7) if some.text_len else None
    mask = torch.ones(rows, some.text_len, dtype=torch.bool) if some.text_len else None
    noise = rng.Noise(0, 0, "pass", torch.arange(rows))
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        encoding = model.encode(image=image, text=ids, text_mask=mask, noise=noise)
    assert encoding is not None
    return sum(found.values())


@pytest.mark.parametrize("width, num_heads, image_size", [(128, 2, 64), (256, 4, 64), (256, 4, 96)])
@pytest.mark.parametrize("some", [Pass(20, True), Pass(0, True), Pass(20, False)])
def test_the_formula_is_what_is_counted(fused, width, num_heads, image_size, some):
    config = ModelConfig(
        width=width, depth=4, num_heads=num_heads, vl_start=3, image_size=image_size, vocab_size=1200,
        max_text_len=20, bias_text_len=20,
    )  # fmt: skip
    each = (counted(config, 6, some) - counted(config, 2, some)) / 4
    tokens, layers = some.size(config)
    assert SAVED * tokens * layers * width == pytest.approx(each, rel=0.1)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_80_gb_with_room(name):
    config = recipe(name)
    task = on_meta(config)
    assert memory_of(task, config).total < 0.85 * 80e9
    check_memory(task, config, int(80e9), 1)


def test_what_does_not_fit_is_refused_with_what_would():
    config = dataclasses.replace(recipe("pretrain_1b"), micro_batch=256)
    task = on_meta(config)
    with pytest.raises(
        UserError, match=r"for 256 rows at once; the GPU has 80\.0 GB. Use --set micro_batch=\d+"
    ) as told:
        check_memory(task, config, int(80e9), 8)
    fits = int(str(told.value).partition("micro_batch=")[2].split()[0])
    check_memory(task, dataclasses.replace(config, micro_batch=fits), int(80e9), 8)
    with pytest.raises(UserError):
        check_memory(task, dataclasses.replace(config, micro_batch=fits + config.slice_size), int(80e9), 8)
    with pytest.raises(UserError, match=r"activation_checkpointing=true or --set cluster\.strategy=fsdp"):
        check_memory(task, config, int(8e9), 8)


def test_recomputed_layers_keep_their_inputs():
    config = recipe("pretrain_large")
    task = on_meta(config)
    whole, inputs = (saved_bytes(task, task.passes(), recomputed) for recomputed in (False, True))
    assert 0.11 < inputs / whole < 0.13  # the inputs are 4 of 43, and three passes run as one, layer by layer


def test_no_more_rows_are_counted_than_a_worker_has():
    config = recipe("pretrain_base_plus")
    task = on_meta(config)
    with pytest.raises(UserError, match="64 rows at once; the GPU has 40"):
        check_memory(task, config, int(40e9), 16)
    check_memory(task, config, int(40e9), 64)  # 16 rows each
