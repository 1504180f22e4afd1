"""What `lavatar submit` refuses, it refuses before anything is written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.video_files import counted_frames, write_video

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def clips(tmp_path: Path) -> tuple[Path, Path]:
    """Two short videos, without a face."""
    frames = counted_frames(20)
    return write_video(tmp_path / "ann.mp4", frames), write_video(tmp_path / "bob.mp4", frames[::-1])


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVATAR_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def names(lavatar: Any) -> list[str]:
    return [subject["name"] for subject in json.loads(lavatar("subjects", "list", "--json")[1])["subjects"]]


@pytest.mark.usefixtures("no_weights")
def test_missing_weights_are_told_and_no_job_is_left(lavatar: Any, clips: tuple[Path, Path]) -> None:
    for clip in clips:
        assert lavatar("subjects", "add", clip.stem, clip)[0] == 0
    command = ("submit", "--avatar", "ann", "--actor", "bob", "--recipe", "tiny")
    way_out = "lavatar weights fetch face_landmarker rvm"
    code, out, err = lavatar(*command)
    assert (code, out) == (1, "")
    assert "needed by preprocess:ann, preprocess:bob" in err
    assert way_out in err
    code, out, _ = lavatar(*command, "--json")
    assert (code, json.loads(out).keys()) == (1, {"error"})
    assert way_out in json.loads(out)["error"]["hint"]
    assert json.loads(out)["error"]["exit_code"] == 1
    assert json.loads(lavatar("jobs", "list", "--json")[1])["jobs"] == []


def test_nobody_is_added_by_a_submit_that_is_refused(lavatar: Any, clips: tuple[Path, Path], tmp_path: Path) -> None:
    ann, bob = clips
    (tmp_path / "other").mkdir()
    namesake = write_video(tmp_path / "other" / "bob.mp4", counted_frames(9))
    for avatar, actor, words in (
        (ann, "nobody", "there is no subject 'nobody'"),
        (ann, "nobody.mp4", "there is no file nobody.mp4"),
        (ann, ann, "both 'ann'"),
        (bob, namesake, "lavatar subjects add bob2 VIDEO"),
    ):
        code, out, err = lavatar("submit", "--avatar", avatar, "--actor", actor)
        assert (code, out) == (2, "")
        assert words in err
        assert names(lavatar) == []
    lavatar("subjects", "add", "bob", namesake)
    for more in ((), ("--dry-run",)):
        code, _, err = lavatar("submit", "--avatar", ann, "--actor", bob, *more)
        assert code == 2
        assert "the name 'bob' is taken by another video" in err
    assert names(lavatar) == ["bob"]
    code, _, err = lavatar("submit", "--avatar", ann, "--actor", "bob", "--set", "preprocess.tracker=synthetic")
    assert code == 2
    assert "preprocess.tracker is synthetic" in err
    assert names(lavatar) == ["bob"]


@pytest.mark.usefixtures("no_weights")
def test_videos_are_added_once_they_can_be_planned(lavatar: Any, clips: tuple[Path, Path]) -> None:
    assert lavatar("submit", "--avatar", clips[0], "--actor", clips[1])[0] == 1
    assert names(lavatar) == ["ann", "bob"]


def test_nobody_drives_themselves(lavatar: Any) -> None:
    lavatar("subjects", "add", "--synthetic", "1", "anna")
    for more in ((), ("--dry-run",)):
        code, out, err = lavatar("submit", "--avatar", "anna", "--actor", "anna", *more)
        assert (code, out) == (2, "")
        assert "avatar and actor are both 'anna'\n  Name two subjects" in err


def test_an_unknown_person_to_show_or_remove_is_not_to_be_added(lavatar: Any) -> None:
    lavatar("subjects", "add", "--synthetic", "1", "anna")
    for command in ("show", "remove"):
        code, _, err = lavatar("subjects", command, "ana")
        assert code == 2
        assert "Did you mean 'anna'?" in err
        assert "lavatar subjects list" in err
        assert "subjects add" not in err
    for i in range(30):
        lavatar("subjects", "add", "--synthetic", str(i), f"p{i:02d}")
    assert "p10, …" in lavatar("subjects", "show", "xyz")[2]


def test_a_cut_off_video_is_not_added(lavatar: Any, tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.webm", counted_frames(50), codec="libvpx")
    cut = tmp_path / "my cut.webm"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 3])
    code, _, err = lavatar("subjects", "add", "ann", cut)
    assert code == 1
    assert "truncated or damaged" in err
    assert names(lavatar) == []


def test_a_file_of_pairs_is_a_job(lavatar: Any, tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        lavatar("subjects", "add", "--synthetic", str(seed), name)
    file = tmp_path / "pairs.yaml"
    file.write_text("- {avatar: a, actor: b}\n- {avatar: c, actor: b}\n")
    code, out, _ = lavatar("submit", "--pairs", file, "--dry-run", "--json")
    assert code == 0
    stages = [stage["name"] for stage in json.loads(out)["stages"]]
    assert stages == [
        "preprocess:a", "preprocess:b", "preprocess:c", "avatar:a", "avatar:c", "pair:a<-b", "pair:c<-b",
        "preview:a<-b", "preview:c<-b",
    ]  # fmt: skip
    assert json.loads(out)["warm"] == {"a<-b": None, "c<-b": None}
    two = ("submit", "--avatar", "a", "--avatar", "c", "--actor", "b", "--dry-run", "--json")
    assert lavatar(*two)[1] == out, "the same pairs are the same job"
    every = json.loads(lavatar(*two[:5], "--actor", "a", "--actor", "b", *two[-2:])[1])
    assert [s["name"] for s in every["stages"] if s["name"].startswith("pair:")] == [
        "pair:a<-b",
        "pair:c<-a",
        "pair:c<-b",
    ]


def test_a_recipe_that_begins_warm_by_itself_is_taken_for_a_shared_network(lavatar: Any) -> None:
    from lavatar.configs.recipe import load_recipe

    assert load_recipe("tiny").pair_learning.warm
    for seed, name in enumerate("ab"):
        lavatar("subjects", "add", "--synthetic", str(seed), name)
    code, out, _ = lavatar("submit", "--avatar", "a", "--actor", "b", "--shared", "--dry-run", "--json")
    assert code == 0
    assert "shared:a, b" in [stage["name"] for stage in json.loads(out)["stages"]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no list of pairs"),
        ("avatar: a", "no list of pairs"),
        ("- {avatar: a, actor: b}\n- {avatar: a}", "entry 2 is no pair"),
        ("- {avatar: a, actor: b, also: c}", "entry 1 is no pair"),
        ("- {avatar: a, actor: 7}", "entry 1 is no pair"),
        ("- {avatar: a, actor: ''}", "entry 1 is no pair"),
        ("- [a, b]", "entry 1 is no pair"),
        ("- {avatar: a", "is no YAML"),
        ("- !!python/object/apply:os.system [touch /tmp/owned]", "is no YAML"),
        ("\x00", "is no YAML"),
        ("- {avatar: a, actor: nobody}", "there is no subject 'nobody'"),
    ],
)
def test_a_bad_file_of_pairs_is_told(lavatar: Any, tmp_path: Path, text: str, words: str) -> None:
    lavatar("subjects", "add", "--synthetic", "0", "a")
    lavatar("subjects", "add", "--synthetic", "1", "b")
    file = tmp_path / "pairs.yaml"
    file.write_text(text)
    code, out, err = lavatar("submit", "--pairs", file)
    assert (code, out) == (2, "")
    assert words in err
    assert json.loads(lavatar("jobs", "list", "--json")[1])["jobs"] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--pairs", "missing.yaml"), "cannot be read"),
        (("--pairs", "x.yaml", "--avatar", "a"), "goes with none of"),
        (("--pairs", "x.yaml", "--shared"), "goes with none of"),
        (("--avatar", "a"), "--actor is missing"),
        (("--actor", "a"), "--avatar is missing"),
        ((), "--avatar is missing"),
    ],
)
def test_who_is_meant_has_to_be_said_once(lavatar: Any, options: tuple[str, ...], words: str) -> None:
    code, out, err = lavatar("submit", *options)
    assert (code, out) == (2, "")
    assert words in err
