"""An installation that is not this checkout has every file of the package."""

from __future__ import annotations

import configparser
from fnmatch import fnmatch
from pathlib import Path

from setuptools import find_packages

ROOT = Path(__file__).parents[2]


def test_every_file_is_a_module_of_a_package_or_named_as_its_data() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    include = setup["options.packages.find"]["include"].split()
    packages = {name.replace(".", "/") for name in find_packages(str(ROOT), include=include)}
    data = [f"lavatar/{pattern}" for pattern in setup["options.package_data"]["lavatar"].split()]
    files = [path for path in (ROOT / "lavatar").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    names = {str(path.relative_to(ROOT)) for path in files}
    modules = {name for name in names if name.endswith(".py") and name.rpartition("/")[0] in packages}
    assert len(modules) > 200
    left_out = {name for name in names - modules if not any(fnmatch(name, pattern) for pattern in data)}
    assert left_out == set()
    assert all(any(fnmatch(name, pattern) for name in names) for pattern in data), "a pattern of nothing"
