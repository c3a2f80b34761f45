"""What a process of a run holds in memory, from shapes alone: no model, no Ray.

Weights, adapters, gradients, moments and a KV cache are exact; activations are counted on a model
without data (see model_shapes.py); RUNTIME is what Python, torch, transformers and Ray take,
measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from raywarp.config.schema import Config
from raywarp.model.head import CHUNK_BYTES

FLOAT32 = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
POLICY_RUNTIME, ROLLOUT_RUNTIME, REWARD_RUNTIME = (
    750 << 20,
    1000 << 20,
    600 << 20,
)  # of VmHWM before a model is there
FUNCTION_RUNTIME = 160 << 20  # of a reward worker without a model: a function brings its own
Components = dict[str, int]  # what it is → bytes


@dataclass(frozen=True)
class Shapes:
    """Of a model with adapters.

    parameters: numbers in the base, tied weights once. adapted: module → (d_out, d_in).
    block_parameters: numbers in the blocks that have adapted modules, which a rollout worker keeps
    pristine with rollout.adapter=merged.
    kv_numbers: of one token's keys and values in all layers.
    hidden, layers, vocabulary: as usual.
    saved_bytes: that autograd keeps of a micro-batch, at the run's precision.
    left: what lora.target_modules=all-linear does not adapt, in words.
    """

    parameters: int
    adapted: Mapping[str, tuple[int, int]]
    block_parameters: int
    kv_numbers: int
    hidden: int
    layers: int
    vocabulary: int
    saved_bytes: int
    left: tuple[str, ...] = ()

    @property
    def scope(self) -> str:
        """What all-linear comes to for a model in which something stays as it is, as a line for
        users; else nothing.
        """
        if not self.left:
            return ""
        return (
            f"lora.target_modules=all-linear adapts {len(self.adapted)} linear layers; as they are"
            f" stay {', '.join(self.left)}"
        )

    def adapter_numbers(self, rank: int) -> int:
        """A and B of every adapted module, or its whole change where the rank would be more than
        that has.
        """
        return sum(min(rank, d_out, d_in) * (d_out + d_in) for d_out, d_in in self.adapted.values())

    @property
    def b_numbers(self) -> int:
        """B of every adapted module at rank 1."""
        return sum(d_out for d_out, _ in self.adapted.values())


def trained_numbers(shapes: Shapes, config: Config) -> int:
    """Numbers of an adapter that training changes."""
    rank = config.lora.rank
    return (
        rank * shapes.b_numbers
        if config.lora.init == "frozen"
        else rank * sum(sum(size) for size in shapes.adapted.values())
    )


def policy_process(
    shapes: Shapes,
    config: Config,
    dtype: str,
    policies: int,
    response_tokens: int,
    stored_bytes: int = 0,
) -> Components:
    """A policy actor that holds so many policies.

    Args:
        response_tokens: of a micro-batch.
        stored_bytes: of a number in the checkpoint's files, which are mapped while they are read; 0
            on a GPU.
    """
    rank, width = config.lora.rank, DTYPE_BYTES[dtype]
    own = rank * sum(sum(size) for size in shapes.adapted.values()) * FLOAT32
    trained = trained_numbers(shapes, config) * FLOAT32
    init = shapes.adapter_numbers(
        rank * config.warp.policies * config.warp.iterations
    )  # at the largest: the front's points
    saved = shapes.saved_bytes
    if config.optim.gradient_checkpointing:
        saved = (
            saved // shapes.layers
            + shapes.layers * config.optim.max_tokens_per_microbatch * shapes.hidden * width
        )
    return {
        "base weights": shapes.parameters * width,
        "its file, mapped": shapes.parameters * stored_bytes,
        "init adapter": init * (FLOAT32 + width),
        "policy adapters": own * policies,
        "EMA adapters": own * policies,
        "gradients": trained,
        "optimiser moments": 2 * trained * policies,
        "activations (estimate)": saved + response_tokens * shapes.hidden * width,
        "logits in chunks": 3 * CHUNK_BYTES,
        "Python, torch, Ray": POLICY_RUNTIME,
    }


def rollout_process(
    shapes: Shapes, config: Config, dtype: str, stored_bytes: int, gpu: bool, tokens: int
) -> Components:
    """A rollout worker's memory outside a GPU; on a GPU it takes rollout.gpu_memory_utilization of
    that besides.

    Args:
        stored_bytes: of a number in the checkpoint's files.
        tokens: of the longest prompt and completion.
    """
    width = DTYPE_BYTES[dtype]
    transformers = config.rollout.engine == "transformers"
    components = (
        {}
        if gpu
        else {
            "base weights": shapes.parameters * width,
            "its file, mapped": shapes.parameters * stored_bytes,
        }
    )
    if not gpu and not transformers:
        components["copy that vLLM packs (estimate)"] = shapes.parameters * width
    if config.rollout.adapter == "merged":
        components["pristine weights of adapted blocks"] = shapes.block_parameters * (
            width if transformers else stored_bytes
        )
    # at the largest: the front's points. vLLM stacks up to three modules, whose B is zero outside
    # their own rows
    elif not gpu:
        rank = config.lora.rank * config.warp.policies * config.warp.iterations
        components["adapter beside the weights"] = shapes.adapter_numbers(rank) * (
            width + FLOAT32 if transformers else 3 * width
        )
    if not gpu:
        components["KV cache"] = kv_cache(shapes, config, width, tokens)
    return {**components, "Python, torch, vLLM, Ray": ROLLOUT_RUNTIME}


def rollout_gpu(
    shapes: Shapes, config: Config, dtype: str, lora_rank: int, loras: int, tokens: int
) -> Components:
    """What a rollout worker needs on each of its GPUs to generate one call's completions at once;
    vLLM takes what is left for more.

    Args:
        lora_rank, loras: of the slots for adapters.
        tokens: of the longest prompt and completion.
    """
    width, parts = DTYPE_BYTES[dtype], config.rollout.tensor_parallel_size
    rows = config.rollout.chunk_size or config.optim.batch_size
    return {
        "base weights": shapes.parameters * width // parts,
        "adapter slots": loras * shapes.adapter_numbers(lora_rank) * width // parts,
        f"KV cache of {rows} completions": rows * tokens * shapes.kv_numbers * width // parts,
    }


def kv_cache(shapes: Shapes, config: Config, width: int, tokens: int) -> int:
    """What is set aside on a CPU; transformers' grows to its rows."""
    if config.rollout.engine == "transformers":
        return 64 * tokens * shapes.kv_numbers * width
    return int(config.rollout.kv_cache_gib * 2**30)


