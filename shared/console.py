"""What every command line of this project has in common: parameters, logging, progress, tables.

`run` is the one boundary where a `UserError` becomes a single message on stderr and exit code 2.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from shared.errors import USER_ERROR_EXIT_CODE, UserError

# Without a terminal (a log file, CI) Rich would wrap every line at 80 columns.
LOG_FILE_WIDTH = 120
stdout = Console(width=None if sys.stdout.isatty() else LOG_FILE_WIDTH)
stderr = Console(stderr=True, width=None if sys.stderr.isatty() else LOG_FILE_WIDTH)

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, e.g. configs/demo.yaml.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override one setting; the value is YAML. May be repeated."),
]
LogLevelOption = Annotated[
    Literal["debug", "info", "warning", "error", "critical"],
    typer.Option("--log-level", case_sensitive=False, help="What is logged to stderr."),
]
SplitOption = Annotated[Literal["train", "held_out"] | None, typer.Option("--split", help="Only this split.")]
RuleOption = Annotated[
    Literal["greedy", "sample", "filtered"] | None, typer.Option("--rule", help="Only this decoding rule.")
]

# Of both `push`.
RepositoryArgument = Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hugging Face Hub.")]
LicenseOption = Annotated[
    str | None,
    typer.Option("--license", help="For the card, such as apache-2.0; by default it is unknown."),
]
PrivateOption = Annotated[bool, typer.Option("--private/--public", help="Who sees a new repository.")]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", metavar="BRANCH", help="Made where it is not there; the default is main.")
]
MessageOption = Annotated[str | None, typer.Option("--message", help="Of the commits.")]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(importlib.metadata.version("llada-drafter"))
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
]


def application(help: str) -> typer.Typer:
    """A Typer app with the project's conventions; shells complete it after `--install-completion`."""
    app = typer.Typer(help=help, no_args_is_help=True, pretty_exceptions_enable=False)

    @app.callback()
    def common(version: VersionOption = False) -> None: ...

    return app


def run(app: typer.Typer) -> None:
    """Run `app`; a user's mistake ends as one message on stderr and exit code 2, without a traceback."""
    try:
        app()
    except UserError as error:
        stderr.print("[bold red]error:[/]", end=" ")
        stderr.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(USER_ERROR_EXIT_CODE)


def configure_logging(level: str) -> None:
    """Send the project's log lines of this level and above to stderr."""
    number = logging.getLevelNamesMapping()[level.upper()]
    handler = RichHandler(console=stderr, show_path=False, markup=False, log_time_format="%H:%M:%S")
    logging.basicConfig(level=number, format="%(message)s", handlers=[handler], force=True)
    # One progress bar a step is ours; libraries draw theirs through tqdm.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Libraries that narrate at INFO what their users do not act on, or at DEBUG a store's session token.
    for chatty in ("httpx", "httpx2", "urllib3", "matplotlib", "fsspec", "botocore", "aiobotocore"):
        logging.getLogger(chatty).setLevel(max(number, logging.WARNING))
    # transformers imports DeepSpeed where both are installed, which warns on every start that it found no GPU.
    logging.getLogger("DeepSpeed").addFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()


def progress() -> Progress:
    """A progress bar on stderr: description, bar, n/m, elapsed, remaining and a free `note` column."""
    return Progress(
        SpinnerColumn(),
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=stderr,
    )


def titled_table(title: str, *header: str) -> Table:
    """A table under its title; `header` names the columns, where they need it."""
    return Table(*header, show_header=bool(header), title=title, title_justify="left")


def bytes_text(count: float) -> str:
    """A number of bytes in the unit that suits it, decimal: `3.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # which three digits round to 1000
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"
