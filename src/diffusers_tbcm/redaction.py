"""Strips from all that is published what is not for others: folders of this machine, users' names, secrets."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Sequence
from typing import Any
from urllib.parse import unquote


HIDDEN = "***"
PUBLIC_SCHEMES = {"doi", "ftp", "git", "hf", "http", "https", "ssh"}  # others lead to files and stores of one's own
HOME = "~"  # in place of a path that ends in a user's name
MIN_SECRET = 8  # characters; shorter values would be found in ordinary words
USER_VARIABLES = ("USER", "LOGNAME", "USERNAME")
FILE_SUFFIXES = (  # with one of these `owner/name` is a file, and no repository
    ".bin", ".ckpt", ".csv", ".gif", ".jpeg", ".jpg", ".json", ".jsonl", ".log", ".md", ".ndjson", ".parquet", ".pkl",
    ".png", ".pt", ".pth", ".py", ".safetensors", ".sh", ".tsv", ".txt", ".webp", ".yaml", ".yml",
)  # fmt: skip

_SECRET_NAME = (
    r"(?<![\w-])(?:--?)?(?!(?:pad|bos|eos|unk|mask|sep|cls|image|new|max|num)[_-])"
    r"[\w-]*(?:token|secret|password|passwd|api[_-]?key|access[_-]?key)"
)
_SECRET_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|(?:API|ACCESS|SECRET)_?KEY)(?:$|_)", re.I)
_SECRETS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\b(?:hf|api_org)_[A-Za-z0-9]{12,}"
    r"|\b(?:gh[oprsu]_|github_pat_|glpat-|pypi-|xox[abprs]-)[A-Za-z0-9_-]{16,}"
    r"|\bsk-(?=[\w-]*\d)[A-Za-z0-9_-]{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b"
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]+\.[\w-]*",
    re.DOTALL,
)
_NAMED_SECRETS = re.compile(
    rf"({_SECRET_NAME}=|\bBearer\s+)[^\s&]+"
    rf"|({_SECRET_NAME.replace('(?:--?)?', '--?')}\s+)(?:(?=\S*\d)\S{{6,}}|\S{{12,}})",  # and no word of a sentence
    re.IGNORECASE,
)
_URL = re.compile(r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]*://[^\s\"'`<>]+)")
_QUERY = re.compile(r"([?&#][\w.-]*(?:token|key|secret|sig|password|credential|auth)[\w.-]*=)[^&\s#]+", re.I)
_NAME = r"(?:\\ |[^\s/\\\"'`<>|])+"  # a part of a path in running text
_START = r"(?<![^\s\"'`=:,;(\[{|>@!&])"
_PATHS = re.compile(
    rf"(?<![\w.+-])[\w.+-]+@[\w.-]+:[~/\w](?:[/\\]*{_NAME})*"  # user@host:path
    rf"|(?<![A-Za-z0-9])[A-Za-z]:[\\/]+{_NAME}(?:[\\/]+{_NAME})*[\\/]*"  # C:\path
    rf"|{_START}\\\\+{_NAME}(?:\\+{_NAME})+\\*"  # \\server\path
    rf"|{_START}(?:\$\{{?[A-Z_]{{3,}}\}}?|%[A-Z_]{{3,}}%)(?:[/\\]+{_NAME})+[/\\]*"  # $HOME/path
    rf"|{_START}~(?:[A-Za-z_][\w.-]*)?(?:/+{_NAME})+/*"  # ~/path
    rf"|{_START}/+{_NAME}(?:/+{_NAME})+/*"  # /path
)
_ENCODED = re.compile(
    r"(?<![\w.%-])(?:[A-Za-z](?::|%3A))?(?:%(?:2F|5C)(?:[^\s%\"'`&<>]|%(?!2F|5C)[0-9A-F]{2})+){2,}", re.IGNORECASE
)
_RELATIVE = re.compile(r"(?<![\w.@+%-])[\w.@+%-]+(?:[/\\]+[\w.@+%-]+)+[/\\]*")
_WHOLE_PATH = re.compile(r"(?:/+|~(?:[A-Za-z_][\w.-]*)?/+|file:/+|[A-Za-z]:[\\/]+|\\\\+)(?=\S)[^\n]*[^\s]")
_QUOTED = re.compile(r"([\"'`])((?:--?[\w-]+=)?)((?:[/~]|[A-Za-z]:[\\/]|\\\\|file:/)[^\"'`\n]*)\1")


def redact(text: str, secrets: Collection[str] = ()) -> str:
    """Strip what is this machine's or secret from a text.

    Of a path outside the working folder, of one with the user's name, of one behind `~`, and of an address that is not
    public, such as `file://`, the last part remains. Addresses lose their credentials, tokens become `***`. Everything
    else stays: addresses, ids of repositories, relative paths.

    Args:
        text: running text, a command line, or a path that may have spaces in it.
        secrets: further ones, such as the token that is used; the environment's are known.

    Returns:
        The text without them.
    """
    text = hide_secrets(text, secrets)
    if _is_path(text):
        return _last_part(text)
    text = _QUOTED.sub(
        lambda match: match[1] + match[2] + (_last_part(match[3]) if _is_path(match[3]) else match[3]) + match[1], text
    )
    text = _ENCODED.sub(lambda match: _last_part(unquote(match[0])), text)
    pieces = _URL.split(text)
    users, own_folders = _users(), _own_folders()
    for index, piece in enumerate(pieces):
        if index % 2:
            pieces[index] = _clean_address(piece)
        else:
            for folder in own_folders:  # their names may have spaces
                own = rf"(?<![\w./~-]){re.escape(folder)}(?:/+{_NAME})*/*(?![\w.-])"
                piece = re.sub(own, lambda match: _last_part(match[0]), piece)
            piece = _PATHS.sub(lambda match: _last_part(match[0]), piece)
            pieces[index] = _RELATIVE.sub(lambda match: _clean_relative(match[0], users), piece)
    return "".join(pieces)


def hide_secrets(text: str, secrets: Collection[str] = ()) -> str:
    """Put `***` in place of tokens, keys and passwords, and leave paths as they are: for messages to the user.

    Args:
        text: running text or a command line.
        secrets: as in `redact`.

    Returns:
        The text without them.
    """
    for secret in sorted({*_environment_secrets(), *secrets}, key=len, reverse=True):
        if len(secret) >= MIN_SECRET:
            text = text.replace(secret, HIDDEN)
    return _NAMED_SECRETS.sub(lambda match: (match[1] or match[2]) + HIDDEN, _SECRETS.sub(HIDDEN, text))


def redact_values(value: Any, secrets: Collection[str] = ()) -> Any:
    """Strip what `redact` does from every text in a JSON value, names of entries included.

    Args:
        value: of a JSON file.
        secrets: as in `redact`.

    Returns:
        The value without them.
    """
    if isinstance(value, str):
        return redact(value, secrets)
    if isinstance(value, dict):
        return {redact(str(name), secrets): redact_values(entry, secrets) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(entry, secrets) for entry in value]
    return value


def redact_command(words: Sequence[str]) -> str:
    """Write a command line that can be published.

    Args:
        words: the program's arguments.

    Returns:
        The line; paths with spaces in them, and behind `--flag=`, are stripped like others.
    """
    line, before = [], ""
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        secret = is_secret(flag) if equals else not flag and is_secret(before)
        line.append(flag + equals + (HIDDEN if secret else redact(value)))
        before = word if word.startswith("-") else ""
    return shlex.join(line).replace(f"'{HIDDEN}'", HIDDEN)


def is_secret(name: str) -> bool:
    """Say whether a setting, flag or environment variable of this name holds a secret."""
    return _SECRET_VARIABLE.search(name.strip("-").replace("-", "_")) is not None


def _environment_secrets() -> list[str]:
    return [value for name, value in os.environ.items() if is_secret(name) and not os.path.isabs(value)]


def _users() -> set[str]:
    """The names by which this machine knows its user, in lower case."""
    names = {os.environ.get(variable, "") for variable in USER_VARIABLES} | {os.path.basename(os.path.expanduser("~"))}
    return {name.lower() for name in names if len(name) > 1}


def _own_folders() -> set[str]:
    """The user's home and the working folder; neither has to be there."""
    try:
        folders = {os.path.expanduser("~"), os.getcwd()}
    except OSError:
        folders = {os.path.expanduser("~")}
    return folders - {"/", "~"}


