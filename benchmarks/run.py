"""All ratios in a few minutes, beside the stored ones: has anything become slower?

    python benchmarks/run.py [--quick] [--store]

Runs small cases of the benchmarks that compare two programs in one process, and prints for each ratio what it was when
`docs/benchmarks/ratios.json` was written; `--store` writes it. Ends with 1 if one is more than a fifth worse. `--quick`
repeats less. Needs the package's `benchmark` extra.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from report import machine, table

HERE = Path(__file__).parent
STORED = HERE.parent / "docs" / "benchmarks" / "ratios.json"
WORSE = 0.2  # beyond this it is more than the disturbance of a shared machine


@dataclass(frozen=True)
class Case:
    command: str
    repeats: int  # more without `--quick`
    ratios: dict[str, str]  # name -> where the report has it


CASES = (
    Case(
        "train_step.py --size tiny --batch 32",
        7,
        {
            "plain step / ours, tiny": r"plain step takes ([\d.]+) times",
            "one micro-batch / two, tiny": r"two micro-batches\s+([\d.]+) times",
        },
    ),
    Case("train_step.py --size base --batch 2", 1, {"plain step / ours, base": r"plain step takes ([\d.]+)"}),
    Case(
        "inference.py --batch 4",
        3,
        {
            "images/s, ours / open_clip": r"images: ([\d.]+) times",
            "texts/s, ours / open_clip": r"texts: ([\d.]+) times",
        },
    ),
)


def main(quick: bool = False, store: bool = False) -> int:
    before = json.loads(STORED.read_text()) if STORED.exists() else {}
    found: dict[str, float] = {}
    for case in CASES:
        repeats = case.repeats if quick else 4 * case.repeats
        command = [sys.executable, *case.command.split(), "--repeats", str(repeats)]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr[-2000:])
            return 1
        for name, place in case.ratios.items():
            match = re.search(place, done.stdout)
            assert match, f"{case.command} printed no {place}"
            ratio = float(match[1])
            found[name] = 1 / ratio if name.startswith("one micro-batch") else ratio
    worse = {name for name, ratio in found.items() if ratio < before.get(name, 0) * (1 - WORSE)}
    rows = [
        [name, f"{ratio:.2f}", f"{before[name]:.2f}" if name in before else "", "worse" if name in worse else ""]
        for name, ratio in found.items()
    ]
    print(f"{machine()}\n\n{table(['ratio, more is better', 'now', 'stored', ''], rows)}")
    if store:
        STORED.write_text(json.dumps({name: round(ratio, 3) for name, ratio in found.items()}, indent=1) + "\n")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
