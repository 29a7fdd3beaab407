"""A process of its own, as vLLM patches transformers: prompts as a vLLM server prepares them, without its engine.

`python -P vllm_tokens.py JOB` reads {"cores": {name: folder}, "prompts": [[text, [[width, height], ...]], ...],
"out": file} and writes, per name and prompt, the token ids, the ranges of the images among them and how many
embeddings each takes; and the places of these.
"""

import json
import sys
from pathlib import Path

from PIL import Image


def main(job: dict) -> None:
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # as in every process of a server
    answers: dict[str, list] = {}
    for name, folder in job["cores"].items():
        config = ModelConfig(model=folder, model_impl="transformers", limit_mm_per_prompt={"image": 8})
        processor = MULTIMODAL_REGISTRY.create_processor(config)
        answers[name] = []
        for text, sizes in job["prompts"]:
            images = [Image.new("RGB", (width, height), (90, 120, 30)) for width, height in sizes]
            prepared = processor(text, processor.info.parse_mm_data({"image": images} if images else {}))
            places = prepared["mm_placeholders"].get("image", [])
            answers[name].append(
                {
                    "ids": prepared["prompt_token_ids"],
                    "ranges": [[place.offset, place.length] for place in places],
                    "embeddings": [place.get_num_embeds() for place in places],
                    "holders": [
                        place.offset + at
                        for place in places
                        for at in place.is_embed.nonzero().flatten().tolist()
                    ],
                }
            )
    Path(job["out"]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
