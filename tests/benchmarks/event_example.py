"""The worked example of student/README.md, computed: rows of a real teacher as events over another vocabulary.

    python -m tests.benchmarks.event_example [CHECKPOINT]

The teacher is the demo's, which `make demo` puts into runs/models/. The student's tokenizer has LLaDA's construction
and is trained on the Python standard library (`tests/fixtures/texts.py`), so another Python may give other pieces.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.config import PrepareConfig
from shared.tokenizer.vocabulary import Vocabulary, load_tokenizer
from student.alignment.align import Aligner
from student.alignment.spans import lay_spans
from student.alignment.tables import PairTables
from tests.fixtures.records import record_from_rows
from tests.fixtures.texts import llada_like

PROMPT = "What is a lantern?"
RESPONSE = "A lantern is a small, portable, and versatile light source"
TOP_K = 64


def main(checkpoint: Path) -> None:
    """Print the teacher's rows of the last tokens, and the targets of the student tokens there."""
    teacher, teacher_encoder = load_tokenizer(checkpoint)
    student, encoder = llada_like()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False
    )
    response = teacher_encoder.encode(RESPONSE).tolist()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        logits_TxV = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logprobs_TxK, ids_TxK = logits_TxV.log_softmax(-1).topk(TOP_K)
    observed = logits_TxV.softmax(-1)[range(len(response)), response].tolist()
    record = record_from_rows(teacher, response, ids_TxK.tolist(), logprobs_TxK.exp().tolist(), observed)
    tables = PairTables(teacher, student, encoder, teacher_encoder)
    sample, _ = Aligner(tables, PrepareConfig()).align(record)
    assert sample is not None
    spans = lay_spans(tables, record.response_ids)
    targets, student_ids = sample.targets, sample.input_ids
    for i in range(len(student_ids) - 4, len(student_ids)):
        j = spans.teacher_index[i]
        row = zip(ids_TxK[j].tolist(), logprobs_TxK[j].exp().tolist(), strict=True)
        print(f"\nteacher {_text(teacher, response[j])} | student {_text(student, student_ids[i])}")
        print("  row:   ", ", ".join(f"{_text(teacher, v)} {p:.3f}" for v, p in list(row)[:12]))
        events = []
        for e in range(targets.event_offsets[i], targets.event_offsets[i + 1]):
            members = targets.members[targets.member_offsets[e] : targets.member_offsets[e + 1]]
            events.append((float(targets.event_mass[e]), " ".join(_text(student, s) for s in members[:4])))
        print("  events:", ", ".join(f"{{{names}}} {mass:.3f}" for mass, names in sorted(events, reverse=True)[:10]))
        print(
            f"  {len(events)} events, tail {targets.tail[i]:.4f}, known mass {targets.known[i]:.3f}, observed "
            f"{np.exp(sample.observed_logprob[i]):.3f}, at an anchor {np.exp(sample.anchor_logprob[i]):.3f}"
        )


def _text(vocabulary: Vocabulary, index: int) -> str:
    return f"`{vocabulary.tokens[index].decode(errors='replace')}`"


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/models/smollm2-135m-instruct"))
