"""Templates are other people's programs: what one must not do is refused on one line, and in time."""

from __future__ import annotations

import resource
import signal
import threading
import time
from typing import Any

import pytest
from template_oracles import SHAPES, base_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from lora_cli.data.sandbox import DATE, OUTPUT, ChatTemplate
from lora_cli.data.special import find_terminators, settle_special_tokens, template_of
from lora_cli.data.templates import read_template, with_template
from lora_cli.errors import InputError
from lora_cli.recipe.data_block import TEMPLATES

CHAT = [{"role": "user", "content": "hi"}]


def render(source: str) -> str | Exception:
    """Return what a template makes of one question, or what it raises for it."""
    (found,) = ChatTemplate(source, "x.jinja", {"eos_token": "</s>"}).render(
        [(CHAT, [])], generation_prompt=True
    )
    return found


FORBIDDEN = {
    "class": "{{ ''.__class__ }}",
    "item": "{{ ''['__class__'] }}",
    "filter": "{{ ''|attr('__class__') }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format": "{{ '{0.__class__}'.format(1) }}",
    "map": "{{ messages|map(attribute='__class__')|list }}",
    "groupby": "{{ messages|groupby('__class__') }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "function": "{{ raise_exception.__globals__ }}",
    "self": "{{ self.__dict__ }}",
    "namespace": "{% set ns = namespace(__class__=1) %}",
    "set in namespace": "{% set ns = namespace() %}{% set ns.__call__ = 1 %}",
    "change": "{{ messages.append(1) }}",
    "change of a turn": "{{ messages[0].update({'role': 'x'}) }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'os' as os %}",
    "range": "{{ range(10**9) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("name", list(FORBIDDEN))
def test_what_the_sandbox_hides_is_an_error(name):
    """An attribute, change or file out of bounds is not rendered as nothing: it is an error of the conversation."""
    assert isinstance(render(FORBIDDEN[name]), Exception)
    assert CHAT == [{"role": "user", "content": "hi"}]


BOMBS = {
    "endless loop": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "does not end within 2 s",
    ),
    "small pieces": ("{% for a in range(99999) %}{{ 'x' * 10000 }}{% endfor %}", "writes more than 50 MB"),
    "100 GB": ("{{ 'x' * 10**11 }}", "needs more than 1024 MB of memory"),
    "doubling": (
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "needs more than 1024 MB of memory",
    ),
    "padding": ("{{ '%100000000000d' % 1 }}", "needs more than 1024 MB of memory"),
}


@pytest.mark.parametrize("name", list(BOMBS))
def test_a_template_that_takes_too_much_is_stopped(name):
    """Endless loops and huge outputs end within seconds in one line; limits and signals are as they were before."""
    source, message = BOMBS[name]
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    began = time.process_time()
    with pytest.raises(InputError, match=rf"x\.jinja: .*{message}") as error:
        render(source)
    assert time.process_time() - began < 4
    assert len(error.value.lines) == 1
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_the_work_of_other_threads_is_not_counted():
    """A rendering is timed by its own thread: one that computes beside it does not use up its time."""
    done = threading.Event()

    def compute() -> None:
        while not done.is_set():
            sum(range(10_000))

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        long = "{% for a in range(900) %}{% for b in range(900) %}{% endfor %}{% endfor %}ok"
        assert [render(long) for _ in range(3)] == ["ok"] * 3
    finally:
        done.set()
        thread.join()


def test_a_large_conversation_is_no_bomb():
    """An output just below the cap is rendered whole."""
    assert len(str(render("{% for a in range(490) %}{{ 'x' * 100000 }}{% endfor %}"))) == 49_000_000 < OUTPUT


SAME = [
    "{{ bos_token }}|{{ eos_token }}|{{ nothing }}|{{ messages|tojson }}|{{ messages|tojson(indent=2) }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% break %}{% endfor %}x",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "{% set ns = namespace(a=1) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}",
    "{{ dict(a=1) }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}",
    "  {%- if true %}\n  a\n  {% endif %}\n b \n",
    "{{ '<é>&' }}{{ {'a': '<é>'} | tojson }}{{ messages[0].get('x', 'y') }}{{ messages[0].items()|list }}",
]


