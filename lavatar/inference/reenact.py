"""Fig. 4: faces in, portraits of the avatar out. Everything streams: batches of pictures are in memory, never a video.

Shapes: B batch, N frames, D code, H portrait side, h face side. Pictures outside the models are uint8 RGB, BHW3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lavatar.configs.evaluation import EvaluationConfig
from lavatar.configs.preprocess import PreprocessConfig
from lavatar.contracts import Event, EventSink, NullSink
from lavatar.datasets.coefficients import coefficients
from lavatar.datasets.loader import FrameStore
from lavatar.inference.ahead import ahead
from lavatar.inference.audio import AudioSpan
from lavatar.inference.encode_video import EncodedVideo, constant_rate, write_video
from lavatar.inference.loading import Avatar, Pair
from lavatar.inference.panels import fit
from lavatar.inference.pictures import to_pictures
from lavatar.inference.retarget import PoseStatistics, PoseTrack, mean_pose, retarget, smoothed


@dataclass(frozen=True)
class Portraits:
    """A batch of results: positions in the store or clip, and the portraits."""

    index_B: np.ndarray
    images_BHW3: np.ndarray


def chunks(indices: Sequence[int] | np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Consecutive pieces of at most `size`."""
    array = np.asarray(indices, np.int64)
    for start in range(0, len(array), size):
        yield array[start : start + size]


def faces_of(store: FrameStore, index_B: np.ndarray) -> np.ndarray:
    """The face crops of some frames, uint8 (B, h, h, 3)."""
    return np.stack([store.frame(int(i)).face for i in index_B])


def poses_of(store: FrameStore) -> PoseTrack:
    """The head poses of all frames of a store."""
    return PoseTrack(store.rotation_N33.astype(float), store.translation_N3.astype(float), store.scale_N.astype(float))


@torch.inference_mode()
def draw(avatar: Avatar, theta_BD: Tensor, poses: PoseTrack) -> np.ndarray:
    """Eq. 3: the portraits of codes under poses, uint8 (B, H, W, 3)."""
    rotation, translation, scale = (
        torch.as_tensor(a, dtype=torch.float32, device=avatar.device)
        for a in (poses.rotation_N33, poses.translation_N3, poses.scale_N)
    )
    return to_pictures(avatar.model.render(theta_BD, rotation, translation, scale, noise=False).I_hr)


def driven_codes(avatar: Avatar, store: FrameStore, index_B: np.ndarray) -> Tensor:
    """θ of frames of a store by the avatar's own encoder: of their faces (Eq. 2) or their coefficients (Sec. 5.2)."""
    if avatar.config.encoder != "coefficients":
        return self_codes(avatar, faces_of(store, index_B))
    with torch.inference_mode():
        chosen = torch.from_numpy(coefficients(store)[np.asarray(index_B)])
        return avatar.model.encode(chosen.to(avatar.device))


def self_codes(avatar: Avatar, faces_BhW3: np.ndarray) -> Tensor:
    """Eq. 2: θ_p of faces of the avatar itself."""
    with torch.inference_mode():
        return avatar.model.encode(avatar.face_input(faces_BhW3))


def cross_codes(pair: Pair, faces_BhW3: np.ndarray) -> Tensor:
    """Fig. 4: θ of the actor's faces through E_shared and the mapping MLP."""
    with torch.inference_mode():
        theta_BD: Tensor = pair.mapping(pair.ynet.encode(pair.face_input(faces_BhW3)), "actor")
        return theta_BD


def reenact_self(
    avatar: Avatar, store: FrameStore, indices: np.ndarray, batch_size: int, smoothing: float = 0.0
) -> Iterator[Portraits]:
    """Self reenactment: each frame's own face and pose (Gaussian smoothed in time, `smoothing` frames)."""
    poses = smoothed(poses_of(store), smoothing)
    for index_B in chunks(indices, batch_size):
        yield Portraits(index_B, draw(avatar, driven_codes(avatar, store, index_B), poses[index_B]))