def _is_path(text: str) -> bool:
    """Whether a text is nothing but a path that is not relative; a folder's name may have spaces inside."""
    parts = re.split(r"[/\\]+", text.strip("/\\"))
    return _WHOLE_PATH.fullmatch(text) is not None and len(parts) > 1 and all(part == part.strip() for part in parts)


def _last_part(path: str) -> str:
    path = re.sub(r"^[\w.+-]+@[\w.-]+:", "", path.replace("\\ ", " "))
    if path.startswith("file:"):
        path = unquote(path)
    *folders, name = re.split(r"[/\\]+", path.rstrip("/\\"))
    in_home = bool(folders) and folders[-1].lower() in ("home", "users")
    return HOME if in_home or name.lower() in _users() or not name else name


def _clean_address(address: str) -> str:
    scheme, _, rest = address.partition("://")
    if not PUBLIC_SCHEMES & {*scheme.lower().split("+")}:
        return _last_part(f"file:/{rest}")
    host, slash, path = rest.partition("/")
    return _QUERY.sub(rf"\1{HIDDEN}", f"{scheme}://{host.rpartition('@')[2]}{slash}{path}")


def _clean_relative(path: str, users: set[str]) -> str:
    """A relative path as it is, unless it leads out of the working folder or through one with the user's name."""
    *folders, name = re.split(r"[/\\]+", path.rstrip("/\\"))
    is_repository = len(folders) == 1 and not name.lower().endswith(FILE_SUFFIXES)
    has_user = any({folder.lower(), *re.split(r"[-_.@+]", folder.lower())} & users for folder in folders)
    if ".." in folders or (has_user and not is_repository):
        return name
    return path
