"""`lavatar doctor --repair` and `lavatar gc` after a real crash, nothing replaced: a driver killed in the middle of its
training on Ray, then its newest checkpoint truncated and a byte of a tar flipped."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from submit_files import Lavatar, descendants, stopped, training_worker

from lavatar.cluster.session import root_of, temp_of
from lavatar.datasets import shards
from lavatar.platform.home import Home
from lavatar.platform.tracking import connect

pytestmark = pytest.mark.slow  # most of a job, twice: minutes


@pytest.fixture
def lavatar(tmp_path: Path) -> Iterator[Lavatar]:
    tool = Lavatar(tmp_path / "home")
    yield tool
    tool.kill_what_runs()


def findings(lavatar: Lavatar, *options: str) -> tuple[int, list[dict[str, Any]]]:
    code, out = lavatar("doctor", "--json", *options)
    return code, json.loads(out)["findings"]


def test_a_crash_is_mended_and_the_job_goes_on(lavatar: Lavatar) -> None:
    for seed, name in ((1, "ann"), (2, "bob")):
        assert lavatar("subjects", "add", "--synthetic", str(seed), name)[0] == 0
    process = lavatar.start(*lavatar.submit("ann", "bob", avatar_training__steps=300))
    row = lavatar.wait_for(process, "avatar:ann", 70)
    with stopped(training_worker(process.pid)):  # the job does not end meanwhile
        assert findings(lavatar, "--repair") == (0, []), "all of it is in use"
    family = descendants(process.pid)
    process.kill()
    process.communicate()
    assert psutil.wait_procs(family, timeout=240)[1] == []

    home = Home(lavatar.home)
    checkpoints = sorted((home.absolute(row.out_dir) / "avatar").glob("step-*"))
    assert len(checkpoints) == 2
    os.truncate(checkpoints[-1] / "optimizer.safetensors", 1000)
    data = lavatar.stage("preprocess:bob")
    assert data is not None
    tar = home.absolute(data.out_dir) / "00000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])

    code, found = findings(lavatar)
    told = "\n".join(row["what"] for row in found)
    assert (code, any(row["mended"] for row in found)) == (1, False)
    for text in (
        f"stage avatar:ann ({row.key[:8]}) is running, and process {process.pid}",
        f"job {row.job_id} (ann <- bob) is running, and process {process.pid}",
        f"dataset of stage preprocess:bob ({data.key[:8]}): 00000.tar has SHA-256",
        f"checkpoint avatar/{checkpoints[-1].name} of stage avatar:ann ({row.key[:8]}): optimizer.safetensors has 1000",
        "files of a Ray whose process is gone",
        "the MLflow run 'avatar:ann'",
        f"the MLflow run 'job {row.job_id}'",
    ):
        assert text in told
    code, mended = findings(lavatar, "--repair")
    assert (code, [row["what"] for row in mended]) == (0, [row["what"] for row in found])
    assert all(row["mended"] for row in mended)
    assert list(temp_of(root_of(home.root)).glob("session_*")) == []
    assert findings(lavatar) == (0, [])

    assert lavatar("jobs", "resume", row.job_id or "")[0] == 0, lavatar.errors()
    after = lavatar.stage("avatar:ann")
    assert after is not None
    assert after.metrics["avatar"]["first_step"] == int(checkpoints[0].name.rpartition("-")[2])
    assert tar.read_bytes() == whole
    shards.verify(tar.parent)
    assert findings(lavatar) == (0, [])

    assert lavatar("gc", "--dry-run")[1].startswith("nothing to free")
    assert lavatar("jobs", "delete", row.job_id or "")[0] == 0
    code, out = lavatar("gc", "--json")
    assert (code, json.loads(out)["left"]) == (0, 0)
    assert json.loads(out)["bytes"] > 1_000_000
    assert list(home.stage_dirs()) == []
    client = connect(home)
    names = {model.name for model in client.search_registered_models()}
    assert names == {"lavatar-avatar-ann", "lavatar-pair-ann-bob"}
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert {run.info.run_name for run in runs} == {"avatar:ann", "pair:ann<-bob"}, "of what is registered"
    assert findings(lavatar) == (0, [])
