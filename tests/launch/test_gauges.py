"""Ray's metrics of a run: what Prometheus would read, and that dashboard and alerts ask for what is there."""

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from vlmo_ray.launch.gauges import COUNTERS, GAUGES, TERM

MONITORING = Path(__file__).parents[2] / "cluster" / "monitoring"
NAMES = {f"ray_{name}" for name, _ in [*GAUGES.values(), TERM]} | {f"ray_{name}_total" for name, _ in COUNTERS.values()}


def expressions() -> list[str]:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"][0]["rules"]
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [one["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    return [*panels, *variables, *(rule["expr"] for rule in rules)]


def test_dashboard_and_alerts_ask_for_what_there_is_and_for_all_of_it():
    asked = {name for expr in expressions() for name in re.findall(r"ray_\w+", expr)}
    assert asked == NAMES
    for expr in expressions():  # a new worker process is a new series
        assert re.match(r"(max|sum) by \(run(, term)?\) \(|label_values", expr), expr
        assert expr.count("(") == expr.count(")")


def test_every_alert_says_what_to_do():
    for rule in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"][0]["rules"]:
        assert rule["annotations"]["action"] and rule["labels"]["severity"] in ("page", "ticket")
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == len({panel["title"] for panel in dashboard["panels"]})


@pytest.mark.ray
@pytest.mark.slow
def test_a_scrape_has_the_figures_by_run(ray_cluster):
    import ray
    from prometheus_client.parser import text_string_to_metric_families

    figures = {key: 1.0 + i for i, key in enumerate([*GAUGES, *COUNTERS])} | {"itc": 7.5, "mfu": float("nan")}

    @ray.remote(num_cpus=0)
    def report() -> None:
        from vlmo_ray.launch.gauges import Gauges

        gauges = Gauges("one-run")
        for _ in range(2):
            gauges(figures, ("itc", "absent"))
        time.sleep(25)  # Ray reports every ten seconds, while the process lives

    running = report.remote()
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    until, found = time.monotonic() + 40, {}
    while len(found) < len(NAMES) - 1 and time.monotonic() < until:
        time.sleep(1)
        with urllib.request.urlopen(url, timeout=20) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        samples = [sample for family in families for sample in family.samples if sample.labels.get("run") == "one-run"]
        found = {sample.name: sample for sample in samples}
    ray.cancel(running, force=True)
    assert found.keys() == NAMES - {"ray_vlmo_mfu"}  # what is not a number is left out
    assert found["ray_vlmo_loss"].value == figures["loss"]
    assert found["ray_vlmo_masked_rows_total"].value == 2 * figures["masked_rows"]
    assert found["ray_vlmo_term"].labels["term"] == "itc" and found["ray_vlmo_term"].value == 7.5
