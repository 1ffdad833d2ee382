"""`teacher …`: prompts become shards of the teacher's distributions. This file only wires."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from shared.config import load_config
from shared.console import ConfigArgument, LogLevelOption, SetOption, application, configure_logging, run, stdout
from shared.errors import ConfigError

if TYPE_CHECKING:
    from teacher.collect import Launch
    from teacher.summary import Summary

app = application("Let a teacher answer prompts, and store its top-k distribution at every token of the answers.")

Runner = Literal["local", "ray"]
ShardOption = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="Do this share of the units only; I is 0 to N - 1."),
]
RetryOption = Annotated[bool, typer.Option("--retry-failed", help="Ask again for responses that failed before.")]
RunnerOption = Annotated[Runner, typer.Option("--runner", help="In this process, or as actors on a Ray cluster.")]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Replicas of the engine on Ray; else what the GPUs allow.")
]


@app.command()
def collect(
    config: ConfigArgument,
    overrides: SetOption = None,
    runner: RunnerOption = "local",
    workers: WorkersOption = None,
    shard: ShardOption = None,
    retry_failed: RetryOption = False,
    log_level: LogLevelOption = "info",
) -> None:
    """Generate responses and capture their distributions; run it again to resume, run it twice to share the work."""
    configure_logging(log_level)
    from teacher.collect import collect as collect_dataset

    _show(collect_dataset(load_config(config, overrides), _launch(runner, workers, shard, retry_failed)))


@app.command()
def score(
    config: ConfigArgument,
    overrides: SetOption = None,
    runner: RunnerOption = "local",
    workers: WorkersOption = None,
    shard: ShardOption = None,
    retry_failed: RetryOption = False,
    log_level: LogLevelOption = "info",
) -> None:
    """Capture the distributions of the given responses in `collect.responses`; run it again to resume."""
    configure_logging(log_level)
    from teacher.score import score as score_dataset

    _show(score_dataset(load_config(config, overrides), _launch(runner, workers, shard, retry_failed)))


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
    workers: Annotated[int, typer.Option(min=1, help="N of `--runner ray --workers N`, or of `--shard I/N`.")] = 1,
    log_level: LogLevelOption = "info",
) -> None:
    """Units, tokens, bytes and hours before spending them; starts nothing and writes nothing."""
    configure_logging(log_level)
    from teacher.plan import Assumptions, estimate

    assumptions = Assumptions(tokens_per_s, tokens_per_response, bytes_per_token, workers)
    stdout.print(estimate(load_config(config, overrides), assumptions).table())


@app.command()
def serve(
    config: ConfigArgument,
    overrides: SetOption = None,
    start: Annotated[bool, typer.Option("--run", help="Start the server in place of printing its command.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of the machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    log_level: LogLevelOption = "info",
) -> None:
    """Print the command of a vLLM server of the teacher, for `teacher.service` of a collection, or start it."""
    configure_logging(log_level)
    from teacher.engine.serve import serve as command_of

    command = command_of(load_config(config, overrides).teacher, host, port, start)
    stdout.print(command, markup=False, highlight=False, soft_wrap=True)


@app.command()
def write_prompts(config: ConfigArgument, overrides: SetOption = None, log_level: LogLevelOption = "info") -> None:
    """Let the teacher write prompts of its own (`collect.write_prompts`); run it again to resume."""
    configure_logging(log_level)
    from teacher.prompts.write import write_prompts as write

    stdout.print(write(load_config(config, overrides)).table())


def _launch(runner: Runner, workers: int | None, shard: str | None, retry_failed: bool) -> Launch:
    from teacher.collect import Launch
    from teacher.runners.local import parse_shard

    if workers is not None and runner != "ray":
        raise ConfigError(
            f"--workers {workers} is for --runner ray; without Ray start one process for each engine: they share the "
            "units by themselves, or by --shard I/N"
        )
    return Launch(runner, workers, parse_shard(shard), retry_failed)


def _show(summary: Summary | None) -> None:
    if summary is not None:
        stdout.print(summary.table())


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
