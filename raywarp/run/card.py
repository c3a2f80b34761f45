"""The model card (README.md) of a run's chosen adapter.

It says what the adapter is, what it was made from, its reward and KL, and how to use it.
"""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml

from raywarp.adapters.notes import base_loading
from raywarp.config.load import compact
from raywarp.config.rewards import RewardConfig
from raywarp.config.schema import SMOLLM2, Config
from raywarp.rollout.engine import lora_slots
from raywarp.run.ceiling import Ceiling, front_share
from raywarp.run.figures import footnote, front_rows, steps_in_words
from raywarp.run.folder import PICTURE
from raywarp.run.points import Point
from raywarp.run.sampler_mark import Mark
from raywarp.storage.location import is_uri

HUB_NAMES = {SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}  # hub ids of the embedded models


@dataclass(frozen=True)
class Origin:
    """Where the adapters of a front come from, in words.

    Attributes:
        picture: title of the picture.
        title: of the card, after the model's name.
        about: the card's first sentence.
        rows: what else the card says of them: pairs of a label and a value.
    """

    picture: str
    title: str
    about: str
    rows: Sequence[tuple[str, str]]


def run_origin(config: Config) -> Origin:
    """Return what a run says of its policies."""
    warp, base = config.warp, hub_name(config.model)
    steps = steps_in_words(own.warp.steps for own in config.of_policies)
    return Origin(
        f"WARP, I={warp.iterations}, M={warp.policies}: {config.model}",
        "aligned with WARP",
        (
            f"A LoRA adapter that aligns {code(base or config.model)} with a reward by WARP"
            " (Weight Averaged Rewarded Policies, arXiv 2406.16768), made with raywarp"
            f" {version('raywarp')}: {warp.iterations} × {warp.policies} policies of {steps}"
            " steps, averaged in ΔW on the sphere."
        ),
        _training(config),
    )


def card(
    config: Config,
    points: Sequence[Point],
    chosen: Point,
    rank: int,
    modules: Sequence[str],
    ceiling: Ceiling | None = None,
    origin: Origin | None = None,
) -> str:
    """Return the card as Markdown, with the YAML head that model hubs read.

    Args:
        config: the run's configuration.
        points: points of the front, in the order of front.json.
        chosen: the point that the adapter holds.
        rank: rank of the adapter.
        modules: names of the weights that the adapter changes.
        ceiling: the ceiling of the front, if it was measured.
        origin: where the front's adapters come from; by default the run's own policies.
    """
    origin = origin or run_origin(config)
    base = hub_name(config.model)
    head = {
        **({"base_model": base} if base else {}),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "peft", "rlhf", "warp", "raywarp"],
    }
    beyond = ", extrapolated beyond the policies" if chosen.extrapolated else ""
    shares = ", ".join(f"{name} {share:.3g}" for name, share in chosen.weights.items())
    average = f"average with the shares {shares}" if shares else "average"
    about = (
        f"{origin.about} Of the line from the SFT model (η = 0) to their {average} (η = 1) this is"
        f" η = {chosen.liti or chosen.eta or 0:g}{beyond}: reward {chosen.reward:.2f} ±"
        f" {chosen.reward_ci:.2f}{_parts(chosen)}, at a KL to the SFT model of {chosen.kl:.2f} ±"
        f" {chosen.kl_ci:.2f} nats"
        " per completion."
    )
    parts = [
        "---\n" + yaml.safe_dump(head, sort_keys=False, allow_unicode=True) + "---",
        f"# {_flat(_model_name(base or config.model))} {origin.title}",
        textwrap.fill(about, 110, break_long_words=False, break_on_hyphens=False),
        "## The front",
        _front(config, points, chosen, ceiling),
        f"![KL–reward front]({PICTURE})",
        "## What it was made from",
        _table(("", ""), [*_sources(config, rank, modules), *origin.rows, *_sampling(config)]),
        "## Use",
        _use(config, base, rank),
        "## Limits",
        _limits(config, chosen),
    ]
    return "\n\n".join(parts) + "\n"


def marked(text: str, mark: Mark) -> str:
    """Return the card of an earlier version's run, with the run's mark below the title."""
    title = re.search(r"^# .*$", text, re.MULTILINE)
    place = title.end() if title else len(text)
    return f"{text[:place]}\n\n> **{mark.title}.** {mark.text}{text[place:]}"


def with_points(text: str, names: Sequence[str], place: str | None) -> str:
    """Return a card that says where the other points of the front's line are.

    Args:
        names: of the points, as save_line has them.
        place: "subfolders" or "revisions".
    """
    argument = "subfolder" if place == "subfolders" else "revision"
    where = "folder of this repository" if place == "subfolders" else "branch of this repository"
    more = (
        f"Each measured point of the line is here, in a {where}: {', '.join(map(code, names))}."
        f' `PeftModel.from_pretrained(base, repository, {argument}="{names[0]}")` loads one.'
    )
    return text.replace("## What it was made from", f"{more}\n\n## What it was made from", 1)


def hub_name(model: str) -> str | None:
    """Return the model's id on a hub, or None for a folder."""
    return HUB_NAMES.get(model) or (
        None if Path(model).expanduser().is_dir() or is_uri(model) else model
    )


