"""The cluster files: what AWS and Kubernetes would refuse is found here, mistakes planted one by one."""

import copy
import json
import os
import re
import stat
import subprocess
import sys
import threading
import tomllib
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from vlmo_ray.recipes import recipe

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SCHEMAS = ROOT.resolve().parent / "shared" / "kuberay"  # made strict from the operator's own
sys.path.insert(0, str(CLUSTER))

from check import problems  # noqa: E402


def filled_in() -> dict:
    text = (CLUSTER / "aws.yaml").read_text()
    return yaml.safe_load(text.replace("ami-REPLACE_ME", "ami-0123456789abcdef0").replace("ACCOUNT", "123456789012"))


def written(config: dict, tmp_path: Path) -> Path:
    (tmp_path / "aws.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "aws.yaml"


def put(config: dict, path: str, value) -> dict:
    *outer, last = path.split("/")
    inside = config
    for name in outer:
        inside = inside[int(name)] if isinstance(inside, list) else inside[name]
    inside[last] = value
    return config


def test_the_aws_file_has_no_problem_but_what_is_to_be_filled_in(tmp_path):
    assert problems(written(filled_in(), tmp_path)) == []
    found = problems(CLUSTER / "aws.yaml")
    assert len(found) == 8 and all("is to be filled in" in problem for problem in found)
    done = subprocess.run([sys.executable, CLUSTER / "check.py", CLUSTER / "aws.yaml"], capture_output=True, text=True)
    assert done.returncode == 2 and "ImageId" in done.stderr and "Traceback" not in done.stderr


H100 = "available_node_types/h100_spot/node_config"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (f"{H100}/InstanceType", "p5.49xlarge", "AWS knows no 'p5.49xlarge'"),
        (f"{H100}/InstanceMarketOptions/MarketType", "spott", "AWS knows no 'spott'"),
        (f"{H100}/InstanceMarketOptions/SpotOptions/SpotInstanceType", "once", "AWS knows no 'once'"),
        (f"{H100}/BlockDeviceMappings/0/Ebs/VolumeType", "gp9", "AWS knows no 'gp9'"),
        (f"{H100}/BlockDeviceMappings/0/Ebs/VolumeSize", "300", "VolumeSize"),
        (f"{H100}/BlockDeviceMappings/0/Ebs/Size", 300, "Size"),
        (f"{H100}/InstanceTyp", "p5.48xlarge", "InstanceTyp"),
        (f"{H100}/ImageId", "ami-REPLACE_ME", "to be filled in"),
        ("available_node_types/h100_spot/min_worker", 1, "min_worker"),
        ("available_node_types/h100_spot/min_workers", 17, "min_workers"),
        ("idle_timeout_minute", 5, "idle_timeout_minute"),
        ("head_node_type", "had", "had"),
    ],
)
def test_planted_mistakes_are_found(path, value, words, tmp_path):
    found = problems(written(put(filled_in(), path, value), tmp_path))
    assert any(words in problem for problem in found), found


@pytest.mark.parametrize(
    ("name", "words"), [("IamInstanceProfile", "no right to read S3"), ("ImageId", "image of 2021")]
)
def test_what_is_left_out_is_found(name, words, tmp_path):
    config = filled_in()
    del config["available_node_types"]["a100_spot"]["node_config"][name]
    [problem] = problems(written(config, tmp_path))
    assert words in problem and "a100_spot" in problem


def test_eight_workers_of_the_large_run_fit_a_node_with_their_data():
    cluster = recipe("pretrain_1b").cluster
    each = cluster.cpus_per_worker + cluster.data_cpus_per_worker
    for kind in filled_in()["available_node_types"].values():
        gpus = kind["resources"].get("GPU", 0) // cluster.gpus_per_worker
        assert gpus * each <= kind["resources"]["CPU"]
    groups = kuberay("raycluster")[1]["spec"]["workerGroupSpecs"]
    limits = groups[0]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) * each <= int(limits["cpu"])


def test_commands_start_ray_with_the_token_and_never_a_nightly_build():
    config = filled_in()
    start = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    for command in (c for c in start if "ray start" in c):
        assert "RAY_AUTH_MODE=token" in command
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]
    commands = " ".join(config["setup_commands"] + start)
    assert "dev0" not in commands and "-c vlmo_ray/cluster/constraints.txt" in commands
    assert not re.search(r"AKIA|aws_secret", (CLUSTER / "aws.yaml").read_text(), re.IGNORECASE)


