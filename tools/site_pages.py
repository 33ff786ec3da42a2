"""What mkdocs doesn't find by itself: documents outside of docs/, and what is known at run time.

Each document keeps the place that it has in the repository, so a link from one to another is the
same on the site and in a clone.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import griffe
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from rbln_vae import config as options
from rbln_vae.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "*.md",
    "LICENSE",
    "benchmarks/README.md",
    "benchmarks/results/*.md",
    "benchmarks/results/*.png",
    "deploy/*",
    "docs/**/*",
    "integrations/comfyui/example_workflows/*.jpg",
)
STORED = ("cls_name", "rbln_vae_version")
"""What a stored configuration has besides its options."""
COMMANDS = "docs/reference/command-line.md"


def on_config(config: MkDocsConfig) -> None:
    """List the results of benchmarks."""
    results = sorted(ROOT.glob("benchmarks/results/*.md"))
    assert config.nav is not None
    config.nav[-1]["Benchmarks"] += [each.relative_to(ROOT).as_posix() for each in results]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the documents in place of what mkdocs found."""
    found = Files([file for file in files if file.src_dir != config.docs_dir])
    for path in sorted(each for pattern in DOCUMENTS for each in ROOT.glob(pattern)):
        if path.is_file():
            name = path.relative_to(ROOT).as_posix()
            found.append(_file(config, name, abs_src_path=str(path)))
    found.append(_file(config, COMMANDS, content=command_line()))
    return found


def _file(config: MkDocsConfig, name: str, **source: Any) -> File:
    file = File.generated(config, name, **source)
    file.dest_uri = file.dest_uri.removeprefix("docs/")
    return file


def command_line() -> str:
    """The help of all commands, as a page."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="rbln-vae")
    text = text.replace("```console\n$ ", "```\n")
    return re.sub(r"^(#+) `(.*)`$", r"\1 \2", text, flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Docstrings as the parser of the reference reads them."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Name the section of examples as the parser does."""
        if obj.docstring is not None:
            value = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", value, flags=re.MULTILINE)

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Give a configuration class the docstring and the signature that its options make."""
        made = getattr(options, cls.name, None)
        if cls.docstring is None or not hasattr(made, "__signature__"):
            return
        cls.docstring.value = inspect.getdoc(made) or ""
        own = {name: each for name, each in vars(made).items() if isinstance(each, options.Option)}
        for name in own:
            del cls.members[name]
        parameters = [griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)]
        for name, option in own.items():
            parameters.append(_parameter(name, _type(option), repr(option.default)))
        if made is options.RBLNModelConfig:
            for alias, name in made._ALIASES.items():
                parameters.append(_parameter(alias, _type(own[name]) | None, "None"))
            parameters += [_parameter(each, str | None, "None") for each in STORED]
        else:
            # Names that stand for several options of this class are options of another.
            for name in sorted(set(made._names()) - {*made.options(), *made._ALIASES}):
                option = options.RBLNAutoencoderKLConfig.options()[name]
                parameters.append(_parameter(name, _type(option), "None"))
            parameters.append(
                griffe.Parameter("kwargs", annotation="Any", kind=griffe.ParameterKind.var_keyword)
            )
        init = griffe.Function("__init__", parameters=griffe.Parameters(*parameters))
        cls.set_member("__init__", init)


def _type(option: Any) -> Any:
    (found,) = option.__orig_class__.__args__
    return found


def _parameter(name: str, kind: Any, default: str) -> griffe.Parameter:
    shown = kind.__name__ if inspect.isclass(kind) and not hasattr(kind, "__args__") else str(kind)
    return griffe.Parameter(
        name, annotation=shown, kind=griffe.ParameterKind.keyword_only, default=default
    )
