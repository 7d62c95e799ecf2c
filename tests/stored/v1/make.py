"""Makes the stored runs beside this file; it needs the program of commit 8599b92 (see README.md)."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file
from vlmo_ray.data.scenes.records import records

from vlmo_ray.config import ClusterConfig, Config, DataConfig, LossConfig, ModelConfig, OptimConfig, Phase
from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.train.loop import Job, train

HERE = Path(__file__).parent
FLOAT32 = Config(
    name="float32",
    model=ModelConfig(
        width=2, depth=2, num_heads=1, vl_start=1, drop_path=0.1, image_size=16, patch_size=8, max_text_len=12,
        bias_text_len=12, init_std=0.1,
    ),
    phases=(Phase(6, 8), Phase(4, 12)),
    slice_size=2,
    micro_batch=4,
    data=DataConfig(group_steps=3, mlm_probability=0.2, patience_s=300.0),
    loss=LossConfig(itc=0.9, itm=1.1, mlm=0.3, label_smoothing=0.1, feature_grad_scale=0.5, itm_share=0.5),
    optim=OptimConfig(peak_lr=1e-2, warmup_steps=2, eps=1e-4),  # gradients that are rounding move nothing
    cluster=ClusterConfig(max_workers=2, gpus_per_worker=0, cpus_per_worker=0, data_cpus_per_worker=1),
    precision="float32",
    checkpoint_every=4,
    keep_checkpoints=9,
    audit=True,
    log_every=5,
)  # fmt: skip
FLOAT64 = replace(
    FLOAT32,
    name="float64",
    precision="float64",
    model=replace(FLOAT32.model, width=4, num_heads=2, vocab_size=1100, init_std=0.3),
    optim=replace(FLOAT32.optim, eps=1e-8),
)


def caption(i: int) -> str:
    """Five of the letters a to j: their word pieces are below the 1100 that the float64 model has."""
    return " ".join("abcdefghij"[int(digit)] for digit in f"{i * 7919 % 100_000:05d}")


def make_data(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    rows = [
        record | {"text": caption(i), "forbid": record["forbid"] if i % 2 else []}
        for i, record in enumerate(records(4, 60, image_size=16))
    ]
    write_dataset(str(folder), rows, rows_per_group=7, groups_per_shard=3)


def make_run(config: Config, data: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        outcome = train(Job(config, data, folder, load_manifest(data).fingerprint, in_process_data=True))
        assert outcome.step == 10, outcome
        final = load_file(run / "model" / "model.safetensors")
        small = {name: value for name, value in final.items() if value.numel() < 4_000}
        save_file(small, HERE / f"{config.name}_step_10.safetensors")
        for name in ("model", "tensorboard", "checkpoint-00000004", "checkpoint-00000010"):
            shutil.rmtree(run / name)
        shutil.make_archive(str(HERE / config.name), "xztar", run)


if __name__ == "__main__":
    make_data(HERE / "data")
    for config in (FLOAT32, FLOAT64):
        make_run(config, str(HERE / "data"))
