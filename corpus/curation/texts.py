r"""Operators on the texts of a row: instructions, format, redundant chains. None of them asks a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Literal

from pydantic import Field

from corpus.curation.base import Dropped, Outcome, RowOperator, Tools
from corpus.formats.fields import gold_of
from corpus.formats.gold import kind_of
from corpus.schema import Record

_SYSTEM = re.compile(
    r"^\s*(?:(?:system|<<SYS>>)\s*[:\n]\s*|you are (?:an?|the) [^.\n]{0,80}(?:assistant|expert|model|ai|tutor)\b)"
    r"[^\n]*(?:\n|$)",
    re.IGNORECASE,
)
_CLAUSES = "|".join(
    (
        r"(?:please )?(?:directly )?answer (?:the question )?(?:directly )?(?:using|with|in) (?:a |one|only)"
        r"[^.\n]*",
        r"(?:please )?(?:directly )?answer (?:directly )?with the (?:option'?s? )?(?:correct )?letter[^.\n]*",
        r"(?:please )?(?:provide|give|put|write|enclose|output) (?:your |the )?(?:final |short )?(?:answer|solution)"
        r"[^.\n]*(?:box|tag|at the end|<answer>|<think>|directly)[^.\n]*",
        r"(?:please )?(?:let'?s )?(?:think|reason|solve)[^.\n]{0,40} step[- ]by[- ]step[^.\n]*",
        r"(?:first|please) (?:think|reason|analy[sz]e)[^.\n]*(?:then|before) [^.\n]*answer[^.\n]*",
        r"hint: (?:please )?(?:answer|provide)[^\n]*?(?=\s*question:|\n|$)",
        r"do not (?:explain|show|give any)[^.\n]*",
        r"(?:please )?answer (?:the question )?(?:directly|briefly)\b[^.\n]*",
        r"you (?:first|must) think[^.\n]*",
    )
)
_INSTRUCTION = re.compile(
    rf"(?:(?<=^)|(?<=[\n.?!:>)])\s*)(?:{_CLAUSES})[.:]?(?=\s|$)", re.IGNORECASE | re.MULTILINE
)
_LABEL = re.compile(r"^\s*question:\s*", re.IGNORECASE)


class StripInstructions(RowOperator):
    """Remove the system message, and system prompts and hints about the form of the answer in the question.

    Source: SAIL-VL2 (arXiv:2509.14033), section 4, LongCoT data, step 1: strip text that is foreign to the reasoning
    (system prompts, conflicting hints). The chain's mode alone decides the form of the reply. The patterns are ours.
    A question that consists only of instructions is dropped.

    >>> row = {"question": "You are a helpful assistant.\\nHow many? Answer with a single word.", "meta": {}}
    >>> StripInstructions(op="strip_instructions")([row], None)[0]["question"]
    'How many?'
    """

    op: Literal["strip_instructions"]

    def __call__(self, rows: Sequence[Record], tools: Tools) -> list[Outcome]:
        return [self._one(row) for row in rows]

    def _one(self, row: Record) -> Outcome:
        question = stripped(row["question"])
        return (
            {**row, "system": None, "question": question}
            if question
            else Dropped("the question is only instructions")
        )


def stripped(question: str) -> str:
    """The question without system prompts and instructions about the form of the answer."""
    text = _INSTRUCTION.sub("", _SYSTEM.sub("", question))
    text = _LABEL.sub("", text)
    return re.sub(r"[ \t]+(?=\n|$)", "", re.sub(r"\n{3,}", "\n\n", text)).strip()


_THINK = re.compile(r"\s*<think(?:ing)?>(.*?)</think(?:ing)?>(.*)", re.DOTALL)
_SECTIONS = re.compile(
    r"<(SUMMARY|CAPTION|REASONING)>(.*?)</\1>|<CONCLUSION>(?P<end>.*?)</CONCLUSION>",
    re.DOTALL | re.IGNORECASE,
)
_MARKED = re.compile(r"\\boxed|</?(?:think|summary|reasoning|conclusion|answer)", re.IGNORECASE)
_FINAL = re.compile(
    r"\s*(?:(?:therefore|thus|so|hence),?\s*)?(?:the )?(?:final )?answer(?: is|:)\s*:?[^\n]*$", re.IGNORECASE
)


class UnifyFormat(RowOperator):
    r"""Bring a think row to one format: a chain without tags and an answer without a box, which the model sees as
    `<think>chain</think>\boxed{answer}`. Direct rows pass.

    Source: SAIL-VL2 (arXiv:2509.14033), section 4, LongCoT data, steps 2 and 5. Understood are think tags, LLaVA-CoT's
    sections, and replies that end in `\boxed{}` or "The answer is ...". A row is dropped if its reply ends in none of
    them, if no reasoning is left, or if the reply's answer differs from the gold.

    >>> row = {"mode": "think", "response": r"2 + 2 = 4. The answer is 4.", "chain": None, "answer": "4"}
    >>> UnifyFormat(op="unify_format")([row], None)[0]["chain"]
    '2 + 2 = 4.'
    """

    op: Literal["unify_format"]
    mode: Literal["keep", "think", "direct"] = "keep"
    """think: rows become think rows; a reply without reasoning leaves a row without a chain, for `guided_chain` or RL.
    direct: think rows with a gold answer lose their chains; direct rows keep their reply."""
    gold: Literal["keep", "replace"] = "keep"
    """keep: drop a row whose reply has another answer than its gold; replace: the reply's answer becomes the gold."""

    def __call__(self, rows: Sequence[Record], tools: Tools) -> list[Outcome]:
        return [self._one(row) for row in rows]

    def _one(self, row: Record) -> Outcome:
        if self.mode == "direct" and row["mode"] == "think" and row["answer"]:
            return {**row, "mode": "direct", "chain": None, "response": None}
        if self.mode == "think":
            row = {**row, "mode": "think"}
        if row["mode"] != "think" or not (row.get("response") or row.get("chain")):
            return row
        if not row.get("response") and not _MARKED.search(row["chain"]):
            return row
        chain, found = split(row.get("response") or row["chain"])
        if not found:
            return Dropped("no answer at the end of the reply")
        if not chain and self.mode != "think":
            return Dropped("no reasoning before the answer")
        gold = row["answer"] or found
        if _plain(found) != _plain(gold) and self.gold == "keep":
            return Dropped("the reply's answer differs from the gold", f"{found!r:.60} and {gold!r:.60}")
        answer = gold if self.gold == "keep" else found
        verifier = (
            kind_of(answer, row["verifier"] == "choice")[1] if row["verifier"] == "none" else row["verifier"]
        )
        return {**row, "chain": chain or None, "answer": answer, "response": None, "verifier": verifier}


