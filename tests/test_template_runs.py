"""data.template from the recipe to the exported folders, and every way in which it can be wrong."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from command_line import run_here, run_process, snapshot
from toy import CHATML, rows, write_base, write_recipe, write_rows
from transformers import AutoTokenizer

from lora_cli import pipeline, without_training
from lora_cli.recipe.load import load_recipe

MINE = CHATML.replace("<|im_start|>{{ m.role }}", "<|im_start|>the {{ m.role }}").replace(
    "<|im_start|>assistant", "<|im_start|>the assistant"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small model folder whose tokenizer_config.json holds its chat template, as older ones do."""
    folder = write_base(tmp_path_factory.mktemp("model") / "base")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = (folder / "chat_template.jinja").read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))


def test_a_template_file_reaches_every_exported_folder(tmp_path: Path, base: Path) -> None:
    """Adapter, merged export, `lora-merge` and `lora-eval` use the file's template, also when the file is gone."""
    file = tmp_path / "my.jinja"
    file.write_text(MINE)
    path = write_recipe(
        tmp_path / "job",
        base,
        data__template=str(file),
        export__formats=["peft", "merged"],
        train__max_steps=1,
    )
    recipe = load_recipe(path)
    summary = pipeline.train(recipe)
    run = tmp_path / "job" / "run"
    file.unlink()
    without_training.merge(run, tmp_path / "again", recipe)
    for folder in (run / "adapter", run / "merged", tmp_path / "again"):
        assert (folder / "chat_template.jinja").read_text() == MINE
        assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())
        assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
        )
        assert text == "<|im_start|>the user\nhi<|im_end|>\n<|im_start|>the assistant\n"
    card = (run / "adapter" / "README.md").read_text()
    assert "Chat template: " in card
    assert "in chat_template.jinja" in card
    scores = without_training.evaluate(run, recipe)
    assert scores["tuned"]["loss"] == pytest.approx(summary["eval"]["tuned"]["loss"], rel=1e-6)


def test_an_adapter_is_scored_with_the_template_it_carries(tmp_path: Path, base: Path) -> None:
    """Without its recipe too, an adapter is read with the template beside it, not with the base's."""
    recipe = load_recipe(write_recipe(tmp_path / "job", base, data__template="alpaca", train__max_steps=1))
    summary = pipeline.train(recipe)
    adapter = tmp_path / "job" / "run" / "adapter"
    bare = load_recipe(write_recipe(tmp_path / "other", base))
    assert bare.data.template == "auto"
    scores = without_training.evaluate(adapter, bare)
    assert scores["tuned"]["loss"] == pytest.approx(summary["eval"]["tuned"]["loss"], rel=1e-6)


def test_the_template_is_part_of_the_datas_fingerprint(tmp_path: Path, base: Path) -> None:
    """Another text in the same file gives another fingerprint, so that a resume with it is refused."""
    file, found = tmp_path / "my.jinja", []
    for text in (MINE, CHATML):
        file.write_text(text)
        recipe = load_recipe(
            write_recipe(tmp_path / f"job{len(found)}", base, data__template=str(file), train__max_steps=1)
        )
        found.append(pipeline.train(recipe)["fingerprints"]["data.train.tokens"])
    assert found[0] != found[1]


GOOD = "model: {base: ./base}\ndata:\n  train: rows.jsonl\n  template: my.jinja\nrun: {output: out}\n"
TEMPLATES = {
    "class": ("{{ ''.__class__ }}", "reads '__class__' of a str"),
    "subclasses": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "reads '__class__' of a str"),
    "attr": ("{{ ''|attr('__class__') }}", "reads '__class__' of a str"),
    "syntax": ("a\n{% for m in messages %}", "my.jinja:2: the chat template fails: Unexpected end"),
    "a faulty call": ("{{ cycler() }}", "the chat template fails: at least one item has to be provided"),
    "break outside": ("{% break %}", "my.jinja: the chat template cannot be read: 'break' outside loop"),
    "unknown filter": ("{{ messages|nope }}", "my.jinja:1: the chat template fails: No filter named 'nope'"),
    "no turns": ("hello", "does not write the turns in order"),
    "refuses": ("{{ raise_exception('never') }}", "the chat template fails: never"),
    "empty": ("", "my.jinja: is empty"),
}


