"""The files of a model folder, fetched piece by piece."""

import pytest

from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.runs import load

_FILES = {"model/a.json": b"{}", "model/b.bin": bytes(range(10)), "model/empty": b"", "model/deep/c": b"no", "x": b"no"}


def _stored(tmp_path, monkeypatch) -> Store:
    monkeypatch.setattr(load, "_PIECE", 3)
    store = Store(str(tmp_path / "store"))
    for name, content in _FILES.items():
        store.write(name, content)
    (tmp_path / "here").mkdir()
    return store


def test_every_byte_of_the_folder_and_no_other(tmp_path, monkeypatch):
    load._fetch(_stored(tmp_path, monkeypatch), "model/", tmp_path / "here")
    found = {f"model/{path.name}": path.read_bytes() for path in (tmp_path / "here").iterdir()}
    assert found == {name: _FILES[name] for name in ("model/a.json", "model/b.bin", "model/empty")}


def test_weights_that_are_replaced_meanwhile_are_refused(tmp_path, monkeypatch):
    store, read = _stored(tmp_path, monkeypatch), Store.read

    def racing(self, name, offset=0, length=None):
        if (name, offset) == ("model/b.bin", 3):
            store.write(name, bytes(10))
        return read(self, name, offset, length)

    monkeypatch.setattr(Store, "read", racing)
    with pytest.raises(UserError, match=r"model/ was written again while it was read; repeat the command"):
        load._fetch(store, "model/", tmp_path / "here")
