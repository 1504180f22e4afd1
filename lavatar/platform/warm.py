"""Which trained pair a new pair of the same avatar begins at (docs/adr/0003-warm-start.md).

The key of a pair's stage says where it begins: there is one key for a cold start and one for each other pair of the
avatar. So a pair that was planned before is found again by its possible keys, whatever was trained since.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session, aliased

from lavatar.configs.recipe import Recipe
from lavatar.contracts import StageKind
from lavatar.errors import JobError
from lavatar.platform import ledger, lookup
from lavatar.platform.finished import recipe_of, released
from lavatar.platform.home import Home
from lavatar.platform.planning import Person, WarmSource, release_dir
from lavatar.platform.registry import Registry
from lavatar.platform.states import State
from lavatar.platform.tables import Job, JobPair, JobStage, Stage


@dataclass(frozen=True)
class _Trained:
    """A pair of the avatar, one of the jobs that it is part of, and how well it transferred expressions."""

    stage: Stage
    job: Job
    pair: JobPair
    score: float | None


def source_at(home: Home, stage: Stage) -> WarmSource:
    """A pair's stage as a place to begin at."""
    return WarmSource(stage.key, stage.name.removeprefix("pair:"), release_dir(home.absolute(stage.out_dir)))


@dataclass(frozen=True)
class WarmChoice:
    """Chooses where a pair begins (planning.PairChoice)."""

    registry: Registry
    home: Home
    recipe: Recipe

    def __call__(
        self, actor: Person, avatar_key: str, pair_key: Callable[[WarmSource | None], str]
    ) -> WarmSource | None:
        """Where it began if it was planned before, else the best that there is; None: cold."""
        if not self.recipe.pair_learning.warm:
            return None
        trained = _pairs_of(self.registry, avatar_key)
        starts = [*_without_a_job(self.registry), *(t.stage for t in trained)]
        ways = {pair_key(None): None, **{pair_key(source_at(self.home, s)): s for s in starts}}
        known = self._known(ways)
        if known is not None:
            before = ways[known]
            return source_at(self.home, before) if before else None
        fitting = [t for t in trained if self._fits(t, actor)]
        return source_at(self.home, max(fitting, key=_rank).stage) if fitting else None

    def _known(self, ways: Mapping[str, Stage | None]) -> str | None:
        """Of the stages that this pair may have, the newest finished one; else the newest that can still be done."""
        done = ledger.finished(self.registry, self.home, ways)
        with self.registry.read() as session:
            rows = list(session.scalars(select(Stage).where(Stage.key.in_(list(ways)))))
        usable = [row for row in rows if row.key in done or self._startable(ways[row.key])]
        if not usable:
            return None
        newest = max(usable, key=lambda row: (row.key in done, row.started or 0.0, row.created, row.key))
        return newest.key

    def _startable(self, start: Stage | None) -> bool:
        """Whether a new pair can read it."""
        return start is None or released(self.home, start)

    def _fits(self, trained: _Trained, actor: Person) -> bool:
        """Finished and there, of another actor, and of a Y-network and losses that are the same."""
        if trained.stage.state != State.FINISHED.value or trained.pair.actor_digest == actor.digest:
            return False
        try:
            theirs = recipe_of(self.registry, trained.job)
        except JobError:  # made by another lavatar
            return False
        same = (theirs.ynet, theirs.ynet_loss) == (self.recipe.ynet, self.recipe.ynet_loss)
        return same and self._startable(trained.stage)


def _rank(trained: _Trained) -> tuple[bool, float, float, str]:
    """Those that were evaluated by how well expressions correlate, then the newest."""
    return (trained.score is not None, trained.score or 0.0, trained.stage.ended or 0.0, trained.stage.key)


def _pairs_of(registry: Registry, avatar_key: str) -> list[_Trained]:
    """Every pair of that trained avatar, in whatever state."""
    head, same = aliased(JobStage), aliased(JobPair)  # a stage has one name in a job, where one video may have several
    query = select(Stage, Job, JobPair).join(JobStage, JobStage.stage_key == Stage.key)
    query = query.join(Job, Job.id == JobStage.job_id)
    query = query.join(
        JobPair, and_(JobPair.job_id == Job.id, JobStage.name == lookup.stage_name(StageKind.PAIR, JobPair))
    )
    query = query.join(same, and_(same.job_id == Job.id, same.avatar_digest == JobPair.avatar_digest))
    query = query.join(head, and_(head.job_id == Job.id, head.name == lookup.stage_name(StageKind.AVATAR, same)))
    query = query.where(head.stage_key == avatar_key).order_by(Job.created, Job.id)
    with registry.read() as session:
        found = {
            stage.key: _Trained(stage, job, pair, _score(session, stage.key))
            for stage, job, pair in session.execute(query).all()
        }
    return list(found.values())


def _without_a_job(registry: Registry) -> list[Stage]:
    """Pairs that others began at and whose own job was deleted: the others' keys cannot be told without them."""
    begun = aliased(Stage)
    starts = select(begun.warm).where(begun.warm.is_not(None))
    alone = Stage.key.not_in(select(JobStage.stage_key))
    with registry.read() as session:
        return list(session.scalars(select(Stage).where(Stage.key.in_(starts), alone)))


def _score(session: Session, pair_key: str) -> float | None:
    """Mean correlation of the expressions of actor and result, in the newest preview of the pair."""
    bridge = aliased(JobStage)
    query = select(Stage).join(JobStage, JobStage.stage_key == Stage.key)
    query = query.join(bridge, and_(bridge.job_id == JobStage.job_id, bridge.stage_key == pair_key))
    query = query.where(JobStage.name == func.replace(bridge.name, "pair:", "preview:"))
    query = query.where(Stage.state == State.FINISHED.value)
    for preview in session.scalars(query.order_by(Stage.ended.desc(), Stage.key)):
        compared = (preview.metrics.get("cross") or {}).get("expression") or {}
        r = [
            figures["r"] for figures in compared.values() if isinstance(figures, dict) and figures.get("r") is not None
        ]
        if r:
            return fmean(r)
    return None
