"""Check every family of tests/architectures.py: the trainer, and each sampler.

    # everything; writes docs/architectures.md
    python tests/bench/architectures.py
    # some cells, printed only
    python tests/bench/architectures.py --families Llama --columns trainer "vLLM, unmerged"

The trainer is compared with the model's own eager code, and each sampler with the trainer.

A cell is a process of its own, since an engine may end it. The trainer's cell compares log-probs
and gradients on mixed lengths, without an adapter and with one. It also checks that a resumed step
is the same step. A sampler's cell compares its log-probs of its own completions with the trainer's
of the same tokens. This is done without an adapter, with one, without it again, and with another
one. Where it is offered, both adapters are also compared in one call.

A cell is right, refused, or not measurable here. A refusal is a message that says why, before
anything is trained. Not measurable means that the engine does not run this tiny model on this
machine. Anything else is wrong. The last line is JSON: the number of each, and the wrong cells.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

SAMPLERS = {
    "transformers, unmerged": ("transformers", "unmerged", "float32"),
    "transformers, merged": ("transformers", "merged", "float32"),
    "vLLM, unmerged": ("vllm", "unmerged", "float32"),
    "vLLM, merged": ("vllm", "merged", "float32"),
    "vLLM, LoRA": ("vllm", "lora", "float32"),
    "vLLM, unmerged, bfloat16": ("vllm", "unmerged", "bfloat16"),
}
COLUMNS = ["trainer", *SAMPLERS]
PROCESSES = multiprocessing.get_context("forkserver")
SECONDS = 400  # of a cell
NEW_TOKENS = 12
# nats of the worst token, and in bfloat16 of the mean one
LARGEST_GAP = {
    "float32": 2e-3,
    "bfloat16": 0.15,
}
VLLM = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}
NOT_HERE = {  # part of a refusal's text → why it says nothing of the family
    "triton": "vLLM's LoRA for experts asks for triton, which CPUs lack",
    "is not supported on CPU": "vLLM runs it on GPUs only",
}


def main() -> None:
    from architectures import FAMILIES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--columns", nargs="+", default=COLUMNS, choices=COLUMNS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time")
    options = parser.parse_args()
    places = list(itertools.product(options.families, options.columns))
    with (
        ThreadPoolExecutor(options.jobs) as pool,
        tempfile.TemporaryDirectory(prefix="raywarp-bench-") as cache,
    ):
        # vLLM notes there what it knows of a model's class, which takes it ten seconds.
        os.environ.update(
            VLLM
            | {
                "VLLM_CACHE_ROOT": cache,
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE.parent}",
            }
        )
        PROCESSES.set_forkserver_preload(
            ["torch", "transformers", "peft", "vllm.entrypoints.llm", "raywarp.model.adapted"]
        )
        cells = dict(zip(places, pool.map(run, *zip(*places, strict=True)), strict=True))
    if (options.families, options.columns) == (list(FAMILIES), COLUMNS):
        (ROOT / "docs" / "architectures.md").write_text(page(cells))
    wrong = [
        f"{family}; {column}"
        for (family, column), found in cells.items()
        if found["verdict"] == "wrong"
    ]
    print(
        json.dumps({**Counter(found["verdict"] for found in cells.values()), "wrong_cells": wrong})
    )


def run(family: str, column: str) -> dict[str, Any]:
    """A cell in a process of its own: verdict and why."""
    found = _run(family, column)
    print(f"{family}; {column}: {' '.join(map(str, found.values()))}", flush=True)
    return found


def _run(family: str, column: str) -> dict[str, Any]:
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=answer, args=(theirs, family, column))
    process.start()
    theirs.close()
    try:
        if ours.poll(SECONDS):
            return dict(ours.recv())
        return {"verdict": "wrong", "why": f"no result within {SECONDS} s"}
    except EOFError:
        process.join()
        return {"verdict": "wrong", "why": f"the process ended with code {process.exitcode}"}
    finally:
        process.kill()


def answer(pipe: Any, family: str, column: str) -> None:
    """Runs in the cell's process, which an engine's threads would keep alive."""
    with tempfile.TemporaryDirectory(prefix="raywarp-bench-") as home:
        os.environ["HOME"] = home
        pipe.send(cell(family, column))
    pipe.close()
    os._exit(0)


def cell(name: str, column: str) -> dict[str, Any]:
    from architectures import FAMILIES, save_model

    from raywarp.config.schema import ConfigError

    family = FAMILIES[name]
    with tempfile.TemporaryDirectory(prefix="raywarp-bench-") as folder:
        save_model(family, Path(folder))
        try:
            return (
                trainer_cell(family, Path(folder))
                if column == "trainer"
                else sampler_cell(family, Path(folder), *SAMPLERS[column])
            )
        except ConfigError as error:
            text = str(error).replace(folder, "…")
            for part, meaning in NOT_HERE.items():
                if part in text:
                    return {"verdict": "not measurable here", "why": f"{meaning}: {text}"}
            return {"verdict": "refused", "why": text}
        except Exception as error:
            return {
                "verdict": "wrong",
                "why": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            }


def trainer_cell(family: Any, folder: Path) -> dict[str, Any]:
    from architectures import compare, mixed_batch, resumes_exactly, trainer

    found = compare(trainer(folder, family), folder, mixed_batch(family.lengths))
    resumed = resumes_exactly(folder, family)
    why = (
        f"log-probs within {max(found.plain, found.adapted):.0e} nats, gradients within"
        f" {found.gradient:.0e}"
    )
    return {
        "verdict": "right" if found.is_right and resumed else "wrong",
        "why": why if resumed else f"{why}; a resumed step differs",
    }


def sampler_cell(family: Any, folder: Path, engine: str, mode: str, dtype: str) -> dict[str, Any]:
    """Sampled log-probs against the trainer's, in the phases that the module's docstring lists."""
    import torch
    from architectures import engine_prompts, random_policy, trainer

    from raywarp.cluster.turns import finish
    from raywarp.config.load import parse_config
    from raywarp.model.supported import refuse_unsupported
    from raywarp.rollout.engine import EngineSettings
    from raywarp.rollout.protocol import SFT, Adapter, Request
    from raywarp.rollout.worker import start_engine

    tree = {
        "engine": engine,
        "adapter": mode,
        "max_new_tokens": NEW_TOKENS,
        "temperature": 1.0,
        "kv_cache_gib": 0.5,
        "ignore_eos": True,
    }
    rollout = parse_config({"rollout": tree}).rollout
    config = family.build()
    prompts = engine_prompts(config, NEW_TOKENS)
    longest = max(map(len, prompts)) + NEW_TOKENS
    refuse_unsupported(str(folder), config, rollout, longest)
    model = trainer(folder, family, getattr(torch, dtype))
    random_policy(model, "other", seed=7)
    parts: list[Any] = [Part(name, model.delta(name)) for name in ("policy", "other")]
    first, second = (Adapter(policy=part) for part in parts)
    sampler = start_engine(EngineSettings(str(folder), dtype, longest, 2, rollout, gpu=False))
    # For some families vLLM 0.32 changes transformers' own class, which the trainer has here; in a
    # run they are in different processes.
    type(model._base.base_model).do_not_compile = True
    phases: list[list[Adapter]] = [[SFT], [first], [SFT], [second], [SFT]]
    if mode != "merged":
        phases.insert(3, [first, SFT, second])
    gaps = {}
    for adapters in phases:
        sampler.loader.load(adapters)
        answers = finish(
            sampler.sample(
                [Request(prompts, list(range(len(prompts))), adapter) for adapter in adapters]
            )
        )
        for adapter, completions in zip(adapters, answers, strict=True):
            gap = gap_of(
                model, [part.version for part in adapter.parts], prompts, completions, dtype
            )
            gaps["+".join(part.version for part in adapter.parts) or "none"] = gap
    worst, kind = max(gaps.values()), "worst" if dtype == "float32" else "mean"
    if worst < LARGEST_GAP[dtype]:
        return {
            "verdict": "right",
            "why": f"{kind} token within {worst:.0e} nats of the trainer's, up to {longest} tokens",
        }
    return {
        "verdict": "wrong",
        "why": (
            f"{kind} token, nats: {', '.join(f'{name} {gap:.1e}' for name, gap in gaps.items())}"
        ),
    }


def gap_of(
    model: Any, adapters: list[str], prompts: list[list[int]], completions: Any, dtype: str
) -> float:
    """Nats between the sampler's and the trainer's log-probs: of the worst token in float32, of the
    mean one in bfloat16.
    """
    from raywarp.model.batches import collate, micro_batches

    batch = collate(prompts, completions)
    (part,) = micro_batches(batch, pairs_per_token=model.pairs_per_token)
    own = model.logprobs(part, model.states(part, adapters), 1.0)[part.completions.argsort()]
    gaps = (own - batch.sampler_logprobs).abs()[batch.mask.bool()]
    return float(gaps.max() if dtype == "float32" else gaps.mean())


class Part:
    """An AdapterPart without Ray."""

    def __init__(self, version: str, delta: Any):
        self.version, self.delta, self.rank = version, delta, delta.rank

    def fetch(self) -> Any:
        return self.delta


def page(cells: dict[tuple[str, str], dict[str, Any]]) -> str:
    """docs/architectures.md."""
    import importlib.metadata as metadata

    families = list(dict.fromkeys(family for family, _ in cells))
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("transformers", "peft", "vllm-cpu", "torch")
    )
    notes: dict[str, int] = {}
    lines = [
        INTRODUCTION.format(versions=versions),
        "| | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for family in families:
        row = []
        for column in COLUMNS:
            found = cells[family, column]
            if found["verdict"] == "right":
                row.append("right")
            else:
                row.append(f"{found['verdict']} [{notes.setdefault(found['why'], len(notes) + 1)}]")
        lines.append(f"| {family} | " + " | ".join(row) + " |")
    lines += ["", *(f"{number}. {why}" for why, number in notes.items())]
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Architectures

Written by `python tests/bench/architectures.py` ({versions}, on CPUs). Every model is tiny and random, with windows, chunks and rope limits
of 16 to 64 tokens, and each row was measured below and above them.

- **trainer**: log-probs and gradients against the model's own eager code, one sequence at a time, in float32; and that a resumed step is
  the same step.
- the others: log-probs of a sampler's own completions against the trainer's, before, with, between and after adapters.
- **refused**: the run ends before its first step, with the message below the table. **not measurable here**: the engine does not run this
  tiny model on this machine, so nothing is known about it.
"""  # noqa: E501


if __name__ == "__main__":
    main()
