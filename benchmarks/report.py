"""Time to open a report in a browser: 5,000 completions with pictures, from navigation to the first painted rows.

    python -P -m benchmarks.report [--quick]

Makes a run of five stages with 1,000 held-out questions: completions of 40 to 4,000 characters with two verdicts, and
a picture of noise per question. Opens its report.html in headless Chromium (extra `dev`) at the size of a desktop and
of a phone, and types into the search. `--quick` uses 100 questions. Prints a table and, as the last line, one JSON
object.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.browser import browser
from chain.report.write import write
from core.files import write_json
from core.manifest import Manifest

STAGES = ("core", "basic_sft", "longcot_sft", "rlvr", "mixed_rl")
SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}
REPETITIONS = 5
PAINTED = """() => new Promise((done) => {
    const look = () => document.querySelector("tr.question")
        ? requestAnimationFrame(() => setTimeout(() => done(performance.now())))
        : setTimeout(look);
    look();
})"""
"""Milliseconds from the start of the navigation until the first rows are painted."""
SEARCHED = """() => new Promise((done) => {
    const input = document.getElementById("filter-search"), count = document.getElementById("question-count");
    const start = performance.now();
    new MutationObserver(() => requestAnimationFrame(() => setTimeout(() => done(performance.now() - start))))
        .observe(count, { childList: true });
    input.value = "word17 word3";
    input.dispatchEvent(new Event("input"));
})"""
"""Milliseconds from a key until the found rows are painted; 150 of them are waited for more keys."""


def make_run(folder: Path, questions: int) -> None:
    """A finished run whose stages have answered the same questions."""
    from chain.fingerprints import identity

    draw = random.Random(0)
    write_json(folder / "chain.json", {"id": "bench", "started": "now"})
    stages: dict[str, Any] = {name: {} for name in STAGES}
    write_json(folder / "recipe.json", {"name": "bench", "about": "5,000 completions", "seed": 0, **stages})
    before = None
    for place, name in enumerate(STAGES):
        (folder / name / "images").mkdir(parents=True)
        rows = [_row(number, draw) for number in range(questions)]
        (folder / name / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = Manifest(
            stage=name,
            fingerprint="f",
            config_hash="c",
            inputs={f"stage:{before}": identity(_manifest(folder / before))} if before else {},
            seed=0,
            parent=before,
            started=f"2026-01-01T10:0{place}:00+00:00",
            finished=f"2026-01-01T10:0{place}:30+00:00",
            seconds=30.0,
        )
        made.write(folder / name)
        before = name
    _write_pictures(folder / "core", questions, draw)


def _row(number: int, draw: random.Random) -> dict[str, Any]:
    text = " ".join(f"word{draw.randrange(200)}" for _ in range(draw.choice((6, 30, 120, 600))))
    right = draw.random() < 0.5
    verdict = {"score": float(right), "status": "correct" if right else "wrong", "reason": "by the rules"}
    return {
        **{"id": f"row-{number:05d}", "set": "thinking", "mode": "think", "source": f"source {number % 7}"},
        **{"kind": "number", "images": 1, "question": f"what is in picture {number}?", "answer": "4"},
        **{"completion": text, "verdicts": {"answer": verdict, "format": verdict}, "correct": right},
        **{"tokens": len(text) // 4, "truncated": len(text) > 3000},
    }


def _manifest(folder: Path) -> Manifest:
    found = Manifest.read(folder)
    assert found is not None
    return found


def _write_pictures(folder: Path, questions: int, draw: random.Random) -> None:
    """A picture of noise per question, of which thumbnails are as large as JPEG makes them."""
    from PIL import Image

    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    with (folder / "samples.jsonl").open("w") as file:
        for number in range(questions):
            name = f"images/{number:05d}.png"
            small = Image.frombytes("RGB", (28, 28), draw.randbytes(28 * 28 * 3))
            small.resize((448, 448)).save(folder / name)
            file.write(json.dumps({**rows[number], "image": name}) + "\n")


def measure(page: Any, url: str) -> dict[str, float]:
    """Milliseconds until the first rows are painted, and of a search."""
    page.goto("about:blank")
    page.goto(url)
    return {"open_ms": page.evaluate(PAINTED), "search_ms": page.evaluate(SEARCHED)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    result: dict[str, Any] = {"benchmark": "report"}
    with tempfile.TemporaryDirectory() as place, browser() as opened:
        run = Path(place)
        make_run(run, 100 if quick else 1000)
        start = time.perf_counter()
        write(run)
        file = run / "report.html"
        result |= {"write_s": time.perf_counter() - start, "file_mb": file.stat().st_size / 1e6}
        for name, (width, height) in SCREENS.items():
            page = opened.new_page(viewport={"width": width, "height": height})
            found = [measure(page, file.as_uri()) for _ in range(1 if quick else REPETITIONS)]
            result[name] = {key: statistics.median(one[key] for one in found) for key in found[0]}
            result[name]["completions"] = page.evaluate(
                "content.questions.rows.flatMap((r) => r.answers).length"
            )
    print(f"written in {result['write_s']:.1f} s, {result['file_mb']:.1f} MB")
    for name in SCREENS:
        one = result[name]
        print(f"{name:8} opens in {one['open_ms']:.0f} ms, finds in {one['search_ms']:.0f} ms")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
