"""`lavatar submit --shared` from end to end, nothing replaced: three synthetic subjects, toy sizes, one network."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from submit_files import Lavatar, descendants

from lavatar.inference.loading import load_pair
from lavatar.platform.home import Home

NAMES = ("ann", "bob", "cyd")
SMALL = {"avatar_training__steps": 30, "preprocess__synthetic_frames": 40, "evaluation__video_seconds": 1}


@pytest.fixture
def lavatar(tmp_path: Path) -> Iterator[Lavatar]:
    tool = Lavatar(tmp_path / "home")
    for seed, name in enumerate(NAMES):
        assert tool("subjects", "add", "--synthetic", str(seed + 1), name)[0] == 0
    yield tool
    tool.kill_what_runs()


def shared(lavatar: Lavatar, *extra: str, **changes: int) -> tuple[str, ...]:
    """bob driven by ann, and both by cyd."""
    people = ("--shared", "--avatar", "ann", "--actor", "ann")
    return lavatar.submit("bob", "cyd", *people, *extra, **{**SMALL, **changes})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_subjects_share_a_network(lavatar: Lavatar) -> None:
    code, out = lavatar(*shared(lavatar, "--json"))
    assert code == 0, lavatar.errors()
    result: dict[str, Any] = json.loads(out)
    pairs = [(p["avatar"], p["actor"]) for p in result["pairs"]]
    assert pairs == [("ann", "cyd"), ("bob", "ann"), ("bob", "cyd")]
    stages = [s["name"].partition(":")[0] for s in result["stages"]]
    assert stages == ["preprocess"] * 3 + ["avatar"] * 2 + ["shared"] + ["preview"] * 3
    for pair in result["pairs"]:
        assert Path(pair["video"]).is_file()
        assert pair["metrics"]["cross"]["truth"]["psnr"] > 5
    assert len(result["models"]) == 2 + 3
    row = lavatar.stage("shared:ann, bob, cyd")
    assert row is not None
    folder = Home(lavatar.home).absolute(row.out_dir) / "release"
    releases = [load_pair(path.parent) for path in sorted(folder.glob("*/*/config.json"))]
    assert sorted((pair.avatar, pair.actor) for pair in releases) == pairs
    encoders = [pair.ynet.encoder.state_dict() for pair in releases]
    assert all(e[name].equal(encoders[0][name]) for e in encoders for name in e), "one encoder"
    assert row.metrics["ynet"]["steps"] == 18, "12 for two subjects"

    code, out = lavatar("evaluate", "--avatar", "ann", "--actor", "cyd", "--json")
    assert code == 0, lavatar.errors()
    assert json.loads(out)["job"] == result["job"]


@pytest.mark.slow
def test_a_killed_network_goes_on_from_its_checkpoint(lavatar: Lavatar) -> None:
    long = {"ynet_training__steps": 400, "ynet_training__checkpoint_every": 40}
    first = lavatar.start(*shared(lavatar, **long))
    row = lavatar.wait_for(first, "shared:ann, bob, cyd", 100)
    family = descendants(first.pid)
    first.kill()
    first.communicate()
    import psutil

    psutil.wait_procs(family, timeout=240)
    code, out = lavatar(*shared(lavatar, "--json", **long))
    assert code == 0, lavatar.errors()
    assert json.loads(out)["state"] == "finished"
    after = lavatar.stage(row.name)
    assert after is not None
    assert after.attempts == 2
    assert after.metrics["ynet"]["steps"] == 600
    log = json.loads(lavatar("jobs", "logs", json.loads(out)["job"], "--json")[1])
    assert any("ynet: resumed at step" in event["text"] for event in log["events"])
