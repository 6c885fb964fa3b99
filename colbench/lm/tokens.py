"""Dialogues to tokens and back. Two conventions hold everywhere:
 - A dialogue is tokenised piece by piece (template text, message, end-of-turn token, template text, ...), so what is
   trained on are exactly the tokens that were conditioned on while sampling. Template text is tokenised once, without
   special tokens added: no second BOS.
 - A message's tokens include the end-of-turn token that closes it.
"""
import re
from functools import lru_cache

from colbench.run.errors import UserError


def render(tokenizer, messages: list[dict]) -> str:
    """Template text of a dialogue, ending where the assistant's next message begins.

    Templates that know no system role get the system text in front of the first user message.
    """
    messages = [{"role": m["role"], "content": m["content"].strip()} for m in messages]
    has_system = messages[0]["role"] == "system" and len(messages) > 1
    try:
        text = _template(tokenizer, messages, add_generation_prompt=True)
        if not has_system or messages[0]["content"] in text:
            return text  # else the template drops system texts without a word
    except Exception as error:  # jinja2.TemplateError raised by the template itself
        if not has_system:
            raise UserError(f"the chat template refuses this dialogue: {error}") from None
    system, first, *rest = messages
    return render(tokenizer, [{"role": first["role"], "content": system["content"] + "\n\n" + first["content"]}, *rest])


def _template(tokenizer, messages, **options) -> str:
    """The chat template's text.

    A template that writes today's date (Llama-3.2 and 3.3 do) gets the one that Llama-3.1 always writes: what is
    sampled today must have the same tokens in tomorrow's training.
    """
    fixed_date = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
    template = fixed_date + tokenizer.get_chat_template()
    return tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **options)


def end_of_turn(tokenizer) -> int:
    """Id of the token that ends an assistant message: the first token of the template's text behind such a message."""
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "@@@"}]
    tail = _template(tokenizer, messages).rsplit("@@@", 1)[1].lstrip()
    ids = tokenizer.encode(tail, add_special_tokens=False)
    return ids[0] if ids else tokenizer.eos_token_id


def encode_dialogue(tokenizer, messages: list[dict]) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a dialogue and, for every assistant message, its [start, end) in them, end-of-turn token included.

    A dialogue that ends with the user's message ends with the template's text that opens the assistant's answer. Marks
    of the template inside a message (a user who writes <|eot_id|>) stay plain text.
    """
    end_id = end_of_turn(tokenizer)
    end_text = tokenizer.decode([end_id])
    messages, contents = [*messages, {"role": "assistant", "content": None}], {}
    for i, message in enumerate(messages[:-1]):  # the template gets a place holder for a text that holds its marks
        text = message["content"].strip()
        if "\ue000" in text or _ids(tokenizer, text, True) != _ids(tokenizer, text, False):
            contents[f"\ue000{i}\ue000"] = text
            messages[i] = {"role": message["role"], "content": f"\ue000{i}\ue000"}
    ids, spans, done = [], [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or (message["content"] is None and messages[i - 1]["role"] == "assistant"):
            continue
        text = render(tokenizer, messages[:i])
        if not text.startswith(done):
            raise UserError("the chat template rewrites earlier turns when a new one comes; "
                            "choose a model whose template does not")
        for piece in re.split("(\ue000[0-9]+\ue000)", text[len(done):]):
            ids += text_ids(tokenizer, contents[piece]) if piece in contents else _ids(tokenizer, piece, False)
        if message["content"] is not None:
            content = message["content"].strip()
            start = len(ids)
            ids += message_ids(tokenizer, contents.get(content, content), end_id)
            spans.append((start, len(ids)))
            done = text + content + end_text
    return ids, spans


def text_ids(tokenizer, text: str) -> list[int]:
    """Tokens of a text that somebody wrote: what looks like a special token in it is text."""
    return list(_ids(tokenizer, text, True))


@lru_cache(maxsize=1 << 14)  # a dialogue is tokenised again at each of its turns
def _ids(tokenizer, text: str, split_special_tokens: bool) -> tuple[int, ...]:
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair, from somebody's JSON, is no character
    return tuple(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split_special_tokens))


def message_ids(tokenizer, content: str, end_id: int) -> list[int]:
    """Tokens of one assistant message with its end-of-turn token."""
    return text_ids(tokenizer, content.strip()) + [end_id]
