"""A model hub on this machine: what huggingface_hub's client needs of one to download and to upload, and plain files beside it.

    with LocalHub() as hub:
        hub.add("owner/name", {"config.json": b"{}"})            # a model; repo_type="dataset" for data
        url = hub.serve("corpus.tsv.gz", b"...")                 # a file without a repository
        hub.interrupt("model.safetensors", after=1000)           # its next answer ends after 1000 bytes
        hub.damage("model.safetensors")                          # from now on, it is not the file that the hub lists
        hub.connect(monkeypatch, tmp_path / "cache")             # for this process; hub.environment(...) for another one
        huggingface_hub.upload_folder(repo_id="me/new", ...)     # after create_repo, with the token hub.token
        hub.files("me/new"), hub.requests

A repository keeps every commit; `main` is the newest. The files of a gated repository, private repositories, uploads and `whoami` need
`Authorization: Bearer hub.token`. As on the real hub, anybody may list the files of a gated repository.
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

TOKEN = "hf_of_the_local_hub"
LARGE = (".safetensors", ".bin", ".npy", ".zip", ".gz", ".tar", ".jsonl")  # stored as LFS objects, known by their SHA-256
API = re.compile(r"/api/(models|datasets)/(?P<id>.+?)(?:/(?P<what>revision|tree|preupload|commit|paths-info)/(?P<rev>[^/]+)(?:/(?P<path>.*))?)?")
RESOLVE = re.compile(r"/(datasets/)?(?P<id>.+?)/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
BATCH = re.compile(r"/(datasets/)?(?P<id>.+?)\.git/info/lfs/objects/batch")


class Request(NamedTuple):
    method: str
    path: str
    range: str | None
    status: int
    sent: int  # bytes of the body
    authorized: bool  # whether a token came with it


@dataclass
class Repository:
    gated: bool = False
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # files by name, of each commit

    def commit(self, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(str(len(self.commits)).encode())
        for name in sorted(files):
            digest.update(name.encode() + b"\0" + files[name])
        self.commits[digest.hexdigest()] = files
        return digest.hexdigest()

    def revision(self, name: str) -> str | None:
        return list(self.commits)[-1] if name == "main" else name if name in self.commits else None


def is_large(name: str) -> bool:
    return name.endswith(LARGE)


def oid(name: str, content: bytes) -> str:
    """The ETag of a file: SHA-256 of an LFS object, Git's SHA-1 of any other file."""
    return hashlib.sha256(content).hexdigest() if is_large(name) else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(name: str, content: bytes) -> dict:
    """A file in a listing."""
    large = {"lfs": {"oid": oid(name, content), "size": len(content), "pointerSize": 130}} if is_large(name) else {}
    return {"type": "file", "path": name, "size": len(content), "oid": oid(name, content)[:40], **large}