@pytest.fixture
def folder(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a sound recipe, which names the template my.jinja, and go there."""
    (tmp_path / "base").symlink_to(base)
    write_rows(tmp_path / "rows.jsonl", rows(3))
    (tmp_path / "my.jinja").write_text(MINE)
    (tmp_path / "r.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_bad_template_is_refused_before_the_model_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Exit 2, one line that names the key, the file and the reason, no traceback, nothing written."""
    source, expected = TEMPLATES[name]
    (folder / "my.jinja").write_text(source)
    before = snapshot(folder)
    result = run_here(capsys, "train", "r.yaml")
    assert result.code == 2
    (line,) = result.errors.splitlines()
    assert line.startswith("error: r.yaml:4:3: data.template: my.jinja:")
    assert expected in line
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**9 }}",
    ],
    ids=["loop", "1 GB"],
)
def test_a_bomb_takes_less_than_five_seconds(folder: Path, source: str) -> None:
    """The whole command ends within 5 seconds of processor time with one line, and writes nothing."""
    (folder / "my.jinja").write_text(source)
    files = snapshot(folder)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run_process(folder, "train", "r.yaml")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.code == 2, result.errors
    (line,) = result.errors.splitlines()
    assert line.startswith("error: r.yaml:4:3: data.template: my.jinja: ")
    assert "for one conversation (is there an endless loop in it?)" in line
    assert snapshot(folder) == files
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_the_models_own_template_is_checked_too(
    folder: Path, base: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    """A model that comes with a template of that kind is refused in the same way, and plain does without it."""
    (folder / "base").unlink()
    (folder / "base").mkdir()
    for path in base.iterdir():
        (folder / "base" / path.name).write_bytes(path.read_bytes())
    bad = "{{ ''.__class__ }}"
    text = bad if where.endswith("jinja") else json.dumps({"eos_token": "<|im_end|>", "chat_template": bad})
    (folder / "base" / where).write_text(text)
    result = run_here(capsys, "train", "r.yaml", "data.template=auto")
    assert result.code == 2
    assert "model.base: chat_template.jinja: the chat template fails: reads '__class__'" in result.errors
    assert len(result.errors.splitlines()) == 1
    assert run_here(capsys, "train", "r.yaml", "data.template=plain", "--check").code == 0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("chatlm", "data.template: found 'chatlm', which is no template (did you mean chatml?)"),
        ("lama3", "did you mean llama3"),
        ("zzz", "one of auto, model, plain, chatml, llama3"),
        ("./mi.jinja", "data.template: ./mi.jinja: no such file (did you mean my.jinja?)"),
        ("./base", "data.template: ./base: is not a file"),
        ("gemma", "gemma: the tokenizer lacks its control tokens <start_of_turn>, <end_of_turn>"),
        ("phi", "the tokenizer lacks its control tokens <|user|>, <|assistant|>, <|system|>, <|end|>"),
    ],
)
def test_a_template_that_is_not_there_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], value: str, expected: str
) -> None:
    """Unknown names and files come with near ones; missing control tokens are named."""
    result = run_here(capsys, "train", "r.yaml", f"data.template={value}")
    assert result.code == 2
    assert expected in result.errors
    assert len(result.errors.splitlines()) == 1


@pytest.mark.parametrize("value", ["my.jinja", "chatml", "qwen", "alpaca", "vicuna", "mistral"])
def test_a_good_template_passes_the_check(
    folder: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    """--check says that the template renders a conversation."""
    result = run_here(capsys, "train", "r.yaml", f"data.template={value}", "--check")
    assert result.code == 0, result.errors
    assert f"data.template: {value}: renders a conversation" in result.output


def test_texts_need_no_template(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model's template is not asked for where every row is text."""
    (folder / "rows.jsonl").write_text('{"text": "a b c"}\n')
    result = run_here(capsys, "train", "r.yaml", "data.template=auto", "--check")
    assert result.code == 0, result.errors
    assert "renders" not in result.output
