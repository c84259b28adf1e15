"""A stand-in for the Hub on loopback: repositories of small files, in memory.

>>> with Hub() as hub:
...     hub.environment              # what a process needs to use it
...     hub.files["me/delta"]        # after a push: {"README.md": b"...", ...}
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Requests)
        self.files = {}
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)

    @property
    def environment(self):
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_token",
            "HF_HUB_DISABLE_XET": "1",
        }

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()


class Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            self.server.files.setdefault(repo, {})
            self.answer_json({"url": f"{self.server.environment['HF_ENDPOINT']}/{repo}", "id": repo})
        elif path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer_json({"files": files})
        elif "/commit/" in path:
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer_json({"commitUrl": f"/{repo}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer(404, b"")

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        repo, resolve, file = path.removeprefix("/").partition("/resolve/")
        model = path.removeprefix("/api/models/").partition("/revision/")[0]
        if resolve and file.partition("/")[2] in self.server.files.get(repo, {}):
            self.answer(200, self.server.files[repo][file.partition("/")[2]])
        elif path.startswith("/api/models/") and model in self.server.files:
            siblings = [{"rfilename": file} for file in self.server.files[model]]
            self.answer_json({"id": model, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})
        else:
            self.answer(404, b"", "EntryNotFound" if repo in self.server.files else "RepoNotFound")

    do_HEAD = do_GET

    def answer_json(self, value):
        self.answer(200, json.dumps(value).encode())

    def answer(self, status, content, error=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass
