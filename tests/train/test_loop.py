"""The loop without Ray: resuming, any number of workers, bad records, broken shards, losses that are not finite."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_scenes, write_unchecked
from small_run import SMALL, begin_at, job, train_on
from worker_processes import in_processes

import vlmo_ray
from vlmo_ray.config import HEADS, OptimConfig, Phase
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.read import read_chunk
from vlmo_ray.data.schema import Field, Schema
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.recipes.pretraining import PretrainingConfig
from vlmo_ray.runs import evaluations
from vlmo_ray.runs.checkpoints import Checkpoints
from vlmo_ray.runs.load import load, load_all, published, settled
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.runs.state import TrainState
from vlmo_ray.tasks.task import Score
from vlmo_ray.train import loop as schedule
from vlmo_ray.train import validate as validation
from vlmo_ray.train.agree import Agreement, Notice
from vlmo_ray.train.loop import train
from vlmo_ray.train.optim import build_optimizer, lr_at
from vlmo_ray.train.step import gradients as real_gradients


def curve(run) -> np.ndarray:
    metrics, _ = read_metrics(Store(str(run)))
    names = ("step", "samples", "loss", "itc", "itc_vl", "itm", "mlm", "grad_norm", "lr")
    return np.array([[m[name] for name in names] for m in metrics])


@pytest.fixture(scope="module")
def undisturbed(scenes, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed")
    assert train(job(scenes, run)).step == 10
    return run


def weights(run) -> dict[str, torch.Tensor]:
    return vlmo_ray.load(str(run)).state_dict()


def assert_same_weights(a, b, tolerance):
    for name, value in weights(a).items():
        torch.testing.assert_close(value, weights(b)[name], rtol=tolerance, atol=tolerance, msg=name)


def test_losses_fall_and_every_figure_is_there(undisturbed):
    metrics, repeated = read_metrics(Store(str(undisturbed)))
    assert [m["step"] for m in metrics] == list(range(1, 11)) and not repeated
    assert [m["samples"] for m in metrics] == [8, 16, 24, 32, 40, 48, 60, 72, 84, 96]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    wanted = {"itm_accuracy", "mlm_accuracy", "negative_similarity", "temperature", "temperature_vl", "samples_per_s"}
    assert wanted | {"data_wait", "exchanged_bytes", "masked_rows", "workers"} <= set(metrics[0])
    assert list((undisturbed / "tensorboard").iterdir())


def test_a_resumed_run_equals_an_uninterrupted_one(scenes, undisturbed, tmp_path):
    """Also from the middle of a shuffle group and into another phase."""
    begin_at(tmp_path, undisturbed / "checkpoint-00000004")
    assert train(job(scenes, tmp_path)).step == 10
    assert np.array_equal(curve(tmp_path), curve(undisturbed)[4:])
    assert_same_weights(tmp_path, undisturbed, 0)


def test_a_run_is_finished_with_the_weights_of_its_last_checkpoint(scenes, undisturbed, tmp_path):
    run = Store(str(begin_at(tmp_path, undisturbed / "checkpoint-00000008")))
    assert train(job(scenes, tmp_path)).step == 10
    assert published(run, Checkpoints(run).newest())
    shutil.rmtree(tmp_path / "checkpoint-00000010")
    # of another start, which ended before it wrote its weights
    begin_at(tmp_path, undisturbed / "checkpoint-00000010")
    assert not published(run, Checkpoints(run).newest())
    assert train(job(scenes, tmp_path)).step == 10
    assert published(run, Checkpoints(run).newest())
    assert_same_weights(tmp_path, undisturbed, 0)


def stopping_at(step: int):
    told = iter([Notice.NONE] * step + [Notice.STOP])
    return lambda: next(told)


def test_a_run_that_was_made_longer_has_the_weights_of_its_newest_checkpoint(scenes, undisturbed, tmp_path):
    """Until it has ended again; what is measured of them is kept at their step."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    assert load_all(run).step == 10 and settled(str(run)) == str(run)
    cluster = dataclasses.replace(SMALL.cluster, notice_every=1)
    longer = job(scenes, run, phases=(Phase(6, 8), Phase(9, 12)), cluster=cluster)
    assert train(dataclasses.replace(longer, accept_changes=True), notice=stopping_at(2)).step == 12
    newest, loaded = f"{run}/checkpoint-00000012", load_all(run)
    assert loaded.step == 12 and settled(str(run)) == newest and settled(newest) == newest
    for name, value in load(newest).state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    assert train(dataclasses.replace(longer, accept_changes=True)).step == 15
    assert load_all(run).step == 15 and settled(str(run)) == str(run)
    evaluations.keep_in_run(str(run), evaluations.Result({}, "s3://val", 1), loaded.step)
    assert [step for step, _ in evaluations.read_evaluations(Store(str(run)))] == [12]
    assert settled("") == "" and settled("/no/such/weights.pt") == "/no/such/weights.pt"


