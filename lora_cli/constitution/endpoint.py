"""The client of a chat-completions endpoint: one request, again where that can help, or one line that says why not.

The only file of the package that opens a connection of its own, and only to the address that the recipe names: it
follows no redirect and uses no proxy. The key is sent as a header and replaced by *** in whatever comes back.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import math
import random
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from lora_cli.errors import InputError, ResourceError
from lora_cli.recipe.constitution_block import URL

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds: the waits between attempts double from the first to the longest."""
MOST_PATIENCE = 900.0
"""Seconds: an endpoint that wants to be left alone for longer is not waited for."""
MAX_ANSWER = 16 * 2**20
"""Bytes of an answer that are read."""
_AGAIN = frozenset({408, 409, 425, 429})
_ADVICE = {
    401: "look at the key in the variable that key_from names",
    403: "look at the key in the variable that key_from names, and what it is allowed",
    404: "look at url and model",
}


class TooLong(Exception):
    """The endpoint says that a conversation does not fit into the model."""


class NoLogprobs(Exception):
    """The endpoint refuses to give log-probabilities."""


class _Again(Exception):
    """An attempt failed in a way that another one may not; `wait` is how long the endpoint wants to be left alone."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Client:
    """Posts requests to the endpoint at `url`; `place` is the recipe's block, for messages."""

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        place: str,
        timeout: float,
        retries: int,
        log: Callable[[str], None],
    ) -> None:
        match = URL.fullmatch(url)
        assert match is not None
        self._scheme, self._host, path = match[1], match[2], (match[3] or "").rstrip("/")
        self._path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
        self._key, self._place, self._timeout, self._retries, self._log = key, place, timeout, retries, log
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._stopped = threading.Event()
        self._jitter = random.Random()

    @property
    def _name(self) -> str:
        return f"{self._place}.url: {self._scheme}://{self._host}{self._path}"

    def stop(self) -> None:
        """End every wait; what is under way is still answered, or times out."""
        self._stopped.set()

    def wait(self, seconds: float) -> None:
        """Wait, unless the client was stopped."""
        self._stopped.wait(seconds)

    def post(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the endpoint's answer to a request, an object.

        Raises:
            InputError: it refuses the request in a way that no further attempt would change.
            ResourceError: it did not answer soundly in any attempt, wants to be left alone for too long, or says that
                its quota is used up.
            TooLong: the conversation does not fit into its model.
            NoLogprobs: it does not give log-probabilities.
        """
        content = json.dumps(body).encode()
        if self._stopped.is_set():
            raise ResourceError(f"{self._name}: was given up (the same command goes on where it stood)")
        for attempt in range(self._retries + 1):
            try:
                return self._once(content)
            except _Again as fault:
                self._patience(fault, attempt)
        raise AssertionError

    def _patience(self, fault: _Again, attempt: int) -> None:
        """Wait for the next attempt.

        Raises:
            ResourceError: there is none.
        """
        if attempt == self._retries or self._stopped.is_set():
            raise ResourceError(
                f"{self._name}: {fault}, in {attempt + 1} attempts (the same command goes on where it stood)"
            )
        # Drawn, so that requests that failed together do not come back together.
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * self._jitter.uniform(0.5, 1.0)
        if fault.wait is not None:
            if fault.wait > MOST_PATIENCE:
                raise ResourceError(
                    f"{self._name}: {fault}, and wants to be left alone for {fault.wait:.0f} s (the same command goes"
                    " on where it stood)"
                )
            wait = max(wait, fault.wait)
        self._log(f"{self._place}: {fault}; next attempt in {wait:.1f} s")
        self.wait(wait)

    def _once(self, content: bytes) -> dict[str, Any]:
        try:
            status, headers, raw = self._exchange(content)
        except TimeoutError:
            raise _Again(f"no answer within {self._timeout:g} s") from None
        except ssl.SSLCertVerificationError as error:
            raise InputError(
                f"{self._name}: its certificate is not valid: {error.verify_message} (look at url)"
            ) from None
        except (http.client.HTTPException, OSError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
            raise _Again(f"the connection failed: {reason}") from None
        text = self._without_key(raw.decode("utf-8", "replace"))
        try:
            # No JSON has NaN or Infinity, and no file of ours takes them.
            value = json.loads(text, parse_constant=lambda _: None, parse_float=_finite)
        except (ValueError, RecursionError):
            value = None
        if status == 200:
            if not isinstance(value, dict):
                raise _Again("the answer is no JSON object")
            return value
        raise self._refusal(status, headers, value, text)

    def _exchange(self, content: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Return status, headers and body of one request; all of it has to come within the time-out."""
        until = time.monotonic() + self._timeout
        if self._scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                self._host, timeout=self._timeout, context=ssl.create_default_context()
            )
        else:
            connection = http.client.HTTPConnection(self._host, timeout=self._timeout)
        try:
            connection.request("POST", self._path, body=content, headers=self._headers)
            response = connection.getresponse()
            raw = b""
            # Piece by piece: the time-out of a socket begins anew with every byte of an endpoint that trickles.
            while piece := response.read1(65536):
                raw += piece
                if time.monotonic() > until:
                    raise TimeoutError
                if len(raw) > MAX_ANSWER:
                    raise _Again(f"the answer is larger than {MAX_ANSWER:,} bytes")
            return response.status, {name.lower(): value for name, value in response.getheaders()}, raw
        finally:
            connection.close()

    def _refusal(self, status: int, headers: Mapping[str, str], value: Any, text: str) -> Exception:
        """Return the fault that an answer other than 200 means."""
        said, code = _message(value, text)
        lower = f"{code} {said}".lower()
        if code == "insufficient_quota":
            return ResourceError(f"{self._name}: answered {status}: {said} (the same command goes on later)")
        if status in _AGAIN or status >= 500:
            return _Again(f"answered {status}{f': {said}' if said else ''}", retry_after(headers))
        if status in (400, 413, 422):
            if "context_length" in lower or "maximum context length" in lower:
                return TooLong(said)
            if "logprob" in lower:
                return NoLogprobs(said)
        if 300 <= status < 400:
            return InputError(
                f"{self._name}: answered {status}, a redirect, which is not followed (write the address it leads to)"
            )
        advice = _ADVICE.get(status, "look at the keys of the block")
        return InputError(f"{self._name}: answered {status}: {said or 'nothing'} ({advice})")

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that Retry-After asks for, as a number or a date (RFC 9110, section 10.2.3); None for none."""
    text = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def require_key(variable: str | None, environment: Mapping[str, str], place: str) -> str | None:
    """Return the key that the recipe's variable holds; None where it names none.

    Raises:
        InputError: the variable is not set, or holds what no header can.
    """
    if variable is None:
        return None
    key = environment.get(variable, "").strip()
    if not key:
        raise InputError(
            f"{place}.key_from: the variable {variable} is not set (set it to the endpoint's key)"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(
            f"{place}.key_from: the variable {variable} holds what is no key (look at its value)"
        )
    return key


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _message(value: Any, text: str) -> tuple[str, str]:
    """Return what an error answer says in a line, and its code, as OpenAI's protocol or a plain text has them."""
    error = value.get("error", value) if isinstance(value, dict) else None
    if isinstance(error, dict):
        said = error.get("message") or error.get("detail") or ""
        code = error.get("code") or error.get("type") or ""
    else:
        said, code = error if isinstance(error, str) else text, ""
    return " ".join(str(said).split())[:300], str(code)
