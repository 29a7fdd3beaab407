"""Reinforcement learning on TRL's GRPO trainer with vLLM rollout workers and DeepSpeed learners."""
