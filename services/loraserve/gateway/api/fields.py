"""Lists how the gateway treats each field that OpenAI, vLLM, SGLang and llama.cpp define for generation requests.

- Applied: the field is declared in ``api/schema.py`` or is a sampling parameter (``loraserve.messages.sampling``).
- Harmless (``HARMLESS``): the field is accepted and ignored; the answer is the same without it.
- Refused (``REFUSED``): the field would change the answer and is unsupported. Neutral values such as null are accepted.

If a field that is listed here is declared for one endpoint, only that endpoint applies the field. Unknown fields are
accepted and ignored, because clients send many fields of their own.
"""

from typing import Any, NamedTuple

import msgspec

ASKS_FOR_NOTHING: tuple[Any, ...] = (None, False, "", [], {})
"""The neutral values of most fields: a client that sends one of them does not use the field."""

LONGEST_NEUTRAL_BYTES = 100
"""No neutral value has longer JSON, so longer values are refused without decoding them."""


class FieldRefusal(NamedTuple):
    """The reason for refusing a field, with a remedy, and the values that are accepted.

    A value is accepted if it is one of ``neutral``, or an object whose "type" is ``neutral_type``, with any other keys.
    """

    reason: str
    neutral: tuple[Any, ...] = ASKS_FOR_NOTHING
    neutral_type: str | None = None

    def accepts(self, value: msgspec.Raw) -> bool:
        data = bytes(value)
        if self.neutral_type is not None and _object_type(data) == self.neutral_type:
            return True
        if len(data) > LONGEST_NEUTRAL_BYTES:
            return False
        try:
            given = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            # Decoding the body does not check raw fields: a number can be too large, and a text can be invalid UTF-8.
            return False
        # In Python, 0 equals False and 1 equals True. In JSON they differ.
        return any(isinstance(given, bool) == isinstance(own, bool) and given == own for own in self.neutral)


class _TypedObject(msgspec.Struct, frozen=True):
    type: str


def _object_type(data: bytes) -> str | None:
    """Return the "type" of a JSON object, or None for other values. Other keys are not decoded."""
    try:
        return msgspec.json.decode(data, type=_TypedObject).type
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


_PENALTY = "is not supported; use repetition_penalty, presence_penalty or frequency_penalty"
_SAMPLER = "this sampler is not supported; use temperature, top_p, top_k or min_p"
_LENGTH = "is not supported here; use max_tokens"
_TEMPLATE = 'is not supported; if the model\'s chat template takes it, put it into "chat_template_kwargs"'


def _refused(reason: str, fields: str, *also_neutral: Any) -> dict[str, FieldRefusal]:
    """Map each name in ``fields`` (separated by spaces) to a refusal. ``also_neutral`` values ask for nothing."""
    return dict.fromkeys(fields.split(), FieldRefusal(reason, (*ASKS_FOR_NOTHING, *also_neutral)))


