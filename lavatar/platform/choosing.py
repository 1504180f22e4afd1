"""Which of the models of an avatar or a pair a command uses: the champion, unless a version or a job is named.

MLflow says which version a number or an alias means, and a tag of the version which stage trained it. Where that lies,
and by which recipe it is used, the registry says: a version whose stage is not there cannot be used in this home.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lavatar.errors import JobError, UnknownSubjectError, UsageError
from lavatar.masking import masked
from lavatar.platform import lookup
from lavatar.platform.catalogue import Catalogue
from lavatar.platform.finished import ANY, Finished, Only, find_avatar, find_pair
from lavatar.platform.home import Home
from lavatar.platform.modelregistry import CHAMPION, STAGE_TAG, avatar_model_name, pair_model_name
from lavatar.platform.registry import Registry
from lavatar.platform.runs import tracked
from lavatar.platform.subjects import check_name
from lavatar.platform.tracking import connect, first_line

Say = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """What somebody named: a version (its number, or an alias), or a job. Neither: the champion, else the newest."""

    version: str | None = None
    job: str | None = None


@dataclass(frozen=True)
class Chosen:
    """The model that is used, and what MLflow calls it; None where it is not registered."""

    found: Finished
    model: str | None

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.model or 'a model that is not registered'}, of job {self.found.job}"


@dataclass(frozen=True)
class Chooser:
    """Chooses for an avatar, or for a pair; `frames`: a model that was trained here comes before one that was imported.
    `say` gets what is used instead where there is a champion and it cannot be used."""

    registry: Registry
    home: Home
    avatar: str
    actor: str | None
    say: Say
    frames: bool = False

    @property
    def name(self) -> str:
        """Of the registered model."""
        return pair_model_name(self.avatar, self.actor) if self.actor else avatar_model_name(self.avatar)

    def choose(self, choice: Choice) -> Chosen:
        """Raises UsageError, UnknownJobError, JobError where there is no such model, or it is not in this home."""
        if choice.job is not None and choice.version is not None:
            raise UsageError("--version and --job do not go together", "Name one of the two.")
        if choice.job is not None:
            found = self._of_job(choice.job)
        elif choice.version is not None:
            found = self._of_version(choice.version)
        else:
            found = self._champion(self._find(ANY))
        return Chosen(found, self._registered(found))

    def _of_job(self, job_id: str) -> Finished:
        job = lookup.get_job(self.registry, job_id)
        try:
            return self._find(Only(job=job))
        except JobError as error:
            raise JobError(f"{error.message} in job {job.id}", f"See: lavatar jobs show {job.id}") from None

    def _of_version(self, wanted: str) -> Finished:
        for name in (self.avatar, *([self.actor] if self.actor else [])):
            check_name(name)
        catalogue = self._catalogue()
        version = catalogue.version(f"{self.name}/{wanted}" if wanted.isdecimal() else f"{self.name}@{wanted}")
        try:
            return self._find(Only(stage=version.tags.get(STAGE_TAG, "")))
        except (JobError, UnknownSubjectError):
            named = f"{version.name}/{version.number}"
            bring = f"Bring it: lavatar models export {named} -o FILE, then lavatar models import FILE"
            raise JobError(
                f"the files of {named} are not in this home: they were freed, or it was trained elsewhere",
                bring if self.actor else f"Measure it where it was trained. Its figures: lavatar models show {named}",
            ) from None

    def _champion(self, newest: Finished) -> Finished:
        """The champion where there is one that can be used, else the newest."""
        instead = f"the newest model, of job {newest.job}, is used"
        try:
            version = self._catalogue().model(self.name).under(CHAMPION) if tracked(self.home) else None
        except UsageError:  # not registered, or another pair's
            version = None
        except JobError as error:
            self.say(f"which model is the champion is not known: {error.message}; {instead}")
            version = None
        if version is None:
            return newest
        try:
            found = self._find(Only(stage=version.tags.get(STAGE_TAG, "")))
        except JobError:
            self.say(f"the champion {version.name}/{version.number} is not in this home; {instead}")
            return newest
        if self.frames and found.avatar_data is None and newest.avatar_data is not None:
            self.say(f"the champion {version.name}/{version.number} was imported without frames; {instead}")
            return newest
        return found

    def _catalogue(self) -> Catalogue:
        """What MLflow has of this model. Raises UsageError where it is another pair's, JobError if MLflow is away."""
        from mlflow.exceptions import MlflowException

        catalogue = Catalogue(connect(self.home), self.name)
        try:
            found = catalogue.models.get(self.name)
        except MlflowException as error:
            raise JobError(f"MLflow failed: {first_line(error)}", "Try it again, or name a job: --job JOB") from error
        if found and found.pair not in (None, (self.avatar, self.actor)):
            whose = " driven by ".join(map(repr, found.pair or ()))
            raise UsageError(f"{self.name} is the model of avatar {whose}", "Name a job: --job JOB")
        return catalogue

    def _find(self, only: Only) -> Finished:
        where = (self.registry, self.home, self.avatar)
        if self.actor is None:
            return find_avatar(*where, frames=self.frames, only=only)
        return find_pair(*where, self.actor, frames=self.frames, only=only)

    def _registered(self, found: Finished) -> str | None:
        """What the registry remembers of the version, without asking MLflow."""
        uri = masked(self.home.tracking_uri)
        rows = lookup.artefacts(self.registry, [found.stage], "model")
        numbers = [row.version for row in rows if (row.name, row.uri) == (self.name, uri)]
        return f"{self.name}/{numbers[-1]}" if numbers else None
