"""Reads the metadata of a PEFT adapter: ``adapter_config.json`` and the names of the tensors.

The module reads only fields that change the computation. It refuses an adapter that uses an unsupported PEFT feature,
because serving the adapter would silently return wrong answers.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from loraserve.adapter.tensor_file import open_regular
from loraserve.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
MAX_CONFIG_BYTES = 4 << 20
MAX_PATTERNS = 4096
MAX_ALPHA = 1e30
"""Limit of alphas, so that scales are finite in float32."""

_UNSUPPORTED: dict[str, str] = {
    "use_dora": "DoRA rescales whole weight columns; merge it into LoRA weights or train without it",
    "modules_to_save": "it replaces whole modules of the base model, which all adapters share; train without it",
    "lora_bias": "only the matrices A and B are served; train without it",
    "use_qalora": "it pools the inputs; train without it",
    "use_bdlora": "its matrices are block-diagonal; train without it",
    "kasa_config": "it changes the base model; train without it",
    "monteclora_config": "its weights are drawn at random; train without it",
    "arrow_config": "it routes between several adapters; register them one by one",
    "alora_invocation_tokens": "it is active on part of the prompt only; train without it",
    "trainable_token_indices": "it changes embeddings; train without it",
    "target_parameters": "it adapts parameters outside of linear layers; train without it",
    "layer_replication": "it repeats layers of the base model; train without it",
}
"""Maps fields that must be absent, null, false or empty to the reason and the remedy."""

_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base weights, so that the adapter does not fit the original base model."""


class PeftConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of ``adapter_config.json`` that determine the type, ranks and scales of an adapter."""

    r: int
    lora_alpha: float
    peft_type: str = "LORA"
    use_rslora: bool | None = None
    bias: str | None = None
    init_lora_weights: bool | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None


class Scaling:
    """The rank and scale of each module. As in PEFT, the first pattern applies that matches the end of its name."""

    def __init__(self, config: PeftConfig) -> None:
        self._config = config
        self._ranks = _compile("rank_pattern", config.rank_pattern or {})
        self._alphas = _compile("alpha_pattern", config.alpha_pattern or {})

    def rank(self, module: str) -> int:
        return int(_first_match(self._ranks, module, self._config.r))

    def scale(self, module: str, rank: int) -> float:
        """Return the scale of B A: alpha / rank, or alpha / sqrt(rank) with rsLoRA. ``rank`` must be at least 1."""
        alpha = _first_match(self._alphas, module, self._config.lora_alpha)
        return alpha / (math.sqrt(rank) if self._config.use_rslora else rank)


class TensorName(msgspec.Struct, frozen=True):
    """The components of a LoRA tensor's name. PEFT matches rank and alpha patterns against ``module``."""

    module: str
    layer: int
    projection: str
    matrix: str


_NAME = re.compile(
    r"base_model\.model\.(?P<module>(?:model\.)?layers\.(?P<layer>0|[1-9][0-9]{0,5})\."
    r"(?P<projection>self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj))"
    r"\.lora_(?P<matrix>[AB])(?:\.default)?\.weight"
)


def read_peft_config(directory: Path) -> PeftConfig:
    """Return the adapter's configuration. Raises AdapterError if it is missing, malformed or not supported."""
    text = _read_text(directory / CONFIG_FILE)
    try:
        raw = msgspec.json.decode(text, type=dict[str, Any])
        if raw.get("peft_type", "LORA") != "LORA":
            raise AdapterError(
                "unsupported", f"{CONFIG_FILE}: peft_type is {raw['peft_type']!r}; only LORA adapters are served"
            )
        config = msgspec.json.decode(text, type=PeftConfig)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise AdapterError(
            "bad_format", f"{CONFIG_FILE}: {error}; save the adapter with PEFT's save_pretrained"
        ) from error
    _refuse_unsupported(raw, config)
    _check_alphas(config)
    return config


def parse_tensor_name(name: str) -> TensorName:
    """Parse a tensor's name. Raises AdapterError ``unsupported`` unless it names A or B of a known projection."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise AdapterError("unsupported", f"{WEIGHTS_FILE}: tensor {name} {_unsupported_reason(name)}")
    projection = match["projection"].rpartition(".")[2]
    return TensorName(match["module"], int(match["layer"]), projection, match["matrix"])


def _unsupported_reason(name: str) -> str:
    if "lora_magnitude_vector" in name:
        return "belongs to DoRA; train without use_dora"
    if "lora_embedding" in name or "embed_tokens" in name:
        return "adapts the embeddings; train with target_modules that leave them out"
    if "lm_head" in name:
        return "adapts the output head; train with target_modules that leave lm_head out"
    if name.endswith("bias"):
        return "is a bias; train with bias='none' and lora_bias=False"
    return (
        "is not a LoRA matrix of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj or down_proj; train with "
        "target_modules among these"
    )


def _refuse_unsupported(raw: Mapping[str, Any], config: PeftConfig) -> None:
    for field, why in _UNSUPPORTED.items():
        if raw.get(field):
            raise AdapterError("unsupported", f"{CONFIG_FILE}: {field} is set: {why}")
    if config.bias not in (None, "none"):
        raise AdapterError("unsupported", f"{CONFIG_FILE}: bias is {config.bias!r}; train with bias='none'")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise AdapterError(
            "unsupported",
            f"{CONFIG_FILE}: init_lora_weights is {init!r}, which changes the base model; save it again with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )


def _check_alphas(config: PeftConfig) -> None:
    for field, alpha in {"lora_alpha": config.lora_alpha, **(config.alpha_pattern or {})}.items():
        if abs(alpha) > MAX_ALPHA:
            raise AdapterError("not_finite", f"{CONFIG_FILE}: alpha of {field} is {alpha:g}, more than {MAX_ALPHA:g}")


def _compile(field: str, patterns: Mapping[str, float]) -> list[tuple[re.Pattern[str], float]]:
    if len(patterns) > MAX_PATTERNS:
        raise AdapterError("unsupported", f"{CONFIG_FILE}: {field} has {len(patterns)} keys; {MAX_PATTERNS} at most")
    compiled = []
    for key, value in patterns.items():
        if not _is_cheap(key):
            raise AdapterError(
                "unsupported", f"{CONFIG_FILE}: {field}: key {key[:80]!r} is too complex; name the modules more simply"
            )
        try:
            compiled.append((re.compile(rf"(.*\.)?({key})$"), value))
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterError("bad_format", f"{CONFIG_FILE}: {field}: key {key!r}: {error}") from error
    return compiled


def _is_cheap(key: str) -> bool:
    """Return whether the untrusted regular expression ``key`` is too simple to take exponential time to match."""
    plain = re.sub(r"\[[^\]]*\]", "x", re.sub(r"\\.", "x", key))
    risky = re.search(r"\)[*+{]|\(\?(?!:)", plain)
    quantifiers = re.findall(r"(?<!\()[*+?{]", plain)
    return len(key) <= 512 and risky is None and len(quantifiers) <= 3


def _first_match(patterns: list[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _read_text(path: Path) -> bytes:
    with open(open_regular(path), "rb") as file:
        text = file.read(MAX_CONFIG_BYTES + 1)
    if len(text) > MAX_CONFIG_BYTES:
        raise AdapterError("bad_format", f"{path} is larger than {MAX_CONFIG_BYTES} bytes")
    return text
