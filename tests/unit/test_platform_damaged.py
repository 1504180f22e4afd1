"""A dataset that a stage found damaged is taken away, one that is whole is left alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lavatar.platform.execution import take_away_damaged

sys.path.insert(0, str(Path(__file__).parent))
from dataset_files import flip_bytes, make_dataset


def test_a_whole_dataset_stays(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert not take_away_damaged(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("harm", ["flip", "remove", "manifest"])
def test_a_damaged_one_is_no_dataset_any_more(tmp_path: Path, harm: str) -> None:
    make_dataset(tmp_path)
    if harm == "flip":
        flip_bytes(tmp_path / "shard-00001.tar", "00000010.image.jpg")
    elif harm == "remove":
        (tmp_path / "shard-00001.tar").unlink()
    else:
        (tmp_path / "manifest.json").write_text("{")
    assert take_away_damaged(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    assert not (tmp_path / "shard-00001.tar").exists()
