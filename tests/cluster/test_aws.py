"""`ray up` and `ray down` themselves, against a made-up AWS, with a recorder in place of ssh."""

import os
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
from test_files import CLUSTER, filled_in, script, written

pytestmark = [pytest.mark.full, pytest.mark.slow]
ROOT, BIN = Path(__file__).parents[2], Path(sys.executable).parent
REGION = "us-east-1"


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    """(a client for EC2, the environment in which `ray up` finds it and the recorder)."""
    from moto.server import ThreadedMotoServer  # slow to import

    home = tmp_path_factory.mktemp("home")
    (home / ".ssh").mkdir()
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("made up")
    for name in ("ssh", "rsync"):
        script(home / name, f'echo "{name} $@" >> {home}/calls; case "$*" in *uptime*) echo up 1 min;; esac; exit 0')
    strict = {
        "MOTO_IAM_LOAD_MANAGED_POLICIES": "true",
        "MOTO_EC2_ENABLE_INSTANCE_TYPE_VALIDATION": "true",
        "MOTO_ENABLE_KEYPAIR_VALIDATION": "true",
        "MOTO_ENABLE_AMI_VALIDATION": "true",
    }
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": REGION}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (strict | keys).items():
            patch.setenv(name, value)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        try:
            host, port = server.get_host_and_port()
            url = f"http://{host}:{port}"
            client = boto3.client("ec2", region_name=REGION, endpoint_url=url)
            iam = boto3.client("iam", region_name=REGION, endpoint_url=url)
            for name in ("vlmo-head", "vlmo-worker"):
                iam.create_instance_profile(InstanceProfileName=name)
            environment = os.environ | keys | {
                "AWS_ENDPOINT_URL": url,
                "AWS_EC2_METADATA_DISABLED": "true",
                "HOME": str(home),
                "PATH": f"{home}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}",
                "RAY_USAGE_STATS_ENABLED": "0",
            }  # fmt: skip
            yield client, environment, home / "calls"
        finally:
            server.stop()


def ray(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([BIN / "ray", *words], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500)


def instances(client) -> list[dict]:
    return [found for one in client.describe_instances()["Reservations"] for found in one["Instances"]]


def test_up_and_down(aws, tmp_path):
    client, environment, calls = aws
    config = filled_in()
    image = client.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    for kind in config["available_node_types"].values():
        kind["node_config"]["ImageId"] = image
    path = str(written(config, tmp_path))
    up = ray(environment, "up", "-y", "--no-config-cache", path)
    assert up.returncode == 0, up.stdout[-3000:] + up.stderr[-3000:]
    [head] = instances(client)
    assert head["InstanceType"] == "m7i.2xlarge" and "InstanceLifecycle" not in head
    assert head["IamInstanceProfile"]["Arn"].endswith("instance-profile/vlmo-head")
    tags = {tag["Key"]: tag["Value"] for tag in head["Tags"]}
    assert tags["ray-cluster-name"] == "vlmo" and tags["ray-node-type"] == "head"
    [disk] = client.describe_volumes()["Volumes"]
    assert disk["Size"] == 150 and disk["VolumeType"] == "gp3"
    text = calls.read_text()
    order = ("uptime", "auth_token", "python3 -m venv", "constraints.txt", "ray stop", "ray start --head")
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    assert "RAY_AUTH_MODE=token" in text and "--num-cpus=0" in text and ".venv" in text

    down = ray(environment, "down", "-y", path)
    assert down.returncode == 0, down.stdout[-3000:] + down.stderr[-3000:]
    assert {found["State"]["Name"] for found in instances(client)} == {"terminated"}


def test_a_placeholder_starts_nothing(aws):
    client, environment, _ = aws
    before = len(instances(client))
    up = ray(environment, "up", "-y", "--no-config-cache", str(CLUSTER / "aws.yaml"))
    assert up.returncode != 0 and len(instances(client)) == before


def test_a_worker_is_a_spot_node_with_its_rights_and_disk(aws):
    """What the autoscaler on the head does: the provider starts a node from a `node_config`."""
    client, _, _ = aws
    asked = filled_in()["available_node_types"]["h100_spot"]["node_config"]
    asked["ImageId"] = client.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    client.run_instances(**asked, MinCount=1, MaxCount=1)
    found = instances(client)[-1]
    assert found["InstanceType"] == "p5.48xlarge" and found["InstanceLifecycle"] == "spot"
    assert found["IamInstanceProfile"]["Arn"].endswith("instance-profile/vlmo-worker")
    disk = client.describe_volumes()["Volumes"][-1]
    assert disk["Size"] == 300
