"""Removes the control tokens of chat templates that leaked into texts. Knows templates, not records' meaning.

Three kinds, since some spellings are also ordinary text:
- Sure: `<|im_start|>`, `<start_of_turn>`, `[/INST]`... mean nothing else, nor do the base's own special tokens, which
  the tokenizer would read as control wherever they stand. Removed everywhere.
- Opening: `[INST]`, `[SYSTEM_PROMPT]`, `[TOOL_CALLS]`... may be a list of one name in code. Removed where the text has
  their closing form too, at its very start, and beside a sure token, white space between them or not.
- Loose: `<bos>`, `<pad>`... are names in code about models, and `<s>` is an HTML tag. Removed at the very start and end
  of a text and beside a sure token. One `<s>` or `</s>` that stays inside a text says that it is HTML: then those at
  its ends stay too.
A header token takes the role behind it and the newlines that its template writes there. All else stays byte for byte.
`### Instruction:` and `<think>` are text that models are meant to read and write, and stay.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from training.data.records import Record

ROLE = r"(?:system|user|assistant|model|tool|developer|function|ipython|human|gpt|bot)"
NEWLINE = r"(?:\r?\n)"
ROLE_LINE = rf"(?:{ROLE}(?:{NEWLINE}|\Z|(?=<\|)))?"  # a role counts as one only if its line ends there
# ChatML, Phi-4, Harmony (gpt-oss), OpenAssistant, Zephyr, Phi-3, GLM, StableLM, Llama 4, Granite, Gemma 4
ROLE_ITSELF = r"user|assistant|system|tool|developer|observation|prompter|human|bot"
ROLE_BETWEEN = (("start_header_id", "end_header_id"), ("header_start", "header_end"), ("start_of_role", "end_of_role"))
CHANNEL = r"<\|channel\|>(?:analysis|commentary|final)?"
BAR_NAMES = (  # <|name|>
    r"im_end|im_sep|endoftext|startoftext|endofprompt|end|end_of_turn|endofturn|"  # ChatML, GPT, Phi, OpenChat
    r"begin_of_text|end_of_text|start_header_id|end_header_id|eot_id|eom_id|python_tag|"  # Llama 3
    r"finetune_right_pad_id|reserved_special_token_\d+|header_start|header_end|eot|eom|"  # Llama 3 and 4
    r"message|constrain|return|call|"  # Harmony
    r"start_of_turn_token|end_of_turn_token|user_token|chatbot_token|system_token|"  # Command R
    r"start_of_role|end_of_role|action_start|action_end|bos|eos|pad|"  # Granite, InternLM
    r"fim_prefix|fim_middle|fim_suffix|fim_pad|repo_name|file_sep"  # Qwen, StarCoder
)
SURE = (
    rf"(?i:<(?:\|(?:im_start|start)\||start_of_turn|\|turn)>{ROLE_LINE})",
    *(rf"(?i:<\|{start}\|>[\w-]{{0,32}}<\|{end}\|>{NEWLINE}{{0,2}})" for start, end in ROLE_BETWEEN),
    rf"(?i:<\|(?:{ROLE_ITSELF})\|>{NEWLINE}?)",
    rf"(?i:{CHANNEL})",
    rf"(?i:<\|(?:{BAR_NAMES})\|>)",
    r"(?i:<(?:end_of_turn|turn\||start_of_conversation|end_of_conversation|start_of_image|end_of_image)>)",  # Gemma
    rf"<<SYS>>{NEWLINE}?|<</SYS>>{NEWLINE}{{0,2}}|\[/INST\]",  # Llama 2
    r"\[/(?:AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT)\]",  # Mistral
    r"<\uff5c[^\uff5c<>\n]{1,48}\uff5c>",  # DeepSeek: full-width bars
    r"\[\|(?:system|user|assistant|endofturn)\|\]",  # EXAONE
)
OPENING = r"\[(?:INST|AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT|TOOL_CALLS|gMASK)\]"
LOOSE = r"<(?:bos|eos|pad|unk|sop|eop|extra_id_\d+)>"
TAG = r"</?s>"


def strip_chat_tokens(text: str, own_tokens: Sequence[str] = ()) -> tuple[str, int]:
    """The text without chat tokens, and how many were removed, until none is left that removing others put together.

    `own_tokens` are the base's special tokens. Raises ValueError if one is blank.
    """
    pattern = _pattern(tuple(own_tokens))
    removed = 0
    while tokens := _removable(text, pattern):
        removed += len(tokens)
        text = _without(text, tokens)
    return text, removed


def strip_record(record: Record, own_tokens: Sequence[str]) -> tuple[Record, int]:
    """The record without chat tokens in what the model reads and writes, and how many were removed."""
    instruction, first = strip_chat_tokens(record.instruction, own_tokens)
    user_input, second = strip_chat_tokens(record.input, own_tokens)
    output, third = strip_chat_tokens(record.output, own_tokens)
    if not first + second + third:
        return record, 0
    return replace(record, instruction=instruction, input=user_input, output=output), first + second + third


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The tokens that a tokenizer reads as control wherever they stand in a text: a base's own."""
    return tuple(sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.special))


def _removable(text: str, pattern: re.Pattern[str]) -> list[re.Match[str]]:
    """The tokens of a text that are foreign, by the rules above."""
    runs = _runs(text, pattern)
    openings = {token[0] for run in runs for token in run if token.lastgroup == "opening"}
    closed = {opening for opening in openings if f"[/{opening[1:]}" in text}
    verdicts: list[tuple[re.Match[str], bool, bool]] = []  # token, sure, foreign unless it is HTML
    for run in runs:
        sure = any(token.lastgroup == "sure" or token[0] in closed for token in run)
        at_start = run is runs[0] and not text[: run[0].start()].strip()
        at_end = run is runs[-1] and not text[run[-1].end() :].strip()
        for token in run:
            verdicts.append((token, sure, sure or at_start or (at_end and token.lastgroup != "opening")))
    is_html = any(token.lastgroup == "tag" and not foreign for token, _, foreign in verdicts)
    return [t for t, sure, foreign in verdicts if foreign and (sure or not is_html or t.lastgroup != "tag")]


def _runs(text: str, pattern: re.Pattern[str]) -> list[list[re.Match[str]]]:
    """Tokens with nothing but white space between them belong together."""
    runs: list[list[re.Match[str]]] = []
    for token in pattern.finditer(text):
        if runs and not text[runs[-1][-1].end() : token.start()].strip():
            runs[-1].append(token)
        else:
            runs.append([token])
    return runs


def _without(text: str, tokens: Sequence[re.Match[str]]) -> str:
    starts = [0, *(token.end() for token in tokens)]
    ends = [*(token.start() for token in tokens), len(text)]
    return "".join(text[start:end] for start, end in zip(starts, ends, strict=True))


@cache
def _pattern(own_tokens: tuple[str, ...]) -> re.Pattern[str]:
    if blank := [token for token in own_tokens if not token.strip()]:
        raise ValueError(f"a blank token cannot be stripped from texts: {blank[0]!r}")
    own = [re.escape(token) for token in sorted(own_tokens, key=len, reverse=True)]
    sure = "|".join((*SURE, *own))
    first = re.escape("".join(sorted({token[0] for token in ("<", "[", *own_tokens)})))  # four times as fast
    return re.compile(rf"(?=[{first}])(?:(?P<sure>{sure})|(?P<opening>{OPENING})|(?P<loose>{LOOSE})|(?P<tag>{TAG}))")
