"""Sec. 5.1, data on disk: WebDataset tars with one sample a frame, and a manifest that is written last.

A sample is KEY.image.jpg (portrait, RGB), KEY.alpha.png, KEY.face.jpg and KEY.meta.json (FrameMeta). The meta also
carries a CRC-32 of each member: a JPEG decoder paints over flipped bytes without a word, a checksum does not.
The bytes of a tar depend on nothing but its samples: fixed time, owner and order.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import cv2
import numpy as np
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from lavatar.configs.recipe import describe
from lavatar.contracts import MOST_RATE, MOST_SIDE, FrameMeta
from lavatar.datasets.digest import SCHEMA
from lavatar.datasets.picturesize import jpeg_size, png_size
from lavatar.datasets.tarindex import MemberSpan, members
from lavatar.errors import ShardError, StorageError

MANIFEST = "manifest.json"
IMAGE, ALPHA, FACE, META = "image.jpg", "alpha.png", "face.jpg", "meta.json"
MOST_META, MOST_MANIFEST = 2**20, 2**26
"""Bytes of JSON that are read; a sample's has about 4,000, a manifest's 60 a dropped frame."""
REDO = "Remove this folder and run the command again: preprocessing makes it anew."


def _tar(entry: dict[str, Any]) -> dict[str, Any]:
    """ValueError for what is no entry of a tar in the manifest's own folder."""
    name, sha256, samples = (entry.get(key) for key in ("name", "sha256", "samples"))
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,99}\.tar", name, re.ASCII):
        raise ValueError(f"a tar's name is {str(name)[:100]!r}, a plain one is wanted")
    if not isinstance(sha256, str) or not isinstance(samples, int) or samples < 0:
        raise ValueError(f"the entry of {name} lacks its SHA-256 or its count of samples")
    return entry


Count = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(ge=1, le=MOST_SIDE)]


@dataclass(frozen=True)
class Manifest:
    """manifest.json: what a dataset folder holds. Without it the folder is no dataset."""

    digest: str
    subject: str
    kind: str  # "video" | "synthetic"
    frames: Count
    train: Count
    eval: Count
    fps: Annotated[float, Field(ge=0, le=MOST_RATE)]
    portrait_size: Side
    face_size: Side
    tars: list[Annotated[dict[str, Any], AfterValidator(_tar)]]  # {name, sha256, samples}
    dropped: list[dict[str, Any]] = field(default_factory=list)  # {frame, reason}
    reprojection_px: float = 0.0  # mean over frames and stable landmarks, portrait pixels
    has_audio: bool = False
    source: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA


@dataclass(frozen=True)
class Sample:
    """One frame, decoded. RGB, uint8."""

    key: str
    meta: FrameMeta
    image: np.ndarray  # HW3
    alpha: np.ndarray  # HW
    face: np.ndarray  # hw3


_MANIFEST = TypeAdapter(Manifest)


def sample_key(frame: int) -> str:
    """KEY of the sample made from frame `frame` of the video; keys sort like frames."""
    return f"{frame:08d}"


