"""Subjects: adding, finding, listing and removing people by name."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import or_, select

from lavatar.contracts import VideoSource
from lavatar.datasets.digest import file_digest
from lavatar.errors import DataError, NameError_, StageBusyError, UnknownSubjectError, UsageError
from lavatar.platform.jsonable import plain
from lavatar.platform.leases import owner_alive
from lavatar.platform.registry import Registry, hold_stages, now
from lavatar.platform.states import State
from lavatar.platform.tables import Job, JobPair, Subject

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LONGEST = 80
_MOST_NAMED = 12


def check_name(name: str) -> str:
    """`name`, if it can name a subject: it becomes part of paths, run names and model names. Else NameError_."""
    if _NAME.fullmatch(name) and ".." not in name and len(name) <= _LONGEST:
        return name
    raise NameError_(
        f"{name!r} cannot be a subject's name",
        f"Use letters, digits, '_', '.' and '-' (not first, no '..'), at most {_LONGEST}: say {suggest(name)!r}.",
    )


def suggest(text: str) -> str:
    """The nearest name that can be one."""
    cleaned = re.sub(r"\.\.+", ".", re.sub(r"[^A-Za-z0-9_.-]+", "_", text)).strip("_.-")
    return cleaned[:_LONGEST] or "person"


def require_file(path: Path) -> None:
    """Raises UsageError for a path on the command line that leads to no file, or to one that cannot be opened."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a video", "Name the video file in it.")
    if not path.exists():
        raise UsageError(f"there is no file {path}", "Check the path.")
    if not os.access(path, os.R_OK):
        raise UsageError(f"{path} cannot be read: no permission", f"Allow it: chmod u+r {shlex.quote(str(path))}")


def describe_video(name: str, path: Path) -> Subject:
    """A subject from a video file, not yet stored: probed, read through and digested.

    Raises UsageError where there is no file to read, VideoError where what is in it is no video or not all of one.
    """
    from lavatar.datasets.container import require_whole
    from lavatar.datasets.video import probe

    path = path.expanduser().absolute()
    require_file(path)
    info = probe(path)
    require_whole(path)
    stat = path.stat()
    return Subject(
        name=check_name(name),
        kind="video",
        digest=file_digest(path),
        path=str(path),
        size=stat.st_size,
        modified_ns=stat.st_mtime_ns,
        video=plain(asdict(info)),
        created=now(),
    )


def describe_synthetic(name: str, seed: int) -> Subject:
    """A synthetic subject, not yet stored."""
    if not 0 <= seed < 2**31:
        raise UsageError(f"seed {seed} is out of range", "Give a seed from 0 to 2147483647.")
    digest = hashlib.sha256(f"synthetic subject {seed}".encode()).hexdigest()
    return Subject(name=check_name(name), kind="synthetic", digest=digest, synthetic_seed=seed, video={}, created=now())


def add_subject(registry: Registry, subject: Subject) -> tuple[Subject, bool]:
    """Store `subject`. (row, True if new); the same name with the same bytes is the same subject, wherever it lies."""
    with registry.write() as session:
        hold_stages(session)  # and no video is freed meanwhile
        present = session.scalar(select(Subject).where(Subject.name == subject.name).with_for_update())
        if present is None:
            session.add(subject)
            return subject, True
        _require_same(present, subject)
        present.path, present.size, present.modified_ns = subject.path, subject.size, subject.modified_ns
        return present, False


def _require_same(present: Subject, subject: Subject) -> None:
    """Raises NameError_ where the name of `subject` stands for somebody else already."""
    if present.digest != subject.digest:
        raise NameError_(
            f"the name {subject.name!r} is taken by another {'video' if present.path else 'subject'}: "
            f"{describe_source(present)}",
            f"Choose another name, or first run: lavatar subjects remove {subject.name}",
        )


def find_subject(registry: Registry, name: str) -> Subject | None:
    if not _NAME.fullmatch(name):  # a path, or text that no database takes
        return None
    with registry.read() as session:
        return session.scalar(select(Subject).where(Subject.name == name))


