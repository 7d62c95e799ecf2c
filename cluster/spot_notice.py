"""Turns the notice of AWS that this spot node will be taken into a drain of its Ray node.

    python spot_notice.py

Runs on every worker, started by `aws.yaml`. AWS gives notice about two minutes ahead. A drained node gets no new work,
and a run on it saves a checkpoint and goes on with the workers that are left.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

TOKEN_S = 21_600


def fetch(url: str, method: str = "GET", **headers: str) -> str:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    with urllib.request.urlopen(urllib.request.Request(url, method=method, headers=names), timeout=5) as answer:
        return answer.read().decode()


def notice(metadata: str) -> dict[str, str] | None:
    """The action that AWS announces, `{"action": ..., "time": ...}`, or None."""
    token = fetch(f"{metadata}/latest/api/token", "PUT", X_aws_ec2_metadata_token_ttl_seconds=str(TOKEN_S))
    try:
        return json.loads(fetch(f"{metadata}/latest/meta-data/spot/instance-action", X_aws_ec2_metadata_token=token))
    except urllib.error.HTTPError as error:
        if error.code == 404:  # nothing is announced
            return None
        raise


def seconds_left(announced: dict[str, str]) -> int:
    end = datetime.datetime.fromisoformat(announced["time"].replace("Z", "+00:00"))
    return max(1, int((end - datetime.datetime.now(datetime.UTC)).total_seconds()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--metadata", default="http://169.254.169.254", help="where the metadata service is")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks")
    parser.add_argument("--ray", default=str(Path(sys.executable).parent / "ray"), help="the command ray")
    arguments = parser.parse_args()
    while True:
        try:
            announced = notice(arguments.metadata)
        except (OSError, ValueError) as error:  # it answers again, or this node is gone
            print(f"the metadata service did not answer: {error}", flush=True)
            announced = None
        if announced:
            left = seconds_left(announced)
            print(f"AWS will {announced['action']} this node in {left} s: draining it", flush=True)
            command = [arguments.ray, "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
            command += ["--reason-message", f"spot: {announced['action']}", "--deadline-remaining-seconds", str(left)]
            if subprocess.run(command).returncode == 0:
                return
        time.sleep(arguments.every)


if __name__ == "__main__":
    main()
