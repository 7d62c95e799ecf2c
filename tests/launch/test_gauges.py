"""Ray's metrics of a run: what Prometheus would read, and that dashboard and alerts ask for what is there."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
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


def every_expression_has_a_series(url: str, folder: Path) -> None:
    """A real Prometheus scrapes `url` and answers every expression; alerts without their thresholds."""
    job = {"job_name": "ray", "static_configs": [{"targets": [urllib.parse.urlparse(url).netloc]}]}
    config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": [job]}
    config["rule_files"] = [str(MONITORING / "alerts.yaml")]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
    command.append(f"--web.listen-address=127.0.0.1:{port}")
    silent = ("label_values", " == 0 ", " 0.5 * ")  # a variable, and alerts that a run which is well never raises
    asked = [expr for expr in expressions() if not any(words in expr for words in silent)]
    missing = [re.sub(r" [<>] [\d.]+$", "", expr.replace("$run", ".*")) for expr in asked]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 40
        while missing and time.monotonic() < until:
            time.sleep(1)
            missing = [expr for expr in missing if not answers(port, expr)]
    finally:
        process.terminate()
        process.wait(20)
    assert not missing


def answers(port: int, expr: str) -> bool:
    query = urllib.parse.urlencode({"query": expr})
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}", timeout=5) as answer:
            return bool(json.loads(answer.read())["data"]["result"])
    except urllib.error.URLError:
        return False  # it is starting


@pytest.mark.ray
@pytest.mark.slow
def test_a_scrape_has_the_figures_by_run(ray_cluster, tmp_path):
    import ray
    from prometheus_client.parser import text_string_to_metric_families

    figures = {key: 1.0 + i for i, key in enumerate([*GAUGES, *COUNTERS])} | {"itc": 7.5, "bad": float("nan")}

    @ray.remote(num_cpus=0)
    def report() -> None:
        from vlmo_ray.launch.gauges import Gauges

        gauges = Gauges("one-run")
        for _ in range(2):
            gauges(figures, ("itc", "absent", "bad"))
        time.sleep(60)  # Ray reports every ten seconds, while the process lives

    running = report.remote()
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    until, found = time.monotonic() + 40, {}
    while len(found) < len(NAMES) and time.monotonic() < until:
        time.sleep(1)
        with urllib.request.urlopen(url, timeout=20) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        samples = [sample for family in families for sample in family.samples if sample.labels.get("run") == "one-run"]
        found = {sample.name: sample for sample in samples}
    if shutil.which("prometheus"):
        every_expression_has_a_series(url, tmp_path)
    ray.cancel(running, force=True)
    assert found.keys() == NAMES
    terms = {sample.labels["term"] for sample in samples if sample.name == "ray_vlmo_term"}
    assert terms == {"itc"}  # what is absent or not a number is left out
    assert found["ray_vlmo_loss"].value == figures["loss"]
    assert found["ray_vlmo_masked_rows_total"].value == 2 * figures["masked_rows"]
    assert found["ray_vlmo_term"].value == 7.5
