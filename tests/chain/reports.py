"""A finished run of all seven stages on disk, and what a report's page holds."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from chain.fingerprints import identity
from core.files import write_json
from core.manifest import Manifest

STAGES = ("core", "basic_sft", "soup", "longcot_sft", "rlvr", "think_fusion", "mixed_rl")
ATTACK = "<think>1</think><script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


def mode_scores(accuracy: float) -> dict:
    ci95 = [max(0.0, accuracy - 0.04), min(1.0, accuracy + 0.04)]
    return {"accuracy": accuracy, "n": 500, "ci95": ci95, "format_rate": 0.98, "mean_tokens": 24.25}


def held_out(number: int, **changes) -> dict:
    """A line of held_out.jsonl."""
    verdicts = {
        "answer": {"score": 1.0, "status": "correct", "answer": "9", "reason": "9 equals 9"},
        "format": {"score": 0.0, "status": "wrong", "answer": None, "reason": "no box"},
    }
    row = {"id": f"held-{number}", "set": "thinking", "mode": "think", "source": "panels", "kind": "number"}
    row |= {"images": 1, "question": "compute A + B", "answer": "9", "correct": True, "tokens": 12}
    row |= {"completion": "<think> A = 4 . B = 5 . 4 + 5 = 9 . </think> \\boxed{ 9 }", "truncated": False}
    return {**row, "verdicts": verdicts, **changes}


def rollout(batch: int, row: str, reward: float, **changes) -> dict:
    """A line of completions.jsonl."""
    verdicts = {"answer": {"score": reward, "status": "correct" if reward else "wrong", "reason": "judged"}}
    line = {"batch": batch, "id": row, "mode": "think", "question": "compute B", "answer": "5", "tokens": 7}
    return {**line, "completion": "5", "finished": True, "reward": reward, "verdicts": verdicts, **changes}


def write_lines(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_stage(folder: Path, name: str, parent: str | None, accuracy: float) -> None:
    """A finished stage: 12 held-out rows with pictures, of which a third is wrong."""
    folder.mkdir()
    Manifest(
        stage=name,
        fingerprint="f" * 64,
        config_hash="c" * 64,
        inputs={f"stage:{parent}": identity(Manifest.read(folder.parent / parent))} if parent else {},
        versions={"python": "3.11.7", "torch": "2.13.0"},
        seed=0,
        parent=parent,
        commit="0123456789ab",
        started="2026-01-01T10:00:00+00:00",
        finished=f"2026-01-01T10:0{STAGES.index(name)}:00+00:00",
        seconds=61.5,
    ).write(folder)
    scores = {"thinking": mode_scores(accuracy), "direct": mode_scores(1 - accuracy / 4)}
    write_json(folder / "eval.json", {"scores": scores, "seconds": 9.5, "fingerprint": "e"})
    (folder / "images").mkdir()
    rows = [held_out(number, correct=number % 3 > 0) for number in range(12)]
    for number in range(12):
        Image.new("RGB", (56, 56), (20 * number, 90, 160)).save(folder / "images" / f"{number:03d}.png")
    write_lines(folder / "held_out.jsonl", rows)
    write_lines(
        folder / "samples.jsonl",
        [{**row, "image": f"images/{number:03d}.png"} for number, row in enumerate(rows)],
    )


def metrics(stage: str) -> list[dict]:
    if stage not in ("rlvr", "mixed_rl"):
        return [{"step": step, "phase": "one", "loss": 2 / step} for step in range(1, 20)]
    return [
        {
            "step": step,
            "loss": 0.1,
            "reward": 1 - math.exp(-step / 12),
            "rewards/answer/mean": 0.9 - math.exp(-step / 12),
            "rewards/format/mean": 1.0,
            "completions/mean_length": 24 + math.sin(step),
            "clip_ratio/region_mean": 0.01,
            "entropy": 0.4 / step,
            "parity/max_logprob_difference": 1e-6,
            "sampling/of_my_own": 0.5,
            **({"rollout/rounds": 1} if step % 2 else {}),
        }
        for step in range(1, 41)
    ]


def write_run(folder: Path) -> Path:
    """A finished chain of all seven stages, with rollouts of rlvr."""
    write_json(folder / "chain.json", {"id": "demo-abc", "started": "now"})
    recipe = {"name": "demo", "about": "digits & <b>panels</b>", "seed": 0, **{name: {} for name in STAGES}}
    write_json(folder / "recipe.json", recipe)
    for place, name in enumerate(STAGES):
        write_stage(folder / name, name, STAGES[place - 1] if place else None, place / 7)
        write_lines(folder / name / "metrics.jsonl", metrics(name))
    write_json(folder / "rlvr" / "prepare.json", {"pass_at_k": {"kept": 9, "dropped": {"never solved": 2}}})
    rolled = [rollout(batch, "rl-1", reward) for batch in (0, 2) for reward in (0.0, 0.0, 1.0, 1.0)]
    write_lines(folder / "rlvr" / "completions.jsonl", rolled)
    ingredients = [{"name": name, "score": 0.9, "distance": 0.1} for name in ("basic_sft", "variant 1")]
    merged = {"method": "uniform", "used": [0, 1], "score": 0.91}
    write_json(folder / "soup" / "soup.json", {"ingredients": ingredients, "merged": merged})
    scores = {"basic_sft": {"direct": mode_scores(0.93)}, "variant 1": {"direct": mode_scores(0.9)}}
    write_json(folder / "soup" / "ingredients_eval.json", scores)
    return folder


class Page(HTMLParser):
    """Tags, handlers, every reference that a browser might follow, and the text of each element of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.handlers: list[str] = []
        self.inside: dict[str, list[str]] = {}
        self.policy = ""
        self._open = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside.setdefault(tag, []).append("")
        self._open = tag
        given = dict(attrs)
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        self.references += [given[name] for name in ("src", "href", "srcset", "action") if name in given]
        self.handlers += [name for name in given if name.startswith("on") or name == "style"]

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open:
            self.inside[self._open][-1] += data

    @property
    def content(self) -> dict:
        """What the page's scripts show."""
        return json.loads(self.inside["script"][0])


def without_comments(script: str) -> str:
    return re.sub(r"^\s*//.*$", "", script, flags=re.M)
