"""What `lavatar benchmark method` measured, as Markdown tables and a contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from lavatar.inference.tables import mean_of

Result = dict[str, Any]
SHEET_FRAMES, SHEET_SIDE = 6, 128

PAPER = (
    ("LatentAvatar, paper's figure", 27.61, 0.919, 0.048),
    ("Coeff+Tri-plane, paper's figure", 27.00, 0.917, 0.049),
    ("NeRFace, paper's figure", 25.64, 0.903, 0.135),
    ("IMavatar, paper's figure (needs FLAME, which may not be redistributed)", 21.79, 0.871, 0.209),
)
"""
Table 1 of the paper as read second-hand, unverified: mean over six avatars of other footage at 512², 200,000 steps;
only for orientation.
"""

COLUMNS: tuple[tuple[str, Callable[[Result], float | None], int], ...] = (
    ("steps", lambda r: _steps(r, "avatar"), 0),
    ("ms a step", lambda r: _milliseconds(r), 0),
    ("MSE ×10³", lambda r: 1000 * r["metrics"]["self"]["mse"], 2),
    ("PSNR", lambda r: r["metrics"]["self"]["psnr"], 2),
    ("SSIM", lambda r: r["metrics"]["self"]["ssim"], 3),
    ("LPIPS", lambda r: r["metrics"]["self"]["lpips"], 3),
    ("face PSNR", lambda r: r["metrics"]["self"]["face"]["psnr"], 2),
    ("r", lambda r: mean_of(r["metrics"]["self"]["expression"], "r"), 2),
    ("error", lambda r: mean_of(r["metrics"]["self"]["expression"], "error"), 2),
    ("Y steps", lambda r: _steps(r, "ynet"), 0),
    ("cross r", lambda r: mean_of(r["metrics"]["cross"]["expression"], "r"), 2),
    ("cross PSNR", lambda r: r["metrics"]["cross"].get("truth", {}).get("psnr"), 2),
    ("cross error", lambda r: mean_of(r["metrics"]["cross"].get("truth", {}).get("expression", {}), "error"), 2),
)
BASELINES = ("mean_frame", "nearest_frame")


def _phase(result: Result, phase: str) -> dict[str, Any]:
    stage = "avatar" if phase == "avatar" else "pair"
    figures: dict[str, Any] = result["training"].get(stage, {}).get(phase, {})
    return figures


def _steps(result: Result, phase: str) -> float | None:
    return _phase(result, phase).get("steps")


def _milliseconds(result: Result) -> float | None:
    figures = _phase(result, "avatar")
    done = figures.get("steps", 0) - figures.get("first_step", 0)
    return 1000 * figures["seconds"] / done if done else None


def tables(results: Sequence[Result]) -> str:
    """One table for each pair and budget, a row a method (mean ± deviation over seeds), baselines, the paper's own."""
    parts = []
    for pair in dict.fromkeys((r["avatar"], r["actor"], _budget(r)) for r in results):
        chosen = [r for r in results if (r["avatar"], r["actor"], _budget(r)) == pair]
        seeds = len({r["seed"] for r in chosen})
        lines = [f"**{pair[0]} ← {pair[1]}**, {pair[2]}, {seeds} seed{'s' if seeds > 1 else ''}", ""]
        lines += [_line(["method", *(name for name, _, _ in COLUMNS)]), _line(["---"] * (1 + len(COLUMNS)))]
        for method in dict.fromkeys(r["method"] for r in chosen):
            rows = [r for r in chosen if r["method"] == method]
            lines.append(_line([method, *(_cell([get(r) for r in rows], digits) for _, get, digits in COLUMNS)]))
        lines += [_trivial(chosen[0], name) for name in BASELINES]
        parts.append("\n".join(lines))
    own = [_line([name, f"{p:.2f}", f"{s:.3f}", f"{q:.3f}"]) for name, p, s, q in PAPER]
    head = [
        _line(["Table 1 of the paper (read second-hand; other footage, 512²)", "PSNR", "SSIM", "LPIPS"]),
        _line(["---"] * 4),
    ]
    return "\n\n".join([*parts, "\n".join(head + own)])


def _budget(result: Result) -> str:
    b = result["budget"]
    unit = "steps" if b["kind"] == "steps" else "minutes"
    return (
        f"equal {'steps' if unit == 'steps' else 'time'}: {b['avatar']:g} {unit} an avatar, {b['pair']:g} a Y-network"
    )


def _trivial(result: Result, name: str) -> str:
    """The mean or the nearest frame, in the columns that it has."""
    figures = result["metrics"][name]
    cells = {"PSNR": f"{figures['psnr']:.2f}", "SSIM": f"{figures['ssim']:.3f}"}
    cells["LPIPS"] = "–" if figures["lpips"] is None else f"{figures['lpips']:.3f}"
    cells["MSE ×10³"] = f"{1000 * figures['mse']:.2f}"
    cells["face PSNR"] = f"{figures['face']['psnr']:.2f}"
    if name == "nearest_frame":
        cells |= {of: _cell([mean_of(figures["expression"], of)], 2) for of in ("r", "error")}
    return _line([name.replace("_", " "), *(cells.get(column, "–") for column, _, _ in COLUMNS)])


def _cell(values: Sequence[float | None], digits: int) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    text = f"{mean(known):.{digits}f}"
    return f"{text} ± {pstdev(known):.{digits}f}" if len(known) > 1 and digits else text


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def contact_sheet(home: Path, results: Sequence[Result]) -> Any:
    """Truth above each method's self reenactment of the same held-out frames, of the first pair and seed. uint8 HWC."""
    import numpy as np

    from lavatar.datasets.loader import FrameStore
    from lavatar.inference.loading import load_avatar
    from lavatar.inference.panels import choose_frames, sheet
    from lavatar.inference.reenact import reenact_self

    first = results[0]
    same = [
        r for r in results if (r["avatar"], r["seed"], r["budget"]) == (first["avatar"], first["seed"], first["budget"])
    ]
    rows: list[list[Any]] = []
    labels: list[str] = []
    for result in {r["method"]: r for r in same}.values():
        avatar = load_avatar(home / result["release"])
        store = FrameStore(home / result["dataset"], avatar.config.image_size, "eval", 64)
        measures = {
            n: v for n, v in store.expression.items() if n in ("jaw", "blink", "smile", "pucker", "brows", "gaze")
        }
        chosen = np.array(choose_frames(measures, SHEET_FRAMES))
        if not rows:
            rows.append([store.frame(int(i)).image for i in chosen])
            labels.append("truth")
        rows.append([image for batch in reenact_self(avatar, store, chosen, 8) for image in batch.images_BHW3])
        labels.append(result["method"])
        store.close()
    return sheet(rows, labels, SHEET_SIDE)
