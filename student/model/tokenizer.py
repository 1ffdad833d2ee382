"""A tokenizer of LLaDA's construction, trained on given text: the student's own vocabulary where none is at hand.

NFC normalizer, GPT-2's pre-tokenizer over bytes, BPE, and LLaDA's special tokens appended after the learned ones,
with its LLaMA-3-like chat template. Training is deterministic: merges go by count, then by id, and the initial
alphabet is sorted; a test trains it in two processes. Costs seconds for tens of megabytes of text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import CheckpointError, VocabularyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, END_OF_TEXT, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
START_HEADER, END_HEADER, END_OF_TURN = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SPECIAL_TOKENS = (BOS, END_OF_TEXT, START_HEADER, END_HEADER, END_OF_TURN, MASK)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '" + START_HEADER + "' + message['role'] + '" + END_HEADER + "\n\n' }}"
    "{{ message['content'] | trim }}{{ '" + END_OF_TURN + "' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + START_HEADER + "assistant" + END_HEADER + "\n\n' }}{% endif %}"
)

_BYTES = 256
_logger = logging.getLogger(__name__)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    individual_digits: bool = False,
    max_sequence_tokens: int = 4096,
) -> PreTrainedTokenizerFast:
    """Train BPE on `texts`; the result has at most `vocab_size` tokens, specials and the 256 bytes included.

    Args:
        individual_digits: every digit is its own token. By default runs of digits merge as other text does.
        max_sequence_tokens: recorded as the tokenizer's `model_max_length`.

    Raises:
        VocabularyError: if `vocab_size` has no room for the bytes and the specials, or there is no text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = _BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise VocabularyError(
            f"a vocabulary of {vocab_size} is too small: {_BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens "
            f"need {smallest}; set student.tokenizer.vocab_size to that or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        if individual_digits
        else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    characters = 0

    def counted() -> Iterator[str]:
        nonlocal characters
        for text in texts:
            characters += len(text)
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if not characters:
        raise VocabularyError("there is no text to train the student's tokenizer on; collect responses first")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    size = tokenizer.get_vocab_size()
    if size < vocab_size:
        _logger.warning(
            "a training text of %d characters yields only %d tokens, not the %d of student.tokenizer.vocab_size",
            characters,
            size,
            vocab_size,
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        mask_token=MASK,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=max_sequence_tokens,
    )


def pretrained_tokenizer(directory: Path, config: Any = None) -> Any:
    """The tokenizer of a checkpoint or of a dataset, by transformers' own classes alone.

    Args:
        config: of the checkpoint's model, where there is one.

    Raises:
        CheckpointError: if there is none, or it cannot be loaded without code that lies beside it.
    """
    from transformers import AutoTokenizer

    if not (directory / "tokenizer.json").exists():
        raise CheckpointError(f"{directory} has no tokenizer.json; copy the checkpoint's tokenizer beside its weights")
    try:
        return AutoTokenizer.from_pretrained(directory, config=config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the tokenizer of {directory} cannot be loaded: {str(error).splitlines()[0]} Code that comes with a "
            "checkpoint is not run; save the tokenizer with a class of transformers' own, such as "
            "PreTrainedTokenizerFast"
        ) from error
