"""A run's checkpoints: complete or invisible, checked byte by byte, retired by rule; and the loop that lives off them.

Every disturbed run ends as the undisturbed one.
"""

import contextlib
import dataclasses
import errno
import io
import json
import pickle
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_s3 import faulty_s3
from safetensors.torch import load_file
from small_run import SMALL, begin_at, job, train_on
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from vlmo_ray.config import Phase
from vlmo_ray.data.read import read_chunk
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.runs.audit import audit
from vlmo_ray.runs.checkpoint import STATE, _sealed, measured, parse_state
from vlmo_ray.runs.checkpoints import Checkpoints
from vlmo_ray.runs.load import load
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.runs.state import TrainState
from vlmo_ray.train.agree import Notice
from vlmo_ray.train.loop import train

CONFIG = dataclasses.replace(SMALL, checkpoint_every=2, keep_checkpoints=5, precision="float64", audit=True)


def curve(run: Path | str) -> np.ndarray:
    metrics, _ = read_metrics(Store(str(run)))
    return np.array([[m[name] for name in ("step", "samples", "loss", "itm", "mlm", "grad_norm")] for m in metrics])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "model" / "model.safetensors")


def assert_same(run: Path, undisturbed: Path, since: int = 0) -> None:
    np.testing.assert_allclose(curve(run), curve(undisturbed)[since:], rtol=1e-12)
    for name, value in weights(undisturbed).items():
        torch.testing.assert_close(weights(run)[name], value, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def undisturbed(scenes, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed")
    assert train(job(scenes, run, CONFIG)).step == 10
    return run


@pytest.fixture
def half(undisturbed, tmp_path) -> Path:
    """A run that died after step 6, with the checkpoints of steps 2, 4 and 6."""
    for step in (2, 4, 6):
        begin_at(tmp_path, undisturbed / f"checkpoint-{step:08d}")
    shutil.copytree(undisturbed / "audit", tmp_path / "audit")  # more than counts: of later steps, too
    return tmp_path


def names(run) -> list[int]:
    return [int(path.name[-8:]) for path in sorted(Path(run).glob("checkpoint-*"))]


def test_a_state_without_all_its_files_is_not_there(half, scenes, undisturbed, capsys):
    newest = half / "checkpoint-00000006"
    next(newest.rglob("*.distcp")).unlink()
    assert Checkpoints(Store(str(half))).newest().step == 4
    assert train(job(scenes, half, CONFIG)).step == 10
    told = "skipped checkpoint-00000006, which is incomplete: some of its files are missing or short"
    assert told in capsys.readouterr().out
    assert_same(half, undisturbed, since=4)
    assert audit(str(half), scenes).clean


def test_a_run_that_lost_its_checkpoints_is_not_started_afresh(undisturbed, scenes, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    for file in (tmp_path / "run").rglob("*.distcp"):
        file.unlink()
    for _ in range(2):
        outcome = train(job(scenes, tmp_path / "run", CONFIG))
        assert "no checkpoint of" in outcome.stopped and "checkpoint-00000010" in outcome.stopped
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert "all are gone" in train(job(scenes, tmp_path / "run", CONFIG)).stopped


def test_the_files_of_two_attempts_are_no_checkpoint(undisturbed, scenes, half):
    """One died before its state arrived, and the other after its state and before the rest of its files."""
    newest = half / "checkpoint-00000006"
    state, files = parse_state((newest / STATE).read_text())
    other = dataclasses.replace(state, attempts=[*state.attempts, (4, "other")])
    (newest / STATE).write_text(_sealed(other.state_dict() | {"files": files}))
    assert Checkpoints(Store(str(half))).newest().step == 4


def test_a_half_written_file_is_not_there(half):
    file = next((half / "checkpoint-00000006").rglob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])
    assert Checkpoints(Store(str(half))).newest().step == 4


def test_files_without_a_state_are_not_there(half):
    (half / "checkpoint-00000006" / STATE).unlink()
    assert Checkpoints(Store(str(half))).newest().step == 4


def test_a_checkpoint_that_is_named_is_refused_with_its_name(half):
    name = f"{half}/checkpoint-00000006"
    state = Path(name) / STATE
    whole = state.read_text()
    state.write_text(whole[:-20])
    with pytest.raises(UserError, match=rf"{name} is damaged: its {STATE} cannot be read"):
        load(name)
    state.write_text(whole)
    file = next(Path(name).rglob("*.distcp"))
    flip(file)
    with pytest.raises(UserError, match=f"^{file} has changed since it was written"):
        load(name)
    file.unlink()
    with pytest.raises(UserError, match=f"{name} is not complete: some of its files are missing"):
        load(name)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_flipped_bit_is_named_and_the_one_before_taken(half, scenes, undisturbed, capsys):
    file = next((half / "checkpoint-00000006").rglob("*.distcp"))
    flip(file)
    assert train(job(scenes, half, CONFIG)).step == 10
    printed = capsys.readouterr().out
    assert f"skipped checkpoint-00000006, which is damaged: {file} has changed" in printed
    assert "resumed at step 4 on 1 workers" in printed
    assert_same(half, undisturbed, since=4)
    assert audit(str(half), scenes).clean
    # step 6 was saved anew, over the damaged one
    assert [state.step for _, state, _ in Checkpoints(Store(str(half))).complete()] == [10, 8, 6, 4, 2]


@pytest.mark.slow
def test_two_workers_agree_on_the_checkpoint_before(half, scenes, undisturbed):
    flip(next((half / "checkpoint-00000006").rglob("*.distcp")))
    outcomes = train_on(2, job(scenes, half, CONFIG))
    assert [outcome.step for outcome in outcomes] == [10, 10], outcomes
    np.testing.assert_allclose(curve(half), curve(undisturbed)[4:], rtol=1e-9)


def test_without_a_whole_checkpoint_nothing_is_started_afresh(half, scenes):
    for step in (2, 4, 6):
        flip(next((half / f"checkpoint-{step:08d}").rglob("*.distcp")))
    for _ in range(2):  # nor at the second try
        outcome = train(job(scenes, half, CONFIG))
        assert "no checkpoint of" in outcome.stopped and "give another --name" in outcome.stopped
    assert names(half) == [2, 4, 6]  # all still there to look at
    with pytest.raises(UserError, match="no checkpoint of"):
        load(half)


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda text: "{", "cannot be read"),
        (lambda text: text.replace('"step": 6,', '"step": 7,'), "its checksum does not match"),
        (lambda text: _sealed(dict(list(json.loads(text).items())[1:]) | {"step": 7}), "it is of step 7"),
    ],
)
def test_a_damaged_state_is_passed_over(half, capsys, damage, told):
    state = half / "checkpoint-00000006" / STATE
    before = state.read_text()
    state.write_text(damage(before))
    assert state.read_text() != before
    assert Checkpoints(Store(str(half))).newest().step == 4
    assert told in capsys.readouterr().out


