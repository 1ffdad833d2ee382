"""Bytes per response token and error of the ways to store top-k rows, over the demo teacher's real distributions.

    python -m tests.benchmarks.bench_dataset_encodings --dataset runs/demo/shards --tokens 6000

The exact rows come from the teacher itself, run by transformers over the dataset's own responses (the dataset has them
rounded), with float32 logits; they are kept in runs/bench/exact_rows.npz. Three tables: the candidates' two columns
under several codings, order and steps; zstd levels and unit sizes of the chosen one, with what writing and
reading them costs; and whole datasets, every
column included, by k and by adaptive width. The error is the divergence between the exact candidates with their tail
and the stored ones, in nats per token.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from shared.dataset.columns import records_to_table, table_to_records
from shared.dataset.reader import Dataset
from shared.dataset.records import Distributions, Record
from shared.dataset.schema import STEPS_PER_NAT, parquet_options
from shared.dataset.writer import shard_bytes

ROWS = Path("runs/bench/exact_rows.npz")
UNIT = 64


def exact_rows(dataset: Dataset, records: list[Record], k: int) -> list[Distributions]:
    """The teacher's own top-k rows of the records' responses."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dataset.provenance.teacher, dtype=torch.float32).eval()
    results = []
    with torch.inference_mode():
        for record in records:
            ids = torch.from_numpy(np.concatenate([record.prompt_ids, record.response_ids]).astype(np.int64))
            logits = model(ids[None]).logits[0, len(record.prompt_ids) - 1 : -1].double()
            logprobs = torch.log_softmax(logits, -1)
            top, indices = torch.topk(logprobs, k)
            own = logprobs.gather(1, torch.from_numpy(record.response_ids.astype(np.int64))[:, None])[:, 0]
            length = len(record.response_ids)
            results.append(
                Distributions(
                    np.arange(length + 1, dtype=np.int64) * k,
                    indices.to(torch.int32).numpy().reshape(-1),
                    top.float().numpy().reshape(-1),
                    (1 - top.exp().sum(1)).float().numpy(),
                    own.float().numpy(),
                )
            )
    return results


def load_rows(dataset: Dataset, tokens: int, k: int) -> list[Record]:
    """Records of the dataset, about so many tokens, with exact distributions in place of the stored ones."""
    records: list[Record] = []
    count = 0
    for record in dataset.records():
        if count >= tokens:
            break
        if len(record.response_ids):
            records.append(record)
            count += len(record.response_ids)
    key = f"{dataset.manifest.provenance}/{count}/{k}"
    if ROWS.exists() and (saved := np.load(ROWS)) and str(saved["key"]) == key:
        ids, logprobs, tail, sampled = (saved[name] for name in ("ids", "logprobs", "tail", "sampled"))
    else:
        rows = exact_rows(dataset, records, k)
        ids, logprobs = (np.concatenate([getattr(d, n).reshape(-1, k) for d in rows]) for n in ("ids", "logprobs"))
        tail, sampled = (np.concatenate([getattr(d, n) for d in rows]) for n in ("tail", "sampled"))
        ROWS.parent.mkdir(parents=True, exist_ok=True)
        np.savez(ROWS, key=key, ids=ids, logprobs=logprobs, tail=tail, sampled=sampled)
    at, result = 0, []
    for record in records:
        length = len(record.response_ids)
        part = slice(at, at + length)
        rows_of = Distributions(
            np.arange(length + 1, dtype=np.int64) * k,
            ids[part].reshape(-1),
            logprobs[part].reshape(-1),
            tail[part],
            sampled[part],
        )
        result.append(replace(record, distributions=rows_of))
        at += length
    return result


def truncated(record: Record, k: int, mass: float | None) -> Record:
    """The record with k candidates per token, or as many of them as hold `mass`."""
    d = record.distributions
    assert d is not None
    width = int(d.offsets[1]) if len(d) else 0
    probabilities = np.exp(d.logprobs.reshape(-1, width)[:, :k].astype(np.float64)) if len(d) else np.zeros((0, k))
    held = np.cumsum(probabilities, axis=1)
    widths = np.full(len(d), k) if mass is None else np.minimum((held < mass).sum(1) + 1, k)
    keep = np.arange(width)[None] < widths[:, None]
    tail = 1 - held[np.arange(len(d)), widths - 1] if len(d) else np.zeros(0)
    rows = Distributions(
        np.concatenate([[0], np.cumsum(widths)]).astype(np.int64),
        d.ids.reshape(-1, width)[keep],
        d.logprobs.reshape(-1, width)[keep],
        np.maximum(tail, 0).astype(np.float32),
        d.sampled,
    )
    return replace(record, distributions=rows)


