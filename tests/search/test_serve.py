"""The search page: its answers, and the page itself on Ray Serve, in a browser if there is one."""

import asyncio
import json
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request

import pytest
from browser import CHROMIUM, OPTIONS, opened
from search_place import make_place

from vlmo_ray.errors import UserError
from vlmo_ray.search.index import Index, Queries
from vlmo_ray.search.serve import COOKIE, Search, serve


@pytest.fixture(scope="module")
def place(scenes, tmp_path_factory) -> dict[str, str]:
    return make_place(scenes, tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def page(place) -> Search:
    return Search(place["image"])


def answer(page: Search, path: str, body: bytes = b"", method: str = "GET", token: str = "", **asked: str):
    status, kind, content, headers = page.answer(method, path, asked, body, token)
    return status, json.loads(content) if kind == "application/json" else content, headers


def test_texts_and_pictures_find_what_the_index_finds(page, place):
    index = Index(place["image"])
    wanted = index.search(Queries(index).text("a b c"), 5)[0]
    status, found, _ = answer(page, "/search", q="a b c", top="5")
    assert status == 200 and [one["id"] for one in found["results"]] == [one.id for one in wanted]
    assert [one["score"] for one in found["results"]] == pytest.approx([one.score for one in wanted])
    record = index.record(wanted[2])
    assert found["results"][2]["text"] == record.values["text"]
    status, again, _ = answer(page, "/search", record.values["image"], "POST", top="3")
    assert status == 200 and again["results"][0]["id"] == record.id and again["results"][0]["score"] > 0.999
    where = dict(urllib.parse.parse_qsl(again["results"][0]["image"].partition("?")[2]))
    status, picture, headers = answer(page, "/image", **where)
    assert status == 200 and picture[:3] == b"\xff\xd8\xff" and "private" in headers["Cache-Control"]
    assert answer(page, "/about")[1] == {"data": place["data"], "what": "image", "rows": 60}


def test_what_is_refused(page):
    for path, body, method, asked, status, words in (
        ("/search", b"%PDF-1.7 no image", "POST", {}, 400, "the query cannot be used: not an image"),
        ("/search", b"", "POST", {}, 400, "the query cannot be used"),
        ("/search", b"x" * (20 << 20) + b"x", "POST", {}, 413, "larger than 20 MB"),
        ("/search", b"", "GET", {"q": "  "}, 400, "the query cannot be used"),
        ("/search", b"", "GET", {"q": "a", "top": "0"}, 400, "top=0 must be from 1 to 200"),
        ("/search", b"", "GET", {"q": "a", "top": "-1"}, 400, "top=-1"),
        ("/image", b"", "GET", {"chunk": "../../etc/passwd", "row": "1"}, 400, "named by its chunk and its row"),
        ("/image", b"", "GET", {"chunk": "9" * 5000, "row": "1"}, 400, "named by its chunk and its row"),
        ("/search", b"", "GET", {"q": "a", "top": "9" * 5000}, 400, "must be from 1 to 200"),
        ("/image", b"", "GET", {"chunk": "0", "row": "99"}, 404, "no such image"),
        ("/image", b"", "GET", {"chunk": "99", "row": "0"}, 404, "no such image"),
        ("/other", b"", "GET", {}, 404, "there is no GET /other"),
        ("/search", b"", "DELETE", {}, 404, "there is no DELETE /search"),
    ):
        found = answer(page, path, body, method, **asked)
        assert found[0] == status and words in found[1]["problem"], found


def test_a_token(place):
    page = Search(place["image"], token="secret")
    for path in ("/", "/search", "/image", "/about"):
        assert answer(page, path, q="a")[0] == answer(page, path, q="a", token="wrong")[0] == 401
    status, _, _, headers = page.answer("GET", "/", {"token": "secret"}, b"")
    assert status == 200
    assert headers["Set-Cookie"].startswith(f"{COOKIE}={page.cookie}; HttpOnly") and "secret" not in page.cookie
    for token in ("secret", page.cookie):  # as a bearer, as a cookie
        assert answer(page, "/search", q="a", token=token)[0] == 200
    assert page.answer("GET", "/", {"token": "wrong"}, b"", "secret")[0] == 401
    with pytest.raises(UserError, match="lets other machines in: set VLMO_SEARCH_TOKEN"):
        serve(place["image"], host="0.0.0.0")


def fetch(address: str, body: bytes | None = None) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body), timeout=30) as got:
            return got.status, got.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_serve(ray_cluster, place, tmp_path):
    from ray import serve as ray_serve

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    try:
        address = serve(place["image"], port=port)
        status, page = fetch(address)
        assert status == 200 and b"<form" in page
        status, found = fetch(f"{address}search?q=a%20b&top=4")
        assert status == 200 and len(json.loads(found)["results"]) == 4
        index = Index(place["image"])
        record = index.record(index.search(Queries(index).text("a b"), 1)[0][0])
        status, found = fetch(f"{address}search?top=1", record.values["image"])
        assert status == 200 and json.loads(found)["results"][0]["id"] == record.id
        assert fetch(f"{address}search", b"no image")[0] == 400
        assert fetch(f"{address}search", b"x" * (21 << 20))[0] == 413
        if CHROMIUM:
            shown = dom(f"{address}?q=a%20b", tmp_path)
            assert shown.count("<figure") == 24 and "24 results in" in shown and 'src="/image?chunk=' in shown
            shown = dom(f"{address}?q=%20", tmp_path)
            assert shown.count("<figure") == 0 and "the query cannot be used" in shown
            asyncio.run(by_keys_alone(address, tmp_path / "keys"))
    finally:
        ray_serve.shutdown()


def dom(address: str, folder) -> str:
    """The page after its scripts have run, in a browser that may not complain."""
    options = [*OPTIONS, f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
               "--virtual-time-budget=10000"]  # fmt: skip
    command = [CHROMIUM, *options, "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line and "status of 400" not in line]
    assert not said, said
    return done.stdout


async def by_keys_alone(address: str, profile) -> None:
    """Type, search, walk through the results and back, and begin anew, without a mouse."""
    async with opened(address, profile) as page:
        await page.until("document.activeElement && document.activeElement.name === 'q'")
        await page.press("a", " ", "b", "Enter")
        await page.until("document.querySelectorAll('figure').length === 24")
        wide = await page.value(
            "[...document.querySelectorAll('figure')].filter((f, _, all) => f.offsetTop === all[0].offsetTop).length"
        )
        at = "[...document.querySelectorAll('figure')].indexOf(document.activeElement)"
        for keys, place in (
            (["ArrowDown"], 0), (["ArrowRight", "ArrowRight"], 2), (["ArrowDown"], 2 + wide), (["ArrowLeft"], 1 + wide),
            (["ArrowUp"], 1), (["ArrowUp"], -1),
        ):  # fmt: skip
            await page.press(*keys)
            assert await page.value(at) == place, keys
        assert await page.value("document.activeElement.value") == "a b"
        await page.press("ArrowDown", "/")
        assert await page.value("document.activeElement.name + document.activeElement.value") == "qa b"
        await page.press("ArrowDown", "Escape")
        assert await page.value("document.activeElement.name + document.activeElement.value") == "q"
