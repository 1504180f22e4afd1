"""What a registered model is, in words: the description of its version, written from what its jobs left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavatar.contracts import EXPRESSIONS, StageKind
from lavatar.inference.tables import Table, tables
from lavatar.platform.lineage import Lineage
from lavatar.platform.planning import Person
from lavatar.platform.portraits import TAKES
from lavatar.platform.progress import duration

MOST_CHARACTERS = 5000  # of a description in MLflow
WEAK_R = 0.5
STILL = 0.5
"""Below this correlation or amplitude an expression is said to follow weakly."""
_TAKES = f"It takes {TAKES}."
_SHOWN = {StageKind.AVATAR: ("self", "mean_frame", "nearest_frame"), StageKind.PAIR: ("cross",)}


def card(
    lineage: Lineage, datasets: Mapping[str, Mapping[str, Any]], seconds: float, metrics: Mapping[str, Any] | None
) -> str:
    """In Markdown. `datasets` are the summaries of manifests by key, `seconds` what the training took, `metrics` the
    preview's, None before it is done."""
    own = {name: metrics[name] for name in _SHOWN[lineage.kind] if metrics.get(name)} if metrics else {}
    sections = (
        _title(lineage),
        "## Trained on\n" + "\n".join(_trained_on(lineage, datasets, seconds)),
        "## How good\n" + _how_good(lineage, own),
        "## Limits\n" + "\n".join(f"- {text}" for text in _limits(lineage, datasets, own)),
        "## Consent\n" + _consent(lineage.people),
    )
    return "\n\n".join(sections)[:MOST_CHARACTERS]


def _title(lineage: Lineage) -> str:
    avatar, size = lineage.people[0].name, lineage.recipe.avatar.image_size
    if lineage.kind is StageKind.AVATAR:
        what = f"A head avatar of {avatar}: pictures of {avatar} in, portraits of {size}×{size} pixels out."
        return f"# {avatar}\n{what} {_TAKES}"
    actor = lineage.people[1].name
    what = f"Pictures of {actor} in, portraits of {avatar} with the same expression out, {size}×{size} pixels."
    more = " Its network was trained for several avatars and actors at once." if lineage.shared else ""
    begun = f" The training began at the pair {lineage.begins_at}." if lineage.begins_at else ""
    return f"# {avatar} driven by {actor}\n{what} {_TAKES}{more}{begun}"


def _trained_on(lineage: Lineage, datasets: Mapping[str, Mapping[str, Any]], seconds: float) -> list[str]:
    lines = []
    for person, key in zip(lineage.people, lineage.datasets, strict=True):
        known = datasets.get(key, {})
        frames = f"{known['train']} frames, {known['eval']} more held out" if "train" in known else "frames not counted"
        dropped = f", {known['dropped']} dropped" if known.get("dropped") else ""
        drawn = "synthetic subject" if person.synthetic else "video"
        lines.append(f"- {person.name} ({drawn}): {frames}{dropped}; dataset {key[:12]}")
    recipe = lineage.recipe.warm() if lineage.begins_at else lineage.recipe
    steps = f"{recipe.avatar_training.steps} steps"
    if lineage.kind is StageKind.PAIR:
        steps = f"{recipe.ynet_training.steps} steps of the Y-network, {recipe.mapping_training.steps} of the mapping"
    return [*lines, f"- recipe {recipe.name}: {steps}, {duration(seconds)}; job {lineage.job}"]


def _how_good(lineage: Lineage, own: Mapping[str, Any]) -> str:
    if not own:
        return "Not measured yet: its preview has not finished."
    whose = lineage.people[-1].name
    frames = own[_SHOWN[lineage.kind][0]].get("frames")
    shown = [table for table in tables(own) if table.title in ("picture", "expression")]
    counted = f"On {frames} held-out frames of {whose}." if frames else f"On the held-out frames of {whose}."
    return "\n\n".join([counted, *(f"{_markdown(table)}\n\n{table.legend}" for table in shown)])


def _markdown(table: Table) -> str:
    rows = (table.header, tuple("---" for _ in table.header), *table.rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _limits(lineage: Lineage, datasets: Mapping[str, Mapping[str, Any]], own: Mapping[str, Any]) -> list[str]:
    """What the figures and the data say against it."""
    found = own.get(_SHOWN[lineage.kind][0]) or {}
    measured = found.get("expression") or {}
    texts = ["It shows what the training video shows: its hair, light and clothes, and expressions that occur there."]
    weak = [name for name in EXPRESSIONS if _weak(measured.get(name) or {})]
    if weak:
        texts.append(f"Expressions that it follows weakly: {', '.join(weak)}.")
    still = [name for name in EXPRESSIONS if name in measured and measured[name].get("r") is None]
    if still:
        texts.append(f"Expressions that could not be measured on these frames: {', '.join(still)}.")
    nearest, psnr = (own.get("nearest_frame") or {}).get("psnr"), found.get("psnr")
    if nearest and psnr and nearest > psnr:
        texts.append(f"The nearest training frame is nearer to the truth ({nearest:.1f} dB) than it ({psnr:.1f} dB).")
    if found.get("no_face"):
        texts.append(f"In {found['no_face']} of {found.get('frames')} results no face was found.")
    errors = [(person.name, (datasets.get(key) or {}).get("reprojection_px"))
              for person, key in zip(lineage.people, lineage.datasets, strict=True)]  # fmt: skip
    texts += [f"The head pose of {name} was known to {error:.1f} pixels." for name, error in errors if error]
    return texts


def _weak(figures: Mapping[str, Any]) -> bool:
    r, amplitude = figures.get("r"), figures.get("amplitude")
    return r is not None and (r < WEAK_R or (amplitude is not None and amplitude < STILL))


def _consent(people: tuple[Person, ...]) -> str:
    real = [person.name for person in people if not person.synthetic]
    if not real:
        return "Everybody here is drawn: no real person is shown."
    return (
        f"It was made of videos of {' and '.join(real)}. Use it only as they agreed to, and say of every video that is "
        "made with it that it was made this way. lavatar does not record what was agreed."
    )
