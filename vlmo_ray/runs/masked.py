"""The rows that a worker had to mask: a line by reason on the console, and every address in a file of the run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from vlmo_ray.data.store import Store
from vlmo_ray.runs.events import tell

_FOLDER = "masked"


def masked_rows(run: Store) -> Iterator[dict[str, Any]]:
    """Step and problem (address: reason) of every row that a run has masked and kept."""
    for name in run.list(f"{_FOLDER}/"):
        yield from map(json.loads, run.read(name).splitlines())


class Masked:
    """What one worker masked since its last checkpoint.

    At each checkpoint `take` gives the file `masked/<attempt>/<first step>-<rank>.jsonl`: step and problem of each row.
    """

    def __init__(self, attempt: str, rank: int):
        self._attempt, self._rank = attempt, rank
        self._rows: list[dict] = []
        self._reasons: Counter[str] = Counter()  # since the last line

    def add(self, step: int, problems: Iterable[str]) -> None:
        """The problems of one step: address and reason of each masked row, "" for the others."""
        for problem in filter(None, problems):
            self._rows.append({"step": step, "problem": problem})
            _, _, reason = problem.partition(": ")
            # of a damaged chunk, the reason names the chunk again: one line for each chunk
            self._reasons[reason] += 1

    def tell(self) -> None:
        """Prints how many rows were masked since the last call, by reason, with the address of the last one."""
        if not self._reasons:
            return
        count, last = self._reasons.total(), self._rows[-1]["problem"].partition(": ")[0]
        reasons = [f"{n:,} x {reason}" for reason, n in self._reasons.most_common(3)]
        more = len(self._reasons) - len(reasons)
        reasons += [f"{more} other reasons"] if more else []
        sentence = f"worker {self._rank} masked {count:,} rows, the last {last}: {'; '.join(reasons)}"
        tell("masked", sentence, worker=self._rank, rows=count, reasons=dict(self._reasons.most_common(10)))
        self._reasons.clear()

    def take(self) -> dict[str, bytes]:
        """Everything added since the last call, as a file of the run: name -> content."""
        self.tell()
        rows, self._rows = self._rows, []
        if not rows:
            return {}
        content = "".join(f"{json.dumps(row)}\n" for row in rows)
        return {f"{_FOLDER}/{self._attempt}/{rows[0]['step']:08d}-{self._rank}.jsonl": content.encode()}
