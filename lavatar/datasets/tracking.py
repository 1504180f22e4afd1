"""Sec. 5.1 (68 landmarks): face trackers. Landmarks are in pixels of the frame given (pixel centres at +0.5).

`mediapipe` gives 478 points and 52 expression coefficients, from which the 68 and the six measures of
`contracts.EXPRESSIONS` are taken by fixed tables. `face_alignment` gives 68 points, and measures by their geometry.
"""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import cv2
import numpy as np

from lavatar.datasets import weights
from lavatar.errors import ConfigError, WeightsError

LANDMARKS_68 = (
    *(127, 234, 93, 132, 58, 136, 150, 176, 152, 400, 379, 365, 288, 361, 323, 454, 356),  # jaw, image left to right
    *(70, 63, 105, 66, 107),  # brow, image left
    *(336, 296, 334, 293, 300),  # brow, image right
    *(168, 197, 5, 4),  # bridge of the nose, down
    *(98, 97, 2, 326, 327),  # under the nose
    *(33, 160, 158, 133, 153, 144),  # eye, image left, clockwise
    *(362, 385, 387, 263, 373, 380),  # eye, image right
    *(61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181),  # outer lips, clockwise
    *(78, 82, 13, 312, 308, 317, 14, 87),  # inner lips
)
"""MediaPipe's points that stand for the 68 of the iBUG scheme."""

IRISES = (468, 473)
"""MediaPipe's middles of the irises, image left first."""

Box = tuple[float, float, float, float, float]
"""x, y, width, height in pixels, score"""

COMPARABLE_FACE = 0.5
"""A second face at least this many times as wide as the first makes a frame ambiguous; a smaller one is background."""


@dataclass(frozen=True)
class Track:
    """One face in one frame. `faces` counts faces of comparable size, this one included."""

    landmarks478: np.ndarray | None  # 478×3: x, y in pixels, z in pixels towards the camera negative
    landmarks68: np.ndarray  # 68×2 pixels
    expression: dict[str, float]
    score: float
    faces: int = 1

    @property
    def irises(self) -> np.ndarray:
        """2×2 pixels, image left first; 0×2 where the tracker does not see them."""
        return np.zeros((0, 2)) if self.landmarks478 is None else self.landmarks478[IRISES, :2]


class Tracker(Protocol):
    """Frames in order of time; a tracker may use what it saw in the frames before."""

    def track(self, rgb: np.ndarray, time: float) -> Track | None:
        """The largest face of a uint8 HWC frame, or None."""
        ...

    def close(self) -> None: ...


def open_tracker(name: str, mode: Literal["video", "image"] = "video", device: str = "cpu") -> Tracker:
    """A tracker by its name in the configuration. WeightsError where its file is missing."""
    if name == "mediapipe":
        return MediapipeTracker(mode)
    if name == "face_alignment":
        return FaceAlignmentTracker(device)
    raise ConfigError(f"there is no tracker {name!r} for pictures", "Set preprocess.tracker to mediapipe.")


