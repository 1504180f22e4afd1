"""Keys: what changes a result changes them, and nothing else does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lavatar.configs.recipe import Recipe
from lavatar.contracts import StageKind, VideoSource
from lavatar.errors import ConfigError, UsageError, WeightsError
from lavatar.platform import planning
from lavatar.platform.home import Home
from lavatar.platform.planning import CADENCE, KEYLESS_SECTIONS, SECTIONS, Person, Plan

sys.path.insert(0, str(Path(__file__).parent))
from platform_fakes import make_plan, make_plan_of, person, plain_digest, tiny

pytestmark = pytest.mark.usefixtures("plain_digest", "home")
__all__ = ["plain_digest"]
HOME = Home(Path("/nowhere"))
ALL = [kind.value for kind in StageKind if kind is not StageKind.SHARED]


def keys(plan: Plan) -> dict[str, str]:
    return {stage.name: stage.key for stage in plan.stages}


def changed(*overrides: str) -> list[str]:
    """Kinds of stages whose keys differ under these settings."""
    before, after = keys(make_plan(HOME)), keys(make_plan(HOME, "A", "B", *overrides))
    return [kind for kind in ALL if any(before[n] != after[n] for n in before if n.startswith(f"{kind}:"))]


def test_the_five_stages_and_their_order() -> None:
    plan = make_plan(HOME)
    assert [s.name for s in plan.stages] == [
        "preprocess:A", "preprocess:B", "avatar:A", "pair:A<-B", "preview:A<-B",
    ]  # fmt: skip
    seen: set[str] = set()
    for stage in plan.stages:
        assert set(stage.needs) <= seen
        seen.add(stage.key)
    assert plan.stage(StageKind.PREVIEW).spec.inputs == {
        "avatar_dataset": HOME.root / "shards" / plan.stages[0].key,
        "actor_dataset": HOME.root / "shards" / plan.stages[1].key,
        "avatar": HOME.root / "checkpoints" / plan.stages[2].key / "release",
        "pair": HOME.root / "checkpoints" / plan.stages[3].key / "release",
    }


def test_every_section_of_a_recipe_is_accounted_for() -> None:
    named = [section for sections in SECTIONS.values() for section in sections]
    assert sorted({*named, *KEYLESS_SECTIONS}) == sorted(Recipe.model_fields)
    assert SECTIONS[StageKind.SHARED] == SECTIONS[StageKind.PAIR]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("preprocess.crop_scale=1.7", ALL),
        ("avatar_training.steps=7", ["avatar", "pair", "preview"]),
        ("avatar_loss.lambda_lr=0.3", ["avatar", "pair", "preview"]),
        ("avatar_loss.lambda_vgg=0.1", ["avatar", "pair", "preview"]),
        ("mapping_training.seed=9", ["pair", "preview"]),
        ("ynet_loss.lambda_ssim=0.2", ["pair", "preview"]),
        ("evaluation.max_frames=3", ["preview"]),
        ("evaluation.batch_size=3", []),
        ("resources.avatar.cpus=1", []),
        ("resources.backend=inline", []),
        *[(f"{section}_training.{key}=77", []) for section in ("avatar", "ynet", "mapping") for key in sorted(CADENCE)],
    ],
)
def test_a_setting_changes_the_keys_of_the_stages_it_reaches(override: str, expected: list[str]) -> None:
    assert changed(override) == expected


def test_jobs_share_what_they_have_in_common() -> None:
    ab, ac, ca = keys(make_plan(HOME, "A", "B")), keys(make_plan(HOME, "A", "C")), keys(make_plan(HOME, "C", "A"))
    assert ab["preprocess:A"] == ac["preprocess:A"] == ca["preprocess:A"]
    assert ab["avatar:A"] == ac["avatar:A"] != ca["avatar:C"]
    assert ab["pair:A<-B"] != ac["pair:A<-C"]
    assert make_plan(HOME, "A", "B").job_id != make_plan(HOME, "A", "C").job_id


def test_one_video_under_two_names_is_preprocessed_and_trained_once() -> None:
    first, second = make_plan(HOME, "Anna", "B"), make_plan(HOME, "Anton", "B")
    assert keys(first)["avatar:Anna"] == keys(second)["avatar:Anton"]
    assert first.job_id != second.job_id
    same = make_plan(HOME, "Anna", "Anton")
    assert [s.spec.kind.value for s in same.stages] == ["preprocess", "avatar", "pair", "preview"]
    assert same.stages[1].needs == (same.stages[0].key,)


def test_nobody_drives_themselves() -> None:
    with pytest.raises(UsageError, match="both 'A'") as caught:
        make_plan(HOME, "A", "A")
    assert caught.value.hint.startswith("Name two subjects")
    with pytest.raises(UsageError, match="both 'A'") as caught:
        planning.plan(HOME.root, HOME.out_dir, [(person("A", 1), person("A", 2))], tiny())
    assert "lavatar subjects add A2 VIDEO" in caught.value.hint


def test_no_tracker_for_synthetic_people_looks_at_a_video() -> None:
    video = Person("V", "digest", VideoSource("V", path=Path("v.mp4")))
    for pair in ((video, person("B", 1)), (person("B", 1), video)):
        with pytest.raises(ConfigError, match=r"preprocess\.tracker is synthetic, but 'V' is a video"):
            planning.plan(HOME.root, HOME.out_dir, [pair], tiny("preprocess.tracker=synthetic"))
    assert len(make_plan(HOME, "A", "B", "preprocess.tracker=synthetic").stages) == 5


def test_weights_are_asked_for_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVATAR_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan = make_plan(HOME, "A", "B", "avatar_loss.lambda_vgg=0.1")
    with pytest.raises(WeightsError, match="needed by avatar:A") as caught:
        planning.require_weights(list(plan.stages))
    assert "lavatar weights fetch lpips_vgg16" in caught.value.hint
    planning.require_weights(list(make_plan(HOME).stages))


def test_the_evaluation_of_real_people_does_not_refuse_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "weights_present", lambda name: False)
    people = [Person(name, name, VideoSource(name, path=Path(f"{name}.mp4"))) for name in ("A", "B")]
    preview = planning.plan(HOME.root, HOME.out_dir, [(people[0], people[1])], tiny()).stage(StageKind.PREVIEW)
    planning.require_weights([preview])
    assert preview.optional_weights == ("lpips_alexnet", "face_recognition", "face_landmarker")
    monkeypatch.setattr(planning, "weights_present", lambda name: True)
    again = planning.plan(HOME.root, HOME.out_dir, [(people[0], people[1])], tiny()).stage(StageKind.PREVIEW)
    assert again.key != preview.key  # measured once they are there


def test_metrics_that_lacked_weights_are_measured_once_these_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "weights_present", lambda name: False)
    without = keys(make_plan(HOME))
    monkeypatch.setattr(planning, "weights_present", lambda name: True)
    with_them = keys(make_plan(HOME))
    assert [name for name in without if without[name] != with_them[name]] == ["preview:A<-B"]


def test_space_grows_with_the_video_and_shrinks_with_what_is_done() -> None:
    plan = make_plan(HOME)
    long = {"preprocess:A": person("A", 1).__class__("A", "d", plan.pairs[0].avatar.source, frames=100_000)}
    assert planning.space_needed(list(plan.stages), long) > planning.space_needed(list(plan.stages), {})
    assert planning.space_needed([], {}) < planning.space_needed(list(plan.stages), {})
    assert tiny("preprocess.max_frames=10").preprocess.max_frames == 10


def test_order_and_repetition_of_pairs_change_nothing() -> None:
    one, other = make_plan_of(HOME, "AB DB AC"), make_plan_of(HOME, "AC AB AB DB")
    assert one == other
    assert [(p.avatar.name, p.actor.name) for p in one.pairs] == [("A", "B"), ("A", "C"), ("D", "B")]
    assert len(one.stages) == 4 + 2 + 3 + 3
    for pair in one.pairs:
        alone = make_plan(HOME, pair.avatar.name, pair.actor.name)
        assert {stage.key for stage in alone.stages} == one.needed(pair), "its stages have the keys of a job of its own"
    assert make_plan_of(HOME, "AB").job_id == make_plan(HOME, "A", "B").job_id


def test_one_name_for_two_videos_is_refused_whatever_pairs_they_are_in() -> None:
    pairs = [(person("A", 1), person("B", 2)), (person("C", 3), person("B", 4))]
    with pytest.raises(UsageError, match="two videos are named 'B'"):
        planning.plan(HOME.root, HOME.out_dir, pairs, tiny())
