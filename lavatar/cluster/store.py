"""The results of stages in a store that every node reaches (LAVATAR_STORE), for nodes that share no disk.

    STORE/videos/SHA256/NAME        what was submitted, for nodes that preprocess it
    STORE/stages/KEY/files/...      what a stage left, under the names that it has in the stage's folder
                     index.json     SHA-256 and size of each; written after them
                     result.json    the stage's result, written last: no result.json, no result
                     checkpoints/   of a training (lavatar.cluster.shelf)

A stage computes in its folder in the home and is stored when it is finished. What another one needs of it is fetched
into that same place where it is not there, or not whole. Without LAVATAR_STORE the home is the store.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from lavatar.cluster.copies import MARKERS, defect, take_away_damaged
from lavatar.cluster.objects import STORE_VARIABLE, ObjectStore, Sums
from lavatar.cluster.plans import RELEASE
from lavatar.cluster.results import NAME, UNREADABLE, parse_result, read_result
from lavatar.contracts import Event, EventSink, StageKind, StageResult, StageSpec, VideoSource
from lavatar.errors import ObjectError, StorageError
from lavatar.training.files import exclusive, file_digest, storage_errors

TRAINED = (StageKind.AVATAR, StageKind.PAIR, StageKind.SHARED)
INDEX, FILES = "index.json", "files"
QUESTIONS = 16  # at once
_log = logging.getLogger("lavatar.store")
_AGAIN = "Submit again: it is made anew, or stored by who has it."


class Store:
    """The stages of one home in the store."""

    _found: ClassVar[dict[str, set[str]]] = {}  # by address: stages that this process saw finished, which they stay

    def __init__(self, home: Path, objects: ObjectStore) -> None:
        self._home, self.objects = Path(home), objects

    def check(self) -> None:
        """Raises StorageError where the store cannot be written, read and cleared."""
        name, data = f"check-{secrets.token_hex(8)}", b"lavatar"
        try:
            self.objects.write(name, data)
        except FileNotFoundError as error:  # no such bucket
            raise StorageError(
                f"the store {self.objects.url} cannot be written: {error}", f"Make it, or correct {STORE_VARIABLE}."
            ) from error
        found = self.objects.read(name)
        if found != data:
            raise StorageError(
                f"the store {self.objects.url} gave back {found!r} for {data!r}", f"Choose another {STORE_VARIABLE}."
            )
        self.objects.remove(name)

    def publish(self, spec: StageSpec) -> None:
        """The files of a finished stage, then their index; of a trained one its release alone."""
        folder = spec.out_dir / (RELEASE if spec.kind in TRAINED else "")
        files = [path.relative_to(spec.out_dir) for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [str(path) for path in files if str(path) != NAME and not any(part[0] == "." for part in path.parts)]
        sums = self.objects.put_tree(spec.out_dir, names, f"stages/{spec.key}/{FILES}")
        self.objects.write(f"stages/{spec.key}/{INDEX}", json.dumps({"files": sums}, indent=1).encode())

    def finish(self, spec: StageSpec) -> None:
        """The stage, all of whose files are stored, is finished."""
        self.objects.write(f"stages/{spec.key}/{NAME}", (spec.out_dir / NAME).read_bytes())

    def result(self, spec: StageSpec) -> StageResult | None:
        """The stage's result if it is finished. Its files are not fetched."""
        text = self.objects.read(f"stages/{spec.key}/{NAME}")
        return parse_result(spec, text) if text is not None else None

    def finished(self, keys: Iterable[str]) -> set[str]:
        """Of these stages, those that are finished."""

        def done(key: str) -> bool:
            return self.objects.read(f"stages/{key}/{NAME}") is not None

        wanted, found = set(keys), self._found.setdefault(self.objects.url, set())
        unknown = sorted(wanted - found)
        with ThreadPoolExecutor(QUESTIONS) as pool:
            found |= {key for key, is_done in zip(unknown, pool.map(done, unknown), strict=True) if is_done}
        return wanted & found

    def ask_again(self, keys: Iterable[str]) -> None:
        """What is known of these stages is forgotten: another process found them damaged."""
        self._found.get(self.objects.url, set()).difference_update(keys)

    def size_of(self, key: str) -> int:
        """Bytes of the stage's files; 0 if there are none, or nobody knows."""
        try:
            files = json.loads(self.objects.read(f"stages/{key}/{INDEX}") or b"{}").get("files", {})
            return sum(int(each["bytes"]) for each in files.values())
        except UNREADABLE:
            return 0

    def forget(self, key: str) -> None:
        """The stage and its files are removed; first what says that it is finished. Raises StorageError."""
        self._withdraw(key)
        self.objects.remove(f"stages/{key}")

    def read(self, file: Path) -> bytes | None:
        """A small file of a finished stage, by its place in the home; it is not kept there."""
        key, name = self._place(file)
        return self.objects.read(f"stages/{key}/{FILES}/{name}")

    def fetch(self, folder: Path, warn: Callable[[str], None] = _log.warning) -> int:
        """A stage's folder, or one in it, from the store, where it is not on this disk; how many bytes that were. Of
        one that is damaged here, which `warn` is told, the files that the store has otherwise.

        Stages of one node that need the same wait for each other. Raises ObjectError where the store does not have
        it or has it damaged: then the stage counts as finished no more. StorageError.
        """
        if defect(folder) is None:
            return 0
        key, part = self._place(folder)
        with self.locked(key):
            damage = defect(folder)
            if damage is None:
                return 0
            try:
                sums = self._sums(key, part)
                if damage:
                    warn(f"{damage}; the store's copy takes its place")
                    sums = self._differing(folder, sums)
                self._bring(key, part, folder, sums, keep=bool(damage))
            except ObjectError:
                self._withdraw(key)
                raise
        return sum(int(each["bytes"]) for each in sums.values())

    def _bring(self, key: str, part: str, folder: Path, sums: Sums, *, keep: bool) -> None:
        """Files of a stage into its folder, `keep`: beside what is there, of which others may be reading."""
        partial = folder.with_name(f".{folder.name}.fetch.part")
        try:
            with storage_errors(folder):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.objects.get_tree(f"stages/{key}/{FILES}/{part}".rstrip("/"), sums, partial, _AGAIN)
            if not part and not keep:
                (partial / NAME).write_bytes(self.objects.read(f"stages/{key}/{NAME}") or b"")
            with storage_errors(folder):
                if keep:
                    for name in sorted(sums, key=lambda name: Path(name).name in MARKERS):
                        (folder / name).parent.mkdir(parents=True, exist_ok=True)
                        os.replace(partial / name, folder / name)
                else:
                    shutil.rmtree(folder, ignore_errors=True)
                    os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _differing(self, folder: Path, sums: Sums) -> Sums:
        """Those of the files that are others on this disk. Raises ObjectError where all are the same: what is damaged
        here was stored so."""
        with storage_errors(folder):
            files = {name: each for name, each in sums.items() if not _is(folder / name, str(each["sha256"]))}
        if not files:
            raise ObjectError(f"{self.objects.url} has {folder.name[:12]} with the same damage", _AGAIN)
        return files

    def lacks_video(self, source: VideoSource) -> bool:
        """Whether the source has a file, and the store does not."""
        if source.path is None or not source.digest:
            return False
        return source.path.name not in self.objects.names(f"videos/{source.digest}")

    def keep_video(self, source: VideoSource) -> None:
        """The source's file, if the store does not have it."""
        if source.path is not None and self.lacks_video(source):
            self.objects.put_tree(source.path.parent, [source.path.name], f"videos/{source.digest}")

    def video_size(self, digest: str) -> int | None:
        """Bytes of a video; None where the store does not have it."""
        return self.objects.size(f"videos/{digest}")

    def forget_video(self, digest: str) -> None:
        """The video is removed. Raises StorageError."""
        self.objects.remove(f"videos/{digest}")

    def fetch_video(self, source: VideoSource) -> VideoSource:
        """The source with its file on this disk. Raises ObjectError, StorageError."""
        if source.path is None or not source.digest or source.path.exists():
            return source
        folder, name = self._home / "videos" / source.digest, source.path.name
        with self.locked(source.digest):
            if not (folder / name).exists():
                partial = folder.with_name(f".{source.digest}.fetch.part")
                sums = {name: {"sha256": source.digest}}
                way_out = f"Put it back at {source.path}, or submit from where it is: it is stored from there."
                try:
                    self.objects.get_tree(f"videos/{source.digest}", sums, partial, way_out)
                    with storage_errors(folder):
                        os.replace(partial, folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
        return replace(source, path=folder / name)

    def locked(self, key: str) -> Any:
        """One process of this node at a time fetches for the stage."""
        return exclusive(self._home / "cache" / "store" / f"{key[:2]}.lock")

    def _sums(self, key: str, part: str) -> Sums:
        """The files in `part` of a stage's folder, named from there."""
        name = f"stages/{key}/{INDEX}"
        text = self.objects.read(name)
        where = f"{self.objects.url}/{name}"
        if text is None:
            raise ObjectError(
                f"what stage {key[:12]} left is neither on this disk nor in the store: there is no {where}",
                _AGAIN,
            )
        begin = f"{part}/" if part else ""
        try:
            files = json.loads(text)["files"]
            sums = {n.removeprefix(begin): dict(each) for n, each in files.items() if n.startswith(begin)}
            for each in sums.values():
                str(each["sha256"]), int(each["bytes"])
        except UNREADABLE as error:
            raise ObjectError(f"{where} is damaged: {error}", _AGAIN) from None
        if not sums:
            raise ObjectError(f"{where} has no {part!r}", _AGAIN)
        return sums

    def _withdraw(self, key: str) -> None:
        """The stage is not finished any more."""
        self.ask_again([key])
        self.objects.remove(f"stages/{key}/{NAME}")

    def _place(self, path: Path) -> tuple[str, str]:
        """Key of the stage that the path is of, and its place in the stage's folder."""
        _, key, *rest = path.relative_to(self._home).parts
        return key, "/".join(rest)


def open_store(home: Path, say: Callable[[str], None] = logging.getLogger("lavatar.store").info) -> Store | None:
    """The store that LAVATAR_STORE names; None: there is none but the home. Raises ConfigError."""
    url = os.environ.get(STORE_VARIABLE, "").strip()
    return Store(home, ObjectStore(url, say)) if url else None


def _is(file: Path, sha256: str) -> bool:
    return file.is_file() and file_digest(file) == sha256


def earlier_result(spec: StageSpec, store: Store | None, events: EventSink) -> StageResult | None:
    """The result of an earlier run. Where there is a store it is finished there, and stored now if it is only here; a
    damaged dataset is not, and what is whole of it is left for the next run."""
    kept = read_result(spec)
    if store is None:
        return kept
    stored = store.result(spec)
    if kept is None or stored is not None:
        return kept or stored
    if spec.kind is StageKind.PREPROCESS:
        damage = defect(spec.out_dir)
        if damage and take_away_damaged(spec.out_dir):
            events.emit(Event(spec.name, f"{damage}: it is made again", level="warning"))
            return None
    store.publish(spec)
    store.finish(spec)
    return kept


def fetch_inputs(spec: StageSpec, store: Store | None, events: EventSink) -> None:
    """What a stage needs of others, from the store onto this disk where it is not there, or damaged."""
    if store is None:
        return

    def warn(text: str) -> None:
        events.emit(Event(spec.name, text, level="warning"))

    fetched = {role: store.fetch(folder, warn) for role, folder in spec.inputs.items()}
    if any(fetched.values()):
        roles = ", ".join(role for role, size in fetched.items() if size)
        events.emit(Event(spec.name, f"{sum(fetched.values()) / 1e6:.1f} MB fetched from the store: {roles}"))


def with_videos(spec: StageSpec, store: Store | None) -> StageSpec:
    """The stage with the files of its sources on this disk."""
    if store is None:
        return spec
    return replace(spec, sources={role: store.fetch_video(source) for role, source in spec.sources.items()})


def brought(spec: StageSpec, result: StageResult) -> StageResult:
    """The result, on the disk of whoever asked for the stage; models are fetched when they are needed."""
    store = open_store(spec.home)
    if store is not None and spec.kind is StageKind.PREVIEW:
        store.fetch(spec.out_dir)
    return result