def test_a_run_cannot_be_made_shorter_than_it_is(scenes, undisturbed, tmp_path):
    begin_at(tmp_path, undisturbed / "checkpoint-00000008")
    spec = dataclasses.replace(job(scenes, tmp_path, phases=(Phase(6, 8),)), accept_changes=True)
    with pytest.raises(UserError, match="checkpoint of step 8 is behind the last step, 6; give more steps in phases"):
        train(spec)


@pytest.mark.parametrize(
    "step, phases, shuffled",
    [
        (10, (Phase(6, 8), Phase(4, 12), Phase(5, 16)), "9 to 12"),
        (10, (Phase(6, 8), Phase(9, 12)), ""),
        (9, (Phase(6, 8), Phase(3, 12), Phase(5, 16)), ""),  # between two spans
        (8, (Phase(6, 8), Phase(2, 12), Phase(5, 16)), "6 to 9"),
    ],
)
def test_rows_that_other_phases_shuffle_anew_are_told(step, phases, shuffled):
    config = dataclasses.replace(SMALL, phases=phases)
    told = TrainState.of(step, SMALL, "x").continue_with(config, "x", accept_changes=True)
    assert [line for line in told if "shuffled anew" in line] == (
        [f"rows: those of steps {shuffled} are shuffled anew, so some that were consumed come again, and others not in "
         "this epoch"] if shuffled else []
    )  # fmt: skip


def test_a_run_goes_on_where_no_step_was_done(scenes, tmp_path, monkeypatch):
    """Its checkpoint has no moments."""
    config = dataclasses.replace(SMALL, optim=dataclasses.replace(SMALL.optim, skip_nonfinite=3))
    monkeypatch.setattr("vlmo_ray.train.loop.gradients", broken_at({0, 1, 2, 3}))
    assert train(job(scenes, tmp_path / "run", config)).step == 3
    monkeypatch.setattr("vlmo_ray.train.loop.gradients", broken_at({0, 1, 2}))
    for name in ("run", "wanted"):
        assert train(job(scenes, tmp_path / name, config)).step == 10
    assert_same_weights(tmp_path / "run", tmp_path / "wanted", 0)


def test_a_run_goes_on_with_a_head_that_was_not_trained_before(scenes, tmp_path):
    """Its moments begin at zero, its average at its weights."""
    optim = dataclasses.replace(SMALL.optim, average_decay=0.5)
    cluster = dataclasses.replace(SMALL.cluster, notice_every=1)
    without = job(scenes, tmp_path, optim=optim, cluster=cluster, task=PretrainingConfig(mlm=0.0))
    assert train(without, notice=stopping_at(4)).step == 4
    before = load(f"{tmp_path}/checkpoint-00000004").state_dict()
    spec = job(scenes, tmp_path, optim=optim, cluster=cluster)
    assert train(dataclasses.replace(spec, accept_changes=True)).step == 10
    after = load(tmp_path).state_dict()
    changed = [name for name in after if name.startswith("mlm.") and not torch.equal(after[name], before[name])]
    assert len(changed) > 3