def divergence(exact: list[Record], stored: list[Record]) -> tuple[float, float]:
    """Mean and largest divergence per token, in nats."""
    every = []
    for a, b in zip(exact, stored, strict=True):
        assert a.distributions is not None
        assert b.distributions is not None
        p, q = a.distributions.logprobs.astype(np.float64), b.distributions.logprobs.astype(np.float64)
        rows = np.repeat(np.arange(len(a.distributions)), np.diff(a.distributions.offsets))
        mass = np.bincount(rows, np.exp(p), minlength=len(a.distributions))
        tail = np.maximum(1 - mass, 1e-12)
        kept = np.maximum(b.distributions.tail.astype(np.float64), 1e-12)
        value = np.bincount(rows, np.exp(p) * (p - q), minlength=len(tail)) + tail * np.log(tail / kept)
        every.append(value)
    joined = np.concatenate(every)
    return float(joined.mean()), float(joined.max())


def column_bytes(records: list[Record], values: list[NDArray[Any]], kind: pa.DataType, encoding: str) -> float:
    """Bytes per token of one list column in units of 64 responses."""
    total = 0
    for start in range(0, len(values), UNIT):
        table = pa.table({"x": pa.array(values[start : start + UNIT], pa.list_(pa.field("element", kind, False)))})
        buffer = io.BytesIO()
        options: dict[str, Any] = {"use_dictionary": encoding == "dictionary"}
        if encoding not in ("dictionary", "plain"):
            options["column_encoding"] = {"x.list.element": encoding}
        pq.write_table(
            table, buffer, compression="zstd", compression_level=parquet_options()["compression_level"],
            data_page_size=8 << 20, store_schema=False, write_statistics=False, **options,
        )  # fmt: skip
        total += pq.ParquetFile(buffer).metadata.row_group(0).column(0).total_compressed_size
    return total / sum(len(r.response_ids) for r in records)


def column_table(records: list[Record], k: int) -> list[dict[str, Any]]:
    rows = [r.distributions for r in records]
    ids = [d.ids.reshape(-1, k) for d in rows if d is not None]
    logprobs = [d.logprobs.reshape(-1, k).astype(np.float64) for d in rows if d is not None]
    ordered = [np.sort(x, axis=1) for x in ids]
    by_id = [np.take_along_axis(p, np.argsort(x, axis=1), 1) for x, p in zip(ids, logprobs, strict=True)]
    results: list[dict[str, Any]] = []

    def add(column: str, order: str, coding: str, encoding: str, values: list[NDArray[Any]], kind: pa.DataType) -> None:
        flat = [v.reshape(-1) for v in values]
        size = column_bytes(records, flat, kind, encoding)
        results.append({"column": column, "order": order, "coding": coding, "encoding": encoding, "bytes": size})

    for encoding in ("plain", "dictionary", "DELTA_BINARY_PACKED", "BYTE_STREAM_SPLIT"):
        add("ids", "probability", "int32", encoding, ids, pa.int32())
    add("ids", "id", "int32", "BYTE_STREAM_SPLIT", ordered, pa.int32())
    differences = [np.diff(x, axis=1, prepend=0) for x in ordered]
    add("ids", "id", "differences", "BYTE_STREAM_SPLIT", differences, pa.int32())
    add("logprobs", "probability", "float32", "BYTE_STREAM_SPLIT", logprobs, pa.float32())
    for order, values in (("probability", logprobs), ("id", by_id)):
        half = [v.astype(np.float16).view(np.uint16) for v in values]
        for encoding in ("plain", "BYTE_STREAM_SPLIT"):
            add("logprobs", order, "fp16", encoding, half, pa.uint16())
    for steps in (64, 32, 16, 8):
        levels = [np.minimum(np.rint((p[:, :1] - p) * steps), 65535).astype(np.int64) for p in logprobs]
        add("logprobs", "probability", f"1/{steps} nat levels", "BYTE_STREAM_SPLIT", levels, pa.uint16())
        gaps = [np.diff(level, axis=1, prepend=0) for level in levels]
        add("logprobs", "probability", f"1/{steps} nat gaps", "BYTE_STREAM_SPLIT", gaps, pa.uint16())
    levels = [np.minimum(np.rint((p.max(1, keepdims=True) - p) * 16), 65535).astype(np.int64) for p in by_id]
    add("logprobs", "id", "1/16 nat levels", "BYTE_STREAM_SPLIT", levels, pa.uint16())
    return results


