"""The watch over a stage: what raises an alarm, and what does not."""

import pytest
from PIL import Image

from core.files import read_jsonl
from core.model.pictures import as_rgb
from rewards.example import Example
from rewards.mix import Graded
from rewards.verdict import Status, Verdict
from rl.blank import blanked
from rl.collect import Group, Sample
from rl.config import Watch
from rl.rollout.messages import Completion
from rl.watch import RewardAlarm, Watcher

RIGHT, WRONG = Verdict.correct("7"), Verdict.wrong("8")
ROWS = [
    {"id": f"held-{n}", "images": [Image.new("RGB", (8, 8), (n, 0, 0))], "answer": "7", "mode": "think"}
    for n in range(100)
]


def sample(verdict: Verdict = RIGHT, text: str = "seven", tokens: int = 4) -> Sample:
    completion = Completion([1] * tokens, [-0.1] * tokens, text, True)
    return Sample(completion, Graded(verdict.score, {"answer": verdict}), 0.0, verdict)


def group(*samples: Sample, prompt: str = "row-0") -> Group:
    row = {
        "id": prompt,
        "question": "?",
        "answer": "7",
        "mode": "think",
        "verifier": "number",
        "images": [],
        "chain": None,
        "source": "",
        "meta": {},
    }
    return Group(row, [1], list(samples))


def mixed(right: int, of: int = 20, wrong: Verdict = WRONG) -> Group:
    return group(*[sample(RIGHT)] * right, *[sample(wrong)] * (of - right))


class Policy:
    """Held-out accuracy by script; images that are all grey count as blanked."""

    def __init__(self, *looks: tuple[float, float]):
        self.looks, self.now = list(looks), (0.0, 0.0)

    def __call__(self, rows):
        seen = as_rgb(rows[0]["images"][0]).getpixel((0, 0)) != (128, 128, 128)
        if seen:
            self.now = self.looks.pop(0)
        return self.now[0] if seen else self.now[1]


@pytest.fixture
def watch(tmp_path):
    def make(second=None, policy=None, **cfg) -> Watcher:
        return Watcher(Watch(**cfg), tmp_path, second, ROWS if policy else [], policy or (lambda rows: 0.0))

    return make


def names(watcher: Watcher, *groups: Group) -> list[str]:
    return [alarm.name for alarm in watcher.batch(groups)[1]]


def test_healthy_batches_raise_nothing(watch, tmp_path):
    watcher = watch()
    assert [names(watcher, mixed(right)) for right in (4, 6, 9, 12, 15, 18, 20)] == [[]] * 7
    assert not (tmp_path / "alarms.jsonl").exists()


def test_too_many_unscorable_completions_end_the_run_and_are_counted_by_cause(watch, tmp_path):
    watcher = watch(max_unscorable=0.2)
    down = Verdict.unscored("the judge is down")
    assert names(watcher, mixed(17, wrong=down)) == []
    metrics, alarms = watcher.batch([mixed(13, wrong=down)])
    assert metrics["unscorable/answer/unscorable"] == 7
    with pytest.raises(RewardAlarm, match=r"10 of the last 40 .*max_unscorable=0.2.*the judge is down"):
        watcher.stop_for(alarms)
    assert [line["name"] for line in read_jsonl(tmp_path / "alarms.jsonl")] == ["unscorable"]


def test_an_alarm_that_stop_on_does_not_name_is_only_reported(watch):
    watcher = watch(max_unscorable=0.0, stop_on=())
    metrics, alarms = watcher.batch([mixed(10, wrong=Verdict.unscored("down"))])
    assert metrics["alarm/unscorable"] == 1
    watcher.stop_for(alarms)


def test_the_window_forgets(watch):
    watcher = watch(max_unscorable=0.3, window=2)
    down = Verdict.unscored("down")
    assert names(watcher, mixed(0, wrong=down)) == ["unscorable", "status"]
    watcher.batch([mixed(20)])
    assert names(watcher, mixed(20)) == []


def test_one_status_that_takes_over_is_reported_but_wrong_answers_are_not(watch):
    assert names(watch(), mixed(9, wrong=Verdict.wrong("8", status=Status.UNPARSEABLE))) == ["status"]
    assert names(watch(), mixed(11, wrong=Verdict.wrong("8", status=Status.UNPARSEABLE))) == []
    assert names(watch(), mixed(0)) == []


