"""Dialogues to tokens and back. Two conventions hold everywhere:
 - A dialogue's tokens are those of its template's text, and each message has its own tokens among
   them: training sees exactly the tokens that sampling was conditioned on. `check_template` reports
   a template or tokenizer that does not allow both, before sampling. No second BOS is added.
 - A message's tokens include the end-of-turn token that closes it.
"""
import re
from functools import lru_cache
from typing import NamedTuple

from colbench.run.errors import UserError

PLAIN = "\ue000"  # a private-use character: no tokenizer merges it with what follows


class Frame(NamedTuple):
    """What a template writes around an assistant's message."""

    opening: str  # from the user's text to where the message begins, as for sampling
    lead: str  # blanks between this and the message in a finished dialogue ("[/INST]", " message")
    trail: str  # blanks between the message and the mark
    mark: str  # ends the turn; one token
    mark_id: int


def frame(tokenizer) -> Frame:
    """The template's frame. UserError, with the reason, if a finished message is not where it is
    sampled, or if no single token ends it."""
    return _frame(tokenizer, tokenizer.chat_template)


@lru_cache(maxsize=64)
def _frame(tokenizer, template) -> Frame:
    user = {"role": "user", "content": "\ue001"}
    message = {"role": "assistant", "content": "\ue002"}
    after = {"role": "user", "content": "\ue003"}
    prompt = render(tokenizer, [user])
    whole = render(tokenizer, [user, message, after])
    if not whole.startswith(prompt):
        same = next(i for i, (a, b) in enumerate(zip(prompt, whole + "\0")) if a != b)
        raise UserError("the chat template rewrites earlier turns: it opens an answer with "
                        f"{prompt[same - len(prompt):]!r}, which is gone in later turns; "
                        "choose a model whose template does not")
    lead, _, rest = whole[len(prompt):].partition(message["content"])
    if lead.strip():
        raise UserError("the chat template rewrites earlier turns: it puts "
                        f"{lead.strip()[:40]!r} in front of a finished answer; "
                        "choose a model whose template does not")
    tail = rest.lstrip()
    marks = (mark for mark in tokenizer.get_added_vocab() if tail.startswith(mark))
    mark = max(marks, key=len, default=None)
    if mark is None:
        shown = re.split("[\ue003\\s]", tail)[0][:30] or "\\n"
        raise UserError(f"the chat template ends an assistant's message with {shown!r}, which is "
                        "not a single token of this tokenizer; choose a model whose tokenizer has "
                        "its template's end-of-turn mark as a token")
    return Frame(prompt.rpartition(user["content"])[2], lead, rest[:len(rest) - len(tail)], mark,
                 tokenizer.convert_tokens_to_ids(mark))


def check_template(tokenizer) -> None:
    """UserError, with the reason, if a dialogue's tokens cannot be those of its template's text."""
    request = {"role": "user", "content": "Write f."}
    reply = {"role": "user", "content": "The rate is 12 (net)."}
    for text in ("What is the rate?", "a", "7", "(1) `x`", '"x"',
                 "```python\ndef f(x):\n\treturn [x]\n```"):
        for start in ([request], [{"role": "system", "content": "Ask."}, request]):
            dialogue = [*start, {"role": "assistant", "content": text}, reply]
            ids, _ = encode_dialogue(tokenizer, dialogue)
            if ids != list(_ids(tokenizer, render(tokenizer, dialogue), False)):
                raise UserError("this tokenizer merges the chat template's text with the message "
                                f"next to it ({frame(tokenizer).opening[-20:]!r} and "
                                f"{text[:20]!r}), so messages have no tokens of their own; "
                                "choose another model")


def render(tokenizer, messages: list[dict]) -> str:
    """The template's text of a dialogue, up to where the assistant's next message begins.

    A template without a system role, or one that moves the system prompt to the latest request,
    gets that prompt in front of the first request.
    """
    messages = [{"role": m["role"], "content": m["content"].strip()} for m in messages]
    has_system = messages[0]["role"] == "system" and len(messages) > 1
    if has_system and not _keeps_system(tokenizer, tokenizer.chat_template):
        system, first, *rest = messages
        content = f"{system['content']}\n\n{first['content']}".strip()
        messages = [{"role": first["role"], "content": content}, *rest]
    try:
        return _template(tokenizer, messages, add_generation_prompt=True)
    except Exception as error:  # jinja2.TemplateError raised by the template itself
        raise UserError(f"the chat template refuses this dialogue: {error}") from None


