"""Names, YAML, settings, addresses, releases, checkpoints and results from anywhere: used, or a LavatarError."""

from __future__ import annotations

import copy
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lavatar.cluster.results import read_result, whole, write_result
from lavatar.configs.avatar import AvatarConfig
from lavatar.configs.recipe import Recipe, all_keys, load_recipe
from lavatar.configs.yamltext import read_yaml
from lavatar.contracts import StageKind, StageResult, StageSpec
from lavatar.datasets import weights
from lavatar.errors import CheckpointError, ConfigError, DataError, NameError_, UnknownSubjectError, WeightsError
from lavatar.inference.loading import load_avatar, load_pair
from lavatar.models.avatar import LatentAvatar
from lavatar.models.budget import SLACK, Budget, TooLargeError
from lavatar.platform.commands.submit import read_pairs
from lavatar.platform.finished import recipe_of
from lavatar.platform.home import Home
from lavatar.platform.output import printable
from lavatar.platform.registry import Registry, open_registry, schema_revision
from lavatar.platform.sink import _read_steps, _write_steps
from lavatar.platform.subjects import (
    add_subject,
    check_name,
    describe_synthetic,
    find_subject,
    list_subjects,
    resolve,
    suggest,
)
from lavatar.platform.tables import Job
from lavatar.training import checkpoint
from lavatar.training.release import read_frozen_avatar, read_warm_pair

sys.path.insert(0, str(Path(__file__).parent))
from inference_files import RECIPE, make_avatar_release, make_pair_release
from outside import JSON, TEXTS, changed, damaged, only_our_errors

ANY_TEXT = TEXTS | st.text()
KEYS = sorted(all_keys())


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    registry = open_registry(Home(tmp_path_factory.mktemp("names") / "home"))
    add_subject(registry, describe_synthetic("ann", 1))
    return registry


@given(ANY_TEXT)
def test_a_name_stays_in_its_folder_or_is_refused(text: str) -> None:
    with only_our_errors():
        name = check_name(text)
        folder = Home(Path("/home/x")).evaluation_dir(name, name)
        assert Path(os.path.abspath(folder)).parent == Path("/home/x/outputs/evaluation")
        assert name.isascii()
        assert not {*name} & {*"/\\ '\"`$;&|<>*?~\0\n"}
    assert check_name(suggest(text)) == suggest(text)


@given(ANY_TEXT)
@example("~nobody-of-this-name/x")
@example("x/" + "y" * 5000)
@example("ann' OR '1'='1")
@example("a\0/b.mp4")
def test_any_text_in_place_of_a_name_finds_nobody_else(registry: Registry, text: str) -> None:
    with only_our_errors():
        found = resolve(registry, text)
        assert found.name == text
    found_by_name = find_subject(registry, text)
    assert found_by_name is None or found_by_name.name == text


@pytest.mark.parametrize("name", ["ann'; DROP TABLE subjects; --", "' OR '1'='1", 'ann" --', "%", "_nn"])
def test_a_name_is_never_sql(registry: Registry, name: str) -> None:
    with pytest.raises((UnknownSubjectError, NameError_)):
        resolve(registry, name)
    with pytest.raises(NameError_):
        check_name(name) if name != "_nn" else check_name("'")
    assert [row.name for row in list_subjects(registry)] == ["ann"]


@given(ANY_TEXT | st.text("\x1b[31m\r\x07\x9b\u202eab\n\t\udcff"))
def test_nothing_steers_the_terminal(text: str) -> None:
    shown = printable(text)
    assert not {*shown} & {*map(chr, [*range(9), *range(11, 32), *range(127, 160), 0x202E])}
    shown.encode()
    if text.isprintable():
        assert shown == text


def test_text_that_is_none_is_answered(lavatar: Callable[..., tuple[int, str, str]], home: Path) -> None:
    """An argument or a file's name need not be UTF-8."""
    for name in ("\udcff\x1b[31m", "\udcff/x.mp4"):
        code, out, err = lavatar("subjects", "show", name, "--json")
        assert code == 2
        assert "there is no subject" in json.loads(out)["error"]["message"]
        assert "\x1b" not in err
    code, _, err = lavatar("jobs", "show", "\udcff")
    assert (code, "there is no job" in err) == (2, True)


