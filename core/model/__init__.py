"""The SAIL-VL2 model: configuration, modeling, processing, tokenizer and the vLLM plug-in."""
