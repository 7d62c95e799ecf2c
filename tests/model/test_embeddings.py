"""The relative bias against a slow loop over pairs, in blocks and gradient; text and image embeddings."""

from __future__ import annotations

import pytest
import torch

from vlmo_ray.config import ModelConfig
from vlmo_ray.errors import UserError
from vlmo_ray.model.embeddings import ImageEmbedding, RelativePositionBias, TextEmbedding, relative_position_index
from vlmo_ray.rng import Noise

CONFIG = ModelConfig(
    width=12, depth=3, num_heads=2, vl_start=2, image_size=12, patch_size=4, vocab_size=17, max_text_len=5,
    bias_text_len=7,
)  # fmt: skip


def table_row(query: int, key: int, text_len: int, grid: int, bias_text_len: int) -> int:
    """The table row of one pair of tokens, by the formulas; token 0 of each modality is its CLS."""
    image_block = (2 * grid - 1) ** 2 + 3
    end = image_block + 2 + 2 * bias_text_len
    if query < text_len and key < text_len:
        if query == 0 and key == 0:
            return end - 1
        if query == 0:
            return end - 3
        if key == 0:
            return end - 2
        return (key - query) + (bias_text_len - 2) + image_block + 2
    if query < text_len:
        return image_block
    if key < text_len:
        return image_block + 1
    query, key = query - text_len, key - text_len
    if query == 0 and key == 0:
        return image_block - 1
    if query == 0:
        return image_block - 3
    if key == 0:
        return image_block - 2
    (y_i, x_i), (y_j, x_j) = divmod(query - 1, grid), divmod(key - 1, grid)
    return (y_i - y_j + grid - 1) * (2 * grid - 1) + (x_i - x_j + grid - 1)


def slow_bias(table: torch.Tensor, text_len: int, num_image: int) -> torch.Tensor:
    size = text_len + num_image
    bias = torch.empty(CONFIG.depth, CONFIG.num_heads, size, size)
    for layer in range(CONFIG.depth):
        for head in range(CONFIG.num_heads):
            for i in range(size):
                for j in range(size):
                    row = table_row(i, j, text_len, 3, CONFIG.bias_text_len)
                    bias[layer, head, i, j] = table[row, layer * CONFIG.num_heads + head]
    return bias


def random_bias() -> RelativePositionBias:
    module = RelativePositionBias(CONFIG)
    torch.nn.init.normal_(module.table, generator=torch.Generator().manual_seed(1))
    return module


@pytest.mark.parametrize("text_len", [2, 5, 7])
def test_pair_bias_equals_a_loop_over_pairs(text_len):
    module = random_bias()
    assert torch.equal(module(text_len), slow_bias(module.table, text_len, 1 + CONFIG.num_patches))


def test_single_modality_biases_are_blocks_of_the_pair_bias():
    module = random_bias()
    pair = module(4)
    assert torch.equal(module(4, image=False), pair[..., :4, :4])
    assert torch.equal(module(0), pair[..., 4:, 4:])
    assert torch.equal(module(4, image=False), slow_bias(module.table, 4, 0))
    assert torch.equal(module(0), slow_bias(module.table, 0, 1 + CONFIG.num_patches))


def test_bias_gradient_counts_the_pairs_of_each_row():
    module = random_bias()
    module(4).sum().backward()
    counts = torch.zeros(len(module.table))
    for i in range(14):
        for j in range(14):
            counts[table_row(i, j, 4, 3, CONFIG.bias_text_len)] += 1
    assert torch.equal(module.table.grad, counts[:, None].expand_as(module.table))


def test_released_layout_at_224_pixels():
    index = relative_position_index(14, 196)
    assert index.shape == (196 + 197, 196 + 197)
    assert index[196:, 196:].min() == 0 and index[196:, 196:].max() == 731
    assert index[0, 196] == 732 and index[196, 0] == 733
    assert index[:196, :196].min() == 734 and index.max() == 1125


def test_too_long_texts_and_wrong_image_sizes_are_refused():
    with pytest.raises(UserError, match="8 tokens"):
        random_bias()(8)
    text = TextEmbedding(ModelConfig(**{**CONFIG.__dict__, "position": "absolute"}))
    with pytest.raises(UserError, match="6 tokens"):
        text(torch.zeros(2, 6, dtype=torch.long))
    with pytest.raises(UserError, match=r"\(3, 12, 8\)"):
        ImageEmbedding(CONFIG)(torch.zeros(2, 3, 12, 8))


@pytest.mark.parametrize("position", ["relative", "absolute"])
def test_text_embedding_is_the_normalised_sum(position):
    module = TextEmbedding(ModelConfig(**{**CONFIG.__dict__, "position": position})).double()
    ids = torch.tensor([[1, 2, 16], [3, 3, 0]])
    for b in range(2):
        for t in range(3):
            x = module.word.weight[ids[b, t]] + module.token_type.weight[0]
            if position == "absolute":
                x = x + module.position.weight[t]
            x = (x - x.mean()) / (x.var(unbiased=False) + 1e-12).sqrt()
            torch.testing.assert_close(module(ids)[b, t], x * module.norm.weight + module.norm.bias)


def test_image_patches_run_row_by_row_behind_cls():
    module = ImageEmbedding(CONFIG).double()
    torch.nn.init.normal_(module.cls)
    pixels = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    tokens = module(pixels)
    assert tokens.shape == (2, 10, 12)
    assert torch.equal(tokens[:, 0], module.cls[0].expand(2, -1))
    patch = pixels[1, :, 4:8, 8:12]  # row 1, column 2
    expected = (module.patch.weight * patch).sum(dim=(1, 2, 3)) + module.patch.bias
    torch.testing.assert_close(tokens[1, 1 + 1 * 3 + 2], expected)


def test_text_dropout_is_stateless_per_sample_and_keeps_the_mean():
    module = TextEmbedding(ModelConfig(**{**CONFIG.__dict__, "drop_path": 0.25}))
    ids = torch.randint(0, 17, (64, 5), generator=torch.Generator().manual_seed(2))
    plain = module(ids)
    dropped = module(ids, Noise(seed=3, step=4, name="text", positions=torch.arange(64)))
    kept = dropped != 0
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(dropped[kept], plain[kept] / 0.75)
    some = torch.tensor([40, 7])
    assert torch.equal(module(ids[some], Noise(seed=3, step=4, name="text", positions=some)), dropped[some])
