"""Prompts: sources, the split, rendering, lengths, and prompts that the teacher writes itself."""

from teacher.prompts.prompt import Prompt, prompts_fingerprint, split_prompts
from teacher.prompts.render import Renderer, load_renderer
from teacher.prompts.sources import load_prompts, load_sources

__all__ = [
    "Prompt",
    "Renderer",
    "load_prompts",
    "load_renderer",
    "load_sources",
    "prompts_fingerprint",
    "split_prompts",
]