def encode_jpeg(image_hwc: np.ndarray, quality: int = 95) -> bytes:
    """RGB uint8 → JPEG without chroma subsampling (4:4:4): lips and irises are a few pixels wide."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return _encode(".jpg", cv2.cvtColor(image_hwc, cv2.COLOR_RGB2BGR), options)


def encode_png(alpha_hw: np.ndarray) -> bytes:
    """One uint8 channel → PNG."""
    return _encode(".png", alpha_hw, [])


def _encode(kind: str, picture: np.ndarray, options: list[int]) -> bytes:
    done, data = cv2.imencode(kind, picture, options)
    if not done:
        raise ShardError(f"a picture of shape {picture.shape} {picture.dtype} cannot be encoded as {kind}")
    return bytes(data)


def encode_sample(
    meta: FrameMeta, image: np.ndarray, alpha: np.ndarray, face: np.ndarray, quality: int = 95
) -> dict[str, bytes]:
    """The four members of a sample; the same input gives the same bytes."""
    members = {IMAGE: encode_jpeg(image, quality), ALPHA: encode_png(alpha), FACE: encode_jpeg(face, quality)}
    data = meta.to_json()
    sums = {name: zlib.crc32(content) for name, content in members.items()}
    sums[META] = zlib.crc32(_canonical(data))
    members[META] = _canonical({**data, "crc32": sums})
    return members


def _canonical(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def decode_meta(content: bytes) -> tuple[FrameMeta, dict[str, int]]:
    """KEY.meta.json → the meta and the checksum of each member. Raises ShardError without shard and key."""
    if len(content) > MOST_META:
        raise ShardError(f"{META} has {len(content)} bytes, at most {MOST_META} are read")
    try:
        data = json.loads(content)
        sums = {name: int(data["crc32"][name]) for name in (IMAGE, ALPHA, FACE, META)}
        del data["crc32"]
        meta = FrameMeta.from_json(data)
        own = zlib.crc32(_canonical(data))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ShardError(f"{META} is damaged ({type(error).__name__}: {error})") from None
    if own != sums[META]:
        raise ShardError(f"{META} has another checksum than when it was written")
    return meta, sums


def decode_picture(name: str, content: bytes, crc32: int, side: int = 0) -> np.ndarray:
    """Member `name` (image.jpg, face.jpg → HW3 RGB; alpha.png → HW), its checksum and its size compared.

    `side` of the square that it must be; 0: any that is not huge. Raises ShardError without shard and key.
    """
    if zlib.crc32(content) != crc32:
        raise ShardError(f"{name} has another checksum than when it was written")
    size = (png_size if name == ALPHA else jpeg_size)(content)  # before the decoder believes it
    if size is None or not all(0 < length <= MOST_SIDE for length in size) or (side and size != (side, side)):
        got = "no picture" if size is None else f"{size[0]}×{size[1]}"
        raise ShardError(f"{name} is {got}, {f'{side}×{side}' if side else f'at most {MOST_SIDE}²'} was expected")
    flag = cv2.IMREAD_GRAYSCALE if name == ALPHA else cv2.IMREAD_COLOR
    picture = cv2.imdecode(np.frombuffer(content, np.uint8), flag)
    if picture is None:
        raise ShardError(f"{name} cannot be decoded")
    return picture if name == ALPHA else cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


class _HashingFile:
    """A file that is hashed as it is written: a tar is never read back to be summed."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.sha256 = stream, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.stream.write(data)


class ShardWriter:
    """Writes one tar, to a temporary name that is renamed at the end. A context manager; sets `entry` at the end."""

    def __init__(self, path: Path, quality: int = 95) -> None:
        import webdataset  # it loads torch, for which planning a job must not wait

        self.path, self.quality, self.samples = path, quality, 0
        self.entry: dict[str, Any] = {}
        self._part = path.with_name(f".{path.name}.part")
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._part.open("wb")
        self._file = _HashingFile(self._stream)
        self._tar = webdataset.TarWriter(self._file, encoder=False, user="root", group="root", mtime=0)

    def write(self, meta: FrameMeta, image: np.ndarray, alpha: np.ndarray, face: np.ndarray) -> None:
        """Append one frame. image HW3, alpha HW, face hw3, all uint8 RGB."""
        with storage_errors(self.path):
            members = encode_sample(meta, image, alpha, face, self.quality)
            self._tar.write({"__key__": sample_key(meta.frame), **members})
        self.samples += 1

    def close(self) -> dict[str, Any]:
        """Finish the tar and return its manifest entry {name, sha256, samples}."""
        with storage_errors(self.path):
            self._tar.close()
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            os.replace(self._part, self.path)
        self.entry = {"name": self.path.name, "sha256": self._file.sha256.hexdigest(), "samples": self.samples}
        return self.entry

    def abort(self) -> None:
        """Leave nothing behind."""
        self._tar.tarstream.fileobj.closed = True  # else its destructor would write again
        with contextlib.suppress(OSError):  # on a full disk what is still buffered cannot be written; it is not wanted
            self._stream.close()
        self._part.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.close()
        except BaseException:
            self.abort()
            raise


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the file system says into a StorageError that names the file and what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else (error.strerror or str(error))
        no_room = full or error.errno == errno.EFBIG  # a limit on the size of files
        hint = "Free some space, or raise the limit on it," if no_room else "Make the folder writable"
        raise StorageError(f"{path} cannot be written: {reason}", f"{hint} and run the command again.") from error


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write manifest.json, last and by rename: its presence is what makes the folder a dataset."""
    missing = [tar["name"] for tar in manifest.tars if not (folder / tar["name"]).is_file()]
    if missing:
        raise ShardError(f"{folder}: the manifest lists tars that are not there: {', '.join(missing)}", REDO)
    part, path = folder / f".{MANIFEST}.part", folder / MANIFEST
    with storage_errors(path):
        try:
            with part.open("w") as stream:
                stream.write(json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return path


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished dataset. Raises ShardError if there is none or it is not readable."""
    path = Path(folder) / MANIFEST
    try:
        with path.open() as stream:
            data = json.loads(stream.read(MOST_MANIFEST))
        if data["schema"] != SCHEMA:
            raise ShardError(f"{path} has schema {data['schema']!r:.40}, this version reads {SCHEMA}", REDO)
        return _MANIFEST.validate_python({f.name: data[f.name] for f in fields(Manifest)})
    except FileNotFoundError:
        raise ShardError(f"{folder} is no dataset: it has no {MANIFEST}", REDO) from None
    except ValidationError as error:
        raise ShardError(f"{path} is damaged ({describe(error)})", REDO) from None
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise ShardError(f"{path} is damaged ({type(error).__name__}: {error})", REDO) from None


