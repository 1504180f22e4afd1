"""How the error of Eq. 5 falls while a Y-network is trained, and how many steps a warm start saves. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any


@dataclass
class ErrorCurve:
    """Eq. 5 of each subject on frames that stay the same, after so many steps."""

    steps: list[int]
    errors: dict[str, list[float]]  # by subject, one for each of `steps`

    @staticmethod
    def of(subjects: Iterable[str]) -> ErrorCurve:
        """Nothing measured yet."""
        return ErrorCurve([], {subject: [] for subject in subjects})

    def add(self, step: int, errors: Mapping[str, float]) -> None:
        """One more measurement, to six digits: what comes behind is noise."""
        self.steps.append(step)
        for subject, values in self.errors.items():
            values.append(round(errors[subject], 6))

    @property
    def mean(self) -> list[float]:
        """The mean of the subjects."""
        return [fmean(values) for values in zip(*self.errors.values(), strict=True)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ErrorCurve:
        """Raises KeyError, ValueError or TypeError for what is no curve."""
        curve = ErrorCurve.of(data["errors"])
        for step, *row in zip(data["steps"], *data["errors"].values(), strict=True):
            curve.add(int(step), dict(zip(data["errors"], map(float, row), strict=True)))
        return curve


@dataclass(frozen=True)
class Saving:
    """Steps to the error that a cold training ended at: in that training, and in one that began warm."""

    error: float  # the last of the cold training
    cold_step: int  # where the cold training first was as good
    warm_step: int | None  # where the warm one first was; None: never
    warm_error: float  # the last of the warm one

    @property
    def saved(self) -> int | None:
        """Negative where the warm start took longer; None where it never came so far."""
        return None if self.warm_step is None else self.cold_step - self.warm_step

    def to_json(self) -> dict[str, float | None]:
        return {**asdict(self), "saved": self.saved}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Saving:
        return Saving(**{name: data[name] for name in ("error", "cold_step", "warm_step", "warm_error")})

    def text(self) -> str:
        """ "0.0310 (step 700) reached at step 220: 480 steps saved"."""
        goal = f"{self.error:.4f} (step {self.cold_step})"
        if self.warm_step is None:
            return f"{goal} not reached; {self.warm_error:.4f} at the end"
        saved = self.cold_step - self.warm_step
        return f"{goal} reached at step {self.warm_step}: {abs(saved)} steps {'saved' if saved >= 0 else 'more'}"


def first_at(steps: Sequence[int], errors: Sequence[float], goal: float) -> int | None:
    """The first measured step whose error is not above `goal`."""
    return next((step for step, error in zip(steps, errors, strict=True) if error <= goal), None)


def saving(
    cold_steps: Sequence[int], cold: Sequence[float], warm_steps: Sequence[int], warm: Sequence[float]
) -> Saving:
    """What `warm` saved on the way to the last error of `cold`; neither is empty."""
    goal = cold[-1]
    cold_step = first_at(cold_steps, cold, goal)
    assert cold_step is not None  # its last step at the latest
    return Saving(goal, cold_step, first_at(warm_steps, warm, goal), warm[-1])


def savings(cold: ErrorCurve, warm: ErrorCurve) -> dict[str, Saving]:
    """For the mean of avatar and actor, and for the avatar alone: that part is the same in both, the actors differ."""
    return {
        "mean": saving(cold.steps, cold.mean, warm.steps, warm.mean),
        "avatar": saving(cold.steps, cold.errors["avatar"], warm.steps, warm.errors["avatar"]),
    }


def warm_note(source: str, cold_of: str | None, found: Mapping[str, Saving]) -> str:
    """What a warm start came to, for people. `cold_of` is the pair that was trained cold, None if it kept no curve."""
    began = f"began at the shared encoder of {source}"
    if cold_of is None:
        return f"{began}, whose training left no errors to compare with"
    return f"{began}; final error of {cold_of}: {found['mean'].text()}; the avatar's own part {found['avatar'].text()}"
