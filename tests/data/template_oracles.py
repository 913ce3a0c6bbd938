"""Chat templates in the shapes of public models, and what each must write: plain Python, a function per template.

An oracle gets messages and tools as transformers takes them and returns pieces of text, each with whether it is
trained: what follows the generation prompt of an assistant turn, through the turn's terminator.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lora_cli.data.templates import with_template

TEMPLATES = Path(__file__).parent / "templates"
Pieces = Iterator[tuple[str, bool]]
Messages = list[dict[str, Any]]

SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>
<bos> <eos> <start_of_turn> <end_of_turn> <s> </s> <|user|> <|assistant|> <|system|> <|end|> <unk>
<｜User｜> <｜Assistant｜>
<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|>
<|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|> <|start|> <|message|> <|channel|> <|return|> <|call|> [TOOL_CALLS] [TOOL_RESULTS]
[/TOOL_RESULTS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS]""".split()
ORDINARY = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
"""Added tokens that are not special, as Qwen's and DeepSeek's."""

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama-3's and Qwen's tokenizers part text: line breaks stay together, whatever follows them."""


class Refused(Exception):
    """The template refuses the conversation, or is not consistent for it; the text says how the refusal reads."""


def dumps(value: Any, **settings: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **settings)


def called(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [call["function"] for call in message.get("tool_calls", [])]


def parted(messages: Messages) -> tuple[str, Messages]:
    """Return the system message, empty where there is none, and the rest."""
    return (messages[0]["content"], messages[1:]) if messages[0]["role"] == "system" else ("", messages)


def chatml(messages: Messages, tools: Any) -> Pieces:
    for message in messages:
        yield f"<|im_start|>{message['role']}\n", False
        yield message["content"] + "<|im_end|>", message["role"] == "assistant"
        yield "\n", False


def chatml_default_system(messages: Messages, tools: Any) -> Pieces:
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "Be helpful."}, *messages]
    *pieces, _ = chatml(messages, tools)
    yield from pieces


def strips(messages: Messages, tools: Any) -> Pieces:
    return chatml([{**message, "content": message["content"].strip()} for message in messages], tools)


def thinking(messages: Messages, tools: Any) -> Pieces:
    last = {**messages[-1], "content": "<think>\n\n</think>\n\n" + messages[-1]["content"]}
    return chatml([*messages[:-1], last], tools)


def llama3(messages: Messages, tools: Any) -> Pieces:
    yield "<|begin_of_text|>", False
    for message in messages:
        yield f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False
        yield message["content"].strip() + "<|eot_id|>", message["role"] == "assistant"


def llama31(messages: Messages, tools: Any) -> Pieces:
    system, rest = parted(messages)
    ipython = "Environment: ipython\n" if tools else ""
    yield "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + ipython, False
    yield (
        f"Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{system.strip()}<|eot_id|>",
        False,
    )
    for place, message in enumerate(rest):
        content, role = message["content"].strip(), message["role"]
        if tools and place == 0:
            listed = "".join(dumps(tool, indent=4) + "\n\n" for tool in tools)
            content = f"Call one of these functions where it helps.\n\n{listed}{content}"
        if called(message):
            (call,) = called(message)
            content = f'{{"name": "{call["name"]}", "parameters": {dumps(call["arguments"])}}}'
        elif role == "tool":
            role, content = "ipython", dumps(message["content"])
        yield f"<|start_header_id|>{role}<|end_header_id|>\n\n", False
        yield content + "<|eot_id|>", role == "assistant"


def llama2(messages: Messages, tools: Any) -> Pieces:
    system, rest = parted(messages)
    first = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    for message in rest:
        if message["role"] == "user":
            yield f"<s>[INST] {(first + message['content']).strip()} [/INST]", False
            first = ""
        else:
            yield f" {message['content'].strip()} </s>", True


def mistral(messages: Messages, tools: Any) -> Pieces:
    yield "<s>", False
    for message in messages:
        answer = message["role"] == "assistant"
        content = message["content"]
        yield (f" {content}</s>" if answer else f"[INST] {content} [/INST]"), answer


def mistral_v3(messages: Messages, tools: Any) -> Pieces:
    system, rest = parted(messages)
    users = [place for place, message in enumerate(rest) if message["role"] == "user"]
    if tools and len(users) > 1:
        raise Refused("otherwise than the prompt for it")  # it moves the functions to the last question
    yield "<s>", False
    for place, message in enumerate(rest):
        content = message["content"]
        if message["role"] == "user":
            offered = f"[AVAILABLE_TOOLS] {dumps(tools)}[/AVAILABLE_TOOLS]" if tools else ""
            yield (
                f"{offered}[INST] {system + chr(10) * 2 if system and not place else ''}{content}[/INST]",
                False,
            )
        elif called(message):
            calls = ", ".join(
                dumps({"name": c["name"], "arguments": c["arguments"]}) for c in called(message)
            )
            yield f"[TOOL_CALLS] [{calls}]</s>", True
        elif message["role"] == "assistant":
            yield f" {content.strip()}</s>", True
        else:
            yield f'[TOOL_RESULTS] {{"content": {dumps(content)}}}[/TOOL_RESULTS]', False


def gemma(messages: Messages, tools: Any) -> Pieces:
    if messages[0]["role"] == "system":
        raise Refused("System role not supported")
    yield "<bos>", False
    for message in messages:
        answer = message["role"] == "assistant"
        yield f"<start_of_turn>{'model' if answer else 'user'}\n", False
        yield message["content"].strip() + "<end_of_turn>", answer
        yield "\n", False


def our_gemma(messages: Messages, tools: Any) -> Pieces:
    system, rest = parted(messages)
    before = system.strip() + "\n\n" if messages[0]["role"] == "system" else ""
    for place, (piece, trained) in enumerate(gemma(rest, tools)):
        yield before * (place == 2) + piece, trained  # the begin token, then the first turn's opening


def phi3(messages: Messages, tools: Any) -> Pieces:
    for message in messages:
        yield f"<|{message['role']}|>\n", False
        yield message["content"] + "<|end|>", message["role"] == "assistant"
        yield "\n", False
    yield "<|endoftext|>", False


def our_phi(messages: Messages, tools: Any) -> Pieces:
    *pieces, _ = phi3(messages, tools)
    yield from pieces


def our_mistral(messages: Messages, tools: Any) -> Pieces:
    system, rest = parted(messages)
    before = system.strip() + "\n\n" if messages[0]["role"] == "system" else ""
    yield "<s>", False
    for message in rest:
        content = message["content"].strip()
        if message["role"] == "assistant":
            yield f" {content}</s>", True
        else:
            yield f"[INST] {before}{content}[/INST]", False
            before = ""


HERMES = """

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{listed}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def qwen(messages: Messages, tools: Any) -> Pieces:
    system, rest = parted(messages)
    if messages[0]["role"] != "system":
        system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    offered = HERMES.format(listed="\n".join(map(dumps, tools))) if tools else ""
    yield f"<|im_start|>system\n{system}{offered}<|im_end|>\n", False
    for place, message in enumerate(rest):
        role, content = message["role"], message["content"]
        if role == "tool":
            first = rest[place - 1]["role"] != "tool"
            last = rest[place + 1]["role"] != "tool"
            opening = "<|im_start|>user" if first else ""
            yield (
                f"{opening}\n<tool_response>\n{content}\n</tool_response>{'<|im_end|>' + chr(10) if last else ''}",
                False,
            )
            continue
        for call in called(message):
            start = "\n" if content else ""
            body = dumps({"name": call["name"], "arguments": call["arguments"]})
            content += f"{start}<tool_call>\n{body}\n</tool_call>"
        yield from chatml([{"role": role, "content": content}], None)


