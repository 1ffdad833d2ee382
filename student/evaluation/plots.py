"""The report's pictures: SVG whose words are text and whose ink follows the reader's light or dark scheme."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

BEFORE, AFTER, SERVED = "#9aa5b1", "#2f6fde", "#e07a3f"
INK = "#010203"
"""Stands for the page's text color, which matplotlib has no name for."""
_SCHEME = "<style>svg { color: #1c2733 } @media (prefers-color-scheme: dark) { svg { color: #dde4ec } }</style>"
plt.rcParams.update(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "llada-drafter",
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "font.size": 10,
        "legend.frameon": False,
    }
)


def _smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Trailing mean over `window` steps."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def svg(figure: Figure) -> str:
    """The figure as the page holds it."""
    figure.tight_layout()
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = drawn.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor").replace("<defs>", f"{_SCHEME}<defs>", 1)


def loss_curve(entries: Sequence[dict[str, Any]]) -> str:
    """The trained loss over steps, each step and its trailing mean."""
    entries = [entry for entry in entries if entry["loss"] is not None]  # steps that were skipped have none
    steps = [entry["step"] for entry in entries]
    losses = [entry["loss"] for entry in entries]
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    axes.plot(steps, losses, color=BEFORE, linewidth=0.8, label="step")
    axes.plot(steps, _smooth(losses, max(len(losses) // 40, 1)), color=AFTER, linewidth=1.8, label="trailing mean")
    axes.set(xlabel="step", ylabel="loss per target token [nats]", title="Training loss")
    axes.legend()
    return svg(figure)


def acceptance_curve(entries: Sequence[dict[str, Any]]) -> str:
    """How often the first d drafted student tokens are all the observed ones, on training text, over the steps."""
    steps = [entry["step"] for entry in entries]
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    depths = len(entries[0]["match_by_depth"])
    colors = plt.get_cmap("viridis")(np.linspace(0.25, 0.85, depths))
    for depth in range(depths):
        hits = [entry["match_by_depth"][depth] or 0.0 for entry in entries]
        axes.plot(steps, _smooth(hits, max(len(hits) // 40, 1)), color=colors[depth], label=f"first {depth + 1}")
    axes.set(
        xlabel="step", ylabel="share of blocks", ylim=(0, None), title="Leading student tokens right, training text"
    )
    axes.legend(ncol=2, fontsize=8)
    return svg(figure)


PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Terms of the loss", "log", {"ce": "CE, nats", "kl": "KL, nats", "tv": "total variation", "path": "path"}),
    ("Gradient norm", "log", {"grad_norm": ""}),
    ("Learning rate", "linear", {"learning_rate": ""}),
    ("Tokens a second", "linear", {"tokens_per_s": ""}),
    ("Share of a step that waits for data", "linear", {"data_wait": ""}),
    ("Memory, GiB", "linear", {"device_gib": "device", "host_gib": "process"}),
)
"""Title, scale, and the journal's key → label of each curve."""


def training_curves(entries: Sequence[dict[str, Any]]) -> str:
    """What the journal says of each step, a panel for each subject; what was not measured has no curve."""
    steps = [entry["step"] for entry in entries]
    figure, panels = plt.subplots(len(PANELS), figsize=(6.4, 1.7 * len(PANELS)), sharex=True)
    for axes, (title, scale, curves) in zip(panels, PANELS, strict=True):
        for key, label in curves.items():
            values = [np.nan if entry.get(key) is None else entry[key] for entry in entries]
            if not np.isnan(values).all():
                axes.plot(steps, values, linewidth=0.9, label=label)
        axes.set(title=title, yscale=scale)
        if scale == "linear":
            axes.set_ylim(0, None)
        if len(axes.lines) > 1:
            axes.legend(fontsize=8, ncol=2)
    panels[-1].set_xlabel("step")
    return svg(figure)


def depth_bars(before: Sequence[float], after: Sequence[float], served: Sequence[float] | None) -> str:
    """Share of drafts accepted to each depth, before and after training, and as vLLM counted it."""
    series = [("before training", before, BEFORE), ("after training", after, AFTER)]
    if served:
        series.append(("vLLM, measured", served, SERVED))
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    width = 0.8 / len(series)
    for number, (label, values, color) in enumerate(series):
        depths = np.arange(1, len(values) + 1)
        axes.bar(depths + (number - (len(series) - 1) / 2) * width, values, width, label=label, color=color)
    axes.set(
        xlabel="teacher tokens accepted, at least", ylabel="share of drafts", title="Acceptance on held-out prompts"
    )
    axes.set_xticks(np.arange(1, len(after) + 1))
    axes.legend()
    return svg(figure)


def skill_bars(before: dict[str, float], after: dict[str, float]) -> str:
    """Acceptance length of each skill, before and after training."""
    skills = sorted(after, key=lambda skill: after[skill])
    figure, axes = plt.subplots(figsize=(6.4, 0.32 * len(skills) + 1.2))
    rows = np.arange(len(skills))
    axes.barh(rows, [after[skill] - 1 for skill in skills], left=1, color=AFTER, label="after training")
    axes.scatter([before.get(skill, np.nan) for skill in skills], rows, color=INK, marker="|", s=80, label="before")
    axes.set_yticks(rows, skills)
    axes.set(xlabel="acceptance length tau", title="By skill, held-out prompts")
    axes.legend(loc="lower right")
    return svg(figure)


def speed_bars(speeds: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Times as fast as without a draft by kind of draft, with the tokens a second; a panel for each number of requests
    in flight. The ratios are what is compared: passes at other times have a machine of another speed."""
    figure, panels = plt.subplots(len(speeds), figsize=(6.4, 1.8 * len(speeds) + 0.6), squeeze=False)
    for axes, (title, by_draft) in zip(panels[:, 0], speeds.items(), strict=True):
        colors = [BEFORE if name == "no draft" else AFTER if name.startswith("LLaDA") else SERVED for name in by_draft]
        times = [speedup for speedup, _ in by_draft.values()]
        bars = axes.barh(list(by_draft), times, color=colors)
        labels = [f"{speedup:.2f} ×  ({speed:.1f} tokens/s)" for speedup, speed in by_draft.values()]
        axes.bar_label(bars, labels, padding=3)
        axes.set(xlim=(0, 1.7 * max(times)), title=title)
    panels[-1, 0].set_xlabel("times as fast as without a draft")
    return svg(figure)


def break_even(result: dict[str, Any], student: dict[str, Any]) -> str:
    """Speed-up over acceptance length, measured and by its fit; `student` is what LLaDA alone reached, if measured."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    ends = np.array([1.0, result["draft_tokens"] + 1])
    named = {"latency": ("one request in flight", AFTER), "throughput": (f"{result['in_flight']} in flight", SERVED)}
    for name, (label, color) in named.items():
        points = [entry[name] for entry in result["measured"]]
        axes.scatter([p["acceptance_length"] for p in points], [p["speedup"] for p in points], color=color, s=18)
        needed = result["needed"][name]
        axes.plot(ends, ends / needed, color=color, label=f"{label}: pays from {needed:.2f}")
    axes.axhline(1, color=INK, linewidth=0.8)
    if student.get("acceptance_length") is not None:  # null where nothing was drafted
        axes.scatter(
            student["acceptance_length"], student["speedup"], color=INK, marker="*", s=90, label="this student, one"
        )
    axes.set(xlabel="acceptance length", ylabel="times the speed without a draft", title="What a draft is worth here")
    axes.legend()
    return svg(figure)
