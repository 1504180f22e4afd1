"""lavatar models: what is registered, how good it is, and which of it is the champion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lavatar.errors import JobError, UsageError
from lavatar.platform.commands.models_export import export, import_
from lavatar.platform.commands.options import json_option
from lavatar.platform.home import Home
from lavatar.platform.output import answer, answer_json, note, table, when

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from lavatar.platform.catalogue import Catalogue, Version

MODEL = "NAME[@ALIAS|/VERSION]"


@click.group()
def models() -> None:
    """The registered models: list, show, compare, promote, rollback, delete, export, import.

    A model is named as in MLflow (lavatar-avatar-anna, lavatar-pair-anna-boris) or by its people (anna,
    'anna<-boris' in quotes); behind it stands @ALIAS or /VERSION. The alias latest is always the newest version,
    champion the best one so far (lavatar submit --promote).
    """


def _open() -> tuple[Home, MlflowClient, Catalogue]:
    from lavatar.platform.catalogue import Catalogue
    from lavatar.platform.tracking import connect

    home = Home.from_environment()
    client = connect(home)
    return home, client, Catalogue(client)


@models.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """All models and their versions, the newest first.

    VALUE is the figure by which a version contends for the champion. A pair's version is stale if the champion of its
    avatar is not the one that it was trained with; lavatar jobs retry --stale brings stale pairs up to date.
    """
    from lavatar.platform.catalogue import to_json

    _, _, catalogue = _open()
    found = catalogue.models.values()
    if as_json:
        shown = [{"name": m.name, "stale": m.stale, "champions": m.champions,
                  "versions": [to_json(version) for version in m.versions]} for m in found]  # fmt: skip
        answer_json({"models": shown})
    elif rows := [_row(version) for model in found for version in model.versions]:
        answer(table(rows, ("MODEL", "VERSION", "ALIASES", "METRIC", "VALUE", "REGISTERED", "")))
        if any(model.stale for model in found):
            note("bring stale pairs up to date with: lavatar jobs retry --stale")
    else:
        note("no models yet: lavatar submit --avatar A --actor B")


def _row(version: Version) -> tuple[str, ...]:
    path, value = version.deciding
    aliases = ", ".join(version.aliases) or "-"
    shown = "-" if value is None else f"{value:g}"
    stale = "stale" if version.stale else ""
    return (version.name, str(version.number), aliases, path or "not measured", shown, when(version.created), stale)


@models.command()
@click.argument("model", metavar=MODEL)
@json_option
def show(model: str, as_json: bool) -> None:
    """One version: its card, lineage, figures, and where its files are. Without a version: the champion."""
    from lavatar.platform.catalogue import to_json

    _, client, catalogue = _open()
    version = catalogue.version(model)
    place = client.get_model_version_download_uri(version.name, str(version.number))
    pairs = [one.uri for one in catalogue.dependents(version)]
    if as_json:
        rest = {"run": version.run_id, "artifacts": place, "pairs": pairs, "card": version.description}
        figures = {"champions": catalogue.model(version.name).champions, "figures": version.figures}
        answer_json({**to_json(version), **rest, **figures, "tags": dict(version.tags)})
        return
    answer(_shown(version, place, pairs))


def _shown(version: Version, place: str, pairs: list[str]) -> str:
    """A version for people."""
    from lavatar.platform.champions import FIGURE_TAG
    from lavatar.platform.lineage import SECTIONS_TAG

    head = f"{version.uri} (aliases: {', '.join(version.aliases) or 'none'})"
    stale = "stale: the champion of its avatar is another one than it was trained with\n" if version.stale else ""
    told = {key: value for key, value in version.tags.items() if not key.startswith((FIGURE_TAG, SECTIONS_TAG))}
    facts = [(key.removeprefix("lavatar."), value) for key, value in sorted(told.items())]
    facts += [("run", version.run_id or "-"), ("files", place), ("registered", when(version.created))]
    facts += [("trained with it", uri) for uri in pairs]
    lineage = "\n".join(f"{name:16} {value}" for name, value in facts)
    return f"{head}\n{stale}\n{version.description or 'It has no card.'}\n\n## Lineage\n{lineage}"


@models.command()
@click.argument("chosen", nargs=-1, required=True, metavar=f"{MODEL} {MODEL}...")
@json_option
def compare(chosen: tuple[str, ...], as_json: bool) -> None:
    """Two or more versions side by side: every figure, and whether they were measured on the same frames."""
    from lavatar.platform.catalogue import to_json
    from lavatar.platform.champions import HELD_OUT_TAG, comparable

    if len(chosen) < 2:
        raise UsageError(
            "there is one version to compare", f"Name two or more: lavatar models compare {chosen[0]} NAME/2"
        )
    _, _, catalogue = _open()
    found = [catalogue.version(reference) for reference in chosen]
    same = all(comparable(found[0].tags, other.tags) for other in found)
    paths = list(dict.fromkeys(path for version in found for path in version.figures))
    if as_json:
        shown = [{**to_json(v), "recipe": v.tags.get("lavatar.recipe"), "figures": v.figures,
                  "held_out": v.tags.get(HELD_OUT_TAG)} for v in found]  # fmt: skip
        answer_json({"same_frames": same, "versions": shown})
        return
    facts = [("aliases", *(", ".join(v.aliases) or "-" for v in found)),
             ("recipe", *(v.tags.get("lavatar.recipe", "-") for v in found)),
             ("registered", *(when(v.created) for v in found))]  # fmt: skip
    figures = [(path, *(f"{v.figures[path]:g}" if path in v.figures else "-" for v in found)) for path in paths]
    answer(table([*facts, *figures], ("", *(f"{v.name}/{v.number}" for v in found))))
    if not same:
        note("they were not all measured on the same held-out frames: their figures do not compare")


@models.command()
@click.argument("model", metavar="NAME/VERSION")
@click.option("--alias", default="champion", show_default=True, help="Which alias the version gets.")
@json_option
def promote(model: str, alias: str, as_json: bool) -> None:
    """Make a version the champion of its model, or give it another alias."""
    from mlflow.exceptions import MlflowException

    from lavatar.platform.catalogue import parts
    from lavatar.platform.champions import crown
    from lavatar.platform.modelregistry import CHAMPION

    if parts(model)[1:] == (None, None):
        raise UsageError(f"{model!r} says no version", f"Write {model}/VERSION, as lavatar models list shows them.")
    home, client, catalogue = _open()
    version = catalogue.version(model)
    held = catalogue.model(version.name).under(alias)
    before = held.number if held else None
    if alias == CHAMPION:
        before = crown(home, client, version.name, version.number)
    else:
        try:
            client.set_registered_model_alias(version.name, alias, str(version.number))
        except MlflowException as error:
            raise UsageError(f"MLflow takes no alias {alias!r}: {error.message}", "Choose another name.") from None
    if as_json:
        answer_json({"name": version.name, "alias": alias, "version": version.number, "before": before})
        return
    was = "" if before in (None, version.number) else f"; it was version {before}"
    answer(f"{version.name} version {version.number} is {alias} now{was}")


@models.command()
@click.argument("model", metavar="NAME")
@json_option
def rollback(model: str, as_json: bool) -> None:
    """Make the champion before this one the champion again. Each call goes back one more."""
    from lavatar.platform.catalogue import parts
    from lavatar.platform.champions import roll_back

    if parts(model)[1:] != (None, None):
        raise UsageError(
            f"{model!r} says a version", "Name the model alone; for a certain version: lavatar models promote"
        )
    home, client, catalogue = _open()
    name = catalogue.model(model).name
    before, now = roll_back(home, client, name)
    if as_json:
        answer_json({"name": name, "version": now, "before": before})
        return
    answer(f"{name} version {now} is champion again" + (f"; it was version {before}" if before else ""))


@models.command()
@click.argument("model", metavar="NAME/VERSION")
@click.option("--force", is_flag=True, help="Also a champion; the model then has none.")
@json_option
def delete(model: str, force: bool, as_json: bool) -> None:
    """Take a version out of the model registry. What depends on it is told, and stays usable.

    Its files stay with its run until `lavatar gc` frees what no job needs; submitting its job again registers it anew.
    """
    from lavatar.platform.catalogue import parts
    from lavatar.platform.ledger import forget_model
    from lavatar.platform.modelregistry import CHAMPION
    from lavatar.platform.registry import open_registry

    if parts(model)[2] is None:
        raise UsageError(f"{model!r} says no version", f"Write {parts(model)[0]}/VERSION: what is deleted is named.")
    home, client, catalogue = _open()
    version = catalogue.version(model)
    if CHAMPION in version.aliases and not force:
        ways = f"lavatar models rollback {version.name}, lavatar models promote {version.name}/VERSION, or --force"
        raise JobError(f"{version.name} version {version.number} is the champion", f"Make another one it first: {ways}")
    pairs, registry = [one.uri for one in catalogue.dependents(version)], open_registry(home)
    client.delete_model_version(version.name, str(version.number))
    forget_model(registry, version.name, version.number, home.tracking_uri)
    if as_json:
        answer_json(_deleted(version, pairs))
        return
    answer(f"deleted {version.name} version {version.number}")
    if pairs:
        note(f"trained with it, and still whole, for a pair holds its avatar: {', '.join(pairs)}")
    if CHAMPION in version.aliases:
        note(f"{version.name} has no champion now: lavatar models rollback {version.name}")


def _deleted(version: Version, pairs: list[str]) -> dict[str, Any]:
    return {"deleted": version.uri, "aliases": list(version.aliases), "pairs": pairs}


models.add_command(export)
models.add_command(import_)
