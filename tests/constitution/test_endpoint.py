"""The client of an endpoint against a real server: faults, waits, refusals, and the key that nobody sees."""

from __future__ import annotations

import email.utils
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import Body, ChatServer, letters, said

from lora_cli.constitution import endpoint
from lora_cli.constitution.ledger import Ledger
from lora_cli.constitution.remote import EndpointVoice, by_votes
from lora_cli.constitution.voice import Asked
from lora_cli.errors import InputError, LoraError, ResourceError
from lora_cli.recipe.schema import Critic
from lora_cli.types import Message

KEY = "a-key-without-any-known-shape"
ASKED = [Asked(f"{row}/critique 0", (Message("user", f"Message {row}."),)) for row in range(6)]


@pytest.fixture()
def server() -> Iterator[ChatServer]:
    """A server that answers."""
    with ChatServer() as started:
        yield started


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin with short waits."""
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.02)


def voice(server: ChatServer, folder: Path, lines: list[str] | None = None, **keys: Any) -> EndpointVoice:
    """Return a voice that asks the server."""
    settings = Critic(
        **{"kind": "endpoint", "url": server.url, "model": "m", "timeout": 0.5, "retries": 2, **keys}
    )
    log = (lines if lines is not None else []).append
    return EndpointVoice(
        settings,
        KEY,
        Ledger(folder / "endpoint.jsonl"),
        place="constitution.critic",
        answer_tokens=7,
        log=log,
    )


def test_a_request_is_what_the_protocol_says(server: ChatServer, tmp_path: Path) -> None:
    """Path, model, messages, bound, temperature and the key's header; answers come in the order of what was asked."""
    server.answer = lambda body: said("To " + body["messages"][0]["content"])
    assert voice(server, tmp_path).answers(ASKED) == [f"To Message {row}." for row in range(6)]
    assert set(server.paths) == {"/v1/chat/completions"}
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "Message 0."}],
        "max_tokens": 7,
        "temperature": 0,
    }
    assert body in server.bodies
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


