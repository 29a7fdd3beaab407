"""The `vllm.general_plugins` entry point that lets a stock vLLM server load a native core.

vLLM calls it in every process it starts (API server, engine core, workers), before it reads the model's
configuration. vLLM's transformers backend then finds the classes through the Auto classes and as attributes
of the `transformers` module; nothing of vLLM itself is touched.
"""


def register() -> None:
    """Register the core with transformers; idempotent, as vLLM may call a plug-in more than once."""
    import core

    core.register()
