"""What the gateway does with each request field that OpenAI, vLLM, SGLang and llama.cpp define for generation.

- Applied: the field is declared in ``api/schema.py`` or is a sampling parameter (``loraserve.messages.sampling``).
- Harmless (``HARMLESS``): the field is accepted and ignored; the answer is the same without it.
- Refused (``REFUSED``): the field would change the answer and is not supported. Values that ask for nothing pass.

A field that is declared for one endpoint and listed here is applied by that endpoint alone. Fields in none of the three
groups are accepted and ignored, because clients send many of their own.
"""

from enum import Enum
from typing import Any, NamedTuple

import msgspec

ASKS_FOR_NOTHING: tuple[Any, ...] = (None, False, "", [], {})
LONGEST_NEUTRAL_BYTES = 100
"""No neutral value is longer as JSON: longer ones need not be decoded."""


class Treatment(Enum):
    APPLIED = "applied"
    HARMLESS = "harmless"
    REFUSED = "refused"
    UNKNOWN = "unknown"


class Refusal(NamedTuple):
    """Why a field is refused, what to do instead, and which values pass because they ask for nothing."""

    reason: str
    neutral: tuple[Any, ...] = ASKS_FOR_NOTHING

    def accepts(self, value: msgspec.Raw) -> bool:
        data = bytes(value)
        if len(data) > LONGEST_NEUTRAL_BYTES:
            return False
        given = msgspec.json.decode(data)
        # In Python, 0 equals False and 1 equals True; in a request they differ.
        return any(isinstance(given, bool) == isinstance(own, bool) and given == own for own in self.neutral)


def _unless(*neutral: Any) -> tuple[Any, ...]:
    return (*ASKS_FOR_NOTHING, *neutral)


_CONSTRAINED = "constrained output is not supported; leave it out and check the answer"
_ADAPTER = 'adapters are chosen by name: put the adapter\'s name into "model"'
_PENALTY = "is not supported; use repetition_penalty, presence_penalty or frequency_penalty"
_SAMPLER = "this sampler is not supported; use temperature, top_p, top_k or min_p"
_MEDIA = "only text is supported; leave it out"
_EXTRA = "the answer would lack what it asks for; leave it out"
_PROMPT = 'is not supported; put token ids into "prompt" of /v1/completions'
_TOOLS = "tool calls are not supported; leave it out"
_TEMPLATE = 'is not supported; if the model\'s chat template takes it, put it into "chat_template_kwargs"'
_PROCESSOR = "logits processors are not supported; leave it out"

