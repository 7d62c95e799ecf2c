"""Time and memory of the contrastive loss on one rank: forward and backward, both branches.

    python benchmarks/contrastive.py [--out FILE]

One process acts as one rank with 256 local rows of a global batch of N. Data of other ranks is given, not communicated.
Three implementations compute the same gradients at the features:

- ours: `vlmo_ray.objectives.contrastive.contrast`;
- open_clip: its `ClipLoss(local_loss=True, gather_with_grad=True)`, with a gather that returns the given features;
- plain: the full N x N matrices on every rank, as in the original program.

Needs `pip install -e '.[benchmark]'`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import open_clip.loss
import torch
import torch.nn.functional as F
from report import PeakMemory, publish, table
from torch import Tensor

from vlmo_ray.objectives.contrastive import contrast
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.objectives.pairs import Pairs

WIDTH, ROWS, BRANCHES = 768, 256, 2
SIZES = (4096, 16384, 32768, 131072)
PLAIN_SIZES = (4096, 16384)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Given:
    """The gathered features `[N, D]` of each branch; the first 256 rows are this rank's."""

    images: list[Tensor]
    texts: list[Tensor]
    log_scale: Tensor
    lse: list[Tensor]  # [N, 2], stands for the log-sum-exps of the other ranks

    @classmethod
    def of(cls, total: int) -> Given:
        generator = torch.Generator().manual_seed(0)

        def features() -> Tensor:
            return F.normalize(torch.randn(total, WIDTH, generator=generator), dim=1).to(DEVICE)

        images, texts = ([features() for _ in range(BRANCHES)] for _ in "it")
        log_scale = torch.tensor([math.log(1 / 0.07)], device=DEVICE)
        lse = [torch.full((total, 2), math.log(total), device=DEVICE) for _ in range(BRANCHES)]
        return cls(images, texts, log_scale, lse)

    def gradient_bytes(self, gathered: bool) -> int:
        """The size of the gradients at the local features and, if `gathered`, at the gathered ones."""
        rows = ROWS + (len(self.images[0]) if gathered else 0)
        return rows * WIDTH * 4 * 2 * BRANCHES


@dataclass(frozen=True)
class OneRank(Workers):
    """Rank 0 of N / 256; its gather appends the given rows of the others."""

    given: Tensor | None = None

    def gather(self, rows: Tensor) -> Tensor:
        rest = self.given.new_zeros(len(self.given) - len(rows), rows.shape[1] - self.given.shape[1])
        return torch.cat([rows, torch.cat([self.given[len(rows) :], rest], dim=1)])


