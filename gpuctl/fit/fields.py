"""A configuration, read with care. May import: gpuctl.errors, the standard library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuctl.errors import GpuctlError, usage_error

if TYPE_CHECKING:
    from collections.abc import Mapping

_ABSURD = 10**8  # no count, width or context of a model is as large
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_MANY_LAYERS = 10_000
# Fields that nobody has ever used for anything but an object.
_TABLES = ("quantization_config", "compression_config", "text_config", "vision_config", "rope_scaling")


class Fields:
    """One table of a config.json; a field that is missing or absurd is an error that names it.

    `defaults` are what the library that made the file leaves out of it.
    """

    def __init__(
        self,
        config: Mapping[str, object],
        what: str,
        inside: str = "",
        defaults: Mapping[str, object] | None = None,
    ) -> None:
        self.config = config
        self.what = what
        self.inside = inside
        self.defaults = defaults or {}

    def get(self, name: str) -> object:
        """The field as it is, else its default, else None."""
        value = self.config.get(name)
        return self.defaults.get(name) if value is None else value

    def has(self, *names: str) -> bool:
        """Whether one of the fields is there and not null."""
        return any(self.get(name) is not None for name in names)

    def count(self, *names: str, default: int | None = None) -> int:
        """A whole number of at least 1, under the first of the names that is there."""
        for name in names:
            value = self.get(name)
            if value is not None:
                number = self._whole(name, value)
                if number < 1:
                    raise self.wrong(name, value, "a number of at least 1 is needed")
                return number
        if default is None:
            raise usage_error(f"{self.what}: {self.path(names[0])} is missing")
        return default

    def number(self, *names: str, default: int = 0) -> int:
        """A whole number that may be 0, or absent."""
        for name in names:
            value = self.get(name)
            if value is not None:
                number = self._whole(name, value)
                if number < 0:
                    raise self.wrong(name, value, "0 or more is needed")
                return number
        return default

    def fraction(self, name: str, default: float = 1.0) -> float:
        """A number above 0 and up to 1."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise self.wrong(name, value, "a number above 0 and up to 1 is needed")
        return float(value)

    def flag(self, *names: str, default: bool = False) -> bool:
        """True or false, under the first of the names that is there."""
        for name in names:
            value = self.get(name)
            if value is not None:
                if not isinstance(value, bool) and value not in (0, 1):
                    raise self.wrong(name, value, "true or false is needed")
                return bool(value)
        return default

    def text(self, *names: str, default: str = "") -> str:
        """A string, under the first of the names that has one."""
        for name in names:
            value = self.get(name)
            if isinstance(value, str):
                return value
        return default

    def items(self, name: str) -> list[object] | None:
        """A list, or None."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise self.wrong(name, value, "a list is needed")
        return list(value)

    def table(self, name: str) -> Mapping[str, object] | None:
        """The table of that name, as it is; None where there is none."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict) and name in _TABLES:
            raise self.wrong(name, value, "an object is needed")
        return value if isinstance(value, dict) else None

    def below(self, *names: str, defaults: Mapping[str, object] | None = None) -> Fields | None:
        """The first table of those names that is there."""
        for name in names:
            value = self.table(name)
            if value is not None:
                return Fields(value, self.what, self.path(name), defaults)
        return None

    def wrong(self, name: str, value: object, wanted: str) -> GpuctlError:
        """The error for a field that cannot be so."""
        shown = repr(value)
        shown = shown if len(shown) < 60 else shown[:57] + "..."
        return usage_error(f"{self.what}: {self.path(name)} is {shown}: {wanted}")

    def path(self, name: str) -> str:
        """The field's name, with the tables that it is in."""
        return f"{self.inside}.{name}" if self.inside else name

    def _whole(self, name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
            raise self.wrong(name, value, "a whole number is needed")
        if abs(value) >= (_MANY_LAYERS if name in _LAYERS else _ABSURD):
            raise self.wrong(name, value, "no model has one as large")
        return int(value)
