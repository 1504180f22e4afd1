"""The rows of `lavatar bench`, by name: where each is measured, and its line in --help. Imports nothing heavy."""

from __future__ import annotations

ROWS: dict[str, tuple[str, str]] = {
    "train-avatar": ("lavatar.platform.speed.models:train_avatar", "a step of the avatar, recipes official and paper"),
    "train-pair": ("lavatar.platform.speed.models:train_pair", "a step of the Y-network, recipe official"),
    "render": ("lavatar.platform.speed.models:render", "a portrait, alone and of a batch of 8"),
    "reenact": (
        "lavatar.platform.speed.videos:reenact",
        "a frame from video in to mp4 out; reference: the slowest part",
    ),
    "preprocess": (
        "lavatar.platform.speed.videos:preprocess",
        "a frame, by 1, 2 and 4 workers; reference: decoding, tracker and matting alone on as many cores",
    ),
    "loader": ("lavatar.platform.speed.loading:loader", "a sample; reference: what a step of training takes for one"),
    "overhead": ("lavatar.platform.speed.processes:overhead", "all of a submit that is not work; the same a stage"),
    "cli": ("lavatar.platform.speed.processes:cli", "lavatar --help"),
}
