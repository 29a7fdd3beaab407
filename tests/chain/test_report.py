"""report.json keeps its schema; report.html carries the run's content, and is safe by its structure.

tests/chain/test_report_browser.py opens the page in a browser.
"""

import base64
import hashlib
import json
import math
import re
from io import StringIO

import pytest
import requests
from PIL import Image
from rich.console import Console

from chain.report import data as report
from chain.report import questions as asked
from chain.report.curves import MAIN, MAX_POINTS, POLICY_LOSS, component_looks, groups, marks
from chain.report.page import content, page
from chain.report.pictures import Thumbnails
from chain.report.render import HERE, SCRIPTS, script_json
from chain.report.rows import rows_page
from chain.report.serving import serving
from chain.report.sets import Sets, tables
from chain.report.write import write
from core.files import write_json
from core.manifest import Manifest
from core.strict import ConfigError
from corpus.records import write_records

from .reports import (
    ATTACK,
    STAGES,
    Page,
    held_out,
    metrics,
    mode_scores,
    rollout,
    without_comments,
    write_lines,
    write_run,
)


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path)


def shown(run_dir) -> dict:
    """The content of the run's page."""
    return content(report.build(run_dir), run_dir, Thumbnails())


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
    assert found.outdated == shown(run_dir)["stages"]["outdated"] == ["think_fusion", "mixed_rl"]
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


def test_hostile_texts_stay_inside_the_pages_data(run_dir):
    hostile = held_out(0, completion=ATTACK, question=ATTACK, answer=ATTACK, id=ATTACK, source="</script>")
    hostile["verdicts"] = {ATTACK: {"score": 1, "status": ATTACK, "answer": ATTACK, "reason": "\ud800\u2028"}}
    write_lines(run_dir / "rlvr" / "held_out.jsonl", [hostile])
    html = page(report.build(run_dir), run_dir)
    found = Page(html)
    assert found.tags == [
        *("html", "head", "meta", "meta", "meta", "meta", "title", "style"),
        *("body", "main", "noscript", "script", "script"),
    ]
    assert found.handlers == found.references == []
    assert html.isascii() or "\ud800" not in html
    rows = [row for row in found.content["questions"]["rows"] if row["id"] == ATTACK]
    assert (rows[0]["question"], rows[0]["answers"][0]["text"]) == (ATTACK, ATTACK)
    assert found.content["head"]["about"] == "digits & <b>panels</b>"


def test_the_policy_names_exactly_the_pages_own_script_and_style(run_dir):
    found = Page(page(report.build(run_dir), run_dir))
    rules = dict(rule.strip().split(" ", 1) for rule in found.policy.split(";"))

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["script-src"] == digest(found.inside["script"][1])
    assert rules["style-src"] == digest(found.inside["style"][0])
    assert rules["img-src"] == "data:"
    assert (rules["require-trusted-types-for"], rules["trusted-types"]) == ("'script'", "'none'")
    assert "connect-src" not in rules
    assert "unsafe" not in found.policy


