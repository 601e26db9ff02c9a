"""A Hub on the loopback interface, of as much of its protocol as huggingface_hub's client speaks for models.

    with Hub() as hub:
        ...  # processes started with HF_ENDPOINT=hub.url and HF_TOKEN=hub.token

Repositories are made by POST /api/repos/create and filled by commits: small files go along in them, large ones
(`LARGE`) by the LFS batch API, whose objects are kept by hash. Files are read by HEAD and GET of /resolve/, which
redirects to the objects for large ones. What a client asked for and was not understood is in `unknown`.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".png", ".gif")
USER = "user"
NOT_FOUND = {"repo": "RepoNotFound", "revision": "RevisionNotFound", "entry": "EntryNotFound"}


@dataclass
class Repository:
    """Branches and tags name commits; a commit is the bytes of its files, by path."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def commit(self, files, message, branch):
        listing = "".join(f"{path} {oid_of(path, content)}\n" for path, content in sorted(files.items()))
        oid = hashlib.sha1(f"{len(self.commits)}\n{listing}".encode()).hexdigest()
        self.commits[oid] = files
        self.messages.append(message)
        self.names[branch] = oid
        return oid

    def files(self, branch="main"):
        return self.commits[self.names[branch]]


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def oid_of(path, content):
    """What the client compares a local file with: git's hash, or SHA-256 of a large one."""
    return sha256(content) if path.endswith(LARGE) else git_oid(content)


