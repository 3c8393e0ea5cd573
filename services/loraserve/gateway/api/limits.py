"""Size checks on texts, messages and outputs. Each runs before the expensive work that it limits."""

from collections.abc import Sequence

import msgspec

from loraserve.gateway.api.schema import MAX_CHOICES, NULL, ChatMessage
from loraserve.gateway.errors import bad_request, context_exceeded
from loraserve.gateway.text.tokenizer import ModelTokenizer


def check_text(tokenizer: ModelTokenizer, characters: int, context: int, param: str) -> None:
    """Raise ApiError 400 if no text with this number of characters can fit into ``context`` tokens."""
    fewest = tokenizer.fewest_tokens(characters)
    if fewest >= context:
        raise context_exceeded(context, fewest, 1, param)


def check_messages(tokenizer: ModelTokenizer, messages: Sequence[ChatMessage], context: int) -> int:
    """Return the number of characters in chat messages. Raises ApiError 400 if they cannot fit the context.

    Each message and each content part counts as at least one token.
    """
    if len(messages) >= context:
        raise context_exceeded(context, len(messages), 1, "messages")
    contents = [message.content for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    if len(messages) + len(parts) >= context:
        raise context_exceeded(context, len(messages) + len(parts), 1, "messages")
    characters = sum(len(content) for content in contents if isinstance(content, str))
    characters += sum(len(part.text or "") for part in parts)
    check_text(tokenizer, characters, context, "messages")
    return characters


def check_free_json(messages: Sequence[ChatMessage], template_arguments: msgspec.Raw, limit: int) -> None:
    """Raise ApiError 400 if a field with arbitrary JSON exceeds ``limit`` bytes.

    The fields are ``tool_calls`` and ``function_call``, each in total over all messages, and the template arguments.
    """
    sizes = {
        "tool_calls": _total_bytes([message.tool_calls for message in messages]),
        "function_call": _total_bytes([message.function_call for message in messages]),
        "chat_template_kwargs": len(bytes(template_arguments)),
    }
    for name, size in sizes.items():
        if size > limit:
            remedy = "send less, or raise gateway.max_free_json_bytes"
            raise bad_request(f"{name}: {size} bytes of JSON are more than {limit}; {remedy}", name, "invalid_value")


def _total_bytes(values: Sequence[msgspec.Raw]) -> int:
    return sum(len(value) for value in map(bytes, values) if value != bytes(NULL))


def check_choices(n: int | None, prompts: int) -> None:
    if (n or 1) * prompts > MAX_CHOICES:
        message = f"n: {n} choices of {prompts} prompts are more than {MAX_CHOICES} in one request; lower n"
        raise bad_request(message, "n", "invalid_value")


def output_limit(wanted: int | None, prompt_tokens: int, context: int, default: int, param: str) -> int:
    """Return the maximum number of output tokens.

    ``wanted`` is the limit in the request. If it is None, ``default`` applies; a default of 0 allows the remaining
    context. Raises ApiError 400 for an empty prompt, and if prompt and output exceed ``context`` tokens.
    """
    if prompt_tokens == 0:
        message = f"{param}: it has no tokens; the model needs at least one to continue"
        raise bad_request(message, param, "invalid_value")
    left = context - prompt_tokens
    if left < 1 or (wanted or 0) > left:
        raise context_exceeded(context, prompt_tokens, wanted or 1, param)
    return wanted or (min(default, left) if default else left)
