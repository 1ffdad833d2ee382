"""Scoring: the distributions of responses that exist already, captured as the teacher reads them.

`collect.responses` is a JSONL file (prompts with a `response`), or a finished dataset whose token ids are scored again.
vLLM returns `prompt_logprobs` of every position but the first, prompt included; the rows before the response are
dropped (`teacher.capture.response_columns`). Each scored token costs a row of the whole vocabulary, so few tokens go
through a forward at once (`collect.score_tokens`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice

import pyarrow.compute as pc

from shared.config import PipelineConfig
from shared.dataset.reader import Dataset
from shared.dataset.records import UNKNOWN_SAMPLING
from shared.errors import ConfigError
from shared.tokenizer.vocabulary import Vocabulary
from teacher.checkpoints import ensure_checkpoint
from teacher.collect import Launch, check_top_k, run
from teacher.engine import prepare_environment
from teacher.prompts import Prompt, load_prompts, load_renderer, prompts_fingerprint, split_prompts
from teacher.prompts.lengths import fit_prompts
from teacher.summary import Summary
from teacher.units import Task, Unit, slices


def score(config: PipelineConfig, launch: Launch) -> Summary | None:
    """Score the responses that `collect.responses` names into the run's shards; resumes where it was interrupted.

    Raises:
        ConfigError, PromptError, DatasetError: where there is nothing to score, or it does not fit the teacher.
        VocabularyError: where a dataset has the tokens of another tokenizer.
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
    fitting = fit_prompts(prompts, renderer, config)
    splits = split_prompts(fitting.prompts, config.collect.held_out)
    units = [
        Unit(
            f"{split}-given-{number:05d}",
            tuple(Task(f"{prompt.id}:given:0", prompt, split, UNKNOWN_SAMPLING) for prompt in chosen),
        )
        for split, members in splits.items()
        for number, chosen in enumerate(slices(members, config.collect.unit_prompts))
    ]
    fitting.save(config.run_dir)
    return run(config, units, renderer, prompts_fingerprint(fitting.prompts), "score", launch)


def _score_dataset(config: PipelineConfig, dataset: Dataset, launch: Launch) -> Summary | None:
    """Score a dataset's own token ids: nothing is rendered or encoded again."""
    check_top_k(config)
    if config.shards_dir.resolve() == (config.collect.responses or config.shards_dir).resolve():
        raise ConfigError(f"{config.shards_dir} would be scored into itself; give this run another name")
    units, longest = _stored_units(dataset, config.collect.unit_prompts)
    if not units:
        raise ConfigError(f"{config.collect.responses} holds no response with tokens; there is nothing to score")
    if longest >= config.teacher.max_sequence_tokens:
        raise ConfigError(
            f"{config.collect.responses} has {longest} tokens in a prompt and its response, "
            f"teacher.max_sequence_tokens is {config.teacher.max_sequence_tokens}; raise it to {longest + 1}"
        )
    Vocabulary.from_tokenizer(ensure_checkpoint(config.teacher)).require_equal(
        dataset.vocabulary,
        config.teacher.model,
        config.collect.responses,
        "score a dataset that was collected with this teacher's tokenizer",
    )
    return run(config, units, load_renderer(config), dataset.manifest.provenance, "score", launch)


@dataclass(frozen=True, slots=True)
class StoredTasks(Collection[Task]):
    """Responses of one split of a stored unit, `start` to `start + count` of those that are not empty.

    They are read when they are iterated over, so that a dataset of any size is scored in the memory of a few units.
    """

    dataset: Dataset
    unit: str
    split: str
    start: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Task]:
        stored = self.dataset.records(split=self.split, distributions=False, unit=self.unit)
        told = (record for record in stored if len(record.response_ids))
        for record in islice(told, self.start, self.start + self.count):
            prompt = Prompt(record.prompt_id, record.skill, record.messages, "", record.finish_reason == "stop")
            yield Task(record.sample_id, prompt, record.split, record.sampling, record)

    def __contains__(self, task: object) -> bool:
        return any(task == own for own in self)


def _stored_units(dataset: Dataset, size: int) -> tuple[list[Unit], int]:
    """Units that score the dataset's own, those larger than `size` in parts, and the tokens of the longest text."""
    units: list[Unit] = []
    numbers: Counter[str] = Counter()
    longest = 0
    for stored in dataset.manifest.units:
        counts: Counter[str] = Counter()
        for table in dataset.tables(["split", "prompt_ids", "response_ids"], [stored]):
            responses = pc.list_value_length(table["response_ids"]).to_numpy()
            texts = responses + pc.list_value_length(table["prompt_ids"]).to_numpy()
            longest = max(longest, int(texts[responses > 0].max(initial=0)))
            counts.update(split for split, n in zip(table["split"].to_pylist(), responses, strict=True) if n)
        for split, count in counts.items():
            for start in range(0, count, size):
                tasks = StoredTasks(dataset, stored.unit, split, start, min(size, count - start))
                units.append(Unit(f"{split}-scored-{numbers[split]:05d}", tasks))
                numbers[split] += 1
    return units, longest
