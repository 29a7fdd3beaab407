"""How an answer is compared with its gold: one module for each kind of answer.

Each comparison runs text -> parsed value -> comparison by the type of the value -> Outcome. If the types cannot
decide, the comparison stays open as a formula of expression pairs (rewards.answers.outcome). A worker process settles
that formula with sympy (rewards.pool, rewards.answers.checker).

| module | idea |
|---|---|
| outcome | the outcomes, and comparisons that are still open |
| kind | the interface of a kind of answer: a check of the gold and a comparison |
| text, number, choice, collection, json, boxes, quantity, math | the kinds |
| plain, notation | texts without typography; the structure of an answer in LaTeX |
| values, region | the values of mathematical answers, and how texts are read into them |
| compare | two values compared by their types |
| algebra | exact values of everyday expressions |
| expression, latex, warmed | sympy and math-verify, inside the worker only |
| checker | settles open comparisons in worker processes, and remembers the outcomes |
"""
