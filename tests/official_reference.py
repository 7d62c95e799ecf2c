"""A plain re-implementation of VLMo on released keys, and random state dicts of every released form.

Written from the description of the architecture and sharing no code with the package: an oracle for the forms
of which there is no golden file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def random_state_dict(
    *,
    width: int = 24,
    depth: int = 3,
    vl_start: int = 2,
    grid: int = 3,
    patch: int = 4,
    vocab: int = 23,
    text_len: int = 6,
    num_heads: int = 2,
    position: str = "absolute",
    losses: tuple[str, ...] = ("itc", "itm", "mlm"),
    answers: int = 7,
    buffers: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A state dict as the official program of this configuration would save it, with random values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    state: dict[str, Tensor] = {}

    def linear(name: str, inputs: int, outputs: int, bias: bool = True):
        state[f"{name}.weight"] = normal(outputs, inputs)
        if bias:
            state[f"{name}.bias"] = normal(outputs)

    def norm(name: str, size: int = width):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + normal(size), normal(size)

    if position == "relative":
        rows = (2 * grid - 1) ** 2 + 3 + 2 + 2 * 196
        state["relative_position_bias_table"] = normal(rows, depth * num_heads)
        if buffers:
            tokens = 1 + grid * grid
            state["relative_position_index"] = torch.arange(tokens * tokens).view(tokens, tokens)
            state["text_relative_position_index"] = torch.arange(text_len * text_len).view(text_len, text_len)
            state["text_imag_relative_position_index"] = normal(tokens + text_len, tokens + text_len)
    if "itc" in losses:
        state["logit_scale"], state["logit_vl_scale"] = torch.tensor(1.3), torch.tensor(0.9)
    elif "irtr" in losses:
        state["logit_scale"] = torch.tensor(1.1)
    state["transformer.cls_token"] = normal(1, 1, width)
    if position == "absolute":
        state["transformer.pos_embed"] = normal(1, 1 + grid * grid, width)
    state["transformer.patch_embed.proj.weight"] = normal(width, 3, patch, patch)
    state["transformer.patch_embed.proj.bias"] = normal(width)
    for i in range(depth):
        block = f"transformer.blocks.{i}"
        if position == "relative":
            state[f"{block}.gamma_1"], state[f"{block}.gamma_2"] = normal(width), normal(width)
        norm(f"{block}.norm1")
        state[f"{block}.attn.q_bias"], state[f"{block}.attn.v_bias"] = normal(width), normal(width)
        linear(f"{block}.attn.qkv", width, 3 * width, bias=False)
        linear(f"{block}.attn.proj", width, width)
        for expert in ("text", "imag") + (("vl",) if i >= vl_start else ()):
            norm(f"{block}.norm2_{expert}")
            linear(f"{block}.mlp_{expert}.fc1", width, 4 * width)
            linear(f"{block}.mlp_{expert}.fc2", 4 * width, width)
    norm("transformer.norm")
    if buffers:
        state["text_embeddings.position_ids"] = torch.arange(text_len)[None]
    state["text_embeddings.word_embeddings.weight"] = normal(vocab, width)
    state["text_embeddings.position_embeddings.weight"] = normal(text_len, width)
    state["text_embeddings.token_type_embeddings.weight"] = normal(2, width)
    norm("text_embeddings.LayerNorm")
    state["token_type_embeddings.weight"] = normal(3 if "nlvr2" in losses else 2, width)
    linear("pooler.dense", width, width)
    if "mlm" in losses or "textmlm" in losses:
        linear("mlm_score.transform.dense", width, width)
        norm("mlm_score.transform.LayerNorm")
        linear("mlm_score.decoder", width, vocab, bias=False)
        state["mlm_score.bias"] = normal(vocab)
    if "itm" in losses:
        linear("itm_score.fc", width, 2)
    for branch in ("itc", "itc_vl") if "itc" in losses else ("itc",) if "irtr" in losses else ():
        linear(f"{branch}_text_proj.fc", width, width, bias=False)
        linear(f"{branch}_image_proj.fc", width, width, bias=False)
    for task, inputs, outputs in (("vqa", width, answers), ("nlvr2", 2 * width, 2)):
        if task in losses:
            linear(f"{task}_classifier.0", inputs, 2 * width)
            norm(f"{task}_classifier.1", 2 * width)
            linear(f"{task}_classifier.3", 2 * width, outputs)
    return state


class Reference:
    """Forwards of an absolute-position model, on its released keys."""

    def __init__(self, state: dict[str, Tensor], num_heads: int, vl_start: int):
        self.state, self.num_heads, self.vl_start = state, num_heads, vl_start
        self.depth = sum(name.endswith("norm1.weight") for name in state)

    def linear(self, name: str, x: Tensor) -> Tensor:
        x = x @ self.state[f"{name}.weight"].T
        return x + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else x

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def text(self, ids: Tensor) -> Tensor:
        x = self.state["text_embeddings.word_embeddings.weight"][ids]
        x = x + self.state["text_embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = x + self.state["text_embeddings.token_type_embeddings.weight"][0]
        return self.norm("text_embeddings.LayerNorm", x, 1e-12) + self.state["token_type_embeddings.weight"][0]

    def image(self, pixels: Tensor, slot: int = 1) -> Tensor:
        kernel = self.state["transformer.patch_embed.proj.weight"]
        size = kernel.shape[-1]
        patches = pixels.unfold(2, size, size).unfold(3, size, size)  # [B,3,h,w,size,size]
        patches = torch.einsum("bchwyx,dcyx->bhwd", patches, kernel).flatten(1, 2)
        patches = patches + self.state["transformer.patch_embed.proj.bias"]
        x = torch.cat([self.state["transformer.cls_token"].expand(len(pixels), -1, -1), patches], dim=1)
        return x + self.state["transformer.pos_embed"] + self.state["token_type_embeddings.weight"][slot]

    def attention(self, block: str, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (x @ w.T for w in self.state[f"{block}.attn.qkv.weight"].chunk(3))
        q, v = q + self.state[f"{block}.attn.q_bias"], v + self.state[f"{block}.attn.v_bias"]
        width = x.shape[-1] // self.num_heads
        heads = []
        for h in range(self.num_heads):
            part = slice(h * width, (h + 1) * width)
            logits = q[..., part] @ k[..., part].transpose(1, 2) / width**0.5
            heads.append(logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1) @ v[..., part])
        return self.linear(f"{block}.attn.proj", torch.cat(heads, dim=-1))

    def expert(self, block: str, name: str, x: Tensor) -> Tensor:
        x = self.norm(f"{block}.norm2_{name}", x, 1e-6)
        return self.linear(f"{block}.mlp_{name}.fc2", F.gelu(self.linear(f"{block}.mlp_{name}.fc1", x)))

    def encode(self, x: Tensor, mask: Tensor, num_text: int, vl: bool = False) -> Tensor:
        """`num_text` of the tokens are text; `vl` takes the vision-language expert at the top in any case."""
        pair = 0 < num_text < x.shape[1]
        for i in range(self.depth):
            block = f"transformer.blocks.{i}"
            x = x + self.attention(block, self.norm(f"{block}.norm1", x, 1e-6), mask)
            if i >= self.vl_start and (pair or vl):
                x = x + self.expert(block, "vl", x)
            else:
                parts = [("text", x[:, :num_text]), ("imag", x[:, num_text:])]
                x = torch.cat([p + self.expert(block, name, p) for name, p in parts if p.shape[1]], dim=1)
        return self.norm("transformer.norm", x, 1e-6)

    def pair(self, pixels: Tensor, ids: Tensor, mask: Tensor, slot: int = 1) -> Tensor:
        image = self.image(pixels, slot)
        mask = torch.cat([mask, mask.new_ones(image.shape[:2])], dim=1)
        return self.encode(torch.cat([self.text(ids), image], dim=1), mask, ids.shape[1])

    def pooled(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.linear("pooler.dense", tokens[:, 0]))

    def projected(self, name: str, tokens: Tensor) -> Tensor:
        x = self.linear(f"{name}.fc", tokens[:, 0])
        return x / x.norm(dim=-1, keepdim=True)

    def words(self, tokens: Tensor) -> Tensor:
        x = F.gelu(self.linear("mlm_score.transform.dense", tokens))
        x = self.norm("mlm_score.transform.LayerNorm", x, 1e-12)
        return self.linear("mlm_score.decoder", x) + self.state["mlm_score.bias"]

    def classified(self, task: str, x: Tensor) -> Tensor:
        x = self.norm(f"{task}_classifier.1", self.linear(f"{task}_classifier.0", x), 1e-5)
        return self.linear(f"{task}_classifier.3", F.gelu(x))
