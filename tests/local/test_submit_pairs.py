"""`lavatar submit --pairs` from end to end, nothing replaced: of three people only the pairs that the file names."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fault_files import INLINE, new_home, nothing_left
from submit_files import Lavatar

from lavatar.inference.loading import load_pair
from lavatar.platform.home import Home
from lavatar.platform.tracking import connect

SMALL = {"avatar_training__steps": 30, "preprocess__synthetic_frames": 40, "evaluation__video_seconds": 1}
PAIRS = [("ann", "bob"), ("cyd", "ann")]
pytestmark = pytest.mark.slow  # a whole job of two avatars


def submitted(lavatar: Lavatar, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    code, out = lavatar(*lavatar.submit_pairs(pairs, "--json", *INLINE, **SMALL))
    assert code == 0, lavatar.errors()
    result: dict[str, Any] = json.loads(out)
    return result


def test_the_pairs_of_a_file_are_made_and_no_others(tmp_path: Path) -> None:
    lavatar = new_home(tmp_path, "ann", "bob", "cyd")
    result = submitted(lavatar, PAIRS)
    assert result["state"] == "finished"
    assert [(pair["avatar"], pair["actor"]) for pair in result["pairs"]] == PAIRS
    assert [(stage["name"], stage["state"]) for stage in result["stages"]] == [
        (name, "finished")
        for name in (
            "preprocess:ann", "preprocess:bob", "preprocess:cyd", "avatar:ann", "avatar:cyd", "pair:ann<-bob",
            "pair:cyd<-ann", "preview:ann<-bob", "preview:cyd<-ann",
        )
    ]  # fmt: skip
    for pair in result["pairs"]:
        assert Path(pair["video"]).is_file()
        assert pair["metrics"]["cross"]["truth"]["psnr"] > 5
    names = {"lavatar-avatar-ann", "lavatar-avatar-cyd", "lavatar-pair-ann-bob", "lavatar-pair-cyd-ann"}
    assert {model["name"] for model in result["models"]} == names
    assert {model.name for model in connect(Home(lavatar.home)).search_registered_models()} == names
    rows = [lavatar.stage(f"pair:{avatar}<-{actor}") for avatar, actor in PAIRS]
    pairs = [load_pair(Home(lavatar.home).absolute(row.out_dir) / "release") for row in rows if row is not None]
    assert [(pair.avatar, pair.actor) for pair in pairs] == PAIRS
    nothing_left(lavatar.home)

    again = submitted(lavatar, PAIRS[::-1])
    assert (again["job"], again["metrics"], again["models"]) == (result["job"], result["metrics"], result["models"])
    assert {stage["cached"] for stage in again["stages"]} == {True}, "another order is the same job"
    code, _ = lavatar("evaluate", "--avatar", "cyd", "--actor", "bob")
    assert code == 1
    assert "there is no finished model of avatar 'cyd' driven by 'bob'" in lavatar.errors()
