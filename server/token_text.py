"""Gives the bytes of single tokens, which the logprobs of an answer show. Knows vocabularies, not probabilities.

A token may hold a part of a character only, so its own text is bytes. Two vocabularies are known: byte-level BPE, where
each character of a token stands for one byte, and SentencePiece, where `▁` is a space and `<0xE2>` a byte.
"""

import json
import re
from functools import lru_cache
from typing import Any

SENTENCEPIECE_SPACE = "\u2581"
BYTE_TOKEN = re.compile(r"^<0x([0-9A-F]{2})>$")


class TokenText:
    """Token id -> bytes, and the bytes as JSON shows them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added: dict[int, str] = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._byte_of = _byte_of_character() if _is_byte_level(tokenizer) else None
        self.bytes_of = lru_cache(maxsize=65536)(self._bytes_of)

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # a row of the head that pads the vocabulary
            return b""
        if self._byte_of is not None:
            return bytes(self._byte_of[character] for character in token)
        if (match := BYTE_TOKEN.match(token)) is not None:
            return bytes([int(match[1], 16)])
        return token.replace(SENTENCEPIECE_SPACE, " ").encode()

    def is_special(self, token_id: int) -> bool:
        """Whether it is a mark and no part of a text."""
        return token_id in self._special

    def shown(self, token_id: int) -> str:
        """The token as chat logprobs show it; half a character shows as the replacement character."""
        return self.bytes_of(token_id).decode(errors="replace")

    def key(self, token_id: int) -> str:
        """The token as completions show it: half a character as OpenAI has it, `bytes:\\xe2`, so that keys differ."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _is_byte_level(tokenizer: Any) -> bool:
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    return any(part["type"] == "ByteLevel" for part in [decoder, *decoder.get("decoders", [])])


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
