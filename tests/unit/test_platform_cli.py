"""The command line: what is imported, exit codes, messages with a way out, one JSON object on standard output."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from lavatar.configs.baselines import BASELINES
from lavatar.contracts import StageResult
from lavatar.errors import FaceError, Interrupted, StorageError
from lavatar.platform import cli
from lavatar.platform.cli import COMMANDS
from lavatar.platform.home import Home
from lavatar.platform.registry import open_registry

sys.path.insert(0, str(Path(__file__).parent))
from platform_fakes import FakeHandle, FakeRunner, NoTracker, no_models

pytestmark = pytest.mark.usefixtures("home")
HEAVY = ("torch", "ray", "mlflow", "sqlalchemy", "alembic", "cv2", "mediapipe", "numpy", "av", "pydantic", "rich")


@pytest.fixture
def clip(tmp_path: Path) -> Callable[[str, int], Path]:
    """A short real video file, without a face."""

    def make(name: str, seed: int = 0) -> Path:
        path = tmp_path / name
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25, (64, 48))
        rng = np.random.default_rng(seed)
        for _ in range(10):
            writer.write(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
        writer.release()
        return path

    return make


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRunner]:
    """submit without Ray and without MLflow."""
    fake = FakeRunner()

    @contextlib.contextmanager
    def opened(*args: object, **kwargs: object) -> Iterator[FakeRunner]:
        print("noise on standard output", flush=True)
        os.write(1, b"more noise, from C\n")
        yield fake

    import lavatar.cluster.stages

    monkeypatch.setattr(lavatar.cluster.stages, "StageRunner", opened)
    monkeypatch.setattr("lavatar.platform.jobs.Tracker", NoTracker)
    no_models(monkeypatch)
    monkeypatch.setattr("lavatar.platform.home.Home.tracking_uri", "none")
    monkeypatch.setattr("lavatar.platform.execution.POLL_SECONDS", 0.01)
    return fake


SUBMIT = ("submit", "--avatar", "ann", "--actor", "bob", "--set", "avatar_loss.lambda_vgg=0")


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    script = (
        "import sys; from lavatar.platform.cli import run; code = run(['--help']); "
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"
    assert all(name in result.stdout for name in COMMANDS)

    def cpu_seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "lavatar.platform.cli", "--help"], capture_output=True, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(cpu_seconds() for _ in range(3)) < 0.3


def test_help_names_the_methods_of_a_benchmark_and_stays_light() -> None:
    script = (
        "import sys; from lavatar.platform.cli import run; code = run(['benchmark', 'method', '--help']); "
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"
    assert ",".join(BASELINES) in "".join(result.stdout.split())


def test_a_job_is_planned_without_waiting_for_torch_ray_or_mlflow(lavatar: Any) -> None:
    for seed, name in enumerate("ab"):
        lavatar("subjects", "add", "--synthetic", str(seed), name)
    code = (
        "import sys; from lavatar.platform.cli import run; "
        "code = run(['submit', '--avatar', 'a', '--actor', 'b', '--dry-run', '--json']); "
        "print(code, sorted({'torch', 'ray', 'mlflow', 'mediapipe'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.splitlines()[-1] == "0 []"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help_and_the_line_of_the_list(name: str, lavatar: Any) -> None:
    code, out, err = lavatar(name, "--help")
    assert (code, err) == (0, "")
    assert COMMANDS[name][1].rstrip(".") in " ".join(out.split())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["submitt"], "Did you mean 'submit'"),
        (["submit", "--avatar", "A"], "--actor"),
        (["submit", "--avatar", "A", "--actor", "B", "--recipe", "tinny"], "Did you mean 'tiny'"),
        (["submit", "--avatar", "A", "--actor", "B", "--set", "avatar.sampels=3"], "Did you mean 'avatar.samples'"),
        (["submit", "--avatar", "A", "--actor", "B"], "there is no subject 'A'"),
        (["submit", "--avatar", "no/such.mp4", "--actor", "B"], "there is no file no/such.mp4"),
        (["submit", "--avatar", "A", "--actor", "B", "--shared", "--cold"], "always begins anew: leave --cold out"),
        *(
            (["submit", "--avatar", "A", "--actor", "B", "--shared", "--set", said], f"anew: leave --set {said} out")
            for said in ("pair_learning.warm=true", "pair_learning.warm=false", "pair_learning.warm_steps=0.5")
        ),
        (["subjects", "show", "A"], "lavatar subjects list"),
        (["subjects", "remove", "A"], "lavatar subjects list"),
        (["subjects", "add", "A", "no/such.mp4"], "there is no file"),
        (["subjects", "add", "A", str(Path(__file__).parent)], "is a folder, not a video"),
        (["submit", "--avatar", str(Path(__file__).parent), "--actor", "B"], "is a folder, not a video"),
        (["subjects", "add", "A"], "neither a video nor --synthetic"),
        (["subjects", "add", "A", "x.mp4", "--synthetic", "3"], "both a video and --synthetic"),
        (["jobs", "show", "abc"], "lavatar jobs list"),
        (["reenact", "--avatar", "A", "--actor", "B", "--video", __file__, "-o", "x.avi"], "-o x.mp4"),
    ],
)
def test_bad_usage_is_2_and_says_the_way_out(args: list[str], words: str, lavatar: Any) -> None:
    code, out, err = lavatar(*args)
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["a/b", "a b", "..", "a..b", "", "-a", ".a", "ü", "x" * 81, "a\nb"])
def test_names_that_cannot_be(name: str, lavatar: Any, clip: Any) -> None:
    code, _, err = lavatar("subjects", "add", "--synthetic", "1", "--", name)
    assert code == 2
    assert "cannot be a subject's name" in err
    assert "Use letters, digits" in err


def test_subjects_from_add_to_remove(lavatar: Any, clip: Any) -> None:
    video = clip("ann.mp4")
    code, out, _ = lavatar("subjects", "add", "ann", video)
    assert code == 0
    assert f"added ann: {video} (64×48, 25 frames/s" in out
    code, out, _ = lavatar("subjects", "add", "ann", video)
    assert (code, out[:13]) == (0, "already there")
    lavatar("subjects", "add", "--synthetic", "7", "syn")
    listed = json.loads(lavatar("subjects", "list", "--json")[1])["subjects"]
    assert [(s["name"], s["kind"], s["seed"]) for s in listed] == [("ann", "video", None), ("syn", "synthetic", 7)]
    assert json.loads(lavatar("subjects", "show", "ann", "--json")[1])["video"]["width"] == 64
    assert "syn: synthetic, seed 7" in lavatar("subjects", "show", "syn")[1]
    code, out, err = lavatar("subjects", "remove", "ann")
    assert (code, out) == (0, "removed ann\n")
    assert "stay" in err
    assert video.exists()
    assert lavatar("subjects", "show", "ann")[0] == 2


def test_the_same_name_with_another_video_is_refused(lavatar: Any, clip: Any) -> None:
    lavatar("subjects", "add", "ann", clip("1.mp4", 1))
    code, _, err = lavatar("subjects", "add", "ann", clip("2.mp4", 2))
    assert code == 2
    assert "taken by another video" in err
    assert "lavatar subjects remove ann" in err
    moved = clip("1.mp4", 1).rename(clip("1.mp4", 1).with_name("moved.mp4"))
    assert lavatar("subjects", "add", "ann", moved)[0] == 0
    assert json.loads(lavatar("subjects", "show", "ann", "--json")[1])["path"] == str(moved)


def test_files_that_are_no_videos(lavatar: Any, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("this is a text\n" * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    lavatar("subjects", "add", "--synthetic", "1", "bob")
    for name, code, words in (
        ("text.mp4", 1, "it is not a video"),
        ("empty.mp4", 1, "the file is empty"),
        ("absent.mp4", 2, "there is no file"),
    ):
        for arguments in (("subjects", "add", "ann"), ("submit", "--actor", "bob", "--avatar")):
            got, out, err = lavatar(*arguments, tmp_path / name)
            assert (got, out) == (code, "")
            assert name in err
            assert words in err
            assert "Errno" not in err
            assert len(err.strip().splitlines()) >= 2
    lavatar("subjects", "remove", "bob")
    assert json.loads(lavatar("subjects", "list", "--json")[1]) == {"subjects": []}


def two(lavatar: Any) -> None:
    for seed, name in enumerate(("ann", "bob")):
        assert lavatar("subjects", "add", "--synthetic", str(seed), name)[0] == 0


def test_submit_prints_one_json_object_and_nothing_else(lavatar: Any, runner: FakeRunner) -> None:
    two(lavatar)
    code, out, err = lavatar(*SUBMIT, "--json")
    result = json.loads(out)
    assert code == 0
    assert {"job", "state", "stages", "video", "still", "models", "metrics"} <= set(result)
    assert [set(s) >= {"name", "key", "state", "cached", "seconds"} for s in result["stages"]] == [True] * 5
    assert "noise" in err
    assert "avatar:ann: finished" in err
    assert len(runner.started) == 5
    code, out, _ = lavatar(*SUBMIT, "--json")
    again = json.loads(out)
    assert code == 0
    assert len(runner.started) == 5
    assert {s["cached"] for s in again["stages"]} == {True}
    assert (again["video"], again["metrics"]) == (result["video"], result["metrics"])


def test_submit_for_people_ends_with_where_everything_is(lavatar: Any, runner: FakeRunner) -> None:
    two(lavatar)
    _, out, _ = lavatar(*SUBMIT)
    for words in (
        "preview.mp4",
        "still.png",
        "models:/lavatar-avatar-ann/1",
        "models:/lavatar-pair-ann-bob/1",
        "30.00",
    ):
        assert words in out
    assert "noise" not in out


def test_dry_run_prints_the_stages_and_does_nothing(lavatar: Any, runner: FakeRunner) -> None:
    two(lavatar)
    code, out, _ = lavatar(*SUBMIT, "--dry-run")
    assert code == 0
    assert out.count("to do") == 5
    assert runner.started == []
    lavatar(*SUBMIT)
    dry = json.loads(lavatar(*SUBMIT, "--dry-run", "--json", "--set", "evaluation.max_frames=3")[1])
    assert [s["cached"] for s in dry["stages"]] == [True, True, True, True, False]
    assert dry["stages"][4]["needs"] == ["preprocess:ann", "preprocess:bob", "avatar:ann", "pair:ann<-bob"]
    assert dry["stages"][2]["resources"]["cpus"] > 0


def test_a_path_is_taken_in_place_of_a_name(lavatar: Any, runner: FakeRunner, clip: Any) -> None:
    lavatar("subjects", "add", "--synthetic", "1", "bob")
    video, odd = clip("ann.mp4", 1), clip("my face.mp4", 2)
    dry = lavatar("submit", "--avatar", video, "--actor", "bob", "--dry-run")
    assert dry[0] == 0
    assert json.loads(lavatar("subjects", "list", "--json")[1])["subjects"][-1]["name"] == "bob"
    code, _, err = lavatar("submit", "--avatar", odd, "--actor", "bob")
    assert code == 2
    assert f"lavatar subjects add my_face '{odd}'" in err


def test_a_video_that_changed_since(lavatar: Any, clip: Any) -> None:
    lavatar("subjects", "add", "--synthetic", "1", "bob")
    video = clip("ann.mp4", 1)
    lavatar("subjects", "add", "ann", video)
    clip("ann.mp4", 2)
    code, _, err = lavatar(*SUBMIT)
    assert code == 1
    assert "has changed since it was added" in err
    video.unlink()
    code, _, err = lavatar(*SUBMIT)
    assert code == 1
    assert str(video) in err


def failing(error: BaseException) -> Callable[[FakeHandle], StageResult]:
    def body(handle: FakeHandle) -> StageResult:
        raise error

    return body


def test_a_failed_stage_is_1_with_its_message(lavatar: Any, runner: FakeRunner) -> None:
    two(lavatar)
    runner.bodies["preprocess:bob"] = failing(FaceError("no face in bob.mp4", "Use another video."))
    code, out, err = lavatar(*SUBMIT, "--json")
    result = json.loads(out)
    assert code == 1
    assert result["state"] == "failed"
    assert result["error"]["message"] == "preprocess:bob failed: no face in bob.mp4"
    assert "error: preprocess:bob failed: no face in bob.mp4\n  Use another video." in err
    assert "Traceback" not in err
    code, _, err = lavatar(*SUBMIT, "--debug")
    assert "Traceback" in err
    logs = lavatar("jobs", "logs", result["job"])[1]
    assert "preprocess:bob: error: failed: no face in bob.mp4" in logs
    assert "no face in bob.mp4" in lavatar("jobs", "list")[1]
    assert "no face in bob.mp4" in lavatar("jobs", "show", result["job"][:5])[1]


def test_a_full_disk_in_a_stage_is_shown(lavatar: Any, runner: FakeRunner) -> None:
    two(lavatar)
    runner.bodies["avatar"] = failing(StorageError("no space left for the checkpoint", "Free some space."))
    code, _, err = lavatar(*SUBMIT)
    assert code == 1
    assert "no space left for the checkpoint" in err


def test_interrupted_is_130(lavatar: Any, runner: FakeRunner) -> None:
    two(lavatar)
    runner.bodies["avatar"] = failing(Interrupted("stopped"))
    code, out, _ = lavatar(*SUBMIT, "--json")
    assert code == 130
    assert json.loads(out)["state"] == "interrupted"


def test_subjects_of_a_running_job_stay(lavatar: Any, runner: FakeRunner) -> None:
    two(lavatar)
    seen: list[BaseException] = []

    def meanwhile(handle: FakeHandle) -> StageResult:
        from lavatar.platform.subjects import remove_subject

        try:
            remove_subject(open_registry(Home.from_environment()), "ann")
        except Exception as error:
            seen.append(error)
        raise Interrupted("enough")

    runner.bodies["avatar"] = meanwhile
    lavatar(*SUBMIT)
    assert ["is running with it" in str(error) for error in seen] == [True]
    assert lavatar("subjects", "remove", "ann")[0] == 0


def test_errors_before_a_job_are_json_too(lavatar: Any) -> None:
    code, out, _ = lavatar(*SUBMIT, "--json")
    assert code == 2
    assert json.loads(out)["error"]["exit_code"] == 2


def test_every_end_is_json(lavatar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, code, text in (
        (["jobs", "show", "--json"], 2, "Missing argument"),
        (["jobs", "list", "--json", "--nonsense"], 2, "No such option"),
    ):
        got, out, _ = lavatar(*arguments)
        error = json.loads(out)["error"]
        assert (got, error["exit_code"]) == (code, code)
        assert text in error["message"]
    for raised, code, text in ((KeyboardInterrupt(), 130, "interrupted"), (ValueError("odd"), 1, "ValueError: odd")):

        def broken(*args: object, raised: BaseException = raised) -> None:
            raise raised

        monkeypatch.setattr("lavatar.platform.registry.open_registry", broken)
        got, out, _ = lavatar("jobs", "list", "--json")
        assert (got, json.loads(out)["error"]["exit_code"], json.loads(out)["error"]["message"]) == (code, code, text)


def test_what_nobody_expected_is_an_internal_error(lavatar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("lavatar.platform.registry.open_registry", broken)
    code, _, err = lavatar("jobs", "list")
    assert code == 1
    assert "internal error: ZeroDivisionError: division by zero" in err
    assert "--debug" in err
    assert "Traceback" not in err
    assert "Traceback" in lavatar("jobs", "list", "--debug")[2]


def test_ctrl_c_outside_of_a_job(lavatar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lavatar.platform.registry.open_registry", stopped)
    assert lavatar("jobs", "list")[0] == 130


def test_a_closed_pipe_is_quiet() -> None:
    command = [sys.executable, "-m", "lavatar.platform.cli", "--help"]
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert process.stderr == ""


def test_doctor_names_what_is_missing(lavatar: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lavatar.platform import doctor

    monkeypatch.setenv("LAVATAR_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(doctor.LIBRARIES, "libnowhere.so.7", "libnowhere7")
    code, out, _ = lavatar("doctor", "--json")
    result = json.loads(out)
    checks = {c["name"]: c for c in result["checks"]}
    assert code == 1
    assert result["ok"] is False
    assert checks["system libraries"]["hint"].endswith("apt-get install libnowhere7")
    assert checks["weights"]["state"] == "warning"
    assert "lavatar weights fetch" in checks["weights"]["hint"]
    assert checks["registry"]["state"] == checks["home"]["state"] == checks["packages"]["state"] == "ok"
    monkeypatch.delitem(doctor.LIBRARIES, "libnowhere.so.7")
    monkeypatch.setattr(doctor, "PACKAGES", (*doctor.PACKAGES, "no-such-package"))
    told = lavatar("doctor")[1]
    assert "missing: no-such-package" in told
    assert "x1b" not in told, "colours are for terminals"
    assert told.splitlines()[-1] == "ok      the home: nothing to mend"


def test_doctor_tries_the_store(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lavatar.cluster import objects
    from lavatar.platform import doctor
    from lavatar.platform.home import Home

    assert doctor.store(Home(home)) == []
    monkeypatch.setattr(objects, "FIRST_SECONDS", 0.001)
    monkeypatch.setenv("LAVATAR_STORE", f"file://{tmp_path}/store")
    (good,) = doctor.store(Home(home))
    assert (good.state, good.text) == ("ok", f"file://{tmp_path}/store")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAVATAR_STORE", f"file://{tmp_path}/file/store")
    (bad,) = doctor.store(Home(home))
    assert bad.state == "error"
    assert "Not a directory" in bad.text
    assert "LAVATAR_STORE" in bad.hint


def test_weights_list_and_a_fetch_that_fails(lavatar: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVATAR_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = json.loads(lavatar("weights", "list", "--json")[1])["weights"]
    assert {r["state"] for r in rows} == {"missing"}
    sizes = {r["name"]: r["bytes"] for r in rows}
    assert sizes["selfie_segmenter"] == 249_505
    assert sizes["fan_2d"] is None
    code, table, err = lavatar("weights", "list")
    assert "weights fetch" in err
    assert "size unknown" in next(line for line in table.splitlines() if line.startswith("fan_2d"))
    assert " 0 B" not in table
    code, _, err = lavatar("weights", "fetch", "no_such")
    assert code == 2
    assert "no weights called no_such" in err


def test_reenact_and_evaluate_say_what_to_submit(lavatar: Any, clip: Any) -> None:
    two(lavatar)
    code, _, err = lavatar("reenact", "--avatar", "ann", "--actor", "bob", "--video", clip("x.mp4"), "-o", "out.mp4")
    assert code == 1
    assert "lavatar submit --avatar ann --actor bob" in err
    assert "lavatar submit --avatar ann" in lavatar("evaluate", "--avatar", "ann")[2]
    assert lavatar("evaluate", "--avatar", "anne")[0] == 2


def test_ui_names_a_remote_mlflow(home: Path, monkeypatch: pytest.MonkeyPatch, lavatar: Any) -> None:
    """It looks for runs without a process there, too. This one does not answer."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    code, out, err = lavatar("ui")
    assert code == 0
    assert "MLflow: http://127.0.0.1:9" in out
    assert "MLflow at http://127.0.0.1:9 does not answer" in err
    assert "Ray dashboard: no cluster is running" in out