def _front(config: Config, points: Sequence[Point], chosen: Point, ceiling: Ceiling | None) -> str:
    headings, *rows = front_rows(points, ceiling)
    for point, row in zip(points, rows, strict=True):
        if point == chosen:
            row[0] = f"**{row[0]}** (this adapter)"
    front = config.front
    each = (
        "one completion"
        if front.completions_per_prompt == 1
        else f"{front.completions_per_prompt} completions"
    )
    sampling = (
        f"{front.prompts} held-out prompts, {each} each at temperature"
        f" {config.rollout.temperature:g}"
    )
    note = f"{sampling}; KL is to the SFT model, ± is half of a 95 % interval over prompts"
    if chosen.retention is not None:
        note += (
            "; retention is the change of the cross-entropy on unrelated texts, in nats per token"
        )
    note += f"{footnote(points)}."
    if ceiling:
        note += (
            f" The ceiling is the most reward that any policy can have at a KL, from"
            f" {ceiling.completions} SFT completions of each prompt."
            f" {front_share(points, ceiling, config.front.share_kl)}."
        )
    return f"{_table(headings, rows)}\n\n{note}"


def _sources(config: Config, rank: int, modules: Sequence[str]) -> list[tuple[str, str]]:
    names = sorted({module.rpartition(".")[2] for module in modules})
    return [
        (
            "base",
            code(config.model)
            + ("" if (held := config.base.quantize) == "none" else f", linear layers in {held}"),
        ),
        *(
            [("SFT adapter on it, which this one contains", code(config.sft_adapter))]
            if config.sft_adapter
            else []
        ),
        ("prompts", ", ".join(code(one.dataset) for one in config.prompts.sources)),
        *_rewards(config),
        *(
            [("control score, which training never saw", _reward_name(config.control))]
            if config.control
            else []
        ),
        (
            "adapter",
            f"rank {rank} on {', '.join(map(code, names))}",
        ),
    ]


def _training(config: Config) -> list[tuple[str, str]]:
    warp, optim = config.warp, config.optim
    return [
        ("each policy", f"rank {config.policy_rank}"),
        (
            "WARP",
            ", ".join(
                f"{name} {value if isinstance(value, str) else format(value, 'g')}"
                for name, value in (
                    ("anchor", warp.anchor),
                    ("EMA rate", warp.ema_rate),
                    ("LITI rate", warp.liti_rate),
                    ("KL coefficient", warp.kl_coef),
                    ("KL target", warp.kl_target),
                    ("advantage", warp.advantage),
                )
                if value is not None
            ),
        ),
        ("optimiser", f"AdamW, learning rate {optim.lr:g}, {optim.batch_size} completions a step"),
        *[
            (
                f"policy {m}, instead",
                ", ".join(f"{key} {code(compact(value))}" for key, value in own),
            )
            for m, own in enumerate((changes.items() for changes in warp.each or []), start=1)
            if own
        ],
        *([("merge weights", compact(warp.merge_weights))] if warp.merge_weights else []),
    ]


def _sampling(config: Config) -> list[tuple[str, str]]:
    rollout = config.rollout
    return [
        (
            "sampling",
            f"at most {rollout.max_new_tokens} tokens at temperature {rollout.temperature:g}",
        ),
        ("seed", str(config.seed)),
    ]


def _parts(point: Point) -> str:
    """Return the means of several rewards, in brackets."""
    means = ", ".join(f"{name} {mean:.2f}" for name, mean in point.rewards.items())
    return f" ({means})" if means else ""


def _rewards(config: Config) -> list[tuple[str, str]]:
    if not config.rewards:
        return [("reward", _reward_name(config.reward))]
    return [
        (f"reward {entry.name}, weight {entry.weight:g}", _reward_name(entry))
        for entry in config.rewards
    ]


def _reward_name(reward: RewardConfig) -> str:
    return (
        f"function {code(reward.function)}"
        if reward.function
        else f"model {code(reward.model or '')}"
    )


def _use(config: Config, base: str | None, rank: int) -> str:
    name = base or config.model
    held = config.base.quantize
    lines = base_loading("AutoModelForCausalLM", "transformers", name, held)
    load = "\n".join(
        [
            *("```python", "from peft import PeftModel", *lines),
            *('model = PeftModel.from_pretrained(model, "this folder")', "```"),
        ]
    )
    if held != "none":
        return (
            f"{load}\n\nvLLM does not read {held}. `raywarp bake FOLDER --out MODEL` writes the"
            " dequantised base with this adapter as a model that it serves."
        )
    slots = lora_slots(rank)
    serve = (
        f"```sh\nvllm serve {name} --enable-lora --max-lora-rank {slots} --lora-modules"
        " warp=/path/to/this/folder\n```"
        if slots
        else (
            "vLLM serves no LoRA of this rank: merge it into float32 weights, or truncate it with"
            " `raywarp merge lerp FOLDER --rank 256`."
        )
    )
    return f"{load}\n\n{serve}"


def _limits(config: Config, chosen: Point) -> str:
    sources = list(config.rewards_by_key.values())
    kind = "itself a model" if any(source.model for source in sources) else "a function"
    kind = f"a sum of {len(sources)}" if len(sources) > 1 else kind
    control = (
        "compare it with the control score"
        if chosen.control is not None
        else "no control score was measured"
    )
    return "\n".join(
        [
            (
                f"- The reward is {kind}, and a policy learns whatever raises it: {control}, and"
                " read the texts."
            ),
            (
                f"- Prompts and completions were as above, of up to {config.rollout.max_new_tokens}"
                " tokens; nothing is known of others."
            ),
            "- Where the base model is wrong or harmful, so may this be.",
            "- Intervals are over prompts, of one training run.",
        ]
    )


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def code(text: str) -> str:
    """Return a text as inline code in Markdown."""
    return f"`{_flat(text).replace('`', chr(39))}`"


def _flat(text: str) -> str:
    return " ".join(text.split())


def _model_name(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]
