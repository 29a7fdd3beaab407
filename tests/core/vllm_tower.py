"""A process of its own, as vLLM patches transformers: vLLM's AIMv2 tower on weights in the released layout.

`python -P vllm_tower.py JOB` reads {"releases": {name: folder}, "tiles": file, "out": folder}, where the
safetensors file holds `tiles`, and writes per release a file OUT/name: the input of block 0 as "0", the output of
block k as str(k + 1), and the normed last one as "normed".
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PREFIX = "vision_model."


def main(job: dict) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    tiles = load_file(job["tiles"])["tiles"]
    with tempfile.TemporaryDirectory() as empty, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{empty}/store", 0, backend="gloo")
        initialize_model_parallel()
        for name, folder in job["releases"].items():
            seen = states(Path(folder), tiles)
            save_file({key: value.contiguous() for key, value in seen.items()}, Path(job["out"]) / name)


def states(folder: Path, tiles: torch.Tensor) -> dict[str, torch.Tensor]:
    from vllm.model_executor.models.aimv2 import AIMv2Config, AIMv2Model

    released = json.loads((folder / "config.json").read_text())["vision_config"]
    tower = AIMv2Model(AIMv2Config(**released), None, require_post_norm=True)
    state: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        state |= load_file(shard)
    of_tower = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    missing = {name for name, _ in tower.named_parameters()} - tower.load_weights(of_tower.items())
    assert not missing, f"vLLM's tower got no {sorted(missing)}"
    prepare(tower)
    seen: dict[str, torch.Tensor] = {}

    def note(name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda *call: seen.update({name: call[2].clone()}))

    note("0", tower.preprocessor)
    for number, block in enumerate(tower.trunk.blocks, start=1):
        note(str(number), block)
    with torch.no_grad():
        seen["normed"] = tower(tiles)
    return seen


def prepare(tower: torch.nn.Module) -> None:
    """What vLLM's model loader does after loading: each layer's kernel gets its weights in its own format."""
    for layer in tower.modules():
        method = getattr(layer, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(layer)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
