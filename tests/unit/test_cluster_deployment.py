"""The files of deploy/: each against its schema, and against what it must agree on with the code and the others."""

from __future__ import annotations

import configparser
import copy
import os
import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml

from lavatar.cluster.deployment import FOLDER, KINDS
from lavatar.platform.doctor import LIBRARIES

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = yaml.safe_load((Path(__file__).parent / "kubernetes_schema.yaml").read_text())
CLOUDS = ("aws", "gcp")
MANIFESTS = sorted(FOLDER.glob("kuberay/*.yaml"))
FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def of_kind(kind: str) -> Any:
    (found,) = (one for path in MANIFESTS for one in documents(path) if one["kind"] == kind)
    return found


def pods() -> Iterator[tuple[str, Any]]:
    """Every pod that the manifests make: its owner's kind, and its specification."""
    for kind in ("RayCluster", "RayJob"):
        spec = of_kind(kind)["spec"]
        spec = spec.get("rayClusterSpec", spec)
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            yield kind, group["template"]
    for kind in ("StatefulSet", "Deployment"):
        yield kind, of_kind(kind)["spec"]["template"]


def pinned(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return str(version)


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def options_of_ray_start() -> set[str]:
    from ray.scripts.scripts import start

    assert isinstance(start, click.Command)
    return {name for parameter in start.params for name in parameter.opts}


# -- all of them


def test_every_file_belongs_to_a_kind_and_to_the_package() -> None:
    assert {str(path.relative_to(FOLDER)) for path in FILES} == {name for names in KINDS.values() for name in names}
    globs = setup()["options.package_data"]["lavatar"].split()
    assert all(any(fnmatch(f"cluster/deploy/{name}", glob) for glob in globs) for name in sum(KINDS.values(), ()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_secret_stands_in_a_file(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"[0-9a-f]{32}|://[^/\s:]+:[^/\s@]+@|AKIA|BEGIN [A-Z ]*PRIVATE KEY", text)
    assert not re.search(r"\b(RAY_AUTH_TOKEN|\w*PASSWORD|\w*ACCESS_KEY)\s*[:=]\s*\S", text)


def test_the_files_are_written_out_and_never_over_others(lavatar: Any, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    code, text, _ = lavatar("cluster", "files", "-o", out)
    assert code == 0
    assert sorted(text.split()) == sorted(str(out / path.relative_to(FOLDER)) for path in FILES)
    assert all((out / path.relative_to(FOLDER)).read_bytes() == path.read_bytes() for path in FILES)
    (out / "slurm.sh").write_text("edited")
    code, _, err = lavatar("cluster", "files", "slurm", "-o", out)
    assert code == 2
    assert f"{out / 'slurm.sh'}, {out / 'cluster.env'} exists already" in err
    assert (out / "slurm.sh").read_text() == "edited"
    lavatar("cluster", "files", "slurm", "aws", "-o", tmp_path / "some")
    assert {path.name for path in (tmp_path / "some").iterdir()} == {"slurm.sh", "aws.yaml", "cluster.env"}
    assert lavatar("cluster", "files", "azure", "-o", out)[0] == 2
    (tmp_path / "file").touch()
    assert lavatar("cluster", "files", "docker", "-o", tmp_path / "file" / "below")[0] == 1


def test_the_image_is_that_of_this_version_everywhere() -> None:
    image = f"REGISTRY/lavatar:{setup()['metadata']['version']}"
    named = {found for path in FILES for found in re.findall(r"\S*lavatar:[\w.]+", path.read_text())}
    assert named == {image}


# -- KubeRay


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_have_known_fields_only(path: Path) -> None:
    for document in documents(path):
        jsonschema.validate(document, SCHEMA)


@pytest.mark.parametrize(
    ("kind", "place", "field"),
    [
        ("RayCluster", ("spec",), "headGroupSpecs"),
        ("RayCluster", ("spec", "authOptions"), "secret"),
        ("RayCluster", ("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0), "volumeMount"),
        ("RayJob", ("spec",), "entryPoint"),
        ("Deployment", ("spec", "template", "spec"), "container"),
    ],
)
def test_a_misspelt_field_is_found(kind: str, place: tuple[str | int, ...], field: str) -> None:
    document = copy.deepcopy(of_kind(kind))
    jsonschema.validate(document, SCHEMA)
    inner = document
    for step in place:
        inner = inner[step]
    inner[field] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


def test_the_job_has_the_same_cluster() -> None:
    assert of_kind("RayJob")["spec"]["rayClusterSpec"] == of_kind("RayCluster")["spec"]


def test_ray_asks_for_the_token_of_a_secret() -> None:
    spec = of_kind("RayCluster")["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "lavatar-ray"}
    assert spec["rayVersion"] == pinned("ray")
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert {f"--{name}" for group in groups for name in group["rayStartParams"]} <= options_of_ray_start()


def test_all_pods_share_disk_registry_and_tracking_and_are_not_root() -> None:
    services = {one["metadata"]["name"] for path in MANIFESTS for one in documents(path) if one["kind"] == "Service"}
    claim = of_kind("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    seen = set()
    for kind, pod in pods():
        (container,) = pod["spec"]["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        claimed = {volume["name"] for volume in pod["spec"]["volumes"]}
        assert mounted <= claimed | {"data"}
        environment = {one["name"]: one.get("value") for one in container["env"]}
        assert not any(value for name, value in environment.items() if "PASSWORD" in name)
        if kind == "StatefulSet":
            continue
        assert pod["spec"]["securityContext"] == {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000}
        assert pod["metadata"]["labels"]["app.kubernetes.io/part-of"] == "lavatar", "the network policy lets it in"
        disk = {"claimName": claim["metadata"]["name"]}
        assert any(volume.get("persistentVolumeClaim") == disk for volume in pod["spec"]["volumes"])
        if kind.startswith("Ray"):
            seen.add(tuple(sorted((name, str(value)) for name, value in environment.items())))
            hosts = re.findall(
                r"[@/]([\w-]+):\d+", f"{environment['LAVATAR_REGISTRY']} {environment['MLFLOW_TRACKING_URI']}"
            )
            assert set(hosts) == services
    assert len(seen) == 1, "head and workers, cluster and job are told the same"


def test_selectors_find_their_pods() -> None:
    for kind in ("StatefulSet", "Deployment"):
        spec = of_kind(kind)["spec"]
        assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    labels = [pod["metadata"]["labels"] for _, pod in pods()]
    for service in (one for path in MANIFESTS for one in documents(path) if one["kind"] == "Service"):
        assert sum(service["spec"]["selector"].items() <= each.items() for each in labels) == 1


# -- Ray's cluster launcher


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_launcher_takes_the_file(cloud: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((FOLDER / f"{cloud}.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    assert config["provider"]["type"] == cloud
    config["available_node_types"]["gpu"]["min_worker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="min_worker"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_nodes_start_with_the_token_and_options_that_ray_has(cloud: str) -> None:
    config = yaml.safe_load((FOLDER / f"{cloud}.yaml").read_text())
    assert config["file_mounts"] == {
        "/home/lavatar/cluster.env": "./cluster.env", "/home/lavatar/.ray/auth_token": "./auth_token",
    }  # fmt: skip
    for role in ("head", "worker"):
        commands = [part.strip() for line in config[f"{role}_start_ray_commands"] for part in line.split(";")]
        (start,) = (part for part in commands if "ray start" in part)
        variables, _, arguments = start.partition("ray start ")
        assert variables.strip() == "RAY_AUTH_MODE=token"
        options = [word.partition("=")[0] for word in shlex.split(arguments)]
        assert set(options) <= options_of_ray_start()
        assert "--head" in options if role == "head" else "--address" in options
    every = [*config["initialization_commands"], *config["setup_commands"], *config["head_setup_commands"]]
    for command in every:
        subprocess.run(["bash", "-n", "-c", command], check=True, capture_output=True)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_shell_on_a_node_knows_what_cluster_env_says(cloud: str, tmp_path: Path) -> None:
    """The setup commands, really run, twice, in a home folder of their own; then a shell like the launcher's."""
    config = yaml.safe_load((FOLDER / f"{cloud}.yaml").read_text())
    shutil.copy(FOLDER / "cluster.env", tmp_path / "cluster.env")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch(mode=0o644)
    commands = [*config["setup_commands"], *config["head_setup_commands"]] * 2
    clean = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}

    def shell(command: str) -> str:
        line = ["bash", "-c", f"source ~/.bashrc; {command}"]
        return subprocess.run(line, env=clean, check=True, capture_output=True, text=True).stdout

    (tmp_path / ".bashrc").touch()
    for command in commands:
        if not command.startswith("pip "):
            shell(command)
    told = dict(line.split("=", 1) for line in shell("env").splitlines() if "=" in line)
    expected = dict(re.findall(r"^([A-Z_]+)=(.*)$", (FOLDER / "cluster.env").read_text(), re.MULTILINE))
    assert expected.items() <= told.items()
    assert (told["RAY_AUTH_MODE"], told["RAY_AUTH_TOKEN_PATH"]) == ("token", f"{tmp_path}/.ray/auth_token")
    assert told["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:8265"
    assert len((tmp_path / ".bashrc").read_text().splitlines()) == 2, "once each"
    for name in ("cluster.env", ".ray/auth_token"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


# -- SLURM


def test_the_script_of_slurm_is_one_of_bash() -> None:
    script = FOLDER / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True, capture_output=True)
    settings = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script.read_text(), re.MULTILINE))
    assert settings["nodes"] == "3"
    assert settings["ntasks-per-node"] == "1"


def test_shellcheck_has_nothing_to_say() -> None:
    tool = shutil.which("shellcheck")
    if tool is None:
        pytest.skip("no shellcheck here: apt-get install shellcheck")
    answer = subprocess.run([tool, str(FOLDER / "slurm.sh")], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout) == (0, "")


# -- the image


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_image_has_what_it_needs_from_what_is_there() -> None:
    found = instructions()
    assert found[0] == ("FROM", "python:3.11-slim-bookworm")
    assert {word for word, _ in found} == {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "CMD"}
    for word, rest in found:
        if word == "COPY":
            *sources, _target = rest.split()
            assert all((ROOT / source).exists() for source in sources)
        if word == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True, capture_output=True)
    runs = [rest for word, rest in found if word == "RUN"]
    assert "pip install --no-cache-dir --constraint constraints.txt ." in runs
    (packages,) = (rest for rest in runs if "apt-get install" in rest)
    assert set(LIBRARIES.values()) | {"rsync", "openssh-client", "wget"} <= set(packages.split())


def test_the_image_runs_as_a_plain_user_that_owns_the_shared_disk() -> None:
    found = instructions()
    words = [word for word, _ in found]
    (made,) = (i for i, (word, rest) in enumerate(found) if word == "RUN" and "useradd" in rest)
    user = words.index("USER")
    assert found[user] == ("USER", "1000")
    assert "--uid 1000" in found[made][1]
    assert made < user
    assert "RUN" not in words[user:], "what is installed is not its own to change"
    (environment,) = (rest for word, rest in found if word == "ENV")
    told = dict(pair.split("=", 1) for pair in environment.split())
    assert told == {"LAVATAR_HOME": "/shared/lavatar", "LAVATAR_WEIGHTS": "/shared/weights", "RAY_AUTH_MODE": "token"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_image_is_built(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker that answers here")
    command = [docker, "build", "--file", str(FOLDER / "Dockerfile"), "--tag", "lavatar-test", str(ROOT)]
    subprocess.run(command, check=True)
    answer = subprocess.run(
        [docker, "run", "--rm", "--env", "LAVATAR_HOME=/tmp/home", "lavatar-test", "lavatar", "doctor", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert '"system libraries"' in answer.stdout
    assert "missing" not in answer.stdout


# -- the guide


def guide() -> list[list[str]]:
    """The commands of lavatar in docs/CLUSTER.md, in words, those inside other commands too."""
    text = (ROOT / "docs" / "CLUSTER.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]*lavatar [^`\n]*)`", text)
    lines = [line.partition("  #")[0] for line in "\n".join(blocks).splitlines()]
    found = [match for line in lines for match in re.findall(r"(?:^|[\s/'])lavatar ([a-z][^|&;'>]*)", line)]
    return [shlex.split(command) for command in found]


def test_every_command_of_the_guide_exists() -> None:
    from lavatar.platform.cli import group

    commands = [words for words in guide() if words[0] in group.list_commands(click.Context(group))]
    assert len(commands) > 30
    assert {"cluster", "submit", "jobs", "subjects", "weights", "doctor"} <= {words[0] for words in commands}
    for words in commands:
        command, context = group.get_command(click.Context(group), words[0]), click.Context(group)
        rest = words[1:]
        while isinstance(command, click.Group) and rest:
            command = command.get_command(context, rest.pop(0))
        assert command is not None, words
        options = {name for parameter in command.params for name in parameter.opts if name.startswith("-")}
        assert {word for word in rest if word.startswith("-")} <= options, words


def test_files_that_the_guide_names_exist() -> None:
    text = (ROOT / "docs" / "CLUSTER.md").read_text()
    for name in re.findall(r"files/([\w/.]+\.(?:yaml|sh|env))", text):
        assert (FOLDER / name).is_file()
    assert f"/{'/'.join(FOLDER.relative_to(ROOT).parts)}/Dockerfile" in f"/{text.partition('docker build -f ')[2]}"
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.+)$", text, re.M)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= anchors
