"""Two machines of one name are two: what lives on one is not taken for dead on the other."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from lavatar.cluster import environment, session
from lavatar.platform import ledger, lookup
from lavatar.platform.home import Home
from lavatar.platform.leases import Owner, busy, marked_alive, process_mark
from lavatar.platform.leftovers import leftovers
from lavatar.platform.registry import Registry, now, open_registry
from lavatar.platform.tables import Stage
from lavatar.platform.usage import usage_of

MONTH_AND_DAY = 31 * 86_400


@pytest.fixture
def gone() -> int:
    """The number of no process of this machine."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture
def far(tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """This process is one of another machine of the same name; undone by `undo`."""
    other = tmp_path / "boot_id"
    other.write_text("a7fd4ff3-5b1c-4c8e-9d3b-0d6b2f5d8c11\n")
    patch = pytest.MonkeyPatch()
    patch.setattr(environment, "_BOOT_ID", other)
    yield patch
    patch.undo()


@pytest.fixture
def root(home: Path) -> Iterator[Path]:
    """Where Ray's files of the home are, which may be outside it."""
    Home(home).ensure()
    folder = session.private_folder(home)
    yield folder
    shutil.rmtree(folder)


def of_stage(registry: Registry) -> Stage:
    row = lookup.get_stage(registry, "k" * 64)
    assert row is not None
    return row


def test_a_stage_of_a_machine_of_the_same_name_is_its_own_until_its_lease_runs_out(
    home: Path, far: pytest.MonkeyPatch, gone: int
) -> None:
    registry, there = open_registry(Home(home)), environment.this_host()
    owner, mark = Owner("theirs", there, gone, 1.0), process_mark()
    with registry.write() as session:
        session.add(Stage(key="k" * 64, kind="avatar", name="avatar:A", out_dir="x", created=now()))
    ledger.claim_stage(registry, "k" * 64, owner, "job1")
    assert marked_alive(mark) is True
    far.undo()
    assert environment.this_host() != there
    assert environment.this_host().split(" ")[0] == there.split(" ")[0]
    assert ledger.release_dead(registry) == ledger.dead(registry) == []
    assert marked_alive(mark) is None, "nobody here knows"
    row = of_stage(registry)
    assert row.owner == "theirs"
    assert f"process {gone} on {there.split(' ')[0]}" in busy(row).message
    assert there.split(" ")[1] not in busy(row).message
    with registry.write() as session:
        session.execute(sa.update(Stage).values(lease_until=now() - 1))
    assert [row.key for row in ledger.release_dead(registry)] == ["k" * 64]


def test_a_process_of_this_machine_is_seen_to_be_gone_at_once(home: Path, gone: int) -> None:
    registry = open_registry(Home(home))
    with registry.write() as session:
        session.add(Stage(key="k" * 64, kind="avatar", name="avatar:A", out_dir="x", created=now()))
    ledger.claim_stage(registry, "k" * 64, Owner("ours", environment.this_host(), gone, 1.0), "job1")
    assert [row.key for row in ledger.release_dead(registry)] == ["k" * 64]


def test_what_it_keeps_in_a_shared_home_stays_until_nobody_can_want_it(
    home: Path, root: Path, far: pytest.MonkeyPatch, gone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Secrets handed to its processes, the record of its Ray, and that one's files."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")

    def keep() -> list[Path]:
        told = Path(environment.hand_over(home)[environment.HANDED_VARIABLE])
        secret = told.rename(told.with_name(told.name.replace(str(os.getpid()), str(gone))))
        temp = session.temp_of(root)
        ray = temp / f"session_2026-01-01_00-00-00_000000_{gone}"
        (ray / "logs").mkdir(parents=True)
        record, log = temp / f"session-{gone}.json", ray / "logs" / "raylet.out"
        record.write_text("{}")
        log.write_text("x")
        return [secret, record, log]

    theirs = keep()
    far.undo()
    ours = keep()

    def look() -> None:
        environment.hand_over(home)
        session.remove_ended(session.temp_of(root))

    look()
    assert [path.exists() for path in (*theirs, *ours)] == [True] * 3 + [False] * 3
    place = Home(home)
    registry = open_registry(place)
    assert leftovers(place, usage_of(place, registry)) == []
    long_ago = time.time() - MONTH_AND_DAY
    (root / "train").mkdir()  # of trainings: no such folder
    for path in (*theirs, theirs[1].parent, root / "train"):
        os.utime(path, (long_ago, long_ago))
    found = {left.path for left in leftovers(place, usage_of(place, registry))}
    assert found == {theirs[0], theirs[1].parent}
