"""Registered models into a file and out of it in another home: the real MLflow and registry, untrained models."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavatar.contracts import StageKind
from lavatar.platform import lookup, modelimport
from lavatar.platform.about import About, read_about
from lavatar.platform.finished import find_pair
from lavatar.platform.home import Home
from lavatar.platform.modelfile import MEMBERS, unpack_model_file, write_model_file
from lavatar.platform.modelregistry import Release, avatar_model_name, pair_model_name, register
from lavatar.platform.registry import open_registry
from lavatar.platform.tracking import Tracker, connect
from lavatar.training.files import file_digest

sys.path.insert(0, str(Path(__file__).parent))
from inference_files import FACE, RECIPE, make_avatar_release, make_pair_release
from model_files import KNOWN, PEOPLE, register_untrained
from outside import changed, only_our_errors
from platform_fakes import either
from video_files import write_drawn_head

__all__ = ["either"]

Lavatar = Callable[..., tuple[int, str, str]]
PAIR, AVATAR = pair_model_name("ann", "bob"), avatar_model_name("ann")


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home where an avatar and a pair are registered, as a job registers them."""
    folder = tmp_path_factory.mktemp("studio")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        home = Home(folder / "home").ensure()
        tracker = register_untrained(home, folder)
        tracker.client.update_model_version(PAIR, "1", "# ann driven by bob\n\nGood to 20°.")
        tracker.client.set_model_version_tag(PAIR, "1", "lavatar.job", "j")
        tracker.client.set_model_version_tag(PAIR, "1", "lavatar.figure.cross/psnr", "21.5")
        tracker.client.set_model_version_tag(PAIR, "1", "others.tag", "stays")
    return home


