"""What the commands say: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import typer
import typer.core
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..debug import debugging
from ..errors import RBLNError

Result = TypeVar("Result")

_WIDTH_OF_A_FILE = 200
"""Columns of a table that goes to a file or a pipe, where nothing need be folded."""

_EXPECTED = (OSError, ValueError, TypeError, RBLNError, MemoryError)
"""What a user can mend. Anything else is a defect, and says where to see more."""


def out() -> Console:
    """The console of results."""
    width = None if sys.stdout.isatty() else _WIDTH_OF_A_FILE
    return Console(width=width, markup=False, highlight=False, emoji=False)


def err() -> Console:
    """The console of progress and errors."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)


def table(*columns: str) -> Table:
    """An empty table; the first column is text, and what follows is set to the right."""
    result = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        result.add_column(column, justify="right" if i else "left", overflow="fold")
    return result


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show that something is under way, on a terminal alone."""
    with err().status(what):
        yield


def for_each(
    what: str, paths: Sequence[Path], work: Callable[[Path], Result]
) -> tuple[list[Result], bool]:
    """Do the same with each file, under a progress bar; one that fails doesn't stop the rest.

    Args:
        what: What is done, as the bar says it.
        paths: The files.
        work: What is done with one.

    Returns:
        The results of those that went well, and whether that was all.
    """
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = err()
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        for path in bar.track(paths, description=what):
            try:
                results.append(work(path))
            except (OSError, ValueError, RBLNError, MemoryError) as error:
                if debugging():
                    raise
                text = one_line(error)
                named = text if str(path) in text else f"{path}: {text}"
                console.print(f"error: {named}")
    return results, len(results) == len(paths)


def one_line(error: BaseException) -> str:
    """What an error says, for people, on one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    # Errors of the command line have a longer text than `str` gives.
    describe = getattr(error, "format_message", lambda: str(error))
    return " ".join(describe().split()) or type(error).__name__


class Commands(typer.core.TyperGroup):
    """The group of commands, whose errors are one line and an exit code.

    2 is a wrong call, 1 a failure, 130 an interruption (Ctrl-C).
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was called."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            err().print("interrupted")
            raise typer.Exit(130) from None

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; in `standalone_mode` exit with its code."""
        run = functools.partial(
            super().main,
            args,
            prog_name,
            complete_var,
            standalone_mode=False,
            windows_expand_args=windows_expand_args,
            **extra,
        )
        if not standalone_mode:
            return run()
        try:
            code = run()
        except Exception as error:
            if debugging():
                raise
            code = _report(error)
        sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception) -> int:
    text = one_line(error)
    wrong_call = hasattr(error, "format_message")
    if wrong_call:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "rbln-vae"
        text = f"{text.rstrip('.')}. See {command} --help."
    elif not isinstance(error, _EXPECTED):
        text = f"{type(error).__name__}: {text} (RBLN_VAE_DEBUG=1 shows where)"
    err().print(f"error: {text}")
    # Wrong arguments are ValueError and TypeError all over the package.
    return 2 if wrong_call or isinstance(error, (ValueError, TypeError)) else 1