@lru_cache(maxsize=64)
def _keeps_system(tokenizer, template) -> bool:
    """Whether the template has a system role and leaves the system prompt in its place later."""
    system = {"role": "system", "content": "\ue000"}
    user = {"role": "user", "content": "\ue001"}
    message = {"role": "assistant", "content": "\ue002"}
    try:
        short = _template(tokenizer, [system, user])
        long = _template(tokenizer, [system, user, message, user])
    except Exception:  # jinja2.TemplateError raised by the template itself
        return False
    end = short.find(user["content"]) + 1
    return "\ue000" in short[:end] and long.startswith(short[:end])


def _template(tokenizer, messages, **options) -> str:
    """The chat template's text.

    Templates that write today's date (Llama-3.2, 3.3) get the fixed date of Llama-3.1: what is
    sampled today must have the same tokens when it is trained on tomorrow.
    """
    fixed_date = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
    template = fixed_date + tokenizer.get_chat_template()
    return tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template,
                                         **options)


def end_of_turn(tokenizer) -> int:
    """Id of the token with which the chat template ends an assistant's message."""
    return frame(tokenizer).mark_id


def encode_dialogue(tokenizer,
                    messages: list[dict]) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a dialogue, and the [start, end) of each assistant message in them.

    A message's span includes its end-of-turn token. After a final user message comes the template's
    text that opens the assistant's answer. Marks of the template inside a message (a user who
    writes <|eot_id|>) stay plain text.
    """
    _, lead, trail, mark, mark_id = frame(tokenizer)
    messages = [*messages, {"role": "assistant", "content": None}]
    contents = {}  # placeholder -> text with marks, which the template does not get to see
    for i, message in enumerate(messages[:-1]):
        text = message["content"].strip()
        if "\ue000" in text or _ids(tokenizer, text, True) != _ids(tokenizer, text, False):
            contents[f"\ue000{i}\ue000"] = text
            messages[i] = {"role": message["role"], "content": f"\ue000{i}\ue000"}
    ids, spans, done, before = [], [], "", ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if message["content"] is None and messages[i - 1]["role"] == "assistant":
            continue
        text = render(tokenizer, messages[:i])
        if not text.startswith(done):
            raise UserError("the chat template rewrites earlier turns when a new one comes; "
                            "choose a model whose template does not")
        for piece in re.split("(\ue000[0-9]+\ue000)", text[len(done):]):
            ids += _ids_after(tokenizer, before, contents.get(piece, piece), piece in contents)
            before = PLAIN if piece in contents else piece
        if message["content"] is not None:
            content = message["content"].strip()
            start = len(ids)
            ids += message_ids(tokenizer, contents.get(content, content), mark_id)
            spans.append((start, len(ids)))
            done = text + lead + content + trail + mark
            before = mark
    return ids, spans


def message_ids(tokenizer, content: str, end_id: int) -> list[int]:
    """Tokens of one assistant message after the template's opening, with its end-of-turn token."""
    opening, lead, trail, *_ = frame(tokenizer)
    return _ids_after(tokenizer, opening, lead + content.strip() + trail, True) + [end_id]


def _ids_after(tokenizer, before: str, text: str, plain: bool) -> list[int]:
    """Tokens of `text` after `before`. plain: special tokens written in `text` are plain text.

    Tokenised alone, `text` would get a blank in front of it from many tokenizers (Llama 2, Mistral,
    Phi-3), which it does not have inside a dialogue.
    """
    if plain:  # marks in `before` are real: drop it or put a plain character in its place
        joined = _ids_of_x_after(tokenizer, before)
        before = "" if joined == _ids(tokenizer, "x", False) else PLAIN
    known = _ids(tokenizer, before, plain) if before else ()
    return list(_ids(tokenizer, before + text, plain)[len(known):])


@lru_cache(maxsize=1 << 10)
def _ids_of_x_after(tokenizer, before: str) -> tuple[int, ...]:
    return _ids(tokenizer, before + "x", False)[len(_ids(tokenizer, before, False)):]


@lru_cache(maxsize=1 << 14)  # a dialogue is tokenised again at each of its turns
def _ids(tokenizer, text: str, split_special_tokens: bool) -> tuple[int, ...]:
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair becomes "?"
    return tuple(tokenizer.encode(text, add_special_tokens=False,
                                  split_special_tokens=split_special_tokens))