def test_the_newest_and_every_kth_are_kept(scenes, tmp_path):
    config = dataclasses.replace(CONFIG, keep_checkpoints=1, keep_every=4)
    assert train(job(scenes, tmp_path, config)).step == 10
    assert names(tmp_path) == [4, 8, 10]


def test_a_save_asks_for_no_more_the_longer_a_run_is(half, monkeypatch):
    """One listing of the checkpoints, and the states of the newest ones."""
    asked = []
    for name in ("sizes", "read"):
        real = getattr(Store, name)
        monkeypatch.setattr(
            Store, name, lambda self, *given, real=real: (asked.append(given[0]), real(self, *given))[1]
        )
    Checkpoints(Store(str(half)), keep=1, keep_every=2, keeper=True).retire()
    assert asked == ["checkpoint-", "checkpoint-00000006/train_state.json"]
    assert names(half) == [2, 4, 6]


def test_only_the_first_checkpoint_of_a_start_is_planned(scenes, tmp_path, monkeypatch):
    planned, real = [], DefaultSavePlanner._create_global_plan
    monkeypatch.setattr(
        DefaultSavePlanner, "_create_global_plan", lambda *given: (planned.append(given), real(*given))[1]
    )
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, width=36))
    assert train(job(scenes, tmp_path, config)).step == 10
    assert names(tmp_path) == [2, 4, 6, 8, 10] and len(planned) == 1


def test_nothing_is_retired_for_an_incomplete_one(half):
    next((half / "checkpoint-00000006").rglob("*.distcp")).unlink()
    Checkpoints(Store(str(half)), keep=1, keeper=True).retire()
    assert names(half) == [4, 6]  # 6 may yet arrive


def test_a_failed_write_is_told_and_made_up_for(scenes, undisturbed, tmp_path, monkeypatch, capsys):
    """The disk is full at the checkpoints of steps 4 and 6."""
    import vlmo_ray.runs.checkpoint as checkpoint

    original, calls = checkpoint.state_dict_saver.save, []

    def save(*args, **kwargs):
        calls.append(1)
        if len(calls) in (2, 3):
            full = OSError(errno.ENOSPC, "No space left on device")
            raise checkpoint.CheckpointException("save", {0: (full, None)})
        return original(*args, **kwargs)

    monkeypatch.setattr(checkpoint.state_dict_saver, "save", save)
    assert train(job(scenes, tmp_path, CONFIG)).step == 10
    assert names(tmp_path) == [2, 8, 10]
    assert capsys.readouterr().out.count("No space left on device (") == 2
    assert_same(tmp_path, undisturbed)


