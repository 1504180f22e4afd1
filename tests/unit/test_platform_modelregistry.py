"""Names in MLflow's model registry, the real one: two pairs whose names run together stay apart."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from lavatar.contracts import StageKind
from lavatar.platform.home import Home
from lavatar.platform.modelregistry import CHAMPION, Release, pair_model_name, register
from lavatar.platform.tracking import Tracker

sys.path.insert(0, str(Path(__file__).parent))
from inference_files import FACE, RECIPE, make_avatar_release, make_pair_release


def test_a_pair_of_the_same_letters_does_not_take_the_champion(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.pyfunc

    folders = {"avatar": make_avatar_release(tmp_path / "a"), "pair": make_pair_release(tmp_path / "p")}
    said: list[str] = []
    place = Home(home).ensure()
    tracker = Tracker(place, said.append)
    run: str | None = None  # the stage's could not be opened: the model is kept in the home all the same

    def submit(avatar: str, actor: str, key: str) -> int | None:
        name, size = pair_model_name(avatar, actor), RECIPE.avatar.image_size
        release = Release(StageKind.PAIR, key * 64, name, folders, size, FACE, pair=(avatar, actor))
        return register(place, tracker, release, run, said.append)

    name = "lavatar-pair-a-b-c"
    assert submit("a-b", "c", "1") == 1
    assert said == []
    assert submit("a", "b-c", "2") is None
    (text,) = said
    assert f"{name} is already the model of avatar 'a-b' driven by 'c'" in text
    assert "avatar 'a' driven by 'b-c' is not registered" in text
    assert submit("a-b", "c", "3") == 2  # its own pair goes on
    newest = tracker.client.get_model_version_by_alias(name, "latest")
    assert (int(newest.version), newest.tags["lavatar.stage"]) == (2, "3" * 64)
    assert CHAMPION not in tracker.client.get_registered_model(name).aliases, "nobody has measured it"
    assert len(tracker.client.search_model_versions(f"name='{name}'")) == 2
    tracker.client.delete_registered_model_tag(name, "lavatar.avatar")
    tracker.client.delete_registered_model_tag(name, "lavatar.actor")
    assert submit("a", "b-c", "2") == 3  # of a lavatar that did not tag: nobody knows whose it was
    assert tracker.client.get_registered_model(name).tags == {"lavatar.avatar": "a", "lavatar.actor": "b-c"}
    assert {p.name for p in place.mlartifacts.rglob("*.safetensors")} == {"model.safetensors"}
    faces = np.full((2, FACE, FACE, 3), 128, np.uint8)
    assert len(mlflow.pyfunc.load_model(f"models:/{name}@latest").predict(faces)) == 2


def test_ordinary_names_have_the_documented_form() -> None:
    assert pair_model_name("anna", "boris") == "lavatar-pair-anna-boris"
