"""The page: of a run with faults and pictures, of several runs, and of a very long one."""

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import small_scenes
from small_run import SMALL, job, train_on

from vlmo_ray.config import Phase
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.schema import PAIRS
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.report.facts import read_facts
from vlmo_ray.report.page import report
from vlmo_ray.report.plots import always_zero
from vlmo_ray.runs.load import describe
from vlmo_ray.train.loop import train

VOID = {"meta", "img", "br", "link", "input", "hr"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Page(html.parser.HTMLParser):
    """Text, pictures and addresses of a page whose elements all close."""

    def __init__(self, file: Path):
        super().__init__()
        self.open: list[str] = []
        self.text, self.links, self.ids, self.sources = "", [], set(), []
        self.source = file.read_text()
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.links += [found["href"]] if "href" in found else []
        self.sources += [found["src"]] if "src" in found else []
        self.ids |= {found["id"]} if "id" in found else set()
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += f"{data} "


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Of 60 pairs, two cannot be decoded; one caption would be markup."""
    folder = str(tmp_path_factory.mktemp("page") / "data")
    rows = list(small_scenes(4, 60))
    rows[7]["image"] = rows[40]["image"] = b"no image at all"
    rows[3]["text"] = "<b> & <i>"
    write_dataset(folder, rows, rows_per_group=7, groups_per_shard=3)
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> str:
    """Six steps on one worker, of which the last two are lost; the rest on two workers."""
    where = tmp_path_factory.mktemp("page") / "run"
    config = dataclasses.replace(SMALL, audit=True, evaluate_every=5, keep_checkpoints=9)
    spec = dataclasses.replace(job(data, where, config), eval_data=data)
    assert train(spec).step == 10
    shutil.rmtree(where / "model")
    for checkpoint in ("05", "08", "10"):
        shutil.rmtree(where / f"checkpoint-000000{checkpoint}")
    for file in (where / "metrics").iterdir():
        rows = [line for line in file.read_text().splitlines() if json.loads(line)["step"] <= 6]
        file.write_text("".join(f"{line}\n" for line in rows))
    assert [outcome.step for outcome in train_on(2, spec)] == [10, 10]
    return str(where)


def test_of_a_run_with_faults(run, data, tmp_path):
    told = {
        "who": "driver",
        "time": "2026-01-02T03:04:05.000+00:00",
        "event": "retry",
        "message": "<b>bold</b></script>",
    }
    Path(run, "events", "1-driver.jsonl").write_text(json.dumps(told) + "\n")
    where = report([run], str(tmp_path / "page.html"), data, rows=20)
    page = Page(Path(where))
    text = " ".join(page.text.split())
    assert "The run is finished: all 10 steps are done." in text
    assert "Steps that were done twice: 2, 20% of all." in text and "none of the" not in text
    assert "rows could not be read and were masked" in text and "not an image in a known format" in text
    assert {link[1:] for link in page.links} <= page.ids  # and nothing leads out of the page
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources) and len(page.sources) > 20
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=[\"']https?:", page.source)
    assert "&lt;b&gt;bold&lt;/b&gt;" in page.source and "<b>bold" not in page.source
    assert "text_retrieval_r@1, step 10" in text
    assert "Other than the recipe" not in text  # there is no recipe "small"
    plotted = re.findall(r'"text":"([\w@]+)(?:: [^"]*)?"', page.source)
    assert {"loss", "itc", "itc_vl", "itm", "mlm", "negative_similarity", "lr", "text_retrieval_r@1"} <= set(plotted)
    assert Counter(plotted)["loss"] == 1
    # what was repeated, and where the workers changed, in the figure of each metric
    facts = read_facts(run)
    figures = len(facts.curves.mean) - len(always_zero([facts]))
    assert marks(page) == (figures, figures) and figures > 10


def marks(page: Page) -> tuple[int, int]:
    """How many spans of steps are marked as done twice, and how many changes of the number of workers."""
    return page.source.count('"fill_color":"#f28e2b"'), page.source.count('"line_dash":[2,4]')


def test_of_several_runs(run, data, tmp_path):
    config = dataclasses.replace(SMALL, seed=5)
    assert train(job(data, tmp_path / "again", config)).step == 10
    page = Page(Path(report([run, str(tmp_path / "again")], str(tmp_path / "page.html"), pictures=False)))
    text = " ".join(page.text.split())
    assert marks(Page(Path(report([str(tmp_path / "again")], pictures=False)))) == (0, 0)
    assert "Settings that differ" in text and "seed 1 5" in text and "audit true false" in text
    assert "There are none: they were left out (--no-pictures)." in text
    with pytest.raises(UserError, match="is named twice"):
        report([run, run], str(tmp_path / "page.html"))


def test_without_data_or_pictures_it_says_why(run, tmp_path):
    text = Page(Path(report([run], str(tmp_path / "page.html")))).text
    assert "There are none: they need data: vlmo report RUN --data PAIRS." in text
    assert report([run], pictures=False) == f"{run}/report.html" and Path(run, "report.html").stat().st_size < 6e6


def test_of_a_run_that_has_just_begun(tmp_path):
    run = Store(str(tmp_path / "run"))
    describe(run, SMALL, PAIRS)
    text = " ".join(Page(Path(report([run.uri], data=str(tmp_path)))).text.split())
    assert "No step is done yet." in text and "There are none: the run has no checkpoint yet." in text
    assert "Nobody trains the run: it is at step 0 of 10" in text
    with pytest.raises(UserError, match="name a run: vlmo report RUN"):
        report([])


def test_data_that_are_gone_leave_out_the_pictures_alone(run, data, tmp_path):
    start = {"who": "driver", "time": "2026-01-02T03:04:04.000+00:00", "event": "start", "message": ""}
    start |= {"data": data, "eval_data": str(tmp_path / "gone")}
    file = Path(run, "events", "0-driver.jsonl")
    file.write_text(json.dumps(start) + "\n")
    text = " ".join(Page(Path(report([run], str(tmp_path / "page.html")))).text.split())
    assert "There are none: " in text and "gone" in text and "name other data by --data" in text
    assert "10 committed steps: every pair was consumed once an epoch" in text  # the audit knows the data
    with pytest.raises(UserError, match="gone"):
        report([run], str(tmp_path / "page.html"), str(tmp_path / "gone"))
    with pytest.raises(UserError, match="--rows 0 must be at least 1"):
        report([run], str(tmp_path / "page.html"), data, rows=0)
    file.unlink()


def test_metrics_without_a_finite_value_are_not_called_zero(tmp_path):
    run = Store(str(tmp_path / "run"))
    describe(run, SMALL, PAIRS)
    rows = [
        {"step": s, "samples": 8.0 * s, "workers": 1, "loss": float("nan"), "skipped": 1.0, "lr": 0} for s in (1, 2)
    ]
    run.write("metrics/1.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    page = Page(Path(report([run.uri], pictures=False)))
    assert "0 in every step: lr." in " ".join(page.text.split()) and "NaN" not in page.text


@pytest.fixture(params=[20_000, pytest.param(1_000_000, marks=pytest.mark.full)])
def long_run(request, tmp_path) -> Store:
    """All metrics of pre-training, in segments as a run writes them."""
    steps, run, random = request.param, Store(str(tmp_path / "run")), np.random.default_rng(0)
    describe(run, dataclasses.replace(SMALL, phases=(Phase(steps, 8),)), PAIRS)
    names = ("loss", "itc", "itc_vl", "itm", "mlm", "itm_accuracy", "mlm_accuracy", "temperature", "temperature_vl",
             "negative_similarity", "same_share", "lr", "grad_norm", "masked_rows", "skipped", "samples_per_s",
             "data_wait", "step_s", "exchanged_bytes", "pairs_without_negative", "mfu")  # fmt: skip
    for first in range(1, steps + 1, 500):
        values = random.normal(size=(500, len(names))).tolist()
        rows = [dict(zip(names, row, strict=True), step=first + i, samples=8.0 * (first + i), workers=first // 5000 % 3)
                for i, row in enumerate(values)]  # fmt: skip
        run.write(f"metrics/{10**18 + first}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return run


@pytest.mark.timeout(900)
def test_a_long_run_stays_small(long_run, tmp_path):
    where = report([long_run.uri], str(tmp_path / "page.html"), pictures=False)
    assert Path(where).stat().st_size < 4e6  # pictures come on top: some 1.5 MB
    points = re.findall(r'"samples",(\{"type":"ndarray".*?"shape":\[(\d+)\])', Page(Path(where)).source)
    assert 750 < int(points[0][1]) <= 1500
    if CHROMIUM:
        assert is_drawn(Path(where), tmp_path)


def is_drawn(page: Path, folder: Path) -> bool:
    """Whether a browser draws all figures of a page, without a complaint."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}",
               "--enable-logging=stderr", "--virtual-time-budget=5000", "--window-size=1280,4000"]  # fmt: skip
    command = [CHROMIUM, *options, "--dump-dom", f"file://{page}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert not [line for line in said if "INFO:CONSOLE" not in line], said
    return any("document idle" in line for line in said)  # Bokeh says so when everything is drawn


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")
def test_a_browser_draws_it(run, data, tmp_path):
    assert is_drawn(Path(report([run], str(tmp_path / "page.html"), data, rows=20)), tmp_path)
