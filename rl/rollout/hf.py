"""A rollout server over transformers' `generate`, for machines without vLLM. Same endpoints, far slower.

Speaks the part of vLLM's HTTP interface that `RolloutClient` uses: /health, /v1/chat/completions, weight updates and
their version, cache resets, sleeping and waking (on a GPU the model moves to the CPU and back); what
rl.distill.TeacherClient uses: rendering a prompt, and scoring given tokens; and what `posttrain chat` and other clients
of the OpenAI API use: /v1/models, requests without our fields, and streams (the answer comes in one piece). Requests
that arrive together and ask for the same sampling are generated as one batch.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import queue
import threading
import traceback
from concurrent.futures import Future
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rl.rollout import access
from rl.rollout.config import MODEL_NAME
from rl.rollout.routing import Recorder, Routing, written

MAX_BATCH = 64
GATHER_S = 0.02
"""Seconds that the first request of a batch waits for others."""
MAX_BODY = 256 * 2**20
"""Largest request body, bytes."""
DEFAULTS = {"n": 1, "temperature": 1.0, "top_p": 1.0, "max_tokens": 1024}
"""Sampling of a request that does not name it: the OpenAI API's, with a bound on the tokens."""


class Engine:
    """The model and the one thread that runs it.

    Args:
        folder: checkpoint folder (architecture, tokenizer, processor, first weights).
        dtype: name of torch's data type of the weights; None: the checkpoint's.
        routing_replay: whether completions come with the experts that a mixture of experts chose.
    """

    def __init__(self, folder: Path, dtype: str | None = None, routing_replay: bool = False) -> None:
        import torch

        import core
        from core.checkpoint.check import check_checkpoint
        from core.training.model import load_processor

        check_checkpoint(folder)
        core.register()
        from transformers import AutoModelForImageTextToText

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype or "auto", trust_remote_code=False
        ).eval()
        self.model.to(self.device)
        if routing_replay:
            Routing.of(self.model.config.text_config.to_dict())  # raises for a dense core
        self.routing_replay = routing_replay
        self.processor = load_processor(folder)
        self.processor.tokenizer.padding_side = "left"
        self.jobs: queue.Queue[tuple[str, dict, Future]] = queue.Queue()
        threading.Thread(target=self._serve, daemon=True, name="engine").start()

    def ask(self, kind: str, body: dict) -> dict:
        """Pass a job to the engine's thread and wait for its reply."""
        future: Future = Future()
        self.jobs.put((kind, body, future))
        return future.result()

    def _serve(self) -> None:
        waiting: list[tuple[str, dict, Future]] = []
        while True:
            waiting = waiting or [self.jobs.get()]
            while len(waiting) < MAX_BATCH:
                try:
                    waiting.append(self.jobs.get(timeout=GATHER_S))
                except queue.Empty:
                    break
            batch, waiting = _alike(waiting)
            try:
                replies = self._run(batch[0][0], [body for _, body, _ in batch])
            except Exception as error:  # one bad request must not end the server; its caller gets the error
                traceback.print_exc()
                for _, _, future in batch:
                    future.set_exception(error)
            else:
                for (_, _, future), reply in zip(batch, replies, strict=True):
                    future.set_result(reply)

    def _run(self, kind: str, bodies: list[dict]) -> list[dict]:
        if kind == "update_weights":
            self._load(bodies[0]["update_info"])
            return [{}]
        if kind in ("sleep", "wake_up"):
            self.model.to("cpu" if kind == "sleep" else self.device)
            if self.device == "cuda":
                self.torch.cuda.empty_cache()
            return [{}]
        with self.torch.no_grad():
            if kind == "render":
                ids = self._inputs(bodies)["input_ids"][0].tolist()
                # `features` go back to `score` unread by the client.
                return [{"token_ids": ids, "features": {"messages": bodies[0]["messages"]}}]
            return [self._score(bodies[0])] if kind == "score" else self._generate(bodies)

    def _load(self, update: dict) -> None:
        from safetensors.torch import load_file

        weights = {name: tensor for path in update["paths"] for name, tensor in load_file(path).items()}
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        missing = [name for name in missing if name not in update["aliases"]]
        if missing or unexpected:
            raise ValueError(f"weight update: missing {missing[:5]}, unexpected {list(unexpected)[:5]}")

    def _inputs(self, bodies: list[dict]) -> Any:
        """The model's inputs for the requests' conversations, padded on the left."""
        return self.processor.apply_chat_template(
            [_messages(body) for body in bodies],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, **(bodies[0].get("mm_processor_kwargs") or {})},
            **(bodies[0].get("chat_template_kwargs") or {}),  # a batch has one, see _alike
        ).to(self.device)

    def _score(self, body: dict) -> dict:
        """Log-probabilities of the given tokens after a rendered prompt, in vLLM's form."""
        inputs = dict(self._inputs([body["features"]]))
        ids = self.torch.tensor([body["token_ids"]], device=self.device)
        inputs |= {"input_ids": ids, "attention_mask": self.torch.ones_like(ids)}
        logits = self.model(**inputs).logits[0, :-1].float().log_softmax(-1)
        found = logits.gather(-1, ids[0, 1:, None])[:, 0].tolist()
        scored = zip(body["token_ids"][1:], found, strict=True)
        return {"prompt_logprobs": [None, *({str(token): {"logprob": value}} for token, value in scored)]}

    def _generate(self, bodies: list[dict]) -> list[dict]:
        first = bodies[0]
        inputs = self._inputs(bodies)
        self.torch.manual_seed(first.get("seed") or 0)
        greedy = first["temperature"] == 0
        sampling = (
            {} if greedy else {"temperature": first["temperature"], "top_p": first["top_p"], "top_k": 0}
        )
        eos = self.model.generation_config.eos_token_id
        recorder = Recorder(self.model, len(bodies) * first["n"]) if self.routing_replay else None
        with recorder.running() if recorder else nullcontext():
            out = self.model.generate(
                **inputs,
                do_sample=not greedy,
                num_return_sequences=first["n"],
                max_new_tokens=first["max_tokens"],
                suppress_tokens=[int(token) for token in first.get("logit_bias", {})] or None,
                output_scores=True,
                return_dict_in_generate=True,
                **sampling,
            )
        length = inputs["input_ids"].shape[1]
        tokens = out.sequences[:, length:].cpu()
        # Scores are logits after temperature and token ban, so they give the sampling distribution.
        scores = self.torch.stack(out.scores, 1).float().log_softmax(-1).cpu()
        logprobs = scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        eos_ids = set(eos if isinstance(eos, list) else [eos])
        choices = [
            self._choice(row.tolist(), lp.tolist(), eos_ids) for row, lp in zip(tokens, logprobs, strict=True)
        ]
        if recorder:
            padding = (length - inputs["attention_mask"].sum(1)).repeat_interleave(first["n"]).tolist()
            for choice, experts, start in zip(choices, recorder.experts(), padding, strict=True):
                end = length + len(choice["token_ids"]) - 1  # the last token has not been read
                choice["routed_experts"] = written(experts[start:end])
        return [
            {
                "prompt_token_ids": ids[mask.bool()].tolist(),
                "choices": choices[at * first["n"] : (at + 1) * first["n"]],
            }
            for at, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True))
        ]

    def _choice(self, ids: list[int], logprobs: list[float], eos: set[int]) -> dict[str, Any]:
        end = next((at + 1 for at, token in enumerate(ids) if token in eos), None)
        ids, logprobs = ids[:end], logprobs[:end]
        return {
            "token_ids": ids,
            "logprobs": {"content": [{"logprob": value} for value in logprobs]},
            "finish_reason": "stop" if end else "length",
            "message": {"content": self.processor.tokenizer.decode(ids, skip_special_tokens=True)},
        }


