"""What a training takes from the store and puts there: its inputs, its checkpoints, its release.

    STORE/stages/KEY/checkpoints/PHASE/step-00000500/...    the files of a checkpoint, its COMPLETE.json last

A checkpoint is sent by a thread beside the training, the newest one that waits first; the last two are kept. So a node
without the disk of the first one goes on from there. Every method does nothing where there is no store.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from lavatar.cluster.logs import log_path, note
from lavatar.cluster.objects import Sums, reason
from lavatar.cluster.results import UNREADABLE
from lavatar.cluster.store import Store, fetch_inputs, open_store
from lavatar.contracts import Event, EventSink, StageSpec
from lavatar.errors import DataError, LavatarError
from lavatar.training import checkpoint as checkpoints
from lavatar.training.engine import Engine
from lavatar.training.files import storage_errors

_STEP = re.compile(r"step-([0-9]{8,12})")


class Shelf:
    """The store's side of one training process. A context manager: leaving it waits for what is being sent."""

    def __init__(self, spec: StageSpec, events: EventSink) -> None:
        self._spec, self._events, self._log = spec, events, log_path(spec)
        self._store = open_store(spec.home, lambda text: note(self._log, text))
        self._sender = ThreadPoolExecutor(1, "checkpoint-upload")
        self._newest: dict[Path, Path] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sender.shutdown(wait=True)

    def fetch_inputs(self) -> None:
        """What the stage needs of others, onto this disk."""
        fetch_inputs(self._spec, self._store, self._events)

    def publish(self) -> None:
        """The release, which is in its place."""
        if self._store:
            self._store.publish(self._spec)

    def send(self, checkpoint: Path) -> None:
        """Send a complete checkpoint by and by; returns at once."""
        if not self._store:
            return
        link = checkpoint.with_name(
            f".{checkpoint.name}.sending.part"
        )  # stays when the checkpoint is removed as too old
        with storage_errors(link):
            shutil.rmtree(link, ignore_errors=True)
            shutil.copytree(checkpoint, link, copy_function=_link)
        self._newest[checkpoint.parent] = checkpoint
        self._sender.submit(self._send, self._store, checkpoint, link)

    def restore(self, folder: Path, engine: Engine) -> None:
        """Before a training takes up the newest checkpoint in `folder`: where the store has a newer one, it is there.

        All workers take up the same one, the first worker's, whatever is on the disks of their nodes.
        """
        if not self._store:
            return
        if engine.rank == 0:
            for left in folder.glob(".step-*.sending.part"):
                shutil.rmtree(left, ignore_errors=True)
            self._restore(self._store, folder)
            newest, _ = checkpoints.latest(folder)
            if engine.world > 1 and newest is not None and step_of(newest) not in self._steps(self._store, folder):
                self._put(self._store, newest, newest)
        first, *_ = (int(each) for each in engine.gather(torch.tensor([step_of(checkpoints.latest(folder)[0])])))
        if engine.rank:  # what the first one has is in the store by now
            while (newest := checkpoints.latest(folder)[0]) is not None and step_of(newest) > first:
                shutil.rmtree(newest)
            self._restore(self._store, folder)
        engine.any(False)  # nobody trains before all have it

    def _restore(self, store: Store, folder: Path) -> None:
        with store.locked(self._spec.key):
            newest, _ = checkpoints.latest(folder)
            for step in self._steps(store, folder):
                if step <= step_of(newest):
                    return
                try:
                    if self._get(store, folder, step):
                        self._say(f"checkpoint of step {step} fetched from the store")
                        return
                except DataError as error:
                    self._say(f"the checkpoint of step {step} in the store is skipped: {error.message}", "warning")

    def _get(self, store: Store, folder: Path, step: int) -> bool:
        """One checkpoint into the folder; False for an unfinished one. Raises DataError."""
        name = f"{self._place(folder)}/{_folder_name(step)}"
        marker = store.objects.read(f"{name}/{checkpoints.MARKER}")
        if marker is None:
            return False
        target, partial = folder / _folder_name(step), folder / f".{_folder_name(step)}.fetch.part"
        try:
            with storage_errors(target):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            where = f"{store.objects.url}/{name}"
            store.objects.get_tree(name, _sums(marker, where), partial, f"Remove {where}.")
            with storage_errors(target):
                (partial / checkpoints.MARKER).write_bytes(marker)
                shutil.rmtree(target, ignore_errors=True)
                os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return True

    def _send(self, store: Store, checkpoint: Path, link: Path) -> None:
        try:
            if self._newest[checkpoint.parent] == checkpoint:  # else a newer one waits
                self._put(store, checkpoint, link)
        except (LavatarError, OSError) as error:  # the training goes on, and the next one may get through
            self._say(f"{checkpoint.name} is on this node's disk alone: {reason(error)}", "warning")
        finally:
            shutil.rmtree(link, ignore_errors=True)

    def _put(self, store: Store, checkpoint: Path, folder: Path) -> None:
        """The files of a checkpoint, its marker, and away with all but the newest two."""
        name = f"{self._place(checkpoint.parent)}/{checkpoint.name}"
        files = [path.name for path in sorted(folder.iterdir()) if path.name != checkpoints.MARKER]
        store.objects.put_tree(folder, files, name)
        store.objects.write(f"{name}/{checkpoints.MARKER}", (folder / checkpoints.MARKER).read_bytes())
        finished = 0
        for step in self._steps(store, checkpoint.parent):
            old = f"{self._place(checkpoint.parent)}/{_folder_name(step)}"
            if finished >= checkpoints.KEEP:
                store.objects.remove(f"{old}/{checkpoints.MARKER}")  # first: what is half removed is not complete
                store.objects.remove(old)
            else:
                finished += store.objects.read(f"{old}/{checkpoints.MARKER}") is not None

    def _steps(self, store: Store, folder: Path) -> list[int]:
        """The checkpoints in the store, unfinished ones too, the newest first."""
        names = store.objects.names(self._place(folder))
        return sorted((int(found[1]) for name in names if (found := _STEP.fullmatch(name))), reverse=True)

    def _place(self, folder: Path) -> str:
        return f"stages/{self._spec.key}/checkpoints/{folder.name}"

    def _say(self, text: str, level: str = "info") -> None:
        note(self._log, text)
        with contextlib.suppress(Exception):
            self._events.emit(Event(self._spec.name, text, level=level))


def step_of(path: Path | None) -> int:
    """The step that a checkpoint's folder is named after; -1 without one."""
    return int(path.name.removeprefix("step-")) if path is not None else -1


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _sums(marker: bytes, where: str) -> Sums:
    try:
        files = json.loads(marker)["files"]
        return {str(name): {"sha256": str(each["sha256"]), "bytes": int(each["bytes"])} for name, each in files.items()}
    except UNREADABLE as error:
        raise DataError(f"{where}/{checkpoints.MARKER} is damaged: {error}", f"Remove {where}.") from None


def _link(source: str, target: str) -> None:
    """A second name for the file, or a copy where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