def ours(given: Given) -> list[Tensor]:
    total = len(given.images[0])
    key = torch.arange(total, device=DEVICE)
    pairs = Pairs(key, key, torch.ones_like(key, dtype=torch.bool), 0, ROWS)
    out = []
    for images, texts, lse in zip(given.images, given.texts, given.lse, strict=True):
        workers = OneRank((ROWS,) * (total // ROWS), 0, lse)
        branch = contrast(images[:ROWS], texts[:ROWS], images, texts, given.log_scale, pairs, workers)
        out += [branch.image_grad, branch.text_grad, branch.scale_grad]
    return out


def open_clip_local(given: Given) -> list[Tensor]:
    loss = open_clip.loss.ClipLoss(
        local_loss=True, gather_with_grad=True, rank=0, world_size=len(given.images[0]) // ROWS
    )
    out = []
    for images, texts in zip(given.images, given.texts, strict=True):
        leaves = [x.detach().requires_grad_() for x in (images[:ROWS], texts[:ROWS], images, texts, given.log_scale)]
        image, text, all_image, all_text, log_scale = leaves
        open_clip.loss.gather_features = lambda *_, a=all_image, b=all_text, **__: (a, b)
        loss(image, text, log_scale.exp()).backward()
        out += [leaf.grad for leaf in leaves]
    return out


def plain(given: Given) -> list[Tensor]:
    out = []
    for images, texts in zip(given.images, given.texts, strict=True):
        leaves = [x.detach().requires_grad_() for x in (images[:ROWS], texts[:ROWS], given.log_scale)]
        image, text, log_scale = leaves
        logits = log_scale.exp() * torch.cat([image, images[ROWS:]]) @ torch.cat([text, texts[ROWS:]]).T
        target = torch.arange(len(logits), device=DEVICE)
        ((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2).backward()
        out += [leaf.grad for leaf in leaves]
    return out


WAYS = {"ours": ours, "open_clip": open_clip_local, "plain": plain}


def agree() -> float:
    """The largest deviation of our gradients from the plain ones at N = 4,096, relative to the largest gradient."""
    given = Given.of(SIZES[0])
    for images, texts, lse in zip(given.images, given.texts, given.lse, strict=True):
        logits = given.log_scale.exp() * images @ texts.T
        lse.copy_(torch.stack([logits.logsumexp(1), logits.logsumexp(0)], dim=1))
    # without the temperature's gradient: ours is only this rank's part of the sum
    mine, wanted = ([g for g in way(given) if g.numel() > 1] for way in (ours, plain))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(mine, wanted, strict=True))


def seconds(way, given: Given) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    way(given)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def extra_memory(name: str, total: int) -> int:
    """Peak bytes beyond the features and their gradients; must be called in a fresh process."""
    WAYS[name](Given.of(2 * ROWS))  # loads the libraries
    given = Given.of(total)
    with PeakMemory() as peak:
        WAYS[name](given)
    return peak.bytes - given.gradient_bytes(gathered=name == "open_clip")


def in_fresh_process(name: str, total: int) -> int:
    command = [sys.executable, __file__, "--memory", name, str(total)]
    # allocations of a megabyte or more are returned to the system at once, so none is reused unnoticed
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)


def plain_bytes(total: int) -> int:
    """A lower bound: logits, their gradient and one softmax, for one branch at a time."""
    return 3 * total * total * 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", nargs=2)
    arguments = parser.parse_args()
    if arguments.memory:
        print(extra_memory(arguments.memory[0], int(arguments.memory[1])))
        return

    deviation = agree()
    times, memory = [], []
    for total in SIZES:
        ways = [name for name in WAYS if name != "plain" or total in PLAIN_SIZES]
        given = Given.of(total)
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(arguments.repeats + 1):
            for name in ways:  # in turn, so a disturbance affects all of them
                if name == "plain" and total > PLAIN_SIZES[0] and repeat > 1:
                    continue
                took = seconds(WAYS[name], given)
                if repeat:  # the first warms up
                    taken[name].append(took)
        del given
        median = {name: statistics.median(values) for name, values in taken.items()}
        per_row = {name: f"{1e3 * value / ROWS:.3f} ms" for name, value in median.items()}
        ratio = f"{median['ours'] / median['open_clip']:.2f}"
        times.append([f"{total:,}", *(per_row.get(name, "not run") for name in WAYS), ratio])
        extra = {name: f"{in_fresh_process(name, total) / 1e6:,.0f} MB" for name in ways}
        computed = f"{plain_bytes(total) / 1e6:,.0f} MB (computed)"
        memory.append([f"{total:,}", *(extra.get(name, computed) for name in WAYS)])

    text = "\n\n".join(
        [
            f"D = {WIDTH}, {ROWS} local rows of a global batch of N, both branches, forward and backward, float32. One "
            "process acts as one rank; data of other ranks is given, not sent. Largest deviation of our gradients "
            f"from the plain ones at N = {SIZES[0]:,}, relative to the largest gradient: {deviation:.1e}.",
            f"Time per local row, median of {arguments.repeats} (plain above {PLAIN_SIZES[0]:,}: one):",
            table(["N", *WAYS, "ours / open_clip"], times),
            "Peak memory minus the given features and their gradients, each in a fresh process. For open_clip it is a "
            "lower bound: its gradients at gathered features are subtracted in full, but not all exist at its peak.",
            table(["N", *WAYS], memory),
        ]
    )
    publish("Contrastive loss of one rank", text, arguments.out)


if __name__ == "__main__":
    main()