def test_a_component_that_jumps_is_reported(watch):
    watcher = watch()
    for right in (4, 5, 4, 5, 4):
        assert names(watcher, mixed(right)) == []
    metrics, alarms = watcher.batch([mixed(18)])
    assert [alarm.name for alarm in alarms] == ["jump"]
    assert "from 0.220 to 0.900" in alarms[0].text
    assert metrics["alarm/jump"] == 1


def test_the_same_text_for_several_prompts_is_reported(watch):
    same = [group(*[sample(text="it is seven", tokens=20)] * 8, prompt=f"row-{n}") for n in range(4)]
    assert names(watch(), *same) == ["repeats"]
    own = [group(*[sample(text=f"it is {n}", tokens=20)] * 8, prompt=f"row-{n}") for n in range(4)]
    assert names(watch(), *own) == []
    short = [group(*[sample(text="7", tokens=2)] * 8, prompt=f"row-{n}") for n in range(4)]
    assert names(watch(), *short) == []


def test_two_verifiers_that_disagree_are_reported_with_an_example(watch):
    def refuse(completion: str, example: Example) -> bool:
        return False

    def agree(completion: str, example: Example) -> float | None:
        return None if completion == "unsure" else 1.0

    watcher = watch(second=refuse, second_verifier="strict")
    metrics, alarms = watcher.batch([mixed(20)])
    assert [alarm.name for alarm in alarms] == ["disagreement"]
    assert "20 of 20 answers that passed do not pass strict" in alarms[0].text
    assert metrics["watch/disagreement"] == 1.0
    assert names(watch(second=agree, second_verifier="strict"), mixed(20)) == []


def test_only_a_sample_goes_to_the_second_verifier(watch):
    asked = []
    watcher = watch(second=lambda c, e: asked.append(c) or True, second_verifier="strict", second_rows=8)
    watcher.batch([mixed(20)])
    assert len(asked) == 8


def test_a_reward_that_rises_while_held_out_accuracy_falls_is_reported(watch):
    watcher = watch(policy=Policy((0.6, 0.1), (0.62, 0.1), (0.3, 0.1)), every=1)
    assert names(watcher, mixed(5)) == []
    assert names(watcher, mixed(8)) == []
    metrics, alarms = watcher.batch([mixed(12)])
    assert [alarm.name for alarm in alarms] == ["held_out"]
    assert metrics["watch/held_out_accuracy"] == 0.3


def test_a_falling_reward_with_falling_accuracy_raises_nothing(watch):
    watcher = watch(policy=Policy((0.6, 0.1), (0.3, 0.1)), every=1)
    assert names(watcher, mixed(8)) == []
    assert names(watcher, mixed(5)) == []


def test_a_policy_that_stops_using_images_is_reported(watch):
    watcher = watch(policy=Policy((0.8, 0.1), (0.5, 0.48)), every=1, stop_on=("blind",))
    assert names(watcher, mixed(8)) == []
    metrics, alarms = watcher.batch([mixed(8)])
    assert metrics["watch/held_out_accuracy_blanked"] == 0.48
    with pytest.raises(RewardAlarm, match="has stopped using the images"):
        watcher.stop_for(alarms)


def test_rows_that_never_needed_their_images_raise_nothing(watch):
    watcher = watch(policy=Policy((0.8, 0.78), (0.8, 0.79)), every=1)
    assert [names(watcher, mixed(8)) for _ in range(2)] == [[], []]


def test_held_out_rows_are_evaluated_at_a_fixed_interval(watch):
    policy = Policy((0.5, 0.1), (0.5, 0.1))
    watcher = watch(policy=policy, every=3)
    looked = ["watch/held_out_accuracy" in watcher.batch([mixed(8)])[0] for _ in range(6)]
    assert looked == [True, False, False, True, False, False]


def test_a_blanked_row_keeps_its_images_sizes_and_everything_else():
    row = blanked(ROWS[3])
    assert row["images"][0].size == (8, 8)
    assert row["images"][0].rgb().getpixel((3, 3)) == (128, 128, 128)
    assert ROWS[3]["images"][0].getpixel((3, 3)) == (3, 0, 0)
    assert row["id"] == "held-3"


def test_a_mean_that_is_not_a_number_is_an_alarm_and_does_not_silence_the_next(watch):
    watcher = watch(stop_on=())
    for _ in range(6):
        assert names(watcher, mixed(10)) == []
    poisoned = Verdict.correct("7")
    object.__setattr__(poisoned, "score", float("nan"))  # which Verdict itself refuses
    assert "jump" in names(watcher, mixed(10, wrong=poisoned))
    assert names(watcher, mixed(10)) == []
    assert "jump" in names(watcher, mixed(20))
