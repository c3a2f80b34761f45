"""The configuration's schema: `Config`, the sections of a WARP run, and ConfigError.

Every key has a description. Every command gets a `Config`, and its resolved form is saved with the
run.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from raywarp.algorithm.hypervolume import simplex
from raywarp.config import each
from raywarp.config.cluster import ClusterConfig
from raywarp.config.datasets import PreferencesConfig, PromptsConfig
from raywarp.config.field_types import (
    Count,
    NotNegative,
    Number,
    Positive,
    Section,
    Seed,
    Text,
)
from raywarp.config.front import FrontConfig, RetentionConfig
from raywarp.config.policies import BaseConfig, LoraConfig, OptimConfig, StopConfig, WarpConfig
from raywarp.config.recipes import RECIPES, with_recipe
from raywarp.config.rewards import NamedRewardConfig, RewardConfig, RewardTrainingConfig
from raywarp.config.tune import TuneConfig

SMOLLM2 = "embedded:smollm2-135m-instruct"


class ConfigError(ValueError):
    """The user's input is wrong; the message says what, where, and what would be right."""


class RolloutConfig(Section):
    """Sampling, in training and in the evaluation."""

    engine: Literal["vllm", "transformers"] = Field(
        "vllm", description="what samples; transformers where there is no vLLM, slower"
    )
    workers: Count = Field(
        1,
        description=(
            "R, workers (engines) that all policies share; more where rollouts bound the run"
        ),
    )
    chunk_size: Count | None = Field(
        None,
        description=(
            "completions per engine call, for fewer policies than workers; default: a whole batch"
        ),
    )
    concurrency: Count = Field(
        1,
        description=(
            "calls that one engine works on at once, so that several policies fill it; above 1, the"
            " last bits of a result depend on what runs at the same time"
        ),
    )
    completions_per_prompt: Count = Field(
        4,
        description=(
            "completions of each prompt in a step; more: a better baseline, fewer prompts in a"
            " batch"
        ),
    )
    max_new_tokens: Count = Field(
        24,
        description=(
            "longest completion, in tokens; KL per completion, time and memory grow with it"
        ),
    )
    temperature: Positive = Field(
        0.9,
        description=(
            "sampling temperature, of training and evaluation; log-probs and KL are taken at the"
            " same one"
        ),
    )
    adapter: Literal["auto", "unmerged", "lora", "merged"] = Field(
        "auto",
        description=(
            "how an engine applies an adapter: unmerged beside the weights (CPUs), as vLLM's LoRA"
            " (GPUs), or merged into float32 weights; auto is unmerged on CPUs, lora on GPUs"
        ),
    )
    ignore_eos: bool = Field(
        False, description="sample past the end of text up to max_new_tokens; for benchmarks"
    )
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = Field(
        None,
        description=(
            "strings that end a completion, for example ['\\n\\nHuman:']; the text ends before the"
            " first of them, the tokens after it, and the completion counts as finished"
        ),
    )
    missing_eos_penalty: NotNegative = Field(
        0.0, description="taken from the reward of a completion that max_new_tokens cut off"
    )
    kv_cache_gib: Positive = Field(
        1.0,
        description=(
            "KV cache of a CPU worker, in GiB; each running completion takes 128 tokens or more"
        ),
    )
    gpu_memory_utilization: Annotated[Number, Field(gt=0, le=1)] = Field(
        0.85,
        description=(
            "share of a GPU's memory that a worker takes; lower it where others use that GPU"
        ),
    )
    sleep: bool = Field(
        False,
        description=(
            "free a worker's GPU between its calls (vLLM's sleep mode), so that policies train on"
            " the same GPU in turns with it"
        ),
    )
    tensor_parallel_size: Count = Field(1, description="GPUs that one worker's model is split over")


