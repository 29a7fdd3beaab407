r"""LaTeX to sympy: latex2sympy's grammar and conversion, with predictions that are worked out once.

Source: latex2sympy2_extended 1.11 over antlr4 4.13. ANTLR remembers what it has worked out about a decision
unless the decision depends on the rules it is in; with this grammar that is so at every power, and most of the
time of parsing goes into working out the same again. `_Simulator` remembers those too. The result is ANTLR's
own, for it depends on nothing but what the memory is keyed by: the decision, the stack of rules, the
precedence (the grammar's only predicates) and the tokens looked at.

A number written in digits becomes sympy's without sympy's parser, which executes `from sympy import *` for it.
"""

import re
from functools import cache
from typing import Any

MAX_REMEMBERED = 1 << 16
"""Decisions; a hostile text makes many that never come again."""
_INTEGER = re.compile(r"[0-9]+")
_DECIMAL = re.compile(r"[0-9]+\.[0-9]+")


def to_sympy(latex: str, real: bool) -> Any:
    r"""sympy's expression of normalised LaTeX. Raises whatever ANTLR and sympy raise. May hang or crash.

    >>> to_sympy(r"\frac{x^2}{2}", real=True)
    x**2/2
    """
    return _converter()(None, is_real=real).parse(latex)


@cache
def _converter() -> Any:
    """latex2sympy's converter with our simulator; made late, for its imports take a second."""
    from antlr4.atn.ParserATNSimulator import ParserATNSimulator
    from antlr4.Parser import Parser
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
    from sympy import Float, Integer

    remembered: dict[Any, Any] = {}
    """(decision, precedence, stack) -> token -> token -> ... -> alternative."""

    class _Simulator(ParserATNSimulator):
        _looked_at = 0

        def adaptivePredict(self, input: Any, decision: int, outerContext: Any) -> int:
            stack = []
            context = outerContext
            while context is not None:
                stack.append(context.invokingState)
                context = context.parentCtx
            key = decision, self.parser.getPrecedence(), *stack
            known, ahead = remembered.get(key), 0
            while type(known) is dict:
                ahead += 1
                known = known.get(input.LA(ahead))
            if known is not None:
                return known
            self._looked_at = 0
            alternative = super().adaptivePredict(input, decision, outerContext)
            if self._looked_at:
                if len(remembered) >= MAX_REMEMBERED:
                    remembered.clear()
                level = remembered.setdefault(key, {})
                for ahead in range(1, self._looked_at):
                    level = level.setdefault(input.LA(ahead), {})
                level[input.LA(self._looked_at)] = alternative
            return alternative

        def execATNWithFullContext(
            self, dfa: Any, D: Any, s0: Any, input: Any, startIndex: int, outerContext: Any
        ) -> int:
            alternative = super().execATNWithFullContext(dfa, D, s0, input, startIndex, outerContext)
            self._looked_at = input.index - startIndex + 1
            return alternative

    class _Converter(_Latex2Sympy):
        def create_parser(self, latex_str: str) -> Parser:
            parser = super().create_parser(latex_str)
            stock = parser._interp
            parser._interp = _Simulator(parser, stock.atn, stock.decisionToDFA, stock.sharedContextCache)
            return parser

        def parse_number(self, text: str) -> Any:
            digits = text.replace(",", "")
            if _INTEGER.fullmatch(digits):
                return Integer(int(digits))
            if _DECIMAL.fullmatch(digits):
                return Float(digits)
            return super().parse_number(text)

    return _Converter