class LocalHub:
    token = TOKEN

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}  # by type and id
        self.plain: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}  # uploaded, by SHA-256
        self.requests: list[Request] = []
        self._cuts: list[tuple[str, int]] = []
        self._damaged: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port; a later request is refused as without a network."""
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo_id: str, files: dict[str, bytes] | Path, repo_type: str = "model", gated: bool = False, private: bool = False) -> str:
        """Add a commit with these files, or those of a folder, alone. Returns its hash."""
        if isinstance(files, Path):
            files = {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        repository = self.repositories.setdefault((repo_type, repo_id), Repository(gated, private))
        return repository.commit(dict(files))

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_type, repo_id]
        return repository.commits[repository.revision(revision)]

    def serve(self, path: str, content: bytes) -> str:
        """Serve a file outside of any repository. Returns its URL."""
        self.plain[f"/plain/{path}"] = content
        return f"{self.url}/plain/{path}"

    def interrupt(self, path: str, after: int, times: int = 1) -> None:
        """The next downloads of a file whose path ends so are cut off after this number of bytes."""
        self._cuts += [(path, after)] * times

    def damage(self, path: str) -> None:
        """Files whose path ends so are served with another first byte than they have."""
        self._damaged.append(path)

    def served(self, path: str, content: bytes) -> bytes:
        return bytes([content[0] ^ 1]) + content[1:] if path.endswith(tuple(self._damaged)) else content

    def cut(self, path: str) -> int | None:
        for place, (end, after) in enumerate(self._cuts):
            if path.endswith(end):
                del self._cuts[place]
                return after
        return None

    def downloads(self, path: str) -> list[Request]:
        """The GET requests for a file whose path ends so, in order."""
        return [request for request in self.requests if request.method == "GET" and request.path.endswith(path)]

    def environment(self, cache: Path, token: str | None = None) -> dict[str, str]:
        """The variables with which another process uses this hub and no other."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", **({"HF_TOKEN": token} if token else {}),
        }

    def connect(self, monkeypatch, cache: Path, token: str | None = None) -> None:
        """Make the huggingface_hub of this process use this hub; it reads its variables when it is imported."""
        from huggingface_hub import constants, hf_api

        for name, value in self.environment(cache, token).items():
            monkeypatch.setenv(name, value)
        for name, value in {
            "ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
            "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True, "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"), "HF_TOKEN_PATH": str(cache / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        if token is None:
            monkeypatch.delenv("HF_TOKEN", raising=False)


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub

    def log_message(self, *_: object) -> None:
        pass

    # -- answers

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        """`cut`: the connection ends after this number of bytes of the body."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Connection": "close", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        sent = b"" if self.command == "HEAD" else body[:cut]
        self.hub.requests.append(Request(self.command, self.place, self.headers.get("Range"), status, len(sent), "Authorization" in self.headers))
        self.wfile.write(sent)

    def json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def refuse(self, status: int, code: str) -> None:
        self.json({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    def content(self, content: bytes, headers: dict[str, str]) -> None:
        """The content, or the part of it that the request asks for."""
        content = self.hub.served(self.place, content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        cut = self.hub.cut(self.place) if self.command == "GET" else None
        headers = {"Accept-Ranges": "bytes", **headers}
        if not asked:
            return self.answer(200, content, headers, cut)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first >= len(content):
            return self.answer(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
        return self.answer(206, content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}, cut)

    # -- requests

    @property
    def place(self) -> str:
        return urllib.parse.unquote(self.path.partition("?")[0])

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def find(self, match: re.Match) -> tuple[Repository, str] | None:
        """The repository and the commit that a path names; None, and an answer, if it may not be read."""
        repository = self.hub.repositories.get(("dataset" if match[1] and match[1].startswith("datasets") else "model", match["id"]))
        if repository is None or (repository.private and not self.known):
            return self.refuse(404 if self.known else 401, "RepoNotFound")
        if repository.gated and "what" not in match.groupdict() and not self.known:
            return self.refuse(401 if "Authorization" not in self.headers else 403, "GatedRepo")
        revision = repository.revision(match["rev"] or "main") if repository.commits else ""
        return self.refuse(404, "RevisionNotFound") if revision is None else (repository, revision)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.place in self.hub.plain:
            content = self.hub.plain[self.place]
            return self.content(content, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})
        if self.place == "/api/whoami-v2":
            return self.json({"name": "me", "type": "user", "orgs": []}) if self.known else self.refuse(401, "Unauthorized")
        if match := RESOLVE.fullmatch(self.place):
            if found := self.find(match):
                content = found[0].commits[found[1]].get(match["path"])
                if content is None:
                    return self.refuse(404, "EntryNotFound")
                return self.content(content, {"ETag": f'"{oid(match["path"], content)}"', "X-Repo-Commit": found[1]})
            return None
        if (match := API.fullmatch(self.place)) and (found := self.find(match)):
            files = found[0].commits.get(found[1], {})
            if match["what"] == "tree":
                inside = f"{match['path']}/" if match["path"] else ""
                listed = [entry(name, content) for name, content in files.items() if name.startswith(inside)]
                return self.json(listed) if listed or not inside else self.refuse(404, "EntryNotFound")
            siblings = []
            for name, content in files.items():
                large = {"lfs": {"sha256": oid(name, content), "size": len(content), "pointerSize": 130}} if is_large(name) else {}
                siblings.append({"rfilename": name, "size": len(content), "blobId": oid(name, content)[:40], **large})
            return self.json({"id": match["id"], "sha": found[1], "siblings": siblings, "private": found[0].private, "gated": found[0].gated})
        return None if match else self.answer(404, b"")

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        right = hashlib.sha256(content).hexdigest() == self.place.removeprefix("/lfs/")
        if right:
            self.hub.objects[self.place.removeprefix("/lfs/")] = content
        self.answer(200 if right else 400, b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.place == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        match = API.fullmatch(self.place)
        if match and match["what"] == "paths-info":
            if found := self.find(match):
                files = found[0].commits[found[1]]
                self.json([entry(name, files[name]) for name in json.loads(body)["paths"] if name in files])
            return None
        if not self.known:
            return self.refuse(401, "Unauthorized")
        if self.place == "/api/repos/create":
            asked = json.loads(body)
            key = (asked.get("type") or "model", f"{asked.get('organization') or 'me'}/{asked['name']}")
            url = {"url": f"{self.hub.url}/{'datasets/' if key[0] == 'dataset' else ''}{key[1]}"}
            if key in self.hub.repositories:
                return self.json({"error": "exists", **url}, 409)
            self.hub.repositories[key] = Repository(private=asked.get("visibility") == "private" or asked.get("private") is True)
            return self.json(url)
        if BATCH.fullmatch(self.place):
            objects = [
                {**one, **({} if one["oid"] in self.hub.objects else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}})}
                for one in json.loads(body)["objects"]
            ]
            return self.json({"transfer": "basic", "objects": objects})
        if match and (found := self.find(match)):
            files = found[0].commits.get(found[1], {})
            if match["what"] == "preupload":
                listed = [file["path"] for file in json.loads(body)["files"]]
                return self.json({"files": [
                    {"path": path, "uploadMode": "lfs" if is_large(path) else "regular", "shouldIgnore": False,
                     **({"oid": oid(path, files[path])} if path in files else {})} for path in listed
                ]})
            commit = found[0].commit(self.changed(dict(files), body))
            return self.json({"commitUrl": f"{self.hub.url}/{match['id']}/commit/{commit}", "commitOid": commit})
        return None if match else self.answer(404, b"")

    def changed(self, files: dict[str, bytes], body: bytes) -> dict[str, bytes]:
        """The files after the operations of a commit, one JSON object per line."""
        for operation in map(json.loads, body.splitlines()):
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif kind in ("deletedFile", "deletedFolder"):
                files = {name: content for name, content in files.items() if name != value["path"] and not name.startswith(f"{value['path'].rstrip('/')}/")}
        return files
