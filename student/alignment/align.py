"""From a teacher's record to an aligned sample: the one entry of this package for a single response."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from shared.config import PrepareConfig
from shared.dataset.records import Distributions, Record
from student.alignment.spans import Spans, lay_spans, retokenize
from student.alignment.tables import PairTables
from student.alignment.targets import AlignedSample, SparseTargets, Targets

if TYPE_CHECKING:
    from student.alignment.kernels.compute import TargetKernels


class Aligner:
    """Aligns the records of one dataset for one student, by the tables of their vocabularies and the settings."""

    def __init__(self, tables: PairTables, prepare: PrepareConfig) -> None:
        self.tables, self.prepare = tables, prepare

    def align(self, record: Record) -> tuple[AlignedSample | None, Counter[str]]:
        """The aligned sample, None for a record that must not be used, and what was met on the way.

        Counts of records: `records`, and, where they are refused, `empty`, `bytes_mismatch`, `outside_vocabulary`,
        `dropped_changed_text`, `no_student_tokens`; `changed_text` and `cut_character` for those that are kept.
        Counts of positions: `positions`, `soft`, `conditional` (inside a teacher token), `disagreements`,
        `below_known_mass`, `unusable_rows`, `unknown_observed`; of tokens: `teacher_tokens`,
        `dropped_specials`, `inner_specials`; sums: `mapped_mass` over soft positions.
        """
        counts: Counter[str] = Counter(records=1)
        refusal = self._refusal(record, counts)
        if refusal:
            counts[refusal] += 1
            return None, counts
        spans = lay_spans(self.tables, record.response_ids)
        if not len(spans.ids):
            counts["no_student_tokens"] += 1
            return None, counts
        targets = self._targets(record.distributions, spans)
        counts += targets.counts
        prompt_ids = retokenize(self.tables, record.prompt_ids)
        input_ids = np.concatenate([prompt_ids, spans.ids]).astype(np.int32)
        soft = ~np.isnan(targets.sparse.tail)
        is_special = self.tables.teacher.is_special
        specials = is_special[record.prompt_ids].sum() + is_special[record.response_ids].sum()
        counts += Counter(
            positions=len(spans.ids),
            soft=int(soft.sum()),
            conditional=int((~spans.is_anchor).sum()),
            unknown_observed=int(np.isnan(targets.observed_logprob).sum()),
            teacher_tokens=len(record.response_ids),
            dropped_specials=int(specials - self.tables.student.is_special[input_ids].sum()),
            inner_specials=int(is_special[record.response_ids[:-1]].sum()),
        )
        counts["mapped_mass"] += float((1 - targets.sparse.tail[soft]).sum())  # type: ignore[assignment]
        sample = AlignedSample(
            sample_id=record.sample_id,
            prompt_id=record.prompt_id,
            split=record.split,
            rule=record.sampling.rule,
            skill=record.skill,
            input_ids=input_ids,
            prompt_length=len(prompt_ids),
            byte_ends=spans.ends,
            is_anchor=spans.is_anchor,
            observed_logprob=targets.observed_logprob,
            anchor_logprob=targets.anchor_logprob,
            targets=targets.sparse,
        )
        return sample, counts

    def _refusal(self, record: Record, counts: Counter[str]) -> str | None:
        teacher = self.tables.teacher
        if not len(record.response_ids):
            return "empty"
        for ids in (record.prompt_ids, record.response_ids):
            if len(ids) and (ids.min() < 0 or ids.max() >= len(teacher)):
                return "outside_vocabulary"
        if record.distributions is not None and record.distributions.ids.max(initial=0) >= len(teacher):
            return "outside_vocabulary"
        if teacher.decode(record.response_ids) != record.response_bytes:
            return "bytes_mismatch"
        if self.tables.same_tokenizer:
            return None
        if self.tables.student_encoder.changed_by_normalizer(record.response_bytes):
            counts["changed_text"] += 1
            if self.prepare.changed_text == "drop":
                return "dropped_changed_text"
        try:
            record.response_bytes.decode()
        except UnicodeDecodeError:
            counts["cut_character"] += 1
        return None

    def _targets(self, distributions: Distributions | None, spans: Spans) -> Targets:
        if distributions is not None:
            return self._kernels.compute(spans, distributions)
        sparse = SparseTargets.none(len(spans.ids))
        return Targets(sparse, sparse.tail, sparse.tail, Counter())

    @cached_property
    def _kernels(self) -> TargetKernels:
        # Imported here: compiling takes seconds, and a plain conversation does not need it.
        from student.alignment.kernels.compute import TargetKernels

        return TargetKernels(self.tables, self.prepare.min_known_mass)
