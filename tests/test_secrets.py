"""A password, token or key that a run comes near is in no file and in no line that it leaves."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from command_line import Result, run_here, run_process
from toy import write_recipe

from lora_cli import pipeline
from lora_cli.models import load
from lora_cli.redaction import holds_secret, redacted

TOKENS = {
    "hugging face": "hf_" + "aB3" * 11 + "z",
    "openai": "sk-proj-" + "Ab_9-" * 8,
    "a provider with a prefix of its own": "sk-ant-api03-" + "Ab_9-" * 8,
    "github": "ghp_" + "aB3" * 12,
    "github, fine-grained": "github_pat_" + "aB3_" * 10,
    "gitlab": "glpat-" + "aB3x" * 5,
    "aws": "AKIA" + "A1B2" * 4,
    "slack": "xoxb-" + "123456789012-" * 2 + "aB3" * 8,
    "google": "AIza" + "aB3_-" * 7,
    "web token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
}
HF, SK, GHP, AKIA = (TOKENS[name] for name in ("hugging face", "openai", "github", "aws"))


@pytest.mark.parametrize("name", TOKENS)
def test_a_token_is_known_by_its_shape(name: str) -> None:
    """Alone, in a sentence, in an address and beside punctuation nothing of it is left."""
    token = TOKENS[name]
    for text in (
        "{}",
        "the key {}, which",
        "https://host/x?y={}&z=1",
        "key='{}'",
        "Authorization: Bearer {}",
    ):
        assert holds_secret(text.format(token))
        left = redacted(text.format(token))
        assert token[-12:] not in left, left


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("https://user:pa55@host/x", "https://***host/x"),
        ("https://:pa55@host/x", "https://***host/x"),
        ("https://host/x?token=abc&b=1", "https://host/x?***&b=1"),
        ("https://host/x?X-Amz-Signature=abc", "https://host/x?***"),
        ("a -----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY----- b", "a *** b"),
    ],
)
def test_an_address_keeps_what_is_not_secret(text: str, left: str) -> None:
    """Host, path and other parameters stay."""
    assert redacted(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "hf_internal_testing/tiny", "hf_somelongwordwithoutdigits", "models/sk-small", "sk-averylongnameofamodel",
        "https://host:8080/x", "https://host/x@y", "a:b@c", "train.max_tokens=100", "AKIA", "runs/2024-01-01",
        "b9c0ee8f2c1d4e5a6b7c8d9e0f1a2b3c4d5e6f70", "C:/users/me@work", "tokenizer?tokens=3", "eyJ.a.b",
    ],
)  # fmt: skip
def test_what_is_no_secret_is_left_alone(text: str) -> None:
    """Names of models, paths, dates, commits and ports are kept."""
    assert redacted(text) == text


@dataclass
class Plant:
    """Where a secret is put: into the recipe's text or among the arguments."""

    secret: str
    recipe: str = ""
    arguments: list[str] = field(default_factory=list)
    code: int = 2
    told: str = ""


PASSWORD = "correct-horse-battery"
REFUSED = "found a token or password"
PLANTS: dict[str, Plant] = {
    "password in the base's address": Plant(
        PASSWORD, arguments=[f"model.base=https://me:{PASSWORD}@host/x"], told=REFUSED
    ),
    "token as the base": Plant(HF, arguments=[f"model.base=./{HF}"], told=REFUSED),
    "token in the rows' address": Plant(
        HF, arguments=[f"data.eval=https://host/rows.jsonl?token={HF}"], told=REFUSED
    ),
    "parameter of the rows' address": Plant(
        PASSWORD, arguments=[f"data.eval=https://host/a.jsonl?token={PASSWORD}"], told=REFUSED
    ),
    "token in a list": Plant(GHP, arguments=[f"data.train=[train.jsonl, {GHP}]"], told=REFUSED),
    "key in a template": Plant(AKIA, arguments=[f"data.template=./{AKIA}.jinja"], told=REFUSED),
    "token in the output": Plant(SK, arguments=[f"run.output=runs/{SK}"], told=REFUSED),
    "token under its name": Plant(HF, recipe=f"token: {HF}", told="a secret has no place in a recipe"),
    "key under its name": Plant(SK, recipe=f"wandb: {{api_key: {SK}}}", told="wandb"),
    "password under its name": Plant(PASSWORD, recipe=f"password: {PASSWORD}", told="a secret has no place"),
    "credentials in a list": Plant(PASSWORD, recipe=f"credentials: [{PASSWORD}]", told="a secret has no place"),
    "secret by an override": Plant(PASSWORD, arguments=[f"hub.secret={PASSWORD}"], told="hub"),
    "token as a key": Plant(HF, recipe=f"{HF}: 1", told="unknown key"),
    "token as a wrong value": Plant(HF, arguments=[f"train.epochs={HF}"], told="train.epochs"),
    "token in broken YAML": Plant(HF, recipe=f"extra: 'open {HF}", told="not valid YAML"),
    "token as a tag": Plant(HF, recipe=f"extra: !{HF} 1", told="found the tag"),
    "token as an anchor": Plant(HF, recipe=f"extra: *{HF}", told="alias"),
    "token as an option": Plant(HF, arguments=[f"--{HF}"], told="No such option"),
    "token as a gate": Plant(HF, arguments=["--min", f"{HF}=1"], told="unknown score"),
    "token as a key to allow": Plant(HF, arguments=["--allow", HF], told="unknown key"),
    "token in a comment": Plant(HF, recipe=f"# my token is {HF}", code=0),
}  # fmt: skip