def qwen3(messages: Messages, tools: Any) -> Pieces:
    last = max(place for place, message in enumerate(messages) if message["role"] == "user")
    written = []
    for place, message in enumerate(messages):
        content, thought = message["content"], message.get("reasoning_content")
        if message["role"] == "assistant":
            if thought is None:
                _, mark, after = content.rpartition("</think>")
                if mark:
                    thought = (
                        content.partition("</think>")[0].rstrip("\n").rpartition("<think>")[2].lstrip("\n")
                    )
                    content = after.lstrip("\n")
            if place > last:
                content = "<think>\n" + (thought or "").strip("\n") + "\n</think>\n\n" + content.lstrip("\n")
        written.append({"role": message["role"], "content": content})
    return chatml(written, tools)


def deepseek_r1(messages: Messages, tools: Any) -> Pieces:
    system, rest = parted(messages)
    yield "<｜begin▁of▁sentence｜>" + system, False
    for message in rest:
        if message["role"] == "user":
            yield "<｜User｜>" + message["content"], False
        else:
            yield "<｜Assistant｜>", False
            yield message["content"].rpartition("</think>")[2] + "<｜end▁of▁sentence｜>", True


def deepseek_r1_thinking(messages: Messages, tools: Any) -> Pieces:
    opened = "<think>\n"  # ends every prompt, but no answer begins with it unless it was typed there
    pieces = list(deepseek_r1(messages, tools))
    if not all(text.startswith(opened) for text, trained in pieces if trained):
        raise Refused("otherwise than the prompt for it")
    for text, trained in pieces:
        if trained:
            yield opened, False
        yield text.removeprefix(opened) if trained else text, trained