@pytest.mark.parametrize("name", ["worker", "head"])
def test_policies_give_the_least_rights(name):
    policy = json.loads((CLUSTER / "aws" / f"{name}-policy.json").read_text())
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow" and all("*" not in action for action in statement["Action"])
        services = {action.split(":")[0] for action in statement["Action"]}
        assert services <= ({"s3"} if name == "worker" else {"s3", "ec2", "iam"})
        if services == {"s3"}:
            assert all("BUCKET-OF-" in resource for resource in statement["Resource"])
        writes = {"s3:PutObject", "s3:DeleteObject"} & set(statement["Action"])
        assert not writes or all("RUNS" in resource for resource in statement["Resource"])


def test_constraints_pin_every_dependency_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (CLUSTER / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for needed in map(Requirement, project["dependencies"]):
        assert needed.specifier.contains(pins[needed.name]), needed


def test_the_image_has_no_root_and_what_the_project_says():
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if re.match("[A-Z]+ ", line)]
    assert [words for name, words in instructions if name == "USER"][-1] not in ("0", "root")
    assert re.search(r":[\w.-]+$", instructions[0][1]) and not instructions[0][1].endswith("latest")
    copied = [words.split()[0] for name, words in instructions if name == "COPY"]
    assert all((ROOT / path).exists() for path in copied)
    installs = [words for name, words in instructions if name == "RUN" and "pip install" in words]
    assert installs == ["pip install --no-cache-dir --constraint cluster/constraints.txt ."]


def hadolint(text: str) -> tuple[int, str]:
    program = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([program, "-"], input=text, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


def test_hadolint_finds_nothing_in_the_image_and_planted_mistakes():
    image = (CLUSTER / "Dockerfile").read_text()
    assert hadolint(image) == (0, "")
    for right, wrong, rule in (
        ("python:3.12-slim-bookworm", "python", "DL3006"),
        (" --no-install-recommends", "", "DL3015"),
        (" --no-cache-dir", "", "DL3042"),
        ("WORKDIR /home/ray/", "WORKDIR ", "DL3000"),
    ):
        assert right in image
        code, said = hadolint(image.replace(right, wrong))
        assert code and rule in said, said


def kuberay(name: str) -> list[dict]:
    return list(yaml.safe_load_all((CLUSTER / "kuberay" / f"{name}.yaml").read_text()))


def schema_problems(document: dict) -> list[str]:
    import jsonschema

    schema = json.loads((SCHEMAS / f"{document['kind'].lower()}.v1.schema.json").read_text())
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(document)]


def operator_problems(cluster: dict) -> list[str]:
    """What KubeRay's operator refuses beyond its schema (controllers/ray/utils/validation.go)."""
    spec, found = cluster["spec"], []
    version = tuple(int(part) for part in spec["rayVersion"].split(".")[:2])
    if spec.get("authOptions", {}).get("mode") == "token" and version < (2, 52):
        found.append("authOptions needs Ray 2.52")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", cluster["metadata"]["name"]):
        found.append("the name is no DNS label")
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        if spec.get("autoscalerOptions", {}).get("version") == "v2" and pod.get("restartPolicy") != "Never":
            found.append("restartPolicy must be Never with the autoscaler v2")
        if "num-gpus" in group["rayStartParams"] or "resources" in group["rayStartParams"]:
            found.append("resources belong to the container")
        for variable in pod["containers"][0].get("env", []):
            if variable["name"] in ("RAY_enable_autoscaler_v2", "RAY_AUTH_TOKEN"):
                found.append(f"{variable['name']} is the operator's")
    for group in spec["workerGroupSpecs"]:
        if not 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            found.append(f"{group['groupName']}: minReplicas <= replicas <= maxReplicas")
    if len({group["groupName"] for group in spec["workerGroupSpecs"]}) < len(spec["workerGroupSpecs"]):
        found.append("two groups of one name")
    return found


@pytest.mark.skipif(not SCHEMAS.is_dir(), reason=f"there are no schemas of KubeRay in {SCHEMAS}")
def test_manifests_fit_the_schemas_of_kuberay():
    account, cluster = kuberay("raycluster")
    [job] = kuberay("rayjob")
    assert account["kind"] == "ServiceAccount"
    assert schema_problems(cluster) == schema_problems(job) == []
    pod = "spec/workerGroupSpecs/0/template/spec"
    for path, value in (
        ("spec/rayversion", "2.60.0"),
        ("spec/headGroupSpec/rayStartParams", {"num-cpus": 0}),
        ("spec/autoscalerOptions/upscalingMode", "Fast"),
        ("spec/authOptions/mode", "tokn"),
        (f"{pod}/containers/0/resources/limits/cpu", "180 cores"),
        (f"{pod}/container", []),
        (f"{pod}/containers/0/lifecycle/preStop/exec/commands", []),
    ):
        assert schema_problems(put(copy.deepcopy(cluster), path, value)), path
    for path, value in (("spec/entryPoint", "x"), ("spec/backoffLimit", "0")):
        assert schema_problems(put(copy.deepcopy(job), path, value)), path


