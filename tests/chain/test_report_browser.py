"""report.html in a real browser: hostile rows stay text, filters find rows, and the page fits a phone."""

import json
import math
import re

import pytest

from benchmarks.browser import browser
from chain.report import data as report
from chain.report import serving as served
from chain.report.page import page as html_of
from chain.report.write import write
from core.files import write_json

from .browsing import until, watched
from .reports import STAGES, held_out, metrics, rollout, write_lines, write_run

pytestmark = pytest.mark.browser

HOSTILE = [
    "<script>window.hit = 1; alert(1)</script>",
    "</script><script>window.hit = 1; alert(1)</script>",
    "<!--<script>",
    "]]></style><style>* { display: none !important }</style>",
    '"\'><img src=x onerror="window.hit = 1"><svg onload="window.hit = 1">',
    '<a href="javascript:window.hit = 1">javascript:alert(1)</a><iframe src="https://evil.example/">',
    '<img src="https://evil.example/pixel.png"><link rel=stylesheet href=//evil.example/x.css>',
    "red; background: url(https://evil.example/x.png)} body { display: none }",
    "{{ 7 * 7 }} {% raw %} ${7 * 7} <%= 7 %> __proto__ constructor",
    "abc\u202egnirts desrever\u202c\u200b\u2066hidden\u2069",
    "nul\x00bell\x07escape\x1b[31m\u2028\u2029\ud800",
    "x" * 300_000,
    "\n" * 5000,
    "__proto__",
]


@pytest.fixture(scope="module")
def chromium():
    with browser() as opened:
        yield opened


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path)


def opened_report(chromium, run_dir, **options):
    """The run's report in a page, and what the page does."""
    write(run_dir)
    page, seen = watched(chromium, **options)
    page.goto((run_dir / "report.html").as_uri())
    page.wait_for_selector("tr.question")
    return page, seen


def hostile_run(run_dir) -> None:
    """Put every hostile text into every field that a model, a data set or an error fills."""
    for name in STAGES:
        fields = ("question", "answer", "completion", "source", "set", "kind")
        rows = [
            held_out(0, id=f"{at} {text}", **dict.fromkeys(fields, text)) for at, text in enumerate(HOSTILE)
        ]
        for row, text in zip(rows, HOSTILE, strict=True):
            verdict = {"score": 0.5, "status": text, "answer": text, "reason": text}
            row["verdicts"] = {text: verdict, "answer": verdict}
        write_lines(run_dir / name / "held_out.jsonl", rows)
    rolled = [rollout(at, text, 0.0, question=text, completion=text) for at, text in enumerate(HOSTILE)]
    write_lines(run_dir / "rlvr" / "completions.jsonl", rolled)
    encodable = [text[:2000] for text in HOSTILE if "\ud800" not in text]  # report.json is UTF-8
    alarms = [{"batch": 0, "name": text[:200], "text": text} for text in encodable]
    write_lines(run_dir / "rlvr" / "alarms.jsonl", alarms)
    lines = [{**line, **{f"rewards/{text[:99]}/mean": 0.5 for text in encodable}} for line in metrics("rlvr")]
    write_lines(run_dir / "rlvr" / "metrics.jsonl", lines)
    recipe = json.loads((run_dir / "recipe.json").read_text())
    write_json(run_dir / "recipe.json", recipe | {"name": HOSTILE[1], "about": HOSTILE[4]})
    sample = {
        "id": 1,
        "prompt": HOSTILE[1],
        "completion": HOSTILE[0],
        "extracted": HOSTILE[4],
        "gold": HOSTILE[5],
    }
    sample |= {
        "score": 1.0,
        "tokens": 1,
        "truncated": False,
        "pictures": [HOSTILE[6], "../../../../etc/passwd"],
    }
    tasks = {HOSTILE[0]: {"score": 1.0, "samples": [sample]}, HOSTILE[4]: {"failed": HOSTILE[5]}}
    bench = {"tasks": tasks, "published": {HOSTILE[0]: {HOSTILE[0]: 1.0}}}
    write_json(run_dir / "soup" / "bench" / "bench.json", bench)
    (run_dir / "mixed_rl").rename(run_dir / "mixed_rl.partial")
    (run_dir / "mixed_rl.partial" / "manifest.json").unlink()
    report.note_failure(run_dir, "mixed_rl", RuntimeError("\n".join(encodable)))


