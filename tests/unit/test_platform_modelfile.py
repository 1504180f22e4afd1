"""A model in one file: the same bytes for the same model, and no other bytes are taken."""

from __future__ import annotations

import hashlib
import io
import os
import resource
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavatar.errors import DataError, LavatarError, StorageError, UsageError
from lavatar.platform.modelfile import MEMBERS, MOST_TEXT, SUMS, unpack_model_file, write_model_file

CONTENTS = {
    "about.json": b'{"format": 1}',
    "card.md": b"# ann driven by bob\n",
    "avatar/config.json": b"{}",
    "avatar/model.safetensors": bytes(range(256)) * 5,
    "pair/config.json": b"[]" * 256,  # a whole block: no padding
    "pair/model.safetensors": b"",
}


def make_file(path: Path, kind: str = "pair") -> bytes:
    folder = path.with_name("contents")
    for name, content in CONTENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_model_file(path, kind, folder)
    return path.read_bytes()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_file(tmp_path_factory.mktemp("good") / "model.tar")


Unpack = Callable[[bytes], str]


@pytest.fixture(scope="module")
def unpack(tmp_path_factory: pytest.TempPathFactory) -> Unpack:
    """Unpack a file of these bytes; nothing may come to lie beside its folder."""
    place = tmp_path_factory.mktemp("bad")

    def call(content: bytes) -> str:
        (place / "model.tar").write_bytes(content)
        folder = Path(os.path.join(place, f"out{len(os.listdir(place))}"))
        folder.mkdir()
        try:
            return unpack_model_file(place / "model.tar", folder)
        finally:
            for path in sorted(folder.rglob("*"), reverse=True):
                assert str(path.relative_to(folder)) in {*CONTENTS, "avatar", "pair"}
                path.rmdir() if path.is_dir() else path.unlink()
            folder.rmdir()
            assert os.listdir(place) == ["model.tar"]

    return call


def tar_of(*members: tuple[str, bytes], **header: Any) -> bytes:
    """A tar as others write it; `header` changes the last member."""
    out = io.BytesIO()
    for i, (name, content) in enumerate(members):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        for key, value in header.items() if i == len(members) - 1 else ():
            setattr(info, key, value)
        out.write(info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512))
    return out.getvalue() + bytes(1024)


def with_sums(contents: dict[str, bytes]) -> list[tuple[str, bytes]]:
    """Members with the right sums of whatever they are: what somebody would make who changes a model."""
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items())
    return [(SUMS, sums.encode()), *contents.items()]


@pytest.mark.parametrize("kind", list(MEMBERS))
def test_what_is_written_is_read_and_is_the_same_each_time(kind: str, tmp_path: Path) -> None:
    content = make_file(tmp_path / "one.tar", kind)
    assert make_file(tmp_path / "two.tar", kind) == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["contents", "one.tar", "two.tar"]
    (tmp_path / "out").mkdir()
    assert unpack_model_file(tmp_path / "one.tar", tmp_path / "out") == kind
    found = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == {name: CONTENTS[name] for name in MEMBERS[kind]}


def test_ordinary_tools_read_it_and_check_its_sums(tmp_path: Path, good: bytes) -> None:
    (tmp_path / "model.tar").write_bytes(good)
    subprocess.run(["tar", "xf", "model.tar"], cwd=tmp_path, check=True)
    checked = subprocess.run(["sha256sum", "-c", SUMS], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert checked.stdout.splitlines() == [f"{name}: OK" for name in MEMBERS["pair"]]
    assert tar_of(*with_sums(CONTENTS)) == good


@given(data=st.data())
def test_a_model_file_with_any_bit_changed_is_refused(good: bytes, unpack: Unpack, data: st.DataObject) -> None:
    at, bit = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 7))
    with pytest.raises(DataError):
        unpack(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])


@given(data=st.data())
def test_a_model_file_cut_off_or_lengthened_anywhere_is_refused(
    good: bytes, unpack: Unpack, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(good) - 1))
    with pytest.raises(DataError):
        unpack(good[:at])
    with pytest.raises(DataError):
        unpack(good[:at] + data.draw(st.binary(min_size=1, max_size=1024)) + good[at:])


