"""Headers of safetensors files: how many parameters of which type, without the weights. May import: nothing of ours.

The format (https://github.com/huggingface/safetensors#format): 8 bytes, the length of the header as a little-endian
number; the header, JSON, `{"NAME": {"dtype": "BF16", "shape": [4096, 4096], "data_offsets": […]}, …}`; the data.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

LENGTH = 8  # bytes before the header
LONGEST_HEADER = 100_000_000  # bytes: the format's own limit

# Bits of one element (safetensors, `Dtype::bitsize`).
BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "I4": 4, "U4": 4,
}  # fmt: skip

# An index states the size of all its files; `metadata` comes first in what the libraries write.
_TOTAL_SIZE = re.compile(rb'"total_size"\s*:\s*([0-9]{1,18})(?:\.0)?\s*[,}]')


class HeaderError(ValueError):
    """What was read is no header; the text says why."""


def header_length(first: bytes) -> int:
    """Bytes of the header that follows, from the first 8 of the file."""
    if len(first) < LENGTH:
        raise HeaderError("shorter than 8 bytes")
    length = int.from_bytes(first[:LENGTH], "little")
    if not 2 <= length <= LONGEST_HEADER:
        raise HeaderError(f"a header of {length} bytes")
    return length


def elements(header: bytes) -> dict[str, int]:
    """Elements by dtype of one file, from its header without the 8 bytes before it."""
    try:
        tensors = json.loads(header)
        found: dict[str, int] = {}
        for name, tensor in tensors.items():
            if name == "__metadata__":
                continue
            dtype, shape = tensor["dtype"], tensor["shape"]
            if not all(isinstance(size, int) and size >= 0 for size in shape):
                raise HeaderError(f"the shape of {name!r}")
            found[str(dtype)] = found.get(str(dtype), 0) + math.prod(shape)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HeaderError(f"no header: {error}") from error
    return found


def total(several: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The elements by dtype of several files together."""
    found: dict[str, int] = {}
    for one in several:
        for dtype, count in one.items():
            found[dtype] = found.get(dtype, 0) + count
    return found


def size(parameters: Mapping[str, int]) -> int | None:
    """Bytes of so many elements of these dtypes; None where one of them is not known here."""
    if any(dtype not in BITS for dtype in parameters):
        return None
    return -(-sum(BITS[dtype] * count for dtype, count in parameters.items()) // 8)


def total_size(index: bytes) -> int | None:
    """Bytes of all tensors as (the beginning of) a `model.safetensors.index.json` states it; None if it does not."""
    match = _TOTAL_SIZE.search(index)
    return int(match[1]) if match else None


def files_of(names: Iterable[str], index: Mapping[str, Any] | None) -> list[str]:
    """Which of a repository's files an engine loads: those of the index, else the ones at the top.

    Copies in folders (gpt-oss: `original/`, `metal/`) and Mistral's `consolidated` copy beside the shards of the
    index are not loaded (vLLM, `filter_duplicate_safetensors_files`).
    """
    if index is not None:
        return sorted(set(index.get("weight_map", {}).values()))
    top = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    return [name for name in top if not name.startswith("consolidated")] or top


def parts_of(names: Iterable[str]) -> list[str]:
    """Which of an image model's files are loaded: those in folders, without variants (`.fp16.`) of what is there."""
    inside = [name for name in names if "/" in name and name.endswith(".safetensors")]
    plain = [name for name in inside if not _VARIANT.search(name)]
    with_plain = {name.rpartition("/")[0] for name in plain}
    return sorted([*plain, *(name for name in inside if name.rpartition("/")[0] not in with_plain)])


_VARIANT = re.compile(r"\.(?:fp16|bf16|fp8|non_ema|ema)(?=[.-])")
