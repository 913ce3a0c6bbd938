"""What can be known to be wrong before torch is imported: paths, model folder, first rows, output folder.

Everything wrong is told at once. Hub ids are not contacted here. Nothing is written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal

from lora_cli.errors import InputError
from lora_cli.models import remote_code
from lora_cli.models.safety import TINY, check_model_folder, check_tokenizer_folder
from lora_cli.models.weight_files import read_header, read_json
from lora_cli.paths import check_name, check_writable, expanded, is_path, near_matches
from lora_cli.recipe.data_block import CHOICES, is_template_file
from lora_cli.recipe.keys import keys_at
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.suggest import nearest_key
from lora_cli.runtime import output_folder, reward_folder
from lora_cli.runtime.run_folder import RunFolder
from lora_cli.stages._win_rate_checks import check_win_rate

_A = {"adapter": "an adapter", "model": "a model"}
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def check(
    recipe: Recipe, *, resume: bool | None = None, overwrite: bool = False, allow: Sequence[str] = (),
    later: Collection[str] = (),
) -> list[str]:  # fmt: skip
    """Check a recipe that is to be trained, and return what was checked, a line each; see `pipeline.train`.

    `later` are keys that name what is not made yet.

    Raises:
        InputError: with every problem found.
    """
    held_out_is_there = recipe.data.eval is not None and "data.eval" not in later
    rows_are_there = not any(key.startswith(("data.train", "data.sources.")) for key in later)
    return _run_all(
        lambda: _check_data(recipe, "train") if rows_are_there else None,
        lambda: _check_data(recipe, "eval") if held_out_is_there else None,
        lambda: _check_model(recipe) if "model.base" not in later else None,
        lambda: _check_allowed(allow),
        lambda: _check_start(recipe, resume=resume) if "adapter.init_from" not in later else None,
        lambda: _check_template(recipe) if rows_are_there else None,
        lambda: check_win_rate(recipe, later),
        lambda: reward_folder.check(recipe, later),
        lambda: output_folder.check(recipe, resume=resume, overwrite=overwrite),
    )


def check_description(recipe: Recipe) -> list[str]:
    """Check a recipe whose data are to be described: the rows and the tokenizer; the base needs no weights.

    Raises:
        InputError: with every problem found.
    """
    return _run_all(
        lambda: _check_data(recipe, "train"),
        lambda: _check_data(recipe, "eval") if recipe.data.eval is not None else None,
        lambda: _check_model(recipe, needs_weights=False),
    )


def check_evaluation(target: Path, recipe: Recipe) -> list[str]:
    """Check a run, adapter or model that is to be evaluated, and the held-out rows.

    Raises:
        InputError: with every problem found.
    """
    return _run_all(
        lambda: _check_target(target, recipe),
        lambda: _check_template(recipe, target),
        lambda: check_win_rate(recipe),
        lambda: _check_data(
            recipe, "train" if recipe.data.eval is None and recipe.data.holds_out() else "eval"
        ),
    )


def check_merge(target: Path, output: Path, recipe: Recipe) -> list[str]:
    """Check a run or adapter that is to be merged, and the folder it is written to.

    Raises:
        InputError: with every problem found.
    """
    return _run_all(
        lambda: _check_target(target, recipe),
        lambda: _check_template(recipe, target),
        lambda: _check_new_folder(target, output, recipe),
    )


def check_inspection(target: Path, recipe: Recipe) -> list[str]:
    """Check a run, adapter or model that is to be inspected, and the base that it is compared with.

    Raises:
        InputError: with every problem found.
    """
    return _run_all(lambda: _check_exported(target, recipe), lambda: _check_model(recipe))


def kind_of(target: Path) -> Literal["run", "adapter", "model"]:
    """Say what a folder holds: a run of ours, a PEFT adapter, or a plain model.

    Raises:
        InputError: the folder does not exist, or is none of the three.
    """
    check_name(str(target), str(target))
    if not target.exists():
        raise InputError(f"{target}: no such folder{near_matches(target)}")
    if not target.is_dir():
        raise InputError(f"{target}: is not a folder (give a run, an adapter or a model folder)")
    if RunFolder(target).is_run():
        return "run"
    if (target / "adapter_config.json").is_file():
        return "adapter"
    if (target / "config.json").is_file():
        return "model"
    wanted = "recipe.yaml, adapter_config.json or config.json"
    raise InputError(f"{target}: is neither a run, an adapter nor a model (there is no {wanted})")


def _run_all(*checks: Callable[[], str | list[str] | None]) -> list[str]:
    """Run every check; one that fails does not keep the others from being told."""
    done, problems = list[str](), list[str]()
    for one in checks:
        try:
            lines = one() or []
        except InputError as error:
            problems.extend(error.lines)
        else:
            done.extend([lines] if isinstance(lines, str) else lines)
    if problems:
        raise InputError(dict.fromkeys(problems))
    return done


def _check_data(recipe: Recipe, split: Literal["train", "eval"]) -> list[str]:
    for key, name in _data_names(recipe, split):
        check_name(recipe.at(key), name)
        if is_path(name) and not any(mark in name for mark in "*?["):
            path = expanded(recipe.at(key), name)
            if not os.path.lexists(path):
                raise InputError(f"{recipe.at(key)}: {name}: no such file{near_matches(Path(name))}")
    from lora_cli.data.head import check_head  # imports numpy, which a wrong path need not wait for

    try:
        return check_head(recipe.data, split)
    except InputError as error:
        raise InputError([_placed(recipe, line) for line in error.lines]) from None


def _data_names(recipe: Recipe, split: Literal["train", "eval"]) -> Iterator[tuple[str, str]]:
    """Yield each key of a split's rows with each name that it holds."""
    values = {f"data.{split}": getattr(recipe.data, split)}
    if split == "train":
        values |= {f"data.sources.{name}.path": source.path for name, source in recipe.data.sources.items()}
    for key, names in values.items():
        for name in [names] if isinstance(names, str) else names or []:
            yield key, name


