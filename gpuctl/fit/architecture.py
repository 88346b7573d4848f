"""A model's shapes, as its config.json has them. May import: gpuctl.errors, gpuctl.fit, the standard library.

`read` makes an `Architecture`: every tensor that the engine keeps, with its shape and how tensor parallelism divides
it, and what each layer keeps of a request. The tensors are the engine's (query, key and value merged into one, the
experts of a layer in one), because it is those that the allocator rounds up; the names are the checkpoint's, because
it is those that a quantisation leaves out. How each family is built is in `families.py` and `towers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from gpuctl.errors import EXIT_USAGE, GpuctlError, usage_error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuctl.fit.quantization import Quantization

_ABSURD = 10**9  # no count or width of a model is as large


class UnknownFamilyError(GpuctlError):
    """A configuration of a family that is not in our tables: nothing wrong with it, only nothing known."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem, exit_code=EXIT_USAGE)


class Split(Enum):
    """How tensor parallelism divides a tensor over the GPUs of a stage."""

    ROWS = "rows"
    COLUMNS = "columns"
    VOCABULARY = "vocabulary"
    NONE = "none"


@dataclass(frozen=True)
class Tensor:
    """`copies` matrices of rows (outputs) x columns (inputs), of which a token uses `active`.

    `names` are the modules of the checkpoint that it holds, from the layer on, each with its rows: a tensor of query,
    key and value has three. `replicated_rows` are rows that come in `heads` indivisible pieces, of which every GPU
    has at least one (keys and values). `linear`: a linear layer's weight, to which a quantisation applies; of any
    other tensor (embedding, norm, bias, convolution) it does not. `fixed_bytes` is the size of an element where it is
    not the model's.
    """

    names: tuple[str, ...]
    rows: int
    columns: int = 1
    split: Split = Split.NONE
    linear: bool = False
    copies: int = 1
    active: int = 1
    kv_rows: int = 0
    kv_heads: int = 0
    fixed_bytes: int | None = None
    expert: bool = False

    @property
    def elements(self) -> int:
        """Parameters, on one GPU if there is no other."""
        return self.rows * self.columns * self.copies

    @property
    def active_elements(self) -> int:
        """Parameters that one token is multiplied with."""
        return self.rows * self.columns * self.active


@dataclass(frozen=True)
class Attention:
    """Keys and values of a layer: `kv_heads` x (`key` + `value`) elements for each token.

    `window`: only the last so many tokens are attended to; `chunked`: that window starts anew at its multiples.
    `shares`: the layer reads an earlier layer's cache and has none of its own.
    """

    heads: int
    kv_heads: int
    key: int
    value: int
    window: int | None = None
    chunked: bool = False
    shares: bool = False


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: `width` elements for each token, the same on every GPU.

    `index` bytes for each token are what a sparse attention's indexer keeps beside it.
    """

    heads: int
    width: int
    index: int = 0


@dataclass(frozen=True)
class Recurrent:
    """A state of fixed size for each request: a convolution's and a recurrence's, divided over the GPUs."""

    convolution: int  # elements
    state: int
    state_bytes: int | None = None  # of an element; None: the model's


Cache = Attention | Latent | Recurrent


@dataclass(frozen=True)
class Layer:
    """One layer: its tensors, and what it keeps of a request (None: nothing)."""

    tensors: tuple[Tensor, ...]
    cache: Cache | None


@dataclass(frozen=True)
class Experts:
    """A mixture's width: how many experts there are, how many a token takes, and their inner width."""

    count: int
    active: int
    intermediate: int


@dataclass(frozen=True)
class Architecture:
    """A model's shapes, all GPUs together. `context` is the longest that it was made for, in tokens.

    `first` are the tensors before the layers (embeddings), `last` those after them, `beside` those of towers (vision,
    audio), which every GPU has whole. `assumptions` say what the configuration left open.
    """

    model_type: str
    family: str
    hidden: int
    vocabulary: int
    heads: int
    intermediate: int
    layers: tuple[Layer, ...]
    first: tuple[Tensor, ...]
    last: tuple[Tensor, ...]
    beside: tuple[Tensor, ...]
    tied: bool
    element_bytes: int
    context: int | None
    experts: Experts | None = None
    quantization: Quantization | None = None
    multimodal: bool = False
    assumptions: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """All parameters that the engine loads."""
        return sum(t.elements for t in self.tensors())

    @property
    def active_parameters(self) -> int:
        """Parameters that each token passes through; the embedding, which is looked up, is not among them."""
        inner = sum(t.active_elements for layer in self.layers for t in layer.tensors)
        return inner + self.vocabulary * self.hidden

    def tensors(self) -> list[Tensor]:
        """All of them, in the order of loading."""
        inner = [t for layer in self.layers for t in layer.tensors]
        return [*self.first, *inner, *self.last, *self.beside]


class Fields:
    """A configuration, read with care: what is missing or absurd is an error that names the field."""

    def __init__(self, config: Mapping[str, object], what: str, inside: str = "") -> None:
        self.config = config
        self.what = what
        self.inside = inside

    def has(self, *names: str) -> bool:
        return any(self.config.get(name) is not None for name in names)

    def count(self, *names: str, default: int | None = None) -> int:
        """A whole number of at least 1, under the first of the names that is there."""
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
                raise self.wrong(name, value, "a whole number")
            if not 0 < value < _ABSURD:
                raise self.wrong(name, value, "a number above 0 that a model can have")
            return int(value)
        if default is None:
            raise usage_error(f"{self.what}: {self._path(names[0])} is missing")
        return default

    def number(self, *names: str, default: int = 0) -> int:
        """A whole number that may be 0, or absent."""
        for name in names:
            value = self.config.get(name)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
                    raise self.wrong(name, value, "a whole number")
                if not 0 <= value < _ABSURD:
                    raise self.wrong(name, value, "0 or a number that a model can have")
                return int(value)
        return default

    def flag(self, *names: str, default: bool = False) -> bool:
        for name in names:
            value = self.config.get(name)
            if value is not None:
                if not isinstance(value, bool | int):
                    raise self.wrong(name, value, "true or false")
                return bool(value)
        return default

    def text(self, *names: str, default: str = "") -> str:
        for name in names:
            value = self.config.get(name)
            if isinstance(value, str):
                return value
        return default

    def items(self, name: str) -> list[object] | None:
        value = self.config.get(name)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise self.wrong(name, value, "a list")
        return list(value)

    def below(self, *names: str) -> Fields | None:
        """The table of that name, if there is one."""
        for name in names:
            value = self.config.get(name)
            if isinstance(value, dict):
                return Fields(value, self.what, self._path(name))
        return None

    def wrong(self, name: str, value: object, wanted: str) -> Exception:
        """The error for a field that cannot be."""
        shown = repr(value)
        shown = shown if len(shown) < 60 else shown[:57] + "..."
        return usage_error(f"{self.what}: {self._path(name)} is {shown}; {wanted} is needed")

    def _path(self, name: str) -> str:
        return f"{self.inside}.{name}" if self.inside else name


def read(config: Mapping[str, object], *, what: str) -> Architecture:
    """The shapes that a config.json has. `what` names it in errors. Errors: usage, naming the field."""
    from gpuctl.fit.families import build

    return build(Fields(config, what))