@pytest.mark.parametrize("source", SAME)
def test_what_a_template_is_given_is_what_transformers_gives_it(source):
    """Functions, filters, variables and the handling of white space are those of apply_chat_template."""
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    (ours,) = ChatTemplate(source, "x", tokens).render([(CHAT, [])], generation_prompt=True)
    theirs, _ = render_jinja_template([CHAT], chat_template=source, add_generation_prompt=True, **tokens)
    assert ours == theirs[0]


def test_the_date_is_always_the_same():
    """A template that writes the date gets one day, so that tokens do not depend on when they were made."""
    assert render("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024" == DATE.strftime("%d %b %Y")


def test_a_syntax_error_names_file_line_and_reason():
    """The line is the template's own."""
    with pytest.raises(InputError, match=r"^x\.jinja:3: the chat template fails: .*'endfor'.*"):
        ChatTemplate("a\n\n{% for m in messages %}", "x.jinja", {})


def with_named(name: str, **changes: Any) -> Any:
    """Return the tokenizer of a shape of ours with the template called `name`."""
    return with_template(base_tokenizer(SHAPES["llama2"]), name, **changes)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_template_is_a_copy_and_ends_answers(name):
    """Each of ours works with a tokenizer that has its tokens, begins with one begin token, and leaves it as it was."""
    tokenizer = base_tokenizer(SHAPES["llama2"])
    changed = with_template(tokenizer, name)
    assert tokenizer.chat_template is None
    assert changed.chat_template.startswith("{{- bos_token -}}\n")
    assert len(settle_special_tokens(changed, name)[1]) == 1 + (
        name in ("chatml", "llama3", "gemma", "phi", "qwen")
    )
    assert not with_template(base_tokenizer(SHAPES["zephyr"]), name).chat_template.startswith("{{- bos")


@pytest.mark.parametrize(
    ("name", "missing"),
    [("chatml", "<|im_start|>, <|im_end|>"), ("gemma", "<start_of_turn>, <end_of_turn>"), ("alpaca", "")],
)
def test_missing_control_tokens_are_named(name, missing):
    """A template that needs control tokens is refused for a tokenizer without them; plain text ones are not."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>")
    if not missing:
        changed = with_template(tokenizer, name)
        assert find_terminators(changed, template_of(changed, name)).last == tokenizer.eos_token
        return
    with pytest.raises(InputError, match="the tokenizer lacks its control tokens") as error:
        with_template(tokenizer, name)
    assert missing in error.value.lines[0]


def test_a_file_is_taken_as_it_is(tmp_path):
    """A path names the file's text; what lies beside an adapter stands in for one that is gone."""
    file, text = tmp_path / "my.jinja", "{{ messages }}é\n"
    file.write_text(text, encoding="utf-8")
    assert with_named(str(file)).chat_template == text
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "chat_template.jinja").write_text("theirs", encoding="utf-8")
    assert with_named(str(file), adapter=adapter).chat_template == text
    assert with_named("auto", adapter=adapter).chat_template == "theirs"
    assert with_named("chatml", adapter=adapter).chat_template != "theirs"
    assert with_named("plain", adapter=adapter).chat_template is None
    file.unlink()
    assert with_named(str(file), adapter=adapter).chat_template == "theirs"
    with pytest.raises(InputError, match="cannot be read: No such file"):
        with_named(str(file))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe{", "is not UTF-8 at byte 0"), (b" \n", "is empty"), (b"x" * 1_000_001, "larger than 1 MB")],
)
def test_a_file_that_is_no_template_is_refused(tmp_path, content, message):
    """Encoding, emptiness and size are checked."""
    (tmp_path / "my.jinja").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_template(str(tmp_path / "my.jinja"))