def test_hostile_rows_run_no_script_and_send_no_request(chromium, run_dir):
    hostile_run(run_dir)
    page, seen = opened_report(chromium, run_dir)
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    for name in (*STAGES[:-1], "rlvr"):
        page.locator("#training [role=tab]", has_text=name).first.click()
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    page.evaluate("for (const one of document.querySelectorAll('tr.question')) one.click()")
    for select in page.locator("#questions select").all():
        for value in select.evaluate("(one) => [...one.options].map((option) => option.value)"):
            select.select_option(value)
        select.select_option("")
    page.fill("#filter-search", HOSTILE[1])
    until(page, "document.getElementById('question-count').textContent.startsWith('3 of ')")
    page.wait_for_timeout(200)
    assert page.evaluate("window.hit") is None
    assert (seen.dialogs, seen.errors, seen.windows) == ([], [], [])
    assert [url for url in seen.requests if not url.startswith("data:image/")] == [page.url.partition("#")[0]]
    assert page.evaluate("document.querySelectorAll('script').length") == 2
    assert page.locator("iframe, link, a, object, embed, base, [onerror], [onload]").count() == 0
    assert page.locator("body").is_visible()


def test_the_policy_stops_a_script_and_a_request_that_our_code_might_let_in(chromium, run_dir):
    page, seen = opened_report(chromium, run_dir)
    page.evaluate("""() => {
        const script = document.createElement("script");
        try { script.textContent = "window.hit = 1"; } catch { window.refused = "script"; }
        document.body.append(script);
        try { document.body.innerHTML = "<b>x</b>"; } catch { window.refused += ", html"; }
        const image = new Image();
        image.src = "https://evil.example/pixel.png";
        document.body.append(image);
        return fetch("https://evil.example/").catch(() => null);
    }""")
    assert page.evaluate("window.hit") is None
    assert page.evaluate("window.refused") == "script, html"
    assert sum("Content Security Policy" in line for line in seen.errors) >= 2
    assert page.locator("tr.question").count() > 0


def test_characters_that_hide_or_turn_text_are_shown_by_their_code(chromium, run_dir):
    write_lines(
        run_dir / "mixed_rl" / "held_out.jsonl", [held_out(0, completion="a\u202eb\x00c\ud800d\u200be\tf")]
    )
    page, _ = opened_report(chromium, run_dir)
    said = page.locator("tr.question .said pre").first.text_content()
    assert said == "a⟨U+202E⟩b⟨U+0000⟩c⟨U+D800⟩d⟨U+200B⟩e\tf"


def test_filters_find_the_rows_and_survive_in_the_address(chromium, run_dir):
    rows = [
        held_out(at, correct=at % 2 == 0, tokens=at, truncated=at == 7, source=f"s{at % 3}")
        for at in range(12)
    ]
    write_lines(run_dir / "mixed_rl" / "held_out.jsonl", rows)
    page, seen = opened_report(chromium, run_dir)

    def ids(**choices) -> list[int]:
        page.click("text=clear filters")
        page.select_option("#filter-set", "held-out: thinking")
        for name, value in choices.items():
            if name == "search":
                page.fill("#filter-search", value)
                page.wait_for_timeout(250)
            elif name == "cut":
                page.check("#filter-cut")
            else:
                page.select_option(f"#filter-{name}", value)
        page.wait_for_timeout(50)
        modes = page.locator("tr.question .asked .mode:last-child").all_text_contents()
        return [int(re.search(r"held-(\d+)$", text)[1]) for text in modes]

    assert ids() == list(range(12))
    assert ids(verdict="wrong") == [1, 3, 5, 7, 9, 11]
    # Of the stage before, rows 0, 3, 6 and 9 are wrong.
    assert ids(flip="gained") == [0, 6]
    assert ids(flip="lost", base="core") == [1, 5, 7, 11]
    assert ids(stage="rlvr", verdict="wrong") == [0, 3, 6, 9]
    assert ids(judge="format", verdict="right") == []
    assert ids(cut=True) == [7]
    assert ids(search="held-1") == [1, 10, 11]
    assert ids(sort="-tokens", verdict="right") == [10, 8, 6, 4, 2, 0]
    page.reload()
    page.wait_for_selector("tr.question")
    assert page.locator("#filter-sort").input_value() == "-tokens"
    assert page.locator("tr.question").count() == 6
    assert seen.errors == []


