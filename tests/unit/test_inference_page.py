"""Which frames the page shows, the map of their error, and the tables."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from lavatar.contracts import Camera, FrameMeta, HeadPose
from lavatar.inference.measured import Evaluation, FrameFigures
from lavatar.inference.page import Section, page, write_folder
from lavatar.inference.panels import ERROR_FULL, error_map, error_scale
from lavatar.inference.showcase import APART, Shown, ranked, strip_charts
from lavatar.inference.tables import tables

FIGURES = {
    "psnr": 27.484, "ssim": 0.93, "lpips": None,
    "spread": {"psnr": 1.204, "ssim": 0.011, "lpips": None, "expression_error": 0.1},
    "face": {"psnr": 25.0, "spread": {"psnr": 2.0}}, "flicker": 2.5, "expression_error": 0.4,
    "landmark_error": {"mouth": 0.0213, "eyes": None, "spread": {"mouth": 0.004, "eyes": None}},
    "identity": {"distance": 0.31, "spread": {"distance": 0.05}, "reference": {"distance": 0.28}},
    "expression": {
        "jaw": {"r": 0.91, "amplitude": 1.04, "error": 0.42}, "smile": {"r": None, "amplitude": 0.0, "error": 1.0},
    },
}  # fmt: skip


def test_frames_are_ranked_by_lpips_and_keep_apart() -> None:
    lpips = np.linspace(0, 1, 200)  # frame after frame a little worse
    frames = FrameFigures(np.arange(200), {"lpips": lpips, "psnr": lpips})
    step = APART + 1
    assert ranked(frames) == {
        "best": [0, step, 2 * step],
        "median": [100, 100 - step, 100 + step],
        "worst": [199, 199 - step, 199 - 2 * step],
    }
    by_psnr = ranked(FrameFigures(np.arange(200), {"psnr": lpips}))
    assert (by_psnr["best"][0], by_psnr["worst"][0]) == (199, 0)


def test_few_frames_stand_under_one_kind_each() -> None:
    for count in range(1, 10):
        chosen = ranked(FrameFigures(np.arange(count) * 5, {"psnr": np.arange(count, dtype=float)}))
        all_of_them = [i for positions in chosen.values() for i in positions]
        assert len(all_of_them) == len(set(all_of_them)) == min(count, 3 * max(1, count // 3))
        assert chosen["best"][0] == count - 1


def test_error_map_is_the_scale_at_the_error() -> None:
    truth = np.full((2, 3, 3), 100, np.uint8)
    result = truth.copy()
    result[0, 1] += 32  # half of the scale
    result[1, 2] = 255
    result[1, 0, 0] += 96  # one colour of three
    scale = error_scale(ERROR_FULL + 1, 1)[0]
    drawn = error_map(result, truth)
    for place, error in (((0, 0), 0), ((0, 1), 32), ((1, 2), 64), ((1, 0), 32)):
        assert np.abs(drawn[place].astype(int) - scale[error]).max() <= 3
    assert scale[0].sum() < 10
    assert scale[-1].sum() > 600


def test_cells() -> None:
    picture, face, expression = tables({"self": FIGURES, "cross": {"identity": FIGURES["identity"]}})
    assert picture.rows == (("self", "-", "27.48 ± 1.20", "0.930 ± 0.011", "-"),)
    assert face.rows[0] == ("self", "25.00 ± 2.00", "-", "-", "2.50", "2.1 ± 0.4", "-", "0.31 ± 0.05 (0.28)")
    assert face.rows[1] == ("cross", *"------", "0.31 ± 0.05 (0.28)")
    assert expression.rows == (("self", "0.91 1.04 0.42", "-", "- 0.00 1.00", "-", "-", "-", "0.40 ± 0.10"),)


def test_the_page_holds_pictures_and_figures_and_no_markup_from_names(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    pose = HeadPose(((1, 0, 0), (0, 1, 0), (0, 0, 1)), (0, 0, 4), 0.1)
    affine = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    meta = FrameMeta(41, 1.64, "eval", (), pose, Camera(1, 1, 1, 32), affine, affine, 1.0)
    shown = [Shown("best", meta, (("ground truth", picture), ("result", picture)), {"psnr": 30.126})]
    title = "<b>anna</b> & bo"
    sections = [Section("Self", "text", shown, True)]
    gap = np.array([0.1, np.nan, 0.3, 0.2])
    curves = strip_charts(Evaluation({}, {"jaw": gap}, {"jaw": gap / 2}), Evaluation({}, {"gaze": gap}, {"gaze": -gap}))
    text = page(title, {"self": FIGURES}, ["a note <i>"], sections, curves)
    assert "<b>anna" not in text
    assert "<i>" not in text
    assert "frame 41, 1.64 s" in text
    assert "PSNR\u00a0<b>30.13</b>" in text
    assert re.findall(r"<figcaption>(\w+ \w+)</figcaption>", text)[-2:] == ["self jaw", "cross gaze"]
    assert [text.count(f"<title>{who}</title>") for who in ("truth", "actor", "result")] == [1, 1, 2]
    assert (text.count("<polyline"), text.count("<circle"), text.count("frame 3</text>")) == (4, 4, 2), "with their gap"
    (jpeg, _) = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    read = cv2.imdecode(np.frombuffer(base64.b64decode(jpeg), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert np.abs(read.astype(int) - picture).mean() < 12
    files = write_folder(tmp_path / "out", title, {"self": {"psnr": 1.0}}, [], sections, curves)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["index.html", "metrics.json", "table.txt"]
    assert files["page"].name == "index.html"
    with pytest.raises(ValueError, match="JSON"):
        write_folder(tmp_path / "out", title, {"self": {"psnr": float("nan")}}, [], sections, curves)
