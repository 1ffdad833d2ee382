"""What a dataset holds: one pass over its shards, counts in bounded memory; a table for the terminal, a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table

from shared.console import progress
from shared.dataset.columns import flat_list, is_present
from shared.dataset.encoding import decode_logprobs, row_matches
from shared.dataset.manifest import UnitEntry, counts_of
from shared.dataset.reader import Dataset
from shared.dataset.records import offsets_of
from shared.errors import DatasetError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_LENGTH_BINS = tuple(2**i for i in range(32))
_COLUMNS = (
    "split", "rule", "skill", "finish_reason", "prompt_ids", "response_ids", "sampled_logprob", "width",
    "candidate_ids", "candidate_gaps", "tail_mass",
)  # fmt: skip


@dataclass(slots=True)
class Statistics:
    """Counts over a dataset, or over some of its units.

    Attributes:
        retained: k → mean mass of a token's first k candidates, over tokens whose tail is known.
        sampled_inside: share of the tokens that are among their own candidates.
        lengths: upper bound → responses of at most that many tokens (and more than the bound before).
    """

    rows: int = 0
    tokens: int = 0
    soft_tokens: int = 0
    bytes: int = 0
    candidates: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    skills: dict[str, int] = field(default_factory=dict)
    finish_reasons: dict[str, int] = field(default_factory=dict)
    retained: dict[int, float] = field(default_factory=dict)
    unknown_tails: int = 0
    sampled_inside: float | None = None
    mean_logprob: float | None = None
    lengths: dict[int, int] = field(default_factory=dict)

    @property
    def bytes_per_token(self) -> float | None:
        return self.bytes / self.tokens if self.tokens else None

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "retained": {str(k): mass for k, mass in self.retained.items()},
            "lengths": {str(bound): count for bound, count in self.lengths.items()},
            "bytes_per_token": self.bytes_per_token,
        }


def measure(path: str | Path) -> Statistics:
    """Statistics of the dataset at `path`.

    Raises:
        DatasetError: if there is none, or it is damaged.
    """
    dataset = Dataset.open(path)
    with progress() as bar:
        task = bar.add_task("reading", total=dataset.manifest.tokens, note="")
        return _counted(dataset, dataset.manifest.units, lambda tokens: bar.update(task, advance=tokens))


def sample(path: str | Path, tokens: int) -> Statistics:
    """Statistics of units of the dataset at `path` that lie evenly apart and hold about `tokens` response tokens.

    Raises:
        DatasetError: if there is none, or it is damaged.
    """
    dataset = Dataset.open(path)
    apart = -(-dataset.manifest.tokens // tokens) or 1
    return _counted(dataset, dataset.manifest.units[::apart], lambda _: None)


def _counted(dataset: Dataset, units: Sequence[UnitEntry], done: Callable[[int], None]) -> Statistics:
    """Statistics of these units; `done` is told how many response tokens more have been read."""
    rows, tokens, size = (sum(getattr(unit, name) for unit in units) for name in ("rows", "tokens", "bytes"))
    result = Statistics(rows, tokens, bytes=size, counts=counts_of(units))
    skills, reasons, lengths = Counter[str](), Counter[str](), Counter[int]()
    mass, inside, logprob, logprobs, widest, outside = np.zeros(len(DEPTHS)), 0, 0.0, 0, 0, 0.0
    for table in dataset.tables(_COLUMNS, units):
        skills.update(table["skill"].to_pylist())
        reasons.update(table["finish_reason"].to_pylist())
        length = np.asarray(pc.list_value_length(table["response_ids"]))
        lengths.update(np.searchsorted(_LENGTH_BINS, length).tolist())
        has = is_present(table["width"])
        response, _ = flat_list(table["response_ids"])
        owners = response[np.repeat(has, length)]
        widths, ids, gaps, tail, sampled = (
            flat_list(table[name])[0]
            for name in ("width", "candidate_ids", "candidate_gaps", "tail_mass", "sampled_logprob")
        )
        result.soft_tokens += len(widths)
        result.candidates += len(ids)
        result.unknown_tails += int(np.isnan(tail).sum())
        widest = max(widest, int(widths.max(initial=0)))
        mass += _retained(widths, np.exp(decode_logprobs(widths, gaps, tail)), ~np.isnan(tail))
        inside += len(row_matches(widths, ids, owners)[0])
        logprob += float(np.nansum(sampled.astype(np.float64)))
        logprobs += int((~np.isnan(sampled)).sum())
        outside += float(np.nansum(tail.astype(np.float64)))
        done(int(length.sum()))
    result.skills = dict(skills.most_common())
    result.finish_reasons = dict(reasons.most_common())
    result.lengths = {_LENGTH_BINS[i]: lengths[i] for i in sorted(lengths)}
    if known := result.soft_tokens - result.unknown_tails:
        depths = [k for k in DEPTHS if k < widest] + [widest]
        result.retained = {k: float(m / known) for k, m in zip(DEPTHS, mass, strict=True) if k in depths}
        result.retained[widest] = 1.0 - outside / known
    if result.soft_tokens:
        result.sampled_inside = inside / result.soft_tokens
    if logprobs:
        result.mean_logprob = logprob / logprobs
    return result


def to_table(statistics: Statistics) -> Group:
    """The statistics for a terminal."""
    general = Table(title="dataset", show_header=False)
    rows: list[tuple[str, str]] = [
        ("responses", f"{statistics.rows:,}"),
        *((f"  {key}", f"{count:,}") for key, count in statistics.counts.items()),
        ("response tokens", f"{statistics.tokens:,}"),
        ("  with distributions", f"{statistics.soft_tokens:,}"),
        ("bytes", f"{statistics.bytes:,}"),
        ("bytes per token", _number(statistics.bytes_per_token, ".1f")),
        ("token among its own candidates", _number(statistics.sampled_inside, ".1%")),
        ("mean logprob of the text", _number(statistics.mean_logprob, ".3f")),
        *((f"finished by {key}", f"{count:,}") for key, count in statistics.finish_reasons.items()),
    ]
    for name, value in rows:
        general.add_row(name, value)
    retained = Table("k", "retained mass", title="retained mass by k")
    for k, share in statistics.retained.items():
        retained.add_row(str(k), f"{share:.4f} {'█' * round(share * 30)}")
    if statistics.unknown_tails:
        retained.add_row("unknown", f"{statistics.unknown_tails:,} tokens")
    lengths = Table("tokens up to", "responses", title="response lengths")
    most = max(statistics.lengths.values(), default=1)
    for bound, count in statistics.lengths.items():
        lengths.add_row(str(bound), f"{count:>7,} {'█' * round(30 * count / most)}")
    return Group(general, retained, lengths)


def check_picture(path: Path) -> None:
    """Refuse a picture that `draw` cannot make, before a large dataset is read for it.

    Raises:
        MissingExtraError: without matplotlib.
        DatasetError: if the suffix names no kind of picture.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise MissingExtraError("--picture needs matplotlib; pip install 'llada-drafter[student]'") from error
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in kinds:
        raise DatasetError(
            f"cannot draw the picture {path}: {path.suffix} is no kind of picture, expected one of "
            f"{', '.join(sorted(kinds))}; name a .png or .svg file"
        )


