"""Search spaces as text, and the record of a sweep."""

import dataclasses

import optuna
import pytest

from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.launch import tune as tuning
from vlmo_ray.launch.resources import Node
from vlmo_ray.launch.space import Choice, Range, grid, parse_space, settings_of
from vlmo_ray.launch.sweep import Asked, Sweep, Trial, best_settings, read_sweep
from vlmo_ray.overrides import override
from vlmo_ray.recipes import RECIPES, recipe

TINY = recipe("tiny")


def test_ranges_choices_and_whole_numbers():
    texts = ["optim.peak_lr=log:1e-5..1e-3", "model.drop_path = 0.1, 0.2", "optim.warmup_steps=2..9", "seed=log:1..64"]
    space = parse_space(TINY, [*texts, "phases=[[40,32]]|[[50,32]]", "optim.weight_decay=0..1"])
    assert space == {
        "optim.peak_lr": Range(1e-5, 1e-3, log=True, whole=False),
        "model.drop_path": Choice(("0.1", "0.2")),
        "optim.warmup_steps": Range(2, 9, log=False, whole=True),
        "seed": Range(1, 64, log=True, whole=True),
        "phases": Choice(("[[40,32]]", "[[50,32]]")),
        "optim.weight_decay": Range(0, 1, log=False, whole=False),
    }
    assert grid(space) == []
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(20):
        trial = study.ask()
        params = {path: values.draw(trial, path) for path, values in space.items()}
        config = override(TINY, settings_of(params))  # whatever is drawn fits, and arrives as it was drawn
        assert config.optim.peak_lr == params["optim.peak_lr"] and 1e-5 <= config.optim.peak_lr <= 1e-3
        assert config.seed == params["seed"] and config.total_steps in (40, 50)


def test_choices_alone_make_a_grid():
    space = parse_space(TINY, ["optim.peak_lr=5e-5,1e-4", "seed=1,2,3"])
    assert len(grid(space)) == 6
    assert grid(space)[1] == {"optim.peak_lr": "5e-5", "seed": "2"}


@pytest.mark.parametrize(
    "text, words",
    [
        ("optim.peak_rl=1e-4,1e-3", "did you mean 'peak_lr'"),
        ("optim=1,2", "'optim' is a section"),
        ("optim.peak_lr", "is no search space"),
        ("optim.peak_lr=", "is no search space"),
        ("optim.peak_lr=log:0..1", "above 0"),
        ("optim.peak_lr=1e-3..1e-5", "LOW < HIGH"),
        ("optim.peak_lr=lin:1e-5..1e-3", "write log:LOW..HIGH"),
        ("optim.peak_lr=1e-5..", "the ends of a range are numbers"),
        ("optim.peak_lr=1e-3,1e-3", "a value twice"),
        ("optim.peak_lr=1e-4..high", "the ends of a range are numbers"),
        ("optim.warmup_steps=0.5..3", "is not of the kind int"),
        ("model.drop_path=0.1,high", "is not of the kind float"),
        ("optim.warmup_steps=1..100000", "leaves nothing of the 60 steps"),
        ("task.kind=vqa,nlvr2", "choose a recipe"),
    ],
)
def test_what_cannot_be_searched_is_refused_by_name(text, words):
    with pytest.raises(UserError, match=words):
        parse_space(TINY, [text])


def test_a_field_with_two_spaces_is_refused():
    with pytest.raises(UserError, match=r"optim\.peak_lr has two search spaces"):
        parse_space(TINY, ["optim.peak_lr=1e-4,1e-3", "optim.peak_lr=2e-4,3e-4"])


def test_paths_are_no_ranges():
    assert parse_space(TINY, ["init=../a,../b"]) == {"init": Choice(("../a", "../b"))}


@pytest.mark.parametrize(
    "metric, better", [("", "max"), ("loss", "min"), ("masked_word_loss", "min"), ("accuracy", "max")]
)
def test_what_is_better_of_a_metric(metric, better):
    assert tuning._direction(metric) == better


@pytest.mark.parametrize("metric", ["cross_entropy", "mim", "top1"])
def test_where_its_name_does_not_say_it_a_metric_needs_a_mode(metric):
    with pytest.raises(UserError, match=f"a lower or a higher '{metric}' is better: --mode min or --mode max"):
        tuning._direction(metric)


