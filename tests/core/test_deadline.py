"""Untrusted programs end: chat templates and patterns that loop are stopped with a clear line."""

import itertools
import re
import signal
import threading

import pytest

from core import deadline as module
from core.deadline import TooSlow, deadline

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(module, "LIMIT_S", 0.3)


def test_python_and_a_regular_expression_are_stopped_and_the_old_handler_is_back():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TooSlow, match=r"the loop: not done after 0.3 s"), deadline("the loop"):
        sum(1 for _ in itertools.count())
    with pytest.raises(TooSlow), deadline("the pattern"):
        re.match(r"(.*)*(.*)*(.*)*x", "a" * 60)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_quick_work_and_other_threads_are_not_stopped():
    with deadline("quick"):
        found = sum(range(10))
    results = []

    def work():
        with deadline("elsewhere"):
            results.append(found)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [45]


def test_a_chat_template_that_loops_stops_an_import_and_a_learner(tmp_path):
    from core.checkpoint.released import import_released
    from core.checkpoint.shards import LayoutError
    from core.model.prompts import messages
    from core.model.tiny import TinySize, build_tiny
    from core.training.model import load_processor

    from .released_reference import write_released

    there = write_released(tmp_path / "released")
    (there / "chat_template.jinja").write_text(LOOP)
    with pytest.raises(
        LayoutError, match=r"the shipped chat template .* not done after 0.3 s.*; remove the template"
    ):
        import_released(there, tmp_path / "native")
    assert not (tmp_path / "native").exists()

    native = build_tiny(tmp_path / "core", words=["A"], seed=0, size=TinySize())
    row = {"question": "A", "mode": "direct", "images": []}
    assert "A" in load_processor(native).apply_chat_template(messages(row), tokenize=False)
    (native / "chat_template.jinja").write_text(LOOP)
    with pytest.raises(TooSlow, match=r"chat_template.jinja of the core: use another template: not done"):
        load_processor(native).apply_chat_template(messages(row), tokenize=False)
