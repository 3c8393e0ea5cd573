"""The model's tokenizer and chat template, and threads for the work on large requests."""

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from loraserve.errors import ConfigError
from loraserve.gateway.text.detokenize import TokenBytes
from loraserve.model_shape import read_model_config

T = TypeVar("T")

INLINE_BYTES = 2000
"""Tokenizing a request of this size takes well under a millisecond. Under load, a thread would take longer."""

LARGE_BYTES = 256 << 10
"""Larger requests share one thread, so that smaller requests never wait behind them."""

THREADS = 2

DECODED_SLICE = 1 << 16
"""Number of tokens decoded in one step. Other threads can run between two steps."""


class ModelTokenizer:
    """Converts text to tokens and back. Methods block, except ``run``, which runs long work on a thread."""

    def __init__(self, directory: Path) -> None:
        """Load the tokenizer. Raises ConfigError if the directory has no usable tokenizer."""
        config = read_model_config(directory)
        self._hf = _load_tokenizer(directory)
        self._backend: Tokenizer = self._hf.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        special = frozenset(id_ for id_, token in added.items() if token.special)
        decoder = json.loads(self._backend.to_str())["decoder"]
        self.token_bytes = TokenBytes(self._backend, special, decoder)
        self.vocab = _positive(config.get("vocab_size")) or self._backend.get_vocab_size()
        self.max_positions = _positive(config.get("max_position_embeddings"))
        self.has_chat_template = bool(self._hf.chat_template)
        self._longest_characters = max(map(len, self._backend.get_vocab()), default=1)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenize")
        self._large_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize-large")

    async def run(self, size_bytes: int, work: Callable[..., T], *arguments: Any) -> T:
        """Call ``work`` for a request of this size and return its result. Above INLINE_BYTES, a thread calls it."""
        if size_bytes <= INLINE_BYTES:
            return work(*arguments)
        threads = self._threads if size_bytes <= LARGE_BYTES else self._large_thread
        return await asyncio.get_running_loop().run_in_executor(threads, work, *arguments)

    def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        # The batch call releases the interpreter lock. The call for a single text does not.
        (encoded,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(encoded.ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of the tokens, including special tokens."""
        detokenizer = self.token_bytes.detokenizer(skip_special_tokens=False)
        starts = range(0, len(tokens), DECODED_SLICE)
        texts = [detokenizer.feed(tokens[start : start + DECODED_SLICE]) for start in starts]
        return "".join(texts) + detokenizer.flush()

    def render_chat(
        self, conversation: list[dict[str, Any]], adds_prompt: bool, continues: bool, arguments: dict[str, Any]
    ) -> str:
        """Return the prompt for a conversation. Raises the exceptions of the chat template, which gets ``arguments``.

        ``adds_prompt``: end with the start of an answer. ``continues``: let the model extend the last message instead.
        """
        text: str = self._hf.apply_chat_template(
            conversation,
            tokenize=False,
            add_generation_prompt=adds_prompt and not continues,
            continue_final_message=continues,
            **arguments,
        )
        return text

    def fewest_tokens(self, characters: int) -> int:
        """Return a lower bound on the tokens of a text with ``characters`` characters. Used to refuse huge texts."""
        # The factor 4 is for normalizers, which may merge up to four characters into one or drop some.
        return characters // (4 * self._longest_characters)

    def close(self) -> None:
        for threads in (self._threads, self._large_thread):
            threads.shutdown(wait=False, cancel_futures=True)


def _load_tokenizer(directory: Path) -> Any:
    # The import takes seconds, and only the gateway needs it.
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
