"""report.json keeps its schema; report.html shows it, sends no requests and escapes all completions."""

import json
import math
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
import requests
from PIL import Image
from rich.console import Console

from chain.fingerprints import identity
from chain.report import charts
from chain.report import data as report
from chain.report.curves import curves
from chain.report.page import page
from chain.report.serving import serving
from chain.report.write import write
from core.files import write_json
from core.manifest import Manifest
from core.strict import ConfigError

STAGES = ("core", "basic_sft", "soup", "longcot_sft", "rlvr", "think_fusion", "mixed_rl")
ATTACK = "<think>1</think><script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


def mode_scores(accuracy: float) -> dict:
    ci95 = [max(0.0, accuracy - 0.04), min(1.0, accuracy + 0.04)]
    return {"accuracy": accuracy, "n": 500, "ci95": ci95, "format_rate": 0.98, "mean_tokens": 24.25}


def sample(number: int, **changes) -> dict:
    verdicts = {
        "answer": {"score": 1.0, "status": "correct", "answer": "9", "reason": "9 equals 9"},
        "format": {"score": 0.0, "status": "wrong", "answer": None, "reason": "no box"},
        "judge": {
            "score": None,
            "status": "unscorable",
            "answer": None,
            "reason": "no answer from the judge",
        },
    }
    row = {"id": f"held-{number}", "mode": "think", "question": "compute A + B", "answer": "9"}
    row |= {"completion": "<think> A = 4 . B = 5 . 4 + 5 = 9 . </think> \\boxed{ 9 }", "correct": True}
    return {**row, "verdicts": verdicts, "image": f"images/{number:03d}.png", **changes}


def write_stage(folder: Path, name: str, parent: str | None, accuracy: float) -> None:
    folder.mkdir()
    Manifest(
        stage=name,
        fingerprint="f",
        config_hash="c",
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
    samples = [sample(number, correct=number % 3 > 0) for number in range(12)]
    for number in range(12):
        Image.new("RGB", (56, 56), (20 * number, 90, 160)).save(folder / "images" / f"{number:03d}.png")
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))


def metrics(stage: str) -> list[dict]:
    if stage in ("rlvr", "mixed_rl"):
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
            }
            for step in range(1, 41)
        ]
    return [{"step": step, "phase": "one", "loss": 2 / step} for step in range(1, 20)]


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A finished chain of all seven stages."""
    write_json(tmp_path / "chain.json", {"id": "demo-abc", "started": "now"})
    recipe = {"name": "demo", "about": "digits & <b>panels</b>", "seed": 0, **{name: {} for name in STAGES}}
    write_json(tmp_path / "recipe.json", recipe)
    for place, name in enumerate(STAGES):
        write_stage(tmp_path / name, name, STAGES[place - 1] if place else None, place / 7)
        lines = "".join(json.dumps(line) + "\n" for line in metrics(name))
        (tmp_path / name / "metrics.jsonl").write_text(lines)
    write_json(tmp_path / "rlvr" / "prepare.json", {"pass_at_k": {"kept": 9, "dropped": {"never solved": 2}}})
    ingredients = [{"name": name, "score": 0.9, "distance": 0.1} for name in ("basic_sft", "variant 1")]
    merged = {"method": "uniform", "used": [0, 1], "score": 0.91}
    write_json(tmp_path / "soup" / "soup.json", {"ingredients": ingredients, "merged": merged})
    held_out = {"basic_sft": {"direct": mode_scores(0.93)}, "variant 1": {"direct": mode_scores(0.9)}}
    write_json(tmp_path / "soup" / "ingredients_eval.json", held_out)
    return tmp_path


class Page(HTMLParser):
    """Tags, text and all URLs that a browser might fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.references: list[str] = []
        self.handlers: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action"):
                self.references.append(value)
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data):
        self.text += data


def test_report_json_has_the_documented_keys(run_dir):
    write(run_dir)
    found = json.loads((run_dir / "report.json").read_text())
    assert {"schema_version", "recipe", "seed", "chain", "commit", "versions", "stages", "soup"} <= set(found)
    assert [stage["name"] for stage in found["stages"]] == list(STAGES)
    stage = found["stages"][4]
    assert stage["seconds"] == 61.5
    assert set(stage["eval"]) == {"thinking", "direct"}
    assert {"accuracy", "n", "ci95", "format_rate", "mean_tokens"} < set(stage["eval"]["thinking"])
    assert stage["train"]["steps"] == 40
    assert stage["train"]["last"]["reward"] == pytest.approx(1 - math.exp(-40 / 12))
    assert stage["prepare"]["pass_at_k"]["kept"] == 9
    assert [one["name"] for one in found["soup"]["ingredients"]] == ["basic_sft", "variant 1"]
    assert found["soup"]["ingredients"][1]["eval"]["direct"]["accuracy"] == 0.9
    assert found["soup"]["merged"]["eval"]["thinking"]["accuracy"] == pytest.approx(2 / 7)


