"""Model folders, adapters, runs, recipes, data and caches as somebody who wants his code to run would hand them over.

Each artefact is a change of a scene: a folder with `base/`, `run/` (trained on it), `train.jsonl`, `eval.jsonl` and
`recipe.yaml`. Whatever is run in it would make the file `canary`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from sealed import reseal, sign

from lora_cli.manifest import MANIFEST

CANARY = "canary"


class _Touch:
    """Unpickled, it makes the canary."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def pickled(folder: Path) -> bytes:
    """Return a pickle that makes the canary."""
    return pickle.dumps({"weight": _Touch(folder / CANARY)}, protocol=2)


def torch_zip(folder: Path) -> bytes:
    """Return what torch.save would write around such a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(folder))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def code(folder: Path) -> str:
    """Return a module that makes the canary when it is imported."""
    return f"open({str(folder / CANARY)!r}, 'w')\nclass Evil:\n    pass\n"


def edit(path: Path, **values: Any) -> None:
    """Set keys of a JSON file, which need not be there."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


@dataclass(frozen=True)
class Artefact:
    """A change of a scene; `code` is the exit code it must lead to, None where a command need not read it at all.

    `of` says what is handed over: a base that is trained on, an adapter that is started from, or a whole run.
    """

    plant: Callable[[Path], object]
    code: int | None = None
    of: str = "base"


