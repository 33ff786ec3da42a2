"""Options of the command line that are made of what the package declares."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from ..config import RBLNModelConfig

Group = Sequence[inspect.Parameter]
"""Options that several commands have, or that come of one class."""


def parameter(name: str, kind: Any, default: Any, shown: Any) -> inspect.Parameter:
    """An option or an argument of a command.

    Args:
        name: The name of the function's argument.
        kind: Its type.
        default: Its default.
        shown: What `typer.Option` or `typer.Argument` gave.
    """
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=Annotated[kind, shown])


def option_of(
    config: type[RBLNModelConfig],
    name: str,
    kind: Any = str,
    flag: str | None = None,
    read: Callable[[Any], object] = lambda value: value,
    metavar: str | None = None,
) -> inspect.Parameter:
    """The command line's form of an option of a configuration.

    Args:
        config: The configuration.
        name: The option.
        kind: How it is written: text, or a number.
        flag: By default made of the name.
        read: What makes of the text what the option takes, if it doesn't take the text.
        metavar: What stands for the value in the help. By default the type.
    """
    option = config.options()[name]

    def checked(value: Any) -> Any:
        try:
            return None if value is None else option.check(read(value))
        except (ValueError, TypeError) as error:
            raise typer.BadParameter(f"{value!r}: {error}") from None

    flags = [] if flag is None else [flag]
    shown = typer.Option(
        *flags, help=option.meaning, metavar=metavar, show_default=False, callback=checked
    )
    return parameter(name, kind | None, None, shown)


def options_of(
    settings: type[Any], *, leave: Sequence[str] = (), texts: Sequence[str] = ()
) -> Group:
    """The command line's form of a dataclass of settings.

    Args:
        settings: Its fields are made by `config.setting`.
        leave: Fields to leave out.
        texts: Fields that are written as text, which the command converts.
    """
    hints = typing.get_type_hints(settings)
    group = []
    for field in dataclasses.fields(settings):
        if field.name in leave:
            continue
        kind, default = hints[field.name], field.default
        if default is None or field.name in texts:
            kind, default = (str if field.name in texts else kind) | None, None
        flag = "--" + field.name.replace("_", "-")
        if kind is bool and default:
            flag += f"/--no-{flag.removeprefix('--')}"
        shows = default is not None and default is not False  # 0 is a default to show
        shown = typer.Option(flag, help=field.metadata["meaning"], show_default=shows)
        group.append(parameter(field.name, kind, default, shown))
    return group


def grouped(**groups: Group) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of groups.

    Args:
        **groups: The options of each group; the command gets those that were given, in a
            dictionary under the name of the group.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name not in groups]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        parameters += [p for group in groups.values() for p in group]

        @functools.wraps(command)
        def called(**arguments: Any) -> None:
            gathered = {
                name: given(**{p.name: arguments.pop(p.name) for p in group})
                for name, group in groups.items()
            }
            command(**arguments, **gathered)

        called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in parameters}
        return called

    return decorate


def given(**options: Any) -> dict[str, Any]:
    """The options that aren't `None`."""
    return {name: value for name, value in options.items() if value is not None}
