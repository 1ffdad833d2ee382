"""The audit's figures between real vocabularies, over sixteen languages, code, numbers and emoji.

    python -m tests.benchmarks.bench_alignment_pairs [--json FILE]

Rows are synthetic (the texts are real), so figures about probability describe the mapping, not a teacher.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from shared.config import PrepareConfig
from shared.console import stdout
from student.alignment.align import Aligner
from student.alignment.audit import measure
from student.alignment.tables import PairTables
from tests.fixtures.texts import TEXTS, RowMaker, llada_like, llama3, qwen, tekken

PAIRS = {
    "LLaMA 3 → LLaDA-like 8k": (llama3, llada_like),
    "LLaDA-like 8k → LLaMA 3": (llada_like, llama3),
    "LLaMA 3 → Tekken": (llama3, tekken),
    "Tekken → LLaMA 3": (tekken, llama3),
    "LLaMA 3 → Qwen": (llama3, qwen),
    "Qwen → LLaMA 3": (qwen, llama3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    table = Table(
        "teacher → student", "shared", "bytes/chunk", "tokens/chunk", "full", "partial", "none", "joined", "Δ nats/byte"
    )
    results = {}
    for name, (make_teacher, make_student) in PAIRS.items():
        teacher, student = make_teacher(), make_student()
        maker = RowMaker(*teacher)
        records = [maker.record(text) for text in TEXTS.values()]
        aligner = Aligner(PairTables(teacher[0], *student, teacher[1]), PrepareConfig())
        report, _ = measure(aligner, records)
        results[name] = asdict(report)
        table.add_row(
            name,
            f"{report.teacher_in_student:.0%} / {report.student_in_teacher:.0%}",
            f"{report.chunk_bytes:.2f}",
            f"{report.chunk_teacher:.2f} / {report.chunk_student:.2f}",
            f"{report.full:.1%}",
            f"{report.partial:.1%}",
            f"{report.without:.1%}",
            f"{report.counts['disagreements'] / report.counts['positions']:.1%}",
            f"{report.target_information - report.teacher_information:+.4f}",
        )
    stdout.print(table)
    if arguments.json:
        arguments.json.write_text(
            json.dumps(results, indent=2, default=lambda value: value.decode("utf-8", "backslashreplace"))
        )


if __name__ == "__main__":
    main()
