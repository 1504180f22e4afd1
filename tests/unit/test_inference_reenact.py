"""A real driving video through untrained models: time, sound, batches, and what cannot drive."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from lavatar.errors import LavatarError
from lavatar.inference.loading import Avatar, Pair, load_avatar, load_pair
from lavatar.inference.reenact import chunks, frame_rate, reenact_video
from tests.unit.inference_files import RECIPE, make_avatar_release, make_pair_release


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Avatar, Pair]:
    folder = tmp_path_factory.mktemp("models")
    return load_avatar(make_avatar_release(folder / "a")), load_pair(make_pair_release(folder / "p"))


def test_a_real_video_drives(videos: Path, weights: Path, models: tuple[Avatar, Pair], tmp_path: Path) -> None:
    config = RECIPE.preprocess.model_copy(update={"max_frames": 30})
    out = tmp_path / "out.mp4"
    written = reenact_video(*models, videos / "newsreader.mp4", out, config, RECIPE.evaluation)
    assert (written.frames, written.fps, written.has_audio) == (30, 25, True)
    with av.open(str(out)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.width, video.height) == (64, 64)
        assert float(audio.duration * audio.time_base) == pytest.approx(30 / 25, abs=1e-3)
        sound = np.concatenate([f.to_ndarray()[:1] for f in container.decode(audio=0)], axis=1)
    assert np.abs(sound).max() > 0.01


def test_what_is_no_video(models: tuple[Avatar, Pair], tmp_path: Path) -> None:
    text = tmp_path / "notes.mp4"
    text.write_text("no video at all")
    with pytest.raises(LavatarError, match=r"notes\.mp4"):
        reenact_video(*models, text, tmp_path / "out.mp4", RECIPE.preprocess)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.mp4"]


def test_frame_rate() -> None:
    index = np.arange(0, 100, 3)
    assert frame_rate(index, index / 25, 25.0) == 25.0
    assert frame_rate(index, index / 24, 1000.0) == pytest.approx(24)  # a header that lies
    assert frame_rate([0], [0.0], 0.0) == 25.0


def test_chunks() -> None:
    assert [c.tolist() for c in chunks([5, 6, 7, 8, 9], 2)] == [[5, 6], [7, 8], [9]]
    assert list(chunks([], 2)) == []
