"""`shards …`: check, describe, show, import, export, merge and publish datasets. This file only wires."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from shared.console import (
    LicenseOption,
    LogLevelOption,
    MessageOption,
    PrivateOption,
    RepositoryArgument,
    RevisionOption,
    RuleOption,
    SplitOption,
    application,
    configure_logging,
    run,
    stdout,
)

app = application("Datasets of a teacher's distributions: check them, look into them, import and export them.")

DirArgument = Annotated[str, typer.Argument(metavar="DIR", help="A dataset: a directory, or s3://…, gs://…, hf://….")]
TokenizerOption = Annotated[
    Path, typer.Option("--tokenizer", metavar="DIR", help="The teacher's tokenizer, that the rows were made with.")
]


@app.command()
def validate(directory: DirArgument, log_level: LogLevelOption = "info") -> None:
    """Check every checksum and every row: exit code 2 and a list of the problems where there are any."""
    configure_logging(log_level)
    from shared.dataset.validate import validate_dataset

    report = validate_dataset(directory)
    report.raise_if_damaged(directory)
    stdout.print(f"[green]valid[/]: {report.units:,} shards, {report.rows:,} responses, {report.tokens:,} tokens")


@app.command()
def stats(
    directory: DirArgument,
    picture: Annotated[Path | None, typer.Option("--picture", metavar="FILE", help="Draw a .png or .svg too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    log_level: LogLevelOption = "info",
) -> None:
    """Tokens, bytes per token, retained mass by k, finish reasons and lengths."""
    configure_logging(log_level)
    from shared.commands.stats import check_picture, draw, measure, to_table

    if picture is not None:
        check_picture(picture)
    statistics = measure(directory)
    if picture is not None:
        draw(statistics, picture)
    if as_json:
        typer.echo(json.dumps(statistics.to_json(), indent=2))
    else:
        stdout.print(to_table(statistics))


@app.command()
def show(
    directory: DirArgument,
    record: Annotated[
        str, typer.Argument(metavar="RECORD", help="Its number; or its sample id, where no record has that number.")
    ] = "0",
    candidates: Annotated[int, typer.Option(min=1, help="Candidates shown per token.")] = 5,
    tokens: Annotated[int | None, typer.Option(min=1, help="Show only the first tokens.")] = None,
    log_level: LogLevelOption = "info",
) -> None:
    """One record: its text, and each token with its candidates."""
    configure_logging(log_level)
    from shared.commands.show import show as show_record

    stdout.print(show_record(directory, record, candidates, tokens))


@app.command("import-json")
def import_json(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A JSON list of entries, or one a line; gzip or plain.")],
    directory: DirArgument,
    tokenizer: TokenizerOption,
    top_k: Annotated[int, typer.Option(min=1, help="Candidates kept per token.")] = 64,
    values: Annotated[
        Literal["logits", "logprobs"],
        typer.Option(help="What rows of candidates hold; logprobs leave a known tail."),
    ] = "logits",
    temperature: Annotated[
        float | None, typer.Option(min=0, help="How the responses were decoded; 0 is greedy.")
    ] = None,
    held_out: Annotated[float, typer.Option(min=0, max=1, help="Share of prompts that training never sees.")] = 0.1,
    rendered: Annotated[
        bool | None,
        typer.Option(
            "--rendered/--no-rendered",
            help="Prompts are rendered text already, or words; without, what is rendered is recognized.",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Whose rows they are: imports of one name can be merged. Default: the file's."
        ),
    ] = None,
    template_argument: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Passed to the chat template, as collect.template_arguments is."),
    ] = None,
    log_level: LogLevelOption = "info",
) -> None:
    """Make a dataset of the legacy JSON layout: prompt, response, logits, token, tokenID; or of plain conversations."""
    configure_logging(log_level)
    from shared.commands.legacy_json.files import import_json as import_file
    from shared.commands.legacy_json.layout import ImportSettings
    from shared.config import apply_override
    from shared.dataset.records import UNKNOWN_SAMPLING, Sampling

    sampling = UNKNOWN_SAMPLING if temperature is None else Sampling(temperature, 1.0, 0, 0, None)
    arguments: dict[str, Any] = {}
    for text in template_argument or []:
        apply_override(arguments, text, "--template-argument", "'date_string=26 Jul 2024'")
    settings = ImportSettings(top_k, values, sampling, held_out, rendered, arguments, teacher)
    manifest = import_file(file, directory, tokenizer, settings)
    stdout.print(f"imported {manifest.rows:,} responses, {manifest.tokens:,} tokens to {directory}")


@app.command("export-json")
def export_json(
    directory: DirArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The JSON file to write.")],
    split: SplitOption = None,
    rule: RuleOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many records.")] = None,
    log_level: LogLevelOption = "info",
) -> None:
    """Write records in the legacy JSON layout; importing the file again gives the same records."""
    configure_logging(log_level)
    from shared.commands.legacy_json.files import export_json as export_file

    count = export_file(directory, file, split, rule, limit)
    stdout.print(f"exported {count:,} responses to {file}")


@app.command()
def merge(
    directories: Annotated[list[str], typer.Argument(metavar="DIR… DIR", help="Datasets, and then the new one.")],
    log_level: LogLevelOption = "info",
) -> None:
    """Make one dataset of several of the same teacher."""
    configure_logging(log_level)
    from shared.commands.merge import merge as merge_datasets

    manifest = merge_datasets(directories[:-1], directories[-1])
    stdout.print(f"merged {len(directories) - 1} datasets: {manifest.rows:,} responses, {manifest.tokens:,} tokens")


@app.command()
def push(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A dataset's directory on this machine.")],
    repository: RepositoryArgument,
    license: LicenseOption = None,
    private: PrivateOption = True,
    revision: RevisionOption = None,
    message: MessageOption = None,
    log_level: LogLevelOption = "info",
) -> None:
    """Validate a dataset and publish it on the Hugging Face Hub, where `datasets.load_dataset(REPO)` finds it."""
    configure_logging(log_level)
    from shared.commands.push import push as push_dataset
    from shared.hub import Repository

    to = Repository(repository, "dataset", message or "Upload the dataset", private, revision)
    stdout.print(f"pushed to {push_dataset(directory, to, license)}")


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
