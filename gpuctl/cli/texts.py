"""Texts, lists of texts, flags and paths are taken as they are typed. May import: typer.

typer 0.29 converts every parameter through pydantic, whose import takes longer than all else that a verb does. Our
parameters need no conversion: what they mean is for the specs to check. Anything else is left to typer. This leans
on typer's private parts, hence the exact range of typer versions in pyproject.toml; a test sees that it works.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer._coercion import RuntimeParam

if TYPE_CHECKING:
    from typer._click import Command, Context
    from typer.core import _TyperParameter


class AsTyped(RuntimeParam):
    """No conversion but that of a path."""

    def _coerce_value(self, value: Any, param: _TyperParameter, ctx: Context) -> Any:  # noqa: ARG002
        if self.annotation is Path:
            return Path(value)
        return list(value) if isinstance(value, tuple) else value


def take_as_typed(command: Command) -> None:
    """Spare the parameters of a command, and of the commands below it, typer's conversion."""
    # All parameters, `--help` too, which typer makes when it is first asked for it and then keeps.
    context = command.context_class(command, **command.context_settings)
    for parameter in command.get_params(context):
        descriptor = getattr(parameter, "type_descriptor", None)
        if descriptor is not None and descriptor.annotation in (str, bool, list[str], Path):
            spared: Any = parameter
            spared._runtime_param = AsTyped(descriptor.parameter_info, descriptor.annotation)
    for below in getattr(command, "commands", {}).values():
        take_as_typed(below)