def test_data_that_cannot_be_evaluated_are_refused_before_the_first_step(scenes, tmp_path):
    images = str(tmp_path / "images")
    rows = ({name: row[name] for name in ("id", "image_id", "image")} for row in small_scenes(5, 10))
    write_dataset(images, rows, schema=Schema((Field("image", "image"),)))
    spec = job(scenes, tmp_path / "run", evaluate_every=5)
    outcome = train(dataclasses.replace(spec, eval_data=images))
    assert outcome.step == 0 and "has no column 'text'" in outcome.stopped


def test_other_data_or_settings_are_refused(scenes, undisturbed, tmp_path):
    for name in "abc":
        begin_at(tmp_path / name, undisturbed / "checkpoint-00000008")
    with pytest.raises(UserError, match=r"other settings: seed: 1 -> 2"):
        train(job(scenes, tmp_path / "a", seed=2))
    other = str(tmp_path / "other")
    write_dataset(other, small_scenes(5, 60), rows_per_group=7)
    with pytest.raises(UserError, match=r"other settings: data: fingerprint .* go on with them by --accept-changes"):
        train(job(other, tmp_path / "b"))
    accepted = dataclasses.replace(job(other, tmp_path / "b", seed=2), accept_changes=True)
    assert train(accepted).step == 10
    assert [m["step"] for m in read_metrics(Store(str(tmp_path / "b")))[0]] == [9, 10]
    wider = dataclasses.replace(SMALL.model, width=48)
    with pytest.raises(UserError, match=r"model\.width: 24 -> 48.*afresh$"):
        train(dataclasses.replace(job(scenes, tmp_path / "a", model=wider), accept_changes=True))
    assert train(job(scenes, tmp_path / "c", log_every=1, micro_batch=2)).step == 10


@pytest.mark.slow
@pytest.mark.parametrize("world, micro_batch", [(2, 4), (3, 2)])
def test_workers_change_nothing(scenes, undisturbed, tmp_path, world, micro_batch):
    """3 workers share 4 slices, later 6, so that they have unequal numbers of rows and micro-batches."""
    outcomes = train_on(world, job(scenes, tmp_path, micro_batch=micro_batch))
    assert [outcome.step for outcome in outcomes] == [10] * world
    np.testing.assert_allclose(curve(tmp_path), curve(undisturbed), rtol=1e-4)
    assert_same_weights(tmp_path, undisturbed, 1e-3)


@pytest.mark.slow
def test_a_checkpoint_of_one_worker_goes_on_with_two_and_back(scenes, undisturbed, tmp_path):
    train_on(2, job(scenes, begin_at(tmp_path, undisturbed / "checkpoint-00000004")))
    np.testing.assert_allclose(curve(tmp_path), curve(undisturbed)[4:], rtol=1e-4)
    alone = begin_at(tmp_path / "alone", tmp_path / "checkpoint-00000008")
    train(job(scenes, alone))
    np.testing.assert_allclose(curve(alone), curve(undisturbed)[8:], rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(scenes, tmp_path):
    config = dataclasses.replace(SMALL, optim=OptimConfig(peak_lr=1e30, warmup_steps=1))
    outcome = train(job(scenes, tmp_path, config))
    assert outcome.step == 1 and "step 1: loss and grad_norm not finite" in outcome.stopped
    assert [m["step"] for m in read_metrics(Store(str(tmp_path)))[0]] == [1]
    assert outcome.stopped.endswith("; the 1 steps before it are saved")
    assert Checkpoints(Store(str(tmp_path))).newest().step == 1


def broken_at(steps: set[int]):
    """`gradients`, whose loss and gradients are NaN in these steps."""

    def gradients(parallel, batch, workers, step, *rest):
        figures = real_gradients(parallel, batch, workers, step, *rest)
        if step in steps:
            figures["loss"] = figures["loss"] * torch.nan
            for parameter in parallel.task.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.nan)
        return figures

    return gradients


