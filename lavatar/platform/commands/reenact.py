"""lavatar reenact: drive an avatar by any video of its actor."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from lavatar.errors import UsageError
from lavatar.platform.commands.options import json_option
from lavatar.platform.home import Home, working_in
from lavatar.platform.output import answer, answer_json, reserved


@click.command()
@click.option("--avatar", required=True, metavar="NAME", help="The person to be animated.")
@click.option("--actor", required=True, metavar="NAME", help="The person in the video.")
@click.option("--video", required=True, type=click.Path(path_type=Path), help="What the actor does.")
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="The mp4 to write.")
@json_option
def reenact(avatar: str, actor: str, video: Path, out: Path, as_json: bool) -> None:
    """Drive an avatar by any video of its actor.

    Uses the newest finished model of the pair (lavatar submit makes it). The video's sound is kept.
    """
    from lavatar.platform.finished import find_pair
    from lavatar.platform.progress import DisplaySink, open_display
    from lavatar.platform.registry import open_registry
    from lavatar.platform.subjects import require_file

    require_file(video)
    if out.suffix.lower() != ".mp4":
        raise UsageError(f"the output {out} is no .mp4", f"Write: -o {out.with_suffix('.mp4')}")
    if out.exists() and out.samefile(video):
        raise UsageError(f"{out} is the driving video itself", "Choose another output file.")
    home = Home.from_environment()
    registry = open_registry(home)
    found = find_pair(registry, home, avatar, actor)
    assert found.pair is not None
    with reserved(), working_in(home):
        home.fetch(found.avatar, found.pair)
        from lavatar.inference.loading import best_device, load_avatar, load_pair
        from lavatar.inference.reenact import reenact_video

        display = open_display()
        try:
            written = reenact_video(
                load_avatar(found.avatar, device := best_device()),
                load_pair(found.pair, device),
                video,
                out.absolute(),
                found.recipe.preprocess.model_copy(update={"max_frames": 0}),  # however few the pair was trained on
                found.recipe.evaluation,
                events=DisplaySink(display),
            )
        finally:
            display.close()
        if as_json:
            answer_json({"job": found.job, "video": str(written.path), **asdict(written), "path": str(written.path)})
        else:
            sound = "with sound" if written.has_audio else "no sound"
            answer(
                f"{out}: {written.frames} frames, {written.width}×{written.height}, {written.duration:.1f} s, {sound}"
            )
