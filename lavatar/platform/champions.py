"""Which version of a model is its champion, and which were before.

MLflow's aliases: `latest` is the newest version, always, by MLflow itself; `champion` moves here, and no other alias is
touched. By the recipe's `evaluation.promote` a new version becomes champion `always`, `never`, or where it is `better`:

* the first version that was measured becomes champion;
* after that one that has a better figure (`evaluation.champion_avatar` of self reenactment, `champion_pair` of cross
  reenactment) on the same held-out frames, drawn at the same size. Where one of the two has no LPIPS, PSNR decides;
* where the two cannot be compared (other frames, measured in another way, or never), the champion stays: nothing shows
  that the new one is better. The log says so, and `lavatar models promote` is the way out.

Of one home one process at a time decides. Another home on the same server may decide at the same moment, and MLflow
compares nothing when an alias is set: so each leaves a mark first, sets the alias, and then looks for marks that were
not there when it began. Whoever sets the alias last sees all others' marks, and lets the better one have it. Where
there was no champion nobody looks: of two first ones the last stays, until a better one comes.

The champions so far stand in a tag of the registered model, the newest last, so that `rollback` finds the one before.
The tag comes with the second champion: of the first one the alias says it.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lavatar.configs.evaluation import HIGHER
from lavatar.errors import JobError
from lavatar.platform.home import Home
from lavatar.platform.modelregistry import CHAMPION, Release, attempt, describe
from lavatar.platform.tracking import Tracker, Warn
from lavatar.training.files import exclusive

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

HISTORY_TAG = "lavatar.champions"  # of a registered model: numbers of versions
HELD_OUT_TAG = "lavatar.held_out"  # of a version: digest of the frames that it was measured on, their size, and how
CROWNED_TAG = "lavatar.crowned."  # of a registered model, + a version: made champion; another value each time
FIGURE_TAG = "lavatar.figure."  # of a version: one for each figure, as lavatar.figure.self/lpips
_REMEMBERED = 200
_WITHOUT = {"lpips": "psnr"}
"""What is compared where a figure is missing, for its weights were."""


@dataclass(frozen=True)
class Contest:
    """By what a version becomes champion: the policy, and the figure ("self/lpips")."""

    policy: str
    figure: str


def measure(
    home: Home, tracker: Tracker, release: Release, version: int, contest: Contest, warn: Warn, *, new: bool
) -> str | None:
    """Give a version the tags and the card of `release`, its figures among them, unless it was made with them just now
    (`new`), and let it contend for the champion: what came of it. None and a warning if MLflow failed."""

    def measured() -> str:
        if not new:
            describe(tracker.client, release.name, version, release.tags, release.card, FIGURE_TAG)
        return contend(home, tracker.client, release.name, version, contest, release.tags)

    failed = f"the figures of {release.name} version {version} could not be stored"
    return attempt(tracker, failed, measured, warn, wait=not new)  # where it is new, MLflow has just answered


def contend(
    home: Home, client: MlflowClient, name: str, version: int, contest: Contest, tags: Mapping[str, str]
) -> str:
    """Make the version, which has these tags, champion if it is due; in a sentence what came of it, and why."""
    with _alone(home):
        return _contend(client, name, version, contest, tags)


def _contend(client: MlflowClient, name: str, version: int, contest: Contest, tags: Mapping[str, str]) -> str:
    model = client.get_registered_model(name)
    champion, this = _champion(model), f"{name} version {version}"
    if champion == version:
        return f"{this} is champion already"
    if contest.policy == "never":
        return f"{this} does not become champion: evaluation.promote is never"
    if contest.policy == "better" and champion is not None:
        won, why = _compared(client, name, (version, tags), champion, contest.figure)
        if not won:
            return f"{name} version {champion} stays champion: {why}"
    else:
        why = "evaluation.promote is always" if contest.policy == "always" else "it is the first that was measured"
    _crown(client, model, version)
    for rival in _rivals(client, model, version) if contest.policy == "better" and champion is not None else ():
        theirs = client.get_model_version(name, str(rival)).tags
        won, better = _compared(client, name, (rival, theirs), version, contest.figure)
        if won:
            _contend(client, name, rival, contest, theirs)
            return f"{name} version {rival} stays champion: {better}"
    return f"{this} is champion: {why}"


def crown(home: Home, client: MlflowClient, name: str, version: int) -> int | None:
    """Make the version champion; the one before."""
    with _alone(home):
        model = client.get_registered_model(name)
        _crown(client, model, version)
        return _champion(model)


def roll_back(home: Home, client: MlflowClient, name: str) -> tuple[int | None, int]:
    """Make the champion before this one champion again; both. Raises JobError where there is none."""
    with _alone(home):
        model = client.get_registered_model(name)
        champion = _champion(model)
        there = {int(found.version) for found in client.search_model_versions(f"name = '{name}'")}
        past = [number for number in history(model.tags, champion) if number in there]
        while past and past[-1] == champion:
            past.pop()
        if not past:
            now = "has no champion" if champion is None else f"had no champion before version {champion}"
            raise JobError(f"{name} {now}", f"Name the one you want: lavatar models promote {name}/VERSION")
        _remember(client, name, past)
        client.set_registered_model_alias(name, CHAMPION, str(past[-1]))
        return champion, past[-1]


def history(tags: Mapping[str, str], champion: int | None) -> list[int]:
    """The champions of a registered model with these tags, the newest last; one may stand there several times.

    `champion` is today's, whom somebody may have made so by other means.
    """
    past = [int(number) for number in tags.get(HISTORY_TAG, "").split(",") if re.fullmatch(r" *[0-9]{1,9} *", number)]
    return past if champion is None or past[-1:] == [champion] else [*past, champion]


def figure(tags: Mapping[str, str], path: str) -> float | None:
    """A figure of a version with these tags."""
    with contextlib.suppress(ValueError):
        return float(tags.get(FIGURE_TAG + path, ""))
    return None


def comparable(tags: Mapping[str, str], others: Mapping[str, str]) -> bool:
    """Whether two versions with these tags were measured on the same held-out frames in the same way."""
    return HELD_OUT_TAG in tags and tags[HELD_OUT_TAG] == others.get(HELD_OUT_TAG)


def _compared(
    client: MlflowClient, name: str, contender: tuple[int, Mapping[str, str]], champion: int, path: str
) -> tuple[bool, str]:
    """Whether the contender, with its tags, is better than the champion, and how that is told."""
    (version, new), old = contender, client.get_model_version(name, str(champion)).tags
    way_out = f"if you want it: lavatar models promote {name}/{version}"
    for number, tags in ((version, new), (champion, old)):
        if HELD_OUT_TAG not in tags:
            return False, f"version {number} was never measured, so the two cannot be compared; {way_out}"
    if not comparable(new, old):
        why = f"version {version} was measured on other held-out frames, or in another way, and cannot be compared"
        return False, f"{why}; {way_out}"
    stem, _, last = path.rpartition("/")
    for shown in (path, f"{stem}/{_WITHOUT.get(last, last)}"):
        ours, theirs = figure(new, shown), figure(old, shown)
        if ours is not None and theirs is not None:
            won = ours > theirs if shown.rpartition("/")[2] in HIGHER else ours < theirs
            return won, f"{shown} {ours:g} of version {version}, {theirs:g} of version {champion}"
    return False, f"{path} of version {version} or {champion} is missing, so the two cannot be compared; {way_out}"


def _champion(model: RegisteredModel) -> int | None:
    number = model.aliases.get(CHAMPION)
    return int(number) if number is not None else None


def _crown(client: MlflowClient, model: RegisteredModel, version: int) -> None:
    past = history(model.tags, _champion(model))
    if past and past[-1] != version:
        _remember(client, model.name, [*past, version])
    client.set_registered_model_tag(model.name, f"{CROWNED_TAG}{version}", uuid.uuid4().hex)
    client.set_registered_model_alias(model.name, CHAMPION, str(version))


def _rivals(client: MlflowClient, model: RegisteredModel, version: int) -> list[int]:
    """What other homes have made champion since `model` was read, where `version` is champion now; else whoever made
    another one so sees to it."""
    now = client.get_registered_model(model.name)
    if _champion(now) != version:
        return []
    fresh = {key for key, value in now.tags.items() if model.tags.get(key) != value}
    numbers = [int(key.removeprefix(CROWNED_TAG)) for key in fresh if re.fullmatch(CROWNED_TAG + "[0-9]{1,9}", key)]
    return sorted(number for number in numbers if number != version)


def _remember(client: MlflowClient, name: str, past: list[int]) -> None:
    client.set_registered_model_tag(name, HISTORY_TAG, ",".join(map(str, past[-_REMEMBERED:])))


@contextlib.contextmanager
def _alone(home: Home) -> Iterator[None]:
    """No other process of this home moves a champion meanwhile."""
    with exclusive(home.root / "champions.lock"):
        yield