class MediapipeTracker:
    """MediaPipe Face Landmarker, and the face detector inside the same file to count faces.

    `mode` video follows the face from frame to frame, which halves the jitter; image looks at each frame alone.
    """

    def __init__(self, mode: Literal["video", "image"] = "video") -> None:
        from mediapipe.tasks.python import BaseOptions, vision

        path = weights.find("face_landmarker")
        try:
            detector = zipfile.ZipFile(path).read("face_detector.tflite")
        except (zipfile.BadZipFile, KeyError) as error:
            hint = f"Delete it and run: {weights.FETCH} face_landmarker"
            raise WeightsError(f"{path}: there is no face detector in it", hint) from error
        self._video = mode == "video"
        self._clock = -1
        self._last: np.ndarray | None = None  # centre of the face followed, pixels
        running = vision.RunningMode.VIDEO if self._video else vision.RunningMode.IMAGE
        self._landmarker = vision.FaceLandmarker.create_from_options(
            vision.FaceLandmarkerOptions(
                base_options=BaseOptions(model_asset_path=str(path)),
                running_mode=running,
                num_faces=1,
                output_face_blendshapes=True,
            )
        )
        self._detector = vision.FaceDetector.create_from_options(
            vision.FaceDetectorOptions(base_options=BaseOptions(model_asset_buffer=detector))
        )

    def track(self, rgb: np.ndarray, time: float) -> Track | None:
        import mediapipe

        rgb = np.ascontiguousarray(rgb)
        boxes = self._detect(mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=rgb))
        seen = _hide(rgb, self._others(boxes)) if len(boxes) > 1 else rgb
        image = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=seen)
        if self._video:
            self._clock = max(self._clock + 1, round(time * 1000))
            found = self._landmarker.detect_for_video(image, self._clock)
        else:
            found = self._landmarker.detect(image)
        if not found.face_landmarks:
            self._last = None
            return None
        height, width = rgb.shape[:2]
        size = np.array([width, height, width], np.float32)
        points = np.array([(p.x, p.y, p.z) for p in found.face_landmarks[0]], np.float32) * size
        self._last = points[:, :2].mean(0)
        raw = {c.category_name: float(c.score) for c in found.face_blendshapes[0]}
        return Track(
            landmarks478=points,
            landmarks68=points[LANDMARKS_68, :2],
            expression=expression_measures(raw),
            score=boxes[0][4] if boxes else 0.5,
            faces=max(1, sum(1 for b in boxes if b[2] >= COMPARABLE_FACE * boxes[0][2])),
        )

    def _others(self, boxes: list[Box]) -> list[Box]:
        """All but the face that is followed: of those of comparable size the nearest to the last, else the widest."""
        large = [b for b in boxes if b[2] >= COMPARABLE_FACE * boxes[0][2]]
        main = boxes[0]
        if self._video and self._last is not None:
            x, y = self._last
            main = min(large, key=lambda b: (b[0] + b[2] / 2 - x) ** 2 + (b[1] + b[3] / 2 - y) ** 2)
        return [b for b in boxes if b is not main]

    def _detect(self, image: Any) -> list[Box]:
        """Widest first."""
        boxes = [
            (d.bounding_box.origin_x, d.bounding_box.origin_y, d.bounding_box.width, d.bounding_box.height,
             float(d.categories[0].score))
            for d in self._detector.detect(image).detections
        ]  # fmt: skip
        return sorted(boxes, key=lambda b: -b[2])

    def close(self) -> None:
        self._landmarker.close()
        self._detector.close()


