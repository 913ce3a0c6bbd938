"""What each process of a comparison is asked to do; models, documents, starts and recipes are made where they lack."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from side_by_side import scaling, shapes
from side_by_side import work as work_files
from side_by_side.cases import ALPHA, CASES, OURS, PLANNED_STEPS, RANK, Side
from side_by_side.processes import ROOT
from side_by_side.records import Job, read_work

TOKENIZER = ROOT / "lora_cli" / "assets" / "tiny"
LEARNING_RATE = 1e-5


class Jobs:
    """The jobs of one comparison; `folder` holds what is of this version of the sources alone."""

    def __init__(self, options: argparse.Namespace, folder: Path, code: str) -> None:
        self.options, self.folder, self.code = options, folder, code
        self.inputs = options.results / "inputs"
        self.inputs.mkdir(parents=True, exist_ok=True)
        made = self.inputs / f"{options.shape}-{options.dtype}"
        self.model: Path = options.model or shapes.make_model(
            shapes.SHAPES[options.shape], options.dtype, made, TOKENIZER
        )
        self.config = shapes.sizes(self.model)
        self.files: dict[str, Path] = {}

    def work(self, case: str) -> Path:
        """Return the file of a case's documents, made once."""
        options, data = self.options, CASES[case].data
        steps = options.warmup + 2 * options.steps + 1
        if data not in self.files and data == "dense":
            vocabulary = self.config["vocab_size"]
            self.files[data] = work_files.dense(self.inputs, steps, vocabulary, length=options.length)
        elif data not in self.files:
            made = work_files.question_answers(
                options.rows, self.inputs, steps, TOKENIZER, options.step_tokens
            )
            self.files[data] = made
        return self.files[data]

    def job(self, case: str, name: str, side: Side, **other: Any) -> Job:
        """Return what a side is asked to do; `other` fields take the place of the case's."""
        options, adapter = self.options, dict(CASES[case].adapter)
        method, steps, warmup = CASES[case].method, options.warmup + options.steps, options.warmup
        if method == "relora" and name == "ours":
            warmup = options.steps + 1  # a restart at its end, and none in as many steps after it
            adapter["restart_every"], steps = warmup, warmup + options.steps
        rank = adapter.get("rank", adapter.get("initial_rank", RANK))
        model, file = other.pop("model", self.model), other.pop("work", None) or self.work(case)
        if method == "vera":
            rank = min(rank, max(inputs for inputs, _ in shapes.linear_shapes(self.config)[0]))
        rank = other.pop("rank", rank)
        adapter |= {"rank": rank} if "rank" in adapter else {}
        kind = "lora" if method in ("qlora", "relora") else method
        starts = self.inputs / f"{model.parent.name}-{model.name}-{kind}-{rank}.safetensors"
        start = work_files.starts(model, kind, rank, starts)
        options_of = dict(side.options) | {"adapter": adapter, "planned_steps": PLANNED_STEPS}
        recipe = self.recipe(f"{case}-{rank}-{model.name}-{file.stem}", adapter, model, file)
        return Job(
            side=name, module=side.module, case=case, method=method, dtype=options.dtype, device=options.device,
            model=str(model), tokenizer=str(TOKENIZER), work=str(file), start=str(start) if start else None,
            recipe=str(recipe), steps=steps, warmup=warmup, threads=options.threads, learning_rate=LEARNING_RATE,
            rank=rank, alpha=ALPHA, code=self.code, options=options_of,
        )  # fmt: skip

    def recipe(self, name: str, adapter: dict[str, Any], model: Path, file: Path) -> Path:
        """Write the recipe of a case for our side: what equal work needs, all else at its defaults."""
        documents = read_work(str(file))
        longest = max(len(ids) for step in documents for ids, _ in step)
        recipe = {
            "model": {"base": str(model), "dtype": self.options.dtype},
            "data": {"max_length": longest},
            "adapter": adapter,
            "train": {
                "max_steps": PLANNED_STEPS,
                "batch_size": len(documents[0]),
                "learning_rate": LEARNING_RATE,
                "schedule": "constant",
                "warmup": 0,
            },
            "run": {"device": self.options.device},
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path

    def point(self, point: scaling.Point) -> Job:
        """Return the job of ours at one setting of `scaling.py`."""
        model = self.model
        if point.width is not None:
            made = self.inputs / f"width-{point.width}-{self.options.dtype}"
            model = shapes.make_model(scaling.shape_of(point.width), self.options.dtype, made, TOKENIZER)
        steps, vocabulary = self.options.warmup + self.options.steps, shapes.sizes(model)["vocab_size"]
        file = work_files.dense(self.inputs, steps, vocabulary, rows=point.rows, length=point.length)
        return self.job("dense", "ours", OURS, model=model, work=file, rank=point.rank)
