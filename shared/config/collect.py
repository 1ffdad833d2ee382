"""The `collect` section."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from shared.config.section import Section
from shared.dataset.records import decoding_rule

Split = Literal["train", "held_out"]


class DecodingConfig(Section):
    """One decoding rule under which responses are collected. `temperature: 0` is greedy."""

    split: Split = Field(description="Which prompts are answered: train or held_out.", examples=["train"])
    temperature: NonNegativeFloat = Field(1.0, description="0 is greedy, 1 the teacher's own distribution.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling; 1 keeps every token.")
    top_k: int = Field(0, ge=0, description="0 keeps every token.")
    max_response_tokens: PositiveInt = Field(256, description="Longest answer.")
    samples: PositiveInt = Field(1, description="Responses per prompt.")

    @property
    def rule(self) -> str:
        """The rule's name."""
        return decoding_rule(self.temperature, self.top_p, self.top_k)

    @property
    def tag(self) -> str:
        """The rule with its settings, as units and sample ids carry it: `greedy`, `sample`, `t0.7-p0.9-k20`."""
        if self.rule != "filtered":
            return self.rule
        return f"t{self.temperature:g}-p{self.top_p:g}-k{self.top_k}"


class SourceConfig(Section):
    """Prompts of one kind and origin."""

    path: str = Field(
        description="JSONL, Parquet (a file or a folder) or text with one prompt a line; or a Hugging Face dataset, by "
        "hub name or as the folder that `save_to_disk` wrote.",
        examples=["data/questions.parquet"],
    )
    format: Literal["json", "parquet", "text", "dataset"] | None = Field(
        None, description="What it is; null says it by the name."
    )
    column: str | None = Field(
        None, description="Column with the prompt's text or messages, where it is neither `prompt` nor `messages`."
    )
    subset: str | None = Field(None, description="Configuration of a Hugging Face dataset.")
    split: str = Field("train", description="Split of a Hugging Face dataset.")
    revision: str | None = Field(None, description="Branch, tag or commit of a dataset on the hub.")
    skill: str = Field("general", min_length=1, description="Of prompts that name none.")
    rendered: bool | None = Field(None, description="As collect.rendered, for prompts that do not say it.")
    weight: float = Field(
        1.0, gt=0, le=1, description="In the mixture: the share of its prompts that is asked, chosen by a hash of ids."
    )
    decoding: list[DecodingConfig] = Field(
        default_factory=list, description="Its own decoding rules; none are those of collect.decoding."
    )

    @model_validator(mode="after")
    def _rules_are_distinct(self) -> SourceConfig:
        check_rules(self.decoding)
        return self


class WritePromptsConfig(Section):
    """Prompts that the teacher writes itself: it continues the bare header of a user's turn."""

    path: Path = Field(
        description="JSONL that `teacher write-prompts` writes; name it in prompts or sources to have it answered.",
        examples=["data/self.jsonl"],
    )
    count: PositiveInt = Field(description="Prompts to write.", examples=[10000])
    temperature: NonNegativeFloat = Field(1.0, description="Of the user's turns.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling; 1 keeps every token.")
    top_k: int = Field(0, ge=0, description="0 keeps every token.")
    max_prompt_tokens: PositiveInt = Field(256, description="A turn that is not finished by then is dropped.")
    min_characters: PositiveInt = Field(8, description="Shorter turns are dropped.")


class CollectConfig(Section):
    """What is asked of the teacher and what is kept of its answers."""

    prompts: Path | None = Field(
        None,
        description="JSONL, one prompt or conversation a line (`teacher/README.md`); other formats are `sources`.",
        examples=["data/prompts.jsonl"],
    )
    sources: list[SourceConfig] = Field(
        default_factory=list, description="Further prompts, each source with settings of its own."
    )
    system_prompt: str | None = Field(
        None, description="Put before conversations that do not begin with a system turn."
    )
    held_out: float = Field(0.1, ge=0, lt=1, description="Share of the prompts that training never sees.")
    top_k: PositiveInt = Field(64, description="Most candidates kept per token.")
    retained_mass: float | None = Field(
        0.98,
        gt=0,
        lt=1,
        description="Stop a token's candidates where they hold this mass, top_k at most; null keeps top_k of each.",
    )
    unit_prompts: PositiveInt = Field(64, description="Prompts per unit of work, the unit of resume.")
    decoding: list[DecodingConfig] = Field(
        min_length=1, description="Decoding rules, each for one split.", examples=[[{"split": "train"}]]
    )
    template_arguments: dict[str, Any] = Field(
        default_factory=dict, description="Passed to the chat template; pin what it would take from the clock."
    )
    rendered: bool | None = Field(
        None,
        description="Prompts are rendered text already (true), or people's words, special tokens in them included "
        "(false); null recognizes rendered text by its beginning and refuses what may be either.",
    )
    overlong: Literal["skip", "truncate", "refuse"] = Field(
        "skip",
        description="Prompts that leave no room for an answer: skip them, cut the end of their longest turn off "
        "(truncate), or refuse them all; overlong.jsonl in the run's folder names them.",
    )
    write_prompts: WritePromptsConfig | None = None
    measure_capture: bool = Field(False, description="Measure first what capturing costs in tokens per second.")
    responses: Path | None = Field(
        None, description="`teacher score` only: JSONL with a `response` per line, or a dataset to score again."
    )
    score_tokens: PositiveInt = Field(
        1024, description="`teacher score` only: tokens per forward, each of which needs a row of the whole vocabulary."
    )

    @model_validator(mode="after")
    def _is_complete(self) -> CollectConfig:
        check_rules(self.decoding)
        if self.prompts is None and not self.sources:
            raise ValueError("neither prompts nor sources is there; name a file, such as prompts: data/prompts.jsonl")
        return self


def check_rules(rules: Sequence[DecodingConfig]) -> None:
    """Raises `ValueError` where two decoding rules are one, or would give one text several times."""
    seen: set[tuple[str, str]] = set()
    for number, decoding in enumerate(rules):
        if (decoding.split, decoding.tag) in seen:
            raise ValueError(
                f"decoding[{number}] repeats the rule {decoding.tag} for {decoding.split}; use `samples` for more "
                "responses per prompt"
            )
        if decoding.rule == "greedy" and decoding.samples > 1:
            raise ValueError(f"decoding[{number}] is greedy: {decoding.samples} samples would be one text")
        seen.add((decoding.split, decoding.tag))
