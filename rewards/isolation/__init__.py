"""Users' rewards under limits: a deadline always, and by default a process of their own.

| file | idea |
|---|---|
| limits | which rewards come under limits |
| progress | which rows are under way, and since when |
| shared | a reward in this process, with a deadline alone |
| isolated | a reward in a process of its own: blame, and grading again |
| process | that process as its parent sees it |
| worker | that process itself |
"""

from rewards.isolation.isolated import Isolated
from rewards.isolation.limits import DEADLINE_S, MEMORY_GIB, load_limited

__all__ = ["DEADLINE_S", "MEMORY_GIB", "Isolated", "load_limited"]