YAML_TEXT = (
    st.text("-[]{}:,&*!|>'\"#%@`? \n\tabn01.~", max_size=60)
    | JSON.map(lambda value: json.dumps(value))
    | st.lists(st.fixed_dictionaries({"avatar": ANY_TEXT, "actor": ANY_TEXT}), max_size=3).map(json.dumps)
)


@given(YAML_TEXT)
@example("- {avatar: a, actor: b}")
@example("!!python/object/apply:os.system ['touch hacked']")
@example("2001-99-99")
@example("!!int x")
@example("? [a]\n: b")
@example("1" * 5000)
@example("[" * 1000)
@example("- {avatar: a, actor: 2001-13-45}")
def test_any_text_as_pairs_is_pairs_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "pairs.yaml"
    path.write_text(text, errors="surrogatepass")
    with only_our_errors():
        pairs = read_pairs(path)
        assert pairs
        assert all(isinstance(name, str) and name for pair in pairs for name in pair)


def test_yaml_makes_no_objects_and_takes_no_bombs(tmp_path: Path) -> None:
    hacked = tmp_path / "hacked"
    bomb = "a: &a [x, x]\n" + "".join(f"{n}: &{n} [*{p}, *{p}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True))
    for text, reason in (
        (f"!!python/object/apply:os.system ['touch {hacked}']", "python/object"),
        (bomb, "alias"),
        ("[" * 30 + "]" * 30, "deeper than 20"),
        ("x" * 2**21, "longer than"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_yaml(text)
    assert not hacked.exists()


@given(JSON)
def test_what_is_read_is_what_safe_load_reads(value: Any) -> None:
    text = json.dumps(value)
    try:
        wanted = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return
    try:
        found = read_yaml(text)
    except ValueError:  # libyaml takes no half of a character, of which safe_load makes text that is none
        assert re.search(r"\\ud[89a-f]", text)
        return
    assert repr(found) == repr(wanted)


@given(st.sampled_from(KEYS) | ANY_TEXT, YAML_TEXT)
@example("avatar.focal", ".nan")
@example("avatar.focal", ".inf")
@example("avatar.image_size", "1e400")
def test_any_setting_is_taken_or_refused(key: str, text: str) -> None:
    with only_our_errors():
        recipe = load_recipe("tiny", [f"{key}={text}"])
        assert Recipe.model_validate(json.loads(json.dumps(recipe.model_dump(mode="json"), allow_nan=False))) == recipe


@given(data=st.data())
def test_a_recipe_of_another_lavatar_is_read_or_refused(data: st.DataObject) -> None:
    """As the registry keeps it."""

    class Stored:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError("the registry is not asked for more")

    good = load_recipe("tiny").model_dump(mode="json")
    value = data.draw(changed(good).filter(lambda value: isinstance(value, dict)))
    with only_our_errors():
        try:
            assert isinstance(recipe_of(Stored(), Job(id="j", recipe=value)), Recipe)  # type: ignore[arg-type]
        except AssertionError:  # the hint of the refusal would look the pairs up
            return


@pytest.mark.parametrize("key", ["avatar.image_size", "avatar.samples", "avatar.triplane_size", "ynet.code_dim"])
def test_sizes_that_would_fill_any_memory_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        load_recipe("tiny", [f"{key}={2**40}"])


URLS = st.builds("{}://{}{}".format, st.sampled_from(["sqlite", "postgresql", "x", ""]), TEXTS, st.text(max_size=20))


@given((URLS | ANY_TEXT).filter(lambda url: "\0" not in url and url.isprintable()))
@example("postgresql://u:p@h:port/db")
@example("sqlite://host/x")
@example("sqlite:////proc/no/such/folder/x.db")
@example("sqlite:///x?check_same_thread=zzz&uri=true")
def test_any_address_of_a_registry_is_opened_or_refused(tmp_path_factory: pytest.TempPathFactory, url: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "urls"
    folder.mkdir(exist_ok=True)
    if url.startswith("postgresql") and "@" not in url:
        return  # a socket of this machine
    before = os.getcwd()
    os.chdir(folder)  # where a relative SQLite file would be made
    os.environ["LAVATAR_REGISTRY"] = url
    try:
        with only_our_errors():
            schema_revision(Home(folder))
    finally:
        os.chdir(before)
        del os.environ["LAVATAR_REGISTRY"]


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("releases")
    return {"avatar": make_avatar_release(folder / "avatar"), "pair": make_pair_release(folder / "pair")}


@given(data=st.data(), kind=st.sampled_from(["avatar", "pair"]))
def test_a_changed_release_is_loaded_or_refused(releases: dict[str, Path], data: st.DataObject, kind: str) -> None:
    path = releases[kind] / "config.json"
    good = path.read_text()
    path.write_text(json.dumps(data.draw(changed(json.loads(good)))))
    try:
        for read in (load_avatar, load_pair, read_frozen_avatar, read_warm_pair):
            with only_our_errors():
                read(releases[kind])
    finally:
        path.write_text(good)


@given(data=st.data())
def test_damaged_weights_are_loaded_or_refused(releases: dict[str, Path], data: st.DataObject) -> None:
    """With the checksum of the damage in config.json."""
    folder = releases["avatar"]
    config, path = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    good = path.read_bytes()
    head = 8 + int.from_bytes(good[:8], "little")
    content = data.draw(damaged(good[:head])) + good[head:]
    path.write_bytes(content)
    told = {**config, "weights": {"sha256": weights.hashlib.sha256(content).hexdigest()}}
    (folder / "config.json").write_text(json.dumps(told))
    try:
        for read in (load_avatar, read_frozen_avatar):
            with only_our_errors():
                read(folder)
    finally:
        path.write_bytes(good)
        (folder / "config.json").write_text(json.dumps(config))


def test_a_release_that_names_huge_sizes_reserves_nothing(releases: dict[str, Path]) -> None:
    path = releases["avatar"] / "config.json"
    good = json.loads(path.read_text())
    huge = copy.deepcopy(good)
    huge["avatar"] |= {"triplane_size": 4096, "triplane_channels": 4096, "generator": "basis", "basis_count": 4096}
    path.write_text(json.dumps(huge))
    try:
        with pytest.raises(DataError, match="far more numbers than its weights have"):
            load_avatar(releases["avatar"])
        with pytest.raises(CheckpointError, match="far more numbers than its weights have"):
            read_frozen_avatar(releases["avatar"])
    finally:
        path.write_text(json.dumps(good))


def test_a_budget_leaves_honest_modules_alone() -> None:
    module = LatentAvatar(RECIPE.avatar)
    with Budget(module.state_dict()):
        LatentAvatar(RECIPE.avatar)
    with pytest.raises(TooLargeError), Budget({}):
        torch.zeros(2, SLACK)
    for name in ("tiny", "fast", "paper", "official"):
        config: AvatarConfig = load_recipe(name).avatar
        with torch.device("meta"):
            state = LatentAvatar(config).state_dict()
            with Budget(state):
                LatentAvatar(config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    tensors = {"a": torch.ones(2)}
    return checkpoint.save(folder, checkpoint.Checkpoint(3, tensors, tensors, tensors, tensors, {"world": 1}))


@given(data=st.data(), name=st.sampled_from([checkpoint.MARKER, "state.json"]))
def test_a_changed_checkpoint_is_loaded_or_refused(saved: Path, data: st.DataObject, name: str) -> None:
    path = saved / name
    good = path.read_bytes()
    value = data.draw(changed(json.loads(good)))
    path.write_bytes(data.draw(st.just(json.dumps(value).encode()) | damaged(good)))
    try:
        found, bad = checkpoint.latest(saved.parent)
        assert [found, *[one.folder for one in bad]].count(saved) == 1
        with only_our_errors():
            assert checkpoint.load(saved).step >= 0
    finally:
        path.write_bytes(good)


def test_a_checkpoint_is_whole_only_with_all_of_its_own_files(saved: Path, tmp_path: Path) -> None:
    marker = saved / checkpoint.MARKER
    good = marker.read_text()
    secret = tmp_path / "secret"
    secret.write_text("s")
    about = {"bytes": 1, "sha256": weights.hashlib.sha256(b"s").hexdigest()}
    for files in ({}, {str(secret): about}, {f"../{'../' * 20}{secret}": about}):
        marker.write_text(json.dumps({"format": 1, "step": 3, "files": files}))
        assert "is not readable" in str(checkpoint.defect(saved))
    marker.write_text(good)
    assert checkpoint.defect(saved) is None
    (saved / "state.json").rename(tmp_path / "state.json")
    (saved / "state.json").symlink_to(tmp_path / "state.json")
    assert checkpoint.defect(saved) == "state.json is missing"
    (saved / "state.json").unlink()
    (tmp_path / "state.json").rename(saved / "state.json")


def spec_of(folder: Path) -> StageSpec:
    return StageSpec(StageKind.PREVIEW, "preview:a<-b", "k", folder, folder / "outputs" / "k", {}, {})


@given(data=st.data())
def test_a_changed_result_names_only_its_own_files(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    spec = spec_of(tmp_path_factory.getbasetemp() / "results")
    spec.out_dir.mkdir(parents=True, exist_ok=True)
    (spec.out_dir / "page.html").write_text("x")
    write_result(spec, StageResult({"page": spec.out_dir / "page.html"}, {"psnr": 1.0}, ("n",)))
    path = spec.out_dir / "result.json"
    path.write_text(json.dumps(data.draw(changed(json.loads(path.read_text())))))
    found = read_result(spec)
    if found is not None:
        assert all(file.resolve().is_relative_to(spec.out_dir) for file in found.artefacts.values())


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "link"])
def test_a_result_leads_to_no_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    """What a result names is shown, and logged to MLflow."""
    spec = spec_of(tmp_path)
    spec.out_dir.mkdir(parents=True)
    (tmp_path / "secret").write_text("s")
    (spec.out_dir / "link").symlink_to(tmp_path / "secret")
    data = {"key": "k", "artefacts": {"page": name}, "metrics": {}, "notes": []}
    (spec.out_dir / "result.json").write_text(json.dumps(data))
    assert read_result(spec) is None
    (spec.out_dir / "config.json").write_text(json.dumps({"weights": {"file": name, "sha256": "0"}}))
    assert not whole(spec.out_dir)


@pytest.mark.parametrize("remembered", ["../x", "/etc/passwd", "shards/../../x", "a/../../../etc"])
def test_a_path_in_the_registry_that_leaves_the_home_is_refused(tmp_path: Path, remembered: str) -> None:
    from lavatar.errors import StorageError

    with pytest.raises(StorageError, match="outside of the home"):
        Home(tmp_path / "home").absolute(remembered)
    inside = Home(tmp_path / "x" / ".." / "home")
    assert inside.relative(inside.root / "shards" / "k") == "shards/k"


@given(ANY_TEXT | st.text("a=²٣\n1", max_size=12))
@example("a=²")
def test_any_tag_of_a_run_is_read_or_ignored(text: str) -> None:
    """Which pictures an earlier attempt logged, as MLflow says."""
    steps = _read_steps(text)
    assert all(isinstance(step, int) for step in steps.values())
    assert _read_steps(_write_steps(steps)) == steps


@given(data=st.data())
def test_pretrained_weights_are_the_files_of_the_table_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "weights"
    folder.mkdir(exist_ok=True)
    os.environ["LAVATAR_WEIGHTS"], before = str(folder), os.environ.get("LAVATAR_WEIGHTS")
    name = data.draw(st.sampled_from(sorted(weights.WEIGHTS)))
    path = folder / weights.WEIGHTS[name].file
    path.write_bytes(data.draw(st.binary(max_size=100)))
    try:
        with pytest.raises(WeightsError, match="wrong SHA-256"):
            weights.find(name)
    finally:
        path.unlink()
        os.environ.pop("LAVATAR_WEIGHTS")
        if before is not None:
            os.environ["LAVATAR_WEIGHTS"] = before


def test_tensors_of_no_number_and_of_other_shapes_are_refused(releases: dict[str, Path]) -> None:
    folder = releases["avatar"]
    config, path = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    good = path.read_bytes()
    try:
        for poses, reason in (
            ({"rotation": (0, 3, 3), "translation": (0, 3), "scale": (0,)}, "training poses of shapes"),
            ({"rotation": (2, 3, 3), "translation": (5, 3), "scale": (2,)}, "training poses of shapes"),
            ({"rotation": (2, 3, 3), "translation": (2, 3), "scale": (2,)}, "no numbers"),
        ):
            save_file({f"poses.{name}": torch.full(shape, torch.nan) for name, shape in poses.items()}, path)
            told = {**config, "weights": {"sha256": weights.hashlib.sha256(path.read_bytes()).hexdigest()}}
            (folder / "config.json").write_text(json.dumps(told))
            with pytest.raises(DataError, match=reason):
                load_avatar(folder)
    finally:
        path.write_bytes(good)
        (folder / "config.json").write_text(json.dumps(config))
