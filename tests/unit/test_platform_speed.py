"""lavatar bench: what is made of the seconds, the rows at toy size, and the check against a baseline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lavatar.contracts import NullSink
from lavatar.platform.speed import material, measure, models, processes, table
from lavatar.platform.speed.material import Material
from lavatar.platform.speed.measure import Row, Session, Times, forget_peak, operations, peak_mb

Lavatar = Callable[..., tuple[int, str, str]]
FIELDS = ["row", "median_s", "reference_s", "ratio", "spread", "peak_mb", "of_peak"]
CPU = torch.device("cpu")


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(Material(tmp_path, NullSink()), CPU, full=False, seconds=0.0, events=NullSink())


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """All shapes so small that a row takes a second."""
    head = (
        "avatar.image_size=32", "avatar.ray_size=8", "avatar.samples=4", "avatar.triplane_size=16",
        "avatar.face_size=32", "avatar.generator_capacity=4", "avatar.generator_max_channels=8",
        "avatar.superresolution_capacity=2",
    )  # fmt: skip
    pair = ("ynet.neck_width=8", "ynet.decoder_widths=[8,4,4]", "ynet.encoder_widths=[4,4]")
    half = {**dict.fromkeys(("train-avatar", "train-avatar paper", "render", "render batch 8"), head),
            "train-pair": (*head, *pair, "ynet_training.batch_size=2")}  # fmt: skip
    monkeypatch.setattr(models, "HALF", half)
    monkeypatch.setattr(models, "vgg", lambda device: narrow_vgg())
    monkeypatch.setattr(measure, "PRODUCT", {"cpu": 64})
    monkeypatch.setattr(material, "DRAWN", 20)
    monkeypatch.setattr(material, "SIDE", 64)


def narrow_vgg() -> torch.nn.Module:
    from tests.golden.test_golden import narrow_perceptual

    return narrow_perceptual()


def test_the_figures_of_a_row_in_closed_form(session: Session) -> None:
    session.peak = 1000.0  # type: ignore[misc]  # operations a second, instead of measuring them
    times = Times(own=[4.0, 2.0, 3.0, 100.0, 1.0], reference=[9.0, 6.0, 1.0, 12.0, 9.0], peaks_mb=[5.0, None, 7.0])
    row = session.filled(Row("r", "w"), times, units=2, work=600.0)
    assert row.median_s == pytest.approx(1.5)
    assert row.reference_s == pytest.approx(4.5)
    assert row.ratio == pytest.approx(3.0)
    assert row.spread == pytest.approx((4 - 2) / 3)
    assert row.peak_mb == 7.0
    assert row.of_peak == pytest.approx(600 / 3 / 1000)
    alone = session.filled(Row("r", "w"), Times([2.0], [], []), 1)
    assert alone == Row("r", "w", median_s=2.0)


def test_this_code_and_the_reference_run_in_turn_each_as_often_first(session: Session) -> None:
    order: list[str] = []
    times = session.alternate("r", lambda: order.append("own"), lambda: order.append("ref"))
    assert order == ["own", "ref", "own", "ref", "ref", "own", "own", "ref"]
    assert len(times.own) == len(times.reference) == 3


def test_the_peak_of_memory_is_that_of_the_run() -> None:
    forget_peak(CPU)
    before = peak_mb(CPU)
    if before is None:
        pytest.skip("this system does not tell a process's peak of memory")
    held = np.ones(2**27, np.uint8)
    del held
    after = peak_mb(CPU)
    assert after is not None
    assert after - before > 100
    forget_peak(CPU)
    again = peak_mb(CPU)
    assert again is not None
    assert after - again > 100


def test_operations_are_counted_in_multiplications_and_additions() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert operations(lambda: a @ b) == 2 * 3 * 5 * 7


@pytest.mark.slow
def test_every_row_of_the_models_is_measured_beside_its_reference(toys: None, lavatar: Lavatar) -> None:
    code, out, err = lavatar("bench", "train-avatar", "train-pair", "render", "--seconds", "0", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert list(result) == ["machine", "rows"]
    assert "torch" in result["machine"]
    assert "GFLOP/s" in result["machine"]
    names = ["train-avatar", "train-avatar paper", "train-pair", "render", "render batch 8"]
    assert [row["row"] for row in result["rows"]] == names
    for row in result["rows"]:
        assert list(row) == FIELDS
        assert all(row[name] is not None and row[name] > 0 for name in FIELDS[1:]), row
        assert row["ratio"] == pytest.approx(row["reference_s"] / row["median_s"])
    assert "train-pair: pair 3" in err, "it says how far it is"


@pytest.mark.slow
def test_a_ratio_below_the_baseline_fails(toys: None, lavatar: Lavatar, tmp_path: Path) -> None:
    """A baseline is written, made better by hand, and then really not met."""
    saved = tmp_path / "saved.json"
    code, out, _ = lavatar("bench", "loader", "cli", "--seconds", "0", "--save", saved)
    assert code == 0
    assert "| loader |" in out
    assert "| lavatar --help |" in out
    written = json.loads(saved.read_text())
    assert set(written["ratios"]) == {"loader", "loader cached"}, "cli has no reference"
    for factor, expected in ((1e-3, 0), (1e3, 1)):
        written["ratios"] = {"loader": written["ratios"]["loader"] * factor}
        saved.write_text(json.dumps(written))
        code, out, err = lavatar("bench", "loader", "--seconds", "0", "--check", "--baseline", saved, "--json")
        assert code == expected
        assert ("loader: ratio" in err) == bool(expected)
        assert json.loads(out)["rows"][0]["row"] == "loader", "one object, failed or not"
        written["ratios"] = {"loader": written["ratios"]["loader"] / factor}


def test_a_fifth_worse_is_the_limit() -> None:
    rows = [Row("a", "", ratio=0.81), Row("b", "", ratio=0.79), Row("c", ""), Row("d", "", ratio=0.1)]
    found = table.compare(rows, {"a": 1.0, "b": 1.0, "c": 1.0})
    assert found == ["b: ratio 0.79, the baseline has 1.00", "c: no ratio, the baseline has 1.00"]


def test_a_baseline_of_something_else_is_refused(lavatar: Lavatar, tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps({"of": "cuda, full shapes", "machine": "", "ratios": {"cli": 1.0}}))
    code, out, err = lavatar("bench", "cli", "--baseline", file)
    assert (code, out) == (2, "")
    assert "is of cuda, full shapes, this is cpu, half shapes" in err
    for text in ("{", "[]", '{"of": "x", "ratios": {"a": "b"}}', '{"of": "x", "ratios": 3}'):
        file.write_text(text)
        code, _, err = lavatar("bench", "cli", "--baseline", file)
        assert code == 1
        assert "is no baseline" in err
    assert lavatar("bench", "cli", "--baseline", tmp_path / "none.json")[0] == 2


def test_a_row_that_is_none_is_named(lavatar: Lavatar) -> None:
    code, _, err = lavatar("bench", "train-avatr")
    assert code == 2
    assert "there is no row 'train-avatr'" in err
    assert "train-avatar, train-pair" in err


def test_without_pretrained_weights_a_row_has_no_figures(
    toys: None, lavatar: Lavatar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAVATAR_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, out, err = lavatar("bench", "reenact", "--json")
    assert code == 0
    assert json.loads(out)["rows"] == [{"row": "reenact", **dict.fromkeys(FIELDS[1:])}]
    assert "reenact is not measured" in err
    assert "lavatar weights fetch face_landmarker" in err


def test_a_command_that_fails_is_no_measurement(tmp_path: Path) -> None:
    from lavatar.errors import StageFailedError

    with pytest.raises(StageFailedError, match="there is no row"):
        processes.started(tmp_path / "home", "bench", "nothing")
