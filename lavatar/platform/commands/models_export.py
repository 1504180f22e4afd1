"""lavatar models export and import: a registered model in one file, to another installation and back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from lavatar.platform.commands.options import json_option
from lavatar.platform.home import Home, size_text, working_in
from lavatar.platform.output import answer, answer_json, reserved


@click.command()
@click.argument("model", metavar="NAME[@ALIAS|/VERSION]")
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="The file to write.")
@json_option
def export(model: str, out: Path, as_json: bool) -> None:
    """Write a registered model to one file: weights, recipe, lineage, card, checksums. Without a version: the champion.

    A pair's file holds its avatar too, so `lavatar models import` makes it reenact elsewhere. No frame is in it, but
    what an avatar's weights show is that person: give it to those alone who may have it.
    """
    from lavatar.platform.modelexport import export_model

    home = Home.from_environment().ensure()
    with reserved(), working_in(home):
        done = export_model(home, model, out)
        if as_json:
            answer_json({**asdict(done), "file": str(done.file)})
        else:
            answer(f"{out}: {done.model} version {done.version}, {size_text(done.bytes)}\nSHA-256 {done.sha256}")


@click.command(name="import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--as", "renamed", metavar="NAME", help="Other names than those in it; of a pair AVATAR:ACTOR.")
@json_option
def import_(file: Path, renamed: str | None, as_json: bool) -> None:
    """Register a model that was exported elsewhere, so that reenact and MLflow use it here. Needs no network.

    A file that is damaged, or was changed without its checksums, is refused. Checksums do not say who made a file:
    take it from somebody you trust, and compare the SHA-256 that export printed.
    """
    from lavatar.platform.modelimport import import_model
    from lavatar.platform.registry import open_registry

    home = Home.from_environment()
    registry = open_registry(home.ensure())
    with reserved(), working_in(home):
        done = import_model(home, registry, file, renamed)
        if as_json:
            answer_json(asdict(done))
            return
        how = "is" if done.new else "is already"
        answer(f"{file} {how} {done.model} version {done.version}\nSHA-256 {done.sha256}")
        if done.actor:
            which = f" --version {done.version}" if done.version > 1 else ""  # the first became the champion
            people = f"--avatar {done.avatar} --actor {done.actor}{which}"
            answer(f"use it: lavatar reenact {people} --video VIDEO -o OUT.mp4")
        else:
            answer(f'use it: mlflow.pyfunc.load_model("models:/{done.model}/{done.version}")')
