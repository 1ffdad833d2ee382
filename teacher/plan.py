"""What a collection will cost, before it is paid: units, tokens, bytes and hours.

Counts come from the prompts and the config. Rates come, in this order, from the command line, from a collect.json that
an earlier session measured in this run, or not at all: hours without a rate stay unknown, they are not guessed.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from shared.config import PipelineConfig
from shared.console import bytes_text, titled_table
from teacher.collect import prepare
from teacher.summary import read_summary


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What the command line states; None where it says nothing.

    Attributes:
        tokens_per_s: of one worker. workers: actors of `--runner ray`, tasks of `--shard`, or processes side by side.
    """

    tokens_per_s: float | None = None
    tokens_per_response: float | None = None
    bytes_per_token: float | None = None
    workers: int = 1


@dataclass(frozen=True, slots=True)
class Estimate:
    """The cost, and where each rate is from. `bytes` and `hours` are None where no rate is known."""

    prompts: int
    units: int
    responses: int
    prompt_tokens: int
    response_tokens: float
    bytes: float | None
    hours: float | None
    sources: dict[str, str]

    def table(self) -> Table:
        """For people."""
        table = titled_table("what the collection will cost")
        table.add_row("prompts", f"{self.prompts:,}", "")
        table.add_row("units of work", f"{self.units:,}", "")
        table.add_row("responses", f"{self.responses:,}", "")
        table.add_row("prompt tokens", f"{self.prompt_tokens:,}", "")
        table.add_row("response tokens", f"{self.response_tokens:,.0f}", self.sources["tokens"])
        size = "unknown" if self.bytes is None else bytes_text(self.bytes)
        table.add_row("on disk", size, self.sources["bytes"])
        table.add_row("hours", "unknown" if self.hours is None else f"{self.hours:,.2f}", self.sources["hours"])
        return table


def estimate(config: PipelineConfig, assumptions: Assumptions) -> Estimate:
    """Check `config` as `teacher collect` would, and add up what it asks for.

    Raises:
        UserError: as `teacher.collect.prepare`.
    """
    plan = prepare(config)
    tasks = [task for unit in plan.units for task in unit.tasks]
    measured = read_summary(config.run_dir)
    # The longest that each rule allows, where neither a measurement nor the user knows better.
    room = config.teacher.max_sequence_tokens
    most = float(sum(min(task.sampling.max_tokens, room - plan.fitting.tokens[task.prompt.id]) for task in tasks))
    if assumptions.tokens_per_response is not None:
        tokens = min(most, assumptions.tokens_per_response * len(tasks))
        tokens_source = f"{assumptions.tokens_per_response:g} a response, as stated"
    elif measured.tokens and measured.responses:
        tokens = min(most, measured.tokens / measured.responses * len(tasks))
        tokens_source = f"{measured.tokens / measured.responses:.1f} a response, as measured in {config.run_dir}"
    else:
        tokens, tokens_source = most, "at most: max_response_tokens each"
    size, size_source = _rate(
        assumptions.bytes_per_token, measured.bytes_per_token, "bytes a token", "--bytes-per-token", config
    )
    one = None if measured.tokens_per_s is None else measured.tokens_per_s / measured.workers
    rate, rate_source = _rate(assumptions.tokens_per_s, one, "tokens/s", "--tokens-per-s", config)
    workers = min(assumptions.workers, len(plan.units))
    if assumptions.workers > 1:
        rate_source += f", {workers} workers"
    if workers < assumptions.workers:
        rate_source += f" of {assumptions.workers}: the others find no unit; lower collect.unit_prompts"
    return Estimate(
        prompts=len(plan.fitting.prompts),
        units=len(plan.units),
        responses=len(tasks),
        prompt_tokens=sum(plan.fitting.tokens[task.prompt.id] for task in tasks),
        response_tokens=tokens,
        bytes=None if size is None else tokens * size,
        hours=None if rate is None else tokens / rate / workers / 3600,
        sources={"tokens": tokens_source, "bytes": size_source, "hours": rate_source},
    )


def _rate(
    stated: float | None, measured: float | None, unit: str, option: str, config: PipelineConfig
) -> tuple[float | None, str]:
    if stated is not None:
        return stated, f"{stated:g} {unit}, as stated"
    if measured is not None:
        return measured, f"{measured:.1f} {unit}, as measured in {config.run_dir}"
    return None, f"nothing measured yet: state {option}"
