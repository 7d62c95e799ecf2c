"""What a run takes on given GPUs: memory, time of a step and what binds it, traffic, data, days, cost. Computed.

Nothing here has been measured on a GPU. Every number that the shapes do not give is an `Assumption` with its source,
and the command prints them all with `--explain`.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from vlmo_ray.config import Config, Phase
from vlmo_ray.errors import UserError
from vlmo_ray.tasks.task import Pass, Task
from vlmo_ray.train.build import PEAK_TFLOPS
from vlmo_ray.train.memory import ROOM, Memory, largest_share, memory_of, on_meta

DAY = 86_400.0


@dataclass(frozen=True)
class Assumption:
    """A number that the shapes of a recipe do not give."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in the cloud machine that has eight of it."""

    memory: float  # bytes that a program finds
    utilisation: Assumption  # of the peak, by the FLOPs of the model, while a step computes
    network: float  # bytes/s between machines, one way, of one GPU's share
    link: float  # bytes/s between GPUs of a machine, one way
    source: str


_UNMEASURED = "assumed; torchtitan: 33 to 39 % (8B, H100), open_clip: 12 % (A100)"
GPUS = {
    "H100": Gpu(85.0e9, Assumption(0.35, "of peak", _UNMEASURED), 50e9, 450e9, "H100 SXM, AWS p5.48xlarge"),
    "H200": Gpu(150e9, Assumption(0.35, "of peak", _UNMEASURED), 50e9, 450e9, "H200 SXM, AWS p5e.48xlarge"),
    "A100": Gpu(42.4e9, Assumption(0.35, "of peak", _UNMEASURED), 6.25e9, 300e9, "A100 40 GB, p4d.24xlarge"),
    "V100": Gpu(
        34.1e9, Assumption(0.1, "of peak", "VLMo's published runs: 9.8 % (base), 11.3 % (large)"),
        1.56e9, 150e9, "V100 32 GB, AWS p3dn.24xlarge",
    ),
}  # fmt: skip
_GPUS_PER_NODE = 8