class Config(Section):
    recipe: Literal["warp", "anchored", "soup"] | None = Field(
        None,
        description=(
            "settings that belong together (`raywarp config --recipe` prints them with"
            " the figures that speak for them); default: those below, which are those of warp"
        ),
    )
    model: Text = Field(
        SMOLLM2, description="hub id or folder of the SFT model, or embedded:smollm2-135m-instruct"
    )
    sft_adapter: Text | None = Field(
        None,
        description=(
            "folder or hub id of a PEFT LoRA adapter of the model, of any rank, to start from: the"
            " SFT model, to which KL and LITI refer, is then model + adapter; results are adapters"
            " of the model"
        ),
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description=(
            "of the frozen base; auto: bfloat16 where the hardware has it, else float32. float16 is"
            " eight times finer than bfloat16, so trainer and sampler agree more closely"
            " (arXiv:2510.26788), and GPUs older than bfloat16 have it; models with numbers above"
            " 65,504 are refused"
        ),
    )
    base: BaseConfig = BaseConfig()
    trust_remote_code: bool = Field(
        False,
        description=(
            "run the code that comes with a model; without it, a model that needs its own code is"
            " refused"
        ),
    )
    seed: Seed = Field(
        0, description="everything random derives from it; another one makes another run"
    )
    out: Text = Field(
        "runs/default",
        description="folder that the command writes, or s3://bucket/prefix, gs://bucket/prefix",
    )
    store: Text | None = Field(
        None,
        description=(
            "folder or URI of trained policies under their keys, which several runs may share;"
            " default: out"
        ),
    )
    prompts: PromptsConfig = PromptsConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    reward_training: RewardTrainingConfig = RewardTrainingConfig()
    reward: RewardConfig = RewardConfig()
    rewards: list[NamedRewardConfig] = Field(
        [],
        description=(
            "several rewards in place of `reward`: [{name, weight, function or model, …}] with the"
            " keys of `reward`; the total is the sum of weight times score, and where a score is"
            " None, the others' weights are scaled up"
        ),
    )
    control: RewardConfig | None = Field(
        None, description="a second score that training never sees"
    )
    lora: LoraConfig = LoraConfig()
    warp: WarpConfig = WarpConfig()
    optim: OptimConfig = OptimConfig()
    stop: StopConfig = StopConfig()
    rollout: RolloutConfig = RolloutConfig()
    cluster: ClusterConfig = ClusterConfig()
    front: FrontConfig = FrontConfig()
    retention: RetentionConfig = RetentionConfig()
    checkpoint_every: Count = Field(
        10,
        description=(
            "steps between a policy's checkpoints: the most that is done again after a death"
        ),
    )
    kl_to_sft_every: Count = Field(
        5, description="steps between measurements of kl_sft in training, a forward pass more each"
    )
    loggers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        [], description="where metrics go besides metrics.jsonl"
    )
    tune: TuneConfig | None = Field(
        None,
        description=(
            "of `raywarp tune`: {key: {grid: [a, b]}, …} for any key above, by its last part or in"
            " full; beside grid there are choice: [a, b], uniform: [low, high], loguniform: [low,"
            " high] and randint: [low, high] (high left out)"
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def filled_in(cls, tree: Any) -> Any:
        known = isinstance(tree, Mapping) and isinstance(tree.get("recipe"), str)
        return with_recipe(tree) if known and tree["recipe"] in RECIPES else tree

    @property
    def rewards_by_key(self) -> dict[str, RewardConfig]:
        """What the policies are trained on: `reward`, or the entries of `rewards` by their keys."""
        named = {f"rewards.{entry.name}": entry for entry in self.rewards}
        return dict(named) if named else {"reward": self.reward}

    @property
    def scorers(self) -> dict[str, RewardConfig]:
        """All that score: the rewards, then the control if there is one."""
        control = {"control": self.control} if self.control else {}
        return {**self.rewards_by_key, **control}

    def with_scorers(self, scorers: Mapping[str, RewardConfig]) -> "Config":
        """Return the configuration with these in place of `scorers`."""
        if not self.rewards:
            return self.model_copy(update=dict(scorers))
        named = [scorers[f"rewards.{entry.name}"] for entry in self.rewards]
        control = {"control": scorers["control"]} if self.control else {}
        return self.model_copy(update={"rewards": named, **control})

    def of_policy(self, index: int) -> "Config":
        """Return the configuration of policy m, counted from 1, as that of a run without `each`."""
        if self.warp.each is None:
            return self
        tree = self.model_dump(
            exclude={
                "recipe": True,
                "warp": {"each": True, "merge_weights": True},
                "front": {"weights": True, "choose": {"weights": True}},
            }
        )
        return Config.model_validate(each.changed(tree, self.warp.each[index - 1]))

    @property
    def of_policies(self) -> list["Config"]:
        """The configuration of each policy."""
        return [self.of_policy(m) for m in range(1, self.warp.policies + 1)]

    @property
    def corners(self) -> dict[str, list[int]]:
        """What the shares of a merge may name, with the policies of each."""
        return each.corners(each.reward_weights(self.of_policies))

    @property
    def mixes(self) -> list[dict[str, float]]:
        """Shares of the merges that are measured besides the line to SLERP, each by corner."""
        wanted, chosen, of = self.front.weights, self.front.choose.weights, self.corners
        if wanted is None:
            kinds = {tuple(own.values()) for own in each.reward_weights(self.of_policies)}
            wanted = each.usual_steps(len(of)) if len(kinds) > 1 else 0
        if isinstance(wanted, int):
            grid = simplex(len(of), wanted) if wanted else []
            wanted = [dict(zip(of, own, strict=True)) for own in grid]
        given = [*wanted, *([chosen] if chosen else [])]
        found = [each.shares(weights, of) for weights in given]
        return [own for n, own in enumerate(found) if own not in found[:n]]

    @property
    def policy_rank(self) -> int:
        """The rank of a finished policy's task vector: a mean of checkpoints stacks theirs."""
        stacked = 1 if self.lora.init == "frozen" else self.warp.average_last
        return self.lora.rank * stacked

    @property
    def largest_rank(self) -> int:
        """The largest rank that any policy trains."""
        return max(own.lora.rank for own in self.of_policies)

    @property
    def merged_rank(self) -> int:
        """The rank of the merge of one iteration's policies, without their init."""
        return sum(own.policy_rank for own in self.of_policies)

    @property
    def kept_states(self) -> int:
        """How many earlier states a policy keeps: the best one, or those that are averaged."""
        return self.warp.average_last if self.warp.average_last > 1 else int(self.stop.is_set)

    @model_validator(mode="after")
    def consistent(self) -> "Config":
        batch, group = self.optim.batch_size, self.rollout.completions_per_prompt
        if batch % group:
            raise ValueError(
                f"optim.batch_size={batch} is not a multiple of"
                f" rollout.completions_per_prompt={group}"
            )
        if self.warp.advantage in ("rloo", "grpo") and group < 2:
            raise ValueError(
                "rollout.completions_per_prompt must be at least 2 with warp.advantage="
                f"{self.warp.advantage} (or use advantage=mean)"
            )
        if self.warp.advantage == "mean" and batch < 2:
            raise ValueError("optim.batch_size must be at least 2 with warp.advantage=mean")
        share, split = self.cluster.gpus_per_rollout_worker, self.rollout.tensor_parallel_size
        if share and share < 1 < split:
            raise ValueError(
                f"cluster.gpus_per_rollout_worker={share:g} is a share of a GPU, and"
                f" rollout.tensor_parallel_size={split} splits a model over whole ones; set one of"
                " them to 1"
            )
        self._check_rewards()
        self._check_stop()
        self._check_each()
        self._check_weights()
        if self.warp.average_last > (most := -(-self.warp.steps // self.checkpoint_every)):
            raise ValueError(
                f"warp.average_last={self.warp.average_last} checkpoints, and warp.steps="
                f"{self.warp.steps} with checkpoint_every={self.checkpoint_every} makes {most}"
            )
        return self

    def _check_rewards(self) -> None:
        """Raise ValueError if there are rewards of two forms, or two of one name."""
        names = [entry.name for entry in self.rewards]
        if names and self.reward != RewardConfig():
            raise ValueError(
                "reward and rewards are both given; put that of reward into the list of rewards,"
                " with a name"
            )
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"rewards: two of them have the name {twice}; each needs its own")
        for n, entry in enumerate(self.rewards):
            if not (entry.model or entry.function):
                raise ValueError(
                    f"rewards.{n} ({entry.name}) has neither a model nor a function; give one"
                )
        if names and not any(entry.weight for entry in self.rewards):
            raise ValueError("rewards: every weight is 0, so there is nothing to train on")

    def _check_each(self) -> None:
        """Raise ValueError if the changes of a policy do not fit the run."""
        for m in range(1, len(self.warp.each or []) + 1):
            try:
                self.of_policy(m)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                text = first["msg"].removeprefix("Value error, ")
                raise ValueError(f"warp.each, policy {m}: {where and f'{where}: '}{text}") from None
            except ValueError as error:
                raise ValueError(f"warp.each, policy {m}: {error}") from None

    def _check_weights(self) -> None:
        """Raise ValueError if shares of a merge name what is not there, or there is no merge."""
        wanted, chosen = self.front.weights, self.front.choose.weights
        given = [("front.weights", own) for own in (wanted if isinstance(wanted, list) else [])]
        given += [("front.choose.weights", chosen)] if chosen else []
        of = self.corners if given else {}
        for key, weights in given:
            try:
                each.shares(weights, of)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        if (wanted or chosen) and self.warp.policies == 1:
            raise ValueError("front.weights are shares of policies, and warp.policies=1")
        if self.tune and chosen:
            raise ValueError("front.choose.weights: the trials of tune are compared by their line")

    def _check_stop(self) -> None:
        """Raise ValueError if a stop rule lacks what it needs, or contradicts another key."""
        if not self.stop.is_set:
            return
        if not self.front.every:
            raise ValueError("stop needs held-out measurements while training, and front.every=0")
        if self.stop.control_falls is not None and self.control is None:
            raise ValueError(
                "stop.control_falls needs a control score, and there is none; set control.model or"
                " control.function"
            )
        if self.warp.average_last > 1:
            raise ValueError(
                f"warp.average_last={self.warp.average_last} and stop contradict each other: one"
                " takes the mean of the last checkpoints, the other the best state"
            )