def split(reply: str) -> tuple[str, str]:
    """The chain and the answer of a reply in any of the known forms; "" for a part that it lacks."""
    if found := _THINK.fullmatch(reply):
        rest = found[2].strip()
        return found[1].strip(), gold_of(rest) or rest
    sections = list(_SECTIONS.finditer(reply))
    if sections:
        end = next((one["end"].strip() for one in sections if one["end"] is not None), "")
        return "\n".join(one[2].strip() for one in sections if one[2] is not None), gold_of(end) or end
    answer = gold_of(reply)
    if not answer or answer == reply.strip():
        return "", answer
    at = reply.rfind("\\boxed")
    if at >= 0:
        before = reply[:at].rsplit("\n", 1)
        chain = (
            reply[:at]
            if len(before) == 1
            else before[0] + ("\n" + before[1] if len(before[1].split()) > 6 else "")
        )
        return re.sub(r"[\s$]*(?:(?:is|:|=)\s*)?[\s$]*$", "", _FINAL.sub("", chain)).strip(), answer
    return _FINAL.sub("", reply).strip(), answer


def _plain(answer: str) -> str:
    """An answer for comparison: without case, spaces, TeX's thin marks and a final full stop."""
    answer = re.sub(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}|\\[,!; ]|\\left|\\right", r"\1", answer)
    return re.sub(r"[\s$,]+", "", answer).casefold().rstrip(".").strip("()")


_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[^\w\s]")
_EMPTY_WORDS = frozenset(
    "answer final correct result therefore hence picture image shown seen option choice".split()
)
"""Words that say nothing about a solution, beside scikit-learn's list of English stop words."""


class Redundancy(RowOperator):
    """Drop chains whose tokens overlap too much with the answer: they restate it and do not reason.

    Source: SAIL-VL2 (arXiv:2509.14033), section 4, LongCoT data, step 6. The report gives no measure. Ours are the
    share of the chain's distinct tokens that are in the answer, and the number of those that are in neither answer nor
    question, without words such as "the", "is", "answer".

    >>> row = {"mode": "think", "chain": "The answer is 12.", "answer": "12", "question": "How many?"}
    >>> Redundancy(op="redundancy")([row], None)[0].reason
    'the chain restates the answer'
    """

    op: Literal["redundancy"]
    max_overlap: float = Field(default=0.8, gt=0, le=1)
    """Largest share of the chain's tokens that may come from the answer."""
    min_new: int = Field(default=1, ge=0)
    """Least number of distinct tokens that are in neither of them; a chain with fewer restates both."""

    def __call__(self, rows: Sequence[Record], tools: Tools) -> list[Outcome]:
        return [self._one(row) for row in rows]

    def _one(self, row: Record) -> Outcome:
        if not row.get("chain"):
            return row
        of_chain, of_answer = _tokens(row["chain"]), _tokens(row["answer"])
        if not of_chain - of_answer:
            return Dropped("the chain restates the answer")
        new = of_chain - of_answer - _tokens(row["question"])
        if len(new) < self.min_new:
            return Dropped(
                "the chain restates question and answer", f"new: {', '.join(sorted(new)) or 'nothing'}"
            )
        if len(of_chain & of_answer) / len(of_chain) > self.max_overlap:
            return Dropped("the chain restates the answer", "overlap with the answer alone")
        return row


@cache
def _stop_words() -> frozenset[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return ENGLISH_STOP_WORDS | _EMPTY_WORDS


def _tokens(text: str) -> set[str]:
    return {word for word in _TOKEN.findall(text.casefold()) if word[0].isalnum()} - _stop_words()
