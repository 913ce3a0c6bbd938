"""A real HTTP server on loopback that speaks chat completions, and misbehaves as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Body = dict[str, Any]
Answer = Callable[[Body], Body]


def said(content: str, **choice: Any) -> Body:
    """Return an answer with this text."""
    return {
        "choices": [
            {"message": {"role": "assistant", "content": content}, "finish_reason": "stop", **choice}
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 4},
    }


def letters(a: float, b: float) -> Body:
    """Return an answer whose first token has these log-probabilities of A and of B."""
    listed = [{"token": "A", "logprob": a}, {"token": "B", "logprob": b}, {"token": "x", "logprob": -30.0}]
    return said("A" if a > b else "B", logprobs={"content": [{"token": "A", "top_logprobs": listed}]})


class ChatServer:
    """Answers by `answer`; each fault of `faults` is used up by one request.

    A fault is a status with headers and body, or one of: hang (longer than `patience`), close (no answer), cut (half an
    answer), trickle (a byte at a time), broken (no JSON).
    """

    def __init__(self, answer: Answer | None = None, *, patience: float = 1.0) -> None:
        self.answer = answer or (lambda body: said("An answer."))
        self.faults: list[Any] = []
        self.patience, self.delay = patience, 0.0
        self.bodies: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer._serve(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *fault: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.times.append(time.monotonic())
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            self.paths.append(handler.path)
            fault = self.faults.pop(0) if self.faults else None
        time.sleep(self.delay)
        handler.close_connection = True
        with suppress(OSError):  # the client has gone
            self._reply(handler, body, fault)

    def _reply(self, handler: BaseHTTPRequestHandler, body: Body, fault: Any) -> None:
        whole = json.dumps(self.answer(body)).encode() if fault is None or isinstance(fault, str) else b""
        if fault is None:
            _send(handler, 200, {}, whole)
        elif fault == "hang":
            time.sleep(self.patience)
        elif fault == "broken":
            _send(handler, 200, {}, b'{"choices": [{"mess')
        elif fault == "cut":
            _send(handler, 200, {"Content-Length": str(len(whole))}, whole[: len(whole) // 2])
        elif fault == "trickle":
            _send(handler, 200, {"Content-Length": str(len(whole))}, b"")
            for byte in whole:
                handler.wfile.write(bytes([byte]))
                time.sleep(0.05)
        elif fault != "close":
            status, headers, content = fault
            _send(handler, status, headers, json.dumps(content).encode())


def _send(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(content)), "Connection": "close"} | headers).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)
    handler.wfile.flush()