def test_manifests_keep_the_rules_of_the_operator():
    account, cluster = kuberay("raycluster")
    assert operator_problems(cluster) == []
    for path, value in (
        ("spec/workerGroupSpecs/0/minReplicas", 17),
        ("spec/workerGroupSpecs/1/groupName", "h100-spot"),
        ("spec/workerGroupSpecs/0/template/spec/restartPolicy", "Always"),
        ("spec/headGroupSpec/template/spec/restartPolicy", "OnFailure"),
        ("spec/rayVersion", "2.51.0"),
        ("metadata/name", "Vlmo_1"),
        ("spec/workerGroupSpecs/0/rayStartParams", {"num-gpus": "8"}),
    ):
        assert operator_problems(put(copy.deepcopy(cluster), path, value)), path
    [job] = kuberay("rayjob")
    assert job["spec"]["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
    assert not job["spec"].get("shutdownAfterJobFinishes")  # the cluster is not the job's own
    assert job["spec"]["clusterSelector"]["ray.io/cluster"] == cluster["metadata"]["name"]
    for group in [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        assert pod["serviceAccountName"] == account["metadata"]["name"]
        [container] = pod["containers"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    gpu = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert gpu["terminationGracePeriodSeconds"] > 100
    script = ROOT / job["spec"]["entrypoint"].split()[1].removeprefix("/home/ray/vlmo_ray/")
    assert script.is_file()


class Metadata(BaseHTTPRequestHandler):
    """AWS's metadata service, version 2: a token first; a notice after the second look."""

    looks = 0

    def do_PUT(self):
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200, "the token")

    def do_GET(self):
        assert self.headers["X-aws-ec2-metadata-token"] == "the token"
        Metadata.looks += 1
        end = (datetime.now(UTC) + timedelta(seconds=120)).strftime("%Y-%m-%dT%H:%M:%SZ")
        text = json.dumps({"action": "terminate", "time": end})
        self.answer(*((200, text) if Metadata.looks > 2 else (404, "")))

    def answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_) -> None:
        """Nothing on the console."""


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_notice_becomes_a_drain(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ray = script(tmp_path / "ray", f'echo "$@" >> {tmp_path}/calls')
    try:
        where = f"http://127.0.0.1:{server.server_port}"
        command = [sys.executable, CLUSTER / "spot_notice.py", "--metadata", where, "--every", "0.05", "--ray", ray]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0 and "AWS will terminate this node" in done.stdout, done.stderr
    [call] = (tmp_path / "calls").read_text().splitlines()
    found = re.fullmatch(
        "drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot: terminate "
        r"--deadline-remaining-seconds (\d+)",
        call,
    )
    assert found and 100 < int(found[1]) <= 120 and Metadata.looks == 3


def test_slurm_starts_a_head_and_workers_and_gives_back_the_jobs_exit_code(tmp_path):
    calls = tmp_path / "calls"
    script(tmp_path / "scontrol", "printf 'n1\\nn2\\nn3\\n'")
    script(tmp_path / "srun", f'echo "srun $@" >> {calls}; case "$*" in *--head*) sleep 5;; esac')
    script(tmp_path / "ray", f'echo "ray $@ $RAY_AUTH_MODE" >> {calls}')
    script(tmp_path / "python", f'echo "job $@ $RAY_ADDRESS" >> {calls}; exit 7')
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-3]"}
    done = subprocess.run(
        ["bash", CLUSTER / "slurm.sh", "jobs/x.py", "--data", "d"], env=environment, timeout=60, capture_output=True
    )
    assert done.returncode == 7, done.stderr
    text = calls.read_text()
    assert "--nodelist=n1 --overlap ray start --head --node-ip-address=n1 --port=6379 --block" in text
    assert "--nodes=2 --ntasks-per-node=1 --nodelist=n2,n3 --overlap ray start --address=n1:6379 --block" in text
    assert "job jobs/x.py --data d n1:6379" in text and "ray status --address=n1:6379 token" in text
