r"""LaTeX to sympy: latex2sympy's grammar and conversion, with cached predictions.

Source: latex2sympy2_extended 1.11 over antlr4 4.13. ANTLR caches its prediction for a decision unless the prediction
depends on the stack of rules. In this grammar it does at every power, and repeated predictions take most of the
parsing time. `_Simulator` caches those too. The result equals ANTLR's, because a prediction depends only on the
cache's key: the decision, the stack of rules, the precedence (the grammar's only predicates) and the tokens read.

A number written in digits is converted without sympy's parser, which executes `from sympy import *` each time.
"""

import re
from functools import cache
from typing import Any

MAX_REMEMBERED = 1 << 16
"""Most cached decisions; a hostile text makes many that never recur."""
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
    """latex2sympy's converter with our simulator; created at first use, because its imports take a second."""
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
