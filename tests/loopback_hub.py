"""A stand-in for the Hugging Face Hub on 127.0.0.1: what `huggingface_hub` asks of it to push and load models.

    with LoopbackHub(tmp_path) as hub:
        subprocess.run(command, env=os.environ | hub.environment())

Everything lives in memory but what Xet clients write: these work on a folder, to which the Hub sends them. Faults are
set by repository before the client starts.
"""

import base64
import hashlib
import json
import math
import re
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from typing import Any
from urllib.parse import unquote

import hf_xet
from loopback_repo import File, Refused, Repo, card_errors, shard_files


DATE = "2025-01-01T00:00:00.000Z"
LARGE_SUFFIXES = (".safetensors", ".bin", ".png")  # what goes to LFS, whatever its size
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Any]]] = []


class LoopbackHub:
    """The server and its state.

    Args:
        folder: where Xet clients keep their store, and clients their caches.
        part_size: bytes above which an LFS upload goes in parts.
    """

    TOKEN, READ_TOKEN, USER, ORG = "hf_loopbackwrite", "hf_loopbackread", "me", "lab"

    def __init__(self, folder: Path, part_size: int = 40_000) -> None:
        self.folder, self.part_size = folder, part_size
        self.repos: dict[str, Repo] = {}
        self.xet_hashes: dict[str, str] = {}  # by sha256
        self.lock = threading.RLock()
        # Faults, by repository: how often they are still to happen.
        self.cut_uploads: dict[str, float] = {}  # an LFS upload is cut off half-way
        self.lost_replies: dict[str, float] = {}  # a commit is made and not answered
        self.rivals: dict[str, float] = {}  # another client commits just before one with weights

    def __enter__(self) -> "LoopbackHub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, *, xet: bool, offline: bool = False) -> dict[str, str]:
        """What a client process needs to be set before it imports `huggingface_hub`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.folder / "client"),
            "HF_HUB_DISABLE_XET": str(int(not xet)),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.repos[repo].at(revision).files.items()}

    def titles(self, repo: str) -> list[str]:
        return [commit.title for commit in self.repos[repo].commits]

    def happens(self, fault: dict[str, float], repo: str) -> bool:
        fault[repo] = fault.get(repo, 0) - 1
        return fault[repo] >= 0

    def large_object(self, repo: Repo, sha256: str) -> bytes:
        """An LFS object; what a Xet client uploaded is put together from its store."""
        if sha256 not in repo.large:
            for shard in (self.folder / "xet").rglob("shards/*.mdb"):
                self.xet_hashes |= shard_files(shard.read_bytes())
            if sha256 not in self.xet_hashes:
                raise Refused(400, f"LFS object {sha256} was never uploaded")
            group = hf_xet.XetSession().new_download_stream_group(endpoint=f"local://{self.folder}")
            repo.large[sha256] = b"".join(group.download_stream(hf_xet.XetFileInfo(self.xet_hashes[sha256], None)))
            assert hashlib.sha256(repo.large[sha256]).hexdigest() == sha256
        return repo.large[sha256]


def route(methods: str, pattern: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what answers a request; the groups of the path's pattern are its arguments."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        ROUTES.append((methods, re.compile(pattern), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        self.content = None
        path = self.path.partition("?")[0]
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        try:
            if self.token not in ("", self.hub.TOKEN, self.hub.READ_TOKEN):
                raise Refused(401, "Invalid credentials in Authorization header")
            for methods, pattern, function in ROUTES:
                match = pattern.fullmatch(path)
                if match and self.command in methods.split():
                    with self.hub.lock:
                        reply = function(
                            self, **{name: unquote(value or "") for name, value in match.groupdict().items()}
                        )
                    break
            else:
                raise Refused(404, f"no route for {self.command} {path}")
        except Refused as refusal:
            return self.send(refusal.status, json.dumps(refusal.body).encode(), refusal.headers)
        if reply is not None:
            self.send(200, *(reply if isinstance(reply, tuple) else (json.dumps(reply).encode(), {})))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.body()  # a connection that is kept has to be read to the end of the request
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass

    def body(self) -> bytes:
        if self.content is None:
            self.content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return self.content

    def cut(self) -> None:
        """Drop the connection without an answer."""
        self.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def find(self, repo: str, *, write: bool = False) -> Repo:
        found = self.hub.repos.get(repo)
        if found is None or (found.private and not self.token):
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write:
            self.check_may_write(repo.split("/")[0])
        return found

    def check_may_write(self, namespace: str) -> None:
        if not self.token:
            raise Refused(401, "Authentication is required")
        if self.token != self.hub.TOKEN or namespace not in (self.hub.USER, self.hub.ORG):
            raise Refused(403, f'You don\'t have the rights to write under the namespace "{namespace}"')

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> dict[str, Any]:
        if not self.token:
            raise Refused(401, "Invalid username or password.")
        return {"type": "user", "name": self.hub.USER, "orgs": [{"name": self.hub.ORG}]}

    @route("POST", "/api/validate-yaml")
    def validate_card(self) -> dict[str, Any]:
        errors = card_errors(json.loads(self.body())["content"])
        if errors:
            raise Refused(400, "Invalid metadata", errors=[{"message": error} for error in errors])
        return {"warnings": []}

    @route("POST", "/api/repos/create")
    def create(self) -> dict[str, Any]:
        wanted = json.loads(self.body())
        namespace = wanted["organization"] or self.hub.USER
        repo = f"{namespace}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{repo}"
        self.check_may_write(namespace)
        if repo in self.hub.repos:
            raise Refused(409, "You already created this model repo", url=url)
        created = self.hub.repos[repo] = Repo(private=wanted.get("visibility") == "private")
        created.commit("initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", large=False)})
        return {"url": url}

    @route("GET", f"/api/models/{REPO}/auth-check(?P<write>/write)?")
    def auth_check(self, repo: str, write: str) -> dict[str, Any]:
        self.find(repo, write=bool(write))
        return {}

    @route("GET", f"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?")
    def model_info(self, repo: str, revision: str) -> dict[str, Any]:
        found = self.find(repo)
        commit = found.at(revision or "main")
        siblings = [{"rfilename": path, "size": len(file.content)} for path, file in commit.files.items()]
        return {"id": repo, "sha": commit.oid, "private": found.private, "lastModified": DATE, "siblings": siblings}

    @route("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
    def tree(self, repo: str, revision: str, folder: str) -> list[dict[str, Any]]:
        listed = []
        for path, file in self.find(repo).at(revision).files.items():
            entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob}
            if file.large:
                entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
                entry["xetHash"] = self.hub.xet_hashes.get(file.sha256)
            if path.startswith(f"{folder}/" if folder else ""):
                listed.append(entry)
        return listed

    @route("GET", f"/api/models/{REPO}/refs")
    def refs(self, repo: str) -> dict[str, Any]:
        found = self.find(repo)
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": found.at("main").oid}
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid} for tag, oid in found.tags.items()]
        return {"branches": [branch], "converts": [], "tags": tags}

    @route("GET", f"/api/models/{REPO}/commits/main")
    def commits(self, repo: str) -> list[dict[str, Any]]:
        history = reversed(self.find(repo).commits)
        return [{"id": c.oid, "title": c.title, "message": "", "date": DATE, "authors": []} for c in history]

    @route("POST DELETE", f"/api/models/{REPO}/tag/(?P<revision>[^/]+)")
    def tag(self, repo: str, revision: str) -> dict[str, Any]:
        found = self.find(repo, write=True)
        if self.command == "DELETE":
            del found.tags[revision]
            return {}
        name = json.loads(self.body())["tag"]
        if name in found.tags:
            raise Refused(409, "Tag reference exists already")
        found.tags[name] = found.at(revision).oid
        return {}

    @route("POST", f"/api/models/{REPO}/preupload/main")
    def preupload(self, repo: str) -> dict[str, Any]:
        there = self.find(repo, write=True).at("main").files
        files = json.loads(self.body())["files"]
        for file in files:
            file["uploadMode"] = "lfs" if file["path"].endswith(LARGE_SUFFIXES) else "regular"
            file["shouldIgnore"] = False
            file["oid"] = there[file["path"]].blob if file["path"] in there else None
        return {"files": files}

    @route("POST", f"/{REPO}\\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str) -> dict[str, Any]:
        found = self.find(repo, write=True)
        objects = json.loads(self.body())["objects"]
        for wanted in objects:
            if wanted["oid"] in found.large:
                continue  # without actions: it is there already
            href = f"{self.hub.endpoint}/lfs/{repo}/{wanted['oid']}"
            header = {}
            if wanted["size"] > self.hub.part_size:
                parts = range(1, math.ceil(wanted["size"] / self.hub.part_size) + 1)
                header = {"chunk_size": str(self.hub.part_size)} | {str(n): f"{href}/{n}" for n in parts}
            verify = {"href": f"{self.hub.endpoint}/lfs/{repo}/verify"}
            wanted["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", f"/lfs/{REPO}/(?P<oid>[0-9a-f]{{64}})(/(?P<part>\\d+))?")
    def lfs_put(self, repo: str, oid: str, part: str) -> tuple[bytes, dict[str, str]] | None:
        if self.hub.happens(self.hub.cut_uploads, repo):
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            return self.cut()
        found = self.hub.repos[repo]
        if part:
            found.parts[oid, int(part)] = self.body()
        else:
            found.large[oid] = self.body()
        found.uploads[self.path] += 1
        return b"", {"ETag": f'"{hashlib.md5(self.body()).hexdigest()}"'}

    @route("POST", f"/lfs/{REPO}/(?P<oid>[0-9a-f]{{64}})")
    def lfs_complete(self, repo: str, oid: str) -> dict[str, Any]:
        found = self.hub.repos[repo]
        numbers = sorted(part["partNumber"] for part in json.loads(self.body())["parts"])
        found.large[oid] = b"".join(found.parts[oid, number] for number in numbers)
        return {}

    @route("POST", f"/lfs/{REPO}/verify")
    def lfs_verify(self, repo: str) -> dict[str, Any]:
        wanted = json.loads(self.body())
        if hashlib.sha256(self.find(repo).large.get(wanted["oid"], b"")).hexdigest() != wanted["oid"]:
            raise Refused(400, "the upload is not what was announced")
        return {}

    @route("GET", f"/api/models/{REPO}/xet-(?P<kind>read|write)-token/[^/]+")
    def xet_token(self, repo: str, kind: str) -> tuple[bytes, dict[str, str]]:
        self.find(repo, write=kind == "write")
        store, expiry = f"local://{self.hub.folder}", 4_000_000_000
        headers = {"X-Xet-Cas-Url": store, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expiry)}
        return json.dumps({"casUrl": store, "accessToken": "xet", "exp": expiry}).encode(), headers

    @route("POST", f"/api/models/{REPO}/commit/main")
    def commit(self, repo: str) -> dict[str, Any] | None:
        found = self.find(repo, write=True)
        header, *operations = (json.loads(line) for line in self.body().splitlines())
        has_weights = any(operation["key"] == "lfsFile" for operation in operations)
        if has_weights and self.hub.happens(self.hub.rivals, repo):
            found.commit("a rival's", found.at("main").files | {"rival.txt": File(b"first", large=False)})
        if header["value"].get("parentCommit", found.at("main").oid) != found.at("main").oid:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(found.at("main").files)
        for operation in operations:
            value = operation["value"]
            match operation["key"]:
                case "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), large=False)
                case "lfsFile":
                    files[value["path"]] = File(self.hub.large_object(found, value["oid"]), large=True)
                case "deletedFile":
                    del files[value["path"]]
        made = found.commit(header["value"]["summary"], files)
        if has_weights and self.hub.happens(self.hub.lost_replies, repo):
            return self.cut()
        return {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{made.oid}", "commitOid": made.oid}

    @route("GET HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, repo: str, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
        commit = self.find(repo).at(revision)
        if path not in commit.files:
            refusal = Refused(404, f"{path} does not exist", "EntryNotFound")
            refusal.headers["X-Repo-Commit"] = commit.oid
            raise refusal
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.blob}"'}
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
            if xet_hash := self.hub.xet_hashes.get(file.sha256):
                tokens = f"{self.hub.endpoint}/api/models/{repo}/xet-read-token/{commit.oid}"
                headers |= {"X-Xet-Hash": xet_hash, "X-Xet-Refresh-Route": tokens}
        return file.content, headers
