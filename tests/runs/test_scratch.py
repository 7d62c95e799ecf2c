"""What a killed process leaves on local disk goes with the next start; what a living one has stays."""

import subprocess
import sys
import tempfile

from vlmo_ray.runs.scratch import scratch

HOLD = """
import sys, time
from vlmo_ray.runs.scratch import scratch
with scratch() as folder:
    (folder / "half a checkpoint").write_bytes(bytes(1000))
    print(folder, flush=True)
    time.sleep(600)
"""


def test_only_what_killed_processes_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = {"TMPDIR": str(tmp_path)}
    holders = [
        subprocess.Popen([sys.executable, "-c", HOLD], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        left, kept = (holder.stdout.readline().strip() for holder in holders)
        holders[0].kill()
        holders[0].wait()
        assert {str(path) for path in tmp_path.iterdir() if path.is_dir()} == {left, kept}
        with scratch() as own:
            folders = {str(path) for path in tmp_path.iterdir() if path.is_dir()}
            assert folders == {kept, str(own)}
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
    with scratch():
        assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    assert list(tmp_path.iterdir()) == []
