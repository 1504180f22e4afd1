"""Mattes, the foreground's colour, and what is faded out."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from lavatar.contracts import HeadPose
from lavatar.datasets import matting, pose
from lavatar.errors import ConfigError, WeightsError
from tests.unit.video_files import clip_of

FRONTAL = HeadPose(tuple(tuple(row) for row in pose.FRONTAL), (0.0, 0.0, 4.0), 0.11)
WHOLE = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


def test_rvm_finds_the_person_and_settles(videos: Path, weights: Path) -> None:
    frames = [cv2.resize(f, (192, 192), interpolation=cv2.INTER_AREA) for f in clip_of(videos / "newsreader.mp4", 6)]
    matte = matting.open_matting("rvm", size=96)
    alphas = [matte.alpha(frame) for frame in frames]
    assert alphas[-1].shape == (192, 192)
    assert alphas[-1].dtype == np.float32
    assert alphas[-1][90:110, 90:110].min() > 0.98
    assert alphas[-1][:15, :40].max() < 0.05
    matte.reset()
    assert np.array_equal(matte.alpha(frames[0]), alphas[0])  # no memory of what was before
    again = matting.open_matting("rvm", size=96, threads=2)
    assert np.allclose(again.alpha(frames[0]), alphas[0], atol=1e-4)


def test_mediapipe_finds_the_person(videos: Path) -> None:
    try:
        segmenter = matting.open_matting("mediapipe")
    except WeightsError as error:
        pytest.skip(str(error))
    frames = [cv2.resize(f, (192, 160), interpolation=cv2.INTER_AREA) for f in clip_of(videos / "newsreader.mp4", 2)]
    for frame in frames:
        alpha = segmenter.alpha(frame)
        assert (alpha.shape, alpha.dtype) == ((160, 192), np.float32)
        assert 0 <= alpha.min() <= alpha.max() <= 1
        assert alpha[75:90, 90:105].min() > 0.98  # the face
        assert alpha[:12, :35].max() < 0.05  # the wall
        assert 0.3 < alpha.mean() < 0.7
    before = segmenter.alpha(frames[0])
    segmenter.reset()
    assert np.array_equal(segmenter.alpha(frames[0]), before)
    wide = np.zeros((160, 199, 3), np.uint8)  # a view into padded rows
    wide[:, :-7] = frames[0]
    assert np.array_equal(segmenter.alpha(wide[:, :-7]), before)


def test_no_rim_of_the_background_is_left() -> None:
    """A red disc on blue with a soft edge: over white, no blue may show."""
    y, x = np.mgrid[:128, :128]
    alpha = np.clip((40 - np.hypot(x - 64, y - 64)) / 8 + 0.5, 0, 1).astype(np.float32)
    picture = (alpha[..., None] * [200, 30, 30] + (1 - alpha[..., None]) * [20, 40, 250]).astype(np.uint8)
    colour = matting.foreground(picture, alpha)
    white = alpha[..., None] * colour + (1 - alpha[..., None]) * 255
    ideal = alpha[..., None] * np.array([200, 30, 30]) + (1 - alpha[..., None]) * 255
    plain = alpha[..., None] * picture + (1 - alpha[..., None]) * 255
    assert np.abs(white - ideal).max() < 25
    assert np.abs(white - ideal).mean() < 0.2 * np.abs(plain - ideal).mean()
    assert np.array_equal(colour[alpha == 1], picture[alpha == 1])
    assert np.all(colour[alpha == 0] == 255)


def test_crop_that_leaves_the_frame_fades_there_only() -> None:
    shifted = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, -100.0]])  # the source's bottom lies at row 412 of 512
    weight = matting.frame_fade(shifted, (512, 512), 512)
    assert weight[412:].max() == 0
    assert weight[411, 200] < 0.01
    assert weight[412 - 42, 200] == 1
    assert weight[0].min() == 1
    assert matting.frame_fade(WHOLE, (512, 512), 512).min() == 1


def test_neck_fade_moves_with_the_head() -> None:
    camera = pose.portrait_camera(512)
    full = np.ones((512, 512), np.float32)
    faded = matting.fade(full, FRONTAL, camera, WHOLE, (512, 512))
    scale = 0.11 * camera.focal / 4
    chin, below = int(256 + 0.95 * scale), int(256 + 1.8 * scale)
    assert faded[:chin, 100:412].min() > 0.99
    assert faded[below:].max() < 0.01
    moved = HeadPose(FRONTAL.rotation, (0.02, -0.03, 4.0), 0.11)
    other = matting.fade(full, moved, camera, WHOLE, (512, 512))
    shift = np.float32([[1, 0, 0.02 * camera.focal / 4], [0, 1, -0.03 * camera.focal / 4]])
    expected = cv2.warpAffine(faded, shift, (512, 512), borderMode=cv2.BORDER_REPLICATE)
    assert np.abs(other - expected).max() < 0.02


def test_given_alpha_takes_white_for_background() -> None:
    picture = np.full((32, 32, 3), 255, np.uint8)
    picture[8:24, 8:24] = (90, 60, 200)
    alpha = matting.open_matting("alpha").alpha(picture)
    assert alpha[16, 16] == 1
    assert alpha[2, 2] == 0


def test_unknown_matting_and_missing_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no matting 'scissors'"):
        matting.open_matting("scissors")
    monkeypatch.setenv("LAVATAR_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("rvm", "mediapipe"):
        with pytest.raises(WeightsError, match="lavatar weights fetch"):
            matting.open_matting(name)
