"""What a registered model says of itself: whose it is, where it comes from, and the recipe that whoever uses it needs.

It lies beside the releases of the model (about.json), in MLflow and in a file to take elsewhere.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError

from lavatar.configs.recipe import Recipe, describe
from lavatar.configs.section import Section
from lavatar.errors import UNREADABLE, DataError, NameError_
from lavatar.platform.finished import read_recipe
from lavatar.platform.modelfile import ABOUT, MOST_TEXT
from lavatar.platform.planning import Person, Plan, PlannedPair
from lavatar.platform.subjects import check_name

Short = Annotated[str, Field(max_length=220)]
TagKey = Annotated[str, Field(max_length=250, pattern=r"^lavatar([./][A-Za-z0-9_ -]+)+$")]
TagValue = Annotated[str, Field(max_length=100_000, pattern=r"^[^\x00]*$")]
_HINT = "Use the lavatar that wrote it, or export it again."


class Someone(Section):
    """A person: the name, and the digest of the video (or the seed) that it stands for."""

    name: Short
    digest: Annotated[str, Field(max_length=80, pattern=r"^[A-Za-z0-9_]+$")]

    @classmethod
    def of(cls, person: Person) -> Self:
        return cls(name=person.name, digest=person.digest)


class About(Section):
    """Of an avatar, or of a pair, which has an actor. `recipe` may be another lavatar's: see `read_recipe`."""

    format: Literal[1] = 1
    kind: Literal["avatar", "pair"]
    avatar: Someone
    actor: Someone | None = None
    stage: Short  # key of the stage that trained it
    job: Short
    lavatar: Short
    created: Short  # when it was registered first
    recipe: dict[str, Any]
    tags: dict[TagKey, TagValue] = Field({}, description="of its version in MLflow, filled in when it is exported")

    @classmethod
    def of_avatar(cls, plan: Plan, pair: PlannedPair) -> Self:
        return cls._of(plan, kind="avatar", avatar=Someone.of(pair.avatar), stage=pair.head.key)

    @classmethod
    def of_pair(cls, plan: Plan, pair: PlannedPair) -> Self:
        people = {"avatar": Someone.of(pair.avatar), "actor": Someone.of(pair.actor)}
        return cls._of(plan, kind="pair", **people, stage=pair.bridge.key)

    @classmethod
    def _of(cls, plan: Plan, **known: Any) -> Self:
        recipe, now = plan.recipe.model_dump(mode="json"), datetime.now(UTC).isoformat(timespec="seconds")
        return cls(**known, job=plan.job_id, recipe=recipe, lavatar=version("lavatar"), created=now)

    @property
    def people(self) -> tuple[Someone, ...]:
        return (self.avatar, self.actor) if self.actor else (self.avatar,)

    def read_recipe(self) -> Recipe:
        """As far as this lavatar knows it. Raises ValidationError."""
        return read_recipe(self.recipe)

    def write(self, folder: Path) -> Path:
        """As about.json: the same bytes for the same."""
        path = folder / ABOUT
        path.write_text(json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n")
        return path


def read_about(path: Path) -> About:
    """What an about.json says. Raises DataError for what is none, or means nothing to this lavatar."""
    try:
        with path.open("rb") as stream:
            about = About.model_validate(json.loads(stream.read(MOST_TEXT)))
        for person in about.people:
            check_name(person.name)
        if (about.kind == "pair") != (about.actor is not None):
            raise ValueError(f"a model of kind {about.kind} with{'' if about.actor else 'out'} an actor")
        if not re.fullmatch(r"[\w.-]{1,32}", name := about.read_recipe().name):
            raise ValueError(f"{name[:40]!r} is no recipe's name")
    except ValidationError as error:
        raise DataError(f"{path.name} does not fit this lavatar: {describe(error)[:300]}", _HINT) from None
    except NameError_ as error:
        raise DataError(f"{path.name} is damaged: {error.message}", _HINT) from None
    except UNREADABLE as error:
        raise DataError(f"{path.name} is damaged ({type(error).__name__}: {str(error)[:200]})", _HINT) from None
    return about
