"""The `vlmo` command: every mistake a user can make is one sentence, exit code 2, within seconds, no traceback.

Most tests call it in their own process; `test_the_process_itself` starts it as a user does.
"""

import dataclasses
import itertools
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_run import SMALL

from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.store import Store
from vlmo_ray.demo.scenes.records import records
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.recipes import RECIPES
from vlmo_ray.runs.load import load
from vlmo_ray.weights.folder import export_official, save_model

JOBS = Path(__file__).parent.parent / "jobs"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("cli") / "scenes")
    write_dataset(folder, records(1, 40, image_size=32), rows_per_group=8)
    return folder


def refused(run: subprocess.CompletedProcess, *words: str) -> None:
    assert run.returncode == 2, run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    sentence = run.stderr.strip().splitlines()[-1]
    assert sentence.startswith("vlmo: ") and all(word in sentence for word in words), run.stderr


@pytest.mark.slow
def test_the_process_itself(s3_server, tmp_path):
    def process(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "vlmo_ray", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    run = process("recipes")
    assert run.returncode == 0 and "tiny" in run.stdout
    began = time.monotonic()
    storage = str(tmp_path / "runs")
    refused(process("train", "tiny", "--data", "s3://no-such-bucket/x", "--storage", storage), "no-such-bucket")
    assert time.monotonic() - began < 40  # on a busy machine the imports alone take ten


def test_recipes_and_show(vlmo):
    run = vlmo("recipes", COLUMNS="200")
    assert run.returncode == 0
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in run.stdout.splitlines() if "│" in line]
    names = [name for name, _ in rows if name]
    assert names == list(RECIPES)
    starts = [index for index, (name, _) in enumerate(rows) if name] + [len(rows)]
    for start, end in itertools.pairwise(starts):
        assert " ".join(text for _, text in rows[start:end]).strip().endswith("."), rows[start:end]
    run = vlmo("show", "pretrain_base", "--set", "seed=7", "--set", "optim.peak_lr=1e-4")
    shown = json.loads(run.stdout)
    assert (shown["seed"], shown["optim"]["peak_lr"], shown["model"]["width"]) == (7, 1e-4, 768)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["show", "pretrain_bas"], ["pretrain_bas", "did you mean 'pretrain_base'"]),
        (["show", "tiny", "--set", "optim.rate=1"], ["optim.rate", "known here: peak_lr"]),
        (["show", "tiny", "--set", "phases=[[9, 33]]", "--set", "optim.warmup_steps=1"], ["33", "does not divide"]),
        (["show", "tiny", "--set", "model.image_size=36"], ["36", "multiple of model.patch_size=8", "32 or 40"]),
        (["show", "tiny", "--set", "model.num_answers=3"], ["model.num_answers", "no effect"]),
        (["train", "tiny", "--data", "/no/such/folder"], ["/no/such/folder", "does not exist"]),
        (["evaluate", "/no/such/run", "--data", "/no"], ["/no/such/run"]),
        (["import", "/no/such/file.pt", "/tmp/never"], ["/no/such/file.pt"]),
        (["export", "/no/such/run", "/tmp/never.pt"], ["/no/such/run"]),
        (["export", "/no/such/run", "/tmp/"], ["/tmp/ does not name a file"]),
        (["export", "/no/such/run", "/tmp"], ["/tmp does not name a file"]),
        (["export", "/no/such/run", "gs://bucket/model.pt"], ["gs://bucket", "only folders and s3://"]),
        (["import", "/no/such/file.pt", "/dev/null/x"], ["/no/such/file.pt"]),
        (["audit", "/no/such/run", "--data", "/no"], ["/no/such/run"]),
        (["prepare", "karpathy", "/no/such.json", "/tmp/never"], ["/no"]),
        (["prepare", "table", "/no.csv", "/tmp/never", "--option", "header"], ["'header' has no '='"]),
    ],
)
def test_mistakes_without_a_server(vlmo, arguments, words):
    refused(vlmo(*arguments), *words)


