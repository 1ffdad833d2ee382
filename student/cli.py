"""`student …`: from shards to a trained, measured and serving drafter. This file only wires."""

from __future__ import annotations

from typing import Annotated

import typer

from shared.config import load_config
from shared.console import ConfigArgument, LogLevelOption, SetOption, application, configure_logging, run

app = application("Fine-tune LLaDA into a draft model from a teacher's shards, measure it and decode with it.")


@app.command()
def train(
    config: ConfigArgument,
    overrides: SetOption = None,
    log_level: LogLevelOption = "info",
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget checkpoints and the trained model.")] = False,
) -> None:
    """Train on the prepared targets; alone it starts its own ranks, under `torchrun` or `deepspeed` it is one."""
    configure_logging(log_level)
    from student.training.train import train as train_student

    train_student(load_config(config, overrides), fresh=fresh)


@app.command()
def evaluate(config: ConfigArgument, overrides: SetOption = None, log_level: LogLevelOption = "info") -> None:
    """Acceptance before and after training, from the held-out shards alone."""
    configure_logging(log_level)
    from student.evaluation.evaluate import evaluate as evaluate_student

    evaluate_student(load_config(config, overrides))


@app.command()
def report(config: ConfigArgument, overrides: SetOption = None, log_level: LogLevelOption = "info") -> None:
    """Gather what the stages measured into report.json, index.html and a short summary."""
    configure_logging(log_level)
    from student.evaluation.report import write_report

    write_report(load_config(config, overrides))


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
