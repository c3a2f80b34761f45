"""Bradley–Terry training of a reward model: loss, optimiser step, validation, checkpoint.

It does not use Ray. One instance is one worker's share. A step is a pure function of (weights,
optimiser, seed, step), so a resumed training gives the bits of an uninterrupted one.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from raywarp.cluster.device import supports_bf16
from raywarp.config.rewards import RewardTrainingConfig
from raywarp.config.schema import ConfigError
from raywarp.data.embedded import Snippet
from raywarp.data.models import load_model
from raywarp.data.pairs import Preference
from raywarp.data.turns import Part
from raywarp.identity import batch_indices, derive_seed
from raywarp.rewards.classifier import classify, load_tokenizer, padding_token
from raywarp.rewards.reading import Reading
from raywarp.storage.sealed import write_json

# Texts of similar length per forward pass. On a CPU padding costs more than small matrices do.
CPU_GROUP = 16
GPU_GROUP = 256


def pair_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, centre: float = 0.0
) -> Tensor:
    """Return mean[−log σ(r_c − r_r − m) + c·(r_c + r_r)²] in nats, which is 0 without pairs.

    A batch of equal ratings has no pairs. The margin m is that of Llama 2 (Touvron et al. 2023,
    eq. 2), and the centring that of Eisenstein et al. (2023), eq. 2. Both are as in TRL 1.16,
    RewardTrainer.compute_loss, whose center_rewards_coefficient is c.

    Args:
        chosen: (N,) scores of the better texts, r_c.
        rejected: (N,) scores of the worse texts, r_r.
        margin: (N,) margins m.
        centre: the weight c.
    """
    losses = -logsigmoid(chosen - rejected - margin)
    if centre:
        losses = losses + centre * (chosen + rejected) ** 2
    return losses.sum() / max(len(chosen), 1)


def learning_rate(settings: RewardTrainingConfig, step: int) -> float:
    """Return the learning rate of a step, which counts from 0.

    It rises linearly as (t+1)/W during warm-up. Then it falls linearly, and would reach 0 one step
    after the last.
    """
    warm_up = (step + 1) / max(settings.warmup_steps, 1)
    decay = (settings.steps - step) / max(settings.steps - settings.warmup_steps, 1)
    return settings.lr * min(1.0, warm_up, decay)


def accuracy_interval(pairs: Sequence[Preference], correct: Sequence[bool]) -> tuple[float, float]:
    """Return the 95 % Wilson interval of the pairwise accuracy, at the effective number of pairs.

    Pairs that share a text are not independent. So the variance of the mean is the dyadic-robust
    one (Fafchamps and Gubert 2007). It sums e_p·e_q over all pairs p, q with a text in common.
    The effective number of pairs gives a binomial that variance.

    Args:
        pairs: N preferences.
        correct: N flags: whether the chosen text scored higher.
    """
    count, mean = len(pairs), sum(correct) / len(pairs)
    per_text: dict[tuple[str, str], float] = {}
    squares = 0.0
    for pair, hit in zip(pairs, correct, strict=True):
        residual = hit - mean
        squares += residual**2
        for text in (pair.chosen, pair.rejected):
            per_text[pair.prompt, text] = per_text.get((pair.prompt, text), 0.0) + residual
    # A pair's own square is in the sums of both its texts.
    covered = sum(total**2 for total in per_text.values()) - squares
    effective = count * squares / covered if covered > squares > 0 else float(count)
    z = 1.96
    centre = (mean + z * z / (2 * effective)) / (1 + z * z / effective)
    half = (
        z
        / (1 + z * z / effective)
        * math.sqrt(mean * (1 - mean) / effective + z * z / (4 * effective**2))
    )
    return max(0.0, centre - half), min(1.0, centre + half)


class PairTrainer:
    """A sequence classifier with one label, its AdamW, and its position in the training.

    The model stays in eval mode, so dropout is off.

    Args:
        backbone: folder or hub id, already resolved.
        train: all training data, either preferences or rated texts. A batch holds batch_size
            preferences, or twice as many rated texts. In a batch of rated texts, each pair whose
            ratings differ by at least `margin` counts.
        rank: this worker's number. It takes every world-th item of each batch.
        world: number of workers.
        wrap: makes the module data-parallel.
        margin: see `train`.
        reading: how a prompt and its completion become one text.

    Raises:
        ConfigError: the backbone cannot be loaded as a sequence classifier.
    """

    def __init__(
        self,
        settings: RewardTrainingConfig,
        backbone: str,
        train: Sequence[Preference] | Sequence[Snippet],
        seed: int,
        device: torch.device,
        trust_remote_code: bool = False,
        rank: int = 0,
        world: int = 1,
        wrap: Callable[[Any], Any] = lambda model: model,
        margin: float = 0.0,
        reading: Reading | None = None,
    ):
        self.settings, self.train, self.seed, self.device, self.rank, self.world = (
            settings,
            train,
            seed,
            device,
            rank,
            world,
        )
        self.tokenizer = load_tokenizer(backbone, trust_remote_code)
        self.reading = reading or Reading(settings.max_length, append_eos=settings.append_eos)
        self.model = _load_model(settings, backbone, seed, trust_remote_code)
        if (padding := padding_token(self.tokenizer)) != self.tokenizer.pad_token:
            self.tokenizer.pad_token = padding
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.model.to(device).eval()
        self.parallel = wrap(self.model)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.lr, weight_decay=0.0, fused=True
        )
        self.group = CPU_GROUP if device.type == "cpu" else GPU_GROUP
        self.margin, self.step = margin, 0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}

    @property
    def best_step(self) -> int:
        return int(max(self.history, key=lambda row: row["validation_accuracy"])["step"])

    def update(self) -> dict[str, float]:
        """Do one optimiser step, and return its metrics.

        Accuracy and loss are those of this worker's pairs.
        """
        start, lr = time.perf_counter(), learning_rate(self.settings, self.step)
        texts, better, worse = self._batch()
        margins = self._margins(better, worse) if self.settings.margin_loss else 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        scores = self._score(self.parallel, texts)
        chosen, rejected = scores[better], scores[worse]
        loss = pair_loss(chosen, rejected, margins, self.settings.center_rewards_coefficient)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        accuracy = (chosen > rejected).float().mean().item()
        return {
            "step": self.step,
            "loss": loss.item(),
            "accuracy": accuracy,
            "lr": lr,
            "step_seconds": time.perf_counter() - start,
        }

    def validate(self, pairs: Sequence[Preference]) -> dict[str, float]:
        """Return accuracy and loss on held-out pairs. Keep the best weights so far."""
        chosen, rejected = self.scores(pairs)
        row = {
            "step": self.step,
            "validation_accuracy": (chosen > rejected).float().mean().item(),
            "validation_loss": pair_loss(chosen, rejected).item(),
        }
        self.history.append(row)
        if self.best_step == self.step:
            self.best = {
                name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()
            }
        return row

    def scores(self, pairs: Sequence[Preference]) -> tuple[Tensor, Tensor]:
        """Return the scores of the chosen and of the rejected texts, each (N,).

        A text that several pairs share is scored once.
        """
        pairs_of_texts = [pair.texts for pair in pairs]
        texts = list(dict.fromkeys(text for both in pairs_of_texts for text in both))
        place = {text: n for n, text in enumerate(texts)}
        with torch.inference_mode():
            scores = self._score(self.model, texts).cpu()
        return (
            scores[[place[chosen] for chosen, _ in pairs_of_texts]],
            scores[[place[rejected] for _, rejected in pairs_of_texts]],
        )

    def save(self, folder: Path) -> None:
        """Write a checkpoint: weights, optimiser, step and history.

        The best weights are written too, unless they are the present ones.
        """
        weights = {name: p.detach().contiguous() for name, p in self.parameters.items()}
        save_file(weights, folder / "weights.safetensors")
        if self.best_step != self.step:
            save_file(self.best, folder / "best.safetensors")
        moments = {
            f"{n}/{key}": value
            for n, state in self.optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }
        save_file(moments, folder / "optimizer.safetensors")
        write_json(folder / "state.json", {"step": self.step, "history": self.history})

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint."""
        state = json.loads((folder / "state.json").read_text())
        self.step, self.history = state["step"], state["history"]
        weights = load_file(folder / "weights.safetensors")
        self._assign(weights)
        self.best = (
            weights if self.best_step == self.step else load_file(folder / "best.safetensors")
        )
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in load_file(folder / "optimizer.safetensors").items():
            index, key = name.split("/")
            moments.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(
            {"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )

    def take_best(self) -> None:
        """Restore the weights of the best validation."""
        self._assign(self.best)

    def export(self, folder: Path) -> None:
        """Write the model, with LoRA merged, and the tokenizer. This ends the training.

        AutoModelForSequenceClassification loads the result.
        """
        model = self.model.merge_and_unload() if self.settings.lora else self.model
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _score(self, model: Any, texts: Sequence[tuple[Part, Part]]) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=supports_bf16(self.device)):
            prompts, completions = (
                [prompt for prompt, _ in texts],
                [completion for _, completion in texts],
            )
            return classify(model, self.tokenizer, prompts, completions, self.reading, self.group)

    def _batch(self) -> tuple[list[tuple[Part, Part]], list[int], list[int]]:
        """Return the step's texts, and for each pair the index of its better and of its worse text.

        A text is a tuple (prompt, completion).
        """
        rows = self._rows()
        rated = [row for row in rows if isinstance(row, Snippet)]
        pairs = [row.texts for row in rows if isinstance(row, Preference)]
        if pairs:
            texts = [*(chosen for chosen, _ in pairs), *(rejected for _, rejected in pairs)]
            return texts, list(range(len(pairs))), list(range(len(pairs), 2 * len(pairs)))
        places = [
            (i, j)
            for i, one in enumerate(rated)
            for j, other in enumerate(rated)
            if one.rating - other.rating >= self.margin
        ]
        return [("", row.text) for row in rated], [i for i, _ in places], [j for _, j in places]

    def _margins(self, better: Sequence[int], worse: Sequence[int]) -> Tensor:
        """Return by how much each better text of the step is better: ratings, or given margins."""
        rows = self._rows()
        margins = [row.margin or 0.0 for row in rows if isinstance(row, Preference)]
        if not margins:
            ratings = [row.rating for row in rows if isinstance(row, Snippet)]
            margins = [ratings[i] - ratings[j] for i, j in zip(better, worse, strict=True)]
        return torch.tensor(margins, device=self.device)

    def _rows(self) -> list[Preference | Snippet]:
        return [self.train[n] for n in self._positions()]

    def _positions(self) -> list[int]:
        size = self.settings.batch_size * (2 if isinstance(self.train[0], Snippet) else 1)
        return batch_indices(len(self.train), size, self.step, derive_seed(self.seed, "pairs"))[
            self.rank :: self.world
        ]

    @torch.no_grad()
    def _assign(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])


def _load_model(
    settings: RewardTrainingConfig, backbone: str, seed: int, trust_remote_code: bool
) -> Any:
    torch.manual_seed(derive_seed(seed, "head"))
    options = {"num_labels": 1, "dtype": torch.float32, "trust_remote_code": trust_remote_code}
    model = load_model(
        AutoModelForSequenceClassification,
        backbone,
        f"reward_training.backbone={backbone}",
        new_head=True,
        **options,
    )
    if not (lora := settings.lora):
        return model
    import peft  # takes seconds to import, and full fine-tuning does not need it

    alpha: Any = lora.alpha  # PEFT 0.21 declares an int, but only divides it by the rank
    adapter = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=lora.rank,
        lora_alpha=alpha,
        target_modules=lora.target_modules,
        lora_dropout=0.0,
    )
    try:
        return peft.get_peft_model(model, adapter)
    except ValueError as error:
        raise ConfigError(f"reward_training.lora does not fit {backbone}: {error}") from None