REFUSED: dict[str, Refusal] = {
    # The shape of the output.
    "response_format": Refusal('only {"type": "text"} is supported', _unless({"type": "text"})),
    "guided_json": Refusal(_CONSTRAINED),
    "guided_regex": Refusal(_CONSTRAINED),
    "guided_choice": Refusal(_CONSTRAINED),
    "guided_grammar": Refusal(_CONSTRAINED),
    "structured_outputs": Refusal(_CONSTRAINED),
    "structural_tag": Refusal(_CONSTRAINED),
    "json_schema": Refusal(_CONSTRAINED),
    "regex": Refusal(_CONSTRAINED),
    "ebnf": Refusal(_CONSTRAINED),
    "grammar": Refusal(_CONSTRAINED),
    # Which tokens may be drawn.
    "logit_bias": Refusal("is not supported; leave it out"),
    "allowed_token_ids": Refusal("is not supported; leave it out"),
    "bad_words": Refusal("is not supported; leave it out"),
    "logits_processors": Refusal(_PROCESSOR),
    "custom_logit_processor": Refusal(_PROCESSOR),
    "custom_params": Refusal(_PROCESSOR),
    "vllm_xargs": Refusal(_PROCESSOR),
    # Samplers and penalties.
    "use_beam_search": Refusal("beam search is not supported; ask for n choices instead"),
    "do_sample": Refusal("is not supported; set temperature to 0 for greedy output instead", (None, True)),
    "typical_p": Refusal(_SAMPLER, _unless(1)),
    "top_a": Refusal(_SAMPLER, _unless(0)),
    "top_n_sigma": Refusal(_SAMPLER, _unless(-1, 0)),
    "tfs": Refusal(_SAMPLER, _unless(1)),
    "tfs_z": Refusal(_SAMPLER, _unless(1)),
    "eta_cutoff": Refusal(_SAMPLER, _unless(0)),
    "epsilon_cutoff": Refusal(_SAMPLER, _unless(0)),
    "mirostat": Refusal(_SAMPLER, _unless(0)),
    "mirostat_mode": Refusal(_SAMPLER, _unless(0)),
    "dynatemp_range": Refusal(_SAMPLER, _unless(0)),
    "smoothing_factor": Refusal(_SAMPLER, _unless(0)),
    "xtc_probability": Refusal(_SAMPLER, _unless(0)),
    "adaptive_target": Refusal(_SAMPLER, _unless(-1)),
    "samplers": Refusal(_SAMPLER),
    "min_keep": Refusal(_SAMPLER, _unless(0)),
    "dry_multiplier": Refusal(_PENALTY, _unless(0)),
    "repeat_penalty": Refusal(_PENALTY, _unless(1)),
    "no_repeat_ngram_size": Refusal(_PENALTY, _unless(0)),
    "penalty_prompt": Refusal(_PENALTY),
    # The length of the output and what ends it.
    "n_predict": Refusal("is not supported; use max_tokens instead", _unless(-1)),
    "max_new_tokens": Refusal("is not supported; use max_tokens instead"),
    "min_new_tokens": Refusal("is not supported; use min_tokens instead", _unless(0)),
    "max_completion_tokens": Refusal("is not supported; use max_tokens on this endpoint"),
    "t_max_predict_ms": Refusal("is not supported; use max_tokens", _unless(0)),
    "n_indent": Refusal("is not supported; use stop", _unless(0)),
    "stop_regex": Refusal("is not supported; use stop"),
    "no_stop_trim": Refusal("is not supported; use include_stop_str_in_output instead"),
    "thinking_token_budget": Refusal("is not supported; use max_tokens"),
    # Choices.
    "num_return_sequences": Refusal("is not supported; use n instead", _unless(1)),
    "n_probs": Refusal("is not supported; use logprobs instead", _unless(0)),
    # The prompt.
    "suffix": Refusal("insertion is not supported; leave it out"),
    "echo": Refusal("is supported on /v1/completions only; leave it out"),
    "input_ids": Refusal(_PROMPT),
    "prompt_token_ids": Refusal(_PROMPT),
    "prompt_embeds": Refusal(_PROMPT),
    "input_embeds": Refusal(_PROMPT),
    "truncate_prompt_tokens": Refusal("is not supported; shorten the prompt before sending it"),
    "truncate": Refusal("is not supported; shorten the prompt before sending it"),
    "n_keep": Refusal("the context is never shifted; shorten the prompt before sending it", _unless(0)),
    "documents": Refusal("is not supported; put the documents into the messages"),
    "chat_template": Refusal("only the model's own template is used; leave it out"),
    "reasoning_effort": Refusal(_TEMPLATE),
    "enable_thinking": Refusal(_TEMPLATE, (None, "", {}, [])),
    "thinking": Refusal(_TEMPLATE, (None, "", {}, [])),
    "verbosity": Refusal("is not supported; ask for it in the messages", _unless("medium")),
    # Media.
    "modalities": Refusal(_MEDIA, _unless(["text"])),
    "audio": Refusal(_MEDIA),
    "image_data": Refusal(_MEDIA),
    "audio_data": Refusal(_MEDIA),
    "video_data": Refusal(_MEDIA),
    "multimodal_data": Refusal(_MEDIA),
    # Tools.
    "tools": Refusal('tool calls are not supported; leave tools out or set tool_choice to "none"'),
    "tool_choice": Refusal(_TOOLS, _unless("none", "auto")),
    "functions": Refusal("function calls are not supported; leave it out"),
    "function_call": Refusal(_TOOLS, _unless("none", "auto")),
    # An empty object already asks for a search.
    "web_search_options": Refusal("web search is not supported; leave it out", (None,)),
    # Adapters.
    "lora_path": Refusal(_ADAPTER),
    "lora_request": Refusal(_ADAPTER),
    "lora_name": Refusal(_ADAPTER),
    "lora": Refusal(_ADAPTER),
    "adapter_id": Refusal(_ADAPTER),
    "adapter_source": Refusal(_ADAPTER),
    "adapter_parameters": Refusal(_ADAPTER),
    # More in the answer.
    "prompt_logprobs": Refusal("log-probabilities of the prompt are not computed; leave it out"),
    "logprob_start_len": Refusal("log-probabilities of the prompt are not computed; leave it out", _unless(-1)),
    "top_logprobs": Refusal("is not supported; use logprobs: N on this endpoint"),
    "top_logprobs_num": Refusal("is not supported; use logprobs instead", _unless(0)),
    "token_ids_logprob": Refusal(_EXTRA),
    "return_logprob": Refusal("is not supported; use logprobs instead"),
    "return_token_ids": Refusal(_EXTRA),
    "return_tokens": Refusal(_EXTRA),
    "return_tokens_as_token_ids": Refusal(_EXTRA),
    "return_hidden_states": Refusal(_EXTRA),
    "return_text_in_logprobs": Refusal(_EXTRA),
    "post_sampling_probs": Refusal(_EXTRA),
    "response_fields": Refusal(_EXTRA),
    # Where and how the request runs.
    "cache_salt": Refusal("the prefix cache is shared by all requests for an adapter; leave it out"),
    "kv_transfer_params": Refusal("KV transfer is not supported; leave it out"),
    "session_params": Refusal("sessions are not supported; send the whole prompt"),
}

