"""Ours and the peers on the same work, each measurement a fresh process; `benchmarks/peers.py` is the command.

cases.py         what is compared, and the goals
work.py          the documents of every optimizer step, and the values that adapters start from
shapes.py        random models of known shapes
records.py       what a process is asked, and what it measured; all that a peer's own environment imports of us
processes.py     a process for each measurement, the environments of peers with pins of their own
equal.py         that all sides did the same work
ours.py trl_side.py peft_side.py litgpt_side.py unsloth_side.py      the sides
peft_methods.py  our methods in PEFT's terms
roofline.py starting.py scaling.py     matrix products; seconds to the first step; our speed by size
report.py        tables
"""