class RefusedError(Exception):
    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Hub:
    """The server, in threads of this process.

    Attributes:
        url: For HF_ENDPOINT.
        token: The only one that it knows.
        repositories: By id.
        cut: Ids whose large files break off half way the first time that they are asked for.
        spoilt: Ids from which large files come with one byte changed, or with ``short`` one byte less, in the second
            half of the file.
        ranges: How often a part of a file was asked for, by id.
        unknown: Requests that had no answer here.
    """

    token = "hf_" + "0" * 34

    def __init__(self):
        self.repositories, self.objects = {}, {}
        self.cut, self.spoilt, self.short, self.lost = set(), set(), set(), set()
        self.ranges, self.already_cut, self.unknown = Counter(), set(), []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        port = self._server.server_port
        self.url, self.storage_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def find(self, name, user, revision=None):
        """The repository and, of a revision, its commit."""
        if (found := self.repositories.get(name)) is None or (found.private and user != USER):
            # The Hub tells nobody without a token which of the two it is.
            status = HTTPStatus.NOT_FOUND if user else HTTPStatus.UNAUTHORIZED
            raise RefusedError(status, "Repository not found", NOT_FOUND["repo"])
        if revision is None:
            return found, None
        oid = found.names.get(revision, revision)
        if oid not in found.commits and not (revision == "main" and not found.commits):
            raise RefusedError(HTTPStatus.NOT_FOUND, f"Invalid rev id: {revision}", NOT_FOUND["revision"])
        return found, oid


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("GET", r"/api/agent-harnesses", "harnesses"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", "tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/(?:branch|tag)/(?P<revision>[^/]+)", "name_revision"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/objects/(?P<oid>[0-9a-f]{64})", "put_object"),
        ("POST", r"/objects/(?P<oid>[0-9a-f]{64})/verify", "verify_object"),
        ("HEAD|GET", r"/objects/(?P<repo>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})", "get_object"),
        ("HEAD|GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *_):
        pass

    def answer(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            self.body = b"".join(self.chunks())
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user = USER if token == self.hub.token else ""
        try:
            if token and not self.user:
                raise RefusedError(HTTPStatus.UNAUTHORIZED, "Invalid credentials in Authorization header")
            for methods, pattern, name in self.ROUTES:
                found = re.fullmatch(pattern, address.path)
                if found and self.command in methods.split("|"):
                    given = {k: v if v is None else unquote(v) for k, v in found.groupdict().items()}
                    getattr(self, name)(**given)
                    return
            self.hub.unknown.append(f"{self.command} {self.path}")
            raise RefusedError(HTTPStatus.NOT_FOUND, f"no such address: {self.path}")
        except RefusedError as refused:
            headers = {"X-Error-Message": refused.message}
            headers |= {"X-Error-Code": refused.code} if refused.code else {}
            self.send(refused.status, json.dumps({"error": refused.message}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815 -- http.server's names

    def chunks(self):
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def send(self, status, content=b"", headers=(), break_after=None):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:break_after])
        if break_after is not None:
            self.close_connection = True

    def send_json(self, found):
        self.send(HTTPStatus.OK, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def json(self):
        return json.loads(self.body)

    def must_own(self, repo):
        if not self.user:
            raise RefusedError(HTTPStatus.UNAUTHORIZED, "Invalid username or password.")
        if repo.partition("/")[0] != USER:
            raise RefusedError(HTTPStatus.FORBIDDEN, f"you have no rights to write to {repo}")

    # ------------------------------------------------------------------------------------------- about repositories

    def whoami(self):
        if not self.user:
            raise RefusedError(HTTPStatus.UNAUTHORIZED, "Invalid username or password.")
        self.send_json({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def harnesses(self):
        self.send_json({"standardEnvVars": [], "harnesses": {}})

    def create(self):
        asked = self.json()
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        self.must_own(repo)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        if repo in self.hub.repositories:
            self.send(HTTPStatus.CONFLICT, json.dumps({"error": "exists", "url": f"{self.hub.url}/{repo}"}).encode())
            return
        self.hub.repositories[repo] = made = Repository(private)
        made.commit({}, "initial commit", "main")
        self.send_json({"url": f"{self.hub.url}/{repo}", "id": repo})

    def validate(self):
        front = re.match(r"---\n(.*?)\n---\n", self.json()["content"], re.DOTALL)
        try:
            found = yaml.safe_load(front[1]) if front else None
            errors = [] if isinstance(found, dict) else [{"message": "metadata is missing"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        status = HTTPStatus.BAD_REQUEST if errors else HTTPStatus.OK
        self.send(status, json.dumps({"errors": errors, "warnings": []}).encode())

    def info(self, repo, revision):
        found, oid = self.hub.find(repo, self.user, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(found.commits[oid])]
        about = {"_id": repo, "id": repo, "modelId": repo, "sha": oid, "private": found.private, "tags": []}
        self.send_json(about | {"siblings": siblings, "downloads": 0, "likes": 0})

    def entries(self, repo, revision):
        found, oid = self.hub.find(repo, self.user, revision)
        for path, content in sorted(found.commits[oid].items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
            yield entry

    def tree(self, repo, revision, path):
        self.send_json([e for e in self.entries(repo, revision) if not path or e["path"].startswith(f"{path}/")])

    def paths_info(self, repo, revision):
        asked = parse_qs(self.body.decode()).get("paths", [])
        self.send_json([entry for entry in self.entries(repo, revision) if entry["path"] in asked])

    def name_revision(self, repo, revision):
        """A branch with this name, or a tag on this revision."""
        self.must_own(repo)
        asked = json.loads(self.body or b"{}")
        name = asked.get("tag", revision)
        start = revision if "tag" in asked else asked.get("startingPoint") or "main"
        found, oid = self.hub.find(repo, self.user, start)
        if name in found.names:
            raise RefusedError(HTTPStatus.CONFLICT, f"Reference already exists: {name}")
        found.names[name] = oid
        self.send_json({})

    # ------------------------------------------------------------------------------------------------------ writing

    def preupload(self, repo, revision):
        self.must_own(repo)
        found, oid = self.hub.find(repo, self.user, revision)
        there = found.commits[oid]
        self.send_json(
            {
                "files": [
                    {
                        "path": (path := asked["path"]),
                        "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                        "oid": oid_of(path, there[path]) if path in there else None,
                    }
                    for asked in self.json()["files"]
                ]
            }
        )

    def lfs_batch(self, repo):
        self.must_own(repo)
        self.hub.find(repo, self.user)
        objects = []
        for asked in self.json()["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/objects/{asked['oid']}"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(entry)
        self.send_json({"transfer": "basic", "objects": objects})

    def put_object(self, oid):
        if sha256(self.body) != oid:
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"the content's hash is {sha256(self.body)}, not {oid}")
        self.hub.objects[oid] = self.body
        self.send(HTTPStatus.OK)

    def verify_object(self, oid):
        asked = self.json()
        if len(self.hub.objects.get(oid, b"")) != asked["size"]:
            raise RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, f"{oid} is not here in a size of {asked['size']}")
        self.send_json({})

    def commit(self, repo, revision):
        self.must_own(repo)
        found, parent = self.hub.find(repo, self.user, revision)
        if revision not in found.names:
            raise RefusedError(HTTPStatus.NOT_FOUND, f"no branch {revision}", NOT_FOUND["revision"])
        files, message = dict(found.commits[parent]), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    raise RefusedError(HTTPStatus.PRECONDITION_FAILED, "a commit has happened since")
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise RefusedError(
                        HTTPStatus.BAD_REQUEST, f"no object {value['oid']} was uploaded for {value['path']}"
                    )
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif kind == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise RefusedError(HTTPStatus.NOT_FOUND, "A file with this name doesn't exist", NOT_FOUND["entry"])
            elif kind == "deletedFolder":
                files = {path: c for path, c in files.items() if not path.startswith(value["path"].rstrip("/") + "/")}
        oid = found.commit(files, message, revision)
        self.send_json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    # ------------------------------------------------------------------------------------------------------ reading

    def resolve(self, repo, revision, path):
        found, oid = self.hub.find(repo, self.user, revision)
        headers = {"X-Repo-Commit": oid}
        if path not in found.commits[oid] or (repo in self.hub.lost and path.endswith(LARGE)):
            headers |= {"X-Error-Code": NOT_FOUND["entry"], "X-Error-Message": "Entry not found"}
            self.send(HTTPStatus.NOT_FOUND, b"Entry not found", headers)
            return
        content = found.commits[oid][path]
        if path.endswith(LARGE):
            headers["X-Linked-Etag"] = f'"{sha256(content)}"'
            headers["X-Linked-Size"] = str(len(content))
            # Another host, as the Hub's storage is: the client would follow a redirect to the same one.
            headers["Location"] = f"{self.hub.storage_url}/objects/{repo}/{sha256(content)}"
            self.send(HTTPStatus.FOUND, b"", headers)
        else:
            self.send(HTTPStatus.OK, content, headers | {"ETag": f'"{git_oid(content)}"'})

    def get_object(self, repo, oid):
        """A large file, which the redirect's address is enough to read, with the faults that are asked for."""
        content, half = self.hub.objects[oid], len(self.hub.objects[oid]) // 2
        if repo in self.hub.spoilt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if repo in self.hub.short:
            content = content[:-1]
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        headers, status, first = {"Accept-Ranges": "bytes", "ETag": f'"{oid}"'}, HTTPStatus.OK, 0
        if start and (first := int(start[1])):
            self.hub.ranges[repo] += 1
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            status = HTTPStatus.PARTIAL_CONTENT
        breaks = self.command == "GET" and repo in self.hub.cut and oid not in self.hub.already_cut
        if breaks:
            self.hub.already_cut.add(oid)
        self.send(status, content[first:], headers, break_after=half if breaks else None)
