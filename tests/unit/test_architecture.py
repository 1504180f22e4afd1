"""The order of the rooms is a contract in setup.cfg; here it is enforced, and shown to be able to fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter over the tree at `root`."""
    tool = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [str(tool), "--config", str(ROOT / "setup.cfg"), "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_imports_point_down_the_list_of_rooms() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_an_import_that_points_up_is_found(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "lavatar", tmp_path / "lavatar", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "lavatar" / "models" / "wrong.py").write_text("import cv2\nimport lavatar.platform\nimport ray\n")
    result = lint(tmp_path)
    assert result.returncode == 1
    assert "3 broken" in result.stdout


def test_no_module_of_the_standard_library_is_shadowed() -> None:
    code = "import platform; assert platform.python_version(); print(platform.__file__)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "lavatar" not in result.stdout