def test_the_pages_without_scripts_permit_their_own_style_alone():
    found = Page(rows_page("rows", ATTACK, ["fact"], [], []))
    digest = base64.b64encode(hashlib.sha256(found.inside["style"][0].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in found.policy
    assert "script-src" not in found.policy
    assert ("script" in found.tags, found.handlers, found.references) == (False, [], [])


def test_the_scripts_parse_no_text_as_html_and_name_no_address():
    script = without_comments("".join((HERE / name).read_text() for name in SCRIPTS))
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "</",
    ):
        assert word not in script
    assert re.findall(r"https?://\S+", script) == ['http://www.w3.org/2000/svg";']  # a name, never fetched
    assert script.count("fetch(") == 1  # of a served page, to its own server


def test_the_templates_escape_everything():
    for file in HERE.glob("*.jinja"):
        template = file.read_text().replace(" ", "")
        assert "|safe" not in template
        assert "autoescapefalse" not in template


def test_numbers_that_json_does_not_have_are_refused_or_left_out(run_dir):
    with pytest.raises(ValueError, match="Out of range float"):
        script_json({"value": float("nan")})
    row = held_out(0, tokens=float("inf"))
    row["verdicts"]["answer"]["score"] = float("nan")
    write_lines(run_dir / "rlvr" / "held_out.jsonl", [row])
    answer = Page(page(report.build(run_dir), run_dir)).content["questions"]["rows"][0]["answers"][4]
    assert (answer["tokens"], answer["verdicts"][0][1]) == (None, None)


def test_a_question_has_the_completion_of_every_stage_beside_its_picture(run_dir):
    write_lines(run_dir / "rlvr" / "held_out.jsonl", [held_out(0, correct=False, truncated=True, tokens=48)])
    found = shown(run_dir)["questions"]
    first = found["rows"][0]
    assert [answer["stage"] for answer in first["answers"]] == list(STAGES)
    assert [answer["cut"] for answer in first["answers"]] == [name == "rlvr" for name in STAGES]
    assert first["answers"][0]["verdicts"][1] == ["format", 0.0, "wrong", "no box"]
    assert found["pictures"][first["pictures"][0]].startswith("data:image/png;base64,")
    assert len(found["pictures"]) == 12  # one per question, not per stage


def test_an_answer_that_could_not_be_judged_is_neither_right_nor_wrong(run_dir):
    row = held_out(0, correct=False)
    row["verdicts"]["answer"] = {"score": None, "status": "unscorable", "reason": "no answer from the judge"}
    write_lines(run_dir / "mixed_rl" / "held_out.jsonl", [row])
    assert shown(run_dir)["questions"]["rows"][0]["answers"][-1]["right"] is None


def test_blind_and_sampled_completions_belong_to_their_answer(run_dir):
    row = held_out(0, blind=held_out(0, correct=False), drawn=[held_out(0), held_out(0, correct=False)])
    write_lines(run_dir / "mixed_rl" / "held_out.jsonl", [row])
    more = shown(run_dir)["questions"]["rows"][0]["answers"][-1]["more"]
    expected = [("blind", False), ("sample 1", True), ("sample 2", False)]
    assert [(one["label"], one["right"]) for one in more] == expected


def test_rollouts_are_grouped_and_have_the_advantage_that_they_trained_with(run_dir):
    rows = [row for row in shown(run_dir)["questions"]["rows"] if row["set"] == "rollouts: rlvr"]
    assert [row["source"] for row in rows] == ["batch 0", "batch 2"]
    # Rewards 0, 0, 1, 1: mean 1/2, standard deviation 0.57735; (0 - 1/2) / (0.57735 + 1e-4)
    assert [one["advantage"] for one in rows[0]["answers"]] == pytest.approx(
        [-0.866, -0.866, 0.866, 0.866], abs=1e-3
    )
    assert [one["right"] for one in rows[0]["answers"]] == [False, False, True, True]


def test_the_pictures_of_rollouts_come_from_the_stages_sets(run_dir):
    row = {"id": "rl-1", "mode": "think", "question": "q", "answer": "5", "verifier": "number"}
    write_records(run_dir / "rl.parquet", [{**row, "images": [Image.new("RGB", (8, 8))]}])
    write_json(run_dir / "rlvr" / "config.json", {"data": [{"set": "rl"}]})
    sets = Sets({"rl": str(run_dir / "rl.parquet")}, {})
    found = asked.questions(run_dir, ["rlvr"], [], sets, Thumbnails())
    rows = [row for row in found["rows"] if row["set"] == "rollouts: rlvr"]
    assert [len(row["pictures"]) for row in rows] == [1, 1]
    (run_dir / "rl.parquet").write_text("PAR1 and then nothing")
    assert asked.questions(run_dir, ["rlvr"], [], sets, Thumbnails())["rows"][-1]["pictures"] == []


def test_the_samples_of_a_bench_are_questions_too(run_dir):
    sample = {"id": 3, "prompt": "How many?", "completion": "2", "extracted": "2", "gold": "3", "score": 0.0}
    sample |= {"tokens": 4, "truncated": False, "pictures": ["../../secret.png"]}
    tasks = {"mathvista": {"score": 61.25, "samples": [sample]}}
    write_json(run_dir / "rlvr" / "bench" / "bench.json", {"tasks": tasks, "published": {}})
    row = next(row for row in shown(run_dir)["questions"]["rows"] if row["set"] == "benchmark: mathvista")
    assert (row["question"], row["gold"], row["answers"][0]["right"], row["pictures"]) == (
        "How many?",
        "3",
        False,
        [],
    )


def test_an_image_name_that_leads_outside_the_stage_is_not_followed(run_dir):
    Image.new("RGB", (4, 4)).save(run_dir / "secret.png")
    for name in STAGES:
        write_lines(run_dir / name / "samples.jsonl", [{**held_out(0), "image": "../secret.png"}])
    assert shown(run_dir)["questions"]["pictures"] == []


def test_what_the_page_has_no_room_for_is_said(run_dir, monkeypatch):
    monkeypatch.setattr(asked, "TEXT_BYTES", 20_000)
    monkeypatch.setattr(asked, "BYTES", 600)
    found = shown(run_dir)["questions"]
    kept = [row for row in found["rows"] if row["set"] == "held-out: thinking"]
    assert 0 < len(kept) < 12
    assert f"held-out: thinking: {len(kept)} of 12 questions" in found["left"][0]
    assert f"{sum(not row['pictures'] for row in kept)} questions are shown without" in found["left"][-1]


def test_of_a_huge_file_only_whole_newest_batches_of_rollouts_are_read(run_dir, monkeypatch):
    rolled = [rollout(batch, "rl-1", reward) for batch in range(9) for reward in (0.0, 1.0)]
    write_lines(run_dir / "rlvr" / "completions.jsonl", rolled)
    # Room for three batches of two lines, of which the first might be incomplete.
    monkeypatch.setattr(asked, "READ_BYTES", 7 * len(json.dumps(rolled[0])))
    found = asked.questions(run_dir, ["rlvr"], [], Sets({}, {}), Thumbnails())
    assert [row["source"] for row in found["rows"] if row["set"] == "rollouts: rlvr"] == [
        "batch 7",
        "batch 8",
    ]
    held = [row for row in found["rows"] if row["set"] == "held-out: thinking"]
    assert 0 < len(held) < 12
    assert found["left"] == [
        f"rlvr: held-out rows after the first {len(held)}",
        "rlvr: older rollouts than the last 4",
    ]


def test_a_long_completion_loses_its_middle(run_dir):
    write_lines(run_dir / "rlvr" / "completions.jsonl", [rollout(0, "a", 1.0, completion="x" * 9000 + "end")])
    answer = shown(run_dir)["questions"]["rows"][-1]["answers"][0]
    assert answer["text"].endswith("xend")
    assert "[3,003 characters are left out here]" in answer["text"]


def test_a_diverged_loss_leaves_a_gap_in_its_curve(run_dir):
    lines = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 2.0},
        {"step": 4, "loss": 10**400},
    ]
    (series,) = groups(lines, {})[0]["charts"][0]["series"]
    assert series["points"] == [(1.0, 1.0), (3.0, 2.0)]


