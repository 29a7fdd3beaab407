"""A stock vLLM server of an imported checkpoint, asked by the official `openai` client, against transformers.

The server is started as a user starts it: by the folder's path, the plug-in found by its entry point. Images are cut
into tiles by the real rule (one to six, and a thumbnail), at a tile of 56 pixels so that it costs little.
"""

import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from core.checkpoint.released import import_released
from core.model.prompts import user_text

from .released_reference import write_released
from .serving import MAX_TOKENS, ONE_PROCESS, Reference, ask, data_url, encoded, picture, user, vllm_server

MAX_MODEL_LEN = 1024
MAX_IMAGES = 5
FLAGS = [
    *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8", "--block-size", "32"),
    *("--limit-mm-per-prompt", f'{{"image": {MAX_IMAGES}}}'),
    # On CPU a seeded request whose prompt is read in parts ends the engine: generators there cannot be rewound.
    "--no-enable-chunked-prefill",
]
TILES = {"max_dynamic_patch": 6, "processor_max_dynamic_patch": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    import_released(write_released(root / "released", select_layer=-2, **TILES), root / "core")
    return root / "core"


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[openai.OpenAI]:
    flags = [*FLAGS, "--distributed-executor-backend", "uni"]
    with (
        vllm_server(folder, folder.with_name("server.log"), *flags, environment=ONE_PROCESS) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        yield client


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


QUESTION = "What is the digit?"
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one tile": [user(picture(56, 56), QUESTION)],
    "two tiles and their thumbnail": [user(picture(131, 60), QUESTION)],
    "six tiles and their thumbnail": [user(picture(301, 207), QUESTION)],
    "a strip": [user(picture(700, 9), QUESTION)],
    "a dot": [user(picture(1, 1), QUESTION)],
    "five odd images": [
        user(*(picture(w, h) for w, h in [(33, 400), (56, 57), (113, 99), (5, 5), (250, 83)]), QUESTION)
    ],
    "text between images": [user("A is", picture(97, 61), "and B", picture(61, 97), "so what is A + B?")],
    "a JPEG": [user(picture(120, 77, kind="jpeg"), QUESTION)],
    "a picture with a palette": [user(picture(90, 40, mode="P"), QUESTION)],
    "text alone": [user("3 + 4?")],
    "text as a string": [{"role": "user", "content": "3 + 4?"}],
    "a system prompt": [{"role": "system", "content": "Be brief."}, user(picture(70, 140), QUESTION)],
    "a thinking prompt": [user(picture(70, 140), user_text(QUESTION, "think"))],
    "a direct prompt": [user(picture(70, 140), user_text(QUESTION, "direct"))],
    "images in several turns": [
        user(picture(56, 120), QUESTION),
        {"role": "assistant", "content": "<think>It looks like a 7.</think>7"},
        user(picture(120, 56), picture(60, 60), "And the sum of these?"),
        {"role": "assistant", "content": "9"},
        user("Sure?"),
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_text_and_log_probabilities_are_those_of_transformers(
    client: openai.OpenAI, reference: Reference, name: str
) -> None:
    _check_agreement(client, reference, CONVERSATIONS[name])


def _check_agreement(client: openai.OpenAI, reference: Reference, messages: list[dict[str, Any]]) -> None:
    tokens_as_ids = {"return_tokens_as_token_ids": True}  # bytes of a character have no text of their own
    reply = ask(client, messages, logprobs=True, top_logprobs=5, extra_body=tokens_as_ids)
    assert reply.prompt_token_ids == reference.inputs(messages)["input_ids"][0].tolist()
    ids, logprobs = reference.greedy(messages)
    choice = reply.choices[0]
    assert choice.token_ids == ids
    # At the end vLLM keeps back bytes that are no whole character yet.
    text = reference.processor.decode(ids, skip_special_tokens=True)
    assert choice.message.content.rstrip("\ufffd") == text.rstrip("\ufffd")
    for at, token in enumerate(choice.logprobs.content):
        assert token.logprob == pytest.approx(logprobs[at, ids[at]].item(), abs=1e-4)
        best = logprobs[at].topk(5)
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [top.token for top in token.top_logprobs] == [
            f"token_id:{top}" for top in best.indices.tolist()
        ]


def test_log_probabilities_of_a_prompt_between_and_after_images_are_those_of_transformers(
    client: openai.OpenAI, reference: Reference
) -> None:
    messages = CONVERSATIONS["images in several turns"]
    reply = ask(client, messages, max_tokens=1, extra_body={"prompt_logprobs": 0})
    seen = [next(iter(entry.values()))["logprob"] for entry in reply.prompt_logprobs[1:]]
    assert seen == pytest.approx(reference.score(messages, []), abs=1e-4)


def test_the_order_of_images_counts(client: openai.OpenAI) -> None:
    first, second = picture(60, 130), picture(130, 60)
    replies = [
        ask(client, [user(*images, QUESTION)], logprobs=True).choices[0].logprobs.content[0].logprob
        for images in ([first, second], [second, first])
    ]
    assert abs(replies[0] - replies[1]) > 1e-3


def test_several_completions_of_one_request_have_transformers_log_probabilities(
    client: openai.OpenAI, reference: Reference
) -> None:
    messages = CONVERSATIONS["text between images"]
    ban = {str(reference.model.config.image_token_id): -100}
    reply = ask(client, messages, n=4, temperature=1.0, seed=3, logprobs=True, logit_bias=ban)
    completions = [choice.token_ids for choice in reply.choices]
    assert len({tuple(ids) for ids in completions}) == 4
    for choice, ids in zip(reply.choices, completions, strict=True):
        # vLLM's default: log-probabilities of the model itself, before the bias.
        seen = [token.logprob for token in choice.logprobs.content]
        assert seen == pytest.approx(reference.score(messages, ids)[-len(ids) :], abs=1e-4)


def test_a_stream_adds_up_to_the_whole_reply(client: openai.OpenAI) -> None:
    messages = CONVERSATIONS["images in several turns"]
    whole = ask(client, messages).choices[0]
    chunks = list(ask(client, messages, stream=True, stream_options={"include_usage": True}))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    deltas = [choice.delta.content or "" for choice in choices]
    assert "".join(deltas) == whole.message.content
    assert len([delta for delta in deltas if delta]) > 1
    assert choices[-1].finish_reason == whole.finish_reason
    assert chunks[-1].usage.completion_tokens == len(whole.token_ids)


def test_many_requests_at_once_get_the_answers_they_get_alone(client: openai.OpenAI) -> None:
    alone = [ask(client, messages).choices[0].token_ids for messages in CONVERSATIONS.values()]
    with ThreadPoolExecutor(8) as threads:
        together = threads.map(lambda messages: ask(client, messages), CONVERSATIONS.values())
        assert [reply.choices[0].token_ids for reply in together] == alone


def test_max_tokens_stop_and_logit_bias_do_what_the_api_says(
    client: openai.OpenAI, reference: Reference
) -> None:
    messages = CONVERSATIONS["one tile"]
    ids, _ = reference.greedy(messages)
    cut = ask(client, messages, max_tokens=3).choices[0]
    assert (cut.token_ids, cut.finish_reason) == (ids[:3], "length")

    def always(token: str) -> dict[str, int]:
        return {str(reference.processor.tokenizer.convert_tokens_to_ids(token)): 100}

    forced = ask(client, messages, logit_bias=always("d")).choices[0]
    assert forced.message.content == "d" * MAX_TOKENS
    stopped = ask(client, messages, logit_bias=always("d"), stop=["dd"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("", "stop")
    for end in ("<|im_end|>", "<|endoftext|>"):  # both end a reply, as the folder's generation config says
        ended = ask(client, messages, logit_bias=always(end)).choices[0]
        assert (ended.message.content, ended.finish_reason) == ("", "stop")


def _claiming(png: bytes, width: int, height: int) -> bytes:
    """The same file, its header about another size."""
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


BAD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "too many images": (
        [user(*[picture(5, 5)] * (MAX_IMAGES + 1), QUESTION)],
        "At most 5 image(s) may be provided in one prompt",
    ),
    "no image": ([user(data_url(b"no image"), QUESTION)], "its format is not one of"),
    "half an image": ([user(data_url(encoded(80, 80)[:2000]), QUESTION)], "image file is truncated"),
    "a claimed size of 10 gigapixels": (
        [user(data_url(_claiming(encoded(5, 5), 100_000, 100_000)), QUESTION)],
        "exceeds limit of 178956970 pixels",
    ),
    "a prompt too long": ([user("7" * (MAX_MODEL_LEN + 1))], "maximum context length is 1024 tokens"),
    "images too long": (
        [user(*[picture(300, 200)] * MAX_IMAGES, "7" * (MAX_MODEL_LEN - 100))],
        "exceeds model's maximum context length",
    ),
    "a video": (
        [user({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}, QUESTION)],
        "At most 0 video(s)",
    ),
    "a file of the server": (
        [user({"type": "image_url", "image_url": {"url": "file:///etc/hostname"}}, QUESTION)],
        "Cannot load local files",
    ),
    "a part of no known type": ([{"role": "user", "content": [{"type": "nothing"}]}], "validation errors"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_an_error_and_the_server_continues(client: openai.OpenAI, name: str) -> None:
    messages, words = BAD[name]
    with pytest.raises(openai.APIStatusError) as refused:
        ask(client.with_options(max_retries=0), messages)
    assert words in refused.value.message
    assert ask(client, CONVERSATIONS["one tile"], max_tokens=1).choices[0].finish_reason == "length"


@pytest.mark.slow
def test_experts_in_shards_are_served_by_an_engine_of_several_processes_in_small_steps(
    tmp_path: Path,
) -> None:
    released = write_released(tmp_path / "released", experts=4, tied=False, shards=3, **TILES)
    import_released(released, tmp_path / "core", max_shard_bytes=200_000)
    assert len(list((tmp_path / "core").glob("*.safetensors"))) > 2
    reference = Reference(tmp_path / "core")
    # Fewer tokens in a step than the largest image has: vLLM's encoder cache then is as large as that image.
    small_steps = [
        "--max-num-batched-tokens",
        "24",
        "--max-num-seqs",
        "8",
        "--max-model-len",
        str(MAX_MODEL_LEN),
    ]
    with (
        vllm_server(tmp_path / "core", tmp_path / "server.log", *small_steps) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        for messages in CONVERSATIONS.values():
            _check_agreement(client, reference, messages)


@pytest.mark.slow
def test_images_of_any_resolution_are_served_at_their_own_size(tmp_path: Path) -> None:
    released = write_released(tmp_path / "released")
    import_released(released, tmp_path / "core", any_resolution=True)
    reference = Reference(tmp_path / "core")
    assert reference.processor.any_resolution
    flags = [*FLAGS, "--distributed-executor-backend", "uni"]
    with (
        vllm_server(tmp_path / "core", tmp_path / "server.log", *flags, environment=ONE_PROCESS) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        for messages in CONVERSATIONS.values():
            _check_agreement(client, reference, messages)
