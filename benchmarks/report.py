"""Shared by the benchmarks: a description of the machine, Markdown tables, the peak memory of a process."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from pathlib import Path


def machine() -> str:
    """Processor or GPU, cores, versions."""
    import torch  # not at the top: some of the measured processes must not import it

    if torch.cuda.is_available():
        what = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        what = f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"
    return f"{what}; Python {platform.python_version()}, torch {torch.__version__}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def publish(title: str, text: str, out: str) -> None:
    """Prints the report, and writes it to `out` if that is not empty."""
    command = " ".join(["python", *sys.argv])
    report = f"# {title}\n\n{datetime.date.today()}, {machine()}.\n\n    {command}\n\n{text}\n"
    print(report)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(report)


class PeakMemory:
    """After `with PeakMemory() as peak: ...`, `peak.bytes` is the peak above what the process or GPU held before."""

    def __enter__(self) -> PeakMemory:
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
            self._before = _status("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        import torch

        after = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")
        self.bytes = after - self._before


def peak_memory() -> int:
    """The most bytes that this process ever held."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
