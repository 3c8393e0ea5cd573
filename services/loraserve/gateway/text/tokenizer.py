"""The model directory's tokenizer and chat template; long prompts are worked on beside the event loop."""

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from tokenizers import Tokenizer

from loraserve.errors import ConfigError
from loraserve.gateway.api.schema import ChatMessage
from loraserve.gateway.errors import bad_request, unsupported
from loraserve.gateway.text.detokenize import TokenBytes
from loraserve.model_shape import read_model_config

T = TypeVar("T")

INLINE_CHARACTERS = 1000
"""Shorter prompts take well under a millisecond, less than a thread and back under load."""

THREADS = 2
RESERVED_TEMPLATE_ARGUMENTS = frozenset(
    ("conversation", "messages", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message")
)


class ChatOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How messages become a prompt."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    template_arguments: dict[str, Any] = msgspec.field(default_factory=dict)


class ModelTokenizer:
    """Text to tokens and back for one model directory."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError when the directory holds no tokenizer that can be used."""
        config = read_model_config(directory)
        self._hf = _load(directory)
        self._backend: Tokenizer = self._hf.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        special = frozenset(id_ for id_, token in added.items() if token.special)
        decoder = json.loads(self._backend.to_str())["decoder"]
        self.pieces = TokenBytes(self._backend.id_to_token, self.decode, special, decoder)
        self.vocab = _positive(config.get("vocab_size")) or self._backend.get_vocab_size()
        self.max_positions = _positive(config.get("max_position_embeddings"))
        self.has_chat_template = bool(self._hf.chat_template)
        self._longest_characters = max(map(len, self._backend.get_vocab()), default=1)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenize")

    def decode(self, tokens: Sequence[int]) -> str:
        """All text of the tokens, special ones included."""
        return self._backend.decode(list(tokens), skip_special_tokens=False)

    def fewest_tokens(self, characters: int) -> int:
        """No text of so many characters has fewer tokens, so that a huge one can be refused without the work."""
        # A normalizer may compose characters or drop some.
        return characters // (4 * self._longest_characters)

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return await self._beside(len(text), self._encode, text, add_special_tokens)

    async def encode_chat(self, messages: Sequence[ChatMessage], options: ChatOptions) -> list[int]:
        """Raises ApiError 400 for messages that the chat template refuses, or when the model has none."""
        if not self.has_chat_template:
            message = "This model has no chat template; use /v1/completions with a prompt in the model's own format"
            raise bad_request(message, "messages", "no_chat_template")
        conversation = [template_message(message, index) for index, message in enumerate(messages)]
        return await self._beside(characters_of(messages), self._encode_chat, conversation, options)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # The batch call lets go of the interpreter lock, the single one does not.
        (encoded,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoded.ids)

    def _encode_chat(self, conversation: list[dict[str, Any]], options: ChatOptions) -> list[int]:
        try:
            text = self._hf.apply_chat_template(
                conversation,
                tokenize=False,
                add_generation_prompt=options.add_generation_prompt and not options.continue_final_message,
                continue_final_message=options.continue_final_message,
                **options.template_arguments,
            )
        except Exception as error:
            # A template is a program of the model's maker: whatever it raises on these messages is its refusal.
            reason = f"the model's chat template refuses these messages: {error}"
            raise bad_request(f"messages: {reason}", "messages", "chat_template_error") from error
        return self._encode(text, options.add_special_tokens)

    async def _beside(self, characters: int, work: Callable[..., T], *arguments: Any) -> T:
        if characters <= INLINE_CHARACTERS:
            return work(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)


def template_message(message: ChatMessage, index: int) -> dict[str, Any]:
    """A message as chat templates know it, its text parts joined. Raises ApiError 400 for parts that are not text."""
    content = message.content
    if isinstance(content, list):
        for number, part in enumerate(content):
            if part.type not in ("text", "input_text") or part.text is None:
                param = f"messages[{index}].content[{number}]"
                raise unsupported(param, f"{param}: only parts of type text are supported, found {part.type!r}")
        content = "\n".join(part.text or "" for part in content)
    optional = {"name": message.name, "tool_calls": message.tool_calls, "tool_call_id": message.tool_call_id}
    return {"role": message.role, "content": content} | {key: value for key, value in optional.items() if value}


def characters_of(messages: Sequence[ChatMessage]) -> int:
    """How much text the messages hold, before the template adds to it."""
    contents = (message.content or "" for message in messages)
    parts = ((content,) if isinstance(content, str) else (part.text or "" for part in content) for content in contents)
    return sum(len(text) for texts in parts for text in texts)


def check_template_arguments(arguments: dict[str, Any] | None) -> dict[str, Any]:
    """Raises ApiError 400 for what would change more than the template's own switches."""
    wrong = sorted(RESERVED_TEMPLATE_ARGUMENTS & set(arguments or ()))
    if wrong:
        message = f"chat_template_kwargs: {', '.join(wrong)} cannot be given here"
        raise bad_request(message, "chat_template_kwargs", "invalid_value")
    return arguments or {}


def _load(directory: Path) -> Any:
    # Takes seconds to import: only the process that needs it pays.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"model.path {directory}: no usable tokenizer ({error}); tokenizer.json is needed") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"model.path {directory}: only tokenizers with a tokenizer.json are supported; convert it")
    return tokenizer


def _positive(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