def _placed(recipe: Recipe, line: str) -> str:
    """Return a message about a key with the place where the key was written."""
    key = line.partition(":")[0]
    return recipe.at(key) + line.removeprefix(key) if key.startswith(("data.", "model.")) else line


def _check_model(recipe: Recipe, *, needs_weights: bool = True) -> str:
    base, place = recipe.model.base, recipe.at("model.base")
    check_name(place, base)
    folder = TINY if base == "tiny" else expanded(place, base)
    if base == "tiny" and recipe.model.trust_remote_code:
        raise InputError(
            f"{recipe.at('model.trust_remote_code')}: found true, but the bundled model has no code (remove the key)"
        )
    if not os.path.lexists(folder):
        if is_path(base) or not _HUB_ID.fullmatch(base):
            raise InputError(f"{place}: {base}: no such folder{near_matches(Path(base))}")
        if recipe.model.trust_remote_code:
            remote_code.require_pinned(recipe.at("model.trust_remote_code"), base, recipe.model.revision)
        return f"model.base: {base}: a hub id, not checked"
    if recipe.model.revision is not None:
        revision = recipe.at("model.revision")
        raise InputError(f"{revision}: {base} is a local folder, which has no revisions (remove the key)")
    runs_code = recipe.model.trust_remote_code
    try:
        if not needs_weights:
            config = check_tokenizer_folder(folder, runs_code=runs_code)
            return f"model.base: {base}: {config['model_type']}, its tokenizer"
        return f"model.base: {base}: {check_model_folder(folder, runs_code=runs_code).summary}"
    except InputError as error:
        raise InputError([f"{place}: {line}" for line in error.lines]) from None


def _check_allowed(keys: Sequence[str]) -> None:
    for key in keys:
        if not keys_at(key):
            raise InputError(f"--allow {key}: unknown key{nearest_key(key)}")