@pytest.mark.parametrize("failing", ["checkpoint-00000004", "checkpoint-00000010"])
def test_an_upload_that_fails_stops_the_run_with_its_sentence(scenes, undisturbed, tmp_path, monkeypatch, failing):
    """In the background: soon after, and at the end before the run is called finished."""
    original = Store.upload

    def upload(store, file, name):
        if name.startswith(failing):
            raise UserError(f"{store.address(name)}: access was withdrawn")
        original(store, file, name)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "upload", upload)
        outcome = train(job(scenes, tmp_path, CONFIG))
    assert failing in outcome.stopped and "access was withdrawn" in outcome.stopped
    assert int(failing[-2:]) <= outcome.step <= min(10, int(failing[-2:]) + 4)
    assert not list((tmp_path / "model").glob("*"))
    assert train(job(scenes, tmp_path, CONFIG)).step == 10
    assert_same(tmp_path, undisturbed)


def test_of_slow_uploads_one_may_run_and_one_may_wait(tmp_path, monkeypatch):
    goes_on, begun = threading.Event(), []

    def upload(store, file, name):
        begun.append(name)
        assert goes_on.wait(20)

    monkeypatch.setattr(Store, "upload", upload)
    checkpoints = Checkpoints(Store(str(tmp_path / "run")))
    for step in (2, 4, 6):
        (tmp_path / str(step)).mkdir()
        (tmp_path / str(step) / "weights").touch()

    def save(step: int) -> None:
        checkpoints.upload(tmp_path / str(step), TrainState.of(step, CONFIG, "data", [(0, "attempt")]))

    save(2)
    save(4)
    third = threading.Thread(target=save, args=(6,))
    third.start()
    third.join(0.3)
    assert third.is_alive() and begun == ["checkpoint-00000002/attempt/weights"]
    goes_on.set()
    third.join(20)
    checkpoints.wait()
    checkpoints.close()
    assert [name[:19] for name in begun] == [f"checkpoint-{step:08d}" for step in (2, 4, 6)]


def notice_at(step: int, notice: Notice):
    asked = []

    def ask() -> Notice:
        asked.append(1)
        return notice if len(asked) == step + 1 else Notice.NONE

    return ask


@pytest.mark.parametrize("notice", [Notice.STOP, Notice.PREEMPTED, Notice.RESIZE])
def test_a_notice_saves_and_ends_without_a_step_repeated(scenes, undisturbed, tmp_path, notice):
    config = dataclasses.replace(CONFIG, cluster=dataclasses.replace(CONFIG.cluster, notice_every=1))
    outcome = train(job(scenes, tmp_path, config), notice=notice_at(5, notice))
    assert outcome.step == 5 and outcome.again == (notice is not Notice.STOP)
    assert outcome.stopped.startswith("step 5: saved")
    assert names(tmp_path) == [2, 4, 5]
    assert train(job(scenes, tmp_path, config)).step == 10
    assert_same(tmp_path, undisturbed)
    assert not read_metrics(Store(str(tmp_path)))[1]


@pytest.mark.slow
def test_storage_that_fails_slows_a_run_and_changes_nothing(scenes, undisturbed, s3_server, bucket, monkeypatch):
    """Data, metrics and checkpoints go through a proxy that answers 503, cuts bodies, and is away for a while."""
    for file in Path(scenes).rglob("*.*"):
        Store(f"{bucket}/data").upload(file, str(file.relative_to(scenes)))
    with faulty_s3(s3_server["AWS_ENDPOINT_URL"]) as (endpoint, faults), contextlib.ExitStack() as stack:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        work = job(f"{bucket}/data", f"{bucket}/run", dataclasses.replace(CONFIG, checkpoint_every=5))
        faults.busy, faults.cut, faults.slow, faults.delay_s = 0.15, 0.15, 0.1, 0.2
        away = threading.Timer(2, lambda: setattr(faults, "away", True))
        back = threading.Timer(4, lambda: setattr(faults, "away", False))
        for timer in (away, back):
            timer.start()
            stack.callback(timer.cancel)
        assert train(work).step == 10
        faults.busy = faults.cut = faults.slow = 0.0
        assert min(faults.struck[kind] for kind in ("busy", "cut", "slow", "away")) > 0
        np.testing.assert_allclose(curve(f"{bucket}/run"), curve(undisturbed), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_storage_that_stays_away_ends_the_run_with_its_address(scenes, s3_server, bucket, tmp_path, monkeypatch, world):
    """Only the run is there; it is away from some step on, for longer than the patience."""
    with faulty_s3(s3_server["AWS_ENDPOINT_URL"]) as (endpoint, faults):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        config = dataclasses.replace(
            CONFIG,
            phases=(Phase(400, 8),),
            checkpoint_every=10,
            data=dataclasses.replace(CONFIG.data, retry_timeout_s=1),
        )
        run = Store(f"{bucket}/run")

        def away() -> None:
            while not run.list("checkpoint-"):
                time.sleep(0.05)
            faults.away = True

        watcher = threading.Thread(target=away, daemon=True)
        watcher.start()
        outcomes = train_on(world, job(scenes, run.uri, config))
        watcher.join()
        faults.away = False
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert 10 <= outcomes[0].step < 400 and f"{run.uri}/" in outcomes[0].stopped, outcomes
    assert "(tried for 1 s)" in outcomes[0].stopped and not outcomes[0].again


@pytest.mark.slow
def test_a_masked_shard_is_counted_row_by_row(scenes, tmp_path, monkeypatch):
    monkeypatch.setitem(read_chunk.__kwdefaults__, "wait_s", 0.01)  # before the shard is tried again
    broken = tmp_path / "broken"
    shutil.copytree(scenes, broken)
    shard = sorted(path for path in broken.rglob("*.parquet") if path.name != "manifest.parquet")[0]
    data = bytearray(shard.read_bytes())
    data[300] ^= 1
    shard.write_bytes(data)
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, bad_shards="mask"))
    assert train(job(str(broken), tmp_path / "run", config)).step == 10
    metrics, _ = read_metrics(Store(str(tmp_path / "run")))
    assert sum(m["masked_rows"] for m in metrics) > 0 and all(np.isfinite(m["loss"]) for m in metrics)
    found = audit(str(tmp_path / "run"), str(broken))
    assert found.clean and sum(len(epoch.masked) for epoch in found.epochs) == sum(m["masked_rows"] for m in metrics)


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "run"))


