"""What a job came to: the object that `lavatar submit --json` prints, and its text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavatar.contracts import StageKind
from lavatar.inference.tables import as_text
from lavatar.platform import lookup
from lavatar.platform.home import Home
from lavatar.platform.lookup import StageView
from lavatar.platform.modelregistry import avatar_model_name, pair_model_name
from lavatar.platform.progress import duration
from lavatar.platform.registry import Registry
from lavatar.platform.tables import JobPair, Stage
from lavatar.platform.titles import actor_or_none, title


def report(registry: Registry, home: Home, job_id: str) -> dict[str, Any]:
    """The state of a job, its stages, files, models and metrics, all read from the registry."""
    job = lookup.get_job(registry, job_id)
    views = lookup.job_stages(registry, job.id)
    pairs = lookup.job_pairs(registry, job.id)
    models = lookup.artefacts(registry, [v.stage.key for v in views], "model")
    own = {avatar_model_name(p.avatar) for p in pairs} | {pair_model_name(p.avatar, p.actor) for p in pairs}
    results = pair_results(registry, home, pairs, views)
    only = results[0] if len(results) == 1 else _NOTHING
    return {
        "job": job.id,
        "state": job.state,
        "avatar": job.avatar,
        "actor": actor_or_none(job.actor),
        "recipe": job.recipe_name,
        "priority": job.priority,
        "message": job.message,
        "stages": [
            {
                "name": v.name,
                "key": v.stage.key,
                "state": v.stage.state,
                "cached": v.cached,
                "seconds": round(v.job_seconds, 2),
                "attempts": v.stage.attempts,
                "message": v.stage.message,
                "notes": list(v.stage.notes),
            }
            for v in views
        ],
        "video": only["video"],
        "still": only["still"],
        "self_still": only["self_still"],
        "page": only["page"],
        "metrics_file": only["metrics_file"],
        "models": [{"name": m.name, "version": m.version} for m in models if m.name in own],
        "metrics": only["metrics"],
        **({"pairs": results} if len(results) > 1 else {}),
    }


def pair_results(
    registry: Registry, home: Home, pairs: Sequence[JobPair], views: Sequence[StageView]
) -> list[dict[str, Any]]:
    """Of each pair its names, its files and its figures, as far as they are there."""
    return [{"avatar": p.avatar, "actor": p.actor, **_result(registry, home, p, views)} for p in pairs]


_FILES = ("video", "still", "self_still", "page", "metrics_file")
_NOTHING: dict[str, Any] = {**dict.fromkeys(_FILES), "metrics": {}}


def preview_of(pair: JobPair, views: Sequence[StageView]) -> Stage | None:
    """The last stage of a pair."""
    name = f"{StageKind.PREVIEW.value}:{pair.avatar}<-{pair.actor}"
    return next((v.stage for v in views if v.name == name), None)


def _result(registry: Registry, home: Home, pair: JobPair, views: Sequence[StageView]) -> dict[str, Any]:
    """What the preview of one pair left."""
    preview = preview_of(pair, views)
    if preview is None:
        return _NOTHING
    files = lookup.artefacts(registry, [preview.key], "file")
    paths = {row.name: str(home.absolute(row.path)) for row in files if row.path}
    return {
        "video": _file(paths, "video", ".mp4"),
        "still": _file(paths, "still", ".png"),
        "self_still": paths.get("self_still"),
        "page": _file(paths, "page", ".html"),
        "metrics_file": _file(paths, "metrics", ".json"),
        "metrics": dict(preview.metrics),
    }


def resources_text(resources: Mapping[str, Any]) -> str:
    """'2 × 1 CPU + 0.5 GPU': what the workers of a stage ask for."""
    gpus = resources.get("gpus") or 0
    return f"{resources.get('workers', 1)} × {resources.get('cpus', 1):g} CPU" + (f" + {gpus:g} GPU" if gpus else "")


def _file(paths: Mapping[str, str], name: str, suffix: str) -> str | None:
    """An artefact by its name, else the first of its kind."""
    if name in paths:
        return paths[name]
    return next((p for p in paths.values() if Path(p).suffix == suffix), None)


def _files(result: Mapping[str, Any]) -> list[str]:
    """Where the files of a pair are."""
    named = (("video", "video"), ("still", "still"), ("page", "page"), ("metrics", "metrics_file"))
    return [f"  {name:7} {result[key]}" for name, key in named if result[key]]


def report_text(result: Mapping[str, Any]) -> str:
    """For people: where everything is, and the table of metrics."""
    lines = [f"job {result['job']} {result['state']}: {title(result['avatar'], result['actor'])}"]
    for stage in result["stages"]:
        how = "cached" if stage["cached"] else f"{stage['state']}, {duration(stage['seconds'])}"
        lines.append(f"  {stage['name']}: {how}")
    lines += _files(result)
    lines += [f"  model   models:/{m['name']}/{m['version']}" for m in result["models"]]
    if result["metrics"]:
        lines += ["", as_text(result["metrics"])]
    for pair in result.get("pairs", ()):
        lines += ["", f"{pair['avatar']} driven by {pair['actor']}", *_files(pair)]
        lines += [as_text(pair["metrics"])] if pair["metrics"] else []
    notes = [note for stage in result["stages"] for note in stage["notes"]]
    return "\n".join(lines + [f"note: {note}" for note in notes])
