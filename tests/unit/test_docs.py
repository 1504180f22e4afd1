"""docs/METHOD.md and docs/CONVENTIONS.md say what the code has."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from lavatar.configs.recipe import Recipe, all_keys, load_recipe
from lavatar.contracts import EXPRESSIONS

ROOT = Path(__file__).resolve().parents[2]
METHOD, CONVENTIONS = ROOT / "docs" / "METHOD.md", ROOT / "docs" / "CONVENTIONS.md"
SECURITY = ROOT / "docs" / "SECURITY.md"


def tables(path: Path) -> Iterator[dict[str, str]]:
    """Rows of all tables, by the names in their header."""
    header: list[str] | None = None
    for line in path.read_text().splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if header is None:
            header = cells
        elif not set(cells[0]) <= {"-", " "}:
            yield dict(zip(header, cells, strict=True))


def mapped() -> list[dict[str, str]]:
    return [row for row in tables(METHOD) if "symbol" in row]


def look_up(dotted: str, module: str) -> Any:
    """The object, or the default of a configuration's field."""
    value: Any = importlib.import_module(module)
    for part in dotted.split("."):
        fields = getattr(value, "model_fields", {}) if isinstance(value, type) else {}
        value = fields[part].default if part in fields else getattr(value, part)
    return value


def test_the_map_is_whole() -> None:
    rows = mapped()
    named = " ".join(row["paper"] for row in rows)
    for number in ("1, 3", "2", "4", "5", "6", "7", "8"):
        assert f"Eq. {number}" in named
    assert len(rows) > 40


@pytest.mark.parametrize("row", mapped(), ids=lambda row: row["symbol"].strip("`"))
def test_every_path_symbol_and_test_of_the_method_exists(row: dict[str, str]) -> None:
    path = ROOT / row["file"]
    assert path.is_file()
    module = row["file"].removesuffix(".py").replace("/", ".")
    value = look_up(row["symbol"].strip("`"), module)
    assert_test_exists(row["test"])
    if "value" in row:
        assert value == ast.literal_eval(row["value"])


def assert_test_exists(test: str) -> None:
    """FILE::NAME, a test at the top of its file."""
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    assert name.startswith("test_")
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", tables(SECURITY), ids=lambda row: row["attempt"])
def test_every_line_of_the_threat_model_has_its_test(row: dict[str, str]) -> None:
    assert row["attempt"]
    assert row["what holds it"]
    assert_test_exists(row["test"])


def test_the_threat_model_speaks_of_each_reader_and_of_what_it_does_not_hold() -> None:
    attempts = " ".join(row["attempt"] for row in tables(SECURITY))
    for named in (
        "token",
        "MLflow",
        "tar",
        "picture",
        "video",
        "YAML",
        "SQL",
        "shell",
        "pickle",
        "checkpoint",
        "--set",
    ):
        assert named in attempts
    assert "## What is not held" in SECURITY.read_text()


def test_every_property_test_is_in_the_threat_model() -> None:
    """And so is every test of input from outside."""
    text = SECURITY.read_text()
    files = sorted(path.name for path in (ROOT / "tests" / "unit").glob("test_outside_*.py"))
    assert len(files) >= 4
    for file in files:
        tree = ast.parse((ROOT / "tests" / "unit" / file).read_text())
        given = {
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and any("given" in ast.unparse(d) for d in node.decorator_list)
        }
        assert len(given) >= 5
        missing = [name for name in given if f"{file}::{name}" not in text]
        assert set(missing) <= {"test_any_json_as_metadata_is_refused", "test_what_is_read_is_what_safe_load_reads"}


def test_every_test_named_in_the_text_exists() -> None:
    for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", METHOD.read_text()):
        assert f"def {name}(" in (ROOT / file).read_text()


RECIPES = ("paper", "official", "tiny", "fast")


def differences(*names: str) -> list[dict[str, str]]:
    """Rows of the table that compares these recipes."""
    return [row for row in tables(METHOD) if set(row) == {"key", *(f"`{name}`" for name in names)}]


def differing(*names: str) -> set[str]:
    """Every key in which these recipes are not all alike."""
    recipes = [load_recipe(name) for name in names]
    return {key for key in all_keys() if len({repr(value_of(recipe, key)) for recipe in recipes}) > 1}


def value_of(recipe: Recipe, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), recipe)


def test_the_table_of_differences_is_that_of_the_recipes() -> None:
    assert {row["key"] for row in differences("paper", "official")} == differing("paper", "official")


def test_the_table_of_weights_and_rates_is_that_of_the_recipes() -> None:
    named = re.compile(r"\w+_loss\.\w+|avatar_learning\.(rate_\w+|perceptual_every)|\w+\.learning_rate")
    names = ("paper", "tiny", "fast")
    assert {row["key"] for row in differences(*names)} == set(filter(named.fullmatch, differing(*names)))


@pytest.mark.parametrize(
    ("row", "name"),
    [(row, name) for row in tables(METHOD) if "key" in row for name in RECIPES if f"`{name}`" in row],
    ids=lambda value: value if isinstance(value, str) else value["key"],
)
def test_the_values_in_tables_of_recipes_are_theirs(row: dict[str, str], name: str) -> None:
    """A cell begins with the value, as --set takes it; after a colon it may say what that means."""
    value = row[f"`{name}`"].partition(": ")[0]
    assert load_recipe(name, [f"{row['key']}={value}"]) == load_recipe(name)


@pytest.mark.parametrize("row", [r for r in tables(CONVENTIONS) if "constant" in r], ids=lambda r: r["constant"])
def test_constants_of_the_conventions_are_the_codes(row: dict[str, str]) -> None:
    module, _, rest = row["constant"].strip("`").rpartition(".")
    name = rest
    while not (ROOT / (module.replace(".", "/") + ".py")).is_file():  # Class.field: the module is one further up
        module, _, part = module.rpartition(".")
        name = f"{part}.{name}"
    assert look_up(name, module) == ast.literal_eval(row["value"])


def test_every_expression_measure_is_defined_in_order() -> None:
    assert tuple(row["measure"] for row in tables(CONVENTIONS) if "measure" in row) == EXPRESSIONS


def test_the_picture_of_the_synthetic_subjects_is_what_the_documented_command_draws(tmp_path: Path) -> None:
    (command,) = re.findall(r'^    python -c "(.*contact_sheet.*)"$', CONVENTIONS.read_text(), re.MULTILINE)
    drawn = tmp_path / "synthetic.png"
    exec(command.replace("docs/synthetic.png", str(drawn)), {})
    kept, made = (cv2.imread(str(path)).astype(int) for path in (ROOT / "docs" / "synthetic.png", drawn))
    assert kept.shape == made.shape
    assert np.abs(kept - made).mean() < 0.1  # edges of the labels may differ by OpenCV's version


def test_every_picture_is_shown() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(f"](docs/{path.name})" in text for path in (ROOT / "docs").glob("*.png"))
