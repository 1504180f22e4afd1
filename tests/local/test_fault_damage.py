"""Files that are no longer what they were: the newest checkpoint cut off, bytes of datasets turned over."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from dataset_files import flip_bytes
from fault_files import INLINE, INTERVAL, Story, at_checkpoint, new_home, same_as_undisturbed, small_job
from submit_files import LIMIT, Lavatar

from lavatar.datasets import shards
from lavatar.platform import lookup
from lavatar.platform.home import Home
from lavatar.platform.registry import open_registry
from lavatar.platform.tables import Event
from lavatar.training.checkpoint import latest

pytestmark = pytest.mark.slow  # a whole job each


@pytest.fixture
def lavatar(tmp_path: Path) -> Iterator[Lavatar]:
    tool = new_home(tmp_path)
    yield tool
    tool.kill_what_runs()


def events(lavatar: Lavatar) -> list[Event]:
    registry = open_registry(Home(lavatar.home))
    (job,) = lookup.list_jobs(registry)
    found = lookup.events(registry, job.id)
    registry.close()
    return found


def test_the_newest_checkpoint_is_cut_off(lavatar: Lavatar, undisturbed: Story) -> None:
    driver = lavatar.start(*small_job(lavatar, *INLINE))
    at_checkpoint(lavatar, 3)
    driver.kill()
    driver.communicate()
    (training,) = lavatar.home.glob("checkpoints/*/avatar")
    newest, _ = latest(training)
    assert newest is not None
    file = newest / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    (job,) = json.loads(lavatar("jobs", "list", "--json")[1])["jobs"]
    code, _ = lavatar("jobs", "resume", job["id"], "--json")
    assert code == 0, lavatar.errors()
    older = int(newest.name.removeprefix("step-")) - INTERVAL
    said = [event.text for event in events(lavatar) if event.stage == "avatar:ann"]
    assert any(f"{newest} is damaged and was skipped (optimizer.safetensors has" in text for text in said)
    assert any(f"resumed at step {older} from" in text for text in said), "the one before it is good"
    same_as_undisturbed(lavatar, undisturbed)


def test_bytes_of_two_datasets_are_turned_over(lavatar: Lavatar, undisturbed: Story) -> None:
    """While the avatar trains: the pair's training finds them, and waits until both are made again."""
    driver = lavatar.start(*small_job(lavatar))
    at_checkpoint(lavatar, 1)
    for name, member in (("ann", "00000003.image.jpg"), ("bob", "00000012.face.jpg")):
        flip_bytes(dataset_tar(lavatar, name, member), member)
    out, _ = driver.communicate(timeout=LIMIT)
    assert driver.returncode == 0, lavatar.errors()
    assert json.loads(out)["state"] == "finished"
    said = [event for event in events(lavatar) if event.stage == "pair:ann<-bob" and event.level == "warning"]
    (met,) = [event.text for event in said if "made again" in event.text]
    assert "has SHA-256" in met
    assert "sample 00000003: image.jpg has another checksum" in met or "sample 00000012: face.jpg" in met
    assert met.endswith("preprocess:ann and preprocess:bob is made again")
    attempts = {name: row.attempts for name in undisturbed.figures if (row := lavatar.stage(name))}
    assert attempts == {
        "preprocess:ann": 2, "preprocess:bob": 2, "avatar:ann": 1, "pair:ann<-bob": 2, "preview:ann<-bob": 1,
    }  # fmt: skip
    same_as_undisturbed(lavatar, undisturbed)


def dataset_tar(lavatar: Lavatar, subject: str, member: str) -> Path:
    """The tar of a subject's dataset that holds this member."""
    key, _, name = member.partition(".")
    for manifest in lavatar.home.glob("shards/*/manifest.json"):
        if json.loads(manifest.read_text())["subject"] == subject:
            for tar in shards.read_manifest(manifest.parent).tars:
                if name in shards.index_tar(manifest.parent / tar["name"]).get(key, {}):
                    return manifest.parent / str(tar["name"])
    raise AssertionError(f"{subject} has no {member}")
