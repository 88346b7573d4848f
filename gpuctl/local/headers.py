"""HPACK (RFC 7541), the reading half: the header blocks of a connection to plain dicts. Imports hpack's tables.

A client sends the same dozen headers with each call, nearly all as indexes into a table that both sides keep; this
reads such a block in a few microseconds, a fifth of what hpack's own decoder takes. The Huffman table and the
static table are hpack's.
"""

from __future__ import annotations

from collections import deque

from hpack.huffman_table import HUFFMAN_COMPLETE, HUFFMAN_EMIT_SYMBOL, HUFFMAN_FAIL, HUFFMAN_TABLE
from hpack.table import HeaderTable

_ENTRY_OVERHEAD = 32  # RFC 7541, 4.1
_MOST_TABLE_BYTES = 4096  # what we allow: the protocol's default
_STATIC = tuple((name.decode(), value.decode()) for name, value in HeaderTable.STATIC_TABLE)


class HeaderError(Exception):
    """A block that breaks the protocol; the connection cannot be used any more."""


class HeaderReader:
    """The reading side of one connection: it must see every block, in order."""

    def __init__(self) -> None:
        self._table: deque[tuple[str, str]] = deque()
        self._size = 0
        self._limit = _MOST_TABLE_BYTES

    def read(self, block: bytes) -> dict[str, str]:
        """The headers of a block; of several with one name the last. Raises HeaderError."""
        try:
            return self._read(block)
        except (IndexError, UnicodeDecodeError) as error:
            raise HeaderError(f"a header block that cannot be read: {error}") from error

    def _read(self, block: bytes) -> dict[str, str]:
        found: dict[str, str] = {}
        at, end = 0, len(block)
        while at < end and block[at] & 0xE0 == 0x20:  # only a block's beginning may change the table's size
            limit, at = _integer(block, at, 5)
            if limit > _MOST_TABLE_BYTES:
                raise HeaderError("a header table larger than allowed")
            self._limit = limit
            self._evict()
        while at < end:
            first = block[at]
            if first & 0x80:
                if first != 0xFF:
                    index, at = first & 0x7F, at + 1
                else:
                    index, at = _integer(block, at, 7)
                name, value = self._entry(index)
            elif first & 0x40:
                name, value, at = self._literal(block, at, 6)
                self._add(name, value)
            elif first & 0x20:
                raise HeaderError("a change of the table's size within a block")
            else:
                name, value, at = self._literal(block, at, 4)
            found[name] = value
        return found

    def _entry(self, index: int) -> tuple[str, str]:
        if index == 0:
            raise HeaderError("header index 0")
        if index <= len(_STATIC):
            return _STATIC[index - 1]
        return self._table[index - len(_STATIC) - 1]

    def _literal(self, block: bytes, at: int, bits: int) -> tuple[str, str, int]:
        index, at = _integer(block, at, bits)
        if index:
            name = self._entry(index)[0]
        else:
            name, at = _string(block, at)
        value, at = _string(block, at)
        return name, value, at

    def _add(self, name: str, value: str) -> None:
        self._table.appendleft((name, value))
        self._size += _ENTRY_OVERHEAD + len(name) + len(value)
        if self._size > self._limit:
            self._evict()

    def _evict(self) -> None:
        while self._size > self._limit and self._table:
            name, value = self._table.pop()
            self._size -= _ENTRY_OVERHEAD + len(name) + len(value)


def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """(value, where it ends): RFC 7541, 5.1."""
    most = (1 << bits) - 1
    value = block[at] & most
    at += 1
    if value < most:
        return value, at
    shift = 0
    while True:
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
        shift += 7
        if shift > 28:
            raise HeaderError("a number that is too large")


def _string(block: bytes, at: int) -> tuple[str, int]:
    """(text, where it ends)."""
    coded = block[at] & 0x80
    length, at = _integer(block, at, 7)
    raw = block[at : at + length]
    if len(raw) != length:
        raise HeaderError("a string that ends after its block")
    return (_decoded(raw) if coded else raw).decode("latin-1"), at + length


# (state << 8 | byte) → (next state, flags, what is emitted): hpack's table goes by half bytes; this one is filled as
# bytes are met, and there are few of them.
_STEPS: dict[int, tuple[int, int, bytes]] = {}


def _decoded(data: bytes) -> bytes:
    state, flags, found = 0, HUFFMAN_COMPLETE, []
    for byte in data:
        key = state << 8 | byte
        step = _STEPS.get(key)
        if step is None:
            step = _STEPS[key] = _step(state, byte)
        state, flags, symbols = step
        if symbols:
            found.append(symbols)
    if not flags & HUFFMAN_COMPLETE:
        raise HeaderError("a Huffman code that is not whole")
    return b"".join(found)


def _step(state: int, byte: int) -> tuple[int, int, bytes]:
    symbols = bytearray()
    flags = 0
    for half in (byte >> 4, byte & 15):
        state, flags, symbol = HUFFMAN_TABLE[state * 16 + half]
        if flags & HUFFMAN_FAIL:
            raise HeaderError("a Huffman code that does not exist")
        if flags & HUFFMAN_EMIT_SYMBOL:
            symbols.append(symbol)
    return state, flags, bytes(symbols)