def _hide(rgb: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    """Blur away the other faces, so that the landmarks are looked for in the largest."""
    hidden = rgb.copy()
    height, width = rgb.shape[:2]
    for x, y, w, h, _ in boxes:
        x0, y0 = max(0, int(x - 0.2 * w)), max(0, int(y - 0.4 * h))
        x1, y1 = min(width, int(x + 1.2 * w)), min(height, int(y + 1.1 * h))
        if x1 > x0 and y1 > y0:
            hidden[y0:y1, x0:x1] = hidden[y0:y1, x0:x1].mean(axis=(0, 1)).astype(np.uint8)
    return hidden


def expression_measures(raw: Mapping[str, float]) -> dict[str, float]:
    """The six measures of `contracts.EXPRESSIONS` and the 52 coefficients under "mp.<name>".

    Left and right in MediaPipe's names are the person's. Gaze is positive to the image right: the person's left eye
    turns out and the right eye turns in.
    """
    get = lambda name: float(raw.get(name, 0.0))  # noqa: E731
    measures = {
        "jaw": get("jawOpen"),
        "blink": (get("eyeBlinkLeft") + get("eyeBlinkRight")) / 2,
        "smile": (get("mouthSmileLeft") + get("mouthSmileRight")) / 2,
        "pucker": get("mouthPucker"),
        "brows": (get("browInnerUp") + get("browOuterUpLeft") + get("browOuterUpRight")) / 3
        - (get("browDownLeft") + get("browDownRight")) / 2,
        "gaze": ((get("eyeLookOutLeft") - get("eyeLookInLeft")) + (get("eyeLookInRight") - get("eyeLookOutRight"))) / 2,
    }
    return {**measures, **{f"mp.{name}": float(value) for name, value in raw.items() if name != "_neutral"}}


class FaceAlignmentTracker:
    """face-alignment's 2D network: 68 points, and the five measures that points alone can give (no gaze).

    WeightsError where one of its two files is missing.
    """

    def __init__(self, device: str = "cpu", network: Any = None) -> None:
        self._network = network or self._load(device)

    @staticmethod
    def _load(device: str) -> Any:
        """From the files of the weights table: left to itself the package downloads them unchecked into torch's cache.

        Both are state dictionaries, read with weights_only=True. Not compiled: that keeps a cache outside of our
        folders, and another compiler's result is not the same to the byte.
        """
        alignment, detector = weights.find("fan_2d"), weights.find("s3fd")
        import torch

        # torchvision's CUDA wheel lacks two registered operators beside a CPU torch, and then cannot be imported.
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for name in ("nms", "qnms"):
            with contextlib.suppress(RuntimeError):  # already there
                torch.library.define(f"torchvision::{name}", schema)
        from face_alignment import FaceAlignment, LandmarksType
        from face_alignment.models import FAN

        class FromFiles(FaceAlignment):  # a path can be given for the detector alone
            def _load_native(self, network_name: str, network_size: int, device: str, dtype: Any) -> Any:
                network = FAN(network_size)
                network.load_state_dict(torch.load(alignment, map_location=device, weights_only=True))
                return network.to(device, dtype=dtype).eval()

        try:
            return FromFiles(
                LandmarksType.TWO_D,
                device=device,
                face_detector_kwargs={"path_to_detector": str(detector)},
                compile=False,
            )
        except (RuntimeError, pickle.UnpicklingError) as error:
            message = f"{alignment} or {detector}: not a network of face-alignment's ({error})"
            raise WeightsError(message, f"Delete them and run: {weights.FETCH} fan_2d s3fd") from error

    def track(self, rgb: np.ndarray, time: float) -> Track | None:
        answer = self._network.get_landmarks_from_image(rgb, return_bboxes=True, return_landmark_score=True)
        if answer is None or not answer[0]:
            return None
        points, scores, boxes = answer
        widths = [float(b[2] - b[0]) for b in boxes]
        largest = int(np.argmax(widths))
        landmarks = np.asarray(points[largest], np.float32)[:, :2]
        comparable = sum(1 for w in widths if w >= COMPARABLE_FACE * widths[largest])
        score = float(np.mean(scores[largest])) if scores is not None else 1.0
        return Track(None, landmarks, geometric_measures(landmarks), score, max(1, comparable))

    def close(self) -> None: ...


def geometric_measures(landmarks68: np.ndarray) -> dict[str, float]:
    """jaw, blink, smile, pucker, brows from 68 points, scaled by the distance of the eyes; gaze cannot be seen."""
    p = np.asarray(landmarks68, np.float64)
    eyes = float(np.linalg.norm(p[42:48].mean(0) - p[36:42].mean(0))) or 1.0
    gap = lambda a, b: float(np.linalg.norm(p[a] - p[b]))  # noqa: E731
    lids = (gap(37, 41) + gap(38, 40) + gap(43, 47) + gap(44, 46)) / 4
    width = (gap(36, 39) + gap(42, 45)) / 2
    mouth = gap(48, 54) / eyes
    left = np.linalg.norm(p[17:22].mean(0) - p[36:42].mean(0))
    right = np.linalg.norm(p[22:27].mean(0) - p[42:48].mean(0))
    return {
        "jaw": gap(62, 66) / eyes,
        "blink": float(np.clip(1 - lids / (0.3 * width), 0, 1)),
        "smile": max(0.0, mouth - 0.8),
        "pucker": max(0.0, 0.8 - mouth),
        "brows": float(left + right) / (2 * eyes) - 0.4,
    }


def enlarge(rgb: np.ndarray, smallest: int) -> tuple[np.ndarray, float]:
    """Scale a small picture up until its shorter side is `smallest`; the factor maps its pixels to the larger's."""
    factor = max(1.0, smallest / min(rgb.shape[:2]))
    if factor == 1.0:
        return rgb, 1.0
    size = (round(rgb.shape[1] * factor), round(rgb.shape[0] * factor))
    return cv2.resize(rgb, size, interpolation=cv2.INTER_CUBIC), factor
