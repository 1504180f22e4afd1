"""Weights: found, verified, fetched, and what is said when that fails."""

from __future__ import annotations

import bz2
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from lavatar.datasets import weights as room
from lavatar.errors import StorageError, WeightsError

CONTENT = b"weights" * 1000


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """An HTTP server over a folder with one file."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "f.bin").write_bytes(CONTENT)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder))) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/f.bin"
        httpd.shutdown()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty weights folder and a weight `toy` in the table."""
    monkeypatch.setenv("LAVATAR_WEIGHTS", str(tmp_path / "w"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    toy = room.Weight(
        "toy", "toy.bin", "http://127.0.0.1:9/f", hashlib.sha256(CONTENT).hexdigest(), "MIT", len(CONTENT)
    )
    monkeypatch.setitem(room.WEIGHTS, "toy", toy)
    return tmp_path / "w"


def test_missing_names_file_folders_and_command(place: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        room.find("rvm")
    text = str(caught.value)
    assert "rvm_mobilenetv3_fp32.onnx" in text
    assert str(place) in text
    assert str(tmp_path / "cache" / "lavatar" / "weights") in text
    assert "lavatar weights fetch rvm" in text


def test_wrong_checksum_is_refused(place: Path) -> None:
    place.mkdir()
    (place / "toy.bin").write_bytes(b"something else")
    with pytest.raises(WeightsError, match="wrong SHA-256"):
        room.find("toy")
    assert {row["name"]: row["state"] for row in room.status()}["toy"] == "wrong"


def test_fetch_over_http_and_file(place: Path, server: str) -> None:
    seen: list[tuple[str, int, int]] = []
    path = room.fetch("toy", lambda *step: seen.append(step), url=server)
    assert path == place / "toy.bin"
    assert path.read_bytes() == CONTENT
    assert seen[-1] == ("toy", len(CONTENT), len(CONTENT))
    assert room.find("toy") == path
    path.unlink()
    source = place / "source"
    source.write_bytes(CONTENT)
    assert room.fetch("toy", url=source.as_uri()).read_bytes() == CONTENT
    assert sorted(p.name for p in place.iterdir()) == ["source", "toy.bin"]


def test_a_present_file_is_not_fetched_again(place: Path) -> None:
    place.mkdir()
    (place / "toy.bin").write_bytes(CONTENT)
    assert room.fetch("toy", url="http://127.0.0.1:9/nobody") == place / "toy.bin"


def test_the_cache_is_searched_after_the_folder(place: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "lavatar" / "weights"
    cache.mkdir(parents=True)
    (cache / "toy.bin").write_bytes(CONTENT)
    assert room.find("toy") == cache / "toy.bin"


def test_a_closed_port_says_where_to_put_the_file(place: Path) -> None:
    with pytest.raises(WeightsError, match=r"toy\.bin could not be downloaded") as caught:
        room.fetch("toy")
    assert str(place) in caught.value.hint
    assert list(place.iterdir()) == []


def test_another_file_under_the_address_leaves_nothing(
    place: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(room.WEIGHTS, "toy", replace(room.WEIGHTS["toy"], sha256="0" * 64))
    with pytest.raises(WeightsError, match=r"is not toy\.bin"):
        room.fetch("toy", url=server)
    assert list(place.iterdir()) == []
    with pytest.raises(WeightsError, match="could not be downloaded"):
        room.fetch("toy", url=server + ".gone")


def test_a_folder_that_cannot_be_made(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LAVATAR_WEIGHTS", str(tmp_path / "file" / "below"))
    with pytest.raises(StorageError, match="below"):
        room.fetch("toy")


@pytest.mark.parametrize("name", ["lpips_alexnet"])
def test_official_trunk_becomes_the_known_file(weights: Path, place: Path, tmp_path: Path, name: str) -> None:
    """A .pth as torchvision ships it (its convolutions from the known file) converts to the same bytes."""
    import torch
    from safetensors.torch import load_file

    weight = room.WEIGHTS[name]
    tensors = load_file(weights / weight.file)
    trunk = {key: value for key, value in tensors.items() if key.startswith("features")}
    source = tmp_path / "trunk.pth"
    torch.save({**trunk, "classifier.1.weight": torch.zeros(2)}, source)
    room.convert_trunk(source, weight.trunk, tmp_path / "out.safetensors")
    assert room.file_sha256(tmp_path / "out.safetensors") == weight.sha256


def test_a_trunk_that_runs_code_is_refused(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (np.load, (str(tmp_path / "never"),))

    source = tmp_path / "evil.pth"
    source.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(WeightsError, match=r"evil\.pth"):
        room.convert_trunk(source, "vgg", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_far_too_long_does_not_fill_the_disk(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setitem(room.WEIGHTS, "toy", replace(room.WEIGHTS["toy"], bz2=packed))
    endless = tmp_path / "endless"
    content = bytes(4 * room.SLACK)
    endless.write_bytes(bz2.compress(content) if packed else content)
    assert endless.stat().st_size < 1000 or not packed, "a few bytes that unfold"
    with pytest.raises(WeightsError, match="it goes on after"):
        room.fetch("toy", url=endless.as_uri())
    assert list(place.iterdir()) == []


def test_what_comes_compressed_is_unpacked_and_then_checked(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(room.WEIGHTS, "toy", replace(room.WEIGHTS["toy"], bz2=True))
    packed = tmp_path / "f.bin.bz2"
    packed.write_bytes(bz2.compress(CONTENT))
    assert room.fetch("toy", url=packed.as_uri()).read_bytes() == CONTENT
    assert [p.name for p in place.iterdir()] == ["toy.bin"]
    (place / "toy.bin").unlink()
    for wrong in (CONTENT, bz2.compress(CONTENT)[:-9]):
        packed.write_bytes(wrong)
        with pytest.raises(WeightsError, match="no bz2 file"):
            room.fetch("toy", url=packed.as_uri())
    packed.write_bytes(bz2.compress(CONTENT + b"!"))
    with pytest.raises(WeightsError, match=r"is not toy\.bin"):
        room.fetch("toy", url=packed.as_uri())
    assert list(place.iterdir()) == []