REFUSED: dict[str, FieldRefusal] = {
    # Output format.
    "response_format": FieldRefusal('only {"type": "text"} is supported', neutral_type="text"),
    **_refused(
        "constrained output is not supported; leave it out and check the answer",
        "guided_json guided_regex guided_choice guided_grammar structured_outputs structural_tag json_schema regex "
        "ebnf grammar",
    ),
    # Restrictions on the tokens that can be sampled.
    **_refused("is not supported; leave it out", "logit_bias allowed_token_ids bad_words"),
    **_refused(
        "logits processors are not supported; leave it out",
        "logits_processors custom_logit_processor custom_params vllm_xargs",
    ),
    # Samplers and penalties.
    **_refused("beam search is not supported; ask for n choices instead", "use_beam_search"),
    "do_sample": FieldRefusal("is not supported; set temperature to 0 for greedy output instead", (None, True)),
    **_refused(_SAMPLER, "samplers"),
    **_refused(_SAMPLER, "typical_p tfs tfs_z", 1),
    **_refused(_SAMPLER, "top_a eta_cutoff epsilon_cutoff mirostat mirostat_mode dynatemp_range smoothing_factor", 0),
    **_refused(_SAMPLER, "xtc_probability min_keep", 0),
    **_refused(_SAMPLER, "top_n_sigma", -1, 0),
    **_refused(_SAMPLER, "adaptive_target", -1),
    **_refused(_PENALTY, "penalty_prompt"),
    **_refused(_PENALTY, "dry_multiplier no_repeat_ngram_size", 0),
    **_refused(_PENALTY, "repeat_penalty", 1),
    # Output length and stop conditions.
    **_refused(_LENGTH, "max_new_tokens thinking_token_budget"),
    **_refused(_LENGTH, "n_predict", -1),
    **_refused(_LENGTH, "t_max_predict_ms", 0, -1),
    **_refused("is not supported; use min_tokens instead", "min_new_tokens", 0),
    **_refused("is not supported; use stop instead", "stop_regex"),
    **_refused("is not supported; use stop instead", "n_indent", 0),
    **_refused("is not supported; use include_stop_str_in_output instead", "no_stop_trim"),
    # Choices.
    **_refused("is not supported; use n instead", "num_return_sequences n_cmpl", 1),
    # The prompt.
    **_refused("insertion is not supported; leave it out", "suffix"),
    **_refused("is supported on /v1/completions only; leave it out", "echo"),
    **_refused(
        'is not supported; put token ids into "prompt" of /v1/completions',
        "input_ids prompt_token_ids prompt_embeds input_embeds",
    ),
    **_refused("is not supported; shorten the prompt before sending it", "truncate_prompt_tokens truncate"),
    **_refused("is not supported; shorten the prompt before sending it", "n_keep", 0),
    **_refused("is not supported; put the documents into the messages", "documents"),
    **_refused("only the model's own template is used; leave it out", "chat_template"),
    **_refused(_TEMPLATE, "reasoning_effort", "none"),
    # False is not neutral here: it asks for an answer without thinking.
    "enable_thinking": FieldRefusal(_TEMPLATE, (None, "", {}, [])),
    "thinking": FieldRefusal(_TEMPLATE, (None, "", {}, [])),
    **_refused("is not supported; ask for it in the messages", "verbosity", "medium"),
    # Media and tools.
    **_refused("only text is supported; leave it out", "audio image_data audio_data video_data multimodal_data"),
    **_refused("only text is supported; leave it out", "modalities", ["text"]),
    **_refused('tool calls are not supported; leave tools out or set tool_choice to "none"', "tools"),
    **_refused("tool calls are not supported; leave it out", "tool_choice function_call", "none", "auto"),
    **_refused("function calls are not supported; leave it out", "functions"),
    # An empty object is not neutral here: it asks for a search.
    "web_search_options": FieldRefusal("web search is not supported; leave it out", (None,)),
    # Adapters.
    **_refused(
        'adapters are chosen by name: put the adapter\'s name into "model"',
        "lora_path lora_request lora_name lora adapter_id adapter_source adapter_parameters",
    ),
    # Additional data in the answer.
    **_refused("log-probabilities of the prompt are not computed; leave it out", "prompt_logprobs"),
    **_refused("log-probabilities of the prompt are not computed; leave it out", "logprob_start_len", -1),
    **_refused("is not supported here; use logprobs", "top_logprobs return_logprob"),
    **_refused("is not supported here; use logprobs", "n_probs top_logprobs_num", 0),
    **_refused(
        "the answer would lack what it asks for; leave it out",
        "token_ids_logprob return_token_ids return_tokens return_tokens_as_token_ids return_hidden_states "
        "return_text_in_logprobs post_sampling_probs response_fields",
    ),
    # Execution of the request.
    **_refused("the prefix cache is shared by all requests for an adapter; leave it out", "cache_salt extra_key"),
    **_refused("KV transfer is not supported; leave it out", "kv_transfer_params"),
    **_refused("sessions are not supported; send the whole prompt", "session_params"),
}

HARMLESS = frozenset(
    (
        # Identity and bookkeeping.
        *("user", "metadata", "store", "service_tier", "safety_identifier", "request_id", "rid", "priority"),
        *("prompt_cache_key", "prompt_cache_retention", "data_parallel_rank", "bootstrap_host", "bootstrap_port"),
        *("bootstrap_room", "id_slot", "cache_prompt", "n_discard", "n_cache_reuse", "timings_per_token"),
        *("return_progress", "stream_interval"),
        # A prediction changes only the speed.
        *("prediction", "speculative"),
        # Options of refused fields. They have no effect alone.
        *("parallel_tool_calls", "guided_decoding_backend", "guided_whitespace_pattern", "length_penalty"),
        *("early_stopping", "mirostat_tau", "mirostat_eta", "dynatemp_exponent", "smoothing_curve", "xtc_threshold"),
        *("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_range", "dry_sequence_breakers"),
        *("repeat_last_n", "adaptive_decay", "mm_processor_kwargs", "media_io_kwargs"),
        # The gateway does not split answers into reasoning and content, so these have no effect.
        *("include_reasoning", "separate_reasoning", "stream_reasoning", "reasoning_format"),
        # Only tokenizers without a tokenizer.json use this. The gateway does not support them.
        "spaces_between_special_tokens",
        # /v1/completions does not use the chat template.
        *("add_generation_prompt", "continue_final_message", "chat_template_kwargs"),
    )
)