def test_the_best_trial_is_a_number(tmp_path):
    """Records of before may hold others."""
    values = (float("nan"), 2.0, float("-inf"), 1.0, None)
    for mode, best in (("min", "3"), ("max", "1")):
        asked = Asked("tiny", [], [], "", "", "loss", mode, True, 0)
        trials = [Trial(str(i), {}, "finished", 5, value) for i, value in enumerate(values)]
        assert Sweep(Store(str(tmp_path)), asked, trials).best.name == best
        assert Sweep(Store(str(tmp_path)), asked, trials[:1]).best is None


def test_nothing_to_search_is_refused():
    with pytest.raises(UserError, match="give --space"):
        parse_space(TINY, [])


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_declares_can_be_searched(name):
    config = recipe(name)
    assert not config.search or parse_space(config, config.search)


ASKED = Asked("tiny", ["seed=3"], ["optim.peak_lr=1e-4,1e-3"], "data", "", "loss", "min", True, 0)


def test_a_record_is_read_as_it_was_written_and_of_nothing_else(tmp_path):
    store = Store(str(tmp_path))
    sweep = Sweep.open(store, ASKED)
    for rate, state, metric in (("1e-4", "finished", 3.0), ("1e-3", "finished", 2.5), ("1e-2", "pruned", 1.0)):
        trial = sweep.draw({"optim.peak_lr": rate, "init": "s3://bucket/a run"})
        assert read_sweep(store).trials[-1].state == "running"  # noted before it begins
        trial.state, trial.metric = state, metric
    assert sweep.trials[0].name == "000-peak_lr=1e-4-init=s3___bucket_a_run"
    sweep.save()
    again = Sweep.open(store, ASKED)
    assert again.trials == sweep.trials and again.best.params["optim.peak_lr"] == "1e-3"
    assert best_settings(str(tmp_path), TINY) == ["seed=3", "optim.peak_lr=1e-3", "init=s3://bucket/a run"]
    with pytest.raises(UserError, match=r"another --name\. .*seed: 0 -> 1"):
        Sweep.open(store, dataclasses.replace(ASKED, seed=1))
    with pytest.raises(UserError, match="is a sweep of tiny, not of vqa_tiny"):
        best_settings(str(tmp_path), recipe("vqa_tiny"))


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"version": 1}', b'{"version": 2}'])
def test_a_record_that_cannot_be_read_is_named(tmp_path, content):
    store = Store(str(tmp_path))
    store.write("sweep.json", content)
    with pytest.raises(UserError, match=r"sweep\.json"):
        Sweep.open(store, ASKED)


def test_a_sweep_that_is_another_drivers_is_not_written(tmp_path):
    store = Store(str(tmp_path))
    sweep = Sweep.open(store, ASKED)
    sweep.draw({"seed": 1})
    written = store.read("sweep.json")
    sweep.lose("taken over by process 7 on elsewhere")
    with pytest.raises(UserError, match="taken over by process 7"):
        sweep.draw({"seed": 2})
    assert store.read("sweep.json") == written and sweep.leaving


def test_more_trials_at_once_than_have_room_are_refused(monkeypatch):
    """Of workers of 1 CPU and 1 for data, 6 CPUs hold three; on CPUs each takes less if needed, but not nothing."""
    monkeypatch.setattr(tuning, "infeasible_groups", lambda: None)
    monkeypatch.setattr(tuning, "living_nodes", lambda: [Node(6, 3)])
    cluster = dataclasses.replace(TINY.cluster, min_workers=1, max_workers=3, gpus_per_worker=1, data_cpus_per_worker=1)
    config = dataclasses.replace(TINY, cluster=cluster)
    assert tuning._fitting(config, 1).cluster.max_workers == 3
    assert tuning._fitting(config, 3).cluster.max_workers == 1  # side by side
    with pytest.raises(UserError, match=r"4 trials at once have no room: 4 workers with 1 GPU each are more than"):
        tuning._fitting(config, 4)
    monkeypatch.setattr(tuning, "infeasible_groups", set)  # an autoscaler adds nodes
    assert tuning._fitting(config, 4) == config


def test_no_sweep_and_no_finished_trial_are_sentences(tmp_path):
    with pytest.raises(UserError, match="holds no sweep"):
        best_settings(str(tmp_path), TINY)
    Sweep(Store(str(tmp_path)), ASKED).draw({"seed": 1})
    with pytest.raises(UserError, match="no trial of the sweep"):
        best_settings(str(tmp_path), TINY)