def get_subject(registry: Registry, name: str, *, wanted: bool = True) -> Subject:
    """The subject of that name. Raises UnknownSubjectError, naming the nearest, and how to add it where it is wanted
    (to be shown or removed it is not)."""
    subject = find_subject(registry, name)
    if subject is not None:
        return subject
    known = [s.name for s in list_subjects(registry)]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    shown = ", ".join(known[:_MOST_NAMED]) + (", …" if len(known) > _MOST_NAMED else "")
    hint += f"Known: {shown}. " if known else ""
    way_out = f"Add it: lavatar subjects add {suggest(name)} VIDEO" if wanted else "See them: lavatar subjects list"
    raise UnknownSubjectError(f"there is no subject {name!r}", hint + way_out)


def list_subjects(registry: Registry) -> list[Subject]:
    with registry.read() as session:
        return list(session.scalars(select(Subject).order_by(Subject.name)))


def remove_subject(registry: Registry, name: str) -> Subject:
    """Forget a subject; its finished results stay. Raises StageBusyError while a job with it runs."""
    subject = get_subject(registry, name, wanted=False)
    with registry.write() as session:
        named = select(JobPair.job_id).where(or_(JobPair.avatar == name, JobPair.actor == name))
        running = select(Job).where(Job.id.in_(named), Job.state == State.RUNNING.value)
        for job in session.scalars(running):
            if owner_alive(job):
                raise StageBusyError(
                    f"subject {name!r} cannot be removed: {job!r} is running with it (process {job.owner_pid})",
                    f"Wait for it, or end it first: kill {job.owner_pid}",
                )
        session.delete(session.merge(subject, load=True))
    return subject


def resolve(registry: Registry, name_or_path: str) -> Subject:
    """A subject by its name, or by a path to a video, named after the file and not yet stored (`add_subject`)."""
    present = find_subject(registry, name_or_path)
    if present is not None:
        return present
    gone = UnknownSubjectError(f"there is no file {name_or_path[:200]}, and no subject of that name", "Check the path.")
    try:
        path = Path(name_or_path).expanduser()
        if not (path.is_file() or "/" in name_or_path or path.suffix.lower() in VIDEO_SUFFIXES):
            return get_subject(registry, name_or_path)  # raises, naming the nearest
        if not path.exists():
            raise gone
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte in it, a home of nobody
        raise gone from None
    require_file(path)
    try:
        check_name(path.stem)
    except NameError_ as error:
        command = shlex.join(["lavatar", "subjects", "add", suggest(path.stem), str(path)])
        raise NameError_(f"{path.name}: {error.message}", f"Name it yourself: {command}") from error
    subject = describe_video(path.stem, path)
    same_name = find_subject(registry, subject.name)
    if same_name is not None:
        _require_same(same_name, subject)
    return subject


VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v", ".mpg", ".mpeg", ".ogv"})


def source_of(subject: Subject) -> VideoSource:
    """Where the subject's frames come from, as stages want it."""
    if subject.path is None:
        return VideoSource(name=subject.name, synthetic_seed=subject.synthetic_seed)
    return VideoSource(name=subject.name, path=Path(subject.path), digest=subject.digest)


def require_unchanged(subject: Subject) -> None:
    """Raises DataError when the subject's video is gone or is not the one that was added."""
    if subject.path is None:
        return
    path = Path(subject.path)
    if not path.is_file():
        raise DataError(
            f"the video of subject {subject.name!r} is gone: {path}",
            f"Put it back, or run: lavatar subjects add {subject.name} NEW_PATH (the same file elsewhere)",
        )
    stat = path.stat()
    if (stat.st_size, stat.st_mtime_ns) == (subject.size, subject.modified_ns):
        return
    if file_digest(path) != subject.digest:
        raise DataError(
            f"the video of subject {subject.name!r} has changed since it was added: {path}",
            f"Add it under another name, or run: lavatar subjects remove {subject.name}, then add it again.",
        )


def describe_source(subject: Subject) -> str:
    """For people: the path, or the seed."""
    return subject.path or f"synthetic, seed {subject.synthetic_seed}"


def to_json(subject: Subject) -> dict[str, Any]:
    """The subject as `lavatar subjects --json` prints it."""
    return {
        "name": subject.name,
        "kind": subject.kind,
        "path": subject.path,
        "seed": subject.synthetic_seed,
        "digest": subject.digest,
        "video": subject.video or None,
    }