HARMLESS = frozenset(
    (
        # Identity and bookkeeping.
        *("user", "metadata", "store", "service_tier", "safety_identifier", "request_id", "rid", "priority"),
        *("prompt_cache_key", "prompt_cache_retention", "data_parallel_rank", "bootstrap_host", "bootstrap_port"),
        *("bootstrap_room", "id_slot", "cache_prompt", "n_discard", "n_cache_reuse", "timings_per_token"),
        *("return_progress", "stream_interval"),
        # A prediction only makes the same answer faster.
        *("prediction", "speculative"),
        # These have no effect without another field, which is refused.
        *("parallel_tool_calls", "guided_decoding_backend", "guided_whitespace_pattern", "length_penalty"),
        *("early_stopping", "mirostat_tau", "mirostat_eta", "dynatemp_exponent", "smoothing_curve", "xtc_threshold"),
        *("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_range", "dry_sequence_breakers"),
        *("repeat_last_n", "adaptive_decay", "mm_processor_kwargs", "media_io_kwargs"),
        # Answers are not split into reasoning and content, so these change nothing.
        *("include_reasoning", "separate_reasoning", "stream_reasoning", "reasoning_format"),
        # Only tokenizers without a tokenizer.json put spaces between special tokens.
        "spaces_between_special_tokens",
        # A prompt of /v1/completions passes no chat template.
        *("add_generation_prompt", "continue_final_message", "chat_template_kwargs"),
    )
)


def treatment(field: str, applied: tuple[str, ...]) -> Treatment:
    """Return what happens to a field of an endpoint that applies the fields ``applied``."""
    if field in applied:
        return Treatment.APPLIED
    if field in REFUSED:
        return Treatment.REFUSED
    return Treatment.HARMLESS if field in HARMLESS else Treatment.UNKNOWN
