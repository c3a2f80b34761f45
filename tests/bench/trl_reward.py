"""Exchange reward models with TRL: each side scores what the other one trained.

It needs a Python with raywarp and TRL, and tests/ in PYTHONPATH. It prints one JSON line per
exchange with the largest difference of a score, and fails above 1e-5.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny_models import save_tiny_llama
from transformers import AutoTokenizer
from trl import RewardConfig as TrlConfig
from trl import RewardTrainer

from raywarp.config.datasets import PromptsConfig
from raywarp.config.rewards import RewardConfig, RewardTrainingConfig
from raywarp.data.pairs import of_turns
from raywarp.data.turns import Turn
from raywarp.rewards.bradley_terry import PairTrainer
from raywarp.rewards.classifier import ClassifierReward
from raywarp.rewards.reading import Reading
from raywarp.rewards.score import load_reward, with_template

QUESTIONS = ["is this film good", "the plot was", "a great film it is and I liked it"]
TEXTS = [
    {"prompt": f"{question} ", "chosen": f"very good {word}", "rejected": f"bad {word} and dull"}
    for question in QUESTIONS
    for word in ("film", "plot", "acting", "story")
]


def main() -> None:
    torch.set_num_threads(1)
    worst = 0.0
    for kind in ("texts", "messages"):
        for pad in ("</s>", "<unk>"):
            with tempfile.TemporaryDirectory() as folder:
                worst = max(worst, from_trl(Path(folder), kind, pad))
    with tempfile.TemporaryDirectory() as folder:
        worst = max(worst, to_trl(Path(folder)))
    sys.exit(worst > 1e-5)


def from_trl(folder: Path, kind: str, pad: str) -> float:
    """Train with TRL, and score with raywarp by what the files say."""
    backbone = save_tiny_llama(folder / "backbone")
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tokenizer.pad_token = pad
    trainer = trl_trainer(str(backbone), tokenizer, rows_of(kind), folder / "work")
    trainer.train()
    trainer.save_model(str(folder / "model"))
    theirs = scores_of_trl(trainer)
    config = RewardConfig(model=str(folder / "model"))
    prompts = PromptsConfig(template="chat" if kind == "messages" else "none")
    decided = with_template(config, prompts)
    reward = load_reward(decided)
    ours = [
        reward.score([row["prompt"]], [row[key]])[0]
        for key in ("chosen", "rejected")
        for row in TEXTS
    ]
    together = reward.score(
        [row["prompt"] for row in TEXTS] * 2,
        [row[key] for key in ("chosen", "rejected") for row in TEXTS],
    )
    return report(
        f"TRL to raywarp, {kind}, pad {pad}",
        [theirs, theirs],
        [ours, together],
        reads=decided.model_dump(include={"template", "append_eos", "max_length"}),
    )


def to_trl(folder: Path) -> float:
    """Train with raywarp on messages, and score with TRL's trainer, which loads the folder."""
    backbone = save_tiny_llama(folder / "backbone")
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    pairs = [
        of_turns(
            (Turn("user", row["prompt"]),),
            (Turn("assistant", row["chosen"]),),
            (Turn("assistant", row["rejected"]),),
        )
        for row in TEXTS
    ]
    ours = PairTrainer(
        RewardTrainingConfig(batch_size=4, steps=4, warmup_steps=1, lr=1e-2),
        str(backbone),
        pairs,
        seed=0,
        device=torch.device("cpu"),
        reading=Reading(64, "chat", chat_template=tokenizer.chat_template),
    )
    for _ in range(4):
        ours.update()
    (folder / "model").mkdir()
    ours.export(folder / "model")
    found = ClassifierReward(str(folder / "model"), ours.reading).score(
        [row["prompt"] for row in TEXTS] * 2,
        [row[key] for key in ("chosen", "rejected") for row in TEXTS],
    )
    loaded = AutoTokenizer.from_pretrained(folder / "model")
    trainer = trl_trainer(str(folder / "model"), loaded, rows_of("messages"), folder / "work")
    theirs = scores_of_trl(trainer)
    return report("raywarp to TRL, messages", [found], [theirs])


def rows_of(kind: str) -> list[dict[str, Any]]:
    if kind == "texts":
        return TEXTS
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in TEXTS
    ]


def trl_trainer(
    model: str, tokenizer: Any, rows: list[dict[str, Any]], work: Path
) -> RewardTrainer:
    settings = TrlConfig(
        output_dir=str(work),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_length=64,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    return RewardTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def scores_of_trl(trainer: RewardTrainer) -> list[float]:
    """Return the scores of all chosen, then of all rejected texts, in TRL's own batch."""
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(len(TEXTS))])
    trainer.model.eval()
    with torch.inference_mode():
        return trainer.model(**batch).logits[:, 0].tolist()


def report(name: str, wanted: list[Any], found: list[Any], **more: Any) -> float:
    worst = max(
        abs(a - b)
        for one, other in zip(wanted, found, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    spread = max(wanted[0]) - min(wanted[0])
    print(json.dumps({"exchange": name, "worst": worst, "spread": spread, **more}), flush=True)
    return worst


if __name__ == "__main__":
    main()
