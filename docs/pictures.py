"""Makes the pictures of the documentation, from a run on scenes that is killed, resized and has unreadable records.

    python docs/pictures.py [--steps 300] [--out docs/pictures]

Needs Chromium for the pages; without it only the console is drawn. The run takes some minutes on a CPU.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import tyro
from PIL import Image
from rich.console import Console
from rich.text import Text

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from search_place import embed_here
from small_run import train_on

from vlmo_ray.config import Config
from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.store import Store
from vlmo_ray.demo.scenes.records import declared, records, retrieval_records
from vlmo_ray.overrides import override
from vlmo_ray.recipes import recipe
from vlmo_ray.report.page import report
from vlmo_ray.runs.checkpoints import stored_checkpoints
from vlmo_ray.runs.metrics import last_step
from vlmo_ray.search.serve import Search
from vlmo_ray.train.build import RunSpec

HERE = Path(__file__).parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUESTION = "a red star on a blue background"


def config_of(steps: int) -> Config:
    """The demo's, with evaluations."""
    every = max(2, steps // 6)
    warmup = min(30, steps // 4)
    return override(
        recipe("demo"),
        [f"phases=[[{steps},96]]", f"optim.warmup_steps={warmup}", f"checkpoint_every={every}", "audit=true",
         f"evaluate_every={2 * every}", "name=pictures"],
    )  # fmt: skip


def disturbed_run(folder: Path, steps: int) -> tuple[str, str]:
    """(run, data to evaluate on): one worker, killed after its second checkpoint; then two."""
    config = config_of(steps)
    data, unseen, run = str(folder / "scenes"), str(folder / "unseen"), str(folder / "runs" / "pictures")
    scenes = list(records(1, 96 * steps // 2 + 400, image_size=config.model.image_size))
    for broken in (7, 300):
        scenes[broken]["image"] = b"no image"
    write_dataset(data, scenes)
    write_dataset(unseen, declared(retrieval_records(1, 200, image_size=config.model.image_size)))
    spec = RunSpec(config, data, run, load_manifest(data).fingerprint, unseen, in_process_data=True)
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import pictures as p; "
    given = f"p.config_of({steps}), {data!r}, {run!r}, {spec.fingerprint!r}, {unseen!r}, in_process_data=True"
    code += f"p.train_on(1, p.RunSpec({given}))"
    first = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    store = Store(run)
    while not _beyond(store, at_least=2 if steps < 60 else 40):
        assert first.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert {outcome.step for outcome in train_on(2, spec)} == {steps}
    return run, unseen


def _beyond(run: Store, at_least: int) -> bool:
    """Whether a run has a checkpoint of that step or later; of a long one, also figures of steps that will be lost."""
    newest = max(stored_checkpoints(run), default=0)
    return newest >= at_least and (at_least < 40 or last_step(run) > newest + 4)


def photograph(address: str, target: Path, height: int) -> None:
    """A screenshot of a page, with few colours, which is enough for pages and a third of the size."""
    with tempfile.TemporaryDirectory() as profile:
        shot = Path(profile, "shot.png")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                   "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}/profile",
                   "--hide-scrollbars", f"--window-size=1200,{height}", "--virtual-time-budget=8000"]  # fmt: skip
        command = [str(CHROMIUM), *options, f"--screenshot={shot}", address]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with Image.open(shot) as picture:
            picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)


def search_page(index: str) -> ThreadingHTTPServer:
    """The page of `vlmo search --serve`, without Ray."""
    search = Search(index)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            status, kind, content, headers = search.answer("GET", asked.path, dict(parse_qsl(asked.query)), b"")
            self.send_response(status)
            for name, value in ({"Content-Type": kind} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def console(commands: list[list[str]], target: Path, folder: Path) -> None:
    """What commands print, as an SVG."""
    shown = Console(width=80, record=True, file=io.StringIO())
    environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": "80"}
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "vlmo_ray", *command], capture_output=True, text=True, env=environment, cwd=folder
        )
        shown.print(Text("$ vlmo " + " ".join(word if " " not in word else f'"{word}"' for word in command), "bold"))
        shown.print(Text.from_ansi(done.stdout))
    shown.save_svg(str(target), title="vlmo")


def main(steps: int = 300, out: str = str(HERE / "pictures")) -> None:
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run, unseen = disturbed_run(folder, steps)
        index = str(folder / "index")
        embed_here(run, unseen, index, "image")
        console([["runs", "runs"], ["search", "index", QUESTION, "--top", "3"]], target / "console.svg", folder)
        if not CHROMIUM:
            print("there is no Chromium: only the console is drawn")
            return
        page = report([run], str(folder / "report.html"), unseen)
        photograph(f"file://{page}", target / "report.png", 1500)
        alone = "<style>section:not(#gallery), header { display: none }</style></body>"
        (folder / "gallery.html").write_text(Path(page).read_text().replace("</body>", alone))
        photograph(f"file://{folder}/gallery.html", target / "report_pictures.png", 1500)
        server = search_page(index)
        address = f"http://127.0.0.1:{server.server_address[1]}/?q={QUESTION.replace(' ', '%20')}"
        photograph(address, target / "search.png", 800)
        server.shutdown()


if __name__ == "__main__":
    tyro.cli(main)