def test_so_many_steps_in_a_row_that_are_not_finite_are_skipped(scenes, undisturbed, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(SMALL, optim=dataclasses.replace(SMALL.optim, skip_nonfinite=2))
    monkeypatch.setattr("vlmo_ray.train.loop.gradients", broken_at({8, 9}))
    assert train(job(scenes, tmp_path / "two", config)).step == 10
    # the weights are those of the last step that was done
    found = curve(tmp_path / "two")
    np.testing.assert_array_equal(found[:8], curve(undisturbed)[:8])
    assert np.isnan(found[8:]).any(axis=1).all()
    assert "(2 steps skipped)" in capsys.readouterr().out
    monkeypatch.setattr("vlmo_ray.train.loop.gradients", broken_at({3, 5, 6, 7}))
    outcome = train(job(scenes, tmp_path / "three", config))
    assert outcome.step == 7 and "step 7: loss and grad_norm not finite" in outcome.stopped
    assert Checkpoints(Store(str(tmp_path / "three"))).newest().step == 7


def test_a_step_that_is_not_finite_costs_no_checkpoint(scenes, tmp_path, monkeypatch):
    """The checkpoint before it may be the last good one, even where only one is kept."""
    monkeypatch.setattr("vlmo_ray.train.loop.gradients", broken_at({6}))
    assert train(job(scenes, tmp_path, keep_checkpoints=1)).step == 6
    assert [state.step for _, state, _ in Checkpoints(Store(str(tmp_path))).complete()] == [6, 4]
    monkeypatch.undo()
    assert train(job(scenes, tmp_path, keep_checkpoints=1)).step == 10
    assert [state.step for _, state, _ in Checkpoints(Store(str(tmp_path))).complete()] == [10]


def test_skipped_steps_are_in_the_metrics(scenes, tmp_path, monkeypatch, capsys):
    def large_gradient(*given):
        figures = real_gradients(*given)
        if given[3] in (2, 3):  # of a finite loss
            next(p for p in given[0].task.parameters() if p.grad is not None).grad.fill_(torch.inf)
        return figures

    monkeypatch.setattr("vlmo_ray.train.loop.gradients", large_gradient)
    config = dataclasses.replace(SMALL, optim=dataclasses.replace(SMALL.optim, skip_nonfinite=2))
    assert train(job(scenes, tmp_path, config)).step == 10
    metrics, _ = read_metrics(Store(str(tmp_path)))
    assert [m["step"] for m in metrics if m["skipped"]] == [3, 4] and all(np.isfinite(m["loss"]) for m in metrics)
    assert "(2 steps skipped)" in capsys.readouterr().out


def test_an_evaluation_that_cannot_be_read_costs_no_step(scenes, tmp_path, monkeypatch):
    monkeypatch.setitem(read_chunk.__kwdefaults__, "wait_s", 0.01)  # before a shard is tried again
    shutil.copytree(scenes, tmp_path / "broken")
    shard = sorted(path for path in (tmp_path / "broken").rglob("*.parquet") if path.name != "manifest.parquet")[0]
    shard.write_bytes(shard.read_bytes()[:300] + b"????" + shard.read_bytes()[304:])
    spec = job(scenes, tmp_path / "run", evaluate_every=3, checkpoint_every=100)
    outcome = train(dataclasses.replace(spec, eval_data=str(tmp_path / "broken")))
    assert outcome.step == 3 and f"{shard}#" in outcome.stopped
    assert outcome.stopped.endswith("; the 3 steps before it are saved")


def test_the_checkpoint_with_the_best_evaluation_stays(scenes, tmp_path, monkeypatch, capsys):
    """Evaluations of steps that have no checkpoint otherwise; the best is not the last, and a resumed run knows it."""
    values = iter([0.1, 0.9, 0.3, 0.4, 0.2])

    def scored(evaluation, blocks, data):
        list(blocks)
        return evaluations.Result({"accuracy": Score(next(values), None, 1)}, data, 1)

    monkeypatch.setattr(validation, "scored", scored)
    spec = job(scenes, tmp_path, evaluate_every=2, checkpoint_every=5, keep_checkpoints=1)
    spec = dataclasses.replace(spec, eval_data=scenes)
    stops = iter([Notice.NONE] * 7 + [Notice.STOP])
    looked = dataclasses.replace(spec.config.cluster, notice_every=1)
    spec = dataclasses.replace(spec, config=dataclasses.replace(spec.config, cluster=looked))
    assert train(spec, notice=lambda: next(stops, Notice.NONE)).step == 7
    assert train(spec).step == 10
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-00000004", "checkpoint-00000010"]
    best = f"{tmp_path}/checkpoint-00000004"
    assert f"the best evaluation was at step 4: {best}\n" in capsys.readouterr().out
    again = tmp_path / "again"  # the oracle: the first steps, and no more
    config = dataclasses.replace(spec.config, phases=(Phase(4, 8),), evaluate_every=0)
    monkeypatch.setattr(schedule, "lr_at", lambda step, config: lr_at(step, spec.config))
    assert train(job(scenes, again, config)).step == 4
    for name, value in weights(best).items():
        torch.testing.assert_close(value, weights(again)[name], rtol=1e-5, atol=1e-6)


def test_the_gravest_problem_decides_whether_steps_are_saved():
    """A run that another driver has taken over must not be written to, whatever else is wrong."""
    agreement = Agreement()
    agreement.note("a shard is damaged", Notice.UNREADABLE)
    assert agreement.reach("step 3") == ("step 3: a shard is damaged", Notice.UNREADABLE)
    agreement.note("the run was taken over")
    assert agreement.reach("step 4", Notice.STOP) == ("step 4: a shard is damaged", Notice.FAILED)
    agreement.forget()
    assert agreement.reach("step 5", Notice.RESIZE) == ("", Notice.RESIZE)


def test_settings_of_the_optimizer_come_from_the_config(scenes, undisturbed, tmp_path, monkeypatch):
    """Not from the checkpoint, which holds its state alone."""
    begin_at(tmp_path, undisturbed / "checkpoint-00000004")
    changed = OptimConfig(peak_lr=1e-3, warmup_steps=2, weight_decay=0.3, beta1=0.5, beta2=0.7, eps=1e-3)
    seen = []

    def spied(task, config):
        seen.append(build_optimizer(task, config))
        return seen[-1]

    monkeypatch.setattr("vlmo_ray.train.loop.build_optimizer", spied)
    spec = dataclasses.replace(job(scenes, tmp_path, optim=changed), accept_changes=True)
    assert train(spec).step == 10
    groups = seen[0].param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert all(group["betas"] == (0.5, 0.7) and group["eps"] == 1e-3 for group in groups)
    assert not np.allclose(curve(tmp_path), curve(undisturbed)[4:], rtol=1e-4)


def damaged(tmp_path, damage) -> str:
    rows = list(small_scenes(4, 40))
    damage(rows)
    folder = str(tmp_path / "damaged")
    write_unchecked(folder, rows, rows_per_group=7, groups_per_shard=2)
    return folder


def test_bad_records_are_masked_counted_and_named(tmp_path, capsys):
    def damage(rows):
        rows[3]["image"] = b"not an image"
        rows[11]["text"] = "  "

    assert train(job(damaged(tmp_path, damage), tmp_path / "run")).step == 10
    metrics, _ = read_metrics(Store(str(tmp_path / "run")))
    # 96 pairs of 40 rows: each bad one is met two or three times
    assert 4 <= sum(m["masked_rows"] for m in metrics) <= 6
    assert all(np.isfinite(m["loss"]) for m in metrics)
    printed = capsys.readouterr().out
    assert re.search(r"worker 0 masked \d rows, the last \S+#[01]:[34]: \d x ", printed)
    assert "there is no text" in printed and "not an image" in printed
    run = Store(str(tmp_path / "run"))
    listed = [json.loads(line) for name in run.list("masked/") for line in run.read(name).splitlines()]
    assert len(listed) == sum(m["masked_rows"] for m in metrics)
    assert {row["problem"].partition(": ")[0].partition("#")[2] for row in listed} == {"0:3", "1:4"}
    steps = [row["step"] for row in listed]
    assert steps == sorted(steps) and steps[0] >= 0 and steps[-1] < 10


def nothing_readable(rows):
    for row in rows:
        row["image"] = b"not an image"


def one_image(rows):
    for row in rows:
        row |= {"image": rows[0]["image"], "image_id": rows[0]["image_id"]}


def one_text(rows):
    for row in rows:
        row["text"] = rows[0]["text"]


@pytest.mark.parametrize(
    "damage, words",
    [
        (nothing_readable, "all 8 rows are masked, so nothing is trained"),
        (one_image, "no pair has a hard negative, so matching is not trained"),
        (one_text, "no pair has a hard negative, so matching is not trained"),
    ],
)
def test_a_run_that_trains_nothing_says_so_once(tmp_path, capsys, damage, words):
    train(job(damaged(tmp_path, damage), tmp_path / "run", phases=(Phase(3, 8),), log_every=1))
    said = [line for line in capsys.readouterr().out.splitlines() if words in line]
    assert len(said) == 1 and said[0].startswith(f"step 1: {words}")


@pytest.mark.slow
def test_a_broken_shard_stops_all_workers_with_its_address(tmp_path):
    folder = damaged(tmp_path, lambda rows: None)
    shard = sorted(Path(folder).rglob("*.parquet"))[1]
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(data)
    outcomes = train_on(2, job(folder, tmp_path / "run"))
    assert outcomes[0] == outcomes[1]
    step, stopped = outcomes[0].step, outcomes[0].stopped
    assert 0 < step < 10 and shard.name in stopped and stopped.startswith(f"step {step}: ")
    # the good steps before it are kept
    assert stopped.endswith(f"; the {step} steps before it are saved")
    assert Checkpoints(Store(str(tmp_path / "run"))).newest().step == step


def test_a_run_starts_from_other_weights(scenes, undisturbed, tmp_path):
    start = job(scenes, tmp_path, init=str(undisturbed))
    config = dataclasses.replace(start.config, optim=OptimConfig(peak_lr=1e-12, warmup_steps=1))
    assert train(dataclasses.replace(start, config=config)).step == 10
    assert_same_weights(tmp_path, undisturbed, 1e-6)


@pytest.mark.slow
def test_a_start_that_cannot_be_stops_all_workers(scenes, tmp_path):
    outcomes = train_on(2, job(scenes, tmp_path, init="/no/such/weights.pt"))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].stopped.startswith("the start: ") and "/no/such/weights.pt" in outcomes[0].stopped


