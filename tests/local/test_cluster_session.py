"""The local Ray: private, on loopback alone, and gone with all its processes however the submit ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from sessions import AGENTS_LINGER, living

from lavatar.cluster import session
from lavatar.cluster.resources import Demand, Machine, Node, Share, ray_options, share_of
from lavatar.configs.resources import StageResources
from lavatar.errors import PlacementError
from lavatar.training.checkpoint import latest


def _left(session_id: int, mark: str) -> list[int]:
    """Processes of that session, or with `mark` in their environment."""
    return [
        one.process.pid
        for one in living()
        if one.session == session_id or one.environment.get("LAVATAR_TEST_MARK") == mark
    ]


def _outlive(session_id: int, mark: str, seconds: float, but: str | None = None) -> list[str]:
    """Command lines of what is left after so long, without those that contain `but`."""
    deadline, left = time.monotonic() + seconds, [""]
    while left and time.monotonic() < deadline:
        time.sleep(0.2)
        left = []
        for pid in _left(session_id, mark):
            with contextlib.suppress(psutil.Error):
                left.append(" ".join(psutil.Process(pid).cmdline())[:120].strip())
        left = [line for line in left if but is None or but not in line]
    return left


def _kill_all(session_id: int, mark: str) -> None:
    for pid in _left(session_id, mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


ENDINGS = [
    ("raise", 1), (signal.SIGINT, 130), (signal.SIGTERM, 130),
    pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),  # two minutes: its agents see it late
]  # fmt: skip


@pytest.mark.parametrize(("ending", "code"), ENDINGS)
def test_no_process_outlives_its_submit(
    tmp_path: Path, request: pytest.FixtureRequest, ending: str | signal.Signals, code: int
) -> None:
    mark = uuid.uuid4().hex
    environment = {**os.environ, "LAVATAR_TEST_MARK": mark}
    environment.pop("RAY_AUTH_TOKEN_PATH", None)
    script, name = Path(__file__).parent / "run_stage.py", "slow" if isinstance(ending, signal.Signals) else ending
    process = subprocess.Popen(
        [sys.executable, script, tmp_path, name],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    request.addfinalizer(lambda: _kill_all(process.pid, mark))  # where the test fails
    if isinstance(ending, signal.Signals):
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        assert len(_left(process.pid, mark)) > 5
        if ending == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, ending)  # as a terminal or `timeout` does: to the whole group
    _, errors = process.communicate(timeout=200)
    assert process.returncode == code, errors
    if ending == signal.SIGKILL:
        assert not _outlive(process.pid, mark, 15, "Agent"), "two would train at once"
    assert not _outlive(process.pid, mark, AGENTS_LINGER if ending == signal.SIGKILL else 3)
    if code == 130:
        (folder,) = (tmp_path / "checkpoints").iterdir()
        kept, _ = latest(folder / "ynet")
        assert kept is not None
        assert int(kept.name.removeprefix("step-")) >= 8


def test_ray_listens_on_loopback_alone_and_its_token_is_private(ray_session: session.Session) -> None:
    assert ray_session.address.startswith("127.0.0.1:")
    listening = [
        connection.laddr
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 3
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert len(token.read_text()) == 64


def test_without_the_token_nobody_gets_in(ray_session: session.Session, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    environment = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    code = f"import ray; ray._raylet.GcsClient(address={ray_session.address!r}).internal_kv_keys(b'', None, 5)"
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode != 0
    assert "nauthenticated" in answer.stderr or "InvalidAuthToken" in answer.stderr


def test_sigterm_stays_with_whoever_had_it(tmp_path: Path) -> None:
    code = (
        "import signal, sys; from pathlib import Path; from lavatar.cluster import session\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: print('mine', flush=True))\n"
        "own = session.start(Path(sys.argv[1]), cpus=1); signal.raise_signal(signal.SIGTERM); own.stop()"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", code, str(tmp_path)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert (answer.returncode, answer.stdout) == (0, "mine\n"), answer.stderr


def test_a_second_session_joins_and_does_not_stop_the_first(ray_session: session.Session, tmp_path: Path) -> None:
    import ray

    joined = session.start(tmp_path)
    assert joined.address == ray_session.address
    joined.stop()
    assert ray.is_initialized()
    assert not (tmp_path / "ray").exists()


def test_a_long_home_gets_a_short_folder(tmp_path: Path) -> None:
    home = tmp_path / ("x" * 80)
    folder = session.private_folder(home)
    assert len(f"{folder}/t{session.SOCKET_NAME}") <= session.SOCKET_LIMIT
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder == session.private_folder(home) != session.private_folder(tmp_path / ("y" * 80))
    for name in ("x", "y"):
        session.private_folder(tmp_path / (name * 80)).rmdir()


def test_living_sessions_are_found_with_their_dashboards(tmp_path: Path) -> None:
    assert session.running(tmp_path) == []
    folder = session.temp_of(session.private_folder(tmp_path))
    folder.mkdir()
    gone = subprocess.Popen(["true"])
    gone.wait()
    for pid, port in ((gone.pid, 1), (os.getpid(), 2)):
        record = {"pid": pid, "address": "x", "dashboard": f"http://127.0.0.1:{port}"}
        (folder / f"session-{pid}.json").write_text(json.dumps(record))
    assert session.running(tmp_path) == ["http://127.0.0.1:2"]
    for file in folder.glob("session-*.json"):
        file.unlink()
    folder.rmdir()
    if folder.parent != tmp_path / "ray":
        folder.parent.rmdir()


def test_a_share_is_what_is_wanted_as_far_as_it_can_be_lowered() -> None:
    laptop, cluster = Machine((Node(2),)), Machine((Node(16, 4, 60),) * 3)
    assert share_of(StageResources(cpus=1), laptop) == Share(1)
    small = share_of(StageResources(cpus=8, gpus=1), laptop)
    assert (small.cpus, small.gpus, ray_options(small)) == (2, 0, {"CPU": 2})
    assert any("on CPUs" in note for note in small.notes)
    roomy = share_of(StageResources(cpus=1, gpus=1, memory_gb=4), Machine((Node(2, 1, 8),)))
    assert ray_options(roomy) == {"CPU": 1, "GPU": 1, "memory": 4 * 2**30}
    assert share_of(StageResources(cpus=4, gpus=1, workers=12), cluster) == Share(4, 1, 12)
    assert share_of(StageResources(cpus=2, gpus=0.25, workers=24), cluster).demand == Demand(48, 6)


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"gpus": 8}, "a worker of pair asks for 8 GPUs, the largest node has 4"),
        ({"memory_gb": 61}, "asks for 61 GB of memory, the largest node offers 60.0 GB"),
        ({"workers": 13, "gpus": 1, "cpus": 1}, "13 workers of pair (1 CPU, 1 GPU each) are wanted, .* room for 12"),
        ({"workers": 4, "gpus": 4, "cpus": 1}, "4 workers .* room for 3"),
        ({"workers": 9, "memory_gb": 30}, "room for 6"),
        ({"workers": 13, "gpus": 0.6, "cpus": 1}, "13 workers .* room for 12"),
        ({"workers": 25, "gpus": 0.4, "cpus": 1}, "25 workers .* room for 24"),
    ],
)
def test_what_can_never_be_placed_is_refused_with_the_reason(wanted: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlacementError, match=reason.replace("(", r"\(").replace(")", r"\)")) as caught:
        share_of(StageResources(**wanted), Machine((Node(16, 4, 60),) * 3), "pair")
    assert "resources.pair." in caught.value.hint


def test_several_gpus_a_worker_of_a_cluster_without_any_are_refused() -> None:
    """One, or a part of one, is what the recipes ask for: that is lowered."""
    with pytest.raises(PlacementError, match="asks for 64 GPUs, the largest node has 0"):
        share_of(StageResources(cpus=1, gpus=64), Machine((Node(2),)), "avatar")
    assert share_of(StageResources(cpus=1, gpus=0.5), Machine((Node(2),))).notes == (
        "0.5 GPUs wanted, the cluster has none: on CPUs",
    )


def test_a_cluster_whose_nodes_are_not_up_yet_is_told() -> None:
    """As Kubernetes and the clouds begin: a head that takes no work."""
    with pytest.raises(PlacementError, match="no node of the cluster has a CPU") as caught:
        share_of(StageResources(cpus=1), Machine((Node(0),)), "pair")
    assert "lavatar cluster status --wait" in caught.value.hint
