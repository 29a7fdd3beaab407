"""GRPO passes that compute each prompt and each image once per group: TRL's loss and gradients for less work.

Read in this order: `rows` (packing), `layout` (which tokens attend to which), `tiles` (images), `core` (the model's
pass over a packed row), `attention` (its kernels), `passes` (log-probabilities), `loss` (packs and backward passes).
"""
