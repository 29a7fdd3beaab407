"""Checks that a training stage fits on the machine, and places its processes.

core/training/memory.py counts the memory of one rank. This module applies that count to a recipe: it adds the largest
pass of a stage, the other processes on the same GPU, and the stage's disk space.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from chain.plan.machine import Machine
from chain.recipe import Recipe, SFTStage
from core.model.names import Module
from core.model.pictures import MAX_PIXELS
from core.model.shape import CoreShape
from core.training.config import DeepSpeedConfig, LearnerConfig
from core.training.memory import GIB, Memory, Work, estimate
from core.training.resume import checkpoint_bytes
from rl.config import RLConfig
from rl.rollout.weights import FILE_BYTES
from sft.config import Phase
from sft.data import CACHE_BYTES

CONTEXT = 1.5 * GIB
"""Bytes of a GPU for the CUDA context, kernels' workspaces and the allocator's fragments."""
ASLEEP = 1.5 * GIB
"""Bytes that a sleeping server keeps: its CUDA context and captured graphs."""


@dataclass(frozen=True)
class Pass:
    """The largest forward-backward pass of a stage or of one of its phases, and its memory."""

    name: str
    """The phase; "" for an RL stage."""
    work: Work
    memory: Memory
    plain: Memory
    """The memory of the same pass with the opposite setting of gradient checkpointing."""
    knob: str
    """The key whose value bounds the size of the pass."""
    frozen: tuple[Module, ...]


class StageFit:
    """One training stage on the machine: a description, and the reasons why the stage cannot run.

    Args:
        name: the stage's key in the recipe.
        config: the stage's configuration.
        recipe, shape, machine: the recipe, the core's shape, and the machine to run on.
    """

    def __init__(
        self, name: str, config: SFTStage | RLConfig, recipe: Recipe, shape: CoreShape, machine: Machine
    ) -> None:
        self.name, self.config, self.recipe, self.shape, self.machine = name, config, recipe, shape, machine
        self.learner: LearnerConfig = config.learner
        self.gpu = machine.gpu_gib is not None
        if isinstance(config, RLConfig):
            self.passes = [self._rl_pass(config)]
        else:
            self.passes = [self._sft_pass(config, phase) for phase in config.phases]
        self.largest = max(self.passes, key=lambda one: one.memory.peak)

    # The largest passes

    def _sft_pass(self, config: SFTStage, phase: Phase) -> Pass:
        if config.packing:
            tokens = config.pass_tokens(phase)
            knob = f"{self.name}.packing.micro_batch_tokens"
            if tokens > config.micro_batch_tokens(phase):
                knob = f"{self.name}.periodic.max_tokens"
            rows = phase.optim.global_batch_size or 1
            updated = config.packing.update_tokens or rows * config.row_tokens(phase)
            passes = updated / self.learner.processes / tokens
        else:
            tokens = config.pass_tokens(phase)
            knob = f"{self.name}.phases: optim.micro_batch_size"
            passes = phase.optim.gradient_accumulation(self.learner.processes)
        work = Work(tokens=tokens, tiles=self._tiles(tokens), accumulates=passes > 1)
        frozen = self.learner.freeze if phase.freeze is None else phase.freeze
        return self._pass(
            phase.name, work, frozen, knob if tokens > config.row_tokens(phase) else f"{self.name}.max_tokens"
        )

    def _rl_pass(self, config: RLConfig) -> Pass:
        completion, prompt = config.rollout.max_completion_tokens, self._longest_prompt
        row = prompt + completion
        budget = config.learner.token_budget
        if config.learner.shares_prefix:
            tokens = max(budget or config.optim.micro_batch_size * row, row)
            rows = max(1, (tokens - prompt) // completion)
            work = Work(
                tokens=tokens,
                tiles=self._tiles(tokens),  # short completions leave a pass to the prompts of many groups
                scored=min(tokens, rows * completion),
                # On a GPU each completion attends to its own keys and to a copy of its prompt's keys.
                attended=max(tokens, rows * row) if self.gpu else tokens,
                repeats_heads=True,
                reference=config.algorithm.kl_beta > 0,
            )
            knob = (
                f"{self.name}.learner.token_budget"
                if tokens > row
                else f"{self.name}.rollout.max_completion_tokens"
            )
        else:
            tokens = config.optim.micro_batch_size * row
            work = Work(
                tokens=tokens,
                tiles=self._tiles(tokens),
                reference=config.algorithm.kl_beta > 0,
            )
            knob = f"{self.name}.optim.micro_batch_size"
        return self._pass("", work, self.learner.freeze, knob)

    @property
    def _longest_prompt(self) -> int:
        """Tokens of an RL stage's longest prompt."""
        assert isinstance(self.config, RLConfig)
        assert self.recipe.servers
        return max(1, self.recipe.servers.max_model_tokens - self.config.rollout.max_completion_tokens)

    def _tiles(self, tokens: int) -> int:
        return int(tokens * self.recipe.hardware.image_share) // self.shape.tile_tokens

    def _pass(self, name: str, work: Work, frozen: tuple[Module, ...], knob: str) -> Pass:
        turned = self.learner.model_copy(
            update={"gradient_checkpointing": not self.learner.gradient_checkpointing}
        )
        memory, plain = (
            estimate(self.shape, learner, work, frozen=frozen, gpu=self.gpu)
            for learner in (self.learner, turned)
        )
        return Pass(name, work, memory, plain, knob, frozen)

    # Descriptions

    def to_dict(self) -> dict[str, Any]:
        """Bytes of a rank's memory, of a node's host memory and of disk, for JSON."""
        return {
            "needed": self.needed,
            **asdict(self.largest.memory),
            "pass": asdict(self.largest.work),
            "host": self.host,
            "disk": self.disk,
        }

    def lines(self) -> list[str]:
        """Lines on a rank's memory in the largest pass, the placement on GPUs, host memory and disk."""
        one, memory = self.largest, self.largest.memory
        unit = "GPU" if self.gpu else "process"
        where = f" ({one.name})" if one.name and len(self.passes) > 1 else ""
        other = "with" if not self.learner.gradient_checkpointing else "without"
        room = f" of {self.machine.gpu_gib:g}" if self.machine.gpu_gib is not None else ""
        turned = gib(one.plain.passing)
        parts = {
            "weights": gib(memory.weights),
            "optimizer": gib(memory.optimizer),
            "gradients": gib(memory.gradients),
            "activations": f"{gib(memory.passing)} ({turned} {other} checkpointing)",
            "output layer": gib(memory.head),
            "buffers": gib(memory.buffers),
            "optimizer step": gib(memory.step),
            **({"other processes and CUDA": gib(self.besides)} if self.gpu else {}),
        }
        lines = [
            f"largest pass{where}: {one.work.tokens:,} tokens, {one.work.tiles} tiles; {unit} memory of a rank "
            f"{gib(self.needed)}{room} GiB at its peak: "
            + ", ".join(f"{name} {size}" for name, size in parts.items())
        ]
        if self.gpu:
            lines.append(f"GPUs: {self.placement()}")
        if self.host > 0:
            room = f" of {self.machine.host_gib:.0f}" if self.machine.host_gib is not None else ""
            what = "offloaded states, pictures, weights in transit" if self.gpu else "all ranks"
            lines.append(f"host memory of a node: {gib(self.host)}{room} GiB ({what})")
        passing = (
            f"up to {gib(self.unfinished)} GiB more while it runs (save_every)" if self.unfinished else ""
        )
        lines.append(
            f"disk: {self.checkpoints} checkpoint{'s' if self.checkpoints > 1 else ''}, "
            f"{gib(self.disk)} GiB; {passing or 'optimizer states are not kept'}"
        )
        return lines

    def placement(self) -> str:
        """The GPUs of the learners and of the servers."""
        ranks, per_node = self.learner.processes, self.machine.gpus_per_node
        nodes = -(-ranks // per_node)
        learners = (
            f"learners on {spans(ranks)}" if nodes == 1 else f"learners on {ranks} GPUs of {nodes} nodes"
        )
        pool = self.recipe.servers
        if pool is None or not (pool.starts_on_gpus or pool.urls):
            return learners
        if pool.urls:
            return f"{learners}; servers at {', '.join(pool.urls)}"
        if self.machine.nodes > 1:
            return f"{learners}; servers where Ray places them"
        servers = spans(pool.count * pool.gpus_per_server, pool.first_gpu)
        if pool.share_gpus:
            turn = "while it trains" if isinstance(self.config, RLConfig) else "throughout"
            return f"{learners}; servers on {servers}, asleep {turn}"
        return f"{learners}; servers on {servers}"

    @property
    def besides(self) -> float:
        """Bytes of a GPU that CUDA contexts, workspaces and other processes take."""
        if not self.gpu:
            return 0
        return CONTEXT + (ASLEEP if self._shares else 0)

    @property
    def _shares(self) -> bool:
        return self.recipe.servers is not None and self.recipe.servers.share_gpus

    @property
    def needed(self) -> float:
        """Peak memory of a rank's GPU, bytes."""
        return self.largest.memory.peak + self.besides

    @property
    def host(self) -> float:
        """Bytes of host memory on the node with the most ranks; without a GPU, all the memory of these ranks."""
        if not self.gpu:
            return self.needed * -(-self.learner.processes // self.machine.nodes)
        ranks = min(self.learner.processes, self.machine.gpus_per_node)
        offloaded = self.largest.memory.host * ranks
        # A rank decodes one picture at a time. SFT also caches prepared rows; rows of an RL stage contain no pictures.
        prepared = CACHE_BYTES if isinstance(self.config, SFTStage) else 0
        pictures = ranks * (3 * MAX_PIXELS + prepared)
        pushed = 0
        pool = self.recipe.servers
        if isinstance(self.config, RLConfig) and pool and pool.sends_files:
            pushed = FILE_BYTES  # rank 0 copies the weights of one file at a time
            pushed += self.checkpoint if pool.weights_dir is None else 0  # the files in shared memory
        return offloaded + pictures + pushed

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint."""
        # Plain PyTorch trains and saves float32 weights.
        return sum(self.shape.parameters().values()) * (2 if self.learner.half else 4)

    @property
    def checkpoints(self) -> int:
        """Number of checkpoints that the stage keeps."""
        return len(self.config.phases) if isinstance(self.config, SFTStage) else 1

    @property
    def disk(self) -> int:
        return self.checkpoint * self.checkpoints

    @property
    def unfinished(self) -> int:
        """Bytes of the two checkpoints with optimizer states that exist while the newer one is written."""
        if self.config.save_every is None:
            return 0
        frozen = set.intersection(*(set(one.frozen) for one in self.passes))
        moved = sum(count for module, count in self.shape.parameters().items() if module not in frozen)
        if self.learner.lora:
            moved = self.shape.adapter_parameters(self.learner.lora.r, self.learner.lora.everywhere)
        weights = moved * 4 if self.learner.lora else self.checkpoint
        return 2 * checkpoint_bytes(weights, moved, deepspeed=self.learner.deepspeed is not None)

    # Problems

    def problems(self) -> list[str]:
        """Reasons why the stage cannot run on the machine, each with the key to change; [] if it can run."""
        found = []
        if self.gpu:
            found += self._too_few_gpus()
            found += self._too_full()
            found += self._no_turns()
        if self.machine.host_gib is not None and self.host > self.machine.host_gib * GIB:
            if not self.gpu:
                remedy = self._remedy(self.machine.host_gib * GIB / self.learner.processes)
            elif self.largest.memory.host:
                remedy = (
                    f"spread the ranks over more nodes, or set {self.name}.learner.deepspeed.offload=none"
                )
            else:
                remedy = "set servers.weights=nccl"
            found.append(
                f"{self.name}: host memory of a node {gib(self.host)} GiB, of {self.machine.host_gib:.0f} GiB; {remedy}"
            )
        return found

    def _too_few_gpus(self) -> list[str]:
        pool, ranks = self.recipe.servers, self.learner.processes
        if ranks > self.machine.gpus:
            return [
                f"{self.name}.learner.processes={ranks} needs {ranks} GPUs, but the machine has {self.machine.gpus} "
                f"({self.machine.gpus_per_node} x {self.machine.nodes} nodes); lower learner.processes, or raise "
                "hardware.nodes"
            ]
        if pool is None or not pool.starts_on_gpus or self.machine.nodes > 1:
            return []  # chain.placement finds room on several nodes
        last = pool.first_gpu + pool.count * pool.gpus_per_server
        if last > self.machine.gpus_per_node:
            return [
                f"servers: {pool.count} servers x {pool.gpus_per_server} GPUs from first_gpu={pool.first_gpu} end at "
                f"GPU {last - 1}, but a node has {self.machine.gpus_per_node} GPUs; lower servers.count or first_gpu"
            ]
        if not pool.share_gpus and min(ranks, self.machine.gpus_per_node) > pool.first_gpu:
            return [
                f"{self.name}.learner.processes={ranks}, but the servers begin at servers.first_gpu={pool.first_gpu}: "
                "lower the former, raise the latter, or let them take turns (servers.share_gpus)"
            ]
        return []

    def _too_full(self) -> list[str]:
        assert self.machine.gpu_gib is not None
        room = self.machine.gpu_gib * GIB
        if self.needed <= room:
            return []
        return [
            f"{self.name}: a rank needs {gib(self.needed)} GiB of {self.machine.gpu_gib:g} GiB "
            f"({self.machine.origin}); {self._remedy(room)}"
        ]

    def _remedy(self, room: float) -> str:
        """The smallest change that makes the stage fit; if none suffices, the advice to train adapters."""
        one, learner = self.largest, self.learner
        if not learner.gradient_checkpointing and one.plain.peak + self.besides <= room:
            return f"set {self.name}.learner.gradient_checkpointing=true ({gib(one.plain.peak + self.besides)} GiB)"
        tried = learner.model_copy(update={"gradient_checkpointing": True})
        smaller = one.work
        row, longest = (
            (max(map(self.config.row_tokens, self.config.phases)), f"{self.name}.max_tokens")
            if isinstance(self.config, SFTStage)
            else (
                self._longest_prompt + self.config.rollout.max_completion_tokens,
                "servers.max_model_tokens",
            )
        )
        while smaller.tokens > 2048:
            smaller = replace(
                smaller,
                tokens=smaller.tokens // 2,
                tiles=smaller.tiles // 2,
                scored=smaller.scored and smaller.scored // 2,
                attended=smaller.attended and smaller.attended // 2,
            )
            peak = self._peak(tried, smaller)
            if peak <= room:
                also = "" if learner.gradient_checkpointing else " and learner.gradient_checkpointing=true"
                key = (
                    one.knob if smaller.tokens >= row or one.knob == longest else f"{one.knob} and {longest}"
                )
                return f"lower {key}: {smaller.tokens} tokens a pass{also} take {gib(peak)} GiB"
        for change, words in (
            ({"processes": learner.processes * 2}, f"{self.name}.learner.processes={learner.processes * 2}"),
            (_offloaded(2), f"{self.name}.learner.deepspeed={{zero_stage: 2, offload: cpu}}"),
            (_offloaded(3), f"{self.name}.learner.deepspeed={{zero_stage: 3, offload: cpu}}"),
        ):
            peak = self._peak(tried.model_copy(update=change), one.work)
            if peak <= room:
                return f"set {words} ({gib(peak)} GiB)"
        return f"train adapters ({self.name}.learner.lora), or take larger GPUs"

    def _peak(self, learner: LearnerConfig, work: Work) -> float:
        return (
            estimate(self.shape, learner, work, frozen=self.largest.frozen, gpu=self.gpu).peak + self.besides
        )

    def _no_turns(self) -> list[str]:
        """Servers that share a GPU with the learner must fit beside the memory that the learner keeps."""
        pool = self.recipe.servers
        if not self._shares or pool is None or not isinstance(self.config, RLConfig):
            return []
        assert self.machine.gpu_gib is not None
        room = self.machine.gpu_gib * GIB
        kept = self.largest.memory.resident + CONTEXT
        share = (room - kept) / room
        if pool.gpu_memory_utilization <= share:
            return []
        free = int(share * 100) / 100
        remedy = (
            f"lower gpu_memory_utilization to {free:g} or less"
            if free > 0
            else "set servers.share_gpus=false, or take larger GPUs"
        )
        return [
            f"{self.name}: while the servers are awake the learner keeps {gib(kept)} GiB of a GPU's "
            f"{self.machine.gpu_gib:g}, and servers.gpu_memory_utilization={pool.gpu_memory_utilization:g} needs "
            f"{gib(pool.gpu_memory_utilization * room)} GiB; {remedy}"
        ]


def _offloaded(stage: Literal[2, 3]) -> dict[str, Any]:
    return {"deepspeed": DeepSpeedConfig(zero_stage=stage, offload="cpu")}


def spans(count: int, first: int = 0) -> str:
    """A range of GPUs: `GPU 6`, `GPUs 0-5`."""
    return f"GPU {first}" if count == 1 else f"GPUs {first}-{first + count - 1}"


def gib(size: float) -> str:
    """Bytes as GiB with one digit."""
    return f"{size / GIB:.1f}"
