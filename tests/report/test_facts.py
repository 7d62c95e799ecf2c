"""What is read of a run: curves against all rows kept in memory, states, reasons of masked rows."""

import dataclasses
import json
import math
import time

import numpy as np
import pytest
from small_run import SMALL

from vlmo_ray.config import Phase
from vlmo_ray.data.schema import PAIRS, Field, Schema
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.overrides import override
from vlmo_ray.recipes import recipe
from vlmo_ray.report.facts import Facts, read_curves, read_facts
from vlmo_ray.report.health import duration, findings
from vlmo_ray.runs.lease import Holder
from vlmo_ray.runs.load import describe
from vlmo_ray.runs.metrics import read_metrics


def write_metrics(run: Store, rows: list[dict], segment: int) -> None:
    run.write(f"metrics/{segment}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def row(step: int, random: np.random.Generator, **more) -> dict:
    return {"step": step, "samples": 8.0 * step, "loss": float(random.normal()), "workers": 1} | more


@pytest.mark.parametrize("points", [7, 1000])
def test_curves_against_all_rows_at_once(tmp_path, points):
    """With failures that take the run back, values that are not finite, metrics that come late, other workers."""
    random, run = np.random.default_rng(1), Store(str(tmp_path))
    starts = [(1, 60, 2), (41, 90, 3), (90, 95, 3), (71, 130, 1), (131, 131, 1)]
    for number, (first, last, workers) in enumerate(starts):
        rows = [row(step, random, workers=workers) for step in range(first, last + 1)]
        for some in rows[::5]:
            some["late"] = some["step"] * 2.0
        rows[0]["loss"] = math.nan
        write_metrics(run, rows, 10**18 + number)
    found = read_curves(run, points)
    rows, repeated = read_metrics(run)
    assert found.last == 131 == rows[-1]["step"] and found.width == -(-131 // points)
    again = [step for first, last in found.repeated for step in range(first, last + 1)]
    assert again == sorted(set(repeated)) == [*range(41, 61), *range(71, 96)]
    assert found.workers == [(1, 2), (41, 3), (71, 1)]
    assert len(found.steps) == -(-131 // found.width) and found.steps[-1] == 131
    for number, step in enumerate(found.steps):
        inside = [r for r in rows if step - found.width < r["step"] <= step and r["step"] > number * found.width]
        assert found.samples[number] == inside[-1]["samples"]
        for name in ("loss", "late"):
            values = [r[name] for r in inside if name in r and math.isfinite(r[name])]
            got = [curve[name][number] for curve in (found.mean, found.low, found.high)]
            if values:
                np.testing.assert_allclose(got, [np.mean(values), min(values), max(values)])
            else:
                assert np.isnan(got).all()
    assert found.recent["samples"] == np.mean([r["samples"] for r in rows[-100:]])
    assert found.samples_at(0) == 0 and found.samples_at(131) == 8 * 131


def test_steps_above_the_newest_start_do_not_count(tmp_path):
    """A run that went back and has not come so far again."""
    random, run = np.random.default_rng(2), Store(str(tmp_path))
    write_metrics(run, [row(step, random) for step in range(1, 51)], 1)
    newer = [row(step, random) for step in range(21, 31)]
    write_metrics(run, newer, 2)
    found = read_curves(run)
    assert found.last == 30 and found.repeated == [(21, 30)]
    assert found.mean["loss"][20:].tolist() == [r["loss"] for r in newer]


def test_no_metrics(tmp_path):
    found = read_curves(Store(str(tmp_path)))
    assert found.last == 0 and not found.mean and found.samples_at(5) == 0


@pytest.fixture
def run(tmp_path) -> Store:
    """Five of ten steps, and a checkpoint of the fourth."""
    found = Store(str(tmp_path / "some-run"))
    describe(found, SMALL, PAIRS)
    random = np.random.default_rng(3)
    write_metrics(found, [row(step, random, step_s=2.0, data_wait=0.5, itm=0.9) for step in range(1, 6)], 1)
    found.write("checkpoint-00000004/train_state.json", b"{}" * 10)
    found.write("checkpoint-00000004/one/data", b"x" * 80)
    found.write("checkpoint-00000002/one/data", b"x" * 80)  # without its state: none
    return found


def tell(run: Store, *events: tuple[str, str]) -> None:
    lines = [
        {"who": "driver", "time": f"2026-01-02T03:04:{second:02d}.000+00:00", "event": event, "message": message}
        for second, (event, message) in enumerate(events)
    ]
    run.write("events/5-driver.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


def sentences(facts: Facts) -> str:
    return "\n".join(f"{f.level}: {f.sentence} {f.remedy}" for f in findings(facts))


def test_where_the_data_are_is_what_the_start_said(run):
    facts = read_facts(run.uri)
    assert facts.address_of("data") == ""
    facts.events = [
        {"event": "start", "data": "old", "eval_data": ""},
        {"event": "start", "data": "new", "eval_data": ""},
        {"event": "evaluation", "data": "other"},
    ]
    assert facts.address_of("data") == "new" and facts.address_of("eval_data") == ""


def test_states(run):
    tell(run, ("start", "it starts"))
    facts = read_facts(run.uri)
    assert facts.state == "silent" and facts.name == "some-run" and facts.checkpoints == {4: 100}
    assert "bad: Nobody trains the run: it is at step 5 of 10" in sentences(facts)
    assert "goes on from step 4" in sentences(facts)
    holder = Holder("t", "host", "boot", 1, "1", time.time())
    run.write("lease.json", json.dumps(dataclasses.asdict(holder)).encode())
    facts = read_facts(run.uri)
    assert facts.state == "running" and facts.seconds_left == 10.0
    assert "good: The run goes on: step 5 of 10, 10 s left." in sentences(facts)
    run.write("lease.json", json.dumps(dataclasses.asdict(dataclasses.replace(holder, renewed=1.0))).encode())
    assert read_facts(run.uri).state == "silent"
    run.delete("lease.json")
    tell(run, ("start", "it starts"), ("failed", "the shard <x> is gone"))
    assert "bad: The run failed at step 5 of 10: the shard <x> is gone" in sentences(read_facts(run.uri))
    tell(run, ("start", ""), ("failed", "the shard"), ("start", ""), ("stopped", "at a signal"))
    assert "warning: The run was stopped at step 5 of 10: at a signal" in sentences(read_facts(run.uri))
    random = np.random.default_rng(3)
    write_metrics(run, [row(step, random) for step in range(6, 11)], 2)
    run.write("checkpoint-00000010/train_state.json", b"{}")
    assert read_facts(run.uri).state == "finished"


def test_what_is_remarkable(run):
    lines = [{"step": 1 + i % 5, "problem": f"s3://b/{i}: it is {'no image' if i < 7 else 'empty'}"} for i in range(9)]
    run.write("masked/one/00000001-0.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    tell(run, ("start", ""), ("skipped", "the loss is nan"))
    facts = read_facts(run.uri)
    assert {reason: found.count for reason, found in facts.masked.items()} == {"it is no image": 7, "it is empty": 2}
    assert list(facts.masked) == ["it is no image", "it is empty"]
    assert facts.masked["it is no image"].addresses == tuple(f"s3://b/{i}" for i in range(5))
    said = sentences(facts)
    assert "warning: Workers wait for data during 50% of a step. Raise cluster.data_cpus_per_worker" in said
    assert "warning: 9 rows could not be read and were masked, 22.50%." in said
    assert "warning: Steps left out because loss or gradient were not finite: 1." in said
    assert said.index("bad:") < said.index("warning:") < said.index("good:")


def test_a_term_at_chance_is_said(run):
    """What guessing costs is of the batch: 8 rows, then 12."""
    assert [(end, round(chance["itc"], 6)) for end, chance in read_facts(run.uri).chances] == [
        (6, round(math.log(8), 6)), (10, round(math.log(12), 6)),
    ]  # fmt: skip
    config = dataclasses.replace(SMALL, phases=(Phase(40, 8),))
    describe(run, config, PAIRS)
    random = np.random.default_rng(4)
    rows = [row(step, random, itc=math.log(8), itm=0.3, mlm=2.0) for step in range(1, 31)]
    write_metrics(run, rows, 1)
    said = sentences(read_facts(run.uri))
    assert "warning: itc is 2.079, and guessing costs 2.079." in said and "itm is" not in said and "mlm is" not in said


@pytest.mark.parametrize("kinds", [3, 7])
def test_chance_is_that_of_the_data_s_own_classes(tmp_path, kinds):
    """Also where guessing among more would look like learning."""
    run = Store(str(tmp_path / "run"))
    config = override(recipe("classification_tiny"), ["phases=[[40,64]]", "optim.warmup_steps=1"])
    names = tuple(f"class {i}" for i in range(kinds))
    describe(run, config, Schema((Field("image", "image"), Field("label", "label", names))))
    rows = [row(step, np.random.default_rng(1), cross_entropy=math.log(kinds)) for step in range(1, 31)]
    write_metrics(run, rows, 1)
    facts = read_facts(run.uri)
    assert facts.chances == [(40, {"cross_entropy": math.log(kinds)})]
    assert f"cross_entropy is {math.log(kinds):.3f}, and guessing costs" in sentences(facts)
    facts = read_facts(run.uri)
    facts.schema = None  # as of a run of the first version
    assert facts.chances == [(40, {})]


def test_values_that_are_not_finite_are_left_out_of_the_recent_means(tmp_path):
    random, run = np.random.default_rng(1), Store(str(tmp_path))
    rows = [row(step, random) for step in range(1, 11)]
    rows[4]["loss"], rows[5]["only"] = math.nan, math.inf
    write_metrics(run, rows, 1)
    recent = read_curves(run).recent
    assert recent["loss"] == pytest.approx(np.mean([r["loss"] for i, r in enumerate(rows) if i != 4]))
    assert "only" not in recent


def test_masked_rows_may_be_stored_before_the_metrics(tmp_path):
    run = Store(str(tmp_path / "run"))
    describe(run, SMALL, PAIRS)
    run.write("masked/one/00000001-0.jsonl", json.dumps({"step": 1, "problem": "a: b"}).encode())
    assert "1 rows could not be read" in sentences(read_facts(run.uri))


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="no-run"):
        read_facts(str(tmp_path / "no-run"))
    with pytest.raises(UserError, match=r"holds no run: it has no task.json. Name a run, STORAGE/NAME"):
        read_facts(str(tmp_path))


def test_durations():
    assert [duration(s) for s in (0, 89, 91, 3600, 3660, 5400, 86_400, 90_000)] == [
        "0 s", "89 s", "2 min", "1 h", "1 h 1 min", "1 h 30 min", "1 d", "1 d 1 h",
    ]  # fmt: skip