def seal(checkpoint: Path, change=lambda raw: None) -> None:
    """Gives a checkpoint a new `train_state.json`, with the sizes and checksums of its files as they are."""
    raw = json.loads((checkpoint / STATE).read_text())
    raw.pop("crc32")
    folder = checkpoint / raw["attempts"][-1][1]
    raw["files"] = {file.name: measured(file) for file in folder.iterdir()}
    change(raw)
    (checkpoint / STATE).write_text(_sealed(raw))


def newest(run: Path) -> Path:
    return sorted(run.glob("checkpoint-*"))[-1]


def test_a_planted_pickle_is_not_run(half, scenes, tmp_path):
    checkpoint = newest(half)
    [metadata] = checkpoint.rglob(".metadata")
    metadata.write_bytes(pickle.dumps(Planted(tmp_path / "planted")))
    seal(checkpoint)
    for use in (lambda: train(job(scenes, half, CONFIG)), lambda: load(str(half))):
        with pytest.raises(Exception, match="which no checkpoint of tensors has"):
            use()
    assert not (tmp_path / "planted").exists()


def test_an_entry_of_bytes_is_not_unpickled(half, scenes, tmp_path):
    """dcp would unpickle an entry whose metadata calls it bytes."""
    checkpoint = newest(half)
    [path] = checkpoint.rglob(".metadata")
    metadata = pickle.loads(path.read_bytes())
    name = next(iter(metadata.state_dict_metadata))
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    place = metadata.storage_data.pop(next(i for i in metadata.storage_data if i.fqn == name))
    data = io.BytesIO()
    torch.save(Planted(tmp_path / "planted"), data)
    (path.parent / "planted.distcp").write_bytes(data.getvalue())
    metadata.storage_data[MetadataIndex(name)] = type(place)("planted.distcp", 0, len(data.getvalue()))
    path.write_bytes(pickle.dumps(metadata))
    seal(checkpoint)
    with pytest.raises(Exception, match="Missing key"):
        train(job(scenes, half, CONFIG))
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("name", ["../../planted", "/etc/passwd", "..", ""])
def test_a_planted_path_is_refused(half, scenes, capsys, name):
    checkpoint = newest(half)
    before = sorted(half.glob("checkpoint-*"))[-2]
    seal(checkpoint, lambda raw: raw["files"].update({name: (3, 0)}))
    (half / "planted").write_text("abc")
    assert train(job(scenes, half, CONFIG)).step == 10
    printed = capsys.readouterr().out
    assert f"it names {name!r}, which is no name of a file" in printed
    assert f"resumed at step {int(before.name.rpartition('-')[2])}" in printed


def test_a_place_outside_of_the_checkpoint_is_refused(half, scenes, tmp_path):
    checkpoint = newest(half)
    [path] = checkpoint.rglob(".metadata")
    metadata = pickle.loads(path.read_bytes())
    index, place = next(iter(metadata.storage_data.items()))
    metadata.storage_data[index] = dataclasses.replace(place, relative_path="../../elsewhere")
    path.write_bytes(pickle.dumps(metadata))
    seal(checkpoint)
    with pytest.raises(Exception, match="a file outside of the checkpoint"):
        train(job(scenes, half, CONFIG))
