"""Where a run's figures come from: code, packages, machine, command line and environment of the process that starts it.

All of it goes to MLflow, which others may read: texts are masked, packages are named without the place that they came
from, and of the environment only what bears on results is kept.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from lavatar.masking import HIDDEN, is_secret, masked
from lavatar.platform import machine

COMMAND_VARIABLE = "LAVATAR_COMMAND"
"""How a job was asked for, where another process than the one that was asked runs it."""
MOST_DIFF = 1_000_000
"""Characters of a diff that are kept."""
MOST_COMMAND = 8000
FOLDER = "provenance"
"""Of an MLflow run's artefacts."""
DIFF, PACKAGES, ENVIRONMENT, RECIPE = "code.diff", "packages.txt", "environment.json", "recipe.json"
COMMIT_TAG, CODE_TAG, VERSION_TAG = "mlflow.source.git.commit", "lavatar.code", "lavatar.version"
COMMAND_TAG, PACKAGES_TAG = "lavatar.command", "lavatar.packages"
SOURCE_TAG, SOURCE_TYPE_TAG = "mlflow.source.name", "mlflow.source.type"
"""What MLflow's list of runs shows as their source: the command without its options."""
MOST_SOURCE = 80
_GIT_SECONDS = 20.0
_BEARING = ("LAVATAR_", "OMP_", "MKL_", "OPENBLAS_", "CUDA_", "NCCL_", "TORCH", "PYTORCH_", "DS_", "CUBLAS_")
"""Beginnings of the variables that bear on results."""
_PLACES = ("LAVATAR_HOME", "LAVATAR_HANDED", COMMAND_VARIABLE)


@dataclass(frozen=True)
class Code:
    """Version of lavatar and, where it runs from a git checkout, the commit and what differs from it."""

    version: str
    commit: str = ""
    diff: str = ""
    note: str = ""  # why there is no commit

    @property
    def state(self) -> str:
        """In a line: what the commit does not say."""
        if self.note:
            return self.note
        return f"changed: diff {_digest(self.diff)}" if self.diff else "as committed"


@dataclass(frozen=True)
class Provenance:
    """`tags` for every run; `files` (texts by name) once a job."""

    tags: Mapping[str, str]
    files: Mapping[str, str] = field(repr=False)

    @property
    def digest(self) -> str:
        return _digest(json.dumps([dict(self.tags), dict(self.files)], sort_keys=True))


def gather(recipe: Mapping[str, Any]) -> Provenance:
    """Of this process, for a job of that recipe."""
    code, packages, command = find_code(), package_list(), command_line()
    texts = {
        PACKAGES: packages,
        RECIPE: json.dumps(recipe, indent=1, sort_keys=True),
        ENVIRONMENT: json.dumps(
            {"command": command, "machine": machine.describe(), "variables": variables()}, indent=1, sort_keys=True
        ),
    }
    tags = {
        VERSION_TAG: code.version,
        CODE_TAG: code.state,
        COMMAND_TAG: command,
        SOURCE_TAG: " ".join(itertools.takewhile(lambda word: not word.startswith("-"), command.split()))[:MOST_SOURCE],
        SOURCE_TYPE_TAG: "LOCAL",
        PACKAGES_TAG: _digest(packages),
        **({COMMIT_TAG: code.commit} if code.commit else {}),
    }
    return Provenance(tags, {**texts, **({DIFF: code.diff} if code.diff else {})})


def find_code(package: Path | None = None) -> Code:
    """Of the package that runs. The diff is of its folder alone, files included that git does not know yet."""
    package = package or Path(__file__).parents[1]
    version = _version()
    try:
        _git(package, "ls-files", "--error-unmatch", "__init__.py")  # else it is installed within another's checkout
        commit = _git(package, "rev-parse", "HEAD").strip()
        changes = _git(package, "diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--", ".")
        unknown = _git(package, "ls-files", "--others", "--exclude-standard", "-z", "--", ".").split("\0")
        for name in filter(None, unknown):
            changes += _git(package, "diff", "--no-color", "--no-ext-diff", "--no-index", "--", os.devnull, name)
    except FileNotFoundError:
        return Code(version, note="no git on this machine")
    except (OSError, subprocess.SubprocessError):
        return Code(version, note="installed: not run from a git checkout")
    return Code(version, commit, _cut(masked(changes)))


def _version() -> str:
    try:
        return metadata.version("lavatar")
    except metadata.PackageNotFoundError:  # run from its sources
        return "unknown"


def _git(folder: Path, *words: str) -> str:
    """What git answers in `folder`. Raises OSError, SubprocessError."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}  # of another repository, in a hook
    command = ["git", "-c", "core.fsmonitor=false", "-c", "core.quotepath=false", *words]
    done = subprocess.run(command, cwd=folder, env=plain, capture_output=True, timeout=_GIT_SECONDS, check=False)
    if done.returncode not in ((0, 1) if "--no-index" in words else (0,)):  # 1: the two differ
        raise subprocess.CalledProcessError(done.returncode, command)
    return done.stdout.decode(errors="replace")


def _cut(text: str) -> str:
    if len(text) <= MOST_DIFF:
        return text
    return f"{text[:MOST_DIFF]}\n[cut here: the diff has {len(text)} characters, SHA-256 {_digest(text)}…]\n"


def package_list() -> str:
    """Every installed distribution, NAME==VERSION a line."""
    found = {(str(each.metadata["Name"]), each.version) for each in metadata.distributions() if each.metadata["Name"]}
    return "".join(f"{name}=={version}\n" for name, version in sorted(found, key=lambda each: each[0].lower()))


def parse_packages(text: str) -> dict[str, str]:
    """The reverse of `package_list`."""
    pairs = (line.partition("==") for line in text.splitlines() if "==" in line)
    return {name: version for name, _, version in pairs}


def command_line() -> str:
    """What the user typed, without secrets."""
    handed = os.environ.get(COMMAND_VARIABLE, "").strip()
    program = Path(sys.argv[0]).name
    words = ["lavatar" if program == "cli.py" else program, *sys.argv[1:]]
    return masked(handed or shlex.join(words))[:MOST_COMMAND]


def variables() -> dict[str, str]:
    """Those that bear on results, without secrets."""
    chosen = {n: value for n, value in os.environ.items() if n.startswith(_BEARING) and n not in _PLACES}
    return {name: HIDDEN if is_secret(name, value) else value for name, value in chosen.items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
