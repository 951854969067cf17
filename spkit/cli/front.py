"""The app: a help that fits a screen, and how a command ends.

Exit codes: 0 done, or yes; 1 an error, in one sentence; 2 a wrong command line; 3 verify says no;
130 interrupted. With --json the result, or the error, is one JSON object on standard output.
"""

import json
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from spkit.errors import SpkitError, needs

DONE, FAILED, WRONG, NO, INTERRUPTED = 0, 1, 2, 3, 130
RUN, PATCH_FILES = "Run", "Patch files"
RESUMES = "interrupted; the same command resumes"


def version() -> str:
    """The kit's; spkit/__init__.py stands above this folder, so it is asked and not imported."""
    return sys.modules["spkit"].__version__


class OneScreen(TyperGroup):
    """The commands in their groups, a line each: 80 columns, 24 lines."""

    def format_help(self, ctx, formatter) -> None:
        """Written by hand, as the usual boxes need two screens."""
        lines = [f"spkit {version()}: SafePatching notebooks, patches as files"]
        lines[0] += "; COMMAND -h: its options"
        for panel in (RUN, PATCH_FILES):
            lines.append(f"{panel}:")
            for name, command in self.commands.items():
                if command.rich_help_panel == panel and not command.hidden:
                    lines.append(f"  {name:<12}{command.short_help}")
        lines.append(
            "Options: --version, -h, --install-completion. Exit: 0 yes 1 error 2 usage 3 no"
        )
        formatter.write("\n".join(lines) + "\n")


app = typer.Typer(
    cls=OneScreen,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"spkit {version()}")
        raise typer.Exit(DONE)


Version = Annotated[
    bool,
    typer.Option("--version", callback=_show_version, is_eager=True, help="show the version"),
]


@app.callback(invoke_without_command=True)
def front(context: typer.Context, version: Version = False) -> None:
    """SafePatching in notebooks, and safety patches as files."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(WRONG)


def command(
    panel: str, line: str, extra: str | None = None, hidden: bool = False
) -> Callable[[Callable], Callable]:
    """Register a command whose errors are one sentence, and an exit code.

    line: what the front help says of it, unless it is hidden there. extra: the group of optional
    dependencies that brings what it needs besides the core.
    """

    def register(function: Callable) -> Callable:
        @wraps(function)  # typer reads the signature
        def guarded(*args, **options):
            try:
                if extra is None:
                    return function(*args, **options)
                with needs(f"spkit {function.__name__}", extra):
                    return function(*args, **options)
            except SpkitError as error:
                tell(error, bool(options.get("as_json")))
                raise typer.Exit(FAILED) from None
            except KeyboardInterrupt:
                print(RESUMES, file=sys.stderr)
                raise typer.Exit(INTERRUPTED) from None

        return app.command(rich_help_panel=panel, short_help=line, hidden=hidden)(guarded)

    return register


def tell(error: SpkitError, as_json: bool) -> None:
    """One sentence on standard error, or one JSON object on standard output."""
    if as_json:
        print(json.dumps({"error": str(error)}))
    else:
        Console(stderr=True).print(f"[red]error[/]: {escape(str(error))}", soft_wrap=True)