def test_every_metric_of_a_stage_is_drawn_once(run_dir):
    found = next(one for one in shown(run_dir)["training"] if one["name"] == "rlvr")
    keys = [
        series["key"] for group in found["groups"] for chart in group["charts"] for series in chart["series"]
    ]
    assert len(keys) == len(set(keys))
    assert set(keys) == {key for line in metrics("rlvr") for key in line} - {"step"}
    assert [chart["title"] for chart in found["groups"][0]["charts"]][:2] == [
        "Reward",
        "Reward components, trained on",
    ]
    assert POLICY_LOSS in [chart["title"] for group in found["groups"][1:] for chart in group["charts"]]


def test_a_long_curve_is_averaged_to_few_points_and_keeps_its_end():
    lines = [{"step": step, "loss": 1.0} for step in range(10_000)]
    (series,) = groups(lines, {})[0]["charts"][0]["series"]
    assert len(series["points"]) <= MAX_POINTS
    assert series["points"][-1] == (9999.0, 1.0)


def test_every_reward_component_has_a_colour_and_a_label_of_its_own_in_all_charts():
    names = [f"part_{number}" for number in range(14)]
    record = {f"rewards/{name}/mean": 0.5 for name in names} | {
        f"sampled/{names[3]}/mean": 0.1,
        "reward": 1.0,
    }
    looks = component_looks([[record]])
    charts = {chart["title"]: chart for chart in groups([record], looks)[0]["charts"]}
    series = charts["Reward components, trained on"]["series"]
    assert [one["label"] for one in series] == sorted(name.replace("_", " ") for name in names)
    assert len({one["look"] for one in series}) == 14
    (sampled,) = charts["Reward components, sampled"]["series"]
    assert sampled["look"] == next(one["look"] for one in series if one["label"] == "part 3")


