"""Where a run comes from: the code with what was changed in it, packages, command and environment; without secrets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lavatar.contracts import measures_time
from lavatar.platform import gpus, provenance
from lavatar.platform.machine import describe


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package in a repository of its own, committed."""
    folder = tmp_path / "repository" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "rate.py").write_text("RATE = 1\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def test_code_as_it_was_committed(package: Path) -> None:
    found = provenance.find_code(package)
    assert (found.commit, found.diff, found.state) == (git(package, "rev-parse", "HEAD").strip(), "", "as committed")


def test_what_was_changed_and_what_is_new_is_in_the_diff_without_secrets(package: Path) -> None:
    (package / "rate.py").write_text("RATE = 2\nURL = 'postgresql://u:s3cr3t@host/db'\n")
    (package / "new file.py").write_text("NEW = 3\n")
    (package.parent / "notes.txt").write_text("not of the package")
    found = provenance.find_code(package)
    assert "-RATE = 1" in found.diff
    assert "+RATE = 2" in found.diff
    assert "+NEW = 3" in found.diff
    assert "s3cr3t" not in found.diff
    assert "not of the package" not in found.diff
    assert found.state.startswith("changed: diff ")
    before = found.state
    (package / "rate.py").write_text("RATE = 4\n")
    assert provenance.find_code(package).state != before


def test_a_long_diff_is_cut_and_says_so(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "MOST_DIFF", 500)
    (package / "rate.py").write_text("RATE = 2\n" * 1000)
    found = provenance.find_code(package)
    assert len(found.diff) < 700
    assert "[cut here: the diff has " in found.diff


def test_an_installed_package_has_no_commit_of_the_repository_around_it(package: Path) -> None:
    (package.parent / ".gitignore").write_text("site\n")
    site = package.parent / "site" / "package"
    site.mkdir(parents=True)
    (site / "__init__.py").write_text("")
    found = provenance.find_code(site)
    assert (found.commit, found.diff) == ("", "")
    assert found.state == "installed: not run from a git checkout"


def test_a_machine_without_git(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(package))
    found = provenance.find_code(package)
    assert (found.commit, found.state) == ("", "no git on this machine")
    assert found.version == provenance.find_code(Path(provenance.__file__).parents[1]).version


def test_packages_are_names_and_versions_alone() -> None:
    text = provenance.package_list()
    packages = provenance.parse_packages(text)
    assert packages["mlflow"]
    assert packages["torch"]
    assert "/" not in text
    assert "@" not in text


def test_the_environment_that_bears_on_results(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "OMP_NUM_THREADS": "3",
        "LAVATAR_REGISTRY": "postgresql://u:s3cr3t@host/db",
        "LAVATAR_API_TOKEN": "s3cr3t",
        "PIP_INDEX_URL": "https://packages.example/simple",
        "LAVATAR_HOME": "/somewhere",
    }.items():
        monkeypatch.setenv(name, value)
    found = provenance.variables()
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["LAVATAR_API_TOKEN"] == "***"
    assert not {"PIP_INDEX_URL", "LAVATAR_HOME"} & set(found)
    assert "s3cr3t" not in json.dumps(found)


def test_the_command_is_what_the_user_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(provenance.COMMAND_VARIABLE, raising=False)
    monkeypatch.setattr("sys.argv", ["/x/lavatar/platform/cli.py", "submit", "--set", "a.b=[1, 2]", "token=s3cr3t"])
    assert provenance.command_line() == "lavatar submit --set 'a.b=[1, 2]' token=***"
    monkeypatch.setenv(provenance.COMMAND_VARIABLE, "lavatar submit --detach")
    assert provenance.command_line() == "lavatar submit --detach"


def test_the_machine() -> None:
    found = describe()
    assert found["cores"] == f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"
    assert float(found["memory"].removesuffix(" GB")) > 0
    assert found["processor"]


NVML = """
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory;
typedef struct { unsigned int gpu, memory; } use;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned int *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int i, void **h) { *h = (void *)(0x700000000000ull + i); return 0; }
int nvmlDeviceGetName(void *h, char *t, unsigned int n) { strncpy(t, "NVIDIA Test", n); return 0; }
int nvmlSystemGetDriverVersion(char *t, unsigned int n) { strncpy(t, "570.1", n); return 0; }
int nvmlDeviceGetMemoryInfo(void *h, memory *m) { m->total = 80000000000ull; m->used = 20000000000ull; return 0; }
int nvmlDeviceGetUtilizationRates(void *h, use *u) {
    if ((unsigned long long)h == 0x700000000001ull) return 3; /* not supported */
    u->gpu = 93; return 0;
}
int nvmlDeviceGetPowerUsage(void *h, unsigned int *mw) { *mw = 350500; return 0; }
"""


def test_gpus_by_the_drivers_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is a stand-in with NVML's signatures: there may be no GPU here."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "nvml.c").write_text(NVML)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "nvml.so", tmp_path / "nvml.c"], check=True)
    monkeypatch.setattr(gpus, "LIBRARY", str(tmp_path / "nvml.so"))
    found = gpus.Gpus()
    assert found.describe() == "NVIDIA Test, NVIDIA Test (driver 570.1)"
    sample = found.sample()
    assert sample["gpu_0_memory_usage_megabytes"] == 20000.0
    assert sample["gpu_1_memory_usage_percentage"] == 25.0
    assert sample["gpu_0_utilization_percentage"] == 93.0
    assert sample["gpu_1_power_usage_watts"] == 350.5
    assert "gpu_1_utilization_percentage" not in sample
    monkeypatch.setattr(gpus, "LIBRARY", str(tmp_path / "none.so"))
    assert (gpus.Gpus().describe(), gpus.Gpus().sample()) == ("none", {})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("avatar/total", False),
        ("avatar/timing/samples_per_second", True),
        ("system/cpu_utilization_percentage", True),
        ("ynet.seconds", True),
        ("seconds", True),
        ("mapping.first_step", True),
        ("self.expression.jaw.error", False),
    ],
)
def test_what_measures_time(name: str, expected: bool) -> None:
    assert measures_time(name) is expected