@pytest.fixture()
def place(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe over the toy base in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    write_recipe(Path("."), base, train__epochs=1, train__save_every=4)
    return tmp_path


def left(folder: Path, secret: str, result: Result, inputs: tuple[str, ...] = ("recipe.yaml",)) -> list[str]:
    """Return where a secret, or the most of it, is found: names and contents of files that were written, and lines."""
    parts = {secret, secret[-12:]}
    written = [path for path in folder.rglob("*") if path.relative_to(folder).as_posix() not in inputs]
    found = [
        str(path)
        for path in written
        if path.is_file() and any(part.encode() in path.read_bytes() for part in parts)
    ]
    found += [str(path) for path in written if any(part in path.name for part in parts)]
    return found + [
        line for line in (result.output + result.errors).splitlines() if any(part in line for part in parts)
    ]


@pytest.mark.reliability("secrets")
@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_secret_is_found_nowhere(
    place: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """What a recipe or an argument holds is neither printed nor written; the run is refused, but for a comment."""
    plant = PLANTS[name]
    with (place / "recipe.yaml").open("a") as file:
        file.write(f"{plant.recipe}\n")
    result = run_here(capsys, "train", "recipe.yaml", *plant.arguments)
    assert result.code == plant.code, result.errors
    assert plant.told in result.errors
    assert left(place, plant.secret, result) == []
    assert (place / "run").exists() == (plant.code == 0)


ENVIRONMENT = {
    "HF_TOKEN": HF,
    "HUGGING_FACE_HUB_TOKEN": TOKENS["github"],
    "HTTPS_PROXY": "http://me:tr0ub4dor-and-3@host:3128",
    "AWS_SECRET_ACCESS_KEY": PASSWORD,
    "WANDB_API_KEY": "0123456789abcdef" * 2,
}


@pytest.mark.reliability("secrets")
def test_secrets_of_the_environment_are_found_nowhere(
    place: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """A run whose libraries have read them writes none of them."""
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    result = run_process(place, "train", "recipe.yaml")
    assert result.code == 0, result.errors
    for secret in [*ENVIRONMENT.values(), "tr0ub4dor-and-3"]:
        assert left(place, secret, result) == []
    record_property("cases", len(ENVIRONMENT))


def _hub_error(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(f"cannot reach https://me:{PASSWORD}@host/api?token={HF}\nmore")

    monkeypatch.setattr(load, "snapshot_download", fail)
    return ["model.base=owner/name"]


def _fault(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"sent {HF} to https://me:{PASSWORD}@host/x")

    monkeypatch.setattr(pipeline, "_total_steps", fail)
    return []


@pytest.mark.reliability("secrets")
@pytest.mark.parametrize(("break_it", "code"), [(_hub_error, 2), (_fault, 1)])
def test_a_secret_in_the_words_of_a_library_is_found_nowhere(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    break_it: Callable[[pytest.MonkeyPatch], list[str]],
    code: int,
) -> None:
    """An error line and the log with the traceback tell what happened without it."""
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(place / "tmp"))
    result = run_here(capsys, "train", "recipe.yaml", *break_it(monkeypatch))
    assert result.code == code, result.errors
    assert "***" in result.errors
    assert left(place, HF, result) + left(place, PASSWORD, result) == []
    if code == 1:
        (log,) = place.glob("tmp/lora-cli-error-*.log")
        assert "RuntimeError: sent *** to https://***host/x" in log.read_text()


@pytest.mark.reliability("secrets")
def test_a_secret_in_the_path_of_the_base_is_not_exported(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """adapter_config.json, the card and the log of train, eval and merge name the folder's path without it."""
    folder = tmp_path / HF
    folder.mkdir()
    os.symlink(base, tmp_path / "link")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    import shutil

    shutil.copytree(base, folder / "base")
    write_recipe(Path("."), Path("base"), train__epochs=1)
    for command in (["train", "recipe.yaml"], ["eval", "run"], ["merge", "run", "--output", "merged"]):
        result = run_here(capsys, *command)
        assert result.code == 0, result.errors
        assert left(folder, HF, result) == []
    assert "***" in (folder / "run/adapter/adapter_config.json").read_text()


def test_rows_are_the_users_content_and_stay(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A token in a row is trained on and scored as it is written: redaction would change the data."""
    text = (place / "eval.jsonl").read_text()
    (place / "eval.jsonl").write_text(text.replace("purr", HF))
    result = run_here(capsys, "train", "recipe.yaml", "evaluate.metrics=[exact_match]")
    assert result.code == 0, result.errors
    assert HF in (place / "run/generations.jsonl").read_text()
