"""`lavatar submit` from end to end, nothing replaced: Ray, DeepSpeed, MLflow, SQLite, synthetic subjects, toy sizes.

The training worker is killed in the middle of the job.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from submit_files import TOY, Lavatar, training_worker

from lavatar.platform.home import Home


@pytest.fixture(scope="module")
def lavatar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lavatar]:
    tool = Lavatar(tmp_path_factory.mktemp("submit") / "home")
    yield tool
    tool.kill_what_runs()


@pytest.fixture(scope="module")
def result(lavatar: Lavatar) -> dict[str, Any]:
    """The report of a job of a file of pairs, whose training worker was killed once."""
    for seed, name in ((1, "ann"), (2, "bob")):
        assert lavatar("subjects", "add", "--synthetic", str(seed), name)[0] == 0
    process = lavatar.start(*lavatar.submit_pairs([("ann", "bob")], "--json"))
    lavatar.wait_for(process, "avatar:ann", 40)
    training_worker(process.pid).kill()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, lavatar.errors()
    report: dict[str, Any] = json.loads(out)
    return report


def test_the_curve_goes_on_from_the_checkpoint(lavatar: Lavatar, result: dict[str, Any]) -> None:
    from lavatar.platform.tracking import connect

    row = lavatar.stage("avatar:ann")
    assert row is not None
    assert row.attempts == 1, "the same submit went on"
    client = connect(Home(lavatar.home))
    steps = [m.step for m in client.get_metric_history(row.mlflow_run_id, "avatar/total")]
    assert len(steps) == len(set(steps))
    assert set(range(5, 501, 5)) <= set(steps)
    assert client.get_run(row.mlflow_run_id).info.status == "FINISHED"


def test_the_report_is_complete(result: dict[str, Any]) -> None:
    assert result["state"] == "finished"
    assert [s["state"] for s in result["stages"]] == ["finished"] * 5
    assert [s["cached"] for s in result["stages"]] == [False] * 5
    assert result["models"] == [
        {"name": "lavatar-avatar-ann", "version": 1},
        {"name": "lavatar-pair-ann-bob", "version": 1},
    ]
    for row in ("self", "mean_frame", "nearest_frame"):
        assert {"mse", "psnr", "ssim", "lpips"} <= set(result["metrics"][row])
    assert result["metrics"]["self"]["psnr"] > 10
    for row in ("self", "cross"):
        assert {"jaw", "blink", "smile", "pucker", "brows"} <= set(result["metrics"][row]["expression"])
    assert Path(result["still"]).is_file()


def test_the_video_plays(result: dict[str, Any]) -> None:
    with av.open(result["video"]) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.height == TOY["evaluation.panel_size"]
        assert stream.width >= 2 * stream.height
        frames = sum(1 for _ in container.decode(stream))
    assert frames >= 4


def test_a_second_submit_runs_no_stage(lavatar: Lavatar, result: dict[str, Any]) -> None:
    """The same pair by flags is the same job."""
    code, out = lavatar(*lavatar.submit("ann", "bob", "--json"))
    again = json.loads(out)
    assert code == 0
    assert {s["cached"] for s in again["stages"]} == {True}
    for key in ("job", "video", "still", "metrics", "models"):
        assert again[key] == result[key]


def test_a_second_actor_begins_at_the_first_pair(lavatar: Lavatar, result: dict[str, Any]) -> None:
    from lavatar.platform.tracking import connect

    assert lavatar("subjects", "add", "--synthetic", "3", "cat")[0] == 0
    code, out = lavatar(*lavatar.submit("ann", "cat", "--json", "--dry-run", "--cold"))
    assert (code, json.loads(out)["warm"]) == (0, None)
    code, out = lavatar(*lavatar.submit("ann", "cat", "--json"))
    assert code == 0, lavatar.errors()
    (pair,) = (stage for stage in json.loads(out)["stages"] if stage["name"] == "pair:ann<-cat")
    (note,) = pair["notes"]
    assert note.startswith("began at the shared encoder of ann<-bob; final error of ann<-bob: ")
    assert "own part" in note
    row = lavatar.stage("pair:ann<-cat")
    assert row is not None
    assert row.metrics["ynet"]["error"]["steps"] == [0, 12]
    assert row.metrics["ynet"]["warm"]["mean"]["cold_step"] == 12
    client = connect(Home(lavatar.home))
    logged = client.get_metric_history(row.mlflow_run_id, "ynet/error/avatar")
    assert [point.step for point in logged] == [0, 12]
    code, out = lavatar(*lavatar.submit("ann", "cat", "--json", "--dry-run"))
    again = json.loads(out)
    assert (again["warm"], {stage["cached"] for stage in again["stages"]}) == ("ann<-bob", {True})


def test_the_models_draw(lavatar: Lavatar, result: dict[str, Any]) -> None:
    import mlflow.pyfunc

    mlflow.set_tracking_uri(Home(lavatar.home).tracking_uri)
    mlflow.set_registry_uri(Home(lavatar.home).tracking_uri)
    faces = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    for name in ("lavatar-avatar-ann", "lavatar-pair-ann-bob"):
        portraits = mlflow.pyfunc.load_model(f"models:/{name}@champion").predict(faces)
        assert (portraits.shape, portraits.dtype) == ((3, 64, 64, 3), np.uint8)
        assert portraits.std() > 1


def test_evaluate_measures_the_same_and_logs_it(lavatar: Lavatar, result: dict[str, Any], tmp_path: Path) -> None:
    from lavatar.platform.lookup import get_job
    from lavatar.platform.registry import open_registry
    from lavatar.platform.tracking import connect

    assert Path(result["page"]).is_file()
    home = Home(lavatar.home)
    run_id = get_job(open_registry(home), result["job"]).mlflow_run_id
    client = connect(home)
    logged = client.get_run(run_id).data.metrics
    assert logged["evaluation/self/psnr"] == pytest.approx(result["metrics"]["self"]["psnr"])
    files = {f.path for f in client.list_artifacts(run_id, "evaluation")}
    assert {f"evaluation/{name}" for name in ("index.html", "metrics.json", "table.txt", "preview.mp4")} <= files
    client.log_metric(run_id, "evaluation/self/psnr", 0.0)  # what the job has logged is not logged again
    code, out = lavatar("evaluate", "--avatar", "ann", "--actor", "bob", "-o", str(tmp_path / "page"), "--json")
    assert code == 0, lavatar.errors()
    again = client.get_run(run_id).data.metrics["evaluation/self/psnr"]
    assert again == pytest.approx(result["metrics"]["self"]["psnr"], rel=1e-3)
    answer = json.loads(out)
    for row in ("self", "nearest_frame"):
        for name in ("psnr", "ssim", "flicker"):
            assert answer["metrics"][row][name] == pytest.approx(result["metrics"][row][name], rel=1e-3)
    assert answer["page"] == str(tmp_path / "page" / "index.html")
    assert json.loads(Path(answer["metrics_file"]).read_text()) == answer["metrics"]
    assert "loading" in lavatar.errors()
    assert lavatar("evaluate", "--avatar", "ann", "-o", result["page"])[0] == 2
