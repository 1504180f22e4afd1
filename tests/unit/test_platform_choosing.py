"""Which model reenact and evaluate use: the champion, a version, a job's. MLflow is real, the stages are small."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lavatar.errors import JobError, NameError_, UnknownJobError, UsageError
from lavatar.platform.choosing import Choice, Chooser, Chosen
from lavatar.platform.deletion import delete_job
from lavatar.platform.planning import Plan

sys.path.insert(0, str(Path(__file__).parent))
from model_files import Models, measures, mlflow_tables, models
from platform_fakes import make_shared_plan, plain_digest

__all__ = ["mlflow_tables", "models", "plain_digest"]
AVATAR, PAIR = "lavatar-avatar-A", "lavatar-pair-A-B"
LONGER = "avatar_training.steps=99"


REFUSED: tuple[tuple[dict[str, str], str], ...] = (
    ({"version": "7"}, f"{PAIR} has no version 7|Its versions are 1, 2"),
    ({"version": "best"}, f"{PAIR} has no alias 'best'|@champion"),
    ({"version": "1", "job": "x"}, "--version and --job do not go together"),
    ({"version": "../1"}, "names no model"),
)


def choose(
    models: Models, actor: str | None = "B", said: list[str] | None = None, frames: bool = False, **choice: str
) -> Chosen:
    say = print if said is None else said.append
    return Chooser(models.registry, models.home, "A", actor, say, frames).choose(Choice(**choice))


def pair_of(plan: Plan) -> Path:
    return plan.pairs[0].release


def test_the_champion_is_used_unless_another_one_is_named(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = models.submit(), models.submit(LONGER, preview=measures(lpips=0.06, error=0.5))
    said: list[str] = []
    chosen = choose(models, said=said)
    assert (chosen.model, chosen.found.job, chosen.found.pair) == (f"{PAIR}/1", first.job_id, pair_of(first))
    assert chosen.text == f"{PAIR}/1, of job {first.job_id}"
    for version in ("2", "latest"):
        chosen = choose(models, said=said, version=version)
        assert (chosen.model, chosen.found.job, chosen.found.pair) == (f"{PAIR}/2", second.job_id, pair_of(second))
    models.client.set_registered_model_alias(PAIR, "approved", "2")
    assert choose(models, said=said, version="approved").model == f"{PAIR}/2"
    models.client.set_registered_model_alias(PAIR, "champion", "2")
    assert choose(models, said=said).model == f"{PAIR}/2"
    models.client.set_registered_model_alias(PAIR, "champion", "1")
    assert choose(models, None, said).model == f"{AVATAR}/1"
    assert choose(models, None, said, version="2").found.avatar == second.pairs[0].head.spec.out_dir / "release"
    for plan in (first, second):
        chosen = choose(models, said=said, job=plan.job_id[:6])
        assert (chosen.found.job, chosen.found.pair) == (plan.job_id, pair_of(plan))
    assert said == []
    for choice, words in REFUSED:
        with pytest.raises(UsageError) as caught:
            choose(models, **choice)
        for part in words.split("|"):
            assert part in str(caught.value)

    instead = f"the newest model, of job {second.job_id}, is used"
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        assert choose(models, said=said).found.job == second.job_id
        assert "which model is the champion is not known: MLflow at http://127.0.0.1:9 does not answer" in said[0]
        assert instead in said[0]
        with pytest.raises(JobError, match="does not answer"):
            choose(models, version="1")
        assert choose(models, job=first.job_id).found.job == first.job_id, "that needs no MLflow"
    delete_job(models.registry, first.job_id)
    said.clear()
    assert choose(models, said=said).found.job == second.job_id
    assert said == [f"the champion {PAIR}/1 is not in this home; {instead}"]
    with pytest.raises(JobError, match=f"the files of {PAIR}/1 are not in this home") as gone:
        choose(models, version="1")
    assert f"lavatar models export {PAIR}/1 -o FILE, then lavatar models import FILE" in gone.value.hint

    models.client.set_registered_model_tag(PAIR, "lavatar.actor", "C")
    assert choose(models).found.job == second.job_id
    with pytest.raises(UsageError, match="is the model of avatar 'A' driven by 'C'"):
        choose(models, version="2")
    models.client.delete_registered_model(PAIR)
    assert choose(models).found.job == second.job_id, "nothing is registered: the newest"
    with pytest.raises(UsageError, match=f"there is no registered model '{PAIR}'"):
        choose(models, version="2")
    with pytest.raises(NameError_, match="cannot be a subject's name"):
        Chooser(models.registry, models.home, "A' or", "B", print).choose(Choice(version="1"))


def test_of_a_job_of_many_pairs_each_has_its_own(models: Models) -> None:
    plan = make_shared_plan(models.home, "AD", "B", "mapping.joint=false")
    models.run(plan)
    for pair in plan.pairs:
        chooser = Chooser(models.registry, models.home, pair.avatar.name, pair.actor.name, print)
        for choice in (Choice(), Choice(version="1"), Choice(job=plan.job_id)):
            chosen = chooser.choose(choice)
            assert (chosen.model, chosen.found.pair) == (f"{chooser.name}/1", pair.release)
    assert choose(models, None, job=plan.job_id).found.avatar == plan.pairs[0].head.spec.out_dir / "release"
    with pytest.raises(JobError, match=f"no finished model of avatar 'A' driven by 'D' in job {plan.job_id}"):
        choose(models, "D", job=plan.job_id)
    with pytest.raises(UnknownJobError):
        choose(models, job="nobody")
