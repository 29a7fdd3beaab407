"""Rewards of a stage are checked before it trains: they know whether the chat template opens the thought."""

import pytest

from rewards.answer import AnswerReward
from rewards.mix import Mixture, Term
from rewards.style.format import ThinkFormat
from rl.check import check_rewards
from rl.rollout.messages import CoreFacts

from .conftest import record


def mixture(opened):
    return Mixture(
        [Term("answer", AnswerReward(thought_open=opened), 0.5), Term("format", ThinkFormat(opened), 0.5)]
    )


@pytest.mark.parametrize("opened", [True, False])
def test_a_reward_that_expects_the_thought_elsewhere_is_refused(opened):
    rows = [record(0, image=False)]
    check_rewards(mixture(opened), rows, rows=1, seed=0, thought_open=opened)
    with pytest.raises(
        ValueError, match=rf"reward answer: thought_open={opened}, .*thought_open: {str(not opened).lower()}$"
    ):
        check_rewards(mixture(opened), rows, rows=0, seed=0, thought_open=not opened)


def test_rewards_of_direct_rows_have_no_thought():
    direct = Mixture([Term("answer", AnswerReward(), 1.0, modes=frozenset({"direct"}))])
    check_rewards(direct, [record(0, mode="direct", image=False)], rows=1, seed=0, thought_open=True)


def test_the_core_says_whether_its_template_opens_the_thought(tmp_path):
    from core.model.tiny import build_tiny

    model = build_tiny(tmp_path / "core", words=["compute"], seed=0)
    template = model / "chat_template.jinja"
    shipped = template.read_text()
    assert CoreFacts.of(model).thought_open is False
    template.write_text(shipped + "{#- a template may mention <think> and not write it -#}")
    assert CoreFacts.of(model).thought_open is False
    template.write_text(shipped.replace(r"assistant\n'", r"assistant\n<think>\n'"))
    assert CoreFacts.of(model).thought_open is True