def _beside(where: str, *names: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        for index, name in enumerate(names):
            path = folder / where / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((pickled, torch_zip)[index % 2](folder))

    return plant


def _instead(where: str, good: str, bad: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        (folder / where / good).unlink()
        (folder / where / bad).write_bytes(torch_zip(folder))

    return plant


def _keys(name: str, **values: Any) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        (folder / "base" / "evil.py").write_text(code(folder))
        edit(folder / "base" / name, **values)

    return plant


def _template(source: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        for place in ("base", "run/adapter"):
            (folder / place / "chat_template.jinja").write_text(
                source.replace("CANARY", str(folder / CANARY))
            )
        reseal(folder / "run/adapter")

    return plant


def _polyglot(folder: Path) -> None:
    path = folder / "base/model.safetensors"
    path.write_bytes(path.read_bytes() + torch_zip(folder))


def _pickle_as_tensor(folder: Path) -> None:
    import torch

    path = folder / "base/model.safetensors"
    hidden = torch.frombuffer(bytearray(pickled(folder)), dtype=torch.uint8)
    save_file(
        {**load_file(path), "extra": hidden}, path, metadata={"format": "pt", "__reduce__": "os.system"}
    )


def _traversal(folder: Path) -> None:
    base = folder / "base"
    shutil.copy(base / "model.safetensors", folder / "outside.safetensors")
    (base / "model.safetensors").unlink()
    names = dict.fromkeys(load_file(folder / "outside.safetensors"), "../outside.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _other_weights(folder: Path) -> None:
    """An index beside the weights, which names a pickle: transformers reads the weights, and so do we."""
    (folder / "base/evil.bin").write_bytes(torch_zip(folder))
    (folder / "base/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "evil.bin"}}))


def _versioned_config(folder: Path) -> None:
    config = json.loads((folder / "base/config.json").read_text())
    other = config | {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (folder / "base/config.4.0.0.json").write_text(json.dumps(other))
    _keys("config.json", configuration_files=["config.4.0.0.json"])(folder)


def _embedded_adapter(folder: Path) -> None:
    (folder / "base/adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "../evil", "target_modules": ["q_proj"]}
        )
    )
    (folder / "base/adapter_model.bin").write_bytes(torch_zip(folder))


def _distributed(folder: Path) -> None:
    shutil.copy(
        folder / "base/model.safetensors", folder / "base/shard-00001-model-00001-of-00001.safetensors"
    )
    (folder / "base/.metadata").write_bytes(pickled(folder))


def _python_files(folder: Path) -> None:
    names = (
        "__init__",
        "sitecustomize",
        "usercustomize",
        "torch",
        "transformers",
        "json",
        "conftest",
        "runpy",
    )
    for place in (".", "base", "run", "run/adapter", "run/checkpoints"):
        for name in names:
            (folder / place / f"{name}.py").write_text(code(folder))
    (folder / "base/evil.pth").write_text(f"import os; open({str(folder / CANARY)!r}, 'w')\n")


def _link_to_a_secret(folder: Path) -> None:
    (folder / "secret").write_text("a private key")
    (folder / "base/tokenizer.model").symlink_to(folder / "secret")


def _followed_base(folder: Path) -> None:
    shutil.copytree(folder / "base", folder / "evil")
    (folder / "evil/evil.py").write_text(code(folder))
    edit(folder / "evil/config.json", auto_map={"AutoModelForCausalLM": "evil.Evil"})
    for name in (str(folder / "evil"), "evil/repository"):
        edit(folder / "run/adapter/adapter_config.json", base_model_name_or_path=name)
    reseal(folder / "run/adapter")


def _generation(folder: Path) -> None:
    path = folder / "base/custom_generate/generate.py"
    path.parent.mkdir()
    path.write_text(code(folder))


def _adapter_keys(**values: Any) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        edit(folder / "run/adapter/adapter_config.json", **values)
        reseal(folder / "run/adapter")

    return plant


def _adapter_tensors(folder: Path) -> None:
    path = folder / "run/adapter/adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.../../../canary.lora_A.weight"] = tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)
    reseal(folder / "run/adapter")


def _recipe(text: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        path = folder / "run/recipe.yaml"
        first = path.read_text().splitlines()[0]
        path.write_text(f"{first}\n{text.replace('CANARY', str(folder / CANARY))}\n")

    return plant


def _trusting_recipe(folder: Path) -> None:
    _keys("config.json", auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"})(folder)
    path = folder / "run/recipe.yaml"
    path.write_text(path.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))


def _linked_adapter(folder: Path) -> None:
    shutil.move(folder / "run/adapter", folder / "elsewhere")
    (folder / "elsewhere/adapter_model.bin").write_bytes(torch_zip(folder))
    (folder / "run/adapter").symlink_to(folder / "elsewhere")


def _links_beside_the_adapter(*names: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        (folder / "secret").write_text("a private key")
        for name in names:
            path = folder / "run/adapter" / name
            path.unlink(missing_ok=True)
            path.symlink_to(folder / "secret")
        reseal(folder / "run/adapter")

    return plant


def _manifest_that_leaves(folder: Path) -> None:
    (folder / "secret").write_bytes(pickled(folder))
    for place in (
        "run/adapter",
        *(f"run/checkpoints/{one}" for one in os.listdir(folder / "run/checkpoints")),
    ):
        path = folder / place / MANIFEST
        manifest = json.loads(path.read_text())
        manifest["files"] |= {
            "../../../../secret": {"size": 1, "sha256": "0"},
            "/etc/passwd": {"size": 1, "sha256": "0"},
        }
        sign(path, manifest)


def _unpicklable_cache(folder: Path) -> None:
    """Arrays of objects in the token caches, under manifests that agree with them."""
    for cache in Path(os.environ["LORA_CLI_CACHE"], "tokens").iterdir():
        if (cache / MANIFEST).is_file():
            for name in ("lines.npy", "offsets.npy", "identities.npy"):
                np.save(cache / name, np.array([_Touch(folder / CANARY)], dtype=object), allow_pickle=True)
            reseal(cache)


def _rows(name: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        (folder / name).write_bytes(pickled(folder))
        for path in (folder / "recipe.yaml", folder / "run/recipe.yaml"):
            path.write_text(path.read_text().replace("train.jsonl", name).replace("eval.jsonl", name))

    return plant


def _bomb() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{y}: &{y} [{', '.join([f'*{x}'] * 10)}]" for x, y in zip("abcdefgh", "bcdefghi", strict=True)]
    return "\n".join(lines)


_EVIL = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
_WALK = "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}{{ messages[0].content }}"
_CLASSES = (
    "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{{ c.__init__.__globals__['os'].mkdir('CANARY') }}"
    "{% endfor %}"
)

ARTEFACTS: dict[str, Artefact] = {
    # Pickles where weights and trainer states lie
    "pytorch_model.bin beside safetensors": Artefact(_beside("base", "pytorch_model.bin", "model.pt"), 0),
    "trainer state beside the model": Artefact(
        _beside("base", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.ckpt"), 0
    ),
    "pytorch_model.bin alone": Artefact(_instead("base", "model.safetensors", "pytorch_model.bin"), 2),
    "a pickle named safetensors": Artefact(_beside("base", "model.safetensors"), 2),
    "safetensors with an archive behind it": Artefact(_polyglot, 2),
    "safetensors with a pickle as a tensor": Artefact(_pickle_as_tensor),
    "an index of pickles beside the weights": Artefact(_other_weights, 0),
    "an index that leaves the folder": Artefact(_traversal, 2),
    "weights named by the config": Artefact(_keys("config.json", transformers_weights="../outside.safetensors"), 2),
    "a distributed checkpoint beside the weights": Artefact(_distributed, 2),
    "pickled vocabularies": Artefact(_beside("base", "tokenizer.pkl", "vocab.pkl", "vocab.bin", "corpus.bin"), 0),
    # Code that a config names
    "remote code": Artefact(_keys("config.json", auto_map=_EVIL), 2),
    "remote code of another repository": Artefact(
        _keys("config.json", auto_map={"AutoConfig": "evil/repository--evil.Evil"}), 2
    ),
    "a tokenizer's code": Artefact(_keys("tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Evil"]}), 2),
    "nested remote code": Artefact(
        _keys("config.json", text_config={"trust_remote_code": True, "auto_map": _EVIL}), 2
    ),
    "a kernel as attention": Artefact(_keys("config.json", _attn_implementation="evil/kernel@main"), 2),
    "a kernel in a part": Artefact(_keys("config.json", text_config={"attn_implementation": "evil/kernel:f"}), 2),
    "an internal attention": Artefact(_keys("config.json", _attn_implementation_internal="evil/kernel"), 2),
    "another config by version": Artefact(_versioned_config, 2),
    "another tokenizer by version": Artefact(
        _keys("tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.json"]), 2
    ),
    "arguments of a tokenizer": Artefact(_keys("tokenizer_config.json", init_inputs=["evil.py"]), 2),
    "a name of another repository": Artefact(
        _keys("config.json", _name_or_path="evil/repository", name_or_path="evil/repository")
    ),
    "code for generation": Artefact(_keys("generation_config.json", custom_generate="evil/repository"), 2),
    "code for generation in a folder": Artefact(_generation, 0),
    "an adapter in the model's folder": Artefact(_embedded_adapter, 2),
    "a link to a secret": Artefact(_link_to_a_secret, 2),
    "Python files everywhere": Artefact(_python_files, 0),
    # Templates
    "template: globals": Artefact(_template(_WALK), 2),
    "template: classes": Artefact(_template(_CLASSES), 2),
    "template: attribute by filter": Artefact(
        _template("{{ (messages|attr('__class__')).mro() }}{{ messages|map(attribute='__class__')|list }}"), 2
    ),
    "template: endless": Artefact(
        _template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"), 2
    ),
    "template: 1 GB": Artefact(_template("{% for a in range(99999) %}{{ 'x' * 10000 }}{% endfor %}"), 2),
    "template: include": Artefact(_template("{% include 'evil.jinja' %}{% import 'os' as os %}"), 2),
    # Adapters
    "adapter_model.bin beside safetensors": Artefact(
        _beside("run/adapter", "adapter_model.bin", "training_args.bin", "rng_state.pth"), 0, of="adapter"
    ),
    "adapter_model.bin alone": Artefact(
        _instead("run/adapter", "adapter_model.safetensors", "adapter_model.bin"), 2, of="adapter"
    ),
    "an adapter that names another base": Artefact(_followed_base, 0, of="adapter"),
    "an adapter that names classes": Artefact(
        _adapter_keys(auto_mapping={"base_model_class": "Evil", "parent_library": "evil"}), 0, of="adapter"
    ),
    "an adapter with arguments": Artefact(
        _adapter_keys(tokenizer_kwargs={"trust_remote_code": True}), 2, of="adapter"
    ),
    "an adapter whose card is a secret": Artefact(_links_beside_the_adapter("README.md"), 0, of="adapter"),
    "an adapter whose template is a secret": Artefact(_links_beside_the_adapter("chat_template.jinja"), of="adapter"),
    "an adapter of an absurd rank": Artefact(_adapter_keys(r=10**9, rank_pattern={"q_proj": 10**9}), 2, of="adapter"),
    "an adapter whose pattern has no end": Artefact(_adapter_keys(target_modules="([a-z_.0-9]+)+!"), 2, of="adapter"),
    "an adapter whose ranks have no end": Artefact(
        _adapter_keys(rank_pattern={"([a-z_.0-9]+)+!": 4}), 2, of="adapter"
    ),
    "an adapter whose layers are no pattern": Artefact(
        _adapter_keys(layers_to_transform=[0], layers_pattern="("), 2, of="adapter"
    ),
    "an adapter whose tensors have paths": Artefact(_adapter_tensors, 2, of="adapter"),
    "an adapter behind a link": Artefact(_linked_adapter, 0, of="adapter"),
    # Runs, recipes, rows, caches
    "a recipe that calls": Artefact(_recipe("run: !!python/object/apply:os.mkdir ['CANARY']"), 2, of="run"),
    "a recipe that names an object": Artefact(_recipe("run: !!python/name:os.system"), 2, of="run"),
    "a recipe that includes": Artefact(_recipe("model: !include base/evil.yaml"), 2, of="run"),
    "a recipe that is a bomb": Artefact(_recipe(_bomb()), 2, of="run"),
    "a recipe that trusts the base": Artefact(_trusting_recipe, 2),
    "pickles in the checkpoints": Artefact(
        _beside("run/checkpoints", "step-10/optimizer.pt", "step-10/rng_state.pth", "step-999/optimizer.bin"), of="run"
    ),
    "a manifest that leaves the folder": Artefact(_manifest_that_leaves, of="run"),
    "rows in a pickle": Artefact(_rows("rows.pkl"), of="run"),
    "a pickle named jsonl": Artefact(_rows("rows.jsonl"), of="run"),
    "objects in the token cache": Artefact(_unpicklable_cache, of="run"),
}  # fmt: skip