@pytest.mark.slow
def test_heads_of_other_tasks_are_left_alone(scenes, tmp_path):
    """DDP would wait for their gradients in the second step."""
    model = dataclasses.replace(SMALL.model, heads=HEADS, num_answers=5)
    config = dataclasses.replace(SMALL, model=model, phases=(Phase(3, 8),))
    assert [outcome.step for outcome in train_on(2, job(scenes, tmp_path, config))] == [3, 3]


def test_a_run_goes_on_when_the_weights_it_started_from_are_gone(scenes, undisturbed, tmp_path):
    weights_file = tmp_path / "start"
    shutil.copytree(undisturbed / "model", weights_file)
    spec = job(scenes, tmp_path / "run", init=str(weights_file))
    assert train(spec).step == 10
    for name in ("checkpoint-00000008", "checkpoint-00000010", "model"):
        shutil.rmtree(tmp_path / "run" / name)
    wanted = curve(tmp_path / "run")
    shutil.rmtree(weights_file)
    assert train(spec).step == 10
    np.testing.assert_array_equal(curve(tmp_path / "run"), wanted)


def _train_on_one_node(rank: int, world: int, spec) -> tuple[int, int]:
    """(step, number of downloads) of a worker of a single node."""
    calls = []
    fetch = Checkpoints.fetch
    Checkpoints.fetch = lambda self, *given: (calls.append(given), fetch(self, *given))[1]
    return train(spec, rank=rank, world=world, local_rank=rank).step, len(calls)


@pytest.mark.slow
def test_a_node_downloads_a_checkpoint_once(scenes, undisturbed, tmp_path):
    begin_at(tmp_path, undisturbed / "checkpoint-00000004")
    assert in_processes(2, _train_on_one_node, job(scenes, tmp_path)) == [(10, 1), (10, 0)]
    np.testing.assert_allclose(curve(tmp_path), curve(undisturbed)[4:], rtol=1e-4)
