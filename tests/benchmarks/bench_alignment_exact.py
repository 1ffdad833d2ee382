"""What certainty costs: `prepare.events: exact` by `search_width`, against `spelled` on the same records, one core.

    python -m tests.benchmarks.bench_alignment_exact [--json FILE] [--dataset runs/demo/shards] [--records N]

The dataset's held-out records are aligned for a LLaDA-like tokenizer; then texts under synthetic rows between real
vocabularies of more than 128k tokens. `first` is the first pass over the records, which asks the tokenizers, `again`
a second over the same. Information is that of the realised tokens under the targets, beside the teacher's own:
coarser events tell less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from itertools import islice
from pathlib import Path
from typing import Any

from rich.table import Table

from shared.config import PrepareConfig
from shared.console import stdout
from shared.dataset import Dataset
from shared.records import Record
from shared.vocabulary import Encoder, Vocabulary, load_tokenizer
from student.alignment.align import Aligner
from student.alignment.audit import measure
from tests.student.alignment.synthetic import RowMaker, corpus, llada_like, llama3, qwen, tekken

Tokenizer = tuple[Vocabulary, Encoder]
WIDTHS = (30, 200, 1000, 5000)
LARGE_WIDTHS = (30, 200)
"""Between two vocabularies of 128k tokens a width of 1,000 takes seconds per position."""


def held_out(path: Path, count: int) -> tuple[Tokenizer, dict[str, list[Record]]]:
    """The teacher, and records by decoding rule."""
    dataset = Dataset.open(path)
    rules = ("greedy", "sample")
    return load_tokenizer(dataset.tokenizer_dir), {
        f"demo, {rule}": list(islice(dataset.records("held_out", rule), count)) for rule in rules
    }


def compare(
    name: str, teacher: Tokenizer, student: Tokenizer, records: list[Record], widths: tuple[int, ...]
) -> list[dict[str, Any]]:
    """One row of figures for `spelled` and one for each width of `exact`."""
    rows = []
    Aligner(teacher[0], student[0], student[1], teacher_encoder=teacher[1]).align(records[0])  # compiles
    for settings in (PrepareConfig(), *(PrepareConfig(events="exact", search_width=width) for width in widths)):
        aligner = Aligner(teacher[0], student[0], student[1], settings, teacher_encoder=teacher[1])
        seconds = []
        for _ in range(2):
            started = time.process_time()
            for record in records:
                aligner.align(record)
            seconds.append(time.process_time() - started)
        report, _ = measure(aligner, records)
        tokens = report.counts["teacher_tokens"]
        rows.append(
            {
                "records": name,
                "events": settings.events,
                "width": settings.search_width if settings.events == "exact" else None,
                "teacher_tokens": tokens,
                "first_per_s": tokens / seconds[0],
                "again_per_s": tokens / seconds[1],
                "events_per_position": report.events,
                "soft": report.full + report.partial,
                "teacher_information": report.teacher_information,
                "target_information": report.target_information,
                "disagreements": report.counts["disagreements"],
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--dataset", type=Path, default=Path("runs/demo/shards"))
    parser.add_argument("--records", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200, help="teacher tokens of each synthetic comparison")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    results = []
    if arguments.dataset.exists():
        teacher, by_rule = held_out(arguments.dataset, arguments.records)
        for name, records in by_rule.items():
            results += compare(name, teacher, llada_like(), records, WIDTHS)
    maker = RowMaker(*llama3())
    texts = [maker.record(text[start : start + 400]) for text in corpus(24)[20:] for start in (2000, 6000)]
    for name, student in {"LLaDA-like": llada_like, "Tekken": tekken, "Qwen": qwen}.items():
        count, records = 0, []
        for record in texts:
            if count < arguments.tokens:
                records.append(record)
                count += len(record.response_ids)
        results += compare(f"LLaMA 3 → {name}", llama3(), student(), records, LARGE_WIDTHS)
    table = Table(
        "records", "events", "width", "tokens/s first", "again", "events", "soft", "nats/byte", "joined", "MiB"
    )
    for row in results:
        table.add_row(
            row["records"], row["events"], str(row["width"] or ""), f"{row['first_per_s']:,.0f}",
            f"{row['again_per_s']:,.0f}", f"{row['events_per_position']:.1f}", f"{row['soft']:.1%}",
            f"{row['teacher_information']:.4f} / {row['target_information']:.4f}", f"{row['disagreements']:,}",
            f"{row['peak_mib']:,.0f}",
        )  # fmt: skip
    stdout.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