def _check_start(recipe: Recipe, *, resume: bool | None) -> str | None:
    name, place = recipe.init_from(), recipe.at("adapter.init_from")
    if name is None:
        return None
    check_name(place, name)
    target = expanded(place, name)
    if not os.path.lexists(target):
        going_on = resume is not False and RunFolder(Path(recipe.run.output).expanduser()).is_run()
        reason = "; a run that began from it needs it to be resumed" if going_on else ""
        raise InputError(f"{place}: {name}: no such folder{near_matches(Path(name))}{reason}")
    folder = RunFolder(target).adapter()
    if folder != target and not folder.is_dir():
        raise InputError(f"{place}: {name}: the run has no adapter/ (finish it, with peft in export.formats)")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise InputError(
                f"{place}: {name}: there is no {file} (give a PEFT adapter's folder, or a run's)"
            )
    output = expanded(recipe.at("run.output"), recipe.run.output)
    if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(output)):
        raise InputError(
            f"{place}: {name} is in run.output, which this run writes (choose another run.output)"
        )
    kind = read_json(folder / "adapter_config.json").get("peft_type")
    return f"adapter.init_from: {name}: an adapter ({kind})"


def _check_template(recipe: Recipe, target: Path | None = None) -> str | None:
    """Check data.template; `target` is the run, adapter or model that is read, None where one is trained."""
    wanted, place = recipe.data.template, recipe.at("data.template")
    if is_template_file(wanted):
        check_name(place, wanted)
        if not os.path.lexists(expanded(place, wanted)):
            if target is not None and RunFolder(target).is_run():
                return None  # the adapter carries it
            raise InputError(f"{place}: {wanted}: no such file{near_matches(Path(wanted))}")
    from lora_cli.data.head import has_conversations
    from lora_cli.data.templates import check_template

    if wanted in CHOICES and (target is not None or not has_conversations(recipe.data)):
        return None
    try:
        base = TINY if recipe.model.base == "tiny" else Path(recipe.model.base).expanduser()
        is_there = (base / "tokenizer.json").is_file()
    except (OSError, RuntimeError):
        is_there = False  # what is wrong with it is told by `_check_model`
    try:
        return check_template(wanted, base if is_there else None)
    except InputError as error:
        raise InputError([_placed(recipe, line) for line in error.lines]) from None


def _check_target(target: Path, recipe: Recipe) -> str:
    kind = kind_of(target)
    if kind == "model":
        return f"{target}: {check_model_folder(target, runs_code=recipe.model.trust_remote_code).summary}"
    if kind == "adapter" and recipe.at("model.base") == "model.base":
        raise InputError(f"{target}: is an adapter without its run (say what it adapts: model.base=...)")
    return f"{target}: {'a run' if kind == 'run' else 'an adapter'}; {_check_model(recipe)}"


def _check_exported(target: Path, recipe: Recipe) -> str:
    """Check that the target holds an adapter whose files can be read, or a model that can be told from its base."""
    kind = kind_of(target)
    if kind != "run" and recipe.at("model.base") == "model.base":
        raise InputError(f"{target}: is {_A[kind]} without its run (say what was trained: model.base=...)")
    folder = RunFolder(target).exported() if kind == "run" else target
    if (folder / "adapter_config.json").is_file():
        read_json(folder / "adapter_config.json")
        read_header(folder / "adapter_model.safetensors")
        return f"{folder}: an adapter"
    if recipe.quantization() != "none":
        raise InputError(
            f"{target}: only a merged model was kept, in which the update cannot be told from what quantizing the base"
            " changed (train with export.formats: [peft, merged])"
        )
    if (place := recipe.at("model.dtype")).startswith("override "):
        raise InputError(
            f"{place}: has no effect, weights are compared in the type of {folder} (leave it out)"
        )
    return f"{folder}: {check_model_folder(folder, runs_code=recipe.model.trust_remote_code).summary}"


def _check_new_folder(target: Path, output: Path, recipe: Recipe) -> str:
    check_name("--output", str(output))
    output = expanded("--output", str(output))
    output_folder.check_outside_base("--output", output, recipe)
    if output.resolve().is_relative_to(target.resolve()) and kind_of(target) != "run":
        raise InputError(f"--output: {output} is in the folder that is read (choose another one)")
    if os.path.lexists(output):
        raise InputError(f"--output: {output} exists already (choose another folder or remove it)")
    check_writable("--output", output)
    return f"--output: {output}: new"
