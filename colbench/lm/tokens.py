"""Dialogues to tokens and back. Two conventions hold everywhere:
 - A dialogue's tokens are those of the template's own text, and each message has tokens of its own in it: what is
   trained on are exactly the tokens that were conditioned on while sampling. `check_template` tells, before anything is
   sampled, where a template and its tokenizer do not allow both. No second BOS is added.
 - A message's tokens include the end-of-turn token that closes it.
"""
import re
from functools import lru_cache
from typing import NamedTuple

from colbench.run.errors import UserError

PLAIN = "\ue000"  # a character of no language: no tokenizer joins it to what comes behind


class Frame(NamedTuple):
    """What a template writes around an assistant's message."""

    opening: str  # from the user's text to where the message begins, as for sampling
    lead: str  # blanks between this and the message in a finished dialogue ("[/INST]", then " message")
    trail: str  # blanks between the message and the mark
    mark: str  # that ends the turn; one token
    mark_id: int


def frame(tokenizer) -> Frame:
    """The template's frame. UserError, with the reason, where a finished message stands elsewhere than it is sampled,
    or where no single token ends it."""
    return _frame(tokenizer, tokenizer.chat_template)


@lru_cache(maxsize=64)
def _frame(tokenizer, template) -> Frame:
    user, message, after = ({"role": "user", "content": "\ue001"}, {"role": "assistant", "content": "\ue002"},
                            {"role": "user", "content": "\ue003"})
    prompt, whole = (render(tokenizer, messages) for messages in ([user], [user, message, after]))
    if not whole.startswith(prompt):
        same = next(i for i, (a, b) in enumerate(zip(prompt, whole + "\0")) if a != b)
        raise UserError("the chat template rewrites earlier turns: it opens an answer with "
                        f"{prompt[same - len(prompt):]!r}, which is gone when the next turn comes; "
                        "choose a model whose template does not")
    lead, _, rest = whole[len(prompt):].partition(message["content"])
    if lead.strip():
        raise UserError(f"the chat template rewrites earlier turns: it puts {lead.strip()[:40]!r} in front of a "
                        "finished answer; choose a model whose template does not")
    tail = rest.lstrip()
    mark = max((mark for mark in tokenizer.get_added_vocab() if tail.startswith(mark)), key=len, default=None)
    if mark is None:
        shown = re.split("[\ue003\\s]", tail)[0][:30] or "\\n"
        raise UserError(f"the chat template ends an assistant's message with {shown!r}, which is no single token of "
                        "this tokenizer; give a model whose tokenizer has its template's end-of-turn mark as a token")
    return Frame(prompt.rpartition(user["content"])[2], lead, rest[:len(rest) - len(tail)], mark,
                 tokenizer.convert_tokens_to_ids(mark))


def check_template(tokenizer) -> None:
    """UserError, with the reason, where a dialogue's tokens cannot be those that its template gives."""
    request, reply = {"role": "user", "content": "Write f."}, {"role": "user", "content": "The rate is 12 (net)."}
    for text in ("What is the rate?", "a", "7", "(1) `x`", '"x"', "```python\ndef f(x):\n\treturn [x]\n```"):
        for start in ([request], [{"role": "system", "content": "Ask."}, request]):
            dialogue = [*start, {"role": "assistant", "content": text}, reply]
            ids, _ = encode_dialogue(tokenizer, dialogue)
            if ids != list(_ids(tokenizer, render(tokenizer, dialogue), False)):
                raise UserError("this tokenizer joins the chat template's text to the message beside it "
                                f"({frame(tokenizer).opening[-20:]!r} and {text[:20]!r}), so no message has tokens of "
                                "its own; choose another model")


def render(tokenizer, messages: list[dict]) -> str:
    """Template text of a dialogue, ending where the assistant's next message begins.

    Templates that know no system role, or move its text to the latest request, get it in front of the first one.
    """
    messages = [{"role": m["role"], "content": m["content"].strip()} for m in messages]
    has_system = messages[0]["role"] == "system" and len(messages) > 1
    if has_system and not _keeps_system(tokenizer, tokenizer.chat_template):
        system, first, *rest = messages
        first = {"role": first["role"], "content": f"{system['content']}\n\n{first['content']}".strip()}
        messages = [first, *rest]
    try:
        return _template(tokenizer, messages, add_generation_prompt=True)
    except Exception as error:  # jinja2.TemplateError raised by the template itself
        raise UserError(f"the chat template refuses this dialogue: {error}") from None