def test_metrics_with_the_same_last_word_keep_their_whole_names():
    record = {
        "step": 1,
        "clip_ratio/low_mean": 0.1,
        "rewards/a/mean": 1.0,
        "reward": 0.1,
        "rollout/correct": 0.2,
    }
    record |= {"bench/mathvista": 40.0, "bench/mmmu": 30.0}
    labels = [[one["label"] for one in chart["series"]] for chart in groups([record], {"a": 0})[0]["charts"]]
    assert labels == [["reward", "correct"], ["a"], ["mathvista", "mmmu"], ["low"]]


def test_alarms_stand_at_the_step_of_their_batch_and_phases_at_their_first_step():
    lines = [{"step": step, **({"rollout/rounds": 1} if step % 4 == 1 else {})} for step in range(1, 13)]
    alarms = [{"batch": batch, "name": "jump", "text": "up"} for batch in (0, 2, 9)]
    # Batches 0, 1 and 2 begin at steps 1, 5 and 9; batch 9 was never trained on.
    assert [(one["x"], one["label"]) for one in marks(lines, alarms)] == [
        (x, "jump: up") for x in (1.0, 9.0, 12.0)
    ]
    phases = [{"step": 1, "phase": "a"}, {"step": 2, "phase": "a"}, {"step": 1, "phase": "b"}]
    assert marks(phases, []) == [{"kind": "phase", "x": 3.0, "label": "b"}]


def test_the_stylesheet_has_a_distinct_colour_per_series_in_light_and_dark():
    style = (HERE / "report.css").read_text()
    found = re.findall(r"--c(\d): (#[0-9a-f]{6});", style)
    assert len(found) == len({colour for _, colour in found}) == 20
    assert all(f".s{number} {{" in style for number in range(10))
    assert "const COLOURS = 10;" in (HERE / "charts.js").read_text()


def test_a_failed_stage_is_shown_with_its_error_and_curves_until_it_finishes(run_dir):
    (run_dir / "mixed_rl").rename(run_dir / "mixed_rl.partial")
    (run_dir / "mixed_rl.partial" / "manifest.json").unlink()
    report.note_failure(run_dir, "mixed_rl", RuntimeError(f"out of memory\n{ATTACK}"))
    found = write(run_dir)
    assert (found.failed.stage, found.failed.train["steps"]) == ("mixed_rl", 40)
    seen = Page((run_dir / "report.html").read_text()).content
    assert seen["head"]["failed"] == "mixed_rl failed: RuntimeError: out of memory"
    last = seen["training"][-1]
    assert (last["name"], last["state"], last["error"]) == (
        "mixed_rl",
        "failed",
        f"RuntimeError: out of memory\n{ATTACK}",
    )
    assert last["groups"][0]["charts"][0]["series"][0]["points"][-1][0] == 40
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
    tasks = {
        "mathvista.direct": {"score": 61.25, "samples": [], "limit": 100},
        "mathverse": {"failed": "no judge"},
    }
    published = {"SAIL-VL2-2B-Thinking": {"mathvista": 68.5}, "Other": {"mmmu": 1.0}}
    bench = {"tasks": tasks, "published": published, "harness": {"name": "lmms-eval", "version": "0.7.3"}}
    write_json(run_dir / "rlvr" / "bench" / "bench.json", bench)
    assert write(run_dir).stages[4].bench == {"mathvista.direct": 61.25}
    found = shown(run_dir)["benchmarks"]
    assert found["heads"] == ["points", "mathvista.direct", "mathverse"]
    assert found["rows"] == [
        ["rlvr", "61.2 (first 100)", "–"],
        ["SAIL-VL2-2B-Thinking (published)", "68.5", "–"],
    ]
    assert found["notes"] == ["lmms-eval 0.7.3", "rlvr, mathverse: no score: no judge"]


