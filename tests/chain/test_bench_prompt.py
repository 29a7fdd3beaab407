"""What of a harness's request reaches the servers: labels, enlarged and grey pictures, frames, tile caps."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from chain.bench.prompt import PICTURES, Rules, asked
from chain.bench.servers import for_suite, own_tiles
from chain.bench.suite import Benchmark, Suite
from core.model.prompts import THINK_CONTRACT
from rl.rollout.config import PoolConfig

from ..core.films import film

SECRET = "secret:"
ONE = {"task": "x", "metric": "m", "score": "s", "source": "ours: a test"}


@pytest.fixture(scope="module")
def tiny_core(tmp_path_factory):
    from core.model.tiny import build_tiny

    return build_tiny(tmp_path_factory.mktemp("core") / "tiny", words=["A"], seed=0)


@pytest.fixture
def rules(tmp_path):
    (tmp_path / PICTURES).mkdir()

    def made(mode="direct", blind=False, own=6, **benchmark):
        return Rules(Benchmark(**ONE, **benchmark), mode, 56, tmp_path, SECRET, blind, own)

    return made


def image(width: int, height: int) -> dict:
    buffer = io.BytesIO()
    pixels = np.random.default_rng([width, height]).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def opened(part: dict) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))


def shape(found) -> list:
    """The parts of the last turn: texts, and sizes of images."""
    parts = found.messages[-1]["content"]
    return [part["text"] if part["type"] == "text" else opened(part).size for part in parts]


def ask(rules, *parts):
    return asked([{"role": "user", "content": list(parts)}], rules)


def test_without_a_cap_the_prompt_is_as_in_training(rules):
    found = ask(rules(), text("Is "), image(8, 9), text(" like "), image(9, 8), text("?"))
    assert shape(found) == ["Is ", (8, 9), " like ", (9, 8), "?"]
    assert found.processor == {"max_patches": 6}
    assert ask(rules(own=None), image(8, 9), text("?")).processor == {}
    assert ask(rules(), text("?")).processor == {}


def test_several_images_stand_before_the_text_behind_labels(rules):
    found = ask(rules(tiles=12), text("Is "), image(8, 9), text(" like "), image(9, 8), text("?"))
    labels = ["Image-1: ", (8, 9), "\n", "Image-2: ", (9, 8), "\n"]
    assert shape(found) == [*labels, "Is <Image-1> like <Image-2>?"]
    together = ask(rules(tiles=12), image(8, 9), image(9, 8), text("Alike?"))
    assert shape(together) == [*labels, "Alike?"]
    one = ask(rules(tiles=12), text("What is "), image(8, 9), text("?"))
    assert shape(one) == [(8, 9), "What is ?"]
    assert len(found.pictures) == 2


@pytest.mark.parametrize(("images", "cap"), [(1, 24), (2, 24), (3, 21), (5, 12), (65, 1)])
def test_all_images_of_a_prompt_have_64_tiles_and_only_a_single_one_the_second_scale(rules, images, cap):
    found = ask(rules(tiles=24), *[image(4, 4)] * images, text("?")).processor
    assert found == {"max_patches": cap} | ({"use_msac": False} if images > 1 else {})


def test_the_first_image_is_enlarged(rules):
    found = ask(rules(tiles=12, enlarge_first=True), image(8, 9), image(9, 8), text("?"))
    assert [size for size in shape(found) if isinstance(size, tuple)] == [(16, 18), (9, 8)]
    plain = Image.open(io.BytesIO(base64.b64decode(image(8, 9)["image_url"]["url"].partition(",")[2])))
    sent = opened(found.messages[0]["content"][1])
    assert np.array_equal(sent, plain.resize((16, 18), Image.Resampling.BILINEAR))


def test_the_contract_ends_the_last_text_and_is_not_part_of_the_kept_prompt(rules):
    found = ask(rules("think"), image(8, 9), text("2+2?"))
    assert shape(found) == [(8, 9), f"2+2?\n{THINK_CONTRACT}"]
    assert found.text == "2+2?"


def test_a_video_is_sixteen_labelled_frames_of_one_tile(rules, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(film(40))
    video = text(f"{SECRET}{tmp_path / 'clip.mp4'}")
    found = ask(rules(tiles=1, frames=16), video, text("What happens?"))
    frames = [part for number in range(16) for part in (f"Frame-{number + 1}: ", (56, 56), "\n")]
    assert shape(found) == [*frames, "What happens?"]
    assert found.processor == {"max_patches": 1, "use_msac": False}
    blind = ask(rules(blind=True, tiles=1, frames=16), video, text("What happens?"))
    assert {opened(part).getpixel((3, 3)) for part in blind.messages[0]["content"][1::3]} == {(128, 128, 128)}


def test_only_the_secret_makes_a_text_a_file(rules, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(film(4))
    named = f"wrong:{tmp_path / 'clip.mp4'}"
    assert shape(ask(rules(frames=16), text(named))) == [named]
    assert shape(ask(rules(), text(f"{SECRET}/etc/passwd"))) == [f"{SECRET}/etc/passwd"]


def suite(**tiles) -> Suite:
    return Suite(about="x", benchmarks={name: Benchmark(**ONE, tiles=cap) for name, cap in tiles.items()})


def test_servers_have_room_for_the_largest_cap_and_the_frames(tiny_core):
    servers = PoolConfig(max_model_tokens=64)
    assert own_tiles(tiny_core) == 1
    assert for_suite(servers, suite(a=None), [tiny_core]) == servers
    raised = for_suite(servers, suite(a=12, b=24), [tiny_core])
    assert raised.extra_args == (
        "--trust-request-mm-kwargs", "--mm-processor-kwargs", '{"max_patches": 24}'
    )  # fmt: skip
    moving = Suite(about="x", benchmarks={"v": Benchmark(**ONE, tiles=1, frames=16)})
    assert for_suite(servers, moving, [tiny_core]).max_images == 16
    assert for_suite(servers.model_copy(update={"engine": "hf"}), suite(a=12), [tiny_core]).extra_args == ()


@pytest.mark.slow
def test_a_request_gets_the_tiles_that_it_asks_for_from_vllm_and_from_transformers(tiny_core, tmp_path):
    from core.training.model import load_processor
    from rl.rollout.client import RolloutClient
    from rl.rollout.messages import CoreFacts, Prompt, Sampling, completion_request
    from rl.rollout.server import rollout_pool

    caps = [{"max_patches": 1}, {"max_patches": 12}, {"max_patches": 24, "use_msac": True}]
    found = {}
    for engine in ("vllm", "hf"):
        servers = for_suite(PoolConfig(max_model_tokens=512, engine=engine), suite(a=24), [tiny_core])
        with rollout_pool(servers, tiny_core, tmp_path / engine) as urls:
            client = RolloutClient(urls, CoreFacts.of(tiny_core))
            body = completion_request(Prompt([]), Sampling(max_tokens=4, temperature=0.0), client.core)
            body |= {"messages": [{"role": "user", "content": [image(300, 210), text("A")]}]}
            path = "v1/chat/completions"
            asked = [client.http.ask(urls[0], path, {**body, "mm_processor_kwargs": cap}) for cap in caps]
            found[engine] = [(reply["prompt_token_ids"], reply["choices"][0]) for reply in asked]
            client.close()
    processor = load_processor(tiny_core)
    for cap, (ids, choice), (same, other) in zip(caps, found["vllm"], found["hf"], strict=True):
        expected = processor._get_num_multimodal_tokens([(210, 300)], **cap)["num_image_tokens"][0]
        assert sum(token in processor.image_token_ids for token in ids) == expected
        assert (ids, choice["token_ids"]) == (same, other["token_ids"])
        logprobs = [[one["logprob"] for one in each["logprobs"]["content"]] for each in (choice, other)]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
