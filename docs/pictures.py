"""Makes the pictures of the documentation, from a run on scenes that is killed, resized and has unreadable records.

    python docs/pictures.py [--steps 300] [--out docs/pictures]

Needs Chromium for the pages; without it only the console is drawn. The run takes some minutes on a CPU: it begins in
one process, and `vlmo train` goes on with it on a terminal.
"""

from __future__ import annotations

import io
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
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
from terminal import screen

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


def settings(steps: int) -> list[str]:
    """Those of the run, on top of the demo's."""
    every = max(2, steps // 6)
    return [f"phases=[[{steps},96]]", f"optim.warmup_steps={min(30, steps // 4)}", f"checkpoint_every={every}",
            f"evaluate_every={2 * every}", "audit=true", "name=pictures"]  # fmt: skip


def config_of(steps: int) -> Config:
    return override(recipe("demo"), settings(steps))


def disturbed_run(folder: Path, steps: int) -> list[str]:
    """In `folder`, a run on one worker that is killed after its second checkpoint; then on two, by a command.

    Gives the last lines of a terminal of 80 columns at two thirds of the run.
    """
    config = config_of(steps)
    data, unseen, run = str(folder / "scenes"), str(folder / "unseen"), str(folder / "runs" / "pictures")
    scenes = list(records(1, 96 * steps // 2 + 400, image_size=config.model.image_size))
    for broken in (7, 300):
        scenes[broken]["image"] = b"no image"
    write_dataset(data, scenes)
    write_dataset(unseen, declared(retrieval_records(1, 200, image_size=config.model.image_size)))
    spec = RunSpec(config, data, run, load_manifest(data).fingerprint, unseen, in_process_data=True)
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import pictures as p; "
    code += "from vlmo_ray.train.loop import train; "
    given = f"p.config_of({steps}), {data!r}, {run!r}, {spec.fingerprint!r}, {unseen!r}, in_process_data=True"
    code += f"train(p.RunSpec({given}))"
    first = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    store = Store(run)
    while not _beyond(store, at_least=2 if steps < 60 else 40):
        assert first.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    command = ["train", "demo", "--data", "scenes", "--eval-data", "unseen", "--storage", "runs"]
    seen = on_terminal(command + [word for setting in settings(steps) for word in ("--set", setting)], folder)
    reached = next(found for found in re.finditer(r"step (\d+)/", seen) if int(found[1]) >= 2 * steps / 3)
    drawn = seen[: seen.index("\r\x1b[2K", reached.end())]  # where it is erased, to be drawn again
    return [f"$ vlmo {shlex.join(command)} --set ...", *screen(drawn)[-16:]]


def on_terminal(command: list[str], folder: Path) -> str:
    """All that `vlmo` writes to a terminal of 80 columns; it must succeed."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (40, 80))
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    running = subprocess.Popen(
        [sys.executable, "-m", "vlmo_ray", *command], stdin=slave, stdout=slave, stderr=slave, env=environment,
        cwd=folder,
    )  # fmt: skip
    os.close(slave)
    written = b""
    with open(master, "rb", buffering=0) as terminal:
        try:
            while some := terminal.read(65_536):
                written += some
        except OSError:  # on Linux, that nobody has the other end any more
            pass
    assert running.wait() == 0, written[-3000:].decode(errors="replace")
    return written.decode()


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


def console(first: list[str], commands: list[list[str]], target: Path, folder: Path) -> None:
    """The lines, and what the commands print, as an SVG."""
    shown = Console(width=80, record=True, file=io.StringIO())
    shown.print(Text(first[0], "bold"), Text("\n".join(["", *first[1:], ""])))
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
        during = disturbed_run(folder, steps)
        run, unseen, index = (str(folder / name) for name in ("runs/pictures", "unseen", "index"))
        embed_here(run, unseen, index, "image")
        console(during, [["runs", "runs"], ["search", "index", QUESTION, "--top", "3"]], target / "console.svg", folder)
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