def test_lineage_has_the_inputs_of_every_stage_and_what_changed_between_them(run_dir):
    manifest = Manifest.read(run_dir / "mixed_rl")
    manifest.model_copy(update={"versions": {"python": "3.11.7", "torch": "2.14.0"}}).write(
        run_dir / "mixed_rl"
    )
    entries = shown(run_dir)["lineage"]["entries"]
    assert [entry["name"] for entry in entries] == list(STAGES)
    assert [name for name, _ in entries[4]["inputs"]] == ["stage:longcot_sft"]
    assert ("commit", "0123456789ab") in entries[4]["facts"]
    assert [entry["differs"] for entry in entries[-2:]] == [[], ["torch 2.13.0 → 2.14.0"]]


def test_the_data_section_counts_the_sets_and_names_what_was_dropped(run_dir):
    row = {"question": "q", "answer": "5", "verifier": "number"}
    rows = [{**row, "id": str(at), "mode": "think" if at else "direct"} for at in range(4)]
    folder = run_dir / "curated"
    folder.mkdir()
    write_records(folder / "train-00000.parquet", rows)
    step = {"op": "lengths", "rows": 6, "kept": 4, "changed": 0, "reasons": {"too long": 2}}
    write_json(folder / "steps.json", {"steps": [step]})
    (run_dir / "torn.parquet").write_text("PAR1 and then nothing")
    places = {"mine": str(folder), "gone": "/nowhere.parquet", "torn": str(run_dir / "torn.parquet")}
    sets = Sets(places, {"thinking": "mine", "direct": "gone", "mcq": "torn"})
    found = {table["title"]: table["rows"] for table in tables(run_dir, ["rlvr"], sets)}
    assert found["Sets"][0][:3] == ["mine", "evaluation", "4"]
    assert found["Sets"][0][4] == "think 75%, direct 25%"
    assert found["Sets"][1][2:] == ["–", "–", "–", "–", "–", "–"]
    assert found["Sets"][2][2] == "unreadable"
    assert found["Made by a stage's own policy"] == [["rlvr", "pass_at_k", "9", "2 never solved"]]
    assert found["Curation of mine"] == [["lengths", "6", "4", "0", "2 too long"]]


def test_lengths_and_truncation_have_a_table(run_dir):
    scores = mode_scores(0.5) | {"truncated_rate": 0.25, "tokens_per_correct": 48.5, "length_auc": 0.75}
    scores["by_length"] = [{"tokens": [2, 9], "n": 5, "accuracy": 0.875}]
    write_json(run_dir / "rlvr" / "eval.json", {"scores": {"mcq": scores}, "seconds": 1, "fingerprint": "e"})
    (table,) = shown(run_dir)["training"][4]["tables"]
    assert table["rows"] == [["mcq", "0.98", "0.25", "48.5", "0.75", "2–9: 0.88"]]


def test_a_served_report_shows_a_stage_while_it_trains(run_dir):
    partial = run_dir / "mixed_rl.partial"
    with serving(run_dir) as url:
        first = requests.get(url, timeout=10)
        assert [one["state"] for one in Page(first.text).content["training"]] == [""] * 7
        assert "connect-src 'self'" in Page(first.text).policy
        assert first.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        unchanged = requests.get(f"{url}content.json", timeout=10).headers["ETag"]
        asked_again = requests.get(f"{url}content.json", headers={"If-None-Match": unchanged}, timeout=10)
        assert (asked_again.status_code, asked_again.content) == (304, b"")
        partial.mkdir()
        write_lines(partial / "metrics.jsonl", metrics("mixed_rl")[:7])
        newer = requests.get(f"{url}content.json", headers={"If-None-Match": unchanged}, timeout=10).json()
        assert newer["live"] == 10
        assert newer["training"][-1]["about"] == "not finished; the last logged step is 7"
        assert newer["training"][-1]["groups"][0]["title"] == MAIN
        assert requests.get(f"{url}chain.json", timeout=10).status_code == 404
        assert requests.get(url, headers={"Host": "evil.example:80"}, timeout=10).status_code == 404
    with pytest.raises(ConfigError, match="not a run's folder"), serving(run_dir / "rlvr"):
        pass
