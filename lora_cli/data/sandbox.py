"""A chat template is somebody else's program: it runs in Jinja's immutable sandbox, within caps on time and memory.

What a template is given is what transformers gives it, so a conversation is rendered as `apply_chat_template` renders
it; tests compare the two. We depart from it in three places:

- An attribute that the sandbox hides is refused where it is read. Rendering it as nothing hides what was tried.
- `strftime_now` tells DATE. With today's date (Llama-3 writes it into its header) the tokens of a run would depend on
  the day, and so would its token cache and a resume. At inference the template tells the date of that day.
- A rendering ends after SECONDS of processor time, MEMORY more bytes of address space, or OUTPUT characters. Time is
  the processor's, so that a machine under load, or a process that was stopped for a while, is not mistaken for a loop.
  The timer is a signal, which only a main thread can receive; the memory cap is Linux's.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from types import FrameType
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from lora_cli.errors import InputError

Chat = list[dict[str, Any]]
"""Turns as chat templates take them: `role`, `content`, and what else a message has."""
Tools = Sequence[Mapping[str, Any]]

TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError,
)  # fmt: skip
"""What a template can raise while it is rendered: Jinja's own errors, and Python's from its expressions."""

SECONDS = 2.0
MEMORY = 2**30
OUTPUT = 50_000_000
DATE = datetime(2024, 7, 26)
"""What Llama-3.1's template writes where nothing tells it the date."""
_PAGE = resource.getpagesize()


class _Cap(BaseException):
    """A cap is met; not an Exception, so that nothing in Jinja catches it. The text says which."""


class ChatTemplate:
    """A compiled template with the tokenizer's special tokens; `name` is what it is called in messages.

    Conversations that offer functions are rendered by `with_tools`, where a tokenizer has a template for them.

    Raises:
        InputError: it is no valid template, or compiling it meets a cap.
    """

    def __init__(
        self, source: str, name: str, special_tokens: Mapping[str, Any], with_tools: str | None = None
    ) -> None:
        self.name = name
        self._tokens = dict(special_tokens)
        with _capped(name) as start:
            start()
            try:
                self._template = _compile(source)
                self._with_tools = self._template if with_tools is None else _compile(with_tools)
            except jinja2.TemplateSyntaxError as error:
                raise InputError(
                    f"{name}:{error.lineno}: the chat template fails: {describe(error)} (correct it, or use another"
                    " data.template)"
                ) from error
            except (RecursionError, ValueError, TypeError, SyntaxError) as error:
                raise InputError(f"{name}: the chat template cannot be read: {describe(error)}") from error

    def render(
        self, chats: Iterable[tuple[Chat, Tools]], *, generation_prompt: bool
    ) -> list[str | Exception]:
        """Return the text of each conversation with its tools, or what the template raised for it.

        Raises:
            InputError: a rendering meets a cap.
        """
        results: list[str | Exception] = []
        with _capped(self.name) as start:
            for messages, tools in chats:
                start()
                try:
                    results.append(self._render(messages, tools, generation_prompt))
                except TEMPLATE_ERRORS as error:
                    results.append(error)
        return results

    def _render(self, messages: Chat, tools: Tools, generation_prompt: bool) -> str:
        variables = {
            **self._tokens,
            "messages": messages,
            "tools": [dict(tool) for tool in tools] or None,
            "documents": None,
            "add_generation_prompt": generation_prompt,
        }
        pieces: list[str] = []
        length = 0
        template = self._with_tools if tools else self._template
        for piece in template.root_render_func(template.new_context(variables)):
            pieces.append(piece)
            length += len(piece)
            if length > OUTPUT:
                raise _Cap(f"writes more than {OUTPUT // 1_000_000} MB")
        return "".join(pieces)


def describe(error: Exception) -> str:
    """Return what a template raised, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


@contextmanager
def _capped(name: str) -> Iterator[Callable[[], None]]:
    """Within it time and memory are capped; the function it yields starts the time of one rendering.

    Raises:
        InputError: a cap is met.
    """
    began: float | None = None

    def start() -> None:
        nonlocal began
        began = None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal began
        now = time.thread_time()  # not the timer's, which runs on the processor time of all threads
        if began is None:  # the first tick of this rendering; to read a clock for each would slow them down
            began = now
        elif now - began >= SECONDS:
            raise _Cap(f"does not end within {SECONDS:g} s")

    timed = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGVTALRM, stop) if timed else None
    try:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS / 20, SECONDS / 20)
        with _memory_capped():
            yield start
    except (_Cap, MemoryError) as error:
        what = str(error) if isinstance(error, _Cap) else f"needs more than {MEMORY // 2**20} MB of memory"
        raise InputError(f"{name}: {what} for one conversation (is there an endless loop in it?)") from None
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _memory_capped() -> Iterator[None]:
    used = _address_space()
    if used is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (used + MEMORY, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int | None:
    """Return how many bytes of address space this process has mapped, None where /proc does not tell."""
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)  # a fifth of the time that a Python file takes
    except OSError:
        return None
    try:
        return int(os.read(file, 64).split(maxsplit=1)[0]) * _PAGE
    finally:
        os.close(file)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationMarks, loopcontrols])
    environment.filters["tojson"] = _to_json
    del environment.globals["lipsum"]
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": DATE.strftime,
        "namespace": _Namespace,
        "dict": _make_dict,
    }
    template = environment.from_string(source)
    template.globals = dict(template.globals)  # a plain one: Jinja copies it for each rendering
    return template


class _Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        kind = type(obj).__name__
        raise jinja2.sandbox.SecurityError(f"reads {attribute!r} of a {kind}, which no template may")


class _GenerationMarks(Extension):
    """`{% generation %}` renders what it holds: which text is trained is found without it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """Jinja's, without names that begin with an underscore: Python would take some of them as its own."""

    def __init__(*args: Any, **attributes: Any) -> None:
        self, *given = args
        found = dict(*given, **attributes)
        for name in found:
            _check_name(name)
        Namespace.__init__(self, found)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.sandbox.SecurityError(f"sets {name!r} in a namespace, which no template may")


def _make_dict(*args: Any, **items: Any) -> dict[Any, Any]:
    return dict(*args, **items)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, without the HTML escapes of Jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