def _alike(jobs: list) -> tuple[list, list]:
    """The jobs that can run in one batch with the first, and the rest. Seeded requests run alone to be repeatable."""
    keys = (
        "n",
        "temperature",
        "top_p",
        "max_tokens",
        "logit_bias",
        "chat_template_kwargs",
        "mm_processor_kwargs",
    )
    kind, body, _ = jobs[0]
    if kind != "generate" or (body["temperature"] > 0 and body.get("seed") is not None):
        return jobs[:1], jobs[1:]
    same = [job for job in jobs if job[0] == kind and all(job[1].get(key) == body.get(key) for key in keys)]
    return same, [job for job in jobs if job not in same]


def _messages(body: dict) -> list[dict]:
    """The request's conversation with its data URLs opened."""
    from core.model.pictures import Picture

    out = []
    for message in body["messages"]:
        parts = message["content"]
        if isinstance(parts, str):
            parts = [{"type": "text", "text": parts}]
        opened = []
        for part in parts:
            if part["type"] == "image_url":
                data = base64.b64decode(part["image_url"]["url"].split(",", 1)[1])
                part = {"type": "image", "image": Picture(data).rgb()}
            opened.append(part)
        out.append({"role": message["role"], "content": opened})
    return out


class Handler(BaseHTTPRequestHandler):
    """Routes of the server; `main` sets `engine` and `token`."""

    engine: Engine
    token: str
    weight_version = "default"
    """Version of the loaded weights, given by the client that loaded them; the initial value is vLLM's."""
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self._refused():
            return
        if self.path == "/weight_info":
            self._reply(200, {"weight_version": Handler.weight_version})
        elif self.path == "/v1/models":
            self._reply(200, {"object": "list", "data": [{"id": MODEL_NAME, "object": "model"}]})
        else:
            self._reply(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        if self._refused():
            self.close_connection = True  # its body was not read
            return
        length = int(self.headers.get("Content-Length") or 0)
        if length > MAX_BODY:
            self._reply(413, {"error": f"body of {length} bytes; at most {MAX_BODY}"})
            self.close_connection = True
            return
        body = json.loads(self.rfile.read(length) or b"{}")
        path = urlsplit(self.path).path
        kinds = {
            "/v1/chat/completions": "generate",
            "/v1/chat/completions/render": "render",
            "/inference/v1/generate": "score",
            "/update_weights": "update_weights",
            "/sleep": "sleep",
            "/wake_up": "wake_up",
        }
        if path == "/finish_weight_update":
            Handler.weight_version = body.get("weight_version") or Handler.weight_version
        no_ops = ("/start_weight_update", "/finish_weight_update")
        caches = ("/reset_mm_cache", "/reset_encoder_cache", "/reset_prefix_cache")
        if path in no_ops or path in caches:  # nothing is cached between requests here
            self._reply(200, {})
        elif path in kinds:
            if kinds[path] == "generate":
                body = DEFAULTS | body
            try:
                reply = self.engine.ask(kinds[path], body)
                self._stream(reply) if body.get("stream") else self._reply(200, reply)
            except Exception as error:  # sent to the client, which raises it
                self._reply(500, {"error": f"{type(error).__name__}: {error}"})
        else:
            self._reply(404, {"error": f"no such path: {self.path}"})

    def _refused(self) -> bool:
        """Whether the guard refused the request; if so, the reply is sent."""
        url = urlsplit(self.path)
        port = self.connection.getsockname()[1]
        refused = access.verdict(url.path, url.query, self.headers.get("Authorization"), port, self.token)
        if refused:
            self._reply(*refused)
        return refused is not None

    def log_message(self, *_: Any) -> None:
        pass

    def _stream(self, reply: dict) -> None:
        """Send a finished reply as server-sent events, one per choice."""
        choices = [
            {"index": at, "delta": choice["message"], "finish_reason": choice["finish_reason"]}
            for at, choice in enumerate(reply["choices"])
        ]
        events = [*(json.dumps({"choices": [choice]}) for choice in choices), "[DONE]"]
        self._send(200, "text/event-stream", "".join(f"data: {event}\n\n" for event in events).encode())

    def _reply(self, status: int, body: dict) -> None:
        self._send(status, "application/json", json.dumps(body).encode())

    def _send(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    """Serve a checkpoint folder until stopped."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", help="data type of the weights; default: the checkpoint's")
    parser.add_argument("--routing-replay", action="store_true", help="return the experts that are chosen")
    args = parser.parse_args()
    Handler.engine = Engine(args.model, args.dtype, args.routing_replay)
    Handler.token = os.environ[access.TOKEN]
    server = ThreadingHTTPServer((args.host, args.port), Handler)
    server.daemon_threads = True
    server.serve_forever()


if __name__ == "__main__":
    main()