def zephyr(messages: Messages, tools: Any) -> Pieces:
    for message in messages:
        yield f"<|{message['role']}|>\n", False
        yield message["content"] + "</s>", message["role"] == "assistant"
        yield "\n", False


def command_r(messages: Messages, tools: Any) -> Pieces:
    names = {"system": "SYSTEM", "user": "USER", "assistant": "CHATBOT"}
    yield "<BOS_TOKEN>", False
    for message in messages:
        content = message["content"] if message["role"] == "system" else message["content"].strip()
        yield f"<|START_OF_TURN_TOKEN|><|{names[message['role']]}_TOKEN|>", False
        yield content + "<|END_OF_TURN_TOKEN|>", message["role"] == "assistant"


def harmony(messages: Messages, tools: Any) -> Pieces:
    system, rest = parted(messages)
    yield "<|start|>system<|message|>You are a large language model.\nCurrent date: 2024-07-26\n\n", False
    yield "# Valid channels: analysis, commentary, final.<|end|>", False
    if system or tools:
        yield "<|start|>developer<|message|>" + (f"# Instructions\n\n{system}" if system else ""), False
        for tool in tools or []:
            one = tool["function"]
            yield f"\n\n# Tools\n\nnamespace functions: {one['name']} // {one['description']}", False
        yield "<|end|>", False
    name = ""
    for place, message in enumerate(rest):
        content, ends = message["content"], place == len(rest) - 1
        if message["role"] == "user":
            yield f"<|start|>user<|message|>{content}<|end|>", False
        elif message["role"] == "tool":
            yield (
                f"<|start|>functions.{name} to=assistant<|channel|>commentary<|message|>{dumps(content)}<|end|>",
                False,
            )
        else:
            yield "<|start|>assistant", False
            for call in called(message):
                name = call["name"]
                yield (
                    f" to=functions.{name}<|channel|>commentary json<|message|>{dumps(call['arguments'])}<|call|>",
                    True,
                )
            if not called(message):
                thought = message.get("reasoning_content") if ends else None
                if thought is not None:
                    yield f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant", True
                yield f"<|channel|>final<|message|>{content}{'<|return|>' if ends else '<|end|>'}", True


def alpaca(messages: Messages, tools: Any) -> Pieces:
    task = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    system, rest = parted(messages)
    yield "<s>" + (system.strip() if messages[0]["role"] == "system" else task), False
    for message in rest:
        answer = message["role"] == "assistant"
        yield f"\n\n### {'Response' if answer else 'Instruction'}:\n", False
        yield message["content"].strip() + ("</s>" if answer else ""), answer