def draw(statistics: Statistics, path: Path) -> None:
    """The statistics as a picture; the suffix of `path` (png, svg, pdf) says which kind.

    Raises:
        DatasetError: if the picture cannot be written.
    """
    try:
        drawn(statistics).savefig(path, dpi=120)
    except OSError as error:
        raise DatasetError(f"cannot write the picture {path}: {error}; choose another file or free space") from error


def drawn(statistics: Statistics) -> Figure:
    """Retained mass by k, finish reasons and lengths, one below the other; raises `ImportError` without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 7.2), layout="tight")
    mass, reasons, lengths = figure.subplots(3, 1)
    mass.plot(list(statistics.retained), list(statistics.retained.values()), marker="o")
    mass.set(xscale="log", xlabel="k", ylabel="mean retained mass", ylim=(0, 1.02), title="Retained mass by k")
    mass.set_xticks(list(statistics.retained), [str(k) for k in statistics.retained], minor=False)
    mass.minorticks_off()
    reasons.barh(list(statistics.finish_reasons), list(statistics.finish_reasons.values()))
    reasons.set(title="Finish reasons", xlabel="responses")
    lengths.bar([str(bound) for bound in statistics.lengths], list(statistics.lengths.values()))
    lengths.set(title="Response lengths", xlabel="tokens up to", ylabel="responses")
    return figure


def _retained(
    widths: NDArray[np.int32], probabilities: NDArray[np.float32], known: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """float64 [len(DEPTHS)]: sum over known tokens of the mass of their first k candidates."""
    rows = np.repeat(np.arange(len(widths)), widths)
    rank = np.arange(len(rows)) - np.repeat(offsets_of(widths)[:-1], widths)
    counted = np.where(known[rows], probabilities, 0.0)
    by_rank = np.bincount(rank, weights=counted, minlength=max(DEPTHS))
    return np.array([by_rank[:k].sum() for k in DEPTHS])


def _number(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)
