"""Which version is the champion, in MLflow's real registry: what is better, what cannot be compared, the way back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lavatar.errors import JobError
from lavatar.platform.champions import FIGURE_TAG, HELD_OUT_TAG, Contest, contend, crown, history, roll_back
from lavatar.platform.home import Home
from lavatar.platform.tracking import connect

sys.path.insert(0, str(Path(__file__).parent))
from model_files import Models, mlflow_tables, models
from platform_fakes import plain_digest

__all__ = ["mlflow_tables", "models", "plain_digest"]
NAME = "lavatar-avatar-A"


def add(models: Models, frames: str | None = "same", **measured: float) -> int:
    """A version with these figures of self reenactment, on these frames."""
    tags = {f"{FIGURE_TAG}self/{name}": str(value) for name, value in measured.items()}
    tags |= {HELD_OUT_TAG: frames} if frames else {}
    if NAME not in {model.name for model in models.client.search_registered_models()}:
        models.client.create_registered_model(NAME)
    return int(models.client.create_model_version(NAME, "file:///nowhere", tags=tags).version)


def decide(models: Models, version: int, policy: str = "better", figure: str = "self/lpips") -> str:
    tags = models.client.get_model_version(NAME, str(version)).tags
    return contend(models.home, models.client, NAME, version, Contest(policy, figure), tags)


def test_the_champion_moves_only_to_what_is_better(models: Models) -> None:
    first = add(models, lpips=0.05, psnr=30.0)
    assert decide(models, first) == f"{NAME} version 1 is champion: it is the first that was measured"
    worse = add(models, lpips=0.06, psnr=31.0)
    told = f"{NAME} version 1 stays champion: self/lpips 0.06 of version 2, 0.05 of version 1"
    assert decide(models, worse) == told
    assert decide(models, worse, figure="self/psnr").endswith("is champion: self/psnr 31 of version 2, 30 of version 1")
    better = add(models, lpips=0.04, psnr=20.0)
    assert "version 3 is champion: self/lpips 0.04 of version 3, 0.06 of version 2" in decide(models, better)
    assert "is champion already" in decide(models, better)
    same = add(models, lpips=0.04)
    assert "version 3 stays champion" in decide(models, same), "as good is not better"
    assert history(models.client.get_registered_model(NAME).tags, 3) == [1, 2, 3]


@pytest.mark.parametrize(
    ("frames", "figures", "reason"),
    [
        (
            "others",
            {"lpips": 0.01},
            "version 2 was measured on other held-out frames, or in another way, and cannot be compared",
        ),
        (None, {}, "version 2 was never measured, so the two cannot be compared"),
        ("same", {"ssim": 0.9}, "self/lpips of version 2 or 1 is missing, so the two cannot be compared"),
    ],
)
def test_what_cannot_be_compared_leaves_the_champion(
    models: Models, frames: str | None, figures: dict[str, float], reason: str
) -> None:
    decide(models, add(models, lpips=0.05, psnr=30.0))
    told = decide(models, add(models, frames, **figures))
    assert told == f"{NAME} version 1 stays champion: {reason}; if you want it: lavatar models promote {NAME}/2"
    assert models.champion(NAME) == 1


def test_psnr_decides_where_lpips_is_missing(models: Models) -> None:
    decide(models, add(models, lpips=0.05, psnr=30.0))
    assert "self/psnr 30.5 of version 2, 30 of version 1" in decide(models, add(models, psnr=30.5))
    assert models.champion(NAME) == 2


def test_a_champion_of_before_that_nobody_measured_stays(models: Models) -> None:
    models.client.set_registered_model_alias(NAME, "champion", str(add(models, None)))
    assert "version 1 stays champion: version 1 was never measured" in decide(models, add(models, lpips=0.1))


def test_always_and_never(models: Models) -> None:
    first = add(models, lpips=0.05)
    assert "does not become champion: evaluation.promote is never" in decide(models, first, "never")
    assert models.champion(NAME) is None
    decide(models, first)
    assert "version 2 is champion: evaluation.promote is always" in decide(models, add(models, None), "always")
    assert models.champion(NAME) == 2


def test_the_users_own_aliases_are_left_alone(models: Models) -> None:
    first = add(models, lpips=0.05)
    models.client.set_registered_model_alias(NAME, "approved", str(first))
    decide(models, first)
    decide(models, add(models, lpips=0.01))
    assert {alias: int(number) for alias, number in models.client.get_registered_model(NAME).aliases.items()} == {
        "approved": 1,
        "champion": 2,
    }


@pytest.mark.parametrize("moment", ["set_registered_model_tag", "set_registered_model_alias"])
def test_of_two_homes_that_decide_at_once_the_better_version_wins(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Both compare with the same champion; the better one is crowned before the other, or between two of its calls."""
    decide(models, add(models, lpips=0.05))
    better, worse = add(models, lpips=0.03), add(models, lpips=0.04)
    other = connect(models.home)
    plain, tags = getattr(other, moment), models.client.get_model_version(NAME, str(worse)).tags
    said: list[str] = []

    def late(*args: str) -> None:
        if not said:
            said.append(decide(models, better))
        plain(*args)

    monkeypatch.setattr(other, moment, late)
    told = contend(Home(tmp_path / "other").ensure(), other, NAME, worse, Contest("better", "self/lpips"), tags)
    assert said == [f"{NAME} version 2 is champion: self/lpips 0.03 of version 2, 0.05 of version 1"]
    assert models.champion(NAME) == better
    assert told == f"{NAME} version 2 stays champion: self/lpips 0.03 of version 2, 0.04 of version 3"
    crown(models.home, models.client, NAME, worse)
    decide(models, add(models, lpips=0.035))
    assert models.champion(NAME) == 4, "a version that was champion earlier is no rival"


def test_rollback_goes_back_one_by_one_over_what_was_deleted(models: Models) -> None:
    for lpips in (0.05, 0.04, 0.03, 0.02):
        decide(models, add(models, lpips=lpips))
    models.client.delete_model_version(NAME, "3")
    assert roll_back(models.home, models.client, NAME) == (4, 2)
    assert roll_back(models.home, models.client, NAME) == (2, 1)
    with pytest.raises(JobError, match="had no champion before version 1") as caught:
        roll_back(models.home, models.client, NAME)
    assert f"lavatar models promote {NAME}/VERSION" in caught.value.hint
    assert models.champion(NAME) == 1
    assert crown(models.home, models.client, NAME, 4) == 1
    assert roll_back(models.home, models.client, NAME) == (4, 1)


def test_rollback_knows_of_a_champion_that_was_made_elsewhere(models: Models) -> None:
    for lpips in (0.05, 0.04):
        decide(models, add(models, lpips=lpips))
    third, fourth = add(models), add(models)
    models.client.set_registered_model_alias(NAME, "champion", str(third))  # in MLflow's own interface
    crown(models.home, models.client, NAME, fourth)
    assert [roll_back(models.home, models.client, NAME)[1] for _ in range(2)] == [3, 2]
    models.client.delete_model_version(NAME, "2")
    assert models.champion(NAME) is None
    assert roll_back(models.home, models.client, NAME) == (None, 1)