def test_an_opened_row_shows_the_completions_of_all_stages_side_by_side(chromium, run_dir):
    page, _ = opened_report(chromium, run_dir)
    page.locator("tr.question").first.click()
    labels = page.locator("tr.opened .answer > .mode").all_text_contents()
    assert [label.split(" ")[1] for label in labels] == list(STAGES)
    tops = {round(card.bounding_box()["y"]) for card in page.locator("tr.opened .answer").all()}
    assert len(tops) == 1
    page.locator("tr.question button").first.press("Enter")
    assert page.locator("tr.opened").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_follows_the_colour_scheme(chromium, run_dir, scheme):
    hostile_run(run_dir)
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    page, _ = opened_report(chromium, run_dir, color_scheme=scheme, **phone)
    page.evaluate("for (const one of document.querySelectorAll('tr.question')) one.click()")
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("window.innerWidth") == 390
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 27)"
    assert dark == (scheme == "dark")


def test_every_reward_component_is_told_apart_by_colour_or_dashes(chromium, run_dir):
    lines = [
        {"step": step, "reward": 1, **{f"rewards/part_{at}/mean": at for at in range(14)}} for step in (1, 2)
    ]
    write_lines(run_dir / "mixed_rl" / "metrics.jsonl", lines)
    page, _ = opened_report(chromium, run_dir)
    looks = (
        page.locator("figure", has_text="Reward components, trained on")
        .locator("polyline")
        .evaluate_all(
            "(all) => all.map((one) => { const s = getComputedStyle(one); return s.stroke + s.strokeDasharray; })"
        )
    )
    assert len(set(looks)) == 14


def test_alarms_stand_on_the_curves_and_the_pointer_reads_a_step(chromium, run_dir):
    write_lines(run_dir / "mixed_rl" / "alarms.jsonl", [{"batch": 3, "name": "jump", "text": "leaps"}])
    page, _ = opened_report(chromium, run_dir)
    chart = page.locator("figure", has=page.locator("strong", has_text=re.compile("^Reward$")))
    assert chart.locator("title").text_content() == "jump: leaps"
    chart.scroll_into_view_if_needed()
    box = chart.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    step = int(chart.locator("svg > text").last.text_content().removeprefix("step "))
    assert 15 < step < 25
    value = float(chart.locator(".key b").first.text_content())
    assert value == pytest.approx(1 - math.exp(-step / 12), abs=1e-3)


def test_a_served_page_follows_the_run_and_keeps_the_readers_filters(chromium, run_dir, monkeypatch):
    monkeypatch.setattr(served, "REFRESH_S", 0.2)
    with served.serving(run_dir) as url:
        page, seen = watched(chromium)
        page.goto(url)
        page.wait_for_selector("tr.question")
        page.select_option("#filter-verdict", "wrong")
        page.locator("tr.question").first.click()
        page.fill("#filter-search", "compute A")
        partial = run_dir / "mixed_rl.partial"
        partial.mkdir()
        write_lines(partial / "metrics.jsonl", metrics("mixed_rl")[:7])
        write_lines(partial / "completions.jsonl", [rollout(0, "live", 0.0, question="compute A live")])
        page.wait_for_selector("text=compute A live")
        assert page.locator("#training h3").first.text_content() == "mixed_rl: not finished"
        assert page.locator("#filter-verdict").input_value() == "wrong"
        assert page.evaluate("document.activeElement.id") == "filter-search"
        assert page.locator("tr.opened").count() == 1
        assert all(one.startswith((url, "data:image/")) for one in seen.requests)
        assert seen.errors == []


def test_the_page_works_without_the_runs_folder(chromium, run_dir, tmp_path_factory):
    file = tmp_path_factory.mktemp("alone") / "report.html"
    file.write_text(html_of(report.build(run_dir), run_dir))
    page, seen = watched(chromium, offline=True)
    page.goto(file.as_uri())
    picture = page.locator("tr.question img").first
    picture.scroll_into_view_if_needed()
    until(page, "document.querySelector('tr.question img').naturalWidth === 56")
    assert seen.errors == []
