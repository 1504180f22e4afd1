"""Models of jobs in MLflow's real registry: lineage, figures, the champion, what is stale, and `lavatar models`."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from lavatar.contracts import VideoSource
from lavatar.errors import StageFailedError
from lavatar.platform import lookup
from lavatar.platform.champions import HELD_OUT_TAG
from lavatar.platform.home import Home
from lavatar.platform.jobs import run_job
from lavatar.platform.lineage import SECTIONS_TAG, Lineage
from lavatar.platform.modelcard import card
from lavatar.platform.registering import Model, Registrar, Standing
from lavatar.platform.subjects import add_subject, describe_synthetic

sys.path.insert(0, str(Path(__file__).parent))
from model_files import Models, figures, measures, mlflow_tables, models
from platform_fakes import FakeHandle, FakeRunner, make_plan, make_plan_of, make_shared_plan, office, plain_digest

__all__ = ["mlflow_tables", "models", "plain_digest"]
AVATAR, PAIR = "lavatar-avatar-A", "lavatar-pair-A-B"
LONGER = "avatar_training.steps=99"  # another avatar of the same frames


def broken(handle: FakeHandle) -> Any:
    raise RuntimeError("no")


def log_of(models: Models, job: str) -> str:
    return "\n".join(event.text for event in lookup.events(models.registry, job))


def test_a_version_says_where_it_comes_from_and_how_good_it_is(models: Models) -> None:
    plan = models.submit()
    stage = {planned.name: planned for planned in plan.stages}
    rows = {view.name: view.stage for view in lookup.job_stages(models.registry, plan.job_id)}
    avatar, pair = models.version(AVATAR), models.version("A<-B")
    assert (avatar.number, avatar.aliases) == (1, ("latest", "champion"))
    own = {
        "lavatar.kind": "avatar",
        "lavatar.job": plan.job_id,
        "lavatar.recipe": "tiny",
        "lavatar.stage": stage["avatar:A"].key,
        "lavatar.dataset.avatar": stage["preprocess:A"].key,
        "lavatar.preview": stage["preview:A<-B"].key,
        "lavatar.preview.run": rows["preview:A<-B"].mlflow_run_id,
        "lavatar.decided_by": "self/lpips",
        "lavatar.figure.self/lpips": "0.05",
        "lavatar.figure.self/expression/jaw/r": "0.9",
    }
    assert own.items() <= avatar.tags.items()
    assert avatar.run_id == rows["avatar:A"].mlflow_run_id
    assert json.loads(avatar.tags[SECTIONS_TAG]) == plan.recipe.model_dump(mode="json")
    both = {
        "lavatar.kind": "pair",
        "lavatar.stage": stage["pair:A<-B"].key,
        "lavatar.avatar.stage": stage["avatar:A"].key,
        "lavatar.avatar.version": f"{AVATAR}/1",
        "lavatar.dataset.avatar": stage["preprocess:A"].key,
        "lavatar.dataset.actor": stage["preprocess:B"].key,
        "lavatar.decided_by": "cross/expression_error",
        "lavatar.figure.cross/expression_error": "0.4",
    }
    assert both.items() <= pair.tags.items()
    assert not [key for key in pair.tags if "spread" in key or key.startswith("lavatar.figure.self")]
    for words in (
        "9 frames, 1 more held out, 1 dropped",
        "| self | 0.00100 | 30.00",
        "On 6 held-out frames of A",
        "drawn",
    ):
        assert words in avatar.description
    assert "# A driven by B" in pair.description
    assert log_of(models, plan.job_id).count("is champion: it is the first that was measured") == 2


def test_the_card_says_what_it_follows_weakly_and_who_has_to_agree(home: Path, plain_digest: None) -> None:
    plan = make_plan(Home(home))
    (pair,) = plan.pairs
    filmed = replace(pair, avatar=replace(pair.avatar, source=VideoSource("A", Path("a.mp4"))))
    measured = figures()
    measured["self"]["expression"] = {
        "jaw": {"r": 0.9, "amplitude": 1.0}, "blink": {"r": 0.2, "amplitude": 1.0}, "smile": {"r": None},
        "gaze": {"r": 0.9, "amplitude": 0.1},
    }  # fmt: skip
    drawn, real = (card(Lineage.of_avatar(plan, one), {}, 1.0, measured) for one in (pair, filmed))
    for text in (drawn, real):
        limits = text.partition("## Limits\n")[2].partition("## Consent\n")[0]
        assert "Expressions that it follows weakly: blink, gaze." in limits
        assert "Expressions that could not be measured on these frames: smile." in limits
    assert drawn.endswith("## Consent\nEverybody here is drawn: no real person is shown.")
    assert "## Consent\nIt was made of videos of A. Use it only as they agreed to" in real
    both = card(Lineage.of_pair(plan, filmed), {}, 1.0, None)
    assert "videos of A. Use" in both, "the actor is drawn"


def test_a_version_is_made_in_few_statements(models: Models) -> None:
    """MLflow's own log_model and a tag at a time came to 271."""
    counted: list[str] = []

    def count(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if str(connection.engine.url).endswith("mlflow.db") and threading.current_thread().name.startswith("registrar"):
            counted.append(statement)

    models.submit()  # the avatar is there, and all is loaded
    made: list[int] = []
    bring = Registrar._bring_one

    def counting(registrar: Registrar, model: Model, standing: Standing) -> None:
        before = len(counted)
        bring(registrar, model, standing)
        if model.name == "lavatar-pair-A-C":
            made.append(len(counted) - before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Registrar, "_bring_one", counting)
        sa.event.listen(sa.Engine, "before_cursor_execute", count)
        models.submit(names="AC")
        sa.event.remove(sa.Engine, "before_cursor_execute", count)
    assert models.champion("lavatar-pair-A-C") == 1
    assert 20 < sum(made) < 130, made


def test_what_is_measured_in_another_way_is_not_compared(home: Path, plain_digest: None) -> None:
    def measured(*overrides: str) -> list[str]:
        plan = make_plan(Home(home), "A", "B", *overrides)
        (pair,) = plan.pairs
        known = (Lineage.of_avatar(plan, pair), Lineage.of_pair(plan, pair))
        return [lineage.measured(figures())[HELD_OUT_TAG] for lineage in known]

    avatar, pair = measured()
    assert measured("avatar_training.steps=7") == [avatar, pair]
    other = measured("evaluation.self_smoothing=2")
    assert (other[0] != avatar, other[1] == pair) == (True, True)
    other = measured("evaluation.pose_smoothing=2")
    assert (other[0] == avatar, other[1] != pair) == (True, True)
    other = measured("evaluation.identity_frames=3")
    assert (other[0] != avatar, other[1] != pair) == (True, True)


def test_a_worse_model_is_latest_and_no_champion(models: Models) -> None:
    models.submit()
    worse = models.submit(LONGER, preview=measures(lpips=0.06, error=0.5))
    assert [models.version(f"{name}@latest").number for name in (AVATAR, PAIR)] == [2, 2]
    assert [models.champion(name) for name in (AVATAR, PAIR)] == [1, 1]
    assert f"{AVATAR} version 1 stays champion: self/lpips 0.06 of version 2" in log_of(models, worse.job_id)
    models.submit("avatar_training.steps=98", preview=measures(lpips=0.04, error=0.3))
    assert [models.champion(name) for name in (AVATAR, PAIR)] == [3, 3]


def test_figures_of_other_frames_do_not_compare(models: Models) -> None:
    models.submit()
    plan = models.submit("evaluation.max_frames=3", LONGER, preview=measures(lpips=0.01, error=0.1))
    assert [models.champion(name) for name in (AVATAR, PAIR)] == [1, 1]
    assert "measured on other held-out frames" in log_of(models, plan.job_id)
    models.submit("evaluation.promote=always", "avatar_training.steps=98", preview=measures(lpips=0.9, error=0.9))
    assert [models.champion(name) for name in (AVATAR, PAIR)] == [3, 3]


def test_a_preview_that_fails_leaves_a_version_that_the_next_submit_measures(models: Models) -> None:
    plan = make_plan(models.home)
    with pytest.raises(StageFailedError):
        models.run(plan, preview=broken)
    for name in (AVATAR, PAIR):
        version = models.version(f"{name}@latest")
        assert (version.number, version.aliases) == (1, ("latest",))
        assert "Not measured yet" in version.description
        assert HELD_OUT_TAG not in version.tags
    assert models.run(plan).started == ["preview:A<-B"]
    for name in (AVATAR, PAIR):
        assert models.numbers(name) == [1], "the same version"
        assert models.champion(name) == 1
        assert "Not measured" not in models.version(name).description


def test_what_another_job_registered_is_neither_registered_nor_measured_again(models: Models) -> None:
    models.submit()
    before = dict(models.version(AVATAR).tags)
    plan = models.submit(names="AC")
    assert models.numbers(AVATAR) == [1]
    assert models.version("A<-C").tags["lavatar.avatar.version"] == f"{AVATAR}/1"
    figures = {key: value for key, value in models.version(AVATAR).tags.items() if "figure" in key}
    assert figures == {key: value for key, value in before.items() if "figure" in key}
    runner = FakeRunner()
    run_job(office(models.home, models.registry, runner), make_plan(models.home, "A", "C"))
    assert runner.started == []
    assert models.numbers("lavatar-pair-A-C") == [1]
    assert log_of(models, plan.job_id).count("submitted with recipe") == 1, "nothing is outstanding"


def test_a_job_of_many_pairs_measures_each(models: Models) -> None:
    plan = make_plan_of(models.home, "AB AC DB")
    with pytest.raises(StageFailedError):
        models.run(plan, **{"preview:A<-C": broken})
    assert [models.champion(f"lavatar-{name}") for name in ("avatar-A", "avatar-D", "pair-A-B", "pair-D-B")] == [1] * 4
    assert models.champion("lavatar-pair-A-C") is None
    assert models.numbers("lavatar-pair-A-C") == [1]


def test_a_shared_network_is_registered_for_each_pair(models: Models) -> None:
    models.run(make_shared_plan(models.home, "AB", "BC", "mapping.joint=false"))
    pairs = [models.version(f"{names[0]}<-{names[1]}") for names in ("AB", "AC", "BC")]
    assert len({pair.tags["lavatar.stage"] for pair in pairs}) == 1
    assert {pair.tags["lavatar.shared"] for pair in pairs} == {"true"}
    assert [pair.tags["lavatar.avatar.version"] for pair in pairs] == [f"{AVATAR}/1"] * 2 + ["lavatar-avatar-B/1"]
    assert "several avatars and actors at once" in pairs[0].description


def test_figures_that_mlflow_did_not_take_are_given_by_the_next_submit(models: Models) -> None:
    """MLflow's database fails while an avatar is measured."""
    plan = make_plan(models.home)
    trigger = f"""CREATE TRIGGER full BEFORE INSERT ON model_version_tags
        WHEN NEW.name = '{AVATAR}' AND NEW.key = '{HELD_OUT_TAG}' BEGIN SELECT RAISE(FAIL, 'disk full'); END"""
    with contextlib.closing(sqlite3.connect(models.home.root / "mlflow.db", isolation_level=None)) as tables:
        tables.execute(trigger)
        models.run(plan)
        tables.execute("DROP TRIGGER full")
    said = "\n".join(models.display.messages)
    assert f"warning: the figures of {AVATAR} version 1 could not be stored in MLflow" in said
    assert "disk full" in said
    assert [models.champion(name) for name in (AVATAR, PAIR)] == [None, 1]
    assert models.run(plan).started == []
    assert HELD_OUT_TAG in models.version(AVATAR).tags
    assert [models.champion(name) for name in (AVATAR, PAIR)] == [1, 1]


@pytest.fixture
def cli(models: Models, lavatar: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command line in the models' home, its stages small functions; what is returned is the answer to --json."""
    from lavatar.cluster import stages

    @contextlib.contextmanager
    def opened(*args: object, **kwargs: object) -> Any:
        yield FakeRunner({"preview": measures()})

    monkeypatch.setattr(stages, "StageRunner", opened)
    for name in "ABC":
        add_subject(models.registry, describe_synthetic(name, ord(name)))

    def call(*args: str, code: int = 0) -> Any:
        found, out, err = lavatar(*args, "--json")
        assert found == code, err
        return json.loads(out)

    return call


def test_submit_says_when_a_version_becomes_champion(models: Models, cli: Any) -> None:
    submit = ("submit", "--avatar", "A", "--actor", "B", "--set", "avatar_loss.lambda_vgg=0")
    first = cli(*submit, "--promote", "never")
    assert (models.numbers(AVATAR), models.champion(AVATAR)) == ([1], None)
    assert lookup.get_job(models.registry, first["job"]).recipe["evaluation"]["promote"] == "never", "for resume"
    again = cli(*submit, "--promote", "always")
    assert again["job"] == first["job"], "no stage depends on it"
    assert models.champion(AVATAR) is None, "it decides about new versions"
    cli(*submit, "--promote", "always", "--set", LONGER)
    assert models.champion(AVATAR) == 2


def test_models_are_listed_shown_and_compared(models: Models, cli: Any, lavatar: Any) -> None:
    models.submit()
    models.submit(
        "evaluation.max_frames=3", "evaluation.champion_pair=truth/lpips", LONGER, preview=measures(lpips=0.01)
    )
    listed = cli("models", "list")["models"]
    assert [(model["name"], model["stale"], model["champions"]) for model in listed] == [
        (AVATAR, False, [1]),
        (PAIR, False, [1]),
    ]
    assert [(v["version"], v["aliases"], v["metric"], v["value"], v["stale"]) for v in listed[1]["versions"]] == [
        (2, ["latest"], "cross/truth/lpips", None, True),
        (1, ["champion"], "cross/expression_error", 0.4, False),
    ]
    shown = cli("models", "show", "A")
    assert (shown["version"], shown["value"], shown["stale"]) == (1, 0.05, None)
    assert shown["pairs"] == [f"models:/{PAIR}/1"]
    assert Path(shown["artifacts"].removeprefix("file://")).is_relative_to(models.home.mlartifacts)
    assert shown["card"].startswith("# A\n")
    assert shown["figures"]["self/psnr"] == 30.0
    assert cli("models", "show", f"models:/{AVATAR}/latest")["version"] == 2
    compared = cli("models", "compare", "A/1", "A@latest")
    assert compared["same_frames"] is False
    assert [version["figures"]["self/lpips"] for version in compared["versions"]] == [0.05, 0.01]
    _, out, err = lavatar("models", "compare", "A/1", "A/2")
    assert ["self/lpips", "0.05", "0.01"] in [line.split() for line in out.splitlines()]
    assert "not all measured on the same held-out frames" in err
    _, out, _ = lavatar("models", "show", "A<-B/2")
    for line in ("stale: the champion of its avatar is another one", "# A driven by B", f"{AVATAR}/2"):
        assert line in out
    _, out, _ = lavatar("models", "list")
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [
        [AVATAR, "2", "latest"], [AVATAR, "1", "champion"], [PAIR, "2", "latest"], [PAIR, "1", "champion"],
    ]  # fmt: skip
    assert out.splitlines()[3].endswith("stale")


def test_a_version_is_promoted_rolled_back_and_deleted(models: Models, cli: Any) -> None:
    plan = models.submit()
    models.submit(LONGER, preview=measures(lpips=0.04, error=0.5))
    assert cli("models", "promote", "A/1", "--alias", "approved") == {
        "name": AVATAR, "alias": "approved", "version": 1, "before": None
    }  # fmt: skip
    refused = cli("models", "delete", "A/2", code=1)["error"]
    assert refused["message"] == f"{AVATAR} version 2 is the champion"
    assert "rollback" in refused["hint"]
    assert cli("models", "rollback", "A") == {"name": AVATAR, "version": 1, "before": 2}
    assert cli("models", "promote", f"{AVATAR}/2") == {"name": AVATAR, "alias": "champion", "version": 2, "before": 1}
    assert cli("models", "rollback", AVATAR)["version"] == 1
    assert models.version(AVATAR).aliases == ("approved", "champion")
    gone = cli("models", "delete", "A/1", "--force")
    assert gone == {
        "deleted": f"models:/{AVATAR}/1",
        "aliases": ["approved", "champion"],
        "pairs": [f"models:/{PAIR}/1"],
    }
    assert models.champion(AVATAR) is None
    models.run(plan)
    assert models.numbers(AVATAR) == [2, 3], "its job registers it anew"
    assert models.version(f"{AVATAR}/3").tags["lavatar.stage"] == plan.stages[2].key
    assert models.version("A<-B/1").tags["lavatar.avatar.version"] == f"{AVATAR}/1"


REFUSED = (
    (("show", "AA"), 2, "there is no registered model 'lavatar-avatar-AA'|Did you mean 'lavatar-avatar-A'"),
    (("show", "A/9"), 2, "has no version 9|Its versions are 1; its aliases @latest, @champion"),
    (("show", "A@approved"), 2, "has no alias 'approved'|Its versions are 1"),
    (("show", "A/b/c"), 2, "'A/b/c' names no model|NAME@ALIAS"),
    (("compare", "A/1"), 2, "there is one version to compare|lavatar models compare A/1 NAME/2"),
    (("promote", "A"), 2, "'A' says no version|Write A/VERSION"),
    (("promote", "A/1", "--alias", "latest"), 2, "MLflow takes no alias 'latest'|Choose another name"),
    (("rollback", "A"), 1, "had no champion before version 1|lavatar models promote lavatar-avatar-A/VERSION"),
    (("rollback", "A/1"), 2, "'A/1' says a version|models promote"),
    (("delete", "A@champion"), 2, "'A@champion' says no version|Write A/VERSION"),
)


def test_what_is_wrong_is_said_with_a_way_out(models: Models, cli: Any) -> None:
    models.submit()
    for args, code, words in REFUSED:
        error = cli("models", *args, code=code)["error"]
        for part in words.split("|"):
            assert part in f"{error['message']} {error['hint']}", args
    assert models.version(AVATAR).aliases == ("latest", "champion")


def test_models_of_an_mlflow_that_is_away(lavatar: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, out, err = lavatar("models", "list")
    assert (code, out) == (1, "")
    assert "MLflow at http://127.0.0.1:9 does not answer" in err
    assert "MLFLOW_TRACKING_URI" in err


def test_a_retrained_avatar_makes_its_pairs_stale_and_retry_brings_them_up_to_date(models: Models, cli: Any) -> None:
    cold = ("pair_learning.warm=false", "ynet_training.steps=77")
    for actor in "BC":
        models.submit(*cold, names=f"A{actor}")
    assert cli("jobs", "retry", "--stale") == {"jobs": [], "left": {}}
    models.submit(*cold, LONGER, names="AC", preview=measures(lpips=0.01))  # a better avatar, and its pair with C
    assert models.champion(AVATAR) == 2
    assert {model["name"]: model["stale"] for model in cli("models", "list")["models"]} == {
        AVATAR: False, PAIR: True, "lavatar-pair-A-C": False
    }  # fmt: skip
    (refused,) = cli("jobs", "retry", "--stale", "--detach", code=1)["jobs"]
    assert "no cluster is up" in refused["error"]["message"]
    (job,) = cli("jobs", "retry", "--stale")["jobs"]
    assert (job["state"], job["avatar"], job["actor"]) == ("finished", "A", "B")
    assert {stage["name"]: stage["cached"] for stage in job["stages"]} == {
        "preprocess:A": True, "preprocess:B": True, "avatar:A": True, "pair:A<-B": False, "preview:A<-B": False
    }  # fmt: skip
    renewed = models.version(f"{PAIR}@latest")
    assert (renewed.number, renewed.stale) == (2, False)
    assert renewed.tags["lavatar.avatar.version"] == f"{AVATAR}/2"
    recipe = json.loads(renewed.tags[SECTIONS_TAG])
    assert (recipe["ynet_training"]["steps"], recipe["avatar_training"]["steps"]) == (77, 99)
    assert models.version(f"{PAIR}/1").stale
    assert cli("jobs", "retry", "--stale") == {"jobs": [], "left": {}}
    cli("models", "rollback", AVATAR)
    assert [model["stale"] for model in cli("models", "list")["models"]] == [False] * 3, "a version fits each"


def test_a_shared_network_is_brought_up_to_date_as_a_whole(models: Models, cli: Any) -> None:
    shared = "mapping.joint=false"
    models.run(make_shared_plan(models.home, "AB", "BC", shared))
    models.submit(shared, LONGER, names="AC", preview=measures(lpips=0.01))
    left = cli("jobs", "retry", "--stale", code=1)["left"]
    assert set(left) == {"A<-B", "A<-C", "B<-C"}
    assert "lavatar-avatar-B/1 would be made anew as another avatar" in left["A<-B"]
    models.submit(shared, LONGER, names="BC", preview=measures(lpips=0.01))
    (job,) = cli("jobs", "retry", "--stale")["jobs"]
    assert job["state"] == "finished"
    assert not any(model["stale"] for model in cli("models", "list")["models"])


def test_pairs_that_cannot_be_brought_up_to_date_are_named(models: Models, cli: Any, lavatar: Any) -> None:
    models.submit()
    models.submit(LONGER, names="AC", preview=measures(lpips=0.01))
    assert lavatar("subjects", "remove", "B")[0] == 0
    result = cli("jobs", "retry", "--stale", code=1)
    assert result["jobs"] == []
    assert "there is no subject 'B'" in result["left"]["A<-B"]
    models.client.delete_model_version_tag(PAIR, "1", SECTIONS_TAG)
    assert "does not say by which recipe it was made" in cli("jobs", "retry", "--stale", code=1)["left"]["A<-B"]
    assert "JOB is missing" in cli("jobs", "retry", code=2)["error"]["message"]
    assert "do not go together" in cli("jobs", "retry", "j", "--stale", code=2)["error"]["message"]
