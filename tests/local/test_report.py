"""`lavatar report` and `compare`: what stands in the pages, and what a browser makes of them."""

from __future__ import annotations

import base64
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from browser import Browser, opened
from platform_fakes import FakeHandle, NoTracker, Recorder, finish, make_plan, person
from report_files import STEPS, World
from report_files import world as new_world
from submit_files import Lavatar

from lavatar.configs.sweep import Donor
from lavatar.contracts import StageResult
from lavatar.errors import FaceError, StageFailedError
from lavatar.platform import sweeps
from lavatar.platform.comparison import comparison_page
from lavatar.platform.jobfacts import JobFacts, gather
from lavatar.platform.jobpage import job_page
from lavatar.platform.planning import Plan
from lavatar.platform.preparing import prepare
from lavatar.platform.registry import open_registry
from lavatar.platform.sweep_plot import plot
from lavatar.platform.sweeps import Sweep
from lavatar.platform.trialboard import TrialBoard

WIDTHS = (390, 1280)
READABLE = """(() => {
  const rgb = c => { const [r, g, b, a = 1] = c.match(/[\\d.]+/g).map(Number); return {r, g, b, a}; };
  const part = v => v / 255 <= .03928 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = c => .2126 * part(c.r) + .7152 * part(c.g) + .0722 * part(c.b);
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.a === 1) return light(c); } return 1; };
  let contrast = 99, smallest = 99, where = [], wide = [];
  for (const e of document.body.querySelectorAll('*')) {
    const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join('');
    if (!text || e.closest('script, title') || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), drawn = e.ownerSVGElement;
    const v = light(rgb(drawn ? style.fill : style.color)), b = behind(e);
    const ratio = (Math.max(v, b) + .05) / (Math.min(v, b) + .05);
    if (/^T[HD]$/.test(e.tagName) && e.scrollWidth > e.clientWidth) wide.push(text);
    const size = parseFloat(style.fontSize) * (drawn ? drawn.getScreenCTM().a : 1);
    if (ratio < contrast) { contrast = ratio; where[0] = text; }
    if (size < smallest) { smallest = size; where[1] = text; }
  }
  return [contrast, smallest, where, wide];
})()"""
"""The least contrast of a text to what is behind it (WCAG asks for 4.5 of small text), the height of the smallest text
in pixels, the text of each; and what does not fit into its cell of a table."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with new_world(tmp_path_factory.mktemp("report") / "home") as made:
        yield made


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with opened(tmp_path_factory.mktemp("browser")) as started:
        yield started


def run(*args: Any) -> tuple[int, Any]:
    """A command line with --json in this process."""
    import contextlib
    import io

    from lavatar.platform.cli import run as command

    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr("lavatar.platform.commands.report.reserved", contextlib.nullcontext)
        code = command([*map(str, args), "--json"])
    return code, json.loads(out.getvalue())


def facts(world: World, plan: Plan, detailed: int = 6) -> JobFacts:
    return gather(world.registry, world.home, plan.job_id, detailed)


def test_the_page_of_a_job_has_everything_and_answers_with_its_figures(world: World, tmp_path: Path) -> None:
    target = tmp_path / "new" / "page.html"
    code, answer = run("report", world.plain.job_id[:6], "-o", target)
    text = target.read_text()
    assert (code, answer["page"], answer["bytes"]) == (0, str(target), len(text.encode()))
    assert (answer["state"], answer["videos"], answer["notes"]) == ("finished", 1, [])
    (pair,) = answer["pairs"]
    assert pair["self"] == {
        "psnr": 30.0, "ssim": 0.9, "lpips": None, "expression_r": 0.9, "expression_error": None,
    }  # fmt: skip
    assert re.search(r"<video controls muted loop playsinline [^>]*src=\"data:video/mp4;base64,", text)
    assert "autoplay" not in text
    for heading in ("Videos", "Figures", "Training curves", "Pictures", "Cost", "What went wrong", "Recipe"):
        assert f">{heading}</h2>" in text
    assert text.count("<polyline") >= 8, "three terms and a rate of each training"
    assert "samples_per_second" not in text, "that is no loss"
    assert f"step {STEPS}" in text
    assert [text.count(f"<h4>{kind}</h4>") for kind in ("best", "median", "worst")] == [1, 1, 1]
    assert "PSNR\u00a030.00" in text
    assert "Recipe tiny as it comes, without a change." in text
    assert "a note of the preview" in text
    size = float(re.search(r"One file of ([\d.]+) kB with 1 video", text)[1])  # type: ignore[index]
    assert size == pytest.approx(len(text) / 1000, abs=12)


def test_a_job_that_failed_once_tells_of_it(world: World) -> None:
    found = facts(world, world.changed)
    told = [(t.stage, t.level, t.text) for t in found.troubles]
    assert ("avatar:A", "error", "failed: the face is lost for 3.2 s") in told
    assert ("avatar:A", "retry", "started (attempt 2)") in told
    text, _ = job_page(found)
    assert "failed: the face is lost for 3.2 s" in text
    assert ">cached<" in text
    assert re.search(r"avatar_training.steps</th><td>1500</td><td>7</td>", text), "what differs from the recipe tiny"


def test_of_many_pairs_the_first_have_videos_and_others_their_still(world: World) -> None:
    found = facts(world, world.many, 1)
    text, room = job_page(found)
    assert [(p.avatar, p.actor, p.state) for p in found.pairs] == [
        ("A", "B", "finished"), ("D", "B", "finished"), ("A", "C", "failed"),
    ]  # fmt: skip
    assert (room.videos, text.count("<video")) == (1, 1)
    assert "the video is left out, for it is not among the first pairs" in text
    assert "the disk is full" in text
    assert {phase.stage for phase in found.curves} == {"avatar:A", "pair:A<-B"}
    whole, room = job_page(facts(world, world.many))
    assert room.videos == whole.count("<video") == 2


def test_videos_beyond_what_a_page_holds_give_way_to_their_still(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    size = facts(world, world.plain).pairs[0].files["video"].stat().st_size
    monkeypatch.setattr("lavatar.platform.jobparts.VIDEO_BYTES", size)
    text, room = job_page(facts(world, world.many))
    assert room.videos == 1
    assert "for the videos fill" in text


def test_a_running_job_has_a_page(world: World) -> None:
    plan, seen = make_plan(world.home, "A", "E"), []

    def look(handle: FakeHandle) -> StageResult:
        registry = open_registry(world.home)
        seen.append(job_page(gather(registry, world.home, plan.job_id, 6))[0])
        registry.close()
        return finish(handle)

    world.run(plan, pair=look)
    assert "It was running when this page was made" in seen[0]
    assert "pending: there is no video yet" in seen[0]
    assert "<td>running" in seen[0]


def test_before_there_is_a_still_the_newest_samples_are_shown(world: World) -> None:
    plan, red = make_plan(world.home, "A", "F"), np.full((9, 9, 3), (255, 0, 0), np.uint8)

    def draw(handle: FakeHandle) -> StageResult:
        assert handle.factory is not None
        sink = handle.factory()
        for step, picture in ((5, red), (20, red[..., ::-1]), (100, red)):
            sink.log_picture(step, "ynet/faces", picture)
        sink.close()
        return finish(handle)

    def broken(handle: FakeHandle) -> StageResult:
        raise FaceError("no face", "Look at it.")

    with pytest.raises(StageFailedError):
        world.run(plan, pair=draw, preview=broken)
    found = facts(world, plan)
    assert [(s.stage, s.name, s.step) for s in found.samples] == [("pair:A<-F", "ynet/faces", 100)]
    data = np.frombuffer(base64.b64decode(found.samples[0].address.partition(",")[2]), np.uint8)
    assert np.abs(cv2.imdecode(data, cv2.IMREAD_COLOR).mean((0, 1))[::-1] - (255, 0, 0)).max() < 8, "of step 100"
    assert "pair:A&lt;-F: ynet/faces, step 100" in job_page(found)[0]
    assert facts(world, world.full).samples == []


def test_a_job_that_ended_before_its_video_says_so(world: World) -> None:
    assert "</b> – not made: the job failed" in job_page(facts(world, world.hostile))[0]


@pytest.mark.parametrize("actor", [None, "B"])
def test_what_a_sweep_needs_has_a_page_with_its_trials(world: World, actor: str | None, tmp_path: Path) -> None:
    people = [person(name, ord(name)) for name in ("A", *filter(None, [actor]))]
    sweep = Sweep(
        "A", actor, tuple(each.digest for each in people), "tiny", ("avatar_loss.lambda_vgg=0",),
        {"avatar_loss.lambda_lr": {"choice": [0.1, 0.5]}}, (), 2, "none", "random", "psnr", "max", 20, 10,
    )  # fmt: skip
    plan = prepare(world.home, sweep.id, people[0], people[1] if actor else None, sweep.base())
    world.run(plan)
    text, _ = job_page(facts(world, plan))
    assert ("A driven by B" if actor else "<title>avatar A") + ": what the trials of a sweep need" in text
    folder = sweeps.store(world.home, sweep)
    board = TrialBoard(folder, sweep, Recorder(), NoTracker(world.home, print))  # type: ignore[arg-type]
    for name, rate, psnr in (("a", 0.1, 21.0), ("b", 0.5, 23.0)):
        board.started(name, {"avatar_loss.lambda_lr": rate})
        board.reported(name, {"step": 10, "training_seconds": 1.0, "psnr": psnr})
    board.started("b", {"avatar_loss.lambda_lr": 0.5}, Donor("a", 10))
    board.failed("a", "no face was found", "")
    (folder / sweeps.PLOT).write_text(plot(sweep, board.data))
    found = facts(world, plan)
    text, _ = job_page(found)
    assert f"Sweep {folder.name} is interrupted: 2 of 2 trials began, of {sweep.steps:,} steps each" in text
    assert re.findall(r"<td>(2[13])</td><td>(0.[15])</td>", text) == [("23", "0.5"), ("21", "0.1")]
    assert "<b>2, best</b>" in text
    assert "Trial 1 failed: no face was found" in text
    assert "Trial 2 went on with the weights of trial 1 at 10 steps." in text
    assert 'src="data:image/svg+xml;base64,' in text
    assert ">preprocess:A</th><td>" in text, "its figures"
    assert ("avatar: terms of the loss" in text) == (actor is not None), "of a sweep of the pair the avatar is trained"
    for words in (">Videos</h2>", "pending:"):
        assert words not in text
    assert "no pair in common" in comparison_page(found, facts(world, world.full))[0]


def test_without_mlflow_the_page_says_so_and_shows_the_rest(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    text, room = job_page(facts(world, world.plain))
    assert "MLflow at http://127.0.0.1:9 does not answer" in text
    assert (room.videos, text.count("<polyline")) == (1, 0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{world.home.root}/none.db")
    assert "there are no curves" in job_page(facts(world, world.plain))[0]
    assert not (world.home.root / "none.db").exists()


def test_files_that_are_gone_or_damaged_are_named(world: World, tmp_path: Path) -> None:
    found = facts(world, world.plain)
    folder = found.pairs[0].files["video"].parent
    shutil.copytree(folder, tmp_path / "kept")
    try:
        (folder / "preview.mp4").unlink()
        (folder / "still.png").write_bytes(b"no picture")
        (folder / "index.html").write_bytes(b"<div class=frame><img src=http://127.0.0.1:9/x>\xff</div>")
        text, room = job_page(facts(world, world.plain))
    finally:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "kept", folder)
    assert room.videos == 0
    assert "files of this pair are not on this machine: video" in text
    assert "127.0.0.1:9" not in text


def test_two_jobs_beside_each_other(world: World, tmp_path: Path) -> None:
    code, answer = run("compare", world.plain.job_id, world.changed.job_id, "-o", tmp_path / "both.html")
    assert (code, answer["videos"]) == (0, 2)
    assert answer["recipe"] == {"avatar_training.steps": ["1500", "7"]}
    assert answer["pairs"][0]["figures"]["self"]["PSNR"] == {"first": 30.0, "second": 30.0, "difference": 0.0}
    text = (tmp_path / "both.html").read_text()
    assert text.count("<video") == 2
    assert "The same in both: self, cross." in text
    assert "Stages that both jobs share: preprocess:A, preprocess:B." in text
    for job in (world.plain.job_id, world.changed.job_id):
        assert text.count(f"<title>{job}</title><polyline") == 6, "three terms of two trainings"


def test_jobs_that_share_no_pair(world: World, tmp_path: Path) -> None:
    code, answer = run("compare", world.many.job_id, world.hostile.job_id, "-o", tmp_path / "none.html")
    assert (code, answer["pairs"]) == (0, [])
    assert "The jobs have no pair in common" in (tmp_path / "none.html").read_text()


def test_bad_usage_says_the_way_out(world: World, tmp_path: Path) -> None:
    job = world.plain.job_id
    for args, words in (
        (("report", job, "-o", tmp_path), "is a folder"),
        (("report", "nojob"), "there is no job"),
        (("compare", job, job), "the same job"),
        (("report", job, "--pairs", "0"), "0 is not in the range"),
    ):
        code, answer = run(*args)
        assert code == 2
        assert words in answer["error"]["message"]
    code, answer = run("report", job)
    assert answer["page"] == str(world.home.root / "outputs" / "report" / f"{job}.html")


def test_markup_in_names_and_messages_is_text(world: World) -> None:
    text, _ = job_page(facts(world, world.hostile))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert text.count("<script") == text.count("</style>") == text.count("</title>") - _curves(text) == 1
    assert '<img src="http' not in text


def _curves(text: str) -> int:
    return text.count("<g><title>")


@pytest.mark.slow  # a whole job
def test_a_real_job_has_every_curve_and_picture(undisturbed_home: Lavatar, tmp_path: Path) -> None:
    (found,) = json.loads(undisturbed_home("jobs", "list", "--json")[1])["jobs"]
    code, out = undisturbed_home("report", found["id"], "-o", str(tmp_path / "job.html"), "--json")
    assert (code, json.loads(out)["videos"]) == (0, 1), undisturbed_home.errors()
    text = (tmp_path / "job.html").read_text()
    for phase in ("avatar", "ynet", "mapping"):
        assert f"{phase}: terms of the loss" in text
        assert f"{phase}: learning rates" in text
    for section in ("Self reenactment", "Cross reenactment"):
        assert f"<h3>{section}</h3>" in text
    assert text.count("<video") == 1


@pytest.fixture(scope="module")
def pages(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each sort."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("full", "many", "hostile"):
        (folder / f"{name}.html").write_text(job_page(facts(world, getattr(world, name)))[0])
    run("compare", world.plain.job_id, world.full.job_id, "-o", folder / "both.html")
    shutil.copy(facts(world, world.full).pairs[0].files["page"], folder / "evaluation.html")
    return {path.stem: path for path in folder.glob("*.html")}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("name", "videos"), [("full", 1), ("many", 2), ("hostile", 0), ("both", 2), ("evaluation", 0)])
def test_in_a_browser_it_fits_asks_nobody_complains_of_nothing_and_plays(
    browser: Browser, pages: dict[str, Path], name: str, videos: int, width: int, dark: bool
) -> None:
    browser.open(pages[name], width, dark=dark)
    wide = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    browser.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    scroll, client = browser.evaluate(wide)
    assert scroll <= client
    assert browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == dark
    contrast, smallest, where, wide = browser.evaluate(READABLE)
    assert wide == []
    assert contrast >= 4.5, where
    assert smallest >= 9.5, where
    state = "[...document.querySelectorAll('video')].map(v => [v.readyState > 1, v.duration, v.paused, v.error])"
    wanted = [[True, 2, False, None]] * videos
    deadline = time.monotonic() + 30
    while browser.evaluate(state) != wanted and time.monotonic() < deadline:
        time.sleep(0.2)
    assert browser.evaluate(state) == wanted
    foreign = "document.querySelectorAll('script, iframe, object, embed, form, base').length"
    assert browser.evaluate(foreign) == (name != "evaluation"), "its own script, where it has one"
    assert [url for url in browser.requests if not url.startswith("data:")] == [pages[name].as_uri()]
    assert browser.complaints == []


@pytest.mark.parametrize("width", WIDTHS)
def test_in_a_browser_two_videos_are_side_by_side_where_there_is_room(
    browser: Browser, pages: dict[str, Path], width: int
) -> None:
    browser.open(pages["both"], width)
    place = "v => { const at = v.getBoundingClientRect(); return [at.left, at.top]; }"
    (left, top), (other, below) = browser.evaluate(f"[...document.querySelectorAll('video')].map({place})")
    if width > 1000:
        assert (left < other, top == below) == (True, True)
    else:
        assert (left == other, top < below) == (True, True)


def test_in_a_browser_the_contact_sheets_are_drawn_and_the_cost_has_its_time(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["full"], 1280)
    drawn = "[...document.querySelectorAll('img.still')].map(i => [i.alt, i.complete && i.naturalWidth > 100])"
    (still, shown), (own, too) = browser.evaluate(drawn)
    assert ("the truth above the result" in own, "the truth above" in still, shown, too) == (True, False, True, True)
    cells = "[...document.querySelectorAll('tr')].map(r => [...r.cells].map(c => c.textContent))"
    (cost,) = [row for row in browser.evaluate(cells) if row[0] == "avatar:A" and "finished" in row]
    assert re.fullmatch(r"\d+[smh].*", cost[2]), cost


def test_in_a_browser_nothing_moves_where_that_is_asked_for(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["both"], 1280, reduced=True)
    time.sleep(0.5)
    paused = "[...document.querySelectorAll('video')].map(v => v.paused && v.currentTime == 0)"
    assert browser.evaluate(paused) == [True, True]
    browser.evaluate("document.querySelector('#play').click()")
    deadline = time.monotonic() + 30
    while browser.evaluate(paused) != [False, False] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert browser.evaluate(paused) == [False, False]


def test_in_a_browser_its_policy_runs_no_other_script(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["full"], 1280)
    broken = browser.evaluate(
        "new Promise(found => { addEventListener('securitypolicyviolation', e => found(e.effectiveDirective)); "
        "const own = document.createElement('script'); own.textContent = 'got = 1'; document.body.append(own); })"
    )
    assert (broken, browser.evaluate("typeof got")) == ("script-src-elem", "undefined")
