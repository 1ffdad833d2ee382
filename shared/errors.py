"""Errors that a user can cause, each with one message: the value seen, what was expected, the fix.

Everything a command can blame on its input derives from `UserError`; the command line turns exactly
these into one line and exit code 2 (`shared.console`). Anything else is our bug and keeps its traceback.
"""

from __future__ import annotations

USER_ERROR_EXIT_CODE = 2


class UserError(Exception):
    """Base of every error that the user can mend."""


class ConfigError(UserError):
    """A config file, an override or a combination of settings is not valid."""


class PromptError(UserError):
    """The prompts file is missing, empty or malformed."""


class DatasetError(UserError):
    """A dataset is missing, damaged, of an unknown version, or belongs to another configuration."""


class VocabularyError(UserError):
    """A tokenizer's bytes cannot be recovered, or it is not the tokenizer that was expected."""


class CheckpointError(UserError):
    """A model checkpoint is missing, incomplete or does not fit its configuration."""


class ServiceError(UserError):
    """A server of the teacher cannot be reached, or is not one whose answers can be collected."""


class HubError(UserError):
    """The Hugging Face Hub cannot be reached, refuses a request, or has no such name."""


class AlignmentError(UserError):
    """Stored distributions do not belong to the text that they are stored with."""


class EngineError(UserError):
    """The teacher's engine answers requests with errors, or workers that hold one keep dying."""


class StaleError(UserError):
    """What a command made earlier is of other inputs or settings than those that are there now."""


class TrainingError(UserError):
    """Training cannot start or go on with these settings and this data."""


class MissingExtraError(UserError):
    """An optional dependency is not installed; the message carries the command that installs it."""
