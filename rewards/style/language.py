r"""The language reward: checks that the thought uses the script of the question.

A word is a run of letters of an alphabet, or one character of a script without spaces. LaTeX commands, code, tags,
numbers, names of variables and abbreviations (fewer than three letters, or only capitals) do not count. Languages that
share a script are not distinguished.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from rewards.example import Example
from rewards.extract import parse_thinking
from rewards.verdict import Status, Verdict

_WORD = re.compile(
    r"(?P<skip>```|`|\\[A-Za-z]+|</?[A-Za-z][A-Za-z0-9_-]{0,20}\s?/?>)"
    r"|(?P<latin>[A-Za-z\u00aa-\u024f\u1e00-\u1eff]+)"
    r"|(?P<han>[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
    r"|(?P<kana>[\u3040-\u30ff\u31f0-\u31ff])"
    r"|(?P<hangul>[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]+)"
    r"|(?P<cyrillic>[\u0400-\u052f]+)"
    r"|(?P<greek>[\u0370-\u03ff\u1f00-\u1fff]+)"
    r"|(?P<arabic>[\u0600-\u065f\u066e-\u06ef\u06fa-\u06ff\u0750-\u077f]+)"
    r"|(?P<hebrew>[\u0590-\u05ff]+)"
    r"|(?P<devanagari>[\u0900-\u0965\u0970-\u097f]+)"
    r"|(?P<thai>[\u0e01-\u0e4e])"
)
SCRIPTS = tuple(name for name in _WORD.groupindex if name != "skip")
_ALPHABETS = ("latin", "cyrillic", "greek")
"""Scripts whose letters also name variables."""


@dataclass(frozen=True)
class Language:
    r"""The share of the thought's words in the question's script; the score is 1 from the share `enough` on.

    Source: DeepSeek-R1 (arXiv:2501.12948), language consistency reward: the share of words in the target
    language. Differs from it: this reward compares scripts instead of languages, and a few foreign terms cost nothing.

    >>> row = Example("row-1", "图中三角形的面积是多少？", "6", "think")
    >>> Language()(r"<think>底是 $a=3$，高是 4，面积为 \frac{1}{2}\cdot 12 = 6。</think> \boxed{6}", row).score
    1.0
    >>> Language()(r"<think>The area of the triangle is six.</think> \boxed{6}", row).reason
    '0 of 5 words are han: latin 5'

    In direct mode the whole completion counts. A question or a thought without words scores 1.
    Raises ValueError for an unknown script, or `enough` outside (0, 1].
    """

    script: str | None = None
    """The script that every thought must use, one of SCRIPTS; None: the question's script."""
    enough: float = 0.9
    """Share of words in that script from which the score is 1."""
    thought_open: bool = False
    """Whether the chat template has already opened <think>, so that the completion starts inside the thought."""

    self_test: ClassVar[str] = "runs"

    def __post_init__(self) -> None:
        if self.script is not None and self.script not in SCRIPTS:
            raise ValueError(f"script={self.script!r}: it must be one of {', '.join(SCRIPTS)}")
        if not 0 < self.enough <= 1:
            raise ValueError(f"enough={self.enough}: it must be a share in (0, 1]")

    def __call__(self, completion: str, example: Example) -> Verdict:
        text: str | None = completion
        if example.mode == "think":
            text = parse_thinking(completion, self.thought_open).thought
        if not text or not text.strip():
            return Verdict.wrong(
                reason="no thought" if example.mode == "think" else "empty", status=Status.NO_ANSWER
            )
        wanted = _wanted(self.script, words_by_script(example.question))
        words = words_by_script(text)
        if not wanted or not words:
            return Verdict.correct(reason=f"no words in the {'thought' if wanted else 'question'}")
        right, every = sum(words[script] for script in wanted), words.total()
        score = min(right / every / self.enough, 1.0)
        listed = ", ".join(f"{script} {count}" for script, count in words.most_common())
        reason = f"{right} of {every} words are {' or '.join(wanted)}: {listed}"
        return Verdict(score, Status.CORRECT if score == 1 else Status.WRONG, None, reason)


def words_by_script(text: str) -> Counter[str]:
    r"""The number of words per script. Words in code count only if they outnumber the other words.

    >>> words_by_script(r"Set $\alpha = \frac{x}{2}$ in `code` and 求解")
    Counter({'latin': 2, 'han': 2})
    """
    plain: Counter[str] = Counter()
    code: Counter[str] = Counter()
    fence = ""
    for found in _WORD.finditer(text):
        script, word = found.lastgroup or "", found[0]
        if script == "skip":
            if word[0] == "`" and fence in ("", word):
                fence = "" if fence else word
        elif script not in _ALPHABETS or (len(word) > 2 and not word.isupper()):
            (code if fence else plain)[script] += 1
    # Code counts if it is most of the text, so that backticks cannot hide a thought.
    return plain if plain.total() >= code.total() else plain + code


def _wanted(script: str | None, question: Counter[str]) -> tuple[str, ...]:
    """The scripts that count as the question's; Japanese uses two."""
    if script is None:
        if not question:
            return ()
        script = "kana" if question["kana"] else question.most_common(1)[0][0]
    return ("kana", "han") if script == "kana" else (script,)
