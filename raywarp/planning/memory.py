"""The memory of each process of a run, computed from shapes alone: no model, no Ray.

Weights, adapters, gradients, moments and a KV cache are exact. Activations are counted on a model
without data (see model_shapes.py). The constants *_RUNTIME were measured: they are the memory of
Python, torch, transformers and Ray. All sizes are in bytes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from raywarp.config.schema import Config
from raywarp.model.head import chunk_bytes
from raywarp.model.quantised import BLOCK

FLOAT32 = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Peak resident memory (VmHWM) of a process before it loads a model.
POLICY_RUNTIME, ROLLOUT_RUNTIME, REWARD_RUNTIME = (
    750 << 20,
    1000 << 20,
    600 << 20,
)
FUNCTION_RUNTIME = 160 << 20  # of a reward worker without a model
FUNCTION_PROCESS = 40 << 20  # of a process that calls a function, which may need more
Components = dict[str, int]  # name of a component → bytes
ACTIVATIONS, LOGITS = "activations (estimate)", "logits in chunks"
DEQUANTISED, WIDENED = "a layer, dequantised", "a weight in float32"
# Components that a policy holds only while it works.
WORKING = {ACTIVATIONS, LOGITS, DEQUANTISED, WIDENED}
ASLEEP = 1536 << 20  # of a sleeping engine on its GPU, an estimate: CUDA's context and graphs


@dataclass(frozen=True)
class Shapes:
    """The shapes of a model with adapters.

    Attributes:
        parameters: numbers in the base model, tied weights counted once.
        adapted: module → (d_out, d_in).
        block_parameters: numbers in the blocks that have adapted modules. With
            rollout.adapter=merged, a rollout worker keeps an unchanged copy of them.
        kv_numbers: numbers in one token's keys and values, in all layers.
        hidden: width of the hidden states.
        layers: number of layers.
        vocabulary: number of tokens in the vocabulary.
        saved_bytes: bytes that autograd keeps for a micro-batch, in the run's dtype; 0 if they were
            not counted.
        left: descriptions of what lora.target_modules=all-linear does not adapt.
        start_numbers: numbers in the factors of the SFT adapter; 0 without one.
        quantisable: module → (d_out, d_in) of what base.quantize holds in 4 bits.
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
    start_numbers: int = 0
    quantisable: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def scope(self) -> str:
        """A line for users on what all-linear adapts and what not; empty if it adapts all."""
        if not self.left:
            return ""
        return (
            f"lora.target_modules=all-linear adapts {len(self.adapted)} linear layers; as they are"
            f" stay {', '.join(self.left)}"
        )

    def adapter_numbers(self, rank: int) -> int:
        """Return how many numbers A and B of all adapted modules have.

        No module has a larger rank than the smaller side of its weight.
        """
        return sum(min(rank, d_out, d_in) * (d_out + d_in) for d_out, d_in in self.adapted.values())

    @property
    def b_numbers(self) -> int:
        """Numbers in B of all adapted modules at rank 1."""
        return sum(d_out for d_out, _ in self.adapted.values())


def trained_numbers(shapes: Shapes, config: Config) -> int:
    """Return how many numbers of an adapter training changes. With lora.init=frozen, A is fixed."""
    rank = config.largest_rank
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
    gpu: bool = False,
) -> Components:
    """Return the memory of a policy actor, by component; on a GPU, what it holds there.

    Args:
        dtype: dtype of the base model.
        policies: number of policies that the actor holds.
        response_tokens: completion tokens of a micro-batch.
        stored_bytes: bytes of one number in the checkpoint's files, which the host maps while they
            are read.
        gpu: whether it trains on a GPU.
    """
    rank, width = config.largest_rank, DTYPE_BYTES[dtype]
    own = rank * sum(sum(size) for size in shapes.adapted.values()) * FLOAT32
    trained = trained_numbers(shapes, config) * FLOAT32
    # The largest init adapters are the points of the front.
    init = shapes.adapter_numbers(config.merged_rank * config.warp.iterations)
    saved = shapes.saved_bytes
    if config.optim.gradient_checkpointing:
        saved = (
            saved // shapes.layers
            + shapes.layers * config.optim.max_tokens_per_microbatch * shapes.hidden * width
        )
    return {
        **_held_base(shapes, config, width, gpu),
        "its file, mapped": 0 if gpu else shapes.parameters * stored_bytes,
        **_start(shapes, FLOAT32 + width),
        "init adapter": init * (FLOAT32 + width),
        "policy adapters": own * policies,
        "EMA adapters": own * policies,
        **({"states kept": 2 * own * policies * kept} if (kept := config.kept_states) else {}),
        "gradients": trained,
        "optimiser moments": 2 * trained * policies,
        ACTIVATIONS: saved + response_tokens * shapes.hidden * width,
        **_widened(shapes, dtype, gpu),
        LOGITS: 3 * chunk_bytes("cuda" if gpu else "cpu"),
        "Python, torch, Ray": POLICY_RUNTIME,
    }


