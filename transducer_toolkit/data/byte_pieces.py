# SPDX-License-Identifier: Apache-2.0
"""Byte pieces: symbols such as ``<0xE4>``, of which several make one character (byte fallback)."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

__all__ = ["byte_of", "characters_of_bytes", "shown_symbols"]

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_of(symbol: str) -> int | None:
    """Return the value of a byte piece, or None for another symbol.

    Example:
        >>> byte_of("<0xE4>"), byte_of("a")
        (228, None)
    """
    found = _BYTE_PIECE.fullmatch(symbol)
    return None if found is None else int(found[1], 16)


def characters_of_bytes(symbols: Sequence[str]) -> dict[int, tuple[str, int]]:
    """Find the characters that consecutive byte pieces spell in UTF-8.

    Args:
        symbols: symbols of a text. Those that are no byte pieces are skipped.

    Returns:
        For the position of the first byte of each complete character, the character and the
        position of its last byte. Bytes that spell no character are in no span.

    Example:
        >>> characters_of_bytes(["a", "<0xC3>", "<0xA4>", "<0xC3>"])
        {1: ('ä', 2)}
    """
    found = {}
    decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
    for position, symbol in enumerate(symbols):
        value = byte_of(symbol)
        if value is None:
            decoder.reset()
            continue
        character = decoder.decode(bytes([value]))
        if character:
            found[position + 1 - len(character.encode())] = (character, position)
    return found


def shown_symbols(symbols: Sequence[str]) -> list[str]:
    """Return symbols as people read them.

    Args:
        symbols: symbols of a text.

    Returns:
        As many texts. A character of several byte pieces stands at its first one; the others, and
        bytes that spell no character, are empty.

    Example:
        >>> shown_symbols(["a", "<0xC3>", "<0xA4>"])
        ['a', 'ä', '']
    """
    characters = characters_of_bytes(symbols)
    return [
        symbol if byte_of(symbol) is None else characters.get(position, ("", position))[0]
        for position, symbol in enumerate(symbols)
    ]