def test_debug_is_taken_anywhere() -> None:
    assert cli._take_debug(["jobs", "list", "--debug"]) == (["jobs", "list"], True)
    assert cli._take_debug(["--debug", "jobs"]) == (["jobs"], True)
    assert cli._take_debug(["x", "--", "--debug"]) == (["x", "--", "--debug"], False)


def test_meters_and_plain_lines() -> None:
    import io

    from lavatar.contracts import Event
    from lavatar.platform.progress import Meter, PlainDisplay, duration

    clock = {"now": 0.0}
    meter = Meter(lambda: clock["now"])
    for step in range(0, 110, 10):
        meter.update(Event("s", done=500 + step, total=1000, unit="steps"))
        clock["now"] += 1
    assert meter.rate == pytest.approx(10)
    assert meter.left == pytest.approx(40)
    assert meter.text() == "600/1000 steps, 10/s, 40s left"
    meter.update(Event("s", done=1, total=8, unit="frames"))
    assert meter.rate is None
    stream = io.StringIO()
    display = PlainDisplay(stream, lambda: clock["now"])
    display.state("avatar:A", "running")
    for _ in range(50):
        clock["now"] += 0.5
        display.progress("avatar:A", Event("avatar:A", done=int(clock["now"] * 4), total=400, unit="steps"))
    assert len(stream.getvalue().splitlines()) == 3
    assert (duration(8), duration(222), duration(3900)) == ("8s", "3m 42s", "1h 05m")