def test_a_stage_that_is_not_finished_is_not_reported(run_dir):
    (run_dir / "mixed_rl" / "manifest.json").unlink()
    assert [stage.name for stage in write(run_dir).stages] == list(STAGES[:-1])


def test_stages_made_from_an_earlier_run_of_a_stage_before_are_not_shown(run_dir):
    manifest = Manifest.read(run_dir / "rlvr")
    manifest.model_copy(update={"finished": "2026-01-02T10:00:00+00:00"}).write(run_dir / "rlvr")
    found = write(run_dir)
    # rlvr ran again; the later stages came from the old rlvr.
    assert [stage.name for stage in found.stages] == list(STAGES[:5])
    assert found.outdated == ["think_fusion", "mixed_rl"]
    assert "not shown: think_fusion, mixed_rl" in report.table(found).caption


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a run's folder"):
        write(tmp_path)


def test_the_table_has_a_row_per_stage_with_intervals(run_dir):
    console = Console(width=80, file=StringIO())
    console.print(report.table(write(run_dir)))
    text = console.file.getvalue()
    assert all(name in text for name in STAGES)
    assert "0.571 [.531, .611]" in text  # rlvr: 4 / 7
    assert "24.2/24.2" in text
    assert "…" not in text  # the table fits a terminal of 80 columns


def test_a_completion_with_markup_is_shown_as_text(run_dir):
    hostile = sample(0, completion=ATTACK, question=ATTACK, answer=ATTACK, id=ATTACK, mode=ATTACK)
    hostile["verdicts"] = {ATTACK: {"score": 1, "status": ATTACK, "answer": ATTACK, "reason": ATTACK}}
    (run_dir / "rlvr" / "samples.jsonl").write_text(json.dumps(hostile) + "\n")
    html = page(report.build(run_dir), run_dir)
    found = Page(html)
    assert "script" not in found.tags
    assert found.handlers == []
    assert found.text.count("<script>alert(1)</script>") == 8
    assert "<b>panels</b>" in found.text  # the recipe's texts are escaped as well


def test_the_page_asks_for_nothing_outside_itself(run_dir):
    found = Page(page(report.build(run_dir), run_dir))
    assert all(reference.startswith(("data:image/", "#")) for reference in found.references)
    assert "script" not in found.tags
    assert "link" not in found.tags


def test_each_stage_shows_a_dozen_images_and_rl_stages_their_curves(run_dir):
    html = page(report.build(run_dir), run_dir)
    assert html.count("data:image/png") == 12 * 7
    for title in ("Reward", "Completion length, tokens", "Clipped tokens, share", "Entropy, nats per token"):
        assert html.count(f"<strong>{title}</strong>") == 2  # rlvr and mixed_rl
    assert html.count("<strong>Loss</strong>") == 5  # SFT stages alone


def test_an_image_name_that_leads_outside_the_stage_is_not_followed(run_dir):
    Image.new("RGB", (4, 4)).save(run_dir / "secret.png")
    (run_dir / "rlvr" / "samples.jsonl").write_text(json.dumps(sample(0, image="../secret.png")) + "\n")
    assert page(report.build(run_dir), run_dir).count("data:image/png") == 12 * 6