FAULTS: dict[str, Any] = {
    "hang": "hang", "close": "close", "cut": "cut", "trickle": "trickle", "broken": "broken",
    "429": (429, {}, {"error": {"message": "slow down"}}), "500": (500, {}, {}), "503": (503, {}, "down"),
    "408": (408, {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_passing_fault_is_outlived(server: ChatServer, tmp_path: Path, name: str) -> None:
    """After two such answers in a row the third is taken, and the wait was told."""
    server.faults = [FAULTS[name]] * 2
    lines: list[str] = []
    assert voice(server, tmp_path, lines).answers(ASKED[:1]) == ["An answer."]
    assert len(server.bodies) == 3
    assert len([line for line in lines if "next attempt in" in line]) == 2


@pytest.mark.parametrize("name", FAULTS)
def test_a_lasting_fault_ends_in_one_line(server: ChatServer, tmp_path: Path, name: str) -> None:
    """When the attempts are used up the command ends with exit code 4 and a line that names the address."""
    server.faults = [FAULTS[name]] * 3
    with pytest.raises(ResourceError, match="in 3 attempts") as caught:
        voice(server, tmp_path).answers(ASKED[:1])
    assert caught.value.exit_code == 4
    assert server.url in caught.value.lines[0]
    assert len(server.bodies) == 3


def test_nobody_there_is_a_fault_that_may_pass(tmp_path: Path) -> None:
    """A refused connection is tried again, and then told."""
    with ChatServer() as gone:
        pass
    with pytest.raises(ResourceError, match="the connection failed: Connection refused, in 3 attempts"):
        voice(gone, tmp_path).answers(ASKED[:1])


def test_retry_after_is_honoured(server: ChatServer, tmp_path: Path) -> None:
    """The next attempt is no earlier than the endpoint asks for."""
    server.faults = [(429, {"Retry-After": "1"}, {})]
    assert voice(server, tmp_path).answers(ASKED[:1]) == ["An answer."]
    assert server.times[1] - server.times[0] >= 1.0


def test_retry_after_is_a_number_or_a_date() -> None:
    """Both forms of the header are read; nonsense is no wait."""
    assert endpoint.retry_after({"retry-after": "7"}) == 7
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    found = endpoint.retry_after({"retry-after": date})
    assert found is not None
    assert 28 < found <= 30
    assert endpoint.retry_after({"retry-after": email.utils.formatdate(0, usegmt=True)}) == 0
    assert endpoint.retry_after({"retry-after": "soon"}) is None
    assert endpoint.retry_after({}) is None


def test_an_endpoint_that_wants_an_hour_is_not_waited_for(server: ChatServer, tmp_path: Path) -> None:
    """A Retry-After beyond the patience of the client ends the command with exit code 4."""
    server.faults = [(429, {"Retry-After": "3600"}, {})]
    with pytest.raises(ResourceError, match="left alone for 3600 s"):
        voice(server, tmp_path).answers(ASKED[:1])


REFUSALS: dict[str, tuple[Any, type[LoraError], str]] = {
    "key": ((401, {}, {"error": {"message": f"wrong key {KEY}"}}), InputError, "answered 401: wrong key ***"),
    "model": ((404, {}, {"error": {"message": "no such model"}}), InputError, "look at url and model"),
    "request": ((400, {}, {"error": "bad"}), InputError, "answered 400: bad"),
    "quota": ((429, {}, {"error": {"code": "insufficient_quota", "message": "used up"}}), ResourceError, "used up"),
    "redirect": ((302, {"Location": "http://127.0.0.1:9/"}, {}), InputError, "which is not followed"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_told_at_once(server: ChatServer, tmp_path: Path, name: str) -> None:
    """What no further attempt would change is asked once and told in one line, without the key."""
    fault, kind, told = REFUSALS[name]
    server.faults = [fault]
    with pytest.raises(kind) as caught:
        voice(server, tmp_path).answers(ASKED[:1])
    (line,) = caught.value.lines
    assert told in line
    assert KEY not in line
    assert len(server.bodies) == 1


def test_an_answer_of_another_protocol_is_refused(server: ChatServer, tmp_path: Path) -> None:
    """JSON without choices comes from something that is no such endpoint."""
    server.answer = lambda body: {"text": "hello"}
    with pytest.raises(InputError, match="must speak OpenAI's chat completions"):
        voice(server, tmp_path).answers(ASKED[:1])


def test_what_does_not_fit_is_left_out(server: ChatServer, tmp_path: Path) -> None:
    """A conversation that is too long for the endpoint's model is no fault of the run."""
    server.faults = [(400, {}, {"error": {"code": "context_length_exceeded", "message": "too long"}})]
    assert voice(server, tmp_path, parallel=1).answers(ASKED[:2]) == [None, "An answer."]


def test_what_was_answered_is_never_asked_again(server: ChatServer, tmp_path: Path) -> None:
    """Also where the last line was cut short; tokens and cost are those of all answers."""
    first = voice(server, tmp_path, price_in=1.0, price_out=5.0)
    first.answers(ASKED[:4])
    assert first._ledger.usage.cost == pytest.approx(4 * (10 + 5 * 4) / 1e6)
    first._ledger.close()
    path = tmp_path / "endpoint.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    again = voice(server, tmp_path, price_in=1.0, price_out=5.0)
    assert path.read_bytes() == whole
    assert again.answers(ASKED) == ["An answer."] * 6
    asked = [body["messages"][0]["content"] for body in server.bodies]
    assert sorted(asked) == [f"Message {row}." for row in range(6)]
    usage = again._ledger.usage
    assert (usage.requests, usage.prompt_tokens, usage.completion_tokens) == (6, 60, 24)


def test_a_fault_of_one_keeps_the_answers_of_the_others(server: ChatServer, tmp_path: Path) -> None:
    """What came before the fault is in the ledger, and the command that follows asks for the rest alone."""
    server.faults = [None, None, (401, {}, {})]
    with pytest.raises(InputError):
        voice(server, tmp_path, parallel=1).answers(ASKED)
    assert len((tmp_path / "endpoint.jsonl").read_text().splitlines()) == len(server.bodies) - 1 >= 2
    assert voice(server, tmp_path, parallel=1).answers(ASKED) == ["An answer."] * 6
    assert len(server.bodies) == 7  # the refused one twice


def test_the_key_is_in_no_file_and_no_line(server: ChatServer, tmp_path: Path) -> None:
    """Not even where the endpoint repeats it in an answer."""
    server.answer = lambda body: said(f"Your key is {KEY}.")
    lines: list[str] = []
    server.faults = [(500, {}, {"error": {"message": f"{KEY} is tired"}})]
    assert voice(server, tmp_path, lines).answers(ASKED[:1]) == ["Your key is ***."]
    assert KEY not in (tmp_path / "endpoint.jsonl").read_text()
    assert lines
    assert KEY not in "".join(lines)


def test_the_pace_is_kept(server: ChatServer, tmp_path: Path) -> None:
    """At 600 requests a minute, four take 0.3 s, however many may run at once."""
    voice(server, tmp_path, requests_per_minute=600, parallel=4).answers(ASKED[:4])
    assert max(server.times) - min(server.times) >= 0.27


def odds(server: ChatServer, folder: Path, **keys: Any) -> float:
    """Return the log-odds of a judge."""
    (verdict,) = voice(server, folder, **keys).compare(ASKED[:1])
    assert verdict is not None
    return verdict.log_odds


def test_odds_are_those_of_the_first_token(server: ChatServer, tmp_path: Path) -> None:
    """The difference of the letters' log-probabilities, spellings with white space added to each."""
    server.answer = lambda body: letters(math.log(0.6), math.log(0.2))
    assert odds(server, tmp_path) == pytest.approx(math.log(3))
    assert server.bodies[0]["logprobs"] is True
    assert server.bodies[0]["max_tokens"] == 1
    listed = [{"token": token, "logprob": math.log(p)} for token, p in [("A", 0.3), (" A", 0.3), ("B", 0.2)]]
    server.answer = lambda body: said("A", logprobs={"content": [{"top_logprobs": listed}]})
    (tmp_path / "b").mkdir()
    assert odds(server, tmp_path / "b") == pytest.approx(math.log(3))
    rest = [*listed[:2], {"token": "x", "logprob": -9}]
    server.answer = lambda body: said("A", logprobs={"content": [{"top_logprobs": rest}]})
    (tmp_path / "c").mkdir()
    assert odds(server, tmp_path / "c") == pytest.approx(math.log(0.6) + 9)  # at least so much


@pytest.mark.parametrize("refuses", [False, True])
def test_votes_take_the_place_of_log_probabilities(server: ChatServer, tmp_path: Path, refuses: bool) -> None:
    """Where the endpoint gives none, or refuses to, so many answers are drawn at temperature 1, each with its seed."""
    drawn = ["A", "(A) is better", "B.", "Both", "A"]
    server.answer = lambda body: said(drawn[body["seed"]] if "seed" in body else "A")
    if refuses:
        server.faults = [(400, {}, {"error": {"message": "logprobs is not supported"}})]
    lines: list[str] = []
    assert odds(server, tmp_path, votes=5, lines=lines) == pytest.approx(math.log(3.5 / 1.5))
    votes = [body for body in server.bodies if "seed" in body]
    assert sorted(body["seed"] for body in votes) == list(range(5))
    assert {body["temperature"] for body in votes} == {1}
    assert any("5 votes instead" in line for line in lines)


def test_votes_that_name_no_letter_are_none() -> None:
    """Words that begin with a letter are no votes; without votes the odds are even."""
    assert by_votes(["About", "Better", ""]).log_odds == 0
    assert by_votes(["A", " (B)", "**B**"]).raw["votes"] == {"A": 1, "B": 2}


def test_numbers_that_are_none_do_no_harm(server: ChatServer, tmp_path: Path) -> None:
    """Infinity, NaN and half a surrogate pair in an answer break neither the odds nor the files."""

    def answer(body: Body) -> Body:
        found = letters(-0.1, -math.inf)
        found["choices"][0]["message"]["content"] = "A\ud800"
        found["choices"][0]["logprobs"]["content"][0]["top_logprobs"].append(
            {"token": "y", "logprob": math.nan}
        )
        return found

    server.answer = answer
    assert odds(server, tmp_path) == pytest.approx(29.9)
    assert Ledger(tmp_path / "endpoint.jsonl").usage.requests == 1


def test_a_key_that_cannot_be_one_is_refused_without_being_shown() -> None:
    """A variable that is not set, or holds a line break, is told by its name."""
    for value in ({}, {"MY_KEY": ""}, {"MY_KEY": "se\ncret"}, {"MY_KEY": "schlüssel"}):
        with pytest.raises(InputError, match="the variable MY_KEY") as caught:
            endpoint.require_key("MY_KEY", value, "constitution.critic")
        assert "cret" not in str(caught.value)
    assert endpoint.require_key("MY_KEY", {"MY_KEY": f"{KEY}\n"}, "x") == KEY
    assert endpoint.require_key(None, {}, "x") is None
