"""Files that are no longer what their checksums say: tars, checkpoints, released models; and results that are gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sqlalchemy import select

from lavatar.cluster.results import whole
from lavatar.contracts import Event, EventSink
from lavatar.datasets import shards
from lavatar.errors import ShardError
from lavatar.platform import ledger
from lavatar.platform.belonging import strangers
from lavatar.platform.findings import Finding, Place
from lavatar.platform.home import size_of
from lavatar.platform.planning import release_dir
from lavatar.platform.states import State
from lavatar.platform.tables import Stage

AGAIN = "the next submit makes it again"


@dataclass
class Reading:
    """How much of what is read through is done."""

    events: EventSink
    total: int
    done: int = 0

    def add(self, path: Path) -> None:
        """`path` was read."""
        self.tell(self.done + size_of(path), path)

    def tell(self, done: int, path: Path) -> None:
        self.done = done
        done, total = round(done / 1e6), round(self.total / 1e6)
        self.events.emit(Event("checksums", path.name[:20], done=done, total=total, unit="MB"))


@dataclass(frozen=True)
class Examined:
    """The folder of one stage, which has a row unless a benchmark made it."""

    place: Place
    folder: Path
    stage: Stage | None
    reading: Reading

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def name(self) -> str:
        return repr(self.stage) if self.stage else f"stage {self.key[:8]}"

    def finding(self, what: str, where: Path, mending: str, mend: Callable[[], object]) -> Finding:
        def and_reopen() -> None:
            mend()
            ledger.reopen_lost(self.place.registry, self.place.home, [self.key])  # its files say so now

        return self.place.finding(self.key, what, where, mending, and_reopen)


def damaged(place: Place, events: EventSink) -> Iterator[Finding]:
    """Every file with a checksum is read. A stage whose result is damaged becomes pending when that is mended."""
    with place.registry.read() as session:
        stages = {stage.key: stage for stage in session.scalars(select(Stage))}
    folders = [folder for folder in place.home.stage_dirs() if folder.parent.name != "outputs"]
    sizes = [size_of(folder) for folder in folders]
    reading, found = Reading(events, sum(sizes)), set()
    for i, folder in enumerate(folders):
        examined = Examined(place, folder, stages.get(folder.name), reading)
        for finding in (_dataset if folder.parent.name == "shards" else _training)(examined):
            found.add(folder.name)
            yield finding
        reading.tell(sum(sizes[: i + 1]), folder)
    yield from _gone(place, [stage for key, stage in stages.items() if key not in found])


def _dataset(at: Examined) -> Iterator[Finding]:
    """Tars against the manifest, and the manifest itself."""
    from lavatar.datasets.salvage import take_apart

    if not (at.folder / shards.MANIFEST).is_file() or _of_another_lavatar(at.folder):
        return
    try:
        manifest = shards.read_manifest(at.folder)
    except ShardError as error:
        yield at.finding(
            f"dataset of {at.name}: {error.message}", at.folder, f"it is removed; {AGAIN}",
            partial(shutil.rmtree, at.folder),
        )  # fmt: skip
        return
    bad = []
    for tar in manifest.tars:
        reason = shards.defect(at.folder, tar)
        bad += [reason] if reason else []
        at.reading.add(at.folder / tar["name"])
    if bad:
        text = f"dataset of {at.name}: {'; '.join(bad)}"
        yield at.finding(text, at.folder, f"the damaged is removed; {AGAIN}", partial(take_apart, at.folder))


def _of_another_lavatar(folder: Path) -> bool:
    """Whether the dataset is one that this version does not read: it is no damage."""
    try:
        return bool(json.loads((folder / shards.MANIFEST).read_text())["schema"] != shards.SCHEMA)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _training(at: Examined) -> Iterator[Finding]:
    """Checkpoints and released models against their sums."""
    for phase in sorted({path.parent for path in at.folder.glob("*/step-*")}):
        yield from _checkpoints(at, phase)
    release = release_dir(at.folder)
    bad = []
    for model in sorted(path.parent for path in release.rglob("config.json")):
        bad += [] if whole(model) else [str(model.relative_to(at.folder))]
        at.reading.add(model)
    if bad:
        text = f"model of {at.name}: the weights in {', '.join(bad)} do not have their checksum"
        trained = any(at.folder.glob("*/step-*"))
        again = f"{AGAIN} from its checkpoint" if trained else f"import it again, or {AGAIN}"
        yield at.finding(text, release, f"it is removed; {again}", partial(shutil.rmtree, release))


def _checkpoints(at: Examined, phase: Path) -> Iterator[Finding]:
    """Those of one training, the unfinished ones too unless somebody is writing them."""
    from lavatar.training.checkpoint import MARKER, defect

    reasons = {}
    for path in sorted(phase.glob("step-*")):
        reasons[path] = defect(path)
        at.reading.add(path)
    good = max((path.name for path, reason in reasons.items() if reason is None), default=None)
    after = f"training goes on from {good}" if good else "training begins anew"
    if at.stage and at.stage.state == State.FINISHED:
        after = "its training is finished"
    for path, reason in reasons.items():
        being_written = not (path / MARKER).exists() and at.place.usage.user_of(at.key)
        if reason and not being_written:
            text = f"checkpoint {phase.name}/{path.name} of {at.name}: {reason}"
            yield at.finding(text, path, f"it is removed; {after}", partial(shutil.rmtree, path))


def _gone(place: Place, stages: list[Stage]) -> Iterator[Finding]:
    """Finished stages of which something is missing."""
    if strangers(place.registry, place.home):
        return  # they lie elsewhere
    finished = [stage for stage in stages if stage.state == State.FINISHED]
    there = ledger.finished(place.registry, place.home, [stage.key for stage in finished])
    for stage in finished:
        if stage.key not in there:
            yield place.finding(
                stage.key,
                f"{stage!r} is finished, and files of it are gone",
                place.home.absolute(stage.out_dir),
                f"it becomes pending; {AGAIN}",
                partial(ledger.reopen_lost, place.registry, place.home, [stage.key]),
            )
