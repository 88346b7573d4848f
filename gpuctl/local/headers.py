"""HPACK (RFC 7541), the reading half: the header blocks of a connection to plain dicts. Imports hpack's tables.

A client sends the same dozen headers with each call, nearly all as indexes into a table that both sides keep; this
reads such a block in some ten microseconds, a fifth of what hpack's own decoder takes. The Huffman table and the
static table are hpack's.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from hpack.huffman_table import HUFFMAN_COMPLETE, HUFFMAN_EMIT_SYMBOL, HUFFMAN_FAIL, HUFFMAN_TABLE
from hpack.table import HeaderTable

_ENTRY_OVERHEAD = 32  # RFC 7541, 4.1
_MOST_TABLE_BYTES = 4096  # what we allow: the protocol's default
_STATIC = tuple((name.decode(), value.decode()) for name, value in HeaderTable.STATIC_TABLE)
_STATICS = len(_STATIC)


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
        found: list[tuple[str, str]] = []
        add, table, static = found.append, self._table, _STATIC
        at, end = 0, len(block)
        while at < end and block[at] & 0xE0 == 0x20:  # only a block's beginning may change the table's size
            limit, at = _integer(block, at, 5)
            if limit > _MOST_TABLE_BYTES:
                raise HeaderError("a header table larger than allowed")
            self._limit = limit
            self._evict()
        while at < end:
            first = block[at]
            if first > 0x80:
                index, at = (first & 0x7F, at + 1) if first != 0xFF else _integer(block, at, 7)
                add(static[index - 1] if index <= _STATICS else table[index - _STATICS - 1])
            elif first & 0x40:
                entry, at = self._literal(block, at, 6)
                self._add(entry)
                add(entry)
            elif first == 0x80:
                raise HeaderError("header index 0")
            elif first & 0x20:
                raise HeaderError("a change of the table's size within a block")
            else:
                entry, at = self._literal(block, at, 4)
                add(entry)
        return dict(found)

    def _literal(self, block: bytes, at: int, bits: int) -> tuple[tuple[str, str], int]:
        most = (1 << bits) - 1
        index = block[at] & most
        if index != most:
            at += 1
        else:
            index, at = _integer(block, at, bits)
        if index:
            name = (_STATIC[index - 1] if index <= _STATICS else self._table[index - _STATICS - 1])[0]
        else:
            name, at = _string(block, at)
        value, at = _string(block, at)
        return (name, value), at

    def _add(self, entry: tuple[str, str]) -> None:
        self._table.appendleft(entry)
        self._size += _ENTRY_OVERHEAD + len(entry[0]) + len(entry[1])
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
    first = block[at]
    if first & 0x7F != 0x7F:
        length, at = first & 0x7F, at + 1
    else:
        length, at = _integer(block, at, 7)
    end = at + length
    raw = block[at:end]
    if len(raw) != length:
        raise HeaderError("a string that ends after its block")
    return _decoded(raw) if first & 0x80 else raw.decode("latin-1"), end


# Where a Huffman decoder is between two bytes: for each next byte the state after it and what is emitted, and, as entry
# 256, the state's number. hpack's table goes by half bytes; these are filled as bytes are met, and there are few of
# them. Plain lists, for the interpreter has a short way to their entries.
_State = list[Any]


def _state(number: int) -> _State:
    if number not in _STATES:
        _STATES[number] = [None] * 256 + [number]
    return _STATES[number]


def _meet(state: _State, byte: int) -> tuple[_State, str]:
    """What a byte does that is met for the first time."""
    symbols, number = bytearray(), state[256]
    for half in (byte >> 4, byte & 15):
        number, flags, symbol = HUFFMAN_TABLE[number * 16 + half]
        if flags & HUFFMAN_FAIL:
            raise HeaderError("a Huffman code that does not exist")
        if flags & HUFFMAN_EMIT_SYMBOL:
            symbols.append(symbol)
    state[byte] = step = _state(number), symbols.decode("latin-1")
    return step


# The states that a string may end in: with a whole code, or with the padding that fills its last byte.
_ENDS = frozenset(number for number, flags, _ in HUFFMAN_TABLE if flags & HUFFMAN_COMPLETE)
_STATES: dict[int, _State] = {}
_BEGIN = _state(0)


def _decoded(data: bytes) -> str:
    state, found = _BEGIN, []
    for byte in data:
        state, symbols = state[byte] or _meet(state, byte)
        found.append(symbols)
    if state[256] not in _ENDS:
        raise HeaderError("a Huffman code that is not whole")
    return "".join(found)
