"""One pre-training step beside a plain one, in one process without Ray.

    python benchmarks/train_step.py --size base --batch 4 [--device cpu] [--repeats 3] [--out FILE.md]

The plain step is written here, as the released program does it: texts padded to their full length, six separate passes,
eager attention with a float32 bias that is gathered in every pass, logits of the masked-word head at all positions,
full N x N contrast, a draw by `multinomial` for every row, a plain AdamW. Both have the same weights, and take turns.
Printed: the time of a step, also in two micro-batches, pairs/s, share of the machine's matrix-product rate (measured in
the same run) by the FLOPs of the paper's six passes, peak memory, where our time goes; and, without drop path, how far
the losses differ.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import time
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from report import PeakMemory, publish, table
from torch import Tensor

from vlmo_ray.config import MODEL_SIZES, ModelConfig, Phase
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders import Draw
from vlmo_ray.data.text import IGNORED_LABEL, PAD_ID, mask_whole_words
from vlmo_ray.model.embeddings import relative_position_index
from vlmo_ray.model.flops import step_flops
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.recipes import recipe
from vlmo_ray.recipes.pretraining import PretrainingConfig
from vlmo_ray.tasks.pretraining import Pretraining
from vlmo_ray.train.optim import build_optimizer, set_lr
from vlmo_ray.train.parallel import parallelize
from vlmo_ray.train.step import gradients

LENGTHS = (8, 19)  # tokens of a caption, [CLS] and [SEP] included


def make_batch(config: ModelConfig, rows: int, seed: int) -> Batch:
    """Noise with captions of real lengths."""
    random = np.random.default_rng(seed)
    length = random.integers(LENGTHS[0], min(LENGTHS[1], config.max_text_len) + 1, rows)
    ids = np.full((rows, config.max_text_len), PAD_ID, np.int32)
    masked, labels = ids.copy(), np.full_like(ids, IGNORED_LABEL)
    for i, n in enumerate(length):
        ids[i, :n] = [101, *random.integers(1000, config.vocab_size, n - 2), 102]
        word = np.full(config.max_text_len, -1, np.int16)
        word[1 : n - 1] = np.arange(n - 2)
        masked[i], labels[i] = mask_whole_words(
            ids[i], word, config.vocab_size, 0.15, Draw(seed, 0, i).generator("mlm")
        )
    pixels = random.integers(0, 256, (rows, 3, config.image_size, config.image_size), dtype=np.uint8)
    columns = {
        "image": torch.from_numpy(pixels),
        "text_ids": torch.from_numpy(ids).long(),
        "text_mask": torch.arange(config.max_text_len) < torch.from_numpy(length)[:, None],
        "mlm_ids": torch.from_numpy(masked).long(),
        "mlm_labels": torch.from_numpy(labels).long(),
        "image_key": torch.arange(rows),
        "text_key": torch.arange(rows),
    }
    names = [str(i) for i in range(rows)]
    return Batch(columns, torch.ones(rows, dtype=torch.bool), torch.arange(rows), names, [""] * rows)


class Plain:
    """The released program's step, on the weights of one of our models."""

    def __init__(self, model: VLMo, settings: PretrainingConfig, drop_path: float):
        self.model, self.settings, self.config = model, settings, model.config
        self.rates = torch.linspace(0, drop_path, model.config.depth).tolist()
        grid = self.config.image_size // self.config.patch_size
        self.index = relative_position_index(grid, self.config.bias_text_len).to(model.norm.weight.device)

    def bias(self, num_text: int, image: bool) -> list[Tensor | None]:
        """Of every layer, [H,S,S]."""
        if self.model.relative is None:
            return [None] * self.config.depth
        text = torch.arange(num_text, device=self.index.device)
        end = len(self.index) if image else self.config.bias_text_len
        tokens = torch.cat([text, torch.arange(self.config.bias_text_len, end, device=self.index.device)])
        rows = self.index[tokens][:, tokens]
        found = F.embedding(rows, self.model.relative.table.float()).permute(2, 0, 1)
        return list(found.chunk(self.config.depth, dim=0))

    def drop(self, x: Tensor, rate: float) -> Tensor:
        if not rate:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= rate
        return x * keep / (1 - rate)

    def attend(self, layer, x: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
        attention = layer.attention
        rows, tokens, width = x.shape
        zeros = torch.zeros_like(attention.v_bias)
        qkv = F.linear(x, attention.qkv.weight, torch.cat([attention.q_bias, zeros, attention.v_bias]))
        q, k, v = qkv.reshape(rows, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        logits = logits.float()
        if bias is not None:
            logits = logits + bias.unsqueeze(0)
        logits = logits.masked_fill(~mask[:, None, None, :], float("-inf"))
        heads = (logits.softmax(dim=-1).type_as(x) @ v).transpose(1, 2).reshape(rows, tokens, width)
        return attention.out(heads)

    def run(self, x: Tensor, layers: range, route: str, num_text: int, bias, mask: Tensor) -> Tensor:
        for i in layers:
            layer, rate = self.model.layers[i], self.rates[i]
            scale = layer.attention_scale if layer.attention_scale is not None else 1.0
            x = x + self.drop(scale * self.attend(layer, layer.attention_norm(x), bias[i], mask), rate)
            scale = layer.expert_scale if layer.expert_scale is not None else 1.0
            if route == "pair":
                parts = [(x[:, :num_text], "text"), (x[:, num_text:], "image")]
                x = torch.cat([p + self.drop(scale * layer.experts[kind](p), rate) for p, kind in parts], dim=1)
            else:
                x = x + self.drop(scale * layer.experts[route](x), rate)
        return x

    def image(self, pixels: Tensor) -> Tensor:
        return self.model.embed_image(pixels)

    def unimodal(self, x: Tensor, mask: Tensor, kind: str, num_text: int) -> tuple[Tensor, Tensor]:
        """[CLS] of the modality's own experts and of the vision-language branch."""
        below, above = range(self.config.vl_start), range(self.config.vl_start, self.config.depth)
        bias = self.bias(num_text, kind == "image")
        middle = self.run(x, below, kind, num_text, bias, mask)
        own, vl = (self.run(middle, above, route, num_text, bias, mask) for route in (kind, "vl"))
        return self.model.norm(own)[:, 0], self.model.norm(vl)[:, 0]

    def pair(self, pixels: Tensor, ids: Tensor, text_mask: Tensor) -> Tensor:
        """The states of the text tokens."""
        text = self.model.embed_text(ids)
        x = torch.cat([text, self.image(pixels)], dim=1)
        num_text = text.shape[1]
        mask = F.pad(text_mask, (0, x.shape[1] - num_text), value=True)
        bias = self.bias(num_text, True)
        below, above = range(self.config.vl_start), range(self.config.vl_start, self.config.depth)
        x = self.run(x, below, "pair", num_text, bias, mask)
        return self.model.norm(self.run(x, above, "vl", num_text, bias, mask))[:, :num_text]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        model, rows = self.model, len(batch)
        pixels = batch.image.to(model.dtype) / 127.5 - 1
        ones = torch.ones(rows, 1 + self.config.num_patches, dtype=torch.bool, device=pixels.device)
        num_text = batch.text_ids.shape[1]
        image, image_vl = self.unimodal(self.image(pixels), ones, "image", 0)
        text, text_vl = self.unimodal(model.embed_text(batch.text_ids), batch.text_mask, "text", num_text)
        target = torch.arange(rows, device=pixels.device)

        def contrast(head, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            logits = head.log_scale.exp() * head.image(a) @ head.text(b).T
            return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2, logits

        itc, logits = contrast(model.itc, image, text)
        itc_vl, _ = contrast(model.itc_vl, image_vl, text_vl)
        with torch.no_grad():
            weights = [side.float().softmax(dim=1).fill_diagonal_(0) + 1e-12 for side in (logits.T, logits)]
            images, texts = (torch.cat([torch.multinomial(w, 1) for w in side]) for side in weights)
        others = [
            (pixels, batch.text_ids, batch.text_mask),
            (pixels[images], batch.text_ids, batch.text_mask),
            (pixels, batch.text_ids[texts], batch.text_mask[texts]),
        ]
        scores = torch.cat([model.itm(model.pooler(self.pair(*given)[:, 0])) for given in others])
        labels = torch.zeros(3 * rows, dtype=torch.long, device=pixels.device)
        labels[:rows] = 1
        itm = F.cross_entropy(scores, labels)
        words = model.mlm(self.pair(pixels, batch.mlm_ids, batch.text_mask))
        mlm = F.cross_entropy(words.flatten(0, 1).float(), batch.mlm_labels.flatten(), ignore_index=IGNORED_LABEL)
        return {"itc": itc, "itc_vl": itc_vl, "itm": itm, "mlm": mlm}

    def step(self, batch: Batch) -> dict[str, Tensor]:
        found, s = self.losses(batch), self.settings
        (s.itc * (found["itc"] + found["itc_vl"]) / 2 + s.itm * found["itm"] + s.mlm * found["mlm"]).backward()
        return found


def ceiling(device: torch.device, bf16: bool) -> float:
    """FLOP/s of a large matrix product, the best of five."""
    n = 8192 if device.type == "cuda" else 2048
    kind = torch.bfloat16 if bf16 else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in "ab")
    best = 0.0
    for _ in range(6):
        began = time.perf_counter()
        a @ b
        settle(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(
    size: Literal["tiny", "base", "base_plus", "large"] = "base",
    batch: int = 4,
    device: str = "cpu",
    repeats: int = 3,
    out: str = "",
) -> None:
    place, bf16 = torch.device(device), device.startswith("cuda")
    torch.set_float32_matmul_precision("high")
    model_config = MODEL_SIZES[size]
    config = dataclasses.replace(
        recipe("pretrain_base"),
        model=model_config,
        phases=(Phase(10_000, batch),),
        slice_size=1,
        micro_batch=batch,
        task=PretrainingConfig(),
    )
    model = VLMo(model_config)
    init_weights(model, 0)
    plain_model = copy.deepcopy(model).to(place)
    task = Pretraining(model, config).to(place)
    parallel = parallelize(task, config.cluster, 1, place, bf16)
    optimizer = build_optimizer(task, config)
    plain = Plain(plain_model, config.task, model_config.drop_path)  # pyright: ignore[reportArgumentType]
    plain_optimizer = torch.optim.AdamW(plain_model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, foreach=False)
    workers = Workers((batch,))

    def ours(rows: Batch, step: int, micro_batch: int = batch) -> dict[str, float]:
        figures = gradients(parallel, rows, workers, step, micro_batch, bf16)
        set_lr(optimizer, 1e-5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {name: float(figures[name]) for name in ("itc", "itc_vl", "itm", "mlm")}

    def theirs(rows: Batch, step: int) -> dict[str, float]:
        with torch.autocast(place.type, torch.bfloat16, enabled=bf16):
            found = plain.step(rows)
        plain_optimizer.step()
        plain_optimizer.zero_grad(set_to_none=True)
        return {name: value.item() for name, value in found.items()}

    # the same losses, where nothing is drawn
    rows = make_batch(model_config, batch, 0).to(place)
    still = dataclasses.replace(config, model=dataclasses.replace(model_config, drop_path=0.0))
    quiet = Pretraining(copy.deepcopy(model), still).to(place)
    quiet.model.config = still.model
    with torch.no_grad(), torch.autocast(place.type, torch.bfloat16, enabled=bf16):
        wanted = Plain(plain_model, config.task, 0.0).losses(rows)  # pyright: ignore[reportArgumentType]
    figures = gradients(parallelize(quiet, config.cluster, 1, place, bf16), rows, workers, 0, batch, bf16)
    apart = max(abs(float(figures[name]) - float(wanted[name])) for name in ("itc", "itc_vl", "mlm"))
    del quiet

    halves = functools.partial(ours, micro_batch=-(-batch // 2))
    candidates = {"ours": ours, "ours, in two micro-batches": halves, "plain": theirs}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    memory: dict[str, float] = {}
    for turn in range(repeats + 1):
        for name, step in candidates.items():
            rows = make_batch(model_config, batch, turn).to(place)
            settle(place)
            began = time.perf_counter()
            with PeakMemory() as peak:
                step(rows, turn)
                settle(place)
            if turn:  # the first is for allocators and caches
                times[name].append(time.perf_counter() - began)
            memory[name] = max(memory.get(name, 0), peak.bytes)
    most, flops = ceiling(place, bf16), step_flops(model_config, model_config.max_text_len) * batch
    lines = []
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        shown = [
            f"{middle:.3f} s",
            f"{batch / middle:.2f}",
            f"{flops / middle / most:.1%}",
            f"{memory[name] / 1e9:.2f} GB",
        ]
        lines.append([name, *shown])
    ratios, split = ([b / a for a, b in zip(times["ours"], other, strict=True)] for _, other in [*times.items()][:0:-1])
    text = table(["", "a step", "pairs/s", "of the ceiling", "peak memory above the weights"], lines)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    text += f"\n\nThe plain step takes {statistics.median(ratios):.2f} times as long ({spread}), two micro-batches "
    text += f"{statistics.median(split):.2f} times ({min(split):.2f} to {max(split):.2f}). "
    text += f"The ceiling is {most / 1e12:.2f} TFLOP/s. Without drop path the losses differ by {apart:.1e} at most.\n\n"
    text += parts(ours, make_batch(model_config, batch, 99).to(place), repeats + 1)
    publish(f"A step of {size}, {batch} pairs", text, out)


def parts(ours, rows: Batch, step: int) -> str:
    """Where our time goes, by the profiler: the ten dearest operations."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = rows.valid.is_cuda
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        ours(rows, step)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = sorted(profile.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in found)
    lines = [[e.key[:50], str(e.count), f"{getattr(e, key) / total:.1%}"] for e in found[:10]]
    return table(["operation", "calls", "of our time"], lines)


if __name__ == "__main__":
    tyro.cli(main)
