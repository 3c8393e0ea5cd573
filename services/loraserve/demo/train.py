"""Trains a LoRA adapter on questions and answers with peft, on a CPU in minutes.

The result is a PEFT directory: adapter_config.json, and adapter_model.safetensors in bf16.
"""

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraserve.demo.texts import Example
from loraserve.demo.weights import save_weights
from loraserve.errors import ConfigError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS: dict[str, tuple[str, ...]] = {
    "qv": ("q_proj", "v_proj"),
    "attention": ATTENTION,
    "all": (*ATTENTION, "gate_proj", "up_proj", "down_proj"),
}
IGNORED_LABEL = -100
BATCH_ROWS = 8


@dataclass(frozen=True)
class TrainConfig:
    """Training parameters. The LoRA scale is ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``rslora``."""

    rank: int = 8
    alpha: int = 32
    targets: Literal["qv", "attention", "all"] = "qv"
    rslora: bool = False
    epochs: int = 20
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("rank", "alpha", "epochs", "learning_rate"):
            if getattr(self, field) <= 0:
                raise ConfigError(f"{field} must be above 0, not {getattr(self, field)}")
        if self.targets not in TARGETS:
            raise ConfigError(f"targets must be one of {', '.join(TARGETS)}, not {self.targets!r}")


@dataclass(frozen=True)
class Sample:
    """The token ids of one chat, and their labels. The labels of the prompt are ``IGNORED_LABEL``."""

    ids: list[int]
    labels: list[int]


def train(
    examples: Sequence[Example], model_dir: Path, out: Path, config: TrainConfig, progress: Callable[[str], None]
) -> float:
    """Train on ``examples`` and write the adapter to ``out``. Returns the mean loss of the last epoch.

    Raises ConfigError if ``examples`` or ``model_dir`` is not usable. Raises OSError if the disk fails.
    """
    if not examples:
        raise ConfigError("no rows to train on; give at least one question with its answer")
    if not (model_dir / "config.json").is_file():
        raise ConfigError(f"{model_dir} is not a Hugging Face directory: no config.json; choose another --model")
    random_, started = random.Random(config.seed), time.monotonic()
    torch.manual_seed(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = wrap(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), config)
    samples = [encode(tokenizer, example) for example in examples]
    weights = [p for p in model.parameters() if p.requires_grad]
    progress(f"{len(samples)} rows, {sum(w.numel() for w in weights) / 1e6:.2f} M weights to train")
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0)
    steps = config.epochs * -(-len(samples) // BATCH_ROWS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    loss = 0.0
    for epoch in range(config.epochs):
        random_.shuffle(samples)
        loss = train_epoch(model, samples, optimizer, schedule)
        progress(f"epoch {epoch + 1}/{config.epochs}  loss {loss:.3f}  {time.monotonic() - started:.0f} s")
    save_adapter(model, base_name(model_dir), out)
    return loss


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the learning rate factor: it rises to 1 in the first tenth of ``steps``, then falls linearly to 0.1."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 1.0 - 0.9 * (step - warm_up) / max(1, steps - warm_up)


def wrap(model: Any, config: TrainConfig) -> PeftModel:
    """Add LoRA weights to the model and return it. Only the LoRA weights are trainable."""
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules=list(TARGETS[config.targets]),
        bias="none",
        task_type="CAUSAL_LM",
        use_rslora=config.rslora,
    )
    wrapped = get_peft_model(model, lora)
    wrapped.train()
    return wrapped


def encode(tokenizer: Any, example: Example) -> Sample:
    """Return the tokens of the question in the model's chat template, followed by the answer and the EOS token."""
    chat = [{"role": "user", "content": example.question}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(asked, add_special_tokens=False).input_ids
    answer = [*tokenizer(example.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return Sample(ids=prompt + answer, labels=[IGNORED_LABEL] * len(prompt) + answer)


def train_epoch(model: PeftModel, samples: Sequence[Sample], optimizer: Any, schedule: Any) -> float:
    """Train one epoch in batches. Returns the mean loss."""
    losses = []
    for start in range(0, len(samples), BATCH_ROWS):
        loss = model(**collate(samples[start : start + BATCH_ROWS])).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return float(sum(losses) / len(losses))


def collate(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    longest = max(len(sample.ids) for sample in samples)

    def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])

    return {
        "input_ids": padded([sample.ids for sample in samples], 0),
        "attention_mask": padded([[1] * len(sample.ids) for sample in samples], 0),
        "labels": padded([sample.labels for sample in samples], IGNORED_LABEL),
    }


def base_name(model_dir: Path) -> str:
    """Return the last path component of the model's name in its config, or else the folder's name."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    return Path(config.get("_name_or_path") or model_dir.resolve().name).name


def save_adapter(model: Any, base: str, out: Path) -> None:
    """Write the PEFT directory ``out`` with bf16 weights. ``base`` is the base model's name in the config."""
    out.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model)
    weights = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    save_weights(weights, out / "adapter_model.safetensors")
    lora = model.peft_config["default"]
    lora.base_model_name_or_path, lora.inference_mode = base, True
    lora.target_modules = sorted(lora.target_modules)
    lora.save_pretrained(str(out))