@lru_cache(maxsize=64)
def _keeps_system(tokenizer, template) -> bool:
    """Whether the template has a system role, and the system's text stays in its place when the dialogue goes on."""
    system, user, message = ({"role": role, "content": text} for role, text in
                             (("system", "\ue000"), ("user", "\ue001"), ("assistant", "\ue002")))
    try:
        short, long = (_template(tokenizer, messages) for messages in ([system, user], [system, user, message, user]))
    except Exception:  # jinja2.TemplateError raised by the template itself
        return False
    end = short.find(user["content"]) + 1
    return "\ue000" in short[:end] and long.startswith(short[:end])


def _template(tokenizer, messages, **options) -> str:
    """The chat template's text.

    A template that writes today's date (Llama-3.2 and 3.3 do) gets the one that Llama-3.1 always writes: what is
    sampled today must have the same tokens in tomorrow's training.
    """
    fixed_date = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
    template = fixed_date + tokenizer.get_chat_template()
    return tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **options)


def end_of_turn(tokenizer) -> int:
    """Id of the token that ends an assistant's message, by the chat template."""
    return frame(tokenizer).mark_id


def encode_dialogue(tokenizer, messages: list[dict]) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a dialogue and, for every assistant message, its [start, end) in them, end-of-turn token included.

    A dialogue that ends with the user's message ends with the template's text that opens the assistant's answer. Marks
    of the template inside a message (a user who writes <|eot_id|>) stay plain text.
    """
    _, lead, trail, mark, mark_id = frame(tokenizer)
    messages, contents = [*messages, {"role": "assistant", "content": None}], {}
    for i, message in enumerate(messages[:-1]):  # the template gets a place holder for a text that holds its marks
        text = message["content"].strip()
        if "\ue000" in text or _ids(tokenizer, text, True) != _ids(tokenizer, text, False):
            contents[f"\ue000{i}\ue000"] = text
            messages[i] = {"role": message["role"], "content": f"\ue000{i}\ue000"}
    ids, spans, done, before = [], [], "", ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or (message["content"] is None and messages[i - 1]["role"] == "assistant"):
            continue
        text = render(tokenizer, messages[:i])
        if not text.startswith(done):
            raise UserError("the chat template rewrites earlier turns when a new one comes; "
                            "choose a model whose template does not")
        for piece in re.split("(\ue000[0-9]+\ue000)", text[len(done):]):
            ids += _behind(tokenizer, before, contents.get(piece, piece), piece in contents)
            before = PLAIN if piece in contents else piece
        if message["content"] is not None:
            content = message["content"].strip()
            start = len(ids)
            ids += message_ids(tokenizer, contents.get(content, content), mark_id)
            spans.append((start, len(ids)))
            done, before = text + lead + content + trail + mark, mark
    return ids, spans


def message_ids(tokenizer, content: str, end_id: int) -> list[int]:
    """Tokens of one assistant message, behind what the template opens it with, with its end-of-turn token."""
    opening, lead, trail, *_ = frame(tokenizer)
    return _behind(tokenizer, opening, lead + content.strip() + trail, True) + [end_id]


def _behind(tokenizer, before: str, text: str, plain: bool) -> list[int]:
    """Tokens of `text` where it stands behind `before`. plain: what looks like a special token in it is text.

    Many tokenizers put a blank in front of all that they get (Llama 2, Mistral, Phi-3), which a text inside a dialogue
    does not have.
    """
    if plain:  # `before` may hold marks that are meant as such: it is left out, or a plain character in its place
        before = "" if _goes_on(tokenizer, before) == _ids(tokenizer, "x", False) else PLAIN
    known = _ids(tokenizer, before, plain) if before else ()
    return list(_ids(tokenizer, before + text, plain)[len(known):])


@lru_cache(maxsize=1 << 10)
def _goes_on(tokenizer, before: str) -> tuple[int, ...]:
    """Tokens of an x behind `before`."""
    return _ids(tokenizer, before + "x", False)[len(_ids(tokenizer, before, False)):]


@lru_cache(maxsize=1 << 14)  # a dialogue is tokenised again at each of its turns
def _ids(tokenizer, text: str, split_special_tokens: bool) -> tuple[int, ...]:
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair, from somebody's JSON, is no character
    return tuple(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split_special_tokens))
