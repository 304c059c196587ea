"""What a Hub keeps: repositories of commits, tags and large files, and what it reads in cards and Xet shards."""

import hashlib
import re
import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import ModelCardData


LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")


class Refused(Exception):
    """An answer that is an error: status, message and the header by which clients tell errors apart."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass(frozen=True)
class File:
    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob(self) -> str:
        """What clients compare their own file with, to leave out what has not changed."""
        git_blob = b"blob %d\0" % len(self.content) + self.content
        return self.sha256 if self.large else hashlib.sha1(git_blob).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, File]


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)  # oldest first
    tags: dict[str, str] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # LFS objects by sha256
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    uploads: Counter[str] = field(default_factory=Counter)  # whole LFS requests, by path

    def commit(self, title: str, files: dict[str, File]) -> Commit:
        tree = "".join(f"{path} {file.blob}\n" for path, file in sorted(files.items()))
        parent = self.commits[-1].oid if self.commits else ""
        self.commits.append(Commit(hashlib.sha1(f"{parent}\n{title}\n{tree}".encode()).hexdigest(), title, files))
        return self.commits[-1]

    def at(self, revision: str) -> Commit:
        oid = self.commits[-1].oid if revision == "main" else self.tags.get(revision, revision)
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def shard_files(shard: bytes) -> dict[str, str]:
    """Read a Xet shard's table of files, records of 48 bytes that begin with a hash: Xet hash by sha256."""

    def hash_at(position: int) -> str:
        return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", shard, position))

    found, position = {}, 48
    while shard[position : position + 32] != b"\xff" * 32:
        flags, segments = struct.unpack_from("<II", shard, position + 32)
        end = position + 48 * (1 + segments * (2 if flags & 0x80000000 else 1))
        if flags & 0x40000000:
            found[hash_at(end)] = hash_at(position)
            end += 48
        position = end
    return found


def card_errors(content: str) -> list[str]:
    """What is wrong with a card's metadata, as the Hub sees it."""
    block = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    try:
        data = yaml.safe_load(block[1] if block else "") or {}
        ModelCardData(**data)
    except (yaml.YAMLError, TypeError, ValueError, KeyError) as error:
        return [str(error)]
    errors = [f'"{name}" has to be a list' for name in ("tags", "widget") if not isinstance(data.get(name, []), list)]
    if not LICENSE_ID.fullmatch(str(data.get("license", "mit"))):
        errors.append('"license" is no identifier')
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append('"license_name" is required with "license: other"')
    return errors
