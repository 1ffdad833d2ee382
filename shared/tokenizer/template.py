"""A tokenizer's chat template and its special tokens: what `chat` and `roles` have in common.

Templates are rendered as transformers renders them, with one difference: the clock is ours. A template that reads it
is rendered under two dates, and where the texts differ it is refused with the argument that pins it, because a
dataset whose prompts change from day to day cannot be continued or repeated. Rendering costs some hundred microseconds.
"""

from __future__ import annotations

import datetime
import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NoReturn

from shared.errors import ConfigError, MissingExtraError
from shared.tokenizer.files import TokenizerFile

Turn = dict[str, str]

CLOCK = "strftime_now"
BREAK = "\ufdd2"
"""A noncharacter of Unicode, which no text that is exchanged may hold: behind the first character of a special token
it says that this one is only text."""
QUESTION, ANSWER = "Why is the sky blue", "Because air scatters light"
PROBES: dict[str, list[Turn]] = {
    "user": [{"role": "user", "content": QUESTION}],
    "system": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": QUESTION}],
    "turns": [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": QUESTION},
    ],
}
# Two times that differ in every part: year, month, day, weekday, hour, minute, second.
_TIMES = (datetime.datetime(2001, 2, 3, 4, 5, 6), datetime.datetime(2018, 11, 27, 19, 48, 39))
_OURS = frozenset({"messages", "add_generation_prompt"})


class Specials:
    """The special tokens of a tokenizer as they are written in text; the longest wins where several begin.

    Attributes:
        ids: text → id.
        pattern: matches one of them; None where the tokenizer has none.
    """

    def __init__(self, file: TokenizerFile) -> None:
        self.ids = {text: index for index, text in enumerate(file.texts) if file.is_special[index] and text}
        longest_first = sorted(self.ids, key=len, reverse=True)
        # The lookahead is for specials of one character, which a break cannot part.
        names = "|".join(map(re.escape, longest_first))
        self.pattern = re.compile(f"(?:{names})(?!{BREAK})") if longest_first else None

    def split(self, text: str) -> list[int | str]:
        """`text` as special ids and the text between them."""
        pieces = re.split(f"({self.pattern.pattern})", text) if self.pattern else [text]
        return [self.ids.get(piece, piece) for piece in pieces if piece]

    def broken(self, text: str) -> str:
        """`text` with a `BREAK` in each of its special tokens."""
        return self.pattern.sub(lambda match: match[0][:1] + BREAK + match[0][1:], text) if self.pattern else text


class ChatTemplate:
    """One chat template with its arguments.

    Args:
        source: Jinja.
        settings: of the tokenizer, for `bos_token` and the like.
        arguments: what the template is given beside the conversation. `strftime_now`, a date such as 2024-07-26, stops
            the clock of a template that has no argument for its date.
        now: stops the clock too, where nothing that is rendered is kept.

    Raises:
        ConfigError: if the template is not valid, or does not use one of the arguments.
        MissingExtraError: if jinja2 is not installed.
    """

    def __init__(
        self,
        source: str,
        settings: Mapping[str, Any],
        arguments: Mapping[str, Any] | None = None,
        now: datetime.datetime | None = None,
    ) -> None:
        environment = _environment()
        from jinja2 import TemplateSyntaxError, meta

        try:
            self._template = environment.from_string(source)
            names = meta.find_undeclared_variables(environment.parse(source))
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"the tokenizer's chat template is not valid, line {error.lineno}: {error}; copy the tokenizer again"
            ) from error
        self.fingerprint = hashlib.sha256(source.encode()).hexdigest()
        tokens = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in settings.items()
            if key.endswith("_token") and isinstance(value, dict | str)
        }
        self._names = sorted(names - environment.globals.keys() - _OURS)
        self._arguments = dict(arguments or {})
        for name in self._arguments:
            if name not in self._names:
                self._refuse_argument(name, [known for known in self._names if known not in tokens])
        clock = self._arguments.pop(CLOCK, None)
        self._times = _TIMES if CLOCK in names else _TIMES[:1]
        if now is not None or clock is not None:
            self._times = (now or _parse_date(clock),)
        self._variables = {"tools": None, "documents": None, **tokens, **self._arguments}

    def render(self, turns: Sequence[Turn], *, generate: bool = False) -> str:
        """The conversation as text; with `generate` up to and including the header of the assistant's next turn.

        Raises:
            ConfigError: if the text depends on the clock.
            Exception: whatever the template raises; it is foreign code.
        """
        texts = {self._render(turns, generate, time, {}) for time in self._times}
        if len(texts) > 1:
            raise ConfigError(self._how_to_pin(turns, generate))
        return texts.pop()

    @cached_property
    def probe(self) -> dict[str, str]:
        """Fixed conversations as this template and these arguments render them: part of a dataset's provenance.

        Raises:
            ConfigError: if one depends on the clock.
        """
        probe = {}
        for name, turns in PROBES.items():
            try:
                probe[name] = self.render(turns, generate=True)
            except ConfigError:
                raise
            except Exception as error:  # many templates know no system turn
                probe[name] = f"refused: {error}"
        return probe

    def _render(self, turns: Sequence[Turn], generate: bool, time: datetime.datetime, more: Mapping[str, Any]) -> str:
        variables = {CLOCK: time.strftime, **self._variables, **more}
        return self._template.render(messages=list(turns), add_generation_prompt=generate, **variables)

    def _how_to_pin(self, turns: Sequence[Turn], generate: bool) -> str:
        """The message about a template that reads the clock, with the argument that stops it."""
        formats: list[str] = []
        now = datetime.datetime.now()

        def clock(format: str) -> str:
            formats.append(format)
            return now.strftime(format)

        self._render(turns, generate, now, {CLOCK: clock})
        today = now.strftime(formats[0])
        name, value = CLOCK, now.date().isoformat()
        for candidate in sorted(self._names, key=lambda name: ("date" not in name, name)):
            try:
                texts = {self._render(turns, generate, time, {candidate: today}) for time in _TIMES}
            except Exception:  # a tool, say, that is no text
                continue
            if candidate != CLOCK and len(texts) == 1 and today in texts.pop():
                name, value = candidate, today
                break
        return (
            f"the chat template writes the clock's time into prompts ({today!r} now), so they would change from day to "
            f"day; pin it with collect.template_arguments: {{{name}: {value}}}, "
            f"or with --template-argument '{name}={value}' of import-json"
        )

    def _refuse_argument(self, name: str, known: Sequence[str]) -> NoReturn:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it uses {', '.join(known) or 'none'}"
        raise ConfigError(
            f"template argument {name!r} (collect.template_arguments, --template-argument) is not used by the "
            f"tokenizer's chat template; {hint}"
        )


def _parse_date(value: Any) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(str(value))
    except ValueError as error:
        raise ConfigError(f"template argument {CLOCK} is {value!r}, expected a date such as 2024-07-26") from error


@lru_cache(maxsize=1)
def _environment() -> Any:
    """Jinja as transformers sets it up."""
    try:
        from jinja2 import nodes
        from jinja2.exceptions import TemplateError
        from jinja2.ext import Extension
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingExtraError("the tokenizer's chat template needs jinja2; pip install jinja2") from error

    class Generation(Extension):
        """`{% generation %}` marks the assistant's tokens for training, which changes no text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment
