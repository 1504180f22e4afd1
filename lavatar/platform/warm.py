"""Which trained pair a new pair of the same avatar begins at (docs/adr/0003-warm-start.md).

The key of a pair's stage says where it begins: there is one key for a cold start and one for each other pair of the
avatar. So a pair that was planned before is found again by its possible keys, whatever was trained since.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

from pydantic import ValidationError
from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session, aliased

from lavatar.configs.recipe import Recipe
from lavatar.contracts import StageKind
from lavatar.platform import ledger, lookup
from lavatar.platform.finished import read_recipe, released
from lavatar.platform.home import Home
from lavatar.platform.planning import Undecided, WarmSource, release_dir
from lavatar.platform.registry import Registry
from lavatar.platform.states import State
from lavatar.platform.tables import Job, JobPair, JobStage, Stage

_Use = tuple[bool, float, float, str]
AT_ONCE = 10_000
"""Keys in a query, at most: databases have a limit."""


@dataclass(frozen=True)
class _Trained:
    """A pair of the avatar, the actor and the recipe of one of the jobs that it is part of, and how well it
    transferred expressions. `recipe` is None where another lavatar made it."""

    stage: Stage
    actor_digest: str
    recipe: Recipe | None
    score: float | None


def source_at(home: Home, stage: Stage) -> WarmSource:
    """A pair's stage as a place to begin at."""
    return WarmSource(stage.key, stage.name.removeprefix("pair:"), release_dir(home.absolute(stage.out_dir)))


@dataclass(frozen=True)
class WarmChoice:
    """Chooses where the pairs of a job begin (planning.PairChoice). Its queries are as many as the job's avatars."""

    registry: Registry
    home: Home
    recipe: Recipe

    def __call__(self, pairs: Sequence[Undecided]) -> list[WarmSource | None]:
        """Where each began if it was planned before, else the best that there is; None: cold."""
        if not self.recipe.pair_learning.warm:
            return [None] * len(pairs)
        begun = _begun_at(self.registry)
        alone = _without_a_job(self.registry, begun)
        trained = {key: _pairs_of(self.registry, key) for key in dict.fromkeys(pair.avatar_key for pair in pairs)}
        ways = [self._ways(pair, trained[pair.avatar_key], alone, begun) for pair in pairs]
        usable = self._usable({key: start for each in ways for key, start in each.items()})
        fitting = {key: sorted(filter(self._fits, each), key=_rank) for key, each in trained.items()}
        return [
            self._known(each, usable) if usable.keys() & each else self._best(pair, fitting[pair.avatar_key])
            for pair, each in zip(pairs, ways, strict=True)
        ]

    def _ways(
        self, pair: Undecided, trained: Sequence[_Trained], alone: Sequence[Stage], begun: set[str]
    ) -> dict[str, Stage | None]:
        """The keys that the pair's stage may have where it was planned before, and where each begins."""
        starts = [*alone, *(each.stage for each in trained if each.stage.key in begun)]
        return {pair.key(None): None, **{pair.key(source_at(self.home, stage)): stage for stage in starts}}

    def _usable(self, ways: Mapping[str, Stage | None]) -> dict[str, _Use]:
        """Of these stages those that are finished or can still be done, with what they are ranked by: finished ones,
        then the newest."""
        found = {}
        for keys in _batches(ways):
            done = ledger.finished(self.registry, self.home, keys)
            with self.registry.read() as session:
                rows = list(session.scalars(select(Stage).where(Stage.key.in_(keys))))
            for row in rows:
                if row.key in done or self._startable(ways[row.key]):
                    found[row.key] = (row.key in done, row.started or 0.0, row.created, row.key)
        return found

    def _known(self, ways: Mapping[str, Stage | None], usable: Mapping[str, _Use]) -> WarmSource | None:
        """Where the most usable of these stages begins."""
        start = ways[max(usable.keys() & ways, key=lambda key: usable[key])]
        return source_at(self.home, start) if start else None

    def _best(self, pair: Undecided, fitting: Sequence[_Trained]) -> WarmSource | None:
        """The best of another actor; `fitting` ends with the best."""
        others = (each for each in reversed(fitting) if each.actor_digest != pair.actor.digest)
        best = next((each for each in others if self._startable(each.stage)), None)
        return source_at(self.home, best.stage) if best else None

    def _startable(self, start: Stage | None) -> bool:
        """Whether a new pair can read it."""
        return start is None or released(self.home, start)

    def _fits(self, trained: _Trained) -> bool:
        """Finished, and of a Y-network and losses that are the same."""
        if trained.stage.state != State.FINISHED.value or trained.recipe is None:
            return False
        own, theirs = self.recipe, trained.recipe
        return (theirs.ynet, theirs.ynet_loss) == (own.ynet, own.ynet_loss)


def _batches(keys: Iterable[str]) -> Iterable[list[str]]:
    rest = iter(keys)
    while batch := list(islice(rest, AT_ONCE)):
        yield batch


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
        rows = session.execute(query).all()
        scores = _scores(session, list({stage.key for stage, _, _ in rows}))
    recipes = {job.id: _recipe(job) for job in {job.id: job for _, job, _ in rows}.values()}
    found = {
        stage.key: _Trained(stage, pair.actor_digest, recipes[job.id], scores.get(stage.key))
        for stage, job, pair in rows
    }
    return list(found.values())


def _recipe(job: Job) -> Recipe | None:
    """None where another lavatar made it, whose values mean nothing to this one."""
    try:
        return read_recipe(job.recipe)
    except ValidationError:
        return None


def _begun_at(registry: Registry) -> set[str]:
    """The keys of the pairs that others began at."""
    with registry.read() as session:
        return {key for key in session.scalars(select(Stage.warm).distinct()) if key is not None}


def _without_a_job(registry: Registry, begun: set[str]) -> list[Stage]:
    """Of these pairs those whose own job was deleted: the keys of what began at them cannot be told without them."""
    found: list[Stage] = []
    with registry.read() as session:
        for keys in _batches(sorted(begun)):
            alone = Stage.key.not_in(select(JobStage.stage_key).where(JobStage.stage_key.in_(keys)))
            found += session.scalars(select(Stage).where(Stage.key.in_(keys), alone))
    return found


def _scores(session: Session, pair_keys: Sequence[str]) -> dict[str, float]:
    """Of each pair that was evaluated, mean correlation of the expressions of actor and result: its newest preview."""
    found: dict[str, float] = {}
    for keys in _batches(pair_keys):
        bridge = aliased(JobStage)
        query = select(bridge.stage_key, Stage.metrics).join(JobStage, JobStage.stage_key == Stage.key)
        query = query.join(bridge, and_(bridge.job_id == JobStage.job_id, bridge.stage_key.in_(keys)))
        query = query.where(JobStage.name == func.replace(bridge.name, "pair:", "preview:"))
        query = query.where(Stage.state == State.FINISHED.value)
        for key, metrics in session.execute(query.order_by(Stage.ended.desc(), Stage.key)):
            compared = (metrics.get("cross") or {}).get("expression") or {}
            figures = [each for each in compared.values() if isinstance(each, dict)]
            r = [each["r"] for each in figures if each.get("r") is not None]
            if r and key not in found:
                found[key] = fmean(r)
    return found
