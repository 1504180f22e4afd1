"""A whole job done again by `lavatar reproduce`, nothing replaced: on a CPU every figure and file is the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from submit_files import Lavatar

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_job_done_again_gives_the_same_to_the_bit(undisturbed_home: Lavatar) -> None:
    (job,) = json.loads(undisturbed_home("jobs", "list", "--json")[1])["jobs"]
    code, out = undisturbed_home("reproduce", job["id"], "--json")
    assert code == 0, undisturbed_home.errors()
    found = json.loads(out)
    assert found["same"]
    assert len(found["stages"]) == 5
    assert sum(stage["figures"] for stage in found["stages"]) > 50
    assert [stage["files_differ"] for stage in found["stages"]] == [[]] * 5
    assert not list(undisturbed_home.home.glob("reproductions/*"))
