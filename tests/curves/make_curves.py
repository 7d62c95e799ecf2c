"""The loss curves beside this file, of two recipes in float64 and one process.

`python tests/curves/make_curves.py` computes and writes them again. A change of these numbers is a change of the
objective, of the order of the data or of the optimiser: docs/log.md says why.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.store import Store
from vlmo_ray.demo.scenes.records import records
from vlmo_ray.recipes import recipe
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.train.agree import Notice
from vlmo_ray.train.build import RunSpec
from vlmo_ray.train.loop import train

HERE = Path(__file__).parent
RECIPES = ("tiny", "pretrain_1b_tiny")
FIGURES = ("step", "loss", "itc", "itc_vl", "itm", "mlm", "grad_norm")


def make_data(folder: Path) -> str:
    write_dataset(str(folder), records(1, 200, image_size=32), rows_per_group=32)
    return str(folder)


def curve(name: str, data: str, run: Path, steps: int | None = None) -> list[dict[str, float]]:
    """The `FIGURES` of each of the first `steps` steps of a recipe, by default of all."""
    config = recipe(name)
    config = dataclasses.replace(
        config, precision="float64", cluster=dataclasses.replace(config.cluster, notice_every=1)
    )
    asked = []

    def notice() -> Notice:
        asked.append(1)
        return Notice.STOP if len(asked) - 1 == steps else Notice.NONE

    spec = RunSpec(config, data, str(run), load_manifest(data).fingerprint, in_process_data=True)
    outcome = train(spec, notice=notice)
    assert outcome.step == (steps or config.total_steps), outcome
    return [{figure: metrics[figure] for figure in FIGURES} for metrics in read_metrics(Store(str(run)))[0]]


def stored(name: str) -> list[dict[str, float]]:
    return json.loads((HERE / f"{name}.json").read_text())


def store(name: str, rows: list[dict[str, float]]) -> None:
    lines = ",\n".join(json.dumps(row) for row in rows)  # a line for each step
    (HERE / f"{name}.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder, "data"))
        for name in RECIPES:
            store(name, curve(name, data, Path(folder, name)))
