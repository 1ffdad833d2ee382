"""Find what a tokenizer's special tokens are for, from its settings and its chat template.

Their strings differ between families (`<|eot_id|>`, `<|im_end|>`, `</s>`) and are never looked at. Two made-up
turns are rendered by the chat template and cut at the special tokens: the special before the role's name
starts a header, the one between the name and the content ends it, and the one after the assistant's content
ends its turn. The rest comes from the tokenizer's settings.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping

from shared.errors import VocabularyError
from shared.tokenizer.files import TokenizerFile
from shared.tokenizer.template import ANSWER, PROBES, QUESTION, ChatTemplate, Specials

ROLES = ("bos", "end_of_text", "end_of_turn", "start_header", "end_header", "mask", "pad")

# When one id plays several roles, the first of these says what it means inside a conversation.
PRECEDENCE = ("end_of_turn", "start_header", "end_header", "end_of_text", "bos", "mask", "pad")

_SETTING_OF_ROLE = {"bos": "bos_token", "end_of_text": "eos_token", "mask": "mask_token", "pad": "pad_token"}
_logger = logging.getLogger(__name__)


def find_roles(file: TokenizerFile, override: Mapping[str, int | str] | None = None) -> dict[str, int]:
    """Role → token id, for the roles that the tokenizer has.

    Args:
        override: role → id or string; wins over what is found.

    Raises:
        VocabularyError: if an override names an unknown role, or a token that is not one of the tokenizer's specials.
    """
    roles = _from_settings(file)
    if file.chat_template:
        roles |= _from_chat_template(file)
    if roles.get("end_of_text") == roles.get("end_of_turn") and "end_of_turn" in roles:
        # Instruct tokenizers name the end of turn as their EOS; the document's end is then among the other stop tokens.
        del roles["end_of_text"]
        stops = file.settings.get("generation_eos_token_id")
        others = [stop for stop in stops if stop != roles["end_of_turn"]] if isinstance(stops, list) else []
        if others:
            roles["end_of_text"] = others[0]
    for role, token in (override or {}).items():
        if role not in ROLES:
            raise VocabularyError(f"{role!r} is not a role of a special token; roles are {', '.join(ROLES)}")
        roles[role] = token if isinstance(token, int) else _find(file, token, role)
    for role, index in roles.items():
        if not (0 <= index < len(file.tokens) and file.is_special[index]):
            raise VocabularyError(
                f"{file.source}: token {index} is given the role {role!r} but is not a special token of it"
            )
    return {role: roles[role] for role in ROLES if role in roles}


def _find(file: TokenizerFile, text: str, role: str) -> int:
    if text not in file.texts:
        raise VocabularyError(f"{file.source} has no token {text!r} for the role {role!r}")
    return file.texts.index(text)


def _from_settings(file: TokenizerFile) -> dict[str, int]:
    roles = {}
    specials = {text: index for index, text in enumerate(file.texts) if file.is_special[index] and text}
    for role, key in _SETTING_OF_ROLE.items():
        setting = file.settings.get(key)
        text = setting["content"] if isinstance(setting, dict) else setting
        if text in specials:
            roles[role] = specials[text]
    return roles


def _from_chat_template(file: TokenizerFile) -> dict[str, int]:
    try:
        template = ChatTemplate(str(file.chat_template), file.settings, now=datetime.datetime.now())
        text = template.render(PROBES["turns"])
    except Exception as error:  # a template is foreign code: whatever it raises, it only costs us its hints
        _logger.warning(
            "%s: the chat template cannot be rendered (%s); roles come from the settings alone", file.source, error
        )
        return {}
    pieces = Specials(file).split(text)
    question = next((i for i, piece in enumerate(pieces) if isinstance(piece, str) and QUESTION in piece), None)
    answer = next((i for i, piece in enumerate(pieces) if isinstance(piece, str) and ANSWER in piece), None)
    if question is None or answer is None:
        return {}
    roles: dict[str, int] = {}
    after = next((piece for piece in pieces[answer + 1 :] if isinstance(piece, int)), None)
    if after is not None:
        roles["end_of_turn"] = after
    before = pieces[max(0, question - 3) : question + 1]  # [start] role [end] content, or [start] role content
    match before:
        case [int(start), str(name), int(end), str()] if name.strip() == "user":
            roles |= {"start_header": start, "end_header": end}
        case [*_, int(start), str(content)] if content.strip().startswith("user"):
            roles["start_header"] = start
    return roles