def _held_base(shapes: Shapes, config: Config, width: int, gpu: bool) -> Components:
    """Return the memory of the base in a policy actor.

    Of 64 numbers in 4 bits one float32 scale is held. A pass has one layer in bfloat16, and in
    float32 where it computes so. On a CPU all weights are there before they are quantised.

    Args:
        width: bytes of a number that is not quantised.
    """
    if config.base.quantize == "none":
        return {"base weights": shapes.parameters * width}
    sizes = [math.prod(size) for size in shapes.quantisable.values()]
    codes, scales = sum(-(-n // 2) for n in sizes), sum(-(-n // BLOCK) for n in sizes)
    return {
        "base weights in 4 bits": codes + scales * FLOAT32,
        "base weights that stay": (shapes.parameters - sum(sizes)) * width,
        "the same weights, before": 0 if gpu else sum(sizes) * width,
        DEQUANTISED: max(sizes, default=0) * (2 + FLOAT32),
    }


def quantised_share(shapes: Shapes) -> str:
    """Return a line for users on how much of the base is held in 4 bits."""
    numbers = sum(math.prod(size) for size in shapes.quantisable.values())
    return (
        f"base.quantize=nf4: a policy actor holds {numbers / shapes.parameters:.0%} of"
        f" {shapes.parameters / 1e9:.2f}e9 numbers in 4.5 bits each; embeddings, head, norms and"
        " experts that are fused in one tensor stay as they are, as do all weights in a rollout"
        " worker"
    )


def loading_policy(shapes: Shapes, dtype: str, stored_bytes: int) -> Components:
    """Return the host's memory of a policy actor on a GPU, by component.

    The base is read into the host's memory, and moved to the GPU from there.

    Args:
        dtype: dtype of the base model.
        stored_bytes: see policy_process.
    """
    return {
        "base weights, while they load": shapes.parameters * DTYPE_BYTES[dtype],
        "their file, mapped": shapes.parameters * stored_bytes,
        "Python, torch, Ray": POLICY_RUNTIME,
    }


def _start(shapes: Shapes, width: int) -> Components:
    """Return the memory of the SFT adapter.

    Args:
        width: bytes of one number.
    """
    numbers = shapes.start_numbers
    return {"SFT adapter": numbers * width} if numbers else {}


def _widened(shapes: Shapes, dtype: str, gpu: bool) -> Components:
    """Return the memory of the float32 copy that a product in float16 on a CPU takes of its weight.

    Args:
        dtype: dtype of the base model.
    """
    if gpu or dtype != "float16":
        return {}
    weights = [shapes.vocabulary * shapes.hidden, *(a * b for a, b in shapes.adapted.values())]
    return {WIDENED: max(weights) * FLOAT32}


def rollout_process(
    shapes: Shapes, config: Config, dtype: str, stored_bytes: int, gpu: bool, tokens: int
) -> Components:
    """Return the memory of a rollout worker outside its GPUs, by component.

    On a GPU it also takes the share rollout.gpu_memory_utilization of the GPU's memory.

    Args:
        dtype: dtype of the base model.
        stored_bytes: bytes of one number in the checkpoint's files.
        gpu: whether the worker has GPUs.
        tokens: tokens of the longest prompt and completion together.
    """
    width = DTYPE_BYTES[dtype]
    transformers = config.rollout.engine == "transformers"
    components = (
        {"base weights, while it sleeps": shapes.parameters * width}
        if gpu and config.rollout.sleep
        else {}
        if gpu
        else {
            "base weights": shapes.parameters * width,
            "its file, mapped": shapes.parameters * stored_bytes,
        }
    )
    components |= _widened(shapes, dtype, gpu)
    if not gpu and not transformers:
        components["copy that vLLM packs (estimate)"] = shapes.parameters * width
    if config.rollout.adapter == "merged":
        components["pristine weights of adapted blocks"] = shapes.block_parameters * (
            width if transformers else stored_bytes
        )
    # The largest adapters are the points of the front. vLLM stacks up to three modules, and each
    # module's B is zero outside its own rows.
    elif not gpu:
        rank = config.merged_rank * config.warp.iterations
        components["adapter beside the weights"] = shapes.adapter_numbers(rank) * (
            width + FLOAT32 if transformers else 3 * width
        )
        components |= _start(shapes, width + FLOAT32 if transformers else 3 * width)
    if not gpu:
        components["KV cache"] = kv_cache(shapes, config, width, tokens)
    return {**components, "Python, torch, vLLM, Ray": ROLLOUT_RUNTIME}


def rollout_gpu(
    shapes: Shapes, config: Config, dtype: str, lora_rank: int, loras: int, tokens: int
) -> Components:
    """Return the memory that a rollout worker needs on each of its GPUs, by component.

    It suffices to generate one call's completions at once. vLLM uses the rest of its share for a
    larger KV cache.

    Args:
        dtype: dtype of the base model.
        lora_rank: rank of the adapter slots.
        loras: number of adapter slots.
        tokens: tokens of the longest prompt and completion together.
    """
    width, parts = DTYPE_BYTES[dtype], config.rollout.tensor_parallel_size
    rows = config.rollout.chunk_size or config.optim.batch_size
    return {
        "base weights": shapes.parameters * width // parts,
        "adapter slots": loras * shapes.adapter_numbers(lora_rank) * width // parts,
        f"KV cache of {rows} completions": rows * tokens * shapes.kv_numbers * width // parts,
    }


def kv_cache(shapes: Shapes, config: Config, width: int, tokens: int) -> int:
    """Return the bytes of the KV cache on a CPU.

    vLLM reserves rollout.kv_cache_gib. The cache of transformers grows with its rows, here 64.

    Args:
        width: bytes of one number.
        tokens: tokens of the longest prompt and completion together.
    """
    if config.rollout.engine == "transformers":
        return 64 * tokens * shapes.kv_numbers * width
    return int(config.rollout.kv_cache_gib * 2**30)


def init_bytes(shapes: Shapes, config: Config) -> int:
    """Return the bytes of the largest init, that of the last iteration.

    Its rank is the sum of the ranks of all policies before it.
    """
    return shapes.adapter_numbers(config.merged_rank * (config.warp.iterations - 1)) * FLOAT32


def task_vector_bytes(shapes: Shapes, config: Config) -> int:
    """Return the bytes that a policy sends to the rollout workers in each step."""
    return config.largest_rank * sum(sum(size) for size in shapes.adapted.values()) * FLOAT32


def checkpoint_bytes(shapes: Shapes, config: Config) -> int:
    """Return the bytes of one policy's checkpoint.

    That is its adapter and EMA, as they are and as they were in each kept state, and the
    optimiser's moments.
    """
    states = 2 * (1 + config.kept_states) * task_vector_bytes(shapes, config)
    return states + 2 * trained_numbers(shapes, config) * FLOAT32


def result_bytes(shapes: Shapes, config: Config) -> int:
    """Return the bytes of all adapters that a finished run keeps.

    These are each θ_m, each iteration's init and merge, and the chosen adapter.
    """
    rank, policies, total = config.policy_rank, config.warp.policies, 0
    for before in range(config.warp.iterations):
        init = rank * policies * before
        total += (
            policies * shapes.adapter_numbers(init + rank)
            + shapes.adapter_numbers(init)
            + shapes.adapter_numbers(init + rank * policies)
        )
    return (total + shapes.adapter_numbers(rank * policies * config.warp.iterations)) * FLOAT32


def in_units(size: float, more: int = 0) -> str:
    """Return a size in bytes as text in MiB or GiB.

    Args:
        more: extra digits, for sizes that are compared with each other.
    """
    return f"{size / 2**30:.{1 + more}f} GiB" if size >= 2**30 else f"{size / 2**20:.{more}f} MiB"
