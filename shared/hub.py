"""The Hugging Face Hub: what a repository's name looks like, and publishing files as a repository by its own client.

`upload_folder` is the way at every size: it hashes while it sends, divides a large folder over several commits, and
skips what the repository already has, so that a push that was interrupted ends the same when it is run again.
(`upload_large_folder` did this in older releases of the client; in release 2 it is a part of `upload_folder`.) Since
several commits can be seen one by one, what makes a repository readable is sent last, as on any other store.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any, Literal

from shared.errors import HubError, UserError

CARD = "README.md"
UNKNOWN_LICENSE = "unknown"
"""The Hub's word for a license that nobody has stated. Its word `other` claims that there is one."""
_LOG_IN = "`hf auth login`, or set HF_TOKEN to a token of an account that may write there"


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form of a repository's, `owner/name`; nothing is asked of the Hub."""
    return "/" in name and _why_no_name(name) is None


def _why_no_name(name: str) -> str | None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not re-exported

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return str(error)
    return None


def public_name(model: str) -> str:
    """A hub name as it is; of a path, its last part: the rest is of one machine."""
    return model if is_hub_name(model) else Path(model).name


def absolute_paths(tree: Any) -> set[str]:
    """The strings in a JSON tree that are paths of one machine; keys are not looked at."""
    if isinstance(tree, dict | list):
        children = tree.values() if isinstance(tree, dict) else tree
        return {path for child in children for path in absolute_paths(child)}
    return {tree} if isinstance(tree, str) and PurePath(tree).is_absolute() else set()


@dataclass(frozen=True, slots=True)
class Repository:
    """Where files are published.

    Attributes:
        name: `owner/name`. message: of the commits.
        private: a new repository becomes so, one that is there must be so already.
        revision: the branch, which is made where it is not there; None is the repository's default.
    """

    name: str
    kind: Literal["model", "dataset"]
    message: str
    private: bool = True
    revision: str | None = None

    def check(self) -> None:
        """Refuse what need not wait for a long validation or upload. One question to the Hub, and nothing is changed.

        Raises:
            HubError: if the name has another form, nobody is logged in, the Hub cannot be reached, or the repository
                is there with another visibility.
        """
        why = _why_no_name(self.name)
        if why is not None or "/" not in self.name:
            raise HubError(
                f"{self.name!r} is no name of a repository{'' if why is None else f' ({why})'}; expected OWNER/NAME"
            )
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import RepositoryNotFoundError

        if get_token() is None:
            raise HubError(f"{self.name} cannot be written to: nobody is logged in on this machine; use {_LOG_IN}")
        with self._explained():
            try:
                is_private = HfApi().repo_info(self.name, repo_type=self.kind).private
            except RepositoryNotFoundError:
                return
        if is_private != self.private:
            seen, asked = ("private", "--public") if is_private else ("public", "--private, the default,")
            raise HubError(
                f"{self.name} is there already and {seen}, but {asked} was asked for; give --{seen}, or change it on "
                "the repository's settings page first"
            )

    def push(self, files: Mapping[str, Path | str], last: Sequence[str] = (), replaced: Sequence[str] = ()) -> str:
        """Commit exactly `files` (a path, or a text), and make the repository where it is not there.

        Args:
            files: by name; the card is one of them.
            last: names that are committed when everything else is there.
            replaced: patterns of files that are deleted where `files` does not have them.

        Returns:
            the repository's address.

        Raises:
            HubError: if the Hub refuses anything or cannot be reached.
        """
        from huggingface_hub import HfApi, RepoCard

        api = HfApi()
        with self._explained(), tempfile.TemporaryDirectory(prefix="llada-drafter-push-") as staged:
            for name, content in files.items():
                path = Path(staged, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Path):
                    path.symlink_to(content.resolve())
                else:
                    path.write_text(content, encoding="utf-8")
            # A license that the Hub does not know should not be found after hours of upload.
            RepoCard(Path(staged, CARD).read_text(encoding="utf-8")).validate(self.kind)
            url = api.create_repo(self.name, repo_type=self.kind, private=self.private, exist_ok=True)
            if self.revision is not None and not self.revision.startswith("refs/"):
                api.create_branch(self.name, repo_type=self.kind, branch=self.revision, exist_ok=True)
            upload = partial(
                api.upload_folder,
                repo_id=self.name,
                repo_type=self.kind,
                folder_path=staged,
                revision=self.revision,
                commit_message=self.message,
            )
            upload(ignore_patterns=[*last], delete_patterns=[*replaced])
            if last:
                upload(allow_patterns=[*last])
        return str(url)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # the client raises what its libraries raise, of many kinds
            said = " ".join(str(error).split())
            causes = [error, error.__cause__, getattr(error.__cause__, "__cause__", None)]
            statuses = {getattr(getattr(cause, "response", None), "status_code", None) for cause in causes}
            if statuses & {401, 403}:
                fix = f"use {_LOG_IN}"
            elif isinstance(error, ValueError):
                fix = "correct what it names"
            else:
                fix = "run the same command again: what has arrived is not sent again"
            raise HubError(f"the push to {self.name} failed: {said}; {fix}") from error
