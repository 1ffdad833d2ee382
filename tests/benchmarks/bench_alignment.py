"""Speed of alignment by k, between real vocabularies of more than 128k tokens, on one core. CPU seconds, not wall.

    python -m tests.benchmarks.bench_alignment [--json FILE] [--tokens N]

Rows are synthetic with a language model's sharpness around real text; the pair tables and what the process has
memoised are warm, as they are after the first unit of a dataset. `again` is a second pass over the same responses, with
every question to the tokenizers answered before: a long corpus lies between the two. Tokenizers have one thread, as in
the processes of `student prepare`. Peak memory is the process's own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

from rich.table import Table

from shared.config import PrepareConfig
from shared.console import stdout
from student.alignment.align import Aligner
from student.alignment.tables import PairTables
from tests.fixtures.texts import RowMaker, corpus, llada_like, llama3, qwen, tekken

PAIRS = {"Tekken": tekken, "Qwen": qwen, "LLaDA-like 8k": llada_like, "LLaMA 3 (equal)": llama3}
K = (8, 32, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--tokens", type=int, default=12000, help="teacher tokens per figure")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    teacher, teacher_encoder = llama3()
    maker = RowMaker(teacher, teacher_encoder)
    results = []
    for k in K:
        records = []
        for text in corpus(60)[20:]:
            starts = range(0, min(len(text), 12000), 1200)
            records.extend(maker.record(text[start : start + 1200], k) for start in starts)
            if sum(len(record.response_ids) for record in records) > 2 * arguments.tokens:
                break
        for name, make in PAIRS.items():
            student, encoder = make()
            started = time.process_time()
            pair = PairTables(teacher, student, encoder, teacher_encoder)
            _ = pair.tokenizations, pair.extensions
            tables = time.process_time() - started
            aligner = Aligner(pair, PrepareConfig())
            aligner.align(records[0])  # compiles
            half = len(records) // 2
            for record in records[:half]:
                aligner.align(record)
            started = time.process_time()
            positions, members = 0, 0
            for record in records[half:]:
                sample, _ = aligner.align(record)
                assert sample is not None
                positions += len(sample.byte_ends)
                members += len(sample.targets.members)
            seconds = time.process_time() - started
            started = time.process_time()
            for record in records[half:]:
                aligner.align(record)
            again = time.process_time() - started
            tokens = sum(len(record.response_ids) for record in records[half:])
            results.append(
                {
                    "student": name,
                    "k": k,
                    "teacher_tokens_per_s": tokens / seconds,
                    "again_per_s": tokens / again,
                    "teacher_tokens": tokens,
                    "positions": positions,
                    "members_per_position": members / positions,
                    "tables_s": tables,
                    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                }
            )
    table = Table("student", "k", "teacher tokens/s", "again", "members per position", "peak MiB")
    for row in results:
        table.add_row(
            row["student"], str(row["k"]), f"{row['teacher_tokens_per_s']:,.0f}", f"{row['again_per_s']:,.0f}",
            f"{row['members_per_position']:.0f}", f"{row['peak_mib']:,.0f}",
        )  # fmt: skip
    stdout.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
