"""What accelerate leaves open between its launchers and a run: sharding on CPUs, and processes that never met."""

import dataclasses
import os

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, str_to_bool


def _asked_for(variable: str) -> bool:
    return bool(str_to_bool(os.environ.get(variable, "false")))


def prepare_backend() -> None:
    """Spares DeepSpeed on CPUs a compiler; to be called before any accelerator is made.

    It would build an operator that passes messages through shared memory. Without it gloo passes them.

    Raises:
        ValueError: If DeepSpeed would be left out, and nobody told.
    """
    if not _asked_for("ACCELERATE_USE_DEEPSPEED"):
        return
    if _asked_for("ACCELERATE_USE_CPU"):
        raise ValueError(
            "with ACCELERATE_USE_CPU=true accelerate leaves DeepSpeed out; unset it, and pass --training.use_cpu true."
        )
    if not torch.cuda.is_available():
        import deepspeed  # seconds, for those who launched with it

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def prepare_sharding(state: PartialState) -> None:
    """Makes way for what shards parameters; to be called before models, a Trainer or an Accelerator are made.

    Accelerate looks for FSDP among processes that have GPUs alone. What it then does, gloo can do on CPUs as well.

    Transformers would give models to ZeRO stage 3 piece by piece as they are made, and then nobody could count their
    parameters or set their initial values. Once the Trainer is made, it knows of ZeRO again, and cuts the whole model.
    """
    if state.distributed_type == DistributedType.MULTI_CPU and _asked_for("ACCELERATE_USE_FSDP"):
        state.distributed_type = DistributedType.MULTI_GPU
    if _asked_for("ACCELERATE_USE_DEEPSPEED"):
        from transformers.integrations import unset_hf_deepspeed_config  # reads DeepSpeed

        unset_hf_deepspeed_config()


def launcher() -> dict[str, str]:
    """What a launcher decides that checkpoints hold on to: how the run is sharded, and the precision of products."""
    sharding = "none"
    if _asked_for("ACCELERATE_USE_FSDP"):
        sharding = "fsdp"
    if _asked_for("ACCELERATE_USE_DEEPSPEED"):
        sharding = f"deepspeed stage {os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE')}"
    return {"sharding": sharding, "mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no")}


def keep_loss_exact(plugin: FullyShardedDataParallelPlugin) -> None:
    """Lets FSDP return what a model returns: accelerate would have it round the loss to the precision of products."""
    policy = plugin.mixed_precision_policy
    if getattr(policy, "output_dtype", None) is not None:
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)


def check_joined(num_processes: int, hint: str = "set ACCELERATE_USE_CPU=true in the environment") -> None:
    """Refuses processes that were launched together and do not know of each other.

    Args:
        num_processes: Those that joined, as accelerate counts them.
        hint: How processes on CPUs are made to join.

    Raises:
        ValueError: If more were launched.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != num_processes:
        raise ValueError(
            f"{launched} processes were launched and {num_processes} joined: each would train alone into one folder. "
            f"On CPUs {hint}."
        )