ASSUMED = {
    "decode": Assumption(176, "pairs/s of a CPU core", "500 x 375 JPEGs, docs/benchmarks/data_2-cores_2026-11-22.md"),
    "pair": Assumption(50_200, "bytes of a stored pair", "the same data set, caption included"),
    "network": Assumption(0.7, "of the network's rate", "assumed for NCCL between machines and inside one"),
    "restart": Assumption(
        60, "s without a step after a lost node", "14 s on one machine, docs/benchmarks/recovery_2-cores_2026-11-25.md;"
        " more is assumed for a large model"
    ),
    "replace": Assumption(600, "s until a lost node is replaced", "assumed: a spot request, boot and set-up commands"),
    "upload": Assumption(1e9, "bytes/s of a node to object storage", "assumed: well below a node's network"),
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One phase of a run on the GPU that has the most rows of a batch."""

    phase: Phase
    rows: int
    passes: int  # micro-batches
    compute: float  # s
    exposed: dict[str, float]  # s of waiting for the network, by term
    traffic: dict[str, float]  # bytes that a GPU receives, by term
    data: float  # s that the CPUs of a GPU need to decode its rows
    useful: float  # share of the peak, by the model's FLOPs over the whole step

    @property
    def seconds(self) -> float:
        return max(self.compute + sum(self.exposed.values()), self.data)

    @property
    def binds(self) -> str:
        """What more of would shorten the step most."""
        if self.data > self.compute + sum(self.exposed.values()):
            return "decoding"
        parts = {"matrix products": self.compute} | self.exposed
        return max(parts, key=parts.__getitem__)

    @property
    def rate(self) -> float:
        """Rows/s of the whole cluster."""
        return self.phase.global_batch / self.seconds


@dataclass(frozen=True)
class Plan:
    """What a run takes; see `table`."""

    config: Config
    kind: str  # of GPU
    gpu: Gpu
    gpus: int
    nodes: int
    memory: Memory
    largest_micro_batch: int
    steps: list[Step]
    checkpoint: float  # bytes
    spot: float
    price: float
    assumed: dict[str, Assumption] = field(default_factory=lambda: dict(ASSUMED))

    @property
    def fits(self) -> bool:
        return self.memory.total <= ROOM * self.gpu.memory

    @property
    def undisturbed_days(self) -> float:
        return sum(step.seconds * step.phase.steps for step in self.steps) / DAY

    @property
    def days(self) -> float:
        """With losses of nodes without notice: each repeats half an interval of checkpoints, waits for the restart,
        and leaves the others alone until there is another node."""
        interruptions = self.spot * self.nodes  # a day
        mean_step = self.undisturbed_days * DAY / self.config.total_steps
        repeated = self.config.checkpoint_every / 2 * mean_step
        missing = self.assumed["replace"].value / max(self.nodes, 2)
        lost = interruptions * (repeated + self.assumed["restart"].value + missing) / DAY
        return self.undisturbed_days / (1 - lost) if lost < 1 else math.inf

    @property
    def checkpoint_seconds(self) -> float:
        return self.checkpoint / self.nodes / self.assumed["upload"].value

    @property
    def cost(self) -> float:
        return self.days * 24 * self.gpus * self.price

    def as_dict(self) -> dict[str, Any]:
        """What `table` says, in SI units."""
        steps = [
            dataclasses.asdict(step) | {"seconds": step.seconds, "binds": step.binds, "rate": step.rate}
            for step in self.steps
        ]
        return {
            "recipe": self.config.name, "gpu": self.kind, "gpus": self.gpus, "nodes": self.nodes, "fits": self.fits,
            "memory": dataclasses.asdict(self.memory) | {"total": self.memory.total, "available": self.gpu.memory},
            "largest_micro_batch": self.largest_micro_batch, "phases": steps, "checkpoint_bytes": self.checkpoint,
            "days_undisturbed": self.undisturbed_days, "days": self.days, "cost": self.cost,
        }  # fmt: skip

    def table(self) -> Table:
        """Two columns, at most 80 wide."""
        out = Table(show_header=False, title=f"{self.config.name} on {self.gpus} {self.kind}", title_justify="left")
        used = f"{self.memory.total / 1e9:.1f} of {self.gpu.memory / 1e9:.0f} GB"
        out.add_row("memory", f"{used}, {self.memory.rows} rows at once: {'fits' if self.fits else 'DOES NOT FIT'}")
        out.add_row("largest micro_batch", str(self.largest_micro_batch) if self.largest_micro_batch else "none fits")
        for step in self.steps:
            out.add_section()
            out.add_row("steps", f"{step.phase.steps:,} of {step.phase.global_batch:,} rows")
            out.add_row("a GPU's share", f"{step.rows} rows in {step.passes} passes")
            out.add_row("a step", f"{step.seconds:.2f} s, bound by {step.binds}; {step.useful:.0%} of the peak used")
            out.add_row("rows/s", f"{step.rate:,.0f}")
            total = sum(step.traffic.values())
            out.add_row("a GPU receives", f"{total / 1e9:.2f} GB a step")
            for name, value in step.traffic.items():
                out.add_row(f"  {name}", f"{value / 1e6:,.1f} MB")
            cores = step.rate / self.gpus / self.assumed["decode"].value
            have = self.config.cluster.data_cpus_per_worker
            out.add_row("decoding", f"{cores:.1f} CPUs a GPU; the recipe reserves {have}")
            out.add_row("object storage", f"{step.rate * self.assumed['pair'].value / 1e6:,.0f} MB/s in all")
        out.add_section()
        every = self.config.checkpoint_every * self.undisturbed_days * DAY / self.config.total_steps
        out.add_row(
            "a checkpoint",
            f"{self.checkpoint / 1e9:.1f} GB, {self.checkpoint_seconds:.0f} s; one every {every / 60:.0f} min",
        )
        out.add_row("days, undisturbed", f"{self.undisturbed_days:.1f}")
        out.add_row("days", f"{self.days:.1f} with {self.spot:g} losses of a node a day, {self.nodes} nodes")
        if self.price:
            out.add_row("cost", f"{self.cost:,.0f} at {self.price:g} a GPU-hour")
        return out

    def explained(self) -> str:
        """Every assumption and formula, with its source."""
        gpu, lines = self.gpu, ["assumed:"]
        given = {
            "peak": Assumption(PEAK_TFLOPS[self.kind], "TFLOP/s", f"data sheet: {gpu.source}"),
            "between machines": Assumption(gpu.network / 1e9, "GB/s of a GPU", "an eighth of the machine's rate"),
            "inside a machine": Assumption(gpu.link / 1e9, "GB/s of a GPU", "data sheet of NVLink, one way"),
            "utilisation": gpu.utilisation,
        }
        for name, one in (given | self.assumed).items():
            lines += [f"  {name}: {one.value:g} {one.unit}", *_indented(one.source)]
        lines.append("computed:")
        for name, formula in FORMULAS.items():
            lines += [f"  {name}", *_indented(formula)]
        return "\n".join(lines)


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, 78, initial_indent=" " * 6, subsequent_indent=" " * 6)


FORMULAS = {
    "FLOPs": "matrix products alone, padding included, backward = 2 x forward (model/flops.py)",
    "memory": "bytes per parameter and per saved token (train/memory.py, docs/memory.md)",
    "compute": "FLOPs / (peak x utilisation); the passes of single modalities twice if there are several "
    "micro-batches; another forward with activation_checkpointing",
    "gradients": "ring all-reduce, 2 (W-1)/W x 4 bytes a parameter; hidden behind the backward of one micro-batch",
    "sharded weights": "(W-1)/W x 2 bytes a parameter of each layer that a pass goes through, forward and backward",
    "negative images": "N (1 - (1 - 1/N)^b) distinct ones for b rows of N, of which (W-1)/W are remote, as uint8",
    "features, texts and choices": "of all other rows: float32 vectors of each branch, keys, sums of the contrast, "
    "token ids, positions (tasks/pretraining.py)",
    "decoding": "rows of a GPU / (pairs/s of a core x data_cpus_per_worker); the slower of both sets the pace",
    "checkpoint": "weights and two moments in float32, 4 bytes each; every node uploads its share in the background",
    "lost nodes": "each: half a checkpoint interval, the restart, and 1/nodes of the time to replace it",
}


def plan(
    config: Config,
    gpus: int,
    gpu: str,
    nodes: int = 0,
    *,
    spot: float = 0.0,
    price: float = 0.0,
    utilisation: float = 0,
) -> Plan:
    """What `config` takes on `gpus` GPUs of the kind `gpu`.

    Args:
        nodes: machines; 0: eight GPUs in each.
        spot: how often a node is lost without notice, per node and day.
        price: of a GPU-hour, in any currency.
        utilisation: of the peak while a step computes; 0: what is assumed for this kind.

    Raises UserError for a kind that is not known, or more GPUs than the batch has slices.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu} is not known; known: {', '.join(GPUS)}")
    nodes = nodes or -(-gpus // _GPUS_PER_NODE)
    if gpus < 1 or gpus < nodes:
        raise UserError(f"--gpus {gpus} on --nodes {nodes}: every node needs at least one GPU")
    if spot < 0 or price < 0 or not 0 <= utilisation < 1:
        raise UserError("--spot and --price must not be negative, and --mfu must be from 0 to 1")
    smallest = min(phase.global_batch for phase in config.phases) // config.slice_size
    if gpus > smallest:
        raise UserError(
            f"--gpus {gpus} is more than the {smallest} slices of {config.slice_size} rows in a global batch; "
            "take fewer GPUs, or lower slice_size by --set"
        )
    kind, task = GPUS[gpu], on_meta(config)
    if utilisation:
        assumed = Assumption(utilisation, "of peak", "given")
        kind = dataclasses.replace(kind, utilisation=assumed)
    share = max(largest_share(config, phase, gpus) for phase in config.phases)
    local = dataclasses.replace(config, micro_batch=min(config.micro_batch, share))
    memory = memory_of(task, local, gpus)
    fits = int((ROOM * kind.memory - memory.state) / (memory.passes / memory.rows))
    batch = math.gcd(*(phase.global_batch for phase in config.phases))  # which a micro-batch must divide
    sizes = [rows for rows in range(config.slice_size, min(fits, batch) + 1, config.slice_size) if batch % rows == 0]
    trained = _trained(task)
    frozen = sum(p.numel() for p in task.parameters()) - trained
    return Plan(
        config, gpu, kind, gpus, nodes, memory, max(sizes, default=0),
        [_step(task, local, phase, kind, PEAK_TFLOPS[gpu] * 1e12, gpus, nodes) for phase in config.phases],
        (16.0 if config.optim.average_decay else 12.0) * trained + 4.0 * frozen, spot, price,
    )  # fmt: skip


def _trained(task: Task) -> int:
    return sum(p.numel() for name, p in task.named_parameters() if task.trainable(name))


def traffic(task: Task, config: Config, phase: Phase, gpus: int) -> dict[str, float]:
    """Bytes that each of `gpus` GPUs receives in a step, by term."""
    if gpus == 1:
        return {}
    other, gradients = (gpus - 1) / gpus, 4.0 * _trained(task)
    if config.cluster.strategy == "ddp":
        return {"gradients": 2 * other * gradients} | task.traffic(phase.global_batch, gpus)
    micro_batches = -(-largest_share(config, phase, gpus) // config.micro_batch)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in task.model.layers]

    def through(passes: list[Pass]) -> list[int]:
        """The layers' parameters of each forward."""
        return [sum(layers[-p.size(task.model.config)[1] :]) for p in passes]

    forwards, taught = through(task.passes()), through(task.taught_passes())
    again = sum(forwards[: task.repeated]) if micro_batches > 1 else 0
    outside = sum(p.numel() for p in task.parameters()) - sum(layers)  # gathered once and kept for the backward
    width = 4.0 if config.precision == "float32" else 2.0
    lessons = sum(taught) + outside * bool(taught)
    gathered = micro_batches * (2 * sum(forwards) + again + 2 * outside + lessons) * other * width
    return {"sharded weights": gathered, "gradients": other * gradients} | task.traffic(phase.global_batch, gpus)


def _step(task: Task, config: Config, phase: Phase, gpu: Gpu, peak: float, gpus: int, nodes: int) -> Step:
    rows = largest_share(config, phase, gpus)
    passes = -(-rows // config.micro_batch)
    useful = task.flops_per_row()
    flops = useful + task.taught_flops_per_row()
    if passes > 1:
        flops += task.repeated_flops_per_row()
    if config.cluster.activation_checkpointing:
        flops += useful / 3
    compute = rows * flops / (peak * gpu.utilisation.value)
    received = traffic(task, config, phase, gpus)
    own = gpu.network if nodes > 1 else gpu.link
    # a ring enters each machine once, by all of its network; what goes from one to one has a GPU's share of it
    ring = min(gpu.link, own * gpus / nodes) if nodes > 1 else own
    rates = {name: own if name == "negative images" else ring for name in received}
    exposed = {name: value / (rates[name] * ASSUMED["network"].value) for name, value in received.items()}
    if "gradients" in exposed:  # behind the backward of the last micro-batch, two thirds of its time
        exposed["gradients"] = max(0.0, exposed["gradients"] - compute / passes * 2 / 3)
    if "sharded weights" in exposed:  # fetched ahead, layer by layer
        exposed["sharded weights"] = max(0.0, exposed["sharded weights"] - compute)
    data = rows / (ASSUMED["decode"].value * config.cluster.data_cpus_per_worker)
    found = Step(phase, rows, passes, compute, exposed, received, data, 0.0)
    return dataclasses.replace(found, useful=rows * useful / found.seconds / peak)
