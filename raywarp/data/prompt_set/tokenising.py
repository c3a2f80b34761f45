"""Many rows tokenised by several processes, into arrow files that are mapped into memory."""

import contextlib
import os
import sys
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from raywarp.data.prompt_set.rendering import PromptRenderer
from raywarp.storage import scratch

if TYPE_CHECKING:
    import datasets

BLOCK = 100_000  # rows between two lines of progress
IN_MEMORY = 20_000  # rows up to which tokens stay in memory
PER_PROCESS = 10_000  # rows that are worth a process
MOST_PROCESSES = 8


def rendered(
    rows: "datasets.Dataset", renderer: PromptRenderer, say: Callable[[str], None]
) -> "datasets.Dataset":
    """Return what `renderer` makes of all rows, as arrow.

    Large datasets are tokenised by several processes into files of a temporary folder, which are
    mapped into memory. Each block of rows is reported. The folder goes with the result.
    """
    import datasets

    datasets.disable_progress_bars()  # lines say how far it is
    features = datasets.Features(
        {
            "row": datasets.Value("int64"),
            "state": datasets.Value("int8"),
            "text": datasets.Value("large_string"),
            "messages": datasets.Value("large_string"),
            "token_ids": datasets.List(datasets.Value("int32")),
            "undated": datasets.List(datasets.Value("int32")),
            "group": datasets.Value("binary"),
            "same": datasets.Value("binary"),
        }
    )
    count, start, blocks = len(rows), time.monotonic(), []
    folder = scratch.claim() if count > IN_MEMORY else None
    processes = _processes()
    with _single_threaded_tokenizers() if folder else contextlib.nullcontext():
        for first in range(0, count, BLOCK):
            done = min(first + BLOCK, count)
            block = rows.select(range(first, done))
            make = partial(_block, block, renderer, features, first, folder)
            try:
                blocks.append(make(processes))
            except RuntimeError as error:
                if "abruptly died" not in str(error):  # datasets 5.2's words
                    raise
                say("prompts: a tokenising process died, as it does without memory; one goes on")
                processes = 1
                blocks.append(make(processes))
            if count > IN_MEMORY:
                rate = done / (time.monotonic() - start)
                say(f"prompts: {done:,} of {count:,} rows tokenised, {rate:,.0f} rows per second")
    found = datasets.concatenate_datasets(blocks)
    if folder:
        weakref.finalize(found, scratch.discard, folder)
    return found


def _block(
    rows: "datasets.Dataset",
    renderer: PromptRenderer,
    features: "datasets.Features",
    first: int,
    folder: Path | None,
    processes: int,
) -> "datasets.Dataset":
    return rows.map(
        renderer,
        with_indices=True,
        batched=True,
        fn_kwargs={"first": first},
        remove_columns=rows.column_names,
        features=features,
        num_proc=processes if folder and processes > 1 else None,
        keep_in_memory=folder is None,
        cache_file_name=str(folder / f"{first}.arrow") if folder else None,
        load_from_cache_file=False,
        new_fingerprint=uuid.uuid4().hex,
    )


def _processes() -> int:
    """Return how many processes tokenise.

    It is one where Ray runs in this process: a fork of its threads is not safe.
    """
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return 1
    return min(len(os.sched_getaffinity(0)), MOST_PROCESSES, BLOCK // PER_PROCESS)


@contextlib.contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    """Let tokenizers use one thread each: the processes are as many as there are cores."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
