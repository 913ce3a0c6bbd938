"""Static: in no file of ours can data become code, and nothing but the hub's own libraries opens a connection."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(
    path for folder in ("lora_cli", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
CLIENT = ("lora_cli/constitution/endpoint.py", "http.client")
"""The one file that connects by itself, to the endpoint that a recipe names, and what it imports for that."""
UNPICKLERS = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "jsonpickle",
}
CLIENTS = {
    "requests",
    "urllib",
    "urllib3",
    "http",
    "socket",
    "httpx",
    "aiohttp",
    "ftplib",
    "smtplib",
    "websockets",
}
CALLS = {
    **dict.fromkeys(
        ("torch.load", "torch.save", "torch.jit.load", "torch.hub.load"), "reads or writes pickles"
    ),
    **dict.fromkeys(("numpy.fromfile", "numpy.loadtxt", "pandas.read_pickle"), "reads what may be anything"),
    **dict.fromkeys(
        ("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"), "makes objects of tags"
    ),
    **dict.fromkeys(("os.system", "os.popen", "pty.spawn"), "runs a shell"),
    **dict.fromkeys(("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"), "runs text"),
    "runpy.run_path": "runs a file",
}
"""Full name of a callable -> what is wrong with it."""
NAMES_OF_ARGUMENTS = {"trust_remote_code", "shell", "allow_pickle"}
"""Keyword arguments that may not be literally true."""
TEXT_INTO_CODE = {"importlib.import_module"}
"""Allowed where the name is ours: see `OURS`."""
OURS = {"lora_cli/adapters/__init__.py", "lora_cli/objectives/__init__.py"}
"""Their modules are named by a closed table of the recipe."""


def faults(source: str, place: str = "x.py") -> Iterator[str]:
    """Yield each thing in a source that must not be there, with its line."""
    tree = ast.parse(source)
    names = _imported(tree)
    for node in ast.walk(tree):
        for module in _modules(node):
            if (
                module.split(".")[0] in UNPICKLERS | CLIENTS
                and module != "socket"
                and (place, module) != CLIENT
            ):
                yield f"{place}:{node.lineno}: imports {module}"
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            name = _full_name(node, names)
            if name.startswith("socket.") and name != "socket.gethostname":
                yield f"{place}:{node.lineno}: {name} opens a connection"
            if name in CALLS:
                yield f"{place}:{node.lineno}: {name} {CALLS[name]}"
            if name in TEXT_INTO_CODE and place not in OURS:
                yield f"{place}:{node.lineno}: {name} imports what a text names"
        if isinstance(node, ast.Call):
            yield from _arguments(node, _full_name(node.func, names), place)
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in NAMES_OF_ARGUMENTS and _is_true(value):
                    yield f"{place}:{node.lineno}: {key.value} is true"


def _arguments(call: ast.Call, name: str, place: str) -> Iterator[str]:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    for argument in NAMES_OF_ARGUMENTS & given.keys():
        if _is_true(given[argument]):
            yield f"{place}:{call.lineno}: {argument} is true"
    if name in ("numpy.load", "numpy.save") and not _is_false(given.get("allow_pickle")):
        yield f"{place}:{call.lineno}: {name} without allow_pickle=False"
    if name == "yaml.parse" and "Loader" not in given:
        yield f"{place}:{call.lineno}: yaml.parse without a safe loader"
    if name.endswith("AutoModelForCausalLM.from_pretrained") and "use_safetensors" not in given:
        yield f"{place}:{call.lineno}: from_pretrained without use_safetensors"


def _is_true(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _is_false(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []


def _imported(tree: ast.AST) -> dict[str, str]:
    """Return each name that an import binds -> the full name it stands for."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _full_name(node: ast.AST, names: dict[str, str]) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([names.get(node.id, node.id), *reversed(parts)])


def test_no_file_of_ours_turns_data_into_code() -> None:
    """No pickle, no torch.load or torch.save, no eval or shell, no client of a network, in all files at once."""
    found = [
        line
        for path in FILES
        for line in faults(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    ]
    assert len(FILES) > 100
    assert found == []


BAD = {
    "import pickle": 1,
    "from dill import loads": 1,
    "def f():\n    import cloudpickle as c": 1,
    "import urllib.request": 1,
    "import socket\nsocket.create_connection(x)": 1,
    "from socket import create_connection as c\nc(x)": 1,
    "import socket\nsocket.gethostname()": 0,
    "import torch\ntorch.load(p, weights_only=True)": 1,
    "from torch import load as read\nread(p)": 1,
    "import torch as t\nreader = t.load": 1,
    "import torch\ntorch.save(x, p)": 1,
    "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)": 1,
    "import yaml\nyaml.parse(text)": 1,
    "import yaml\nyaml.parse(text, Loader=yaml.SafeLoader)": 0,
    "import numpy as np\nnp.load(p)": 1,
    "import numpy as np\nnp.load(p, allow_pickle=True)": 2,
    "import numpy as np\nnp.load(p, allow_pickle=flag)": 1,
    "import numpy as np\nnp.load(p, allow_pickle=False)": 0,
    "eval('1')": 1,
    "run = exec": 1,
    "compile(text, 'x', 'exec')": 1,
    "import re\nre.compile(text)": 0,
    "model.eval()": 0,
    "import subprocess\nsubprocess.run(line, shell=True)": 1,
    "import os\nos.system(line)": 1,
    "from os import popen\npopen(line)": 1,
    "AutoModel.from_pretrained(p, trust_remote_code=True)": 1,
    "AutoModel.from_pretrained(p, **{'trust_remote_code': True})": 1,
    "AutoModel.from_pretrained(p, trust_remote_code=runs_code)": 0,
    "from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained(p)": 1,
    "import importlib\nimportlib.import_module(name)": 1,
    "'torch.load and pickle'  # eval(": 0,
}


@pytest.mark.parametrize("source", BAD)
def test_the_gate_can_fail(source: str) -> None:
    """Each forbidden thing is found under any name it is imported by; what only looks like it is not."""
    assert len(list(faults(source))) == BAD[source]