def init_bytes(shapes: Shapes, config: Config) -> int:
    """What an iteration starts from, at the largest: the policies of all before it, side by
    side.
    """
    return (
        shapes.adapter_numbers(
            config.lora.rank * config.warp.policies * (config.warp.iterations - 1)
        )
        * FLOAT32
    )


def task_vector_bytes(shapes: Shapes, config: Config) -> int:
    """What travels from a policy to the rollout workers in each step."""
    return config.lora.rank * sum(sum(size) for size in shapes.adapted.values()) * FLOAT32


def checkpoint_bytes(shapes: Shapes, config: Config) -> int:
    """Adapter, EMA and moments of one policy."""
    return 2 * task_vector_bytes(shapes, config) + 2 * trained_numbers(shapes, config) * FLOAT32


def result_bytes(shapes: Shapes, config: Config) -> int:
    """All adapters that a run leaves behind: each θ_m, each iteration's init and merge, and the
    chosen one.
    """
    rank, policies, total = config.lora.rank, config.warp.policies, 0
    for before in range(config.warp.iterations):
        init = rank * policies * before
        total += (
            policies * shapes.adapter_numbers(init + rank)
            + shapes.adapter_numbers(init)
            + shapes.adapter_numbers(init + rank * policies)
        )
    return (total + shapes.adapter_numbers(rank * policies * config.warp.iterations)) * FLOAT32


def in_units(size: float, more: int = 0) -> str:
    """Bytes as a person reads them. more: digits, for sizes that are compared with each other."""
    return f"{size / 2**30:.{1 + more}f} GiB" if size >= 2**30 else f"{size / 2**20:.{more}f} MiB"
