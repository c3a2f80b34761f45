"""TRL's RLOOTrainer, step by step on command: the other side of step.py, run by a Python with TRL.

It reads a JSON object of settings from its first argument. It prints one JSON line when it is ready
and one per optimiser step. Before each step it waits for a line on its input, so that two sides can
take turns (not with `free_running`). It ends with its peak memory.
"""

import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import RLOOConfig, RLOOTrainer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

PHASES = {  # TRL's own profiling contexts, by what they are called here
    "transformers.generate": "generation",
    "vLLM.generate": "generation",
    "sync_weights": "weights",
    "_get_per_token_logps_and_entropies": "forward",
    "_calculate_rewards": "reward",
}


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    analyzer = SentimentIntensityAnalyzer()

    def vader(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [
            analyzer.polarity_scores(p + c)["compound"]
            for p, c in zip(prompts, completions, strict=True)
        ]

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    trainer = RLOOTrainer(
        model=settings["model"],
        reward_funcs=vader,
        args=arguments(settings),
        train_dataset=Dataset.from_dict({"prompt": settings["prompts"]}),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=16,
            lora_alpha=16,
            target_modules="all-linear",
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        ),
    )
    steps = Steps(trainer, settings["free_running"])
    trainer.add_callback(steps)
    say({"event": "ready"})
    trainer.train()
    if settings.get("save"):
        trainer.save_model(settings["save"])
    say({"event": "end", "peak_rss_mib": peak_rss_mib()})


def arguments(settings: dict[str, Any]) -> RLOOConfig:
    """The same work on all variants; what a tuned one adds comes with the settings (see
    step.py).
    """
    common: dict[str, Any] = {
        "output_dir": settings["folder"],
        "use_cpu": True,
        "max_steps": settings["steps"],
        "per_device_train_batch_size": (
            settings["prompts_per_step"] * settings["completions_per_prompt"]
        ),
        "num_generations": settings["completions_per_prompt"],
        "max_completion_length": settings["new_tokens"],
        "temperature": settings["temperature"],
        "beta": 0.05,
        "learning_rate": 5e-4,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": settings["dtype"] == "bfloat16",
        "generation_kwargs": (
            {"min_new_tokens": settings["new_tokens"]} if settings["forced"] else None
        ),
    }
    return RLOOConfig(**common | settings["options"])


class Steps(TrainerCallback):
    """Waits before each step, and reports it: seconds, of them by phase, and the tokens it trained
    on.
    """

    def __init__(self, trainer: RLOOTrainer, free_running: bool):
        self.trainer, self.free_running = trainer, free_running
        self.seconds: dict[str, float] = defaultdict(float)
        self._measure_phases()

    def _measure_phases(self) -> None:
        """TRL writes its profile to a log of its own; its contexts are timed here instead."""
        import trl.extras.profiling as profiling
        import trl.trainer.rloo_trainer as module

        steps, original = self, module.profiling_context

        class Timed:
            def __init__(self, trainer: Any, name: str):
                self.name, self.inner = name, original(trainer, name)

            def __enter__(self) -> None:
                self.start = time.perf_counter()
                self.inner.__enter__()

            def __exit__(self, *error: Any) -> None:
                self.inner.__exit__(*error)
                phase = PHASES.get(self.name)
                if phase:
                    steps.seconds[phase] += time.perf_counter() - self.start

        module.profiling_context = profiling.profiling_context = Timed

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.free_running:
            sys.stdin.readline()
        self.seconds.clear()
        self.start = time.perf_counter()
        self.before = self.trainer.state.num_input_tokens_seen

    def on_step_end(self, *_: Any, **__: Any) -> None:
        seconds = time.perf_counter() - self.start
        lengths = self.trainer._metrics["train"]["completions/mean_length"]
        tokens = lengths[-1] * self.trainer.args.per_device_train_batch_size
        say({"event": "step", "seconds": seconds, "tokens": round(tokens), **self.seconds})


def say(row: dict[str, Any]) -> None:
    print("\n" + json.dumps(row), flush=True)


def peak_rss_mib() -> float:
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
