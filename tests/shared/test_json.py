"""The older JSON layout: every variant comes in, goes out and comes in as the same records; what is wrong is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.dataset import Dataset
from shared.errors import DatasetError
from shared.json_files import export_json, import_json, read_entries
from shared.json_layout import EntryReader, ImportSettings
from shared.records import Sampling
from shared.validate import validate_dataset
from tests.shared.test_cli import shards
from tests.shared.test_dataset import assert_same
from tests.toy import TEMPLATE, make_tokenizer

ALL = ImportSettings(top_k=16, held_out=0.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def reader(tokenizer: Path) -> EntryReader:
    return EntryReader(tokenizer, ALL)


def full_rows(reader: EntryReader, response: str, seed: int = 0) -> list[list[float]]:
    """Logits over the whole vocabulary, one row per token of the response and one for its end."""
    random = np.random.default_rng(seed)
    count = len(reader._encoder.encode(response)) + 1
    return np.round(random.normal(0, 3, (count, len(reader.vocabulary))), 4).tolist()


def entry_of(reader: EntryReader, kind: str) -> dict[str, Any]:
    """One entry of each variant, over the response ` the cat runs`."""
    response = " the cat runs"
    rows = full_rows(reader, response)
    entry: dict[str, Any] = {"prompt": "what does the cat do", "response": response, "logits": rows}
    if kind == "full":
        return entry
    order = np.argsort(-np.array(rows), axis=1)[:, :5]
    entry["logits"] = np.take_along_axis(np.array(rows), order, 1).tolist()
    if kind in ("ids", "both"):
        entry["tokenID"] = order.tolist()
    if kind in ("strings", "both"):
        entry["token"] = [[reader.vocabulary.texts[i] for i in row] for row in order]
    if kind == "plain":
        return {"messages": [{"role": "user", "content": entry["prompt"]}, {"role": "assistant", "content": response}]}
    return entry


@pytest.mark.parametrize("kind", ["full", "ids", "strings", "both", "plain"])
def test_each_variant_makes_the_round_trip(reader: EntryReader, tokenizer: Path, tmp_path: Path, kind: str) -> None:
    entries = [{**entry_of(reader, kind), "id": f"sample-{i}", "skill": "cats"} for i in range(3)]
    (tmp_path / "in.json").write_text(json.dumps(entries))
    import_json(tmp_path / "in.json", tmp_path / "one", tokenizer, ALL)
    assert validate_dataset(tmp_path / "one").problems == []
    assert export_json(tmp_path / "one", tmp_path / "out.json") == 3
    import_json(tmp_path / "out.json", tmp_path / "two", tokenizer, ALL)
    first, second = (list(Dataset.open(tmp_path / name).records()) for name in ("one", "two"))
    assert [r.sample_id for r in first] == ["sample-0", "sample-1", "sample-2"]
    for a, b in zip(first, second, strict=True):
        assert_same(a, b)
    export_json(tmp_path / "two", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "out.json").read_bytes()


def test_whole_rows_become_logprobs_with_their_true_normaliser(reader: EntryReader) -> None:
    entry = entry_of(reader, "full")
    d = reader.record(entry, "here", 0).distributions
    assert d is not None
    logits = np.array(entry["logits"])
    exact = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert (np.diff(d.offsets) == 16).all()
    for position in range(len(d)):
        ids, logprobs = d.row(position)
        np.testing.assert_allclose(logprobs, exact[position][ids], rtol=1e-5)
    np.testing.assert_allclose(d.tail, 1 - np.exp(d.logprobs.reshape(-1, 16)).sum(1), atol=1e-5)
    own = reader.record(entry, "here", 0).response_ids
    np.testing.assert_allclose(d.sampled, exact[np.arange(len(own)), own], rtol=1e-5)


def test_candidates_alone_leave_the_tail_unknown_and_say_what_they_know(reader: EntryReader, tokenizer: Path) -> None:
    entry = entry_of(reader, "ids")
    record = reader.record(entry, "here", 0)
    assert record.distributions is not None
    assert np.isnan(record.distributions.tail).all()
    np.testing.assert_allclose(np.exp(record.distributions.logprobs.reshape(-1, 5)).sum(1), 1, rtol=1e-5)
    # Logprobs as they stand leave a tail.
    half = [[math.log(0.5), math.log(0.25)]] * len(entry["logits"])
    entry |= {"logits": half, "tokenID": [row[:2] for row in entry["tokenID"]]}
    known = EntryReader(tokenizer, ImportSettings(values="logprobs")).record(entry, "here", 0).distributions
    assert known is not None
    np.testing.assert_allclose(known.tail, 0.25, atol=1e-6)
    with pytest.raises(DatasetError, match=r"add up to 2\.0+, more than 1: these are not logprobs; .*--values logits"):
        EntryReader(tokenizer, ImportSettings(values="logprobs")).record(
            {**entry, "logits": [[0.0, 0.0]] * len(half)}, "here", 0
        )


def test_plain_conversations_are_records_without_distributions(reader: EntryReader) -> None:
    record = reader.record(entry_of(reader, "plain"), "here", 7)
    assert record.distributions is None
    assert record.response_bytes == b" the cat runs"
    assert record.prompt_text == "<|begin|><|turn|>user\nwhat does the cat do<|end|><|turn|>assistant\n"
    special = reader.vocabulary.is_special[record.prompt_ids]
    assert special.sum() == 4
    assert record.response_ids[-1] == reader.vocabulary.roles["end_of_turn"]
    assert record.sampling.rule == "filtered"  # nobody says how it was written
    assert record.sample_id.endswith("/7")


DATED = "{% if not date is defined %}{% set date = strftime_now('%d.%m.%Y') %}{% endif %}{{ date }}" + TEMPLATE


def test_an_import_is_bound_to_the_rendering_of_its_prompts(
    reader: EntryReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer(tmp_path / "dated")
    (tmp_path / "dated" / "chat_template.jinja").write_text(DATED)
    (tmp_path / "in.json").write_text(json.dumps([entry_of(reader, "plain")]))
    command = ["import-json", tmp_path / "in.json", tmp_path / "d", "--tokenizer", tmp_path / "dated"]
    assert shards(monkeypatch, *command) == 2
    assert "--template-argument 'date=" in " ".join(capsys.readouterr().err.split())
    assert shards(monkeypatch, *command, "--template-argument", "dat=x") == 2
    assert "did you mean 'date'?" in " ".join(capsys.readouterr().err.split())
    assert shards(monkeypatch, *command, "--template-argument", "date") == 2
    assert "--template-argument 'date' is not KEY.PATH=VALUE" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "d").exists()
    assert shards(monkeypatch, *command, "--template-argument", "date=1 May") == 0
    dataset = Dataset.open(tmp_path / "d")
    assert next(iter(dataset.records())).prompt_text.startswith("1 May<|begin|>")
    (tmp_path / "dated" / "chat_template.jinja").write_text("{{ date }} " + TEMPLATE)
    assert shards(monkeypatch, *command, "--template-argument", "date=1 May") == 2
    assert "details.rendered_probe.user: '1 May<|begin|>" in " ".join(capsys.readouterr().err.split())
    # What an export has rendered is not rendered again, so the clock is not asked.
    assert shards(monkeypatch, "export-json", tmp_path / "d", tmp_path / "out.json") == 0
    (tmp_path / "dated" / "chat_template.jinja").write_text(DATED)
    again = ["import-json", tmp_path / "out.json", tmp_path / "again", "--tokenizer", tmp_path / "dated"]
    assert shards(monkeypatch, *again) == 0
    assert_same(*(next(iter(Dataset.open(tmp_path / name).records())) for name in ("d", "again")))


def test_rendered_prompts_are_imported_as_they_are(
    reader: EntryReader, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "<|begin|><|turn|>user\nwhat does the cat do<|end|><|turn|>assistant\n"
    expected = reader.record(entry_of(reader, "plain"), "here", 0)
    (tmp_path / "in.json").write_text(json.dumps([{"prompt": text, "response": " the cat runs"}]))
    for name, options in (("auto", []), ("told", ["--rendered"]), ("words", ["--no-rendered"])):
        command = ["import-json", tmp_path / "in.json", tmp_path / name, "--tokenizer", tokenizer, *options]
        assert shards(monkeypatch, *command) == 0
        record = next(iter(Dataset.open(tmp_path / name).records()))
        same = record.prompt_ids.tolist() == expected.prompt_ids.tolist()
        assert same == (name != "words")
        assert reader.vocabulary.is_special[record.prompt_ids].sum() == 4
    assert Dataset.open(tmp_path / "auto").manifest.provenance != Dataset.open(tmp_path / "words").manifest.provenance


def malformed(reader: EntryReader) -> dict[str, tuple[Any, str]]:
    ids = entry_of(reader, "ids")
    full = entry_of(reader, "full")

    def row(position: int, column: int, value: Any, key: str = "logits") -> dict[str, Any]:
        rows = [list(r) for r in ids[key]]
        rows[position][column] = value
        return {**ids, key: rows}

    size = len(reader.vocabulary)
    return {
        "not an object": ([1, 2], r"is list, expected an object with prompt and response"),
        "no response": ({"prompt": "x", "logits": []}, r"messages is missing, expected text or a list"),
        "wrong response": ({**ids, "response": 3}, r"response is int, expected text"),
        "no prompt": ({"response": "x"}, r"prompt is missing"),
        "bad turn": ({"messages": [{"role": "user"}]}, r"messages is \{'role': 'user'\}, expected"),
        "no last turn": ({"messages": [{"role": "user", "content": "x"}]}, r"messages end with 'user', expected a"),
        "rows": ({**ids, "logits": ids["logits"][:-2]}, r"\d rows of logits for a response of \d tokens"),
        "not rows": ({**ids, "logits": "x"}, r"logits is str, expected a list with one row per token"),
        "not a row": ({**ids, "logits": [1.0] * 4}, r"row 0 is float, expected a list of numbers"),
        "nan": (row(1, 2, math.nan), r"row 1, position 2: logit nan, expected a finite number"),
        "infinity": (row(2, 0, -math.inf), r"row 2, position 0: logit -inf"),
        "text": (row(1, 3, "x"), r"row 1, position 3: 'x' is not a number"),
        "id": (row(2, 1, size, "tokenID"), rf"row 2: tokenID, position 1: id {size} is outside the vocabulary"),
        "float id": (row(0, 1, 2.5, "tokenID"), r"position 1: id 2.5 is outside"),
        "twice": (row(1, 3, ids["tokenID"][1][0], "tokenID"), r"row 1, position 3: candidate \d+ .* position 0"),
        "width": ({**ids, "tokenID": [r[:-1] for r in ids["tokenID"]]}, r"row 0: 5 logits for 4 candidates"),
        "id rows": ({**ids, "tokenID": ids["tokenID"][1:]}, r"tokenID has 3 rows, logits has 4"),
        "no ids": ({k: v for k, v in ids.items() if k != "tokenID"}, r"row 0: 5 values without token or tokenID"),
        "half rows": ({**full, "logits": [r[:-1] for r in full["logits"]]}, r"expected the whole vocabulary of"),
        "token": ({**ids, "tokenID": None, "token": [["?!?"] * 5] * 4}, r"the tokenizer has no token '\?!\?'"),
        "finish": ({**ids, "finish_reason": "done"}, r"finish_reason 'done', expected stop, length or unknown"),
        "sampling": ({**ids, "sampling": {"heat": 1}}, r"sampling .*heat"),
        "tail": ({**ids, "tail": [0.1]}, r"tail has 1 values, logits has 4 rows"),
        "tail value": ({**ids, "tail": [0.1, 0.1, "x", 0.1]}, r"row 2: tail 'x', expected a finite number"),
    }  # fmt: skip


def test_every_malformed_variant_has_its_message_and_leaves_nothing(
    reader: EntryReader, tokenizer: Path, tmp_path: Path
) -> None:
    good = entry_of(reader, "ids")
    for name, (entry, message) in malformed(reader).items():
        (tmp_path / "in.json").write_text(json.dumps([good, entry]))
        with pytest.raises(DatasetError, match=rf"in\.json, entry 1.*{message}"):
            import_json(tmp_path / "in.json", tmp_path / "d", tokenizer, ALL)
        assert not (tmp_path / "d").exists(), name


FILES = {
    "": r"holds no entries; expected a JSON list of them, or one a line",
    "[]": r"holds no entries",
    "[{}": r"ends inside its list after 1 entries; the file is cut off",
    '[{"a": 1': r"entry 0: not valid JSON at character",
    '{"a": 1}\n{"b": ': r"entry 1: not valid JSON at character",
    "[{}] {}": r"there is more after the list's end",
}


@pytest.mark.parametrize("text", FILES)
def test_files_that_are_not_entries_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DatasetError, match=FILES[text]):
        list(read_entries(tmp_path / "x.json"))


def test_lists_and_lines_are_read_an_entry_at_a_time(tmp_path: Path) -> None:
    entries = [{"text": "é" * 300_000, "i": i, "list": [[1], [2]]} for i in range(5)]  # longer than a block
    (tmp_path / "list.json").write_text(json.dumps(entries, ensure_ascii=False, indent=1))
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(e) for e in entries) + "\n\n")
    for name in ("list.json", "lines.jsonl"):
        assert [entry for _, entry in read_entries(tmp_path / name)] == entries
    with pytest.raises(DatasetError, match=r"cannot read .*missing.json: No such file"):
        list(read_entries(tmp_path / "missing.json"))


def test_an_id_comes_once(reader: EntryReader, tokenizer: Path, tmp_path: Path) -> None:
    entry = {**entry_of(reader, "plain"), "id": "same"}
    (tmp_path / "in.json").write_text(json.dumps([entry, entry]))
    with pytest.raises(DatasetError, match=r"entry 1: id 'same' is also that of .*in.json, entry 0"):
        import_json(tmp_path / "in.json", tmp_path / "d", tokenizer, ALL)


def test_an_export_of_nothing_says_what_there_is(reader: EntryReader, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps([entry_of(reader, "plain")]))
    settings = ImportSettings(held_out=0.0, sampling=Sampling(0.0, 1.0, 0, 0, None))
    import_json(tmp_path / "in.json", tmp_path / "d", tokenizer, settings)
    with pytest.raises(DatasetError, match=r"no records of split held_out and rule any; it has 1 of train/greedy"):
        export_json(tmp_path / "d", tmp_path / "out.json", split="held_out")
    assert not list(tmp_path.glob("out*"))


def test_the_example_file_is_of_the_layout() -> None:
    path = Path(__file__).parents[2] / "configs/examples/older-layout.json"
    assert path.stat().st_size < 200_000
    entries = [entry for _, entry in read_entries(path)]
    assert {"tokenID", "token", "logits"} <= set().union(*entries)
    assert any("messages" in entry and "logits" not in entry for entry in entries)
    rows = [entry for entry in entries if "logits" in entry]
    assert all(len(entry["logits"]) == len(entry.get("response_ids", entry["logits"])) for entry in rows)
