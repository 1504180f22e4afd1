"""Correlation and amplitude, the choice of frames, and the pictures drawn for people."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lavatar.contracts import EXPRESSIONS
from lavatar.inference.expression import (
    ExpressionSeries,
    agreement,
    compare,
    error_spread,
    expression_error,
    faces_lost,
)
from lavatar.inference.figures import flat, rounded
from lavatar.inference.panels import choose_frames, curves, fit, labelled, sheet, side_by_side

NOTHING = {"r": None, "amplitude": None, "error": None}


def agreed(r: float, amplitude: float, error: float) -> object:
    return {"r": pytest.approx(r), "amplitude": pytest.approx(amplitude), "error": pytest.approx(error, abs=1e-9)}


def test_agreement_in_closed_form() -> None:
    truth = np.sin(np.linspace(0, 20, 200))
    truth = (truth - truth.mean()) / truth.std()
    assert agreement(truth, truth) == agreed(1, 1, 0)
    assert agreement(truth, 0.5 * truth) == agreed(1, 0.5, 0.5)
    assert agreement(truth, -2 * truth) == agreed(-1, 2, 3)
    assert agreement(10 * truth, 5 * truth + 30) == agreed(1, 0.5, np.sqrt(0.5**2 + 3**2))
    assert agreement(10 * truth, 5 * truth + 30, centred=True) == agreed(1, 0.5, 0.5)


def test_frozen_and_unknown_have_no_r() -> None:
    truth = np.sin(np.linspace(0, 20, 200))
    frozen = agreement(truth, np.full(200, truth.mean()))
    assert frozen == {"r": None, "amplitude": pytest.approx(0.0), "error": pytest.approx(1.0)}
    assert agreement(np.zeros(200), truth) == NOTHING
    assert agreement(truth, np.full(200, np.nan)) == NOTHING
    assert agreement(truth[:2], truth[:2]) == NOTHING


def test_a_truth_within_the_meters_noise_has_no_r() -> None:
    wave = np.sin(np.linspace(0, 20, 200))
    truth, result = ExpressionSeries({"jaw": 0.1, "smile": 0.1}), ExpressionSeries()
    truth.add({"jaw": 0.1 * wave, "smile": wave, "blink": 0.1 * wave, "gaze": np.full(200, np.nan)})
    result.add(dict.fromkeys(EXPRESSIONS, wave))
    compared = compare(truth, result)
    assert compared["jaw"] == NOTHING
    assert compared["smile"] == agreed(1, 1, 0)
    assert compare(truth, result, centred=True)["blink"] == agreed(1, 10, 9)
    assert truth.still() == ["jaw"], "what is not known is not still"
    assert expression_error(compared) == pytest.approx(compared["blink"]["error"] / 2)  # smile's is 0
    assert expression_error({"jaw": compared["jaw"]}) is None


def test_the_spread_of_the_error_is_over_the_frames() -> None:
    """Deviations of the truth are 1: a frame's error is the mean of the two measures' differences."""
    truth, result = ExpressionSeries(), ExpressionSeries()
    sign, unseen = np.tile([1.0, -1.0], 50), np.full(100, np.nan)
    off = np.repeat([0.0, 2.0], 50)
    truth.add({"jaw": sign, "blink": sign, "smile": unseen, "brows": np.zeros(100)})
    result.add({"jaw": sign + off, "blink": np.where(off > 0, np.nan, sign - 1), "smile": sign, "brows": sign})
    assert error_spread(truth, result) == pytest.approx((2 - 0.5) / 2)  # half the frames ½, the others, jaw alone, 2
    assert error_spread(truth, result, centred=True) == pytest.approx((1 - 0.5) / 2)  # jaw 1 in all, blink 0
    assert error_spread(truth, ExpressionSeries(parts={name: [unseen] for name in EXPRESSIONS})) is None


def test_frames_without_a_face_do_not_count_but_are_counted() -> None:
    truth, result = ExpressionSeries(), ExpressionSeries()
    values = np.sin(np.linspace(0, 20, 100))
    measured = {name: values.copy() for name in EXPRESSIONS if name != "gaze"}  # a meter that cannot see gaze
    lost = {name: np.where(np.arange(100) < 7, np.nan, v) for name, v in measured.items()}
    for part in (slice(0, 60), slice(60, 100)):
        truth.add({n: v[part] for n, v in measured.items()})
        result.add({n: v[part] for n, v in lost.items()})
    compared = compare(truth, result)
    assert tuple(compared) == EXPRESSIONS
    assert compared["jaw"] == agreed(1, 1, 0)
    assert compared["gaze"] == NOTHING
    assert faces_lost(truth, result) == 7


def test_figures_fit_into_json() -> None:
    figures = rounded({"self": {"psnr": 27.123456789, "lpips": None, "r": float("nan"), "frames": 7}})
    assert json.loads(json.dumps(figures, allow_nan=False)) == {
        "self": {"psnr": 27.1235, "lpips": None, "r": None, "frames": 7}
    }
    assert flat(figures) == {"self/psnr": 27.1235, "self/frames": 7.0}


def test_chosen_frames_cover_the_range() -> None:
    rng = np.random.default_rng(0)
    measures = {name: rng.normal(size=300) * 0.1 for name in EXPRESSIONS}
    measures["jaw"][41], measures["blink"][77], measures["smile"][123] = 5, 5, 5
    measures["brows"][5] = np.nan
    chosen = choose_frames(measures, 8)
    assert len(set(chosen)) == 8
    assert {41, 77, 123} <= set(chosen)
    assert chosen == sorted(chosen)
    assert choose_frames(measures, 300) == list(range(300))
    assert choose_frames({}, 8) == []


def test_panels() -> None:
    grey, white = np.full((100, 100, 3), 128, np.uint8), np.full((300, 300, 3), 255, np.uint8)
    both = side_by_side((grey, white), ("actor", "avatar"), 200)
    assert both.shape == (200, 400, 3)
    assert (both[:100, :200] == 128).all()
    assert (both[:100, 200:] == 255).all()
    assert (both[150:, 200:] < 100).any()  # there is writing
    assert (labelled(grey, "x")[:80] == 128).all()
    assert (grey == 128).all()
    assert sheet([[grey] * 3, [white] * 3], ["a", "b"], 64).shape == (128, 192, 3)
    checker = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    assert np.abs(fit(checker, 32).astype(int) - 127).max() <= 1  # an average, no aliasing


def test_curves_show_both_and_leave_gaps() -> None:
    wave = np.sin(np.linspace(0, 20, 100))
    gap = np.where((np.arange(100) > 40) & (np.arange(100) < 60), np.nan, wave * 0.5)
    unseen = np.full(100, np.nan)
    picture = curves({"jaw": wave, "gaze": unseen}, {"jaw": gap, "gaze": unseen}, ["jaw", "gaze"])
    red = (picture[..., 0].astype(int) - picture[..., 2] > 100).any(axis=0)
    assert red[100:480].any()
    assert not red[480:610].any()
    assert red[650:].any()
