"""The section of the configuration that says where processes run and when a run gives up."""

from pydantic import Field

from raywarp.config.field_types import Count, Gpus, NotNegative, Positive, Section, Whole


class ClusterConfig(Section):
    """Where processes go, and when a run gives up. It changes at most the last bits of results."""

    gpus_per_policy: Gpus | None = Field(
        None,
        description=(
            "GPUs of a policy actor, a whole number or a share such as 0.5; default 1 where the"
            " cluster has GPUs"
        ),
    )
    gpus_per_rollout_worker: Gpus | None = Field(
        None,
        description=(
            "GPUs of a rollout worker, times rollout.tensor_parallel_size; default 1 where there"
            " are GPUs"
        ),
    )
    gpus_per_reward_worker: Gpus = Field(
        0, description="GPUs of the reward worker, and of the control's"
    )
    cpus_per_policy: NotNegative | None = Field(
        None,
        description=(
            "CPUs of a policy actor; default 1 beside a GPU, else 0.5: it has nothing to do while"
            " its policy's rollouts run"
        ),
    )
    cpus_per_rollout_worker: NotNegative = Field(1, description="CPUs of a rollout worker")
    cpus_per_reward_worker: NotNegative = Field(
        0, description="CPUs of the reward worker, and of the control's"
    )
    policy_actors: Count | None = Field(
        None,
        description=(
            "actors that share the M policies; default: as many as fit when the run starts, at"
            " most M"
        ),
    )
    threads: Count | None = Field(
        None,
        description=(
            "threads of each CPU process; default: a node's cores over the processes that work at"
            " the same time; part of a policy's key, so set it where machines of different size"
            " share policies"
        ),
    )
    wait_seconds: Positive | None = Field(
        None,
        description=(
            "longest wait for room on the cluster at the start, behind other runs or while nodes"
            " come; default: without end in a job, else timeout_seconds"
        ),
    )
    timeout_seconds: Positive = Field(
        120, description="longest wait for room on the cluster after a loss"
    )
    max_failures: Whole = Field(
        3,
        description=(
            "how often a policy or a worker that got no further since it last failed is made anew"
            " before the run gives up"
        ),
    )
    hang_seconds: Positive = Field(
        600,
        description=(
            "a process that does not answer, or works at one update or rollout for so long, is"
            " reported and started again; likewise whoever waits where nobody has worked for so"
            " long"
        ),
    )
