"""What a user has to know of the adapters that were read, and of how their merge is loaded."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from raywarp.adapters.peft import AdapterFile
from raywarp.adapters.peft_config import BASE_QUANTIZE
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.fitting import joint_targets

# task_type → the class of transformers that loads the base, and the hub's pipeline tag.
_TASKS = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
}


def merge_like(files: Sequence[AdapterFile]) -> AdapterDelta:
    """Return the attributes of the merge: the first named base, and targets that cover all."""
    like = next((file for file in files if file.like().base_model), files[0]).like()
    if all(len(file.own) == len(file.shapes) for file in files):
        return like
    likes = [like, *(file.like() for file in files)]
    targets, peft = joint_targets([(x.target_modules, x.peft) for x in likes], files[0].shapes)
    return replace(like, target_modules=targets, peft=peft)


def notes(files: Sequence[AdapterFile]) -> list[str]:
    """Return a line for each adapter that lacks modules of others, or has tensors to skip."""
    lines = []
    for file in files:
        if absent := absent_modules(file):
            lines.append(
                f"{file.name} does not adapt {absent[0]} ({len(absent)} modules in all): its change"
                " is zero there"
            )
        if file.skipped:
            lines.append(
                f"{file.name}: skipped {', '.join(file.skipped)}, which LoRA does not train"
            )
    return lines


def absent_modules(file: AdapterFile) -> list[str]:
    """Return the modules that other adapters change and this one does not."""
    own = set(file.own)
    return [module for module in file.shapes if module not in own]


def pipeline_tag(like: AdapterDelta) -> str | None:
    """Return the hub's pipeline tag of an adapter, if its task has one."""
    return _TASKS.get(str(like.peft.get("task_type")), (None, None))[1]


def usage(like: AdapterDelta) -> list[str]:
    """Return the lines of Python that load an adapter on its base.

    Where PEFT's configuration does not say which class the base has, loading it is left to the
    reader.
    """
    name, library = _base_class(like)
    lines = ["```python", "from peft import PeftModel"]
    if name:
        revision = like.peft.get("revision")
        more = f', revision="{revision}"' if revision else ""
        base, held = like.base_model or "the base model", like.peft.get(BASE_QUANTIZE)
        lines += base_loading(name, library, base, held, more)
    else:
        lines += ["", "model = ...  # the base model, loaded as for training"]
    return [*lines, 'model = PeftModel.from_pretrained(model, "this folder")', "```"]


def base_loading(
    kind: str, library: str, base: str, held: str | None = None, more: str = ""
) -> list[str]:
    """Return the lines of Python that load a base.

    Args:
        kind: the class that loads it.
        library: the class's library.
        base: folder or hub id.
        held: base.quantize.
        more: further arguments, with a comma in front.
    """
    name = json.dumps(base)
    if held != "nf4":
        return [
            f"from {library} import {kind}",
            "",
            f"model = {kind}.from_pretrained({name}{more})",
        ]
    return [
        f"from {library} import {kind}, BitsAndBytesConfig",
        "",
        'four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",'
        ' bnb_4bit_compute_dtype="bfloat16")',
        f"model = {kind}.from_pretrained(",
        f'    {name}{more}, dtype="bfloat16", quantization_config=four_bits',
        ")",
    ]


def _base_class(like: AdapterDelta) -> tuple[str | None, str]:
    """Return the class that loads the base, and its library."""
    if task := _TASKS.get(str(like.peft.get("task_type"))):
        return task[0], "transformers"
    known: Any = like.peft.get("auto_mapping")
    known = known if isinstance(known, dict) else {}
    library = str(known.get("parent_library", "")).partition(".")[0]
    name = known.get("base_model_class")
    return (name if library in ("transformers", "diffusers") else None), library
