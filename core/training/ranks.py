"""Process groups, and the training arguments that SFT and RL share."""

from __future__ import annotations

import os
from typing import Any

from core.processes import extensions_folder, free_port
from core.training.config import LearnerConfig, Optim
from core.training.group import form_group
from core.training.operators import guard_builds


def training_arguments(optim: Optim, learner: LearnerConfig, *, seed: int) -> dict[str, Any]:
    """Arguments for transformers' TrainingArguments that SFT and RL share; each stage adds batch size and length.

    Call `join_process_group` first: building the arguments makes DeepSpeed look for its peers.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if optim.schedule == "constant" else optim.schedule,
        "warmup_steps": optim.warmup_ratio,  # a value below 1 is a share of all steps
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.betas[0],
        "adam_beta2": optim.betas[1],
        "adam_epsilon": optim.epsilon,
        "max_grad_norm": optim.max_grad_norm,
        "per_device_train_batch_size": optim.micro_batch_size,
        "optim": "adamw_torch",
        "bf16": learner.dtype == "bfloat16",
        "gradient_checkpointing": learner.gradient_checkpointing,
        "deepspeed": learner.deepspeed.to_dict() if learner.deepspeed else None,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def join_process_group(cfg: LearnerConfig) -> None:
    """Make this process a rank of the launcher's group, or under DeepSpeed of a group of one.

    Plain PyTorch needs no group for one rank. Call it before building training arguments; repeated calls do nothing.
    Raises ValueError if the number of started ranks differs from the configuration.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks != cfg.processes:
        raise ValueError(
            f"learner.processes={cfg.processes}, but {ranks} ranks were started; "
            f"`posttrain run` starts {cfg.processes}"
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(cfg.threads))  # the default of accelerate is every core
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # left by an earlier trainer; the configuration decides
    if ranks == 1 and cfg.deepspeed is None:
        return
    # These variables make accelerate treat a process as a rank.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    # No process listens on this port. DeepSpeed derives names in shared memory from it, so each job needs its own.
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    form_group()
    if cfg.deepspeed is None:
        return
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder()))
    import torch

    if not torch.cuda.is_available():  # on CPUs nothing of ours is compiled, and an optimizer that DeepSpeed
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # imports would load the compiler: two seconds
    import deepspeed

    guard_builds()
    # On a CPU accelerate initialises only torch's group; ZeRO-3 would then load a model as if there were one rank.
    deepspeed.init_distributed(verbose=False)
