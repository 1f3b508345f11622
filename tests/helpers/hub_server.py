"""A hub on this machine: the few calls that creating a repository and committing to it need."""

import base64
import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants


class Hub:
    """What it holds.

    Attributes:
        repositories: name -> whether it is private, and path -> content of its files.
        licences: repository -> the licence that its card says.
        refuses: the status with which it refuses to commit; 0: it does not.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, tuple[bool, dict[str, bytes]]] = {}
        self.licences: dict[str, str] = {}
        self.refuses = 0
        self.large: dict[str, bytes] = {}
        self.address = ""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, value: object, status: int = 200, **headers: str) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            for name, text in {
                "Content-Type": "application/json",
                "Content-Length": str(len(content)),
                **headers,
            }.items():
                self.send_header(name.replace("_", "-"), text)
            self.end_headers()
            self.wfile.write(content)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                content = b""
                while size := int(self.rfile.readline(), 16):
                    content += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return content
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_GET(self) -> None:  # noqa: N802
            name = re.sub(r"^/api/models/([^/]+/[^/?]+).*", r"\1", self.path)
            if "/tree/" in self.path and name in hub.repositories:
                files = hub.repositories[name][1]
                self.answer(
                    [
                        {"type": "file", "path": p, "size": len(c), "oid": "0"}
                        for p, c in files.items()
                    ]
                )
            elif name in hub.repositories:
                files = [{"rfilename": path} for path in hub.repositories[name][1]]
                self.answer(
                    {
                        "id": name,
                        "siblings": files,
                        "private": hub.repositories[name][0],
                        "sha": "0" * 40,
                    }
                )
            elif name in hub.licences:
                self.answer(
                    {"id": name, "siblings": [], "cardData": {"license": hub.licences[name]}}
                )
            else:
                self.answer(
                    {"error": "not found"},
                    404,
                    X_Error_Code="RepoNotFound",
                    X_Error_Message="not found",
                )

        def do_POST(self) -> None:  # noqa: N802
            content = self.body()
            if self.path == "/api/repos/create":
                made = json.loads(content)
                name = (
                    f"{made['organization']}/{made['name']}"
                    if made.get("organization")
                    else made["name"]
                )
                hub.repositories[name] = (
                    made.get("visibility", "private" if made.get("private") else "public")
                    == "private",
                    {},
                )
                self.answer({"url": f"{hub.address}/{name}", "name": name, "id": name})
            elif self.path.endswith("/preupload/main"):
                asked = json.loads(content)["files"]
                self.answer(
                    {
                        "files": [
                            {
                                "path": file["path"],
                                "uploadMode": "lfs"
                                if file["path"].endswith(".safetensors")
                                else "regular",
                                "shouldIgnore": False,
                                "oid": None,
                            }
                            for file in asked
                        ]
                    }
                )
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {
                        **one,
                        "authenticated": True,
                        "actions": {
                            "upload": {"href": f"{hub.address}/put/{one['oid']}", "header": {}}
                        },
                    }
                    for one in json.loads(content)["objects"]
                ]
                self.answer({"transfer": "basic", "objects": objects})
            elif self.path.endswith("/commit/main"):
                if hub.refuses:
                    self.answer({"error": "no"}, hub.refuses)
                    return
                name = re.sub(r"^/api/models/([^/]+/[^/?]+).*", r"\1", self.path)
                files = hub.repositories[name][1]
                for line in content.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                    elif entry["key"] == "lfsFile":
                        files[entry["value"]["path"]] = hub.large[entry["value"]["oid"]]
                address = f"{hub.address}/{name}/commit/{'1' * 40}"
                self.answer(
                    {"success": True, "commitOid": "1" * 40, "commitUrl": address, "hookOutput": ""}
                )
            else:
                self.answer({})

        def do_PUT(self) -> None:  # noqa: N802
            hub.large[self.path.rpartition("/")[2]] = self.body()
            self.answer({})

    return Handler


@contextlib.contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Yields a hub that huggingface_hub takes for the only one."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