def test_a_diverged_loss_leaves_a_gap_in_its_curve(run_dir):
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 2.0}]
    (run_dir / "basic_sft" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "nan" not in page(report.build(run_dir), run_dir).lower()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1.0]),
        (3, 97, [0, 25, 50, 75, 100]),
        (0.5, 0.5, [0.45, 0.475, 0.5, 0.525, 0.55]),
        (0, 0, [-0.5, -0.25, 0.0, 0.25, 0.5]),
        (-1e-6, 1e-6, [-1e-6, -5e-7, 0, 5e-7, 1e-6]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    assert charts.ticks(low, high, 4) == pytest.approx(expected, abs=1e-15)


def test_a_long_curve_is_averaged_to_few_points_and_keeps_its_end():
    figure = charts.lines("x", {"y": [(step, 1.0) for step in range(10_000)]})
    assert len(figure.series[0].line.split()) <= charts.MAX_POINTS
    assert figure.series[0].marks[0].hint == "y: 1 at step 9,999"


def test_every_reward_component_has_a_look_and_a_label_of_its_own():
    names = [f"part_{number}" for number in range(14)]
    record = {f"rewards/{name}/mean": 0.5 for name in names} | {"rewards/part_0/std": 0.1, "reward": 1.0}
    figures = {figure.title: figure for figure in curves([{"step": 1, **record}, {"step": 2, **record}])}
    series = figures["Reward components, trained on"].series
    assert [one.label for one in series] == sorted(name.replace("_", " ") for name in names)
    assert len({one.look for one in series}) == 14


def test_metrics_with_the_same_last_word_keep_their_whole_names():
    record = {"clip_ratio/low_mean": 0.1, "rewards/a/mean": 1.0}
    found = [figure.series[0].label for figure in curves([{"step": 1, **record}, {"step": 2, **record}])]
    assert found == ["a", "low"]
    record = {"reward": 0.1, "rollout/correct": 0.2}
    labels = [one.label for one in curves([{"step": 1, **record}, {"step": 2, **record}])[0].series]
    assert labels == ["reward", "correct"]


def test_the_stylesheet_has_a_distinct_colour_per_series_in_light_and_dark():
    style = (Path(charts.__file__).with_name("report.css")).read_text()
    found = re.findall(r"--c(\d): (#[0-9a-f]{6});", style)
    assert len(found) == len({colour for _, colour in found}) == 2 * charts.COLOURS
    assert all(f".s{number} {{" in style for number in range(charts.COLOURS))


def test_the_template_escapes_everything():
    template = Path(charts.__file__).with_name("page.html.jinja").read_text()
    assert "|safe" not in template.replace(" ", "")
    assert "autoescapefalse" not in template.replace(" ", "")
    assert "Markup" not in template


def test_a_failed_stage_is_shown_with_its_error_and_curves_until_it_finishes(run_dir):
    (run_dir / "mixed_rl").rename(run_dir / "mixed_rl.partial")
    (run_dir / "mixed_rl.partial" / "manifest.json").unlink()
    report.note_failure(run_dir, "mixed_rl", RuntimeError(f"out of memory\n{ATTACK}"))
    found = write(run_dir)
    assert (found.failed.stage, found.failed.train["steps"]) == ("mixed_rl", 40)
    html = (run_dir / "report.html").read_text()
    shown = Page(html)
    assert "mixed_rl failed: RuntimeError: out of memory" in shown.text
    assert "<script>alert(1)</script>" in shown.text
    assert "script" not in shown.tags
    # rlvr's chart, and the failed stage's chart up to the failure.
    assert html.count("<strong>Reward</strong>") == 2
    (run_dir / "mixed_rl.partial").rename(run_dir / "mixed_rl")
    assert write(run_dir).failed is None


def test_a_torn_line_of_metrics_does_not_stop_the_report(run_dir, caplog):
    with (run_dir / "rlvr" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "rew')
    with (run_dir / "basic_sft" / "metrics.jsonl").open("a") as file:
        file.write("nonsense\n")
    assert write(run_dir).stages[4].train["steps"] == 40
    assert "basic_sft/metrics.jsonl:20" in caplog.text


def test_public_benchmarks_stand_beside_the_published_scores(run_dir):
    tasks = {"mathvista": {"score": 61.25, "samples": []}, "mathverse": {"failed": "no judge"}}
    published = {"SAIL-VL2-2B-Thinking": {"mathvista": 68.5}, "Other": {"mmmu": 1.0}}
    write_json(run_dir / "rlvr" / "bench" / "bench.json", {"tasks": tasks, "published": published})
    found = write(run_dir)
    assert found.stages[4].bench == {"mathvista": 61.25}
    text = Page((run_dir / "report.html").read_text()).text
    assert "SAIL-VL2-2B-Thinking (published)68.5" in text
    assert "rlvr61.2" in text
    assert "Other" not in text


def test_a_served_report_shows_a_stage_while_it_trains(run_dir):
    partial = run_dir / "mixed_rl.partial"
    with serving(run_dir) as url:
        assert "not finished" not in requests.get(url, timeout=10).text
        partial.mkdir()
        lines = "".join(json.dumps(line) + "\n" for line in metrics("mixed_rl")[:7])
        (partial / "metrics.jsonl").write_text(lines)
        reply = requests.get(url, timeout=10)
        assert reply.headers["Refresh"] == "10"
        assert "not finished; the last logged step is 7" in Page(reply.text).text
        assert requests.get(f"{url}chain.json", timeout=10).status_code == 404
        assert requests.get(url, headers={"Host": "evil.example:80"}, timeout=10).status_code == 404
    with pytest.raises(ConfigError, match="not a run's folder"), serving(run_dir / "rlvr"):
        pass


def test_lengths_and_truncation_have_a_table(run_dir):
    scores = mode_scores(0.5) | {"truncated_rate": 0.25, "tokens_per_correct": 48.5, "length_auc": 0.75}
    scores["by_length"] = [{"tokens": [2, 9], "n": 5, "accuracy": 0.875}]
    write_json(run_dir / "rlvr" / "eval.json", {"scores": {"mcq": scores}, "seconds": 1, "fingerprint": "e"})
    write(run_dir)
    assert "mcq0.980.2548.50.752–9: 0.88" in Page((run_dir / "report.html").read_text()).text
