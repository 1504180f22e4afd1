"""A pair that was exported elsewhere, imported and used where there is no network at all: clean processes in a network
namespace of their own, which has no interface but a loopback that is down."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from inference_files import RECIPE
from model_files import register_untrained
from serve_files import predicted
from submit_files import LIMIT
from video_files import write_drawn_head

from lavatar.datasets.video import read_frames
from lavatar.platform.home import Home
from lavatar.platform.modelexport import export_model

pytestmark = pytest.mark.slow
PAIR = "lavatar-pair-ann-bob"
CUT = ("unshare", "--user", "--map-root-user", "--net")
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"
WATCH = """
import os, sys

def heard(event, args):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and not isinstance(args[1], (str, bytes))):
        with open(os.environ["ATTEMPTS"], "a") as file:
            file.write(f"{event} {args!r}\\n")

sys.addaudithook(heard)
"""
"""A sitecustomize.py that writes down whoever tries to reach something."""


@pytest.fixture(scope="module")
def cut() -> tuple[str, ...]:
    """What a process is started through that is to have no network. That it has none is shown, not believed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        reach = [sys.executable, "-c", CONNECT, "127.0.0.1", str(server.getsockname()[1])]
        assert subprocess.run(reach, check=False).returncode == 0
        if shutil.which(CUT[0]) is None:
            pytest.skip("there is no unshare (util-linux) to cut the network with")
        done = subprocess.run([*CUT, "true"], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this machine gives a process no network namespace of its own: {done.stderr.strip()}")
        for place in (reach[-2:], ["192.0.2.1", "80"]):
            done = subprocess.run([*CUT, *reach[:-2], *place], capture_output=True, text=True, check=False)
            assert "Network is unreachable" in done.stderr, done.stderr
    return CUT


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair's file, written by an installation that knew the world."""
    folder = tmp_path_factory.mktemp("studio")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        home = Home(folder / "home").ensure()
        register_untrained(home, folder)
        export_model(home, PAIR, folder / "pair.tar")
    return folder / "pair.tar"


def test_a_pair_is_imported_and_reenacted_without_a_network(
    cut: tuple[str, ...], file: Path, weights: Path, tmp_path: Path
) -> None:
    """Nothing else is there than the tracker's file: no LPIPS, no cache. And nobody even tries to reach somebody."""
    video, frames = write_drawn_head(tmp_path / "driver.mp4")
    for name in ("weights", "user", "site", "empty"):
        (tmp_path / name).mkdir()
    shutil.copy(weights / "face_landmarker.task", tmp_path / "weights")
    (tmp_path / "site" / "sitecustomize.py").write_text(WATCH)
    attempts = tmp_path / "attempts"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LAVATAR_", "MLFLOW_", "AWS_", "XDG_", "HTTP"))}
    paths = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **clean,
        "LAVATAR_HOME": str(tmp_path / "home"),
        "LAVATAR_WEIGHTS": str(tmp_path / "weights"),
        "HOME": str(tmp_path / "user"),
        "PYTHONPATH": paths,
        "ATTEMPTS": str(attempts),
        "OMP_NUM_THREADS": "1",
    }

    def lavatar(*args: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        command = [*cut, sys.executable, "-m", "lavatar.platform.cli", *map(str, args)]
        return subprocess.run(
            command, env={**environment, **more}, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT,
            check=False,
        )  # fmt: skip

    done = lavatar("models", "import", file, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == PAIR
    reenact = ("reenact", "--avatar", "ann", "--actor", "bob", "--video", video, "-o", tmp_path / "out.mp4")
    done = lavatar(*reenact, LAVATAR_WEIGHTS=str(tmp_path / "empty"))
    assert done.returncode == 1
    assert "lavatar weights fetch face_landmarker" in done.stderr
    done = lavatar(*reenact, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == f"{PAIR}/1"
    drawn = np.stack([rgb for _, _, rgb in read_frames(tmp_path / "out.mp4")])
    assert (len(drawn), drawn.std() > 1) == (len(frames), True)
    assert not attempts.exists(), attempts.read_text()
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["face_landmarker.task"]
    assert list((tmp_path / "empty").iterdir()) == []
    subprocess.run([sys.executable, "-c", CONNECT, "127.0.0.1", "9"], env=environment, capture_output=True, check=False)
    assert "socket.connect" in attempts.read_text(), "the watch would have heard it"

    uri, size = f"sqlite:///{tmp_path / 'home' / 'mlflow.db'}", RECIPE.avatar.image_size
    portraits = predicted(uri, f"models:/{PAIR}@champion", frames, tmp_path, before=cut)
    assert portraits.shape == (len(frames), size, size, 3)
    assert (portraits == predicted(uri, f"models:/{PAIR}@champion", frames, tmp_path)).all()
