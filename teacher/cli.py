"""`teacher …`: prompts become shards of the teacher's distributions. This file only wires."""

from __future__ import annotations

from typing import Annotated

import typer

from shared.config import load_config
from shared.console import ConfigArgument, LogLevelOption, SetOption, application, configure_logging, run, stdout

app = application("Let a teacher answer prompts, and store its top-k distribution at every token of the answers.")


@app.command()
def collect(config: ConfigArgument, overrides: SetOption = None, log_level: LogLevelOption = "info") -> None:
    """Generate responses and capture their distributions; run it again to resume."""
    configure_logging(log_level)
    from teacher.collect import collect as collect_dataset

    stdout.print(collect_dataset(load_config(config, overrides)).table())


@app.command()
def score(config: ConfigArgument, overrides: SetOption = None, log_level: LogLevelOption = "info") -> None:
    """Capture the distributions of the given responses in `collect.responses`; run it again to resume."""
    configure_logging(log_level)
    from teacher.score import score as score_dataset

    stdout.print(score_dataset(load_config(config, overrides)).table())


@app.command()
def plan(
    config: ConfigArgument,
    overrides: SetOption = None,
    tokens_per_s: Annotated[
        float | None, typer.Option(min=1e-9, help="Rate of one worker; else what collect.json measured.")
    ] = None,
    tokens_per_response: Annotated[
        float | None, typer.Option(min=1, help="Mean length; else as measured; else the rule's max_response_tokens.")
    ] = None,
    bytes_per_token: Annotated[
        float | None, typer.Option(min=1, help="On disk; else what collect.json measured.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Engines that work side by side.")] = 1,
    log_level: LogLevelOption = "info",
) -> None:
    """Units, tokens, bytes and hours before spending them; starts nothing and writes nothing."""
    configure_logging(log_level)
    from teacher.plan import Assumptions, estimate

    assumptions = Assumptions(tokens_per_s, tokens_per_response, bytes_per_token, workers)
    stdout.print(estimate(load_config(config, overrides), assumptions).table())


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