@pytest.mark.slow
def test_every_single_byte_counts(good: bytes, unpack: Unpack) -> None:
    """No sample: each byte of the file, in each of its members, headers and gaps."""
    for at in range(len(good)):
        with pytest.raises(DataError):
            unpack(good[:at] + bytes([good[at] ^ 0x20]) + good[at + 1 :])


@given(st.binary(max_size=2048))
def test_any_bytes_as_a_model_file_are_refused(unpack: Unpack, content: bytes) -> None:
    with pytest.raises(DataError):
        unpack(content)


def test_members_that_are_missing_added_renamed_or_moved_are_refused(unpack: Unpack) -> None:
    """Their sums being right."""
    names = list(CONTENTS)
    without = [{name: CONTENTS[name] for name in names if name != gone} for gone in names]
    renamed = [
        {new if name == "card.md" else name: CONTENTS[name] for name in names} for new in ("CARD.md", "model.pkl")
    ]
    added = [{**CONTENTS, "model.pkl": b"x"}, {"model.pkl": b"x", **CONTENTS}]
    moved = [dict(reversed(CONTENTS.items()))]
    for contents in (*without, *renamed, *added, *moved):
        with pytest.raises(DataError, match="is no whole model of lavatar"):
            unpack(tar_of(*with_sums(contents)))
    twice = with_sums(CONTENTS)
    with pytest.raises(DataError, match=r"'card\.md' stands where avatar/config\.json belongs"):
        unpack(tar_of(*twice[:3], *twice[2:]))


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("../../evil.md", {}), ("/etc/passwd", {}), ("card.md/../../x", {}), ("./card.md", {}), ("card.md\0x", {}),
        ("card.md", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("card.md", {"type": tarfile.LNKTYPE, "linkname": "about.json"}), ("card.md", {"type": tarfile.CHRTYPE}),
        ("card.md", {"type": tarfile.FIFOTYPE}), ("card.md", {"type": tarfile.DIRTYPE}),
        ("card.md", {"type": tarfile.GNUTYPE_SPARSE}), ("card.md", {"type": tarfile.XHDTYPE}),
        ("card.md", {"mode": 0o4777}), ("card.md", {"mtime": 1}), ("card.md", {"uname": "root"}),
    ],
    ids=str,
)  # fmt: skip
def test_paths_links_and_devices_in_a_model_file_are_refused(name: str, header: dict[str, Any], unpack: Unpack) -> None:
    members = with_sums(CONTENTS)[:2]
    with pytest.raises(DataError, match=r"stands where card\.md belongs"):
        unpack(tar_of(*members, (name, b""), **header))


def test_sizes_that_are_not_there_reserve_nothing(unpack: Unpack) -> None:
    """Nothing is compressed, so what is unpacked is never more than the file."""
    for size in (8**11 - 1, 2**32, MOST_TEXT + 1, 1):
        with pytest.raises(DataError, match=r"ends inside about\.json"):
            unpack(tar_of(with_sums(CONTENTS)[0], ("about.json", b""), size=size)[:-1024])
    members = with_sums({**CONTENTS, "card.md": b"x" * (MOST_TEXT + 1)})
    with pytest.raises(DataError, match=rf"card\.md has {MOST_TEXT + 1} bytes, at most {MOST_TEXT} are taken"):
        unpack(tar_of(*members))


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("no model")
    for name, error in (("gone", UsageError), (".", UsageError), ("pipe", UsageError), ("text", DataError)):
        with pytest.raises(error) as caught:
            unpack_model_file(tmp_path / name, tmp_path)
        assert str(tmp_path / name) in caught.value.message
        assert caught.value.hint


def test_a_disk_that_is_full_leaves_no_file(tmp_path: Path) -> None:
    """The limit on a file's size stands in for the disk's."""
    make_file(tmp_path / "model.tar")
    (tmp_path / "model.tar").unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"model\.tar"):
            write_model_file(tmp_path / "model.tar", "pair", tmp_path / "contents")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["contents"]
    with pytest.raises(LavatarError):
        write_model_file(tmp_path / "no" / "folder" / "model.tar", "pair", tmp_path / "contents")
