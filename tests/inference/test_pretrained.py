# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by address: downloaded once, and never without the right SHA-256."""

import hashlib
import http.server
import threading
from functools import partial

import pytest

from transducer_toolkit.inference.pretrained import local_checkpoint

CONTENT = b"weights" * 1000
SUM = hashlib.sha256(CONTENT).hexdigest()
OTHER = "0" * 64


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "transducer_toolkit" / "checkpoints"


@pytest.fixture
def server(tmp_path):
    """An address of a folder with a file, and the requests that it got."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a model.ckpt").write_bytes(CONTENT)
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, _, *args):
            requests.append(args[0])

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Handler, directory=str(folder))
    ) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", requests
        running.shutdown()
        thread.join()


def test_an_address_is_downloaded_once(server, cache):
    address, requests = server
    path = local_checkpoint(f"{address}/a%20model.ckpt#sha256={SUM}")
    assert path == cache / f"{SUM}.ckpt" and path.read_bytes() == CONTENT
    assert local_checkpoint(f"{address}/a%20model.ckpt", sha256=SUM.upper()) == path
    assert len(requests) == 1
    assert [file.name for file in cache.iterdir()] == [path.name]


def test_a_file_of_another_sum_is_not_kept(server, cache):
    address, _ = server
    with pytest.raises(ValueError, match=f"the file has another SHA-256 than {OTHER}"):
        local_checkpoint(f"{address}/a%20model.ckpt#sha256={OTHER}")
    assert list(cache.iterdir()) == []


def test_a_file_that_changed_in_the_cache_is_refused(server, cache):
    address, _ = server
    path = local_checkpoint(f"{address}/a%20model.ckpt#sha256={SUM}")
    path.write_bytes(b"other")
    with pytest.raises(ValueError, match=f"{path} has the SHA-256 "):
        local_checkpoint(f"{address}/a%20model.ckpt#sha256={SUM}")


def test_an_address_without_a_sum_is_refused(cache):
    with pytest.raises(ValueError, match=r"write https://host/a\.ckpt#sha256="):
        local_checkpoint("https://host/a.ckpt")
    for wrong in ("abc", "g" * 64, SUM + "0"):
        with pytest.raises(ValueError, match="sha256: expected 64 hexadecimal digits"):
            local_checkpoint("https://host/a.ckpt", sha256=wrong)
    with pytest.raises(ValueError, match="needs the SHA-256"):
        local_checkpoint("https://host/a.ckpt#part=1")
    with pytest.raises(ValueError, match="expected an address of https, http, file"):
        local_checkpoint(f"ftp://host/a.ckpt#sha256={SUM}")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/a.ckpt", "file:///nowhere/a.ckpt"])
def test_what_cannot_be_downloaded_is_said(cache, address):
    with pytest.raises(ConnectionError, match=f"{address}: cannot be downloaded: "):
        local_checkpoint(address, sha256=SUM)


def test_a_missing_page_is_said(server, cache):
    address, _ = server
    with pytest.raises(ConnectionError, match="cannot be downloaded: "):
        local_checkpoint(f"{address}/b.ckpt", sha256=SUM)


def test_a_path_stays_a_path(tmp_path):
    path = tmp_path / "a#sha256=b.ckpt"
    assert local_checkpoint(path) == path and local_checkpoint(str(path)) == path
    path.write_bytes(CONTENT)
    assert local_checkpoint(path, sha256=SUM) == path
    with pytest.raises(ValueError, match=f"has the SHA-256 {SUM}, expected {OTHER}"):
        local_checkpoint(path, sha256=OTHER)