@pytest.mark.slow
def test_mistakes_about_storage(vlmo, s3_server, bucket, data, tmp_path):
    def pretrain(uri, *more, **environment):
        began = time.monotonic()
        run = vlmo("train", "tiny", "--data", uri, "--storage", str(tmp_path / "runs"), *more, **environment)
        assert time.monotonic() - began < 30
        return run

    refused(pretrain("s3://no-such-bucket/x"), "no-such-bucket")
    refused(pretrain(f"{bucket}/empty"), f"{bucket}/empty")
    refused(pretrain("s3://vlmo/x", AWS_SECRET_ACCESS_KEY="wrong"), "AWS_SECRET_ACCESS_KEY")
    refused(pretrain("s3://vlmo/x", AWS_ENDPOINT_URL="http://127.0.0.1:9"), "127.0.0.1:9")

    refused(pretrain("s3://vlmo/x", AWS_SESSION_TOKEN="t", AWS_ACCESS_KEY_ID=""), "AWS_SESSION_TOKEN", "without")
    shard = next(name for name in os.listdir(data) if name.endswith(".parquet") and name != "manifest.parquet")
    broken = tmp_path / "broken"
    write_dataset(str(broken), records(1, 40, image_size=32), rows_per_group=8)
    (broken / shard).write_bytes(b"PAR1")
    refused(pretrain(str(broken)), shard)


@pytest.mark.slow
@pytest.mark.ray
def test_more_workers_than_the_cluster_can_have(vlmo, ray_cluster, data, tmp_path):
    run = vlmo(
        "train", "pretrain_base", "--data", data, "--storage", str(tmp_path), CUDA_VISIBLE_DEVICES=""
    )  # fmt: skip
    refused(run, "4 workers with 1 GPU each", "cluster.min_workers")
    run = vlmo(
        "train", "tiny", "--data", data, "--storage", str(tmp_path), "--set", "cluster.data_cpus_per_worker=0"
    )  # fmt: skip
    refused(run, "cluster.data_cpus_per_worker=0 must be at least 1")


@pytest.mark.slow
def test_weights_go_out_and_come_in_anywhere(vlmo, bucket, tmp_path):
    """Into folders that do not exist yet, and to object storage."""
    model = VLMo(dataclasses.replace(SMALL.model, bias_text_len=14))
    init_weights(model, 1)
    save_model(model, tmp_path / "ours")
    for out in (f"{tmp_path}/new/folder/model.pt", f"{bucket}/weights/model.pt"):
        done = vlmo("export", str(tmp_path / "ours"), out)
        assert done.returncode == 0, done.stderr
    store = Store(f"{bucket}/weights")
    assert store.read("model.pt") == (tmp_path / "new/folder/model.pt").read_bytes()
    for out in (f"{tmp_path}/imported/here", f"{bucket}/imported"):
        done = vlmo("import", f"{tmp_path}/new/folder/model.pt", out)
        assert done.returncode == 0, done.stderr
        torch.testing.assert_close(load(out).state_dict(), model.state_dict(), rtol=0, atol=0)
    assert not (tmp_path / "s3:").exists()


def test_a_folder_that_is_a_file_is_refused(vlmo, tmp_path):
    model = VLMo(SMALL.model)
    save_model(model, tmp_path / "ours")
    export_official(tmp_path / "ours", tmp_path / "model.pt")
    refused(vlmo("import", f"{tmp_path}/model.pt", f"{tmp_path}/model.pt/below"), f"{tmp_path}/model.pt/below")


@pytest.mark.slow
@pytest.mark.parametrize("job", sorted(JOBS.glob("tune_*.py")), ids=lambda job: job.stem)
def test_jobs_that_tune_are_commands(job, monkeypatch, capsys):
    """What they search is declared by their recipes; the rest is `vlmo tune`."""
    assert len(job.read_text().splitlines()) < 40
    monkeypatch.setattr("sys.argv", [str(job), "--data", "/no/such/data", "--storage", "/tmp/never"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(job), run_name="__main__")
    assert "/no/such/data does not exist" in capsys.readouterr().err
