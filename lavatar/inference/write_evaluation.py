"""What an evaluation leaves for people: its folder, the same from `lavatar evaluate` and from a job's last stage."""

from __future__ import annotations

from pathlib import Path

from lavatar.configs.recipe import Recipe
from lavatar.inference.evaluate import Evaluations
from lavatar.inference.loading import Avatar, Pair
from lavatar.inference.page import Section, write_folder
from lavatar.inference.showcase import cross_frames, self_frames, strip_charts


def write_evaluation(
    folder: Path,
    both: Evaluations,
    avatar: Avatar,
    avatar_dataset: Path,
    recipe: Recipe,
    pair: Pair | None = None,
    actor_dataset: Path | None = None,
) -> dict[str, Path]:
    """metrics.json, table.txt and the page of an evaluation; the files by name."""
    title = avatar.subject if pair is None else f"{avatar.subject} driven by {pair.actor}"
    sections = [
        Section(
            "Self reenactment",
            "The best, median and worst frames by LPIPS, by PSNR where its weights are missing.",
            self_frames(avatar, avatar_dataset, recipe, both.own),
            error=True,
        )
    ]
    if pair is not None and actor_dataset is not None and both.cross is not None:
        synthetic = "truth" in both.cross.metrics["cross"]
        text = "Frames that cover the range of the actor's expression. There is no ground truth."
        if synthetic:
            text = "Against the actor's expression drawn on the avatar, which synthetic pairs alone have."
        shown = cross_frames(avatar, pair, avatar_dataset, actor_dataset, recipe, both.cross)
        sections.append(Section("Cross reenactment", text, shown, error=synthetic))
    return write_folder(folder, title, both.metrics, both.notes, sections, strip_charts(both.own, both.cross))
