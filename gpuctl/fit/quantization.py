"""How a model's weights are stored. May import: gpuctl.errors, gpuctl.fit, the standard library.

A `Scheme` says how many bits a weight takes and what scales come with it; a `Quantization` says which modules have
which, and which are left as they are. `read` understands the `quantization_config` of the makers that vLLM loads (fp8,
AWQ, GPTQ, compressed-tensors, ModelOpt, MXFP4, bitsandbytes, AutoRound, Quark, TorchAO) and `hf_quant_config.json`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuctl.errors import usage_error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gpuctl.fit.fields import Fields


@dataclass(frozen=True)
class Scheme:
    """How a matrix is stored: `bits` a weight, and a scale of `scale_bits` for each group of inputs.

    `group` is the inputs that share a scale; 0: one scale a row; -1: one for the matrix. `rows` is how many rows share
    it too (128 for blocks of 128 x 128). `zero_bits` is a zero point's size, one for each scale. `needs` is the least
    compute capability on which the engine runs it, its fallbacks to 16-bit arithmetic counted in.
    """

    name: str
    bits: int
    group: int = 0
    rows: int = 1
    scale_bits: int = 32
    zero_bits: int = 0
    needs: tuple[int, int] = (7, 5)

    def bytes_of(self, rows: int, columns: int, copies: int = 1) -> int:
        """Bytes of so many matrices of rows (outputs) x columns (inputs), without their scales."""
        return (rows * columns * copies * self.bits + 7) // 8

    def scales_of(self, rows: int, columns: int, copies: int = 1) -> int:
        """Bytes of their scales and zero points."""
        if self.group == -1:
            many = 1
        elif self.group == 0:
            many = rows
        else:
            many = -(-columns // self.group) * -(-rows // self.rows)
        return (copies * many * (self.scale_bits + self.zero_bits) + 7) // 8


@dataclass(frozen=True)
class Rule:
    """Modules that have a scheme of their own: names, endings of names, or patterns."""

    targets: tuple[str, ...]
    scheme: Scheme | None


@dataclass(frozen=True)
class Quantization:
    """What is stored how: a module that is ignored stays as it is, else the first rule that names it decides.

    `kv_cache` is the format that the checkpoint has scales for ("fp8"). `experts` is the scheme of a mixture's routed
    experts where it is not the others'; with `experts_only`, nothing but they has one.
    """

    method: str
    scheme: Scheme | None
    ignored: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    kv_cache: str | None = None
    experts: Scheme | None = None
    experts_only: bool = False

    @property
    def needs(self) -> tuple[int, int]:
        """The least compute capability that runs all of it."""
        schemes = [self.scheme, self.experts, *(rule.scheme for rule in self.rules)]
        return max((scheme.needs for scheme in schemes if scheme is not None), default=(0, 0))

    @property
    def mxfp4_kernels(self) -> bool:
        """Whether the experts run in the kernels for MXFP4, which pad and swizzle them (gpt-oss)."""
        return self.experts_only and self.scheme == MXFP4


# `needs`: `get_min_capability` of vLLM 0.32, `layers/quantization/`.
FP8 = Scheme("fp8", 8, group=-1, needs=(7, 5))
FP8_ROWS = Scheme("fp8", 8, group=0, needs=(7, 5))
INT8_ROWS = Scheme("int8", 8, group=0, needs=(7, 5))
MXFP8 = Scheme("mxfp8", 8, group=32, scale_bits=8, needs=(8, 0))
NVFP4 = Scheme("nvfp4", 4, group=16, scale_bits=8, needs=(7, 5))
MXFP4 = Scheme("mxfp4", 4, group=32, scale_bits=8, needs=(8, 0))
NF4 = Scheme("nf4", 4, group=64, scale_bits=8, needs=(7, 0))


def integer(bits: int, group: int, *, symmetric: bool = True, needs: tuple[int, int] = (7, 5)) -> Scheme:
    """Weights of whole numbers with 16-bit scales: AWQ, GPTQ and their kin."""
    return Scheme(f"int{bits}", bits, group, scale_bits=16, zero_bits=0 if symmetric else bits, needs=needs)


@dataclass(frozen=True)
class Online:
    """What the engine makes of 16-bit weights while it loads: all linear layers, or a mixture's experts alone.

    `since` is the first version that has it, `streamed` the first that makes it of one layer after the other: before,
    all weights are in the GPU's memory in 16 bits first.
    """

    scheme: Scheme
    experts_only: bool = False
    since: tuple[int, int] = (0, 0)
    streamed: tuple[int, int] = (0, 0)


# By the name for `--quantization` (each version's `layers/quantization/__init__.py`, `config/quantization.py`:
# `_ONLINE_SHORTHANDS`, and `device="meta"` in `fp8.py` and `online/`).
ON_THE_FLY = {
    "fp8": Online(FP8, streamed=(0, 16)),
    "fp8_per_tensor": Online(FP8, since=(0, 20)),
    "fp8_per_block": Online(Scheme("fp8", 8, group=128, rows=128), since=(0, 20)),
    "fp8_per_channel": Online(FP8_ROWS, since=(0, 24)),
    "mxfp8": Online(MXFP8, since=(0, 19)),
    "mxfp4": Online(MXFP4, since=(0, 29)),
    "int8_per_channel_weight_only": Online(INT8_ROWS, experts_only=True, since=(0, 20)),
    "experts_int8": Online(dataclasses.replace(INT8_ROWS, needs=(8, 0)), experts_only=True, streamed=(0, 20)),
    "nvfp4_per_token": Online(dataclasses.replace(NVFP4, needs=(10, 0)), experts_only=True, since=(0, 26)),
    "bitsandbytes": Online(NF4),
}

# Methods that are not in the engine any more, from which version on, and what has them since.
_PLUGINS = {"bitsandbytes": ((0, 28), "vllm-bnb-plugin"), "gguf": ((0, 24), "vllm-gguf-plugin")}

# Other names that the engine takes for how a checkpoint is stored: another kernel for the same format.
_KERNELS = {
    "gptq": {"gptq_marlin", "auto_gptq", "marlin", "moe_wna16"},
    "awq": {"awq_marlin", "auto_awq", "marlin", "moe_wna16"},
    "fp8": {"deepseek_v4_fp8"},
}
# What a checkpoint has to be of itself: the engine does not make it (`weight_utils.py: get_quant_config`).
STORED_ONLY = frozenset(("compressed-tensors", "quark", *_KERNELS["gptq"], *_KERNELS["awq"], "gptq", "awq"))
_OWN_WAY = ("modelopt", "mxfp4")  # what the checkpoint says overrides whatever is asked


def on_the_fly(method: str) -> Quantization | None:
    """The quantisation that the engine makes itself, or None where the name is not one of those.

    The matrix of the output stays as it is.
    """
    online = ON_THE_FLY.get(method)
    if online is None:
        return None
    return Quantization(method, online.scheme, ignored=("lm_head",), experts_only=online.experts_only)


def plugin(method: str, version: tuple[int, int]) -> str | None:
    """What has to be installed beside a version of the engine for a method, None for nothing."""
    gone, name = _PLUGINS.get(method, ((999, 0), ""))
    return name if version >= gone else None


def goes_as(stored: str, asked: str) -> bool:
    """Whether the engine takes a method's name for a checkpoint that is stored as another says.

    Any other is refused when it starts (vLLM, `ModelConfig._verify_quantization`, and the methods'
    `override_quantization_method`).
    """
    return asked in (stored, "humming") or stored in _OWN_WAY or asked in _KERNELS.get(stored, set())


def read(f: Fields, text: Fields, separate: Mapping[str, object] | None) -> Quantization | None:
    """How the weights are stored, from the configuration, its text part, or hf_quant_config.json."""
    from gpuctl.fit.fields import Fields as Table

    table = f.below("quantization_config", "compression_config") or text.below(
        "quantization_config", "compression_config"
    )
    if table is None:
        if separate is None:
            return None
        table = Table(separate, f"{f.what} (hf_quant_config.json)")
    inner = table.below("quantization")
    if inner is not None:
        table = inner
    method = table.text("quant_method").lower()
    algorithm = table.text("quant_algo", "weight_algo").upper()
    if method in ("", "modelopt", "modelopt_fp4", "modelopt_mixed") and (
        algorithm or method.startswith("modelopt")
    ):
        return _modelopt(table, algorithm)
    readers: dict[str, Callable[[Fields], Quantization]] = {
        "fp8": _fp8,
        "fbgemm_fp8": _fbgemm,
        "awq": _awq,
        "gptq": _gptq,
        "gptq_marlin": _gptq,
        "awq_marlin": _awq,
        "auto-round": _gptq,
        "auto_round": _gptq,
        "autoround": _gptq,
        "intel/auto-round": _gptq,
        "compressed-tensors": _compressed,
        "mxfp4": _mxfp4,
        "bitsandbytes": _bitsandbytes,
        "quark": _quark,
        "gguf": _gguf,
        "modelopt": lambda t: _modelopt(t, algorithm),
    }
    if method not in readers:
        return Quantization(method or "unknown", None)
    read_as = readers[method](table)
    # DeepSeek V4 stores its routed experts in MXFP4, beside fp8 for the rest (vLLM, `models/deepseek_v4`:
    # `expert_dtype`, "fp4" or "fp8").
    if method == "fp8" and (text.text("expert_dtype") or table.text("expert_dtype")).lower() == "fp4":
        return dataclasses.replace(read_as, experts=MXFP4)
    return read_as


def _names(table: Fields, *fields: str) -> tuple[str, ...]:
    for name in fields:
        value = table.get(name)
        if isinstance(value, list | tuple):
            return tuple(str(one) for one in value)
    return ()


def _fp8(table: Fields) -> Quantization:
    block = table.items("weight_block_size")
    ignored = _names(table, "modules_to_not_convert", "ignored_layers", "ignore")
    if block:
        rows, columns = _block(table, "weight_block_size", block)
        ue8m0 = table.text("scale_fmt") == "ue8m0"
        scheme = Scheme("fp8", 8, columns, rows, scale_bits=8 if ue8m0 and rows == 1 else 32)
    else:
        scheme = FP8
    return Quantization("fp8", scheme, (*ignored, "lm_head"))


def _block(table: Fields, name: str, block: object) -> tuple[int, int]:
    """Rows and columns of a block that shares a scale."""
    if isinstance(block, list | tuple) and len(block) == 2:
        rows, columns = block
        if isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0:
            return rows, columns
    raise table.wrong(name, block, "two numbers of at least 1 are needed")


def _fbgemm(table: Fields) -> Quantization:
    return Quantization("fbgemm_fp8", FP8_ROWS, (*_names(table, "modules_to_not_convert"), "lm_head"))


def _awq(table: Fields) -> Quantization:
    bits, group = (
        table.count("bits", "w_bit", default=4),
        table.count("group_size", "q_group_size", default=128),
    )
    ignored = _names(table, "modules_to_not_convert")
    return Quantization(
        "awq",
        integer(bits, group, symmetric=not table.flag("zero_point", default=True)),
        (*ignored, "lm_head"),
    )


def _gptq(table: Fields) -> Quantization:
    bits, size = table.count("bits", default=4), table.get("group_size")
    group = size if isinstance(size, int) and size > 0 else 0
    ignored = list(_names(table, "modules_to_not_convert", "modules_in_block_to_quantize_not"))
    rules: list[Rule] = []
    dynamic = table.table("dynamic") or {}
    for name, value in dynamic.items():
        if name.startswith("-:"):
            ignored.append(f"re:{name[2:]}")
        elif isinstance(value, dict):
            own = value.get("bits", bits)
            rules.append(Rule((f"re:{name.removeprefix('+:')}",), integer(int(own), group)))
    extra = table.table("extra_config") or {}
    for name, value in extra.items():
        if isinstance(value, dict) and value.get("bits", bits) not in (bits,):
            own = int(value["bits"])
            (ignored.append(name) if own >= 16 else rules.append(Rule((name,), integer(own, group))))
    if not table.flag("lm_head", "quant_lm_head", default=False):
        ignored.append("lm_head")
    return Quantization("gptq", integer(bits, group), tuple(ignored), tuple(rules))


def _mxfp4(table: Fields) -> Quantization:
    """Experts in MXFP4, all else as it is (gpt-oss)."""
    return Quantization(
        "mxfp4", MXFP4, (*_names(table, "modules_to_not_convert"), "lm_head"), experts_only=True
    )


def _bitsandbytes(table: Fields) -> Quantization:
    scheme = INT8_ROWS if table.flag("load_in_8bit") else NF4
    return Quantization("bitsandbytes", scheme, (*_names(table, "llm_int8_skip_modules"), "lm_head"))


def _gguf(_: Fields) -> Quantization:
    return Quantization("gguf", None)


def _quark(table: Fields) -> Quantization:
    ignored = _names(table, "exclude")
    both = table.below("global_quant_config")
    weight = both.below("weight") if both else None
    dtype = weight.text("dtype") if weight else ""
    scheme = {"fp4": MXFP4, "fp8_e4m3": FP8, "int8": INT8_ROWS, "int4": integer(4, 128)}.get(dtype)
    return Quantization("quark", scheme, (*ignored, "lm_head"))


def _modelopt(table: Fields, algorithm: str) -> Quantization:
    """NVIDIA's ModelOpt; in a `config_groups` of its own, or by the algorithm's name."""
    ignored = _names(table, "ignore", "exclude_modules")
    kv = table.get("kv_cache_scheme") or table.get("kv_cache_quant_algo")
    kv_cache = None
    if isinstance(kv, dict):
        kv_cache = "fp8" if kv.get("num_bits") == 8 else "nvfp4"
    elif isinstance(kv, str) and kv.upper() not in ("", "NONE"):
        kv_cache = "fp8" if "FP8" in kv.upper() else kv.lower()
    schemes = {
        "FP8": FP8,
        "FP8_PER_CHANNEL_PER_TOKEN": FP8_ROWS,
        "FP8_PB_WO": Scheme("fp8", 8, group=128, rows=128),
        "MXFP8": MXFP8,
        "NVFP4": NVFP4,
        "NVFP4_AWQ": NVFP4,
        "W4A16_NVFP4": NVFP4,
        "W4A8_NVFP4_FP8": NVFP4,
        "MXFP4": MXFP4,
        "W4A8_AWQ": integer(4, 128),
        "W4A16_AWQ": integer(4, 128),
        "W8A16": INT8_ROWS,
        "INT8_SQ": INT8_ROWS,
    }
    rules = []
    for name, value in (table.table("quantized_layers") or {}).items():
        own = schemes.get(str(value.get("quant_algo", "")).upper()) if isinstance(value, dict) else None
        rules.append((name, own))
    by_scheme: dict[Scheme | None, list[str]] = {}
    for name, own in rules:
        by_scheme.setdefault(own, []).append(name)
    grouped = tuple(Rule(tuple(names), own) for own, names in by_scheme.items())
    if grouped:
        return Quantization("modelopt", None, (*ignored, "lm_head"), grouped, kv_cache)
    scheme = schemes.get(algorithm)
    if scheme is None and table.has("config_groups"):
        scheme = _groups(table)[0]
    return Quantization("modelopt", scheme, (*ignored, "lm_head"), (), kv_cache)


def _compressed(table: Fields) -> Quantization:
    """compressed-tensors (llm-compressor): groups of modules, each with its format."""
    scheme, rules = _groups(table)
    kv = table.table("kv_cache_scheme")
    kv_cache = "fp8" if kv and kv.get("num_bits") == 8 else None
    return Quantization("compressed-tensors", scheme, _names(table, "ignore"), rules, kv_cache)


def _groups(table: Fields) -> tuple[Scheme | None, tuple[Rule, ...]]:
    groups = table.table("config_groups") or {}
    default: Scheme | None = None
    rules: list[Rule] = []
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise table.wrong("config_groups", group, "a table for each group is needed")
        scheme = _scheme(table, group, name)
        targets = group.get("targets") or ["Linear"]
        if not isinstance(targets, list | tuple):
            raise table.wrong(f"config_groups.{name}.targets", targets, "a list is needed")
        named = tuple(str(t) for t in targets if t not in ("Linear", "FusedMoE", "MoEGMM"))
        if named:
            rules.append(Rule(named, scheme))
        else:
            default = scheme
    return default, tuple(rules)


def _scheme(table: Fields, group: Mapping[str, object], name: str) -> Scheme | None:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        return None
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if not isinstance(bits, int) or not 1 < bits <= 16:
        raise usage_error(
            f"{table.what}: {table.path('config_groups')}.{name}.weights.num_bits is {bits!r}: 2 to 16 are needed"
        )
    size, strategy = weights.get("group_size"), weights.get("strategy")
    style = str(group.get("format") or table.text("format") or "")
    if kind == "float" and bits == 4:
        return NVFP4 if size == 16 or "nvfp4" in style else MXFP4
    if kind == "float":
        if strategy == "block":
            rows, columns = _block(
                table,
                f"config_groups.{name}.weights.block_structure",
                weights.get("block_structure") or [128, 128],
            )
            return Scheme("fp8", 8, group=columns, rows=rows)
        if size == 32:
            return MXFP8
        return FP8 if strategy == "tensor" else FP8_ROWS
    if bits == 8 and "pack" not in style:
        return INT8_ROWS
    symmetric = bool(weights.get("symmetric", True))
    return integer(bits, int(size) if isinstance(size, int) and size > 0 else 0, symmetric=symmetric)


class Matcher:
    """Which scheme a module has. Names are compared from the layers on, as each maker puts another prefix before."""

    def __init__(self, quantization: Quantization) -> None:
        self._all = quantization
        self._ignored = _Patterns(quantization.ignored)
        self._rules = [(_Patterns(rule.targets), rule.scheme) for rule in quantization.rules]
        # Whether layers of one kind can differ in what is quantised.
        self.by_layer = any(
            "layers" in pattern and any(char.isdigit() for char in pattern)
            for pattern in (*quantization.ignored, *(t for rule in quantization.rules for t in rule.targets))
        )

    def scheme(self, names: Sequence[str], *, expert: bool) -> Scheme | None:
        """The scheme of the modules that one tensor holds; None: as they are.

        The engine needs all parts of a merged tensor to agree, so one that is ignored stands for all.
        """
        if any(self._ignored.match(name) for name in names):
            return None
        if self._all.experts_only:
            return self._all.scheme if expert else None
        if expert and self._all.experts is not None:
            return self._all.experts
        for patterns, scheme in self._rules:
            if any(patterns.match(name) for name in names):
                return scheme
        return self._all.scheme


_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "language_model.", "")


class _Patterns:
    """Names, wildcards and regular expressions ("re:…") of modules."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._exact: set[str] = set()
        self._prefixes: list[str] = []
        self._wild: list[object] = []
        self._words: set[str] = set()
        for pattern in patterns:
            if pattern.startswith("re:"):
                self._wild.append(_regex(pattern[3:]))
            elif pattern.endswith("*") and not set(pattern[:-1]) & set("*?["):
                self._prefixes.append(bare(pattern[:-1]))
            elif set(pattern) & set("*?["):
                import fnmatch

                self._wild.append(_regex(fnmatch.translate(pattern)))
            elif "." in pattern:
                self._exact.add(bare(pattern))
            else:
                self._words.add(pattern)

    def match(self, name: str) -> bool:
        """Whether a module, named from the layers on, is meant."""
        parts = name.split(".")
        if self._words and not self._words.isdisjoint(parts):
            return True
        if self._exact:
            whole = ""
            for part in parts:  # a module is meant when what it is in is
                whole = f"{whole}.{part}" if whole else part
                if whole in self._exact:
                    return True
        if any(name.startswith(prefix) for prefix in self._prefixes):
            return True
        return any(p.match(prefix + name) for p in self._wild for prefix in _PREFIXES)  # type: ignore[attr-defined]


def bare(name: str) -> str:
    """A module's name without what stands before its layers."""
    for prefix in _PREFIXES[:-1]:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def _regex(text: str) -> object:
    import re

    try:
        return re.compile(text)
    except re.error:
        return re.compile(re.escape(text))
