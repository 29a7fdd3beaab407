"""On-policy distillation: a teacher on rollout servers scores the student's own completions, token by token.

The objective is the reverse KL divergence per token: the mean of log student - log teacher over the student's samples
(GKD, arXiv:2306.13649, with student data only and reverse KL; MiniLLM, arXiv:2306.08543). Its policy gradient gives
each token the advantage log teacher - log student. TRL's loss takes advantages per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rl.config import Teacher
from rl.rollout.access import read_token
from rl.rollout.http import Http, RolloutError
from rl.rollout.messages import CoreFacts, Prompt, Sampling, completion_request

RENDER, GENERATE = "v1/chat/completions/render", "inference/v1/generate"


class TeacherClient:
    """Asks a teacher's servers for log-probabilities of given completions. Safe to use from one thread at a time.

    Args:
        cfg: the teacher's servers.
        image_token: id of the token that stands for a part of an image.
    """

    def __init__(self, cfg: Teacher, image_token: int) -> None:
        self.image_token = image_token
        self.urls = [url.rstrip("/") for url in cfg.urls]
        under_way = cfg.concurrency * len(self.urls)
        self.http = Http(read_token(Path(cfg.token_file)), cfg.request_timeout_s, under_way)
        self._threads = ThreadPoolExecutor(under_way, thread_name_prefix="teacher")

    def score(
        self,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[list[int]],
        completions: Sequence[list[list[int]]],
    ) -> list[list[list[float]]]:
        """Log-probabilities [prompt][completion][token] under the teacher, at temperature 1.

        Each prompt is rendered by the teacher's own server; `prompt_ids` are the student's tokens of it. Raises
        RolloutError if they differ, or if a server does not answer.
        """
        futures = [
            self._threads.submit(self._score_group, self.urls[turn % len(self.urls)], *group)
            for turn, group in enumerate(zip(prompts, prompt_ids, completions, strict=True))
        ]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Close the connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.http.close()

    def _score_group(
        self, url: str, prompt: Prompt, prompt_ids: list[int], completions: list[list[int]]
    ) -> list[list[float]]:
        request = completion_request(prompt, Sampling(max_tokens=1), CoreFacts(banned_ids=()))
        rendered = self.http.ask(url, RENDER, request)
        if rendered["token_ids"] != prompt_ids:
            raise RolloutError(
                f"{url}: the teacher renders a prompt as {len(rendered['token_ids'])} tokens, the student as "
                f"{len(prompt_ids)}, or as different ones; distillation needs the same tokenizer, chat template and "
                "image processor"
            )
        rendered = {**rendered, "features": image_tokens_only(rendered, self.image_token)}
        return [self._score(url, rendered, completion) for completion in completions]

    def _score(self, url: str, rendered: Mapping[str, Any], completion: list[int]) -> list[float]:
        body = {
            "token_ids": [*rendered["token_ids"], *completion],
            "features": rendered.get("features"),
            "sampling_params": {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0},
        }
        found = (
            self.http.ask(url, GENERATE, body)["prompt_logprobs"][-len(completion) :] if completion else []
        )
        return [float(by_id[str(token)]["logprob"]) for by_id, token in zip(found, completion, strict=True)]


def image_tokens_only(rendered: Mapping[str, Any], image_token: int) -> Any:
    """The features of a rendered prompt, with placeholder ranges that hold nothing but image tokens.

    vLLM 0.31 renders the range of an image from `<img>` to `</img>`, and its reply does not say which of these tokens
    stand for features. If they all did, the engine would expect two features more than the image has, and fail.
    """
    features = rendered.get("features")
    if not features or "mm_placeholders" not in features:
        return features
    narrowed: dict[str, list[dict[str, int]]] = {}
    for kind, ranges in features["mm_placeholders"].items():
        narrowed[kind] = []
        for one in ranges:
            ids = rendered["token_ids"][one["offset"] : one["offset"] + one["length"]]
            start = one["offset"] + ids.index(image_token)
            narrowed[kind].append({"offset": start, "length": ids.count(image_token)})
    return {**features, "mm_placeholders": narrowed}


def token_advantages(rows: Sequence[Mapping[str, Any]], mask: Any) -> Any:
    """Advantages (rows, completion tokens) of TRL's batch: log teacher - log student; 0 where `mask` is 0.

    Args:
        rows: TRL's rows, with `teacher_logprobs` and `logprobs` of their completions.
        mask: TRL's completion mask, same shape as the result.
    """
    import torch

    advantages = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    for number, row in enumerate(rows):
        gap = torch.tensor(row["teacher_logprobs"]) - torch.tensor(row["logprobs"])
        advantages[number, : len(gap)] = gap.to(mask.device)
    return advantages * mask
