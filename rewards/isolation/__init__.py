"""Limits on users' rewards: a deadline in every case, and by default a separate process.

| file | purpose |
|---|---|
| limits | decides which rewards are limited |
| progress | records which rows are being graded, and since when |
| shared | a reward in this process, with only a deadline |
| isolated | a reward in a separate process: attributes failures to rows, and grades other rows again |
| process | the parent's side of that process |
| worker | the code of that process |
"""

from rewards.isolation.isolated import Isolated
from rewards.isolation.limits import DEADLINE_S, MEMORY_GIB, load_limited

__all__ = ["DEADLINE_S", "MEMORY_GIB", "Isolated", "load_limited"]
