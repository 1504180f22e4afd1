"""Video files as containers: opening them, and whether all of one is there.

A video comes from anywhere. Only containers of recordings are opened (what ffmpeg calls formats can also be playlists
and scripts that name other files), and nothing but the file itself; sizes, rates and lengths that no recording of a
face has are refused before memory is spent on them.

A file that was cut off while it was copied still opens, and its first frames decode. Whether its end is there is told
by reading it through without decoding, which takes no longer than a digest of its bytes.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import av
from av.video.stream import VideoStream

from lavatar.contracts import MOST_RATE
from lavatar.errors import VideoError

NOT_A_VIDEO = "Give a video file that ffmpeg can read (mp4, webm, mov, mkv, …)."
DAMAGED = "The file is truncated or damaged: copy or export it again."

MOST_SIDE, MOST_PIXELS = 8192, 8192 * 4320
MOST_SECONDS = 4 * 3600.0
MOST_FRAMES = 1_000_000
FORMATS = (
    "mov", "matroska", "webm", "avi", "ogg", "flv", "mpeg", "mpegts", "mpegvideo", "asf", "m4v", "h264", "hevc", "ivf",
    "mxf", "nut",
)  # fmt: skip
_OPTIONS = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file", "max_pixels": str(MOST_PIXELS)}

END_TOLERANCE = 0.5  # seconds: headers round, and a frame's own length is not always known
_BOXES = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp"}
_MAGICS = (b"\x1a\x45\xdf\xa3", b"RIFF", b"OggS", b"FLV", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3", b"0&\xb2u")


def open_video(path: Path) -> av.container.InputContainer:
    """VideoError for a path that leads to no file, and for a file that holds no video."""
    path = Path(path)
    if path.is_dir():
        raise VideoError(f"{path}: it is a folder", "Name the video file in it.")
    if not path.is_file():
        raise VideoError(f"{path}: there is no such file", "Check the path.")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: the file is empty", NOT_A_VIDEO)
    try:
        return av.open(str(path.absolute()), options=_OPTIONS)
    except PermissionError as error:
        raise VideoError(f"{path}: it cannot be read: no permission", "Make it readable (chmod u+r).") from error
    except (av.FFmpegError, UnicodeError, ValueError) as error:
        if _begins_like_a_video(path):
            raise VideoError(f"{path}: it cannot be read to its end ({reason(error)})", DAMAGED) from error
        raise VideoError(f"{path}: it is not a video", NOT_A_VIDEO) from error


def video_stream(container: av.container.InputContainer, path: Path) -> VideoStream:
    """The first video track. VideoError without one."""
    if not container.streams.video:
        raise VideoError(f"{path}: there is no video track in it", NOT_A_VIDEO)
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise VideoError(f"{path}: this ffmpeg cannot decode its pictures", NOT_A_VIDEO)
    width, height = stream.codec_context.width, stream.codec_context.height
    if max(width, height) > MOST_SIDE or width * height > MOST_PIXELS:
        raise VideoError(
            f"{path}: its pictures are {width}×{height}, at most {MOST_PIXELS} pixels are taken", "Scale it down."
        )
    stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}  # where the size changes later on
    stream.thread_type = "AUTO"
    return stream


def require_sane(path: Path, frames: int, seconds: float) -> None:
    """Raises VideoError for a rate or a length that is no recording's, from the time stamps: headers guess."""
    rate = (frames - 1) / seconds if seconds > 0 else float("inf")
    if frames > 1 and rate > MOST_RATE:
        raise VideoError(
            f"{path}: {frames} frames in {seconds:.3f} s, at most {MOST_RATE:g} a second are taken",
            "Its time stamps are wrong, or it is slow motion: export it at 25 to 60 frames a second.",
        )
    if frames > MOST_FRAMES or seconds > MOST_SECONDS:
        raise VideoError(
            f"{path}: {frames} frames over {seconds:.0f} s, at most {MOST_FRAMES} over {MOST_SECONDS:.0f} s are taken",
            "Cut out the minutes that show the face.",
        )


def reason(error: Exception) -> str:
    """ffmpeg's words without its number and the path, which we name ourselves."""
    return (getattr(error, "strerror", None) or str(error)).lower()


def duration(container: av.container.InputContainer, stream: VideoStream) -> float | None:
    """Seconds, as the header says."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else None


def require_whole(path: Path) -> float:
    """Raises VideoError when the file ends before its header says. Returns the last frame's time stamp in seconds.

    mp4 says how long each track is; WebM and Matroska how long the longest is, so there the sound's end counts too. A
    last frame may stand as long as the longest pause before it (variable frame rates). A file without a length, as
    browsers record it, cannot be checked.
    """
    with open_video(path) as container:
        stream = video_stream(container, path)
        stamps, end, any_end = _read_through(path, container, stream)
        require_sane(path, len(stamps), stamps[-1] - stamps[0])
        names = container.format.name.split(",")
        reached, length = end - stamps[0], duration(container, stream) or 0.0
        slack = END_TOLERANCE
        if "matroska" in names:
            reached, length = any_end, (container.duration or 0) / av.time_base
        elif "mov" in names:
            length = float((stream.duration or 0) * (stream.time_base or 0))
        else:  # the length may be ffmpeg's guess from the bit rate; AVI's header has a count of frames
            slack = 1.0 + length / 20
            if len(stamps) < stream.frames - max(3, stream.frames // 50):
                raise VideoError(f"{path}: {len(stamps)} of {stream.frames} frames are in it", DAMAGED)
    pause = max((later - stamp for stamp, later in itertools.pairwise(stamps)), default=0.0)
    if reached < length - slack - pause:
        raise VideoError(f"{path}: it ends after {reached:.1f} of {length:.1f} s", DAMAGED)
    return stamps[-1]


def _read_through(
    path: Path, container: av.container.InputContainer, stream: VideoStream
) -> tuple[list[float], float, float]:
    """All packets: time stamps of the frames in order, the end of the last one, and of the last of any track."""
    stamps: list[float] = []
    end = any_end = 0.0
    try:
        for packet in container.demux():
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is None or packet.time_base is None or packet.is_corrupt or packet.is_discard:
                continue
            packet_end = float((stamp + (packet.duration or 0)) * packet.time_base)
            any_end = max(any_end, packet_end)
            if packet.stream.index == stream.index:
                stamps.append(float(stamp * packet.time_base))
                end = max(end, packet_end)
                if len(stamps) > MOST_FRAMES:
                    break
    except av.FFmpegError as error:
        raise VideoError(f"{path}: reading stopped after {end:.1f} s ({reason(error)})", DAMAGED) from error
    if not stamps:
        raise VideoError(f"{path}: there is no frame in it", DAMAGED)
    return sorted(stamps), end, any_end


def _begins_like_a_video(path: Path) -> bool:
    """Whether the first bytes are those of a usual container, so that what follows must be what is wrong."""
    with path.open("rb") as file:
        head = file.read(12)
    return head[4:8] in _BOXES or head.startswith(_MAGICS)
