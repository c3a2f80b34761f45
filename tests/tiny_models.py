"""Tiny models with random weights: a Llama, a GPT-2, a BERT classifier, and trained adapters."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from raywarp.model.adapted import AdaptedModel

SENTENCE = (
    "the a film is was good bad great awful and plot acting of in story very not movie this it I"
    " liked hated fine dull"
)
WORDS = SENTENCE.split()


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer with a chat template, one BOS in front, EOS never appended."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: n for n, token in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )
    fast.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)


def save_tiny_llama(folder: Path, seed: int = 0, hidden: int = 64, inner: int = 96) -> Path:
    """2 layers, grouped-query attention: small enough to train in a test, real enough for vLLM."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=3 + len(WORDS),
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tiny_gpt2(folder: Path, seed: int = 0) -> Path:
    """Conv1D weights and the dropout of 0.1 that GPT-2 ships."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=3 + len(WORDS),
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


BERT_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "plot", "a", "the", "was")


def build_tokenizer(pad: bool = True) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate(BERT_WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = {"pad_token": "[PAD]"} if pad else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", eos_token="[SEP]", model_max_length=64, **named
    )


def build_bert(folder: Path, labels: int = 1) -> Path:
    """A random two-layer BERT classifier, as a folder."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    model = BertForSequenceClassification(
        BertConfig(vocab_size=len(BERT_WORDS), num_labels=labels, **sizes)
    )
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def trained_model(folder: Path, names: tuple[str, ...]) -> "AdaptedModel":
    """Adapters with a change large enough to see."""
    from raywarp.config.policies import LoraConfig
    from raywarp.model.adapted import AdaptedModel

    model = AdaptedModel(
        str(folder), LoraConfig(rank=2, alpha=4.0), torch.float32, torch.device("cpu")
    )
    for n, name in enumerate(names):
        model.add_policy(name, seed=n)
        for key, tensor in model.tensors(name).items():
            if key.endswith(".B"):
                tensor.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(n))
    return model
