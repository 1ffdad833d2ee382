"""Between the teacher's logprobs and the whole numbers that are stored (the README of this folder has the formula).

Legend: T response tokens, N candidates of all of them. Both directions are a few passes
of numpy over the N candidates. What was decoded encodes to itself, bit by bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shared.dataset.records import offsets_of
from shared.dataset.schema import MAX_STEPS, SAMPLED_STEPS_PER_NAT, STEPS_PER_NAT

_TAIL_BITS = 11


def encode_gaps(offsets: NDArray[np.int64], logprobs: NDArray[np.float32]) -> NDArray[np.uint16]:
    """uint16 [N]: each candidate's steps below the one before it; rows must be in falling order."""
    if not len(logprobs):
        return np.zeros(0, np.uint16)
    widths = np.diff(offsets)
    starts = offsets[:-1][widths > 0]
    below = np.repeat(logprobs[starts], widths[widths > 0])
    below -= logprobs
    below *= np.float32(STEPS_PER_NAT)  # float32 is enough: its error is a thousandth of a step at 1,000 nats
    steps = np.minimum(np.rint(below, out=below), np.float32(MAX_STEPS), out=below).astype(np.int32)
    gaps = np.empty(len(steps), np.uint16)
    np.subtract(steps[1:], steps[:-1], out=gaps[1:], casting="unsafe")
    gaps[starts] = 0
    return gaps


def round_tail(tail: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 [T]: tail masses to 11 significant bits of r or 1 - r, whichever is smaller; NaN stays NaN.

    Masses that float32 arithmetic left a hair outside 0…1 are clipped.
    """
    clipped = np.clip(tail.astype(np.float64), 0.0, 1.0)
    small = np.minimum(clipped, 1.0 - clipped)
    mantissa, exponent = np.frexp(small)
    rounded = np.ldexp(np.rint(np.ldexp(mantissa, _TAIL_BITS)), exponent - _TAIL_BITS)
    return np.where(clipped > 0.5, 1.0 - rounded, rounded).astype(np.float32)


def round_sampled(sampled: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 [T]: logprobs to multiples of 1/1024 nat; NaN stays NaN."""
    return (np.rint(sampled.astype(np.float64) * SAMPLED_STEPS_PER_NAT) / SAMPLED_STEPS_PER_NAT).astype(np.float32)


def decode_logprobs(
    widths: NDArray[np.int32], gaps: NDArray[np.uint16], tail: NDArray[np.float32]
) -> NDArray[np.float32]:
    """float32 [N]: the stored logprobs.

    Args:
        widths: int32 [T]. gaps: uint16 [N]. tail: float32 [T], NaN where unknown: the row then has mass 1.
    """
    if not len(gaps):
        return np.zeros(0, np.float32)
    known = np.where(np.isnan(tail), 0.0, tail.astype(np.float64))
    with np.errstate(divide="ignore"):
        log_mass = np.log1p(-known)
    filled = widths > 0
    starts = offsets_of(widths)[:-1][filled]
    # The running total may wrap around: a row's own total is below 2^32, and differences are exact modulo that.
    steps = np.cumsum(gaps, dtype=np.uint32)
    steps -= np.repeat(steps[starts] - gaps[starts], widths[filled])
    result = steps.astype(np.float32)
    result *= np.float32(-1.0 / STEPS_PER_NAT)
    weights = np.add.reduceat(np.exp(result), starts)
    level = (log_mass[filled] - np.log(weights.astype(np.float64))).astype(np.float32)
    result += np.repeat(level, widths[filled])
    return result


def row_matches(
    widths: NDArray[np.int32], candidate_ids: NDArray[np.int32], response_ids: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each token stands among its own candidates.

    Returns:
        Tokens that do, int64 [M] ascending, and the indices of their entries in the candidates, int64 [M].
    """
    entries = np.flatnonzero(candidate_ids == np.repeat(response_ids, widths))
    return np.searchsorted(offsets_of(widths)[1:], entries, side="right"), entries