@pytest.fixture(scope="module")
def exported(studio: Home, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of both, by kind; written by the command line."""
    from lavatar.platform.cli import run

    folder = tmp_path_factory.mktemp("exported")
    files = {"avatar": folder / "ann.tar", "pair": folder / "ann-bob.tar"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAVATAR_HOME", str(studio.root))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert run(["models", "export", AVATAR, "-o", str(files["avatar"])]) == 0
        assert run(["models", "export", f"{PAIR}@latest", "-o", str(files["pair"])]) == 0
        for i, named in enumerate((PAIR, f"{PAIR}/1", f"models:/{PAIR}@latest")):
            assert run(["models", "export", named, "-o", str(folder / f"{i}.tar"), "--json"]) == 0
            assert (folder / f"{i}.tar").read_bytes() == files["pair"].read_bytes()
    assert not list(studio.root.glob("release-*"))
    return files


@pytest.fixture
def elsewhere(home: Path) -> Home:
    """Another home, which commands now work in."""
    return Home(home)


def everything(home: Home) -> set[str]:
    """What lies in a home of models and what is being made, and the rows that speak of them."""
    registry = open_registry(home)
    rows = {f"job {job.id}" for job in lookup.list_jobs(registry)}
    registry.close()
    files = {
        str(p.relative_to(home.root))
        for p in home.root.rglob("*")
        if p.is_file() and "/" in str(p.relative_to(home.root))
    }
    return rows | files | {str(p) for p in home.root.glob("release-*")}


def opened(file: Path, folder: Path) -> Path:
    """The members of a file, to be changed."""
    folder.mkdir()
    unpack_model_file(file, folder)
    return folder


def test_a_pair_is_used_elsewhere_by_reenact_and_by_mlflow(
    exported: dict[str, Path], elsewhere: Home, lavatar: Lavatar, tmp_path: Path, weights: Path
) -> None:
    import mlflow.pyfunc

    code, out, err = lavatar("models", "import", exported["pair"])
    assert (code, err) == (0, "")
    assert f"{PAIR} version 1" in out
    assert "lavatar reenact --avatar ann --actor bob" in out
    registry = open_registry(elsewhere)
    found = find_pair(registry, elsewhere, "ann", "bob")
    assert (found.recipe, found.avatar_data, found.actor_data) == (RECIPE, None, None)
    video, frames = write_drawn_head(tmp_path / "driver.mp4")
    code, out, err = lavatar(
        "reenact", "--avatar", "ann", "--actor", "bob", "--video", video, "-o", tmp_path / "out.mp4", "--json"
    )
    assert code == 0, err
    assert (json.loads(out)["job"], json.loads(out)["frames"]) == (found.job, len(frames))
    mlflow.set_tracking_uri(elsewhere.tracking_uri)
    mlflow.set_registry_uri(elsewhere.tracking_uri)
    for alias in ("champion", "latest"):
        portraits = mlflow.pyfunc.load_model(f"models:/{PAIR}@{alias}").predict(frames)
        assert portraits.shape == (len(frames), RECIPE.avatar.image_size, RECIPE.avatar.image_size, 3)
    client = connect(elsewhere)
    version = client.get_model_version(PAIR, "1")
    assert version.description == "# ann driven by bob\n\nGood to 20°."
    assert version.tags["lavatar.figure.cross/psnr"] == "21.5"
    assert "lavatar.job" not in version.tags, "that job is not here"
    assert "others.tag" not in version.tags
    code, out, err = lavatar("models", "import", exported["pair"], "--json")
    assert (code, json.loads(out)["version"], json.loads(out)["new"]) == (0, 1, False)
    assert len(lookup.list_jobs(registry)) == 1
    code, _, err = lavatar("evaluate", "--avatar", "ann", "--actor", "bob")
    assert code == 1
    assert "imported as a model, without the frames" in err
    code, out, _ = lavatar("models", "export", PAIR, "-o", tmp_path / "again.tar")
    assert code == 0
    first, second = (opened(file, tmp_path / file.stem) for file in (exported["pair"], tmp_path / "again.tar"))
    for name in MEMBERS["pair"][1:]:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    code, out, _ = lavatar("doctor", "--json")
    assert json.loads(out)["findings"] == []
    assert json.loads(lavatar("gc", "--dry-run", "--json")[1])["bytes"] == 0


def test_the_page_of_an_imported_pair_shows_what_came_with_it(
    exported: dict[str, Path], elsewhere: Home, lavatar: Lavatar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lavatar("models", "import", exported["pair"])[0] == 0
    (job,) = lookup.list_jobs(open_registry(elsewhere))
    client = connect(elsewhere)
    for name in ("cross/face", "cross/face/psnr", "self", "cross/spread/x/y", "../x", "cross/expression/jaw/r"):
        client.set_model_version_tag(PAIR, "1", f"lavatar.figure.{name}", "0.25")
    code, out, err = lavatar("report", job.id, "-o", tmp_path / "page.html", "--json")
    assert code == 0, err
    (pair,) = json.loads(out)["pairs"]
    assert (pair["state"], pair["cross"]["psnr"], pair["cross"]["expression_r"]) == ("finished", 21.5, 0.25)
    text = (tmp_path / "page.html").read_text()
    for words in (
        "imported: a model file holds no video; lavatar reenact makes one",
        "<td>21.50</td>",
        "Measured where the model was trained.",
        "It was trained elsewhere: its curves are there.",
        "<td>imported</td>",
    ):
        assert words in text
    for words in ("pending:", "submitted", "There are no figures yet", "has begun to train"):
        assert words not in text
    for command in (("reproduce", job.id), ("reproduce", f"{job.id}/pair:ann<-bob"), ("runs", "diff", job.id, job.id)):
        code, _, err = lavatar(*command)
        assert code == 1
        assert "was imported" in err
        assert "resume" not in err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert lavatar("report", job.id, "-o", tmp_path / "page.html")[0] == 0
    assert "no figures came with the model" in (tmp_path / "page.html").read_text()


def test_whole_frames_are_driven_as_reenact_does(
    exported: dict[str, Path], tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lavatar.errors import FaceError
    from lavatar.inference import reenact
    from lavatar.inference.loading import load_avatar, load_pair
    from lavatar.platform.portraits import portraits

    folder = opened(exported["pair"], tmp_path / "model")
    avatar, pair, about = load_avatar(folder / "avatar"), load_pair(folder / "pair"), str(folder / "about.json")
    video, frames = write_drawn_head(tmp_path / "driver.mp4")
    drawn: list[np.ndarray] = []
    monkeypatch.setattr(reenact, "fit", lambda image, size: drawn.append(image) or np.zeros((size, size, 3), np.uint8))
    reenact.reenact_video(avatar, pair, video, tmp_path / "out.mp4", RECIPE.preprocess, RECIPE.evaluation)

    def predict(pictures: np.ndarray) -> np.ndarray:
        return portraits(avatar, lambda faces: reenact.cross_codes(pair, faces), pictures, about)

    found = predict(frames)
    assert np.abs(found.astype(int) - np.stack(drawn)).max() <= 1
    assert predict(frames[:1]).shape == found[:1].shape
    assert len(predict(frames[:0])) == 0
    frames[3] = 0
    held = predict(frames)
    assert (held[3] == held[2]).all()
    with pytest.raises(FaceError, match="the pictures: no face was found"):
        predict(frames[3:4])
    with pytest.raises(ValueError, match=r"uint8 RGB pictures of shape \(N, height.*got float64 \(1, 9, 9, 3\)"):
        predict(np.zeros((1, 9, 9, 3)))


def test_an_avatar_alone_is_registered(exported: dict[str, Path], elsewhere: Home, lavatar: Lavatar) -> None:
    import mlflow.pyfunc

    code, out, err = lavatar("models", "import", exported["avatar"], "--as", "anna")
    assert (code, err) == (0, "")
    assert 'load_model("models:/lavatar-avatar-anna/1")' in out
    mlflow.set_tracking_uri(elsewhere.tracking_uri)
    mlflow.set_registry_uri(elsewhere.tracking_uri)
    assert "Takes uint8 RGB pictures" in connect(elsewhere).get_model_version("lavatar-avatar-anna", "1").description
    faces = np.full((2, FACE, FACE, 3), 128, np.uint8)
    assert len(mlflow.pyfunc.load_model("models:/lavatar-avatar-anna@champion").predict(faces)) == 2
    assert lookup.list_jobs(open_registry(elsewhere)) == []
    code, _, err = lavatar("models", "import", exported["avatar"], "--as", "anna:bob")
    assert (code, "Write: --as anna" in err) == (2, True)


def test_a_name_that_stands_for_somebody_else_here_is_refused(
    exported: dict[str, Path], elsewhere: Home, lavatar: Lavatar
) -> None:
    assert lavatar("subjects", "add", "--synthetic", "7", "bob")[0] == 0
    before = everything(elsewhere)
    code, _, err = lavatar("models", "import", exported["pair"])
    assert code == 2
    assert "the name 'bob' stands for another video here" in err
    assert "--as AVATAR:ACTOR" in err
    for renamed, words in (("../x:bob2", "cannot be a subject's name"), ("x:x", "both 'x'"), (":", "cannot be a")):
        code, _, err = lavatar("models", "import", exported["pair"], "--as", renamed)
        assert (code, words in err) == (2, True)
    assert everything(elsewhere) == before
    assert lavatar("models", "import", exported["pair"], "--as", "ann:bob2")[0] == 0
    registry = open_registry(elsewhere)
    assert find_pair(registry, elsewhere, "ann", "bob2").pair
    assert lavatar("models", "import", exported["pair"], "--as", "ann2:bob2")[0] == 0  # the same people
    assert len({find_pair(registry, elsewhere, name, "bob2").pair for name in ("ann", "ann2")}) == 1


def test_another_model_of_the_same_people_is_the_next_version(
    either: str, exported: dict[str, Path], elsewhere: Home, lavatar: Lavatar, tmp_path: Path
) -> None:
    folder = opened(exported["pair"], tmp_path / "model")
    shutil.rmtree(folder / "pair")
    make_pair_release(folder / "pair", mapping=RECIPE.mapping.model_copy(update={"hidden": (8,)}))
    write_model_file(tmp_path / "second.tar", "pair", folder)
    registry, pairs = open_registry(elsewhere), []
    for number, file in enumerate((exported["pair"], tmp_path / "second.tar"), 1):
        code, out, _ = lavatar("models", "import", file, "--json")
        assert (code, json.loads(out)["version"]) == (0, number)
        pairs.append(find_pair(registry, elsewhere, "ann", "bob"))
    assert pairs[0].pair != pairs[1].pair
    assert pairs[0].avatar == pairs[1].avatar
    assert connect(elsewhere).get_model_version_by_alias(PAIR, "champion").version in (1, "1"), (
        "nothing says it is better"
    )


def test_sums_do_not_say_who_made_a_file(
    exported: dict[str, Path], elsewhere: Home, lavatar: Lavatar, tmp_path: Path
) -> None:
    """Who changes a model and its sums too is not found out; only the SHA-256 that both commands print tells."""
    folder = opened(exported["pair"], tmp_path / "model")
    (folder / "card.md").write_text("# somebody else")
    write_model_file(tmp_path / "theirs.tar", "pair", folder)
    printed = [lavatar("models", "import", file)[1] for file in (tmp_path / "theirs.tar", exported["pair"])]
    assert connect(elsewhere).get_model_version(PAIR, "1").description == "# somebody else"
    sums = [file_digest(file) for file in (tmp_path / "theirs.tar", exported["pair"])]
    assert [sum_ in text for sum_, text in zip(sums, printed, strict=True)] == [True, True]
    assert sums[0] != sums[1]


def test_a_file_that_was_changed_is_refused_and_leaves_nothing(
    exported: dict[str, Path], elsewhere: Home, lavatar: Lavatar, tmp_path: Path
) -> None:
    open_registry(elsewhere)
    before = everything(elsewhere)
    good, bad = exported["pair"].read_bytes(), tmp_path / "bad.tar"
    for content in (good[:-1], good[: len(good) // 2], good[:-3000] + b"x" + good[-2999:], b""):
        bad.write_bytes(content)
        code, _, err = lavatar("models", "import", bad)
        assert code == 1
        assert str(bad) in err
        assert everything(elsewhere) == before
    assert not (elsewhere.root / "mlflow.db").exists()
    assert lavatar("models", "import", tmp_path / "gone.tar")[0] == 2
    assert lavatar("models", "import", tmp_path)[0] == 2


@given(data=st.data())
def test_a_changed_about_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "about.json"
    good = About(kind="pair", **PEOPLE, stage="b" * 64, tags={"lavatar.figure.self/psnr": "30"}, **KNOWN)
    path.write_text(json.dumps(data.draw(changed(good.model_dump(mode="json")))))
    with only_our_errors():
        about = read_about(path)
        stored = [text for person in about.people for text in (person.name, person.digest)]
        stored += [about.read_recipe().name, *about.tags, *about.tags.values()]
        assert not [text for text in stored if "\0" in text or not text.encode()]


def _other(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


SLIPS: dict[str, Callable[[Path], None]] = {
    "about.json is damaged": lambda f: (f / "about.json").write_text("[" * 100_000),
    "about.json does not fit this lavatar: format": lambda f: _other(f / "about.json", format=2),
    "about.json does not fit this lavatar: wings": lambda f: _other(f / "about.json", wings=2),
    "does not fit this lavatar: tags": lambda f: _other(f / "about.json", tags={"lavatar./../x": "1"}),
    "is no recipe's name": lambda f: _other(
        f / "about.json", recipe={**RECIPE.model_dump(mode="json"), "name": "x" * 33}
    ),
    "without an actor": lambda f: _other(f / "about.json", actor=None),
    "kind avatar and is one of kind pair": lambda f: _other(f / "about.json", kind="avatar", actor=None),
    "'../x' cannot be a subject's name": lambda f: _other(f / "about.json", avatar={"name": "../x", "digest": "1"}),
    "does not fit this lavatar: avatar.samples": lambda f: _other(
        f / "about.json", recipe={**RECIPE.model_dump(mode="json"), "avatar": {"samples": -1}}
    ),
    "avatar/model.safetensors is damaged": lambda f: (f / "avatar/model.safetensors").write_bytes(b"\x80\x04."),
    "names other weights": lambda f: _other(
        f / "pair/config.json",
        weights={**json.loads((f / "pair/config.json").read_text())["weights"], "file": "../../x"},
    ),
    "its avatar takes 16": lambda f: (
        shutil.rmtree(f / "avatar"),
        make_avatar_release(f / "avatar", RECIPE.avatar.model_copy(update={"code_dim": 16})),
    )[0],
}


@pytest.mark.parametrize("words", list(SLIPS))
def test_a_file_with_right_sums_and_wrong_contents_is_refused(
    words: str, exported: dict[str, Path], elsewhere: Home, lavatar: Lavatar, tmp_path: Path
) -> None:
    folder = opened(exported["pair"], tmp_path / "model")
    SLIPS[words](folder)
    write_model_file(tmp_path / "wrong.tar", "pair", folder)
    open_registry(elsewhere)
    before = everything(elsewhere)
    code, _, err = lavatar("models", "import", tmp_path / "wrong.tar")
    assert code == 1
    assert words in err
    assert str(tmp_path / "wrong.tar") in err
    assert "release-" not in err
    assert everything(elsewhere) == before


def test_a_file_that_claims_to_be_a_stage_of_this_home_is_not_taken_for_it(
    exported: dict[str, Path], elsewhere: Home, lavatar: Lavatar, tmp_path: Path
) -> None:
    """What a submit would train here is not what a file says it is."""
    assert lavatar("subjects", "add", "--synthetic", "1", "ann")[0] == 0
    assert lavatar("subjects", "add", "--synthetic", "2", "bob")[0] == 0
    submit = ("submit", "--avatar", "ann", "--actor", "bob", "--set", "avatar_loss.lambda_vgg=0", "--dry-run", "--json")
    plan = json.loads(lavatar(*submit)[1])
    digests = [json.loads(lavatar("subjects", "show", name, "--json")[1])["digest"] for name in ("ann", "bob")]
    folder = opened(exported["pair"], tmp_path / "model")
    key = next(stage["key"] for stage in plan["stages"] if stage["name"] == "pair:ann<-bob")
    people = {"avatar": {"name": "ann", "digest": digests[0]}, "actor": {"name": "bob", "digest": digests[1]}}
    _other(folder / "about.json", stage=key, tags={"lavatar.stage": key}, **people)
    write_model_file(tmp_path / "claims.tar", "pair", folder)
    assert lavatar("models", "import", tmp_path / "claims.tar")[0] == 0
    again = json.loads(lavatar(*submit)[1])
    assert [(s["key"], s["cached"]) for s in again["stages"]] == [(s["key"], False) for s in plan["stages"]]
    assert again["warm"] is None
    assert connect(elsewhere).get_model_version(PAIR, "1").tags["lavatar.stage"] != key


def test_an_import_that_fails_leaves_nothing_and_the_next_goes_on(
    exported: dict[str, Path], elsewhere: Home, lavatar: Lavatar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow away; then the registry away when the version is there already."""
    open_registry(elsewhere)
    before = everything(elsewhere)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    code, _, err = lavatar("models", "import", exported["pair"])
    assert (code, "does not answer" in err) == (1, True)
    assert everything(elsewhere) == before
    monkeypatch.delenv("MLFLOW_TRACKING_URI")

    def broken(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(modelimport.os, "replace", broken)
        code, _, err = lavatar("models", "import", exported["pair"])
    assert (code, "No space left" in err) == (1, True)
    assert not [path for path in everything(elsewhere) - before if not path.startswith("mlartifacts/")]
    code, out, _ = lavatar("models", "import", exported["pair"], "--json")
    assert (code, json.loads(out)["version"]) == (0, 1)
    assert find_pair(open_registry(elsewhere), elsewhere, "ann", "bob").pair


KILLED = """
import os, signal, sys
from lavatar.platform import cli, modelimport
setattr(modelimport, sys.argv[1], lambda *args: os.kill(os.getpid(), signal.SIGKILL))
cli.main(sys.argv[2:])
"""


SLOWER = [pytest.param(place, marks=pytest.mark.slow) for place in ("add_version", "_store")]


@pytest.mark.parametrize("place", ["_describe", *SLOWER])
def test_an_import_that_is_killed_leaves_what_doctor_and_the_next_one_clear(
    place: str, exported: dict[str, Path], elsewhere: Home, lavatar: Lavatar
) -> None:
    open_registry(elsewhere)
    before = everything(elsewhere)
    command = [sys.executable, "-c", KILLED, place, "models", "import", str(exported["pair"])]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert lavatar("reenact", "--avatar", "ann", "--actor", "bob", "--video", __file__, "-o", "x.mp4")[0] == 2
    assert lavatar("doctor", "--repair")[0] in (0, 1)
    assert lavatar("gc")[0] == 0
    assert not [path for path in everything(elsewhere) - before if not path.startswith("mlartifacts/")]
    code, out, _ = lavatar("models", "import", exported["pair"], "--json")
    assert (code, json.loads(out)["version"]) == (0, 1)
    assert connect(elsewhere).get_model_version(PAIR, "1").description
    assert find_pair(open_registry(elsewhere), elsewhere, "ann", "bob").pair


def test_an_imported_pair_that_is_damaged_or_deleted_is_imported_again(
    exported: dict[str, Path], elsewhere: Home, lavatar: Lavatar
) -> None:
    assert lavatar("models", "import", exported["pair"])[0] == 0
    found = find_pair(open_registry(elsewhere), elsewhere, "ann", "bob")
    assert found.pair
    assert found.job in lavatar("jobs", "list")[1]
    assert "pair:ann<-bob" in lavatar("jobs", "show", found.job)[1]
    (found.pair / "model.safetensors").write_bytes(b"damaged")
    findings = json.loads(lavatar("doctor", "--repair", "--json")[1])["findings"]
    assert [each["mending"].partition("; ")[2][:19] for each in findings] == ["import it again, or"]
    assert lavatar("models", "import", exported["pair"])[0] == 0
    assert find_pair(open_registry(elsewhere), elsewhere, "ann", "bob") == found
    assert lavatar("jobs", "delete", found.job)[0] == 0
    assert lavatar("gc")[0] == 0
    assert not found.pair.exists()
    code, out, _ = lavatar("models", "import", exported["pair"], "--json")
    assert (code, json.loads(out)["version"]) == (0, 1), "MLflow has it still"
    assert find_pair(open_registry(elsewhere), elsewhere, "ann", "bob") == found


def test_where_nodes_share_a_store_the_pair_is_in_it(
    exported: dict[str, Path], elsewhere: Home, lavatar: Lavatar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAVATAR_STORE", f"file://{tmp_path / 'store'}")
    assert lavatar("models", "import", exported["pair"])[0] == 0
    found = find_pair(open_registry(elsewhere), elsewhere, "ann", "bob")
    assert found.pair
    for folder in (found.avatar, found.pair):
        shutil.rmtree(folder.parent)
        elsewhere.fetch(folder)
        assert (folder / "model.safetensors").is_file()


def test_a_file_says_nothing_of_the_machine(studio: Home, exported: dict[str, Path]) -> None:
    for file in exported.values():
        content = file.read_bytes()
        for word in (str(studio.root), str(studio.root.parent), "mlruns", "sqlite", "file://"):
            assert word.encode() not in content, word


def test_what_cannot_be_exported_is_told(
    studio: Home, lavatar: Lavatar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAVATAR_HOME", str(studio.root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    older = Release(
        StageKind.AVATAR, "c" * 64, "lavatar-avatar-old", {"avatar": make_avatar_release(tmp_path / "r")}, 32, FACE
    )
    assert register(studio, Tracker(studio, print), older, None, print) == 1
    shutil.rmtree(tmp_path / "r")
    code, _, err = lavatar("models", "export", "lavatar-avatar-old", "-o", tmp_path / "x.tar")
    assert (code, "by an earlier lavatar" in err) == (1, True)
    for named in ("nobody", f"{PAIR}/7", f"{PAIR}/x", f"{PAIR}@best", "", "a/b/c"):
        code, _, err = lavatar("models", "export", named, "-o", tmp_path / "x.tar")
        told = any(way in err for way in ("lavatar models list", "Its versions are 1", "Write NAME"))
        assert (code, told) == (2, True), (named, err)
    assert lavatar("models", "export", PAIR, "-o", tmp_path)[0] == 2
    assert lavatar("models", "export", PAIR, "-o", tmp_path / "no" / "x.tar")[0] == 1
    weights = next(path for path in studio.mlartifacts.rglob("pair/model.safetensors"))
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + b"!")
    code, _, err = lavatar("models", "export", PAIR, "-o", tmp_path / "x.tar")
    weights.write_bytes(kept)
    assert (code, "the pair's weights do not have their checksum" in err) == (1, True)
    assert list(tmp_path.iterdir()) == []
