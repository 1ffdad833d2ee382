"""Scoring: the distributions of responses that exist already, captured as the teacher reads them.

`collect.responses` is a JSONL file (prompts with a `response`), or a finished dataset whose token ids are scored again.
vLLM returns `prompt_logprobs` of every position but the first, prompt included; the rows before the response are
dropped (`teacher.capture.response_columns`). Each scored token costs a row of the whole vocabulary, so few tokens go
through a forward at once (`collect.score_tokens`).
"""

from __future__ import annotations

from shared.config import PipelineConfig, Split
from shared.dataset.reader import Dataset
from shared.dataset.records import UNKNOWN_SAMPLING, Record
from shared.errors import ConfigError
from teacher.collect import DEFAULT, Launch, check_lengths, check_top_k, load_renderer, run
from teacher.engine import prepare_environment
from teacher.prompts import Prompt, load_prompts, prompts_fingerprint, split_prompts
from teacher.summary import Summary
from teacher.units import Task, Unit, slices


def score(config: PipelineConfig, launch: Launch = DEFAULT) -> Summary | None:
    """Score the responses that `collect.responses` names into the run's shards; resumes where it was interrupted.

    Raises:
        ConfigError, PromptError, DatasetError: where there is nothing to score, or it does not fit the teacher.
    """
    responses = config.collect.responses
    if responses is None:
        raise ConfigError(
            "collect.responses is not set, but `teacher score` needs given responses: "
            "--set collect.responses=FILE.jsonl, or the directory of a dataset"
        )
    prepare_environment(config.teacher)
    if responses.is_dir():
        return _score_dataset(config, Dataset.open(responses), launch)
    prompts = load_prompts(responses, config.collect.system_prompt, responses=True)
    check_top_k(config)
    renderer = load_renderer(config)
    check_lengths(prompts, renderer, config)
    splits = split_prompts(prompts, config.collect.held_out)
    units = [
        Unit(f"{split}-given-{number:05d}", tuple(_task(prompt, split) for prompt in chosen))
        for split, members in splits.items()
        for number, chosen in enumerate(slices(members, config.collect.unit_prompts))
    ]
    return run(config, units, renderer, prompts_fingerprint(prompts), "score", launch)


def _score_dataset(config: PipelineConfig, dataset: Dataset, launch: Launch) -> Summary | None:
    """Score a dataset's own token ids: nothing is rendered or encoded again."""
    check_top_k(config)
    renderer = load_renderer(config)
    if len(renderer) > len(dataset.vocabulary) or len(dataset) == 0:
        raise ConfigError(
            f"{config.collect.responses} holds {len(dataset)} responses over {len(dataset.vocabulary)} tokens, the "
            f"teacher has {len(renderer)}; score a dataset that was collected with this teacher's tokenizer"
        )
    if config.shards_dir.resolve() == (config.collect.responses or config.shards_dir).resolve():
        raise ConfigError(f"{config.shards_dir} would be scored into itself; give this run another name")
    records = [record for record in dataset.records(distributions=False) if len(record.response_ids)]
    longest = max(len(record.prompt_ids) + len(record.response_ids) for record in records)
    if longest >= config.teacher.max_sequence_tokens:
        raise ConfigError(
            f"{config.collect.responses} has {longest} tokens in a prompt and its response, "
            f"teacher.max_sequence_tokens is {config.teacher.max_sequence_tokens}; raise it to {longest + 1}"
        )
    units = []
    for split in dict.fromkeys(record.split for record in records):
        members = [record for record in records if record.split == split]
        for number, chosen in enumerate(slices(members, config.collect.unit_prompts)):
            tasks = tuple(Task(r.sample_id, _prompt_of(r), r.split, r.sampling, r) for r in chosen)
            units.append(Unit(f"{split}-scored-{number:05d}", tasks))
    return run(config, units, renderer, dataset.manifest.provenance, "score", launch)


def _task(prompt: Prompt, split: Split) -> Task:
    return Task(f"{prompt.id}:given:0", prompt, split, UNKNOWN_SAMPLING)


def _prompt_of(record: Record) -> Prompt:
    return Prompt(record.prompt_id, record.skill, record.messages, "", record.finish_reason == "stop")
