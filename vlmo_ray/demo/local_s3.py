"""A real S3 server on the loopback interface, for the demo and the tests: SeaweedFS from a wheel."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from vlmo_ray.errors import UserError

_START_S = 60
# The server ends with its parent, even if that is killed: prctl(PR_SET_PDEATHSIG, SIGTERM), then exec.
_LAUNCH = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent process is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


def _weed() -> str:
    beside = Path(sys.executable).parent / "weed"  # scripts of a virtual environment that is not activated
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise UserError("the S3 server is not installed; run: pip install 'vlmo-ray[demo]'")
    return found


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@contextlib.contextmanager
def local_s3(folder: str | Path, buckets: tuple[str, ...] = ("vlmo",)) -> Iterator[dict[str, str]]:
    """Creates the buckets and serves S3 from `folder` on a free loopback port; yields the AWS variables.

    Put them into `os.environ` before Ray starts, so its workers inherit them. The server ends with the block or with
    this process. Raises UserError if the server is not installed or does not start in time.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    key, secret = "vlmo", secrets.token_hex(16)
    credentials = {"credentials": [{"accessKey": key, "secretKey": secret}]}
    identity = {"name": "vlmo", **credentials, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    config = folder / "s3.json"
    config.touch(mode=0o600)
    config.write_text(json.dumps({"identities": [identity]}))
    data, log = folder / "data", folder / "weed.log"
    data.mkdir(exist_ok=True)
    services = ("master", "volume", "filer", "s3", "admin")
    ports = dict(zip(services, zip(*[iter(_free_ports(2 * len(services)))] * 2, strict=True), strict=True))
    flags = [f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={config}"]
    flags += ["-master.telemetry=false", "-admin.ui=false", "-webdav=false"]
    flags += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"]
    for name, (http, grpc) in ports.items():
        flags += [f"-{name}.port={http}", f"-{name}.port.grpc={grpc}"]
    endpoint = f"http://127.0.0.1:{ports['s3'][0]}"
    env = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    launch = [sys.executable, "-c", _LAUNCH, str(os.getpid()), _weed(), f"-logdir={folder}", "mini", *flags]
    with open(log, "wb") as output:
        server = subprocess.Popen(
            launch, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait(server, endpoint, key, secret, buckets, log)
        yield env
    finally:
        # The server leads its own process group, which holds its children and nothing else.
        for kill, patience_s in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(server.pid, kill)
                server.wait(patience_s)
                break


def _wait(server: subprocess.Popen, endpoint: str, key: str, secret: str, buckets: tuple[str, ...], log: Path) -> None:
    """Waits until every bucket exists and accepts an object; the port answers before writes succeed."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        config=Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1}),
    )
    last, until = None, time.monotonic() + _START_S
    while time.monotonic() < until and server.poll() is None:
        try:
            have = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
            for bucket in buckets:
                if bucket not in have:
                    client.create_bucket(Bucket=bucket)
                client.put_object(Bucket=bucket, Key="_ready", Body=b"1")
                client.delete_object(Bucket=bucket, Key="_ready")
            return
        except (BotoCoreError, ClientError) as error:
            last = error
            time.sleep(0.2)
    end = log.read_text(errors="replace")[-1000:]
    raise UserError(f"the S3 server at {endpoint} did not start ({last}); the end of {log}:\n{end}")
