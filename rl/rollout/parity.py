"""Parity guard: after a weight update, rollout servers and learner must give the same tokens the same probability.

Silent off-policy training does not show in the reward curve at first. Its causes include a stale output head, image
features from an old vision tower, and a token banned on one side only. Scoring a few sequences on both sides finds
each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rl.config import Parity
from rl.rollout.client import RolloutClient
from rl.rollout.messages import Answer, Prompt, Sampling

CAUSES = """likely causes:
  - a weight that the servers kept (tied lm_head not sent; a tensor name that the server maps elsewhere)
  - a cache that was not reset after the update (multimodal, encoder and prefix caches hold old features)
  - a token banned in sampling but not in the learner, or another temperature on the two sides
  - other precision on the two sides: compare learner.dtype and servers.dtype, then raise parity.bound if it is that
  - another chat template or image processor in the served folder than in the learner's"""


class ParityError(RuntimeError):
    """Rollout servers and learner disagree about a token's probability; further training would be off-policy."""


class ParityGuard:
    """Scores probe prompts on both sides. The prompts are always the same, because only repeats reveal stale caches.

    Args:
        cfg: number of probes, their length and the bound.
        prompts: probe conversations, images included.
        temperature: the rollouts' temperature; the guard compares the distributions used in training.
    """

    def __init__(self, cfg: Parity, prompts: Sequence[Prompt], temperature: float) -> None:
        self.cfg = cfg
        self.prompts = list(prompts[: cfg.sequences])
        self.sampling = Sampling(max_tokens=cfg.tokens, temperature=temperature)

    def sample(self, client: RolloutClient) -> list[Answer]:
        """The servers' side: one short completion per probe with its log-probabilities.

        Every serving server answers every probe, so that a server that missed the update is found.
        """
        return client.ask_each(self.prompts, self.sampling)

    def check(
        self, answers: Sequence[Answer], score: Callable[[int, Answer], Sequence[float]], servers: int
    ) -> float:
        """Largest absolute difference over all probe tokens; raise ParityError above the bound.

        Args:
            answers: from `sample`.
            score: `score(probe index, answer)` gives the learner's log-probabilities of the completion's tokens.
            servers: number of servers that answered each probe; their answers are adjacent in `answers`.
        """
        worst, where, compared = 0.0, "", 0
        for at, answer in enumerate(answers):
            sampled = answer.completions[0]
            if not sampled.token_ids:
                continue
            learner = score(at // servers, answer)
            for position, (ours, theirs) in enumerate(zip(learner, sampled.logprobs, strict=True)):
                difference = abs(ours - theirs)
                difference = math.inf if math.isnan(difference) else difference
                compared += 1
                if difference > worst:
                    worst = difference
                    where = (
                        f"probe {at // servers}, server {at % servers}, token {position} "
                        f"(id {sampled.token_ids[position]}): learner {ours:.6f}, server {theirs:.6f}"
                    )
        if not compared:
            raise ParityError(
                f"after the weight update none of {len(answers)} probes has a token to compare: do the servers end "
                "every completion at once?"
            )
        if not worst <= self.cfg.bound:
            raise ParityError(
                f"after the weight update a log-probability differs by {worst:.3g}, above parity.bound="
                f"{self.cfg.bound:g}\n  {where}\n{CAUSES}"
            )
        return worst

    def gate(self, client: RolloutClient, checked: Sequence[Answer], servers: int) -> Callable[[str], None]:
        """The check of a server that comes back between two updates: `Served.gate`.

        The learner cannot score then, because all its ranks would have to take part. Instead the server answers the
        same probes with the same seeds. It must give the same tokens the same probability as the answers that the
        learner checked after the last update, up to the first token that rounding makes different.
        """
        references = list(checked[::servers])

        def check(url: str) -> None:
            answers = client.ask(url, self.prompts, self.sampling)
            compared, worst = 0, 0.0
            for answer, reference in zip(answers, references, strict=True):
                if answer.prompt_ids != reference.prompt_ids:
                    raise ParityError(f"{url} renders a probe's prompt differently from the other servers")
                ours, theirs = reference.completions[0], answer.completions[0]
                for at, (known, token) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=False)):
                    if known != token:
                        break
                    difference = abs(ours.logprobs[at] - theirs.logprobs[at])
                    worst = max(worst, math.inf if math.isnan(difference) else difference)
                    compared += 1
            if not worst <= self.cfg.bound or not compared:
                raise ParityError(
                    f"on {compared} tokens of the probes a log-probability differs by {worst:.3g} from the servers "
                    f"that were checked after the last update (parity.bound={self.cfg.bound:g}, of one token or more)"
                )

        return check