def vicuna(messages: Messages, tools: Any) -> Pieces:
    task = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,"
        " detailed, and polite answers to the user's questions."
    )
    system, rest = parted(messages)
    yield "<s>" + (system.strip() if messages[0]["role"] == "system" else task) + " ", False
    for message in rest:
        if message["role"] == "user":
            yield f"USER: {message['content'].strip()} ", False
        else:
            yield "ASSISTANT:", False
            yield f" {message['content'].strip()}</s>", True


@dataclass(frozen=True)
class Shape:
    """A template and the tokenizer settings it comes with; `named`: one that we bring, not a file beside the tests."""

    write: Callable[[Messages, Any], Pieces]
    bos: str | None
    eos: str
    adds_bos: bool = False
    named: bool = False
    tools: bool = False


SHAPES = {
    "chatml": Shape(chatml, None, "<|im_end|>"),
    "chatml_default_system": Shape(chatml_default_system, None, "<|endoftext|>"),
    "generation": Shape(chatml, None, "<|endoftext|>"),
    "strips": Shape(strips, None, "<|endoftext|>"),
    "thinking": Shape(thinking, None, "<|im_end|>"),
    "llama3": Shape(llama3, "<|begin_of_text|>", "<|eot_id|>", adds_bos=True),
    "llama31": Shape(llama31, "<|begin_of_text|>", "<|eot_id|>", adds_bos=True, tools=True),
    "llama2": Shape(llama2, "<s>", "</s>", adds_bos=True),
    "mistral": Shape(mistral, "<s>", "</s>", adds_bos=True),
    "mistral_v3": Shape(mistral_v3, "<s>", "</s>", adds_bos=True, tools=True),
    "gemma": Shape(gemma, "<bos>", "<eos>", adds_bos=True),
    "phi3": Shape(phi3, "<s>", "<|endoftext|>"),
    "qwen3": Shape(qwen3, None, "<|im_end|>"),
    "deepseek_r1": Shape(deepseek_r1, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", adds_bos=True),
    "deepseek_r1_thinking": Shape(
        deepseek_r1_thinking, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", adds_bos=True
    ),
    "zephyr": Shape(zephyr, "<s>", "</s>"),
    "command_r": Shape(command_r, "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", adds_bos=True),
    "harmony": Shape(harmony, "<|endoftext|>", "<|return|>", tools=True),
    "our chatml": Shape(chatml, None, "<|endoftext|>", named=True),
    "our llama3": Shape(llama3, "<|begin_of_text|>", "<|eot_id|>", adds_bos=True, named=True),
    "our gemma": Shape(our_gemma, "<bos>", "<eos>", adds_bos=True, named=True),
    "our mistral": Shape(our_mistral, "<s>", "</s>", adds_bos=True, named=True),
    "our phi": Shape(our_phi, "<s>", "<|endoftext|>", named=True),
    "our qwen": Shape(qwen, None, "<|im_end|>", named=True, tools=True),
    "our alpaca": Shape(alpaca, "<s>", "</s>", adds_bos=True, named=True),
    "our vicuna": Shape(vicuna, "<s>", "</s>", adds_bos=True, named=True),
}


@lru_cache(maxsize=1)
def _backend() -> str:
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in ORDINARY])
    return backend.to_str()


def base_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a shape without a chat template."""
    backend = Tokenizer.from_str(_backend())
    if shape.adds_bos:
        bos = (shape.bos, backend.token_to_id(shape.bos))
        backend.post_processor = processors.TemplateProcessing(single=f"{shape.bos} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=shape.bos, eos_token=shape.eos, unk_token="<unk>"
    )


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the template of the shape called `name`."""
    shape = SHAPES[name]
    tokenizer = base_tokenizer(shape)
    if shape.named:
        return with_template(tokenizer, name.removeprefix("our "))
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer
