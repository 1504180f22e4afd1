"""lavatar reenact: drive an avatar by any video of its actor."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from lavatar.errors import UsageError
from lavatar.platform.commands.options import choice_options, json_option
from lavatar.platform.home import Home, working_in
from lavatar.platform.output import answer, answer_json, note, reserved


@click.command()
@click.option("--avatar", required=True, metavar="NAME", help="The person to be animated.")
@click.option("--actor", required=True, metavar="NAME", help="The person in the video.")
@click.option("--video", required=True, type=click.Path(path_type=Path), help="What the actor does.")
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="The mp4 to write.")
@choice_options
@json_option
def reenact(
    avatar: str, actor: str, video: Path, out: Path, version: str | None, job: str | None, as_json: bool
) -> None:
    """Drive an avatar by any video of its actor.

    Uses the champion of the pair's registered models (lavatar submit makes them), the newest where there is none. The
    video's sound is kept.
    """
    from lavatar.platform.choosing import Choice, Chooser
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
    chosen = Chooser(registry, home, avatar, actor, note).choose(Choice(version, job))
    found = chosen.found
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
            known = {"job": found.job, "model": chosen.model, "video": str(written.path)}
            answer_json({**known, **asdict(written), "path": str(written.path)})
        else:
            sound = "with sound" if written.has_audio else "no sound"
            size = f"{written.frames} frames, {written.width}×{written.height}, {written.duration:.1f} s, {sound}"
            answer(f"{out}: {size}\nby {chosen.text}")