def stored_size(records: list[Record], unit: int, level: int | None = None) -> tuple[float, float, float]:
    """Bytes per token of whole shards, every column included, and microseconds a token to write and to read them.

    Writing is everything from records to bytes, checks included; reading is to records. Processor time, best of three.
    """
    options = parquet_options()
    if level is not None:
        options["compression_level"] = level
    batches = [records[i : i + unit] for i in range(0, len(records), unit)]
    tokens = sum(len(r.response_ids) for r in records)

    def timed(run: Callable[[], Any]) -> tuple[float, Any]:
        times = []
        for _ in range(3):
            started = time.process_time()
            result = run()
            times.append(time.process_time() - started)
        return 1e6 * min(times) / tokens, result

    writing, shards = timed(lambda: [shard_bytes(records_to_table(batch), options) for batch in batches])
    reading, _ = timed(
        lambda: [
            deque(table_to_records(pq.read_table(pa.BufferReader(shard), use_threads=False)), maxlen=0)
            for shard in shards
        ]
    )
    return sum(map(len, shards)) / tokens, writing, reading


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=Path("runs/demo/shards"))
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    console = Console()
    dataset = Dataset.open(arguments.dataset)
    records = load_rows(dataset, arguments.tokens, arguments.k)
    tokens = sum(len(r.response_ids) for r in records)
    console.print(f"{len(records)} responses, {tokens} tokens of {dataset.provenance.teacher}, units of {UNIT}")

    columns = column_table(records, arguments.k)
    table = Table("column", "order", "coding", "encoding", "bytes / token", title=f"candidates at k={arguments.k}")
    for row in columns:
        table.add_row(row["column"], row["order"], row["coding"], row["encoding"], f"{row['bytes']:.1f}")
    console.print(table)

    sizes: list[dict[str, Any]] = []
    table = Table("zstd level", "responses per unit", "bytes / token", "us to write", "to read", title="whole shards")
    cases = [(level, UNIT) for level in (1, 3, 6, 9, 16, 19)] + [(None, unit) for unit in (16, 32, 128)]
    for level, unit in cases:
        size, writing, reading = stored_size(records, unit, level)
        level = level or parquet_options()["compression_level"]
        sizes.append({"level": level, "unit": unit, "bytes": size, "write_us": writing, "read_us": reading})
        table.add_row(str(level), str(unit), f"{size:.1f}", f"{writing:.1f}", f"{reading:.1f}")
    console.print(table)

    widths: list[dict[str, Any]] = []
    title = f"every column included, 1/{STEPS_PER_NAT} nat gaps"
    table = Table("width", "mean width", "retained mass", "bytes / token", "mean KL (nats)", "largest KL", title=title)
    for k, mass in ((64, None), (32, None), (16, None), (64, 0.99), (64, 0.98), (64, 0.95), (64, 0.9)):
        kept = [truncated(record, k, mass) for record in records]
        size = stored_size(kept, UNIT)[0]
        decoded = [r for i in range(0, len(kept), UNIT) for r in table_to_records(records_to_table(kept[i : i + UNIT]))]
        mean, largest = divergence(kept, decoded)
        rows = [r.distributions for r in kept if r.distributions is not None]
        entry = {
            "k": k, "mass": mass, "bytes": size, "kl_mean": mean, "kl_max": largest,
            "mean_width": sum(len(d.ids) for d in rows) / tokens,
            "retained": 1 - float(np.concatenate([d.tail for d in rows]).mean()),
        }  # fmt: skip
        widths.append(entry)
        name = f"k={k}" if mass is None else f"mass {mass}, at most {k}"
        table.add_row(
            name,
            f"{entry['mean_width']:.1f}",
            f"{entry['retained']:.4f}",
            f"{size:.1f}",
            f"{mean:.1e}",
            f"{largest:.1e}",
        )
    console.print(table)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"tokens": tokens, "columns": columns, "shards": sizes, "widths": widths}, indent=1)
        )


if __name__ == "__main__":
    main()