def verify(folder: Path) -> Manifest:
    """Compare each tar with its SHA-256 in the manifest. Raises ShardError naming every tar that differs."""
    manifest = read_manifest(folder)
    bad = [reason for tar in manifest.tars if (reason := defect(folder, tar))]
    if bad:
        raise ShardError(f"{folder}: {'; '.join(bad)}", REDO)
    return manifest


def defect(folder: Path, tar: Mapping[str, Any]) -> str | None:
    """Why a tar is not the one that its manifest entry describes; None if it is."""
    path = Path(folder) / tar["name"]
    if not path.is_file():
        return f"{tar['name']} is missing"
    with path.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != tar["sha256"]:
        return f"{tar['name']} has SHA-256 {got[:12]}…, the manifest says {tar['sha256'][:12]}…"
    return None


def require_whole(folder: Path) -> None:
    """As `verify`; the error also names the samples that are damaged."""
    folder = Path(folder)
    try:
        verify(folder)
    except ShardError as error:
        found = damaged_samples(folder, read_manifest(folder))
        shown = "; ".join([error.message, *found[:3]]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise ShardError(shown, error.hint) from None


def damaged_samples(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with each sample that cannot be used, and with each tar that cannot be read on."""
    found = []
    for path in (folder / tar["name"] for tar in manifest.tars):
        try:
            with path.open("rb") as stream:
                for key, own in index_tar(path).items():
                    try:
                        _read_sample(stream, path, key, own, None, _sides(manifest))
                    except ShardError as error:
                        found.append(error.message)
        except ShardError as error:
            found.append(error.message)
        except FileNotFoundError:
            continue
    return found


def index_tar(path: Path, samples: int | None = None) -> dict[str, dict[str, MemberSpan]]:
    """KEY → member → where its bytes lie, in the order of the tar. Only headers are read."""
    spans: dict[str, dict[str, MemberSpan]] = {}
    try:
        for member, span in members(path).items():
            key, _, name = member.partition(".")
            spans.setdefault(key, {})[name] = span
    except ShardError as error:
        raise ShardError(f"{path} is damaged, {error.message}", REDO) from None
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror}", REDO) from None
    if samples is not None and len(spans) != samples:
        raise ShardError(f"{path} holds {len(spans)} samples, the manifest says {samples}", REDO)
    return spans


def iterate(folder: Path, split: str | None = None) -> Iterator[Sample]:
    """Every sample in the order of the video, decoded; only `split` ("train" | "eval") if given."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    sides = _sides(manifest)
    for tar in manifest.tars:
        path = folder / tar["name"]
        spans = index_tar(path, tar["samples"])
        with path.open("rb") as stream:
            for key, own in spans.items():
                sample = _read_sample(stream, path, key, own, split, sides)
                if sample is not None:
                    yield sample


def _sides(manifest: Manifest) -> dict[str, int]:
    """How large each picture of a sample is."""
    return {IMAGE: manifest.portrait_size, ALPHA: manifest.portrait_size, FACE: manifest.face_size}


def _read_sample(
    stream: BinaryIO,
    path: Path,
    key: str,
    spans: Mapping[str, MemberSpan],
    split: str | None,
    sides: Mapping[str, int],
) -> Sample | None:
    """Read and decode one sample; None if it belongs to the other split."""

    def read(name: str) -> bytes:
        if name not in spans:
            raise ShardError(f"{name} is missing")
        stream.seek(spans[name][0])
        return stream.read(spans[name][1])

    try:
        meta, sums = decode_meta(read(META))
        if split is not None and meta.split != split:
            return None
        image, alpha, face = (decode_picture(name, read(name), sums[name], side) for name, side in sides.items())
    except ShardError as error:
        raise ShardError(f"{path}, sample {key}: {error.message}", REDO) from None
    return Sample(key, meta, image, alpha, face)
