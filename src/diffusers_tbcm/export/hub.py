"""Pushing a saved student to the Hub: card before weights, weights in one commit, a tag with the step."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from diffusers.utils import logging
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from packaging.version import Version

from ..errors import Failure
from ..files import json_text
from ..lora import GUIDANCE_EMBEDDER_FILE, LORA_FILE
from ..pipeline_folder import CARD, TRAINING_RECORD, license_of
from ..redaction import hide_secrets, redact
from .selection import select_files


logger = logging.get_logger(__name__)

MIN_HUB_VERSION = "1.32"  # the first whose `auth_check` was seen to ask for write access
TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
RETRY_WAITS = (1, 4, 16)  # seconds; the client retries each upload by itself before that
MAX_NAMED = 20  # files that a warning names
T = TypeVar("T")


def prepare_repo(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Create a model repository where it is missing, and check that it can be pushed to.

    Args:
        repo_id: `"owner/name"`, or `"name"` for the token's own user.
        token: with write access; by default the one of `HF_TOKEN` or `hf auth login`.
        private: visibility of a repository that is created; None for the owner's default.

    Returns:
        The repository's full id.

    Raises:
        ValueError: where `repo_id` is none, or the token is missing, invalid or not allowed to write there.
        RuntimeError: where the Hub cannot be reached, or huggingface_hub is too old to ask it.
    """
    _check_no_token(repo_id=repo_id)
    with _explained_errors(repo_id):
        validate_repo_id(repo_id)
    installed = huggingface_hub.__version__
    if Version(installed) < Version(MIN_HUB_VERSION):
        raise Failure(f"pushing needs huggingface_hub {MIN_HUB_VERSION}; {installed} is installed: update it")
    api = HfApi(token=_checked_token(token))
    with _explained_errors(repo_id):
        user = _retry(api.whoami)["name"]
        repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
        try:
            _retry(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        except HfHubHTTPError as error:
            if error.response.status_code in (402, 403):
                raise ValueError(
                    f"repo_id {repo_id!r} does not exist, and the token of {user!r} may not create it: choose a"
                    " repository of your own, or have it created"
                ) from error
            raise
        _retry(lambda: api.auth_check(repo_id, write=True))
    return repo_id


def push_pipeline_to_hub(
    folder: str | PathLike[str],
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    license: str | None = None,
    tag: str | None = None,
    include_training_state: bool = False,
) -> str:
    """Push a saved student, a pipeline or LoRA adapters, so that its repository is at no time without card or in part.

    A repository without a card gets it in a commit of its own. Everything else is one commit, on top of the one that
    was the last when the push began: after another's push in between there is an error and no such commit. Uploads
    that a lost connection interrupted go on where they were; pushing again sends only what has changed. Pushed is what
    `selection` lists: the files that a pipeline's components or LoRA adapters consist of, card, records and licence,
    and the pictures that the card shows, without paths of this machine and secrets. A warning names what is left out.
    Files of components that the folder no longer has are deleted, and so is the guidance embedder of other adapters.
    The card and the training record that are pushed name `repo_id`; the folder stays as it is.

    Args:
        folder: saved by `save_student_pipeline` or `save_student_lora`.
        repo_id: `"owner/name"`, or `"name"` for the token's own user; created where it is missing.
        token: with write access; by default the one of `HF_TOKEN` or `hf auth login`.
        private: visibility of a repository that is created; None for the owner's default.
        license: the Hub's identifier of the licence, such as `"apache-2.0"`, where the card does not name it.
        tag: of the commit, moved if it exists; by default `step-N` where the training record has the step.
        include_training_state: also push the folders `checkpoint-N`, optimiser states too, with the files that their
            manifests list.

    Returns:
        The commit's address.

    Raises:
        ValueError: naming the argument that cannot be pushed or pushed with, and what to do.
        RuntimeError: where the Hub cannot be reached, does not take the push, or another push came between.
    """
    _check_no_token(repo_id=repo_id, license=license, tag=tag)
    folder = Path(folder)
    secrets = [secret.strip() for secret in (token, get_token()) if secret]
    selection = select_files(folder, include_training_state=include_training_state, secrets=secrets)
    files = dict(selection.files)
    license = choose_license(folder, license)
    repo_id = prepare_repo(repo_id, token=token, private=private)
    old_id = folder.resolve().name
    if TRAINING_RECORD in files:
        record = json.loads(_content(files[TRAINING_RECORD]))
        old_id, step = record["model_id"], record["training"].get("steps")
        record |= {"model_id": repo_id, "license": record["license"] or {"license": license}}
        files[TRAINING_RECORD] = json_text(record).encode()
        tag = f"step-{step}" if tag is None and isinstance(step, int) else tag
    card = CommitOperationAdd(CARD, _card_for_repo(_content(files.pop(CARD)), old_id, repo_id, license).encode())
    if selection.left_out:
        names = ", ".join(map(repr, selection.left_out[:MAX_NAMED]))
        more = f" and {len(selection.left_out) - MAX_NAMED} more" if len(selection.left_out) > MAX_NAMED else ""
        logger.warning(f"Not published, as it is no part of a model: {names}{more}")

    api = HfApi(token=_checked_token(token))
    with _explained_errors(repo_id):
        info = _retry(lambda: api.model_info(repo_id))
        there = [sibling.rfilename for sibling in info.siblings or []]
        head = str(info.sha)
        additions = [CommitOperationAdd(path, content) for path, content in files.items()]
        if CARD in there:
            additions.append(card)
        else:
            head = _commit(api, repo_id, [card], head, "Model card")
        components = {path.split("/")[0] for path in files if "/" in path}
        if LORA_FILE in files:  # those of a flow student embed no guidance
            components.add(GUIDANCE_EMBEDDER_FILE)
        gone = [path for path in there if path.split("/")[0] in components and path not in files]
        message = "Student" if tag is None else f"Student, {tag}"
        head = _commit(api, repo_id, [*additions, *map(CommitOperationDelete, gone)], head, message)
        if tag is not None:
            _tag(api, repo_id, tag, head)
    return f"{api.endpoint}/{repo_id}/commit/{head}"


def push_or_warn(folder: str | PathLike[str], repo_id: str, *, token: str | None, license: str | None) -> bool:
    """Push as `push_pipeline_to_hub` does; a push that fails becomes a warning that says how to do it later.

    Args:
        folder, repo_id, token, license: as there.

    Returns:
        Whether it was pushed.
    """
    try:
        print(f"Pushed: {push_pipeline_to_hub(folder, repo_id, token=token, license=license)}")
    except Exception as error:  # whatever the Hub does, the run outlives it
        command = shlex.join(
            ["python", "-m", "diffusers_tbcm", "push", str(folder), repo_id]
            + ([] if license is None else ["--license", license])
        )
        logger.warning(
            f"{folder} was not pushed: {error}\nIt is whole on disk. Push it later:\n  {hide_secrets(command)}"
        )
        return False
    return True


def choose_license(folder: Path, license: str | None) -> str:
    """Choose the licence to publish under: the one that a model's card names, else the one that the user names.

    Args:
        folder: of the student or of its teacher, with a card or without.
        license: the Hub's identifier of the licence, or None.

    Returns:
        The identifier.

    Raises:
        ValueError: where neither names one, or they differ.
    """
    named = license_of(folder / CARD).get("license")
    if named is None and license is None:
        raise ValueError(
            f"license is None, and {str(folder / CARD)!r} names none: give the one that the teacher's terms allow,"
            ' such as license="apache-2.0"'
        )
    if named is not None and license not in (None, named):
        raise ValueError(f"license is {license!r}, but {str(folder / CARD)!r} says {named!r}: change the card")
    return named or str(license)


def _content(file: Path | bytes) -> str:
    return (file.read_bytes() if isinstance(file, Path) else file).decode(errors="replace")


def _card_for_repo(content: str, old_id: str, repo_id: str, license: str) -> str:
    """A card whose examples load `repo_id` where they loaded `old_id`; whatever else it says stays."""
    card = ModelCard(content)
    card.data["license"] = license
    if card.data.get("model_name") == old_id:
        card.data["model_name"] = repo_id
    card.text = re.sub(rf"^# {re.escape(old_id)}$", f"# {repo_id}", card.text, flags=re.MULTILINE)
    card.text = card.text.replace(f'"{old_id}"', f'"{repo_id}"')
    return str(card)


def _commit(
    api: HfApi,
    repo_id: str,
    operations: Sequence[CommitOperationAdd | CommitOperationDelete],
    parent: str,
    message: str,
) -> str:
    """Commit on top of `parent` and no other, whatever the connection does in between; gives the commit's id."""
    interrupted = False

    def commit() -> str:
        nonlocal interrupted
        if interrupted:  # perhaps only the answer was lost
            newest = api.list_repo_commits(repo_id)[:2]
            if newest[0].title == message and newest[-1].commit_id == parent:
                return newest[0].commit_id
        interrupted = True
        return api.create_commit(repo_id, operations, commit_message=message, parent_commit=parent).oid

    return _retry(commit)


def _tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    def set_tag() -> None:
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
        if tags.get(tag) == commit:
            return
        if tag in tags:
            api.delete_tag(repo_id, tag=tag)
        api.create_tag(repo_id, tag=tag, revision=commit)

    _retry(set_tag)


def _check_no_token(**arguments: str | None) -> None:
    """Refuse a token in the place of what is published."""
    for name, value in arguments.items():
        if value is not None and hide_secrets(value) != value:
            raise ValueError(f"{name} holds a token, which would be published: tokens go into HF_TOKEN")


def _checked_token(token: str | None) -> str | None:
    """The token, or the stored one, without a file's end of line; HTTP libraries quote one that cannot be sent."""
    token = get_token() if token is None else token.strip()
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise ValueError("token is empty, or has a space or a character that no token has: copy it again")
    return token


def _retry(call: Callable[[], T]) -> T:
    """Call, again after failures that pass by themselves."""
    for wait in RETRY_WAITS:
        try:
            return call()
        except Exception as error:
            if not _is_transient(error):
                raise
            logger.warning(f"The Hub did not answer ({_reason(error)}): trying again in {wait} s")
            time.sleep(wait)
    return call()


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT_STATUS
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # how the client wraps a failed upload
        return _is_transient(error.__cause__)
    return isinstance(error, HTTPError | ConnectionError | TimeoutError)  # no answer came


def _reason(error: BaseException) -> str:
    """An error in a line, with what it was caused by."""
    cause = f": {_reason(error.__cause__)}" if isinstance(error, RuntimeError) and error.__cause__ else ""
    return redact(f"{type(error).__name__}: {' '.join(str(error).split())}{cause}")


@contextmanager
def _explained_errors(repo_id: str) -> Iterator[None]:
    """Turn what the Hub and its client say into errors that name the argument and what to do."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"repo_id {repo_id!r} is not of the form 'owner/name': {error}") from error
    except LocalTokenNotFoundError as error:
        raise ValueError(
            "token is None and none is stored: give one with write access, set HF_TOKEN or run `hf auth login`"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise ValueError("token is not valid: the Hub does not know it; make one with write access") from error
        if status == 403:
            raise ValueError(
                f"token may not write to repo_id {repo_id!r}: use one with write access there, or another repository"
            ) from error
        if status == 412:
            raise Failure(
                f"repo_id {repo_id!r} was pushed to by somebody else in the meantime; nothing of this push was put"
                " over it. Look at what is there, then push again"
            ) from error
        raise Failure(f"the Hub refused the push to {repo_id!r}: {_reason(error)}") from error
    except (HTTPError, OSError, RuntimeError) as error:
        raise Failure(
            f"the push to {repo_id!r} was interrupted: {_reason(error)}. Push again: what has arrived stays"
        ) from error