def test_live_lines_end_in_a_terminal() -> None:
    """The rich display, in a real pseudo-terminal."""
    import pty

    script = (
        "import time\nfrom lavatar.contracts import Event\n"
        "from lavatar.platform.progress import RichDisplay, open_display\n"
        "d = open_display()\nassert isinstance(d, RichDisplay)\nd.state('avatar:A', 'running')\n"
        "[(d.progress('avatar:A', Event('a', done=i, total=20, unit='steps')), time.sleep(0.05)) for i in range(21)]\n"
        "d.message('a picture [of] brackets')\nd.state('avatar:A', 'finished in 2s')\nd.close()\n"
    )
    main, worker = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", script], stderr=worker, stdout=subprocess.DEVNULL)
    os.close(worker)
    text = b""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            piece = os.read(main, 4096)
        except OSError:
            break
        if not piece:
            break
        text += piece
    assert process.wait(30) == 0
    assert b"avatar:A" in text
    assert b"20/20 steps" in text
    assert b"a picture [of] brackets" in text


def test_the_table_shows_the_true_transfer_of_synthetic_pairs() -> None:
    from lavatar.inference.tables import as_text

    figures = {
        "psnr": 20.0,
        "spread": {"psnr": 1.25},
        "expression": {"jaw": {"r": 0.9, "amplitude": 1.1, "error": 0.4}},
    }
    real = as_text({"self": figures, "cross": {"expression": {}}})
    synthetic = as_text({"self": figures, "cross": {"expression": {}, "truth": {**figures, "psnr": 17.5}}})
    assert "cross against truth" not in real
    picture, expression = (line for line in synthetic.splitlines() if line.startswith("cross against truth"))
    assert "17.50 ± 1.25" in picture
    assert "0.90 1.10 0.40" in expression
