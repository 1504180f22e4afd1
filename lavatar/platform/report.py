"""What a job came to: the object that `lavatar submit --json` prints, and its text for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavatar.contracts import StageKind
from lavatar.inference.tables import as_text
from lavatar.platform import ledger
from lavatar.platform.home import Home
from lavatar.platform.progress import duration
from lavatar.platform.registry import Registry


def report(registry: Registry, home: Home, job_id: str) -> dict[str, Any]:
    """The state of a job, its stages, files, models and metrics, all read from the registry."""
    job = ledger.get_job(registry, job_id)
    views = ledger.job_stages(registry, job.id)
    preview = next((v.stage for v in views if v.stage.kind == StageKind.PREVIEW), None)
    files = ledger.artefacts(registry, [preview.key] if preview else [], "file")
    paths = {row.name: str(home.absolute(row.path)) for row in files if row.path}
    models = ledger.artefacts(registry, [v.stage.key for v in views], "model")
    own = (f"lavatar-avatar-{job.avatar}", f"lavatar-pair-{job.avatar}-{job.actor}")
    return {
        "job": job.id,
        "state": job.state,
        "avatar": job.avatar,
        "actor": job.actor,
        "recipe": job.recipe_name,
        "message": job.message,
        "stages": [
            {
                "name": v.name,
                "key": v.stage.key,
                "state": v.stage.state,
                "cached": v.cached,
                "seconds": round(v.job_seconds, 2),
                "message": v.stage.message,
                "notes": list(v.stage.notes),
            }
            for v in views
        ],
        "video": _file(paths, "video", ".mp4"),
        "still": _file(paths, "still", ".png"),
        "page": _file(paths, "page", ".html"),
        "metrics_file": _file(paths, "metrics", ".json"),
        "models": [{"name": m.name, "version": m.version} for m in models if m.name in own],
        "metrics": dict(preview.metrics) if preview else {},
    }


def _file(paths: Mapping[str, str], name: str, suffix: str) -> str | None:
    """An artefact by its name, else the first of its kind."""
    if name in paths:
        return paths[name]
    return next((p for p in paths.values() if Path(p).suffix == suffix), None)


def report_text(result: Mapping[str, Any]) -> str:
    """For people: where everything is, and the table of metrics."""
    lines = [f"job {result['job']} {result['state']}: {result['avatar']} driven by {result['actor']}"]
    for stage in result["stages"]:
        how = "cached" if stage["cached"] else f"{stage['state']}, {duration(stage['seconds'])}"
        lines.append(f"  {stage['name']}: {how}")
    lines += [f"  video   {result['video']}"] if result["video"] else []
    lines += [f"  still   {result['still']}"] if result["still"] else []
    lines += [f"  page    {result['page']}"] if result["page"] else []
    lines += [f"  metrics {result['metrics_file']}"] if result["metrics_file"] else []
    lines += [f"  model   models:/{m['name']}/{m['version']}" for m in result["models"]]
    if result["metrics"]:
        lines += ["", as_text(result["metrics"])]
    notes = [note for stage in result["stages"] for note in stage["notes"]]
    return "\n".join(lines + [f"note: {note}" for note in notes])
