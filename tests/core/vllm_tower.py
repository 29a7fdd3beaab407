"""A process of its own, as vLLM patches transformers: vLLM's AIMv2 tower on weights in the released layout.

`python -P vllm_tower.py FOLDER TILES OUT` reads the checkpoint in FOLDER and the `tiles` in the safetensors
file TILES, and writes to OUT the input of block 0, the output of every block, and the normed last one.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PREFIX = "vision_model."


def main(folder: Path, tiles: Path, out: Path) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.models.aimv2 import AIMv2Config, AIMv2Model

    released = json.loads((folder / "config.json").read_text())["vision_config"]
    state: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        state |= load_file(shard)
    with tempfile.TemporaryDirectory() as empty, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{empty}/store", 0, backend="gloo")
        initialize_model_parallel()
        tower = AIMv2Model(AIMv2Config(**released), None, require_post_norm=True)
        of_tower = {name.removeprefix(PREFIX): value for name, value in state.items() if PREFIX in name}
        # vLLM's layers without a loader of their own take a tensor as it is.
        loaded = tower.load_weights(of_tower.items())
        missing = {name for name, _ in tower.named_parameters()} - loaded
        assert not missing, f"vLLM's tower got no {sorted(missing)}"
        prepare(tower)
        seen: dict[str, torch.Tensor] = {}
        tower.preprocessor.register_forward_hook(lambda *call: seen.update({"0": call[2].clone()}))
        for number, block in enumerate(tower.trunk.blocks, start=1):
            block.register_forward_hook(
                lambda *call, number=number: seen.update({str(number): call[2].clone()})
            )
        with torch.no_grad():
            seen["normed"] = tower(load_file(tiles)["tiles"])
    save_file({name: value.contiguous() for name, value in seen.items()}, out)


def prepare(tower: torch.nn.Module) -> None:
    """What vLLM's model loader does after loading: each layer's kernel gets its weights in its own format."""
    for layer in tower.modules():
        method = getattr(layer, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(layer)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