def reenact_cross(
    avatar: Avatar, pair: Pair | None, actor: FrameStore, indices: np.ndarray, poses: PoseTrack, batch_size: int
) -> Iterator[Portraits]:
    """Cross reenactment of the actor's frames; `poses` are the avatar's, one for each of `indices`.

    Without a pair what drives the avatar itself is taken from the actor: coefficients mean the same on every face, as
    far as their template is right (Sec. 5.2).
    """
    for part in chunks(np.arange(len(indices)), batch_size):
        index_B = np.asarray(indices)[part]
        codes = driven_codes(avatar, actor, index_B) if pair is None else cross_codes(pair, faces_of(actor, index_B))
        yield Portraits(index_B, draw(avatar, codes, poses[part]))


def driven_poses(avatar_poses: PoseStatistics, actor: PoseTrack, indices: np.ndarray, smoothing: float) -> PoseTrack:
    """The avatar's poses for frames `indices` of an actor: motion about the mean of those frames, carried over."""
    track = actor[indices]
    return retarget(track, mean_pose(track), avatar_poses, smoothing)


def reenact_video(
    avatar: Avatar,
    pair: Pair,
    video: Path,
    out: Path,
    preprocess: PreprocessConfig,
    evaluation: EvaluationConfig | None = None,
    *,
    events: EventSink | None = None,
    stage: str = "reenact",
) -> EncodedVideo:
    """`lavatar reenact`: the avatar driven by any video, as an mp4 of the result alone with the video's sound.

    The head moves as the driver's does about its own mean, within what the avatar's training showed. Frames without
    a face repeat the picture before them. Raises VideoError and FaceError for what cannot be driven from.
    """
    from lavatar.datasets.driver import track_driver  # the trackers' imports are heavy
    from lavatar.datasets.video import probe

    evaluation, events = evaluation or EvaluationConfig(), events or NullSink()
    info = probe(video)
    driver = preprocess.model_copy(update={"min_frames": 2})  # nothing is trained on it: a short one will do
    clip = track_driver(video, driver, events=events, stage=stage)
    if clip.dropped:
        text = f"{len(clip.dropped)} frames of {video.name} have no usable face and hold the picture before"
        events.emit(Event(stage, text, level="warning"))
    track = PoseTrack.of(clip.poses)
    poses = driven_poses(avatar.poses, track, np.arange(len(track)), evaluation.pose_smoothing)

    def pictures() -> Iterator[tuple[float, np.ndarray]]:
        for part in chunks(np.arange(len(track)), evaluation.batch_size):
            images = draw(avatar, cross_codes(pair, clip.faces_NHW3[part]), poses[part])
            for i, image in zip(part, images, strict=True):
                yield float(clip.times[i]), fit(image, evaluation.panel_size)
            events.emit(Event(stage, "drawing", done=int(part[-1]) + 1, total=len(track), unit="frames"))

    fps = frame_rate(clip.indices, clip.times, info.fps)
    start, end = float(clip.times[0]), float(clip.times[-1]) + 1 / fps
    audio = AudioSpan(video, start, end - start) if info.has_audio else None
    with closing(ahead(pictures(), 2 * evaluation.batch_size)) as drawn:
        return write_video(out, constant_rate(drawn, fps), fps, audio, evaluation.crf)


def frame_rate(indices: Sequence[int] | np.ndarray, times: Sequence[float] | np.ndarray, nominal: float) -> float:
    """Frames a second for the mp4: what the header says if the time stamps agree within 2 %, else their mean rate."""
    span = float(times[-1]) - float(times[0])
    measured = (int(indices[-1]) - int(indices[0])) / span if span > 0 else 0.0
    if nominal > 0 and (measured <= 0 or abs(measured / nominal - 1) < 0.02):
        return min(nominal, 120.0)
    return min(measured or 25.0, 120.0)
