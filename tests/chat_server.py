"""A server on the loopback that speaks the OpenAI chat protocol, and misbehaves on purpose.

An answer depends on the messages, the seed and the model's name alone, so runs can be compared byte by byte.
"""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def answer(body: dict) -> str:
    """What the model says: scores if a judge is asked, else a few words."""
    prompt = body["messages"][-1]["content"]
    key = json.dumps([body["messages"], body.get("seed"), body["model"]])
    digest = hashlib.sha256(key.encode()).digest()
    if "impartial AI judge" in prompt:
        names = [line.split(":")[0][3:] for line in prompt.splitlines()[1:3]]
        return json.dumps({name: digest[i] % 10 + 1 for i, name in enumerate(names)})
    return f"answer {digest.hex()[:12]}\nin two lines, ü"


def whole_answer(content, reason: str | None = "stop", **message) -> dict:
    """The JSON of an answer; further fields of its message."""
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": content} | message}
    usage = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
    return {"id": "x", "choices": [choice], "usage": usage}


BODIES = {  # of answers that are none, with status 200
    "garbage": b"<html>proxy error</html>",
    "shapeless": b'{"choices": []}',
    "null": json.dumps(whole_answer(None, None)).encode(),
    "aborted": json.dumps(whole_answer("half an", "abort")).encode(),
    "short": json.dumps(whole_answer("half an", "insufficient_system_resource")).encode(),  # DeepSeek
    "nested": b"[" * 100_000,
    "error": b'{"error": {"message": "upstream has \\u001b[31mfallen", "code": 502}}',
}
TROUBLE = ("429", "500", "503", "cut", "reset", "slow", "drip", "drip_head", *BODIES)


class ChatServer:
    """Serves until `close`. script(number, body) tells what happens to a request.

    "ok", one of TROUBLE, an HTTP status as text, (status, JSON) or JSON, which is sent as it is. `received` has
    every request's path, headers and body, `most` how many were under way at a time. models: the entries of
    /v1/models; None: there is no such list.
    """

    def __init__(self, script=lambda number, body: "ok", models=None):
        self.script, self.models = script, models
        self.received, self.most, self.under_way = [], 0, 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                if outer.models is None:
                    self.reply(404, b'{"error": {"message": "no such page"}}')
                else:
                    self.reply(200, json.dumps({"object": "list", "data": outer.models}).encode())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.under_way += 1
                    outer.most = max(outer.most, outer.under_way)
                    number = len(outer.received)
                    outer.received.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                try:
                    self.act(outer.script(number, body), body)
                finally:
                    with outer.lock:
                        outer.under_way -= 1

            def act(self, what, body: dict):
                whole = json.dumps(whole_answer(answer(body))).encode()
                if what == "slow":
                    time.sleep(2)
                if what == "reset":
                    self.close_connection = True
                    self.connection.close()
                elif what == "cut":
                    self.reply(200, whole[: len(whole) // 2], length=len(whole))
                    self.close_connection = True
                elif what in ("drip", "drip_head"):  # never idle for long, and never done
                    self.close_connection = True
                    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n"
                    self.wfile.write(head if what == "drip" else head[:9])
                    for byte in (whole if what == "drip" else head[9:])[:40]:
                        time.sleep(0.05)
                        self.wfile.write(bytes([byte]))
                elif isinstance(what, str) and what in BODIES:
                    self.reply(200, BODIES[what])
                elif isinstance(what, str) and what.isdigit():
                    key = self.headers["Authorization"]
                    message = json.dumps({"error": {"message": f"status {what} for {key}"}}).encode()
                    self.reply(int(what), message, **{"Retry-After": "0"} if what == "429" else {})
                elif what == "ok":
                    self.reply(200, whole)
                else:
                    status, content = what if isinstance(what, tuple) else (200, what)
                    self.reply(status, content if isinstance(content, bytes) else json.dumps(content).encode())

            def reply(self, status: int, content: bytes, length: int | None = None, **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content) if length is None else length))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def handle_error(self, *_):  # a client that has gone
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    __exit__ = close

    def __enter__(self):
        return self
