"""Shards: bytes on disk are deterministic, checked and readable by WebDataset."""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
import tarfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import webdataset

from lavatar.datasets import shards
from lavatar.errors import ShardError, StorageError

sys.path.insert(0, str(Path(__file__).parent))
from dataset_files import SIZE, flip_bytes, make_dataset, make_meta, make_pictures


def test_same_samples_give_the_same_bytes_and_leave_no_part_files(tmp_path: Path) -> None:
    first = make_dataset(tmp_path / "a")
    assert first.tars == make_dataset(tmp_path / "b").tars
    for tar in first.tars:
        assert (tmp_path / "a" / tar["name"]).read_bytes() == (tmp_path / "b" / tar["name"]).read_bytes()
    assert {p.name for p in (tmp_path / "a").iterdir()} == {t["name"] for t in first.tars} | {"manifest.json"}
    with tarfile.open(tmp_path / "a" / first.tars[0]["name"]) as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "root")}
    assert sorted(m.name for m in members[:4]) == [
        "00000000.alpha.png", "00000000.face.jpg", "00000000.image.jpg", "00000000.meta.json",
    ]  # fmt: skip


def test_samples_come_back_close_to_what_was_written(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path)
    assert shards.read_manifest(tmp_path) == manifest == shards.verify(tmp_path)
    samples = list(shards.iterate(tmp_path))
    assert [s.meta.frame for s in samples] == list(range(20))
    assert samples[3].meta == make_meta(3, jaw=0.0, blink=0.0)
    image, alpha, face = make_pictures(3)
    assert np.array_equal(samples[3].alpha, alpha)
    assert np.abs(samples[3].image.astype(int) - image).mean() < 2
    assert np.abs(samples[3].face.astype(int) - face).mean() < 3
    assert [s.key for s in shards.iterate(tmp_path, "eval")] == [f"{i:08d}" for i in range(16, 20)]


def test_chroma_is_not_subsampled() -> None:
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2, 0], stripes[:, 1::2, 2] = 255, 255  # red and blue columns, one pixel wide
    content = shards.encode_jpeg(stripes, 95)
    back = shards.decode_picture(shards.IMAGE, content, zlib.crc32(content))
    assert np.abs(back.astype(int) - stripes).mean() < 8  # 4:2:0 gives about 85


def test_webdataset_reads_the_tars(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path)
    urls = [str(tmp_path / tar["name"]) for tar in manifest.tars]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in found] == [f"{i:08d}" for i in range(20)]
    assert json.loads(found[5]["meta.json"])["frame"] == 5
    assert cv2.imdecode(np.frombuffer(found[5]["image.jpg"], np.uint8), cv2.IMREAD_COLOR).shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize("member", ["image.jpg", "alpha.png", "face.jpg", "meta.json"])
def test_flipped_bytes_are_found_and_named(tmp_path: Path, member: str) -> None:
    make_dataset(tmp_path)
    flip_bytes(tmp_path / "shard-00001.tar", f"00000010.{member}")
    with pytest.raises(ShardError, match=r"shard-00001\.tar has SHA-256"):
        shards.verify(tmp_path)
    with pytest.raises(ShardError, match=rf"shard-00001\.tar, sample 00000010: {member}"):
        list(shards.iterate(tmp_path))


def test_what_must_be_whole_names_tars_and_samples(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    shards.require_whole(tmp_path)
    for key in (10, 11, 12, 14):
        flip_bytes(tmp_path / "shard-00001.tar", f"{key:08d}.image.jpg")
    with pytest.raises(ShardError) as caught:
        shards.require_whole(tmp_path)
    assert "shard-00001.tar has SHA-256" in caught.value.message
    assert "sample 00000010: image.jpg has another checksum" in caught.value.message
    assert caught.value.message.endswith("and 1 more")
    tar = tmp_path / "shard-00000.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    with pytest.raises(ShardError, match=r"shard-00000\.tar is damaged, after 0000000"):
        shards.require_whole(tmp_path)


def test_truncated_and_missing_tars_are_named(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    tar = tmp_path / "shard-00000.tar"
    content = tar.read_bytes()
    tar.write_bytes(content[: len(content) // 2])
    with pytest.raises(ShardError, match="shard-00000"):
        list(shards.iterate(tmp_path))
    tar.unlink()
    with pytest.raises(ShardError, match=r"shard-00000\.tar is missing"):
        shards.verify(tmp_path)


def test_no_manifest_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no dataset"):
        shards.read_manifest(tmp_path)
    manifest = make_dataset(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ShardError, match="damaged"):
        shards.read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({**dataclasses.asdict(manifest), "schema": 99}))
    with pytest.raises(ShardError, match="schema 99"):
        shards.read_manifest(tmp_path)
    (tmp_path / "shard-00000.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-00000\.tar"):
        shards.write_manifest(tmp_path, manifest)


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = shards.ShardWriter(tmp_path / "a.tar")

    def full(_: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer._file, "write", full)

    def write() -> None:
        with writer:
            for i in range(20):
                writer.write(make_meta(i), *make_pictures(i))

    with pytest.raises(StorageError, match="disk is full"):
        write()
    assert list(tmp_path.iterdir()) == []
