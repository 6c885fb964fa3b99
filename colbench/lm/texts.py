"""What a model says, taken from the raw text that it wrote, locally or on a server:

    thoughts    kept, but not said: the content of <think>...</think> and its like
    marks       chat-template marks left in the text are cut off

A model that plays a human also writes speaker's names, quotes and further turns: `reply_alone`
keeps the reply.
"""
import re
from bisect import bisect
from collections import namedtuple
from functools import lru_cache

MARKER = "I WANT TO ANSWER:"  # an agent's answer follows it (colbench/env/dialogue.py)

# text: what is said; tokens: how many were generated, None if unknown; thoughts: "" if none;
# spent: (tokens read, tokens written) with those of earlier tries, or None;
# cut: whether the limit on tokens ended it
Reply = namedtuple("Reply", "text tokens thoughts spent cut", defaults=("", None, False))


class NoText(RuntimeError):
    """A reply that says nothing. spent: as in Reply."""

    def __init__(self, message, spent=None):
        super().__init__(message)
        self.spent = spent


class OnlyThoughts(NoText):
    """A reply whose thoughts did not end."""


# tags around thoughts, by model family
NAME = r"(?:[\w.]+[:_.-])?(?:think(?:ing)?|thoughts?|reasoning|scratch_?pad|reflection)"
AMBIGUOUS = r"(?:inner_monologue|analysis|reason|cot)"  # pages use these names too
OPEN = "|".join((
    # Qwen3, DeepSeek-R1, Granite 3.3; <seed:think>; EXAONE's <thought>
    rf"<(?:{NAME}|{AMBIGUOUS})(?:\s+\w+=\"[^\"\n]{{0,60}}\")*>",
    r"\[think\]",  # Magistral
    r"◁\s*think\s*▷",  # Kimi
    # Command A, Apertus
    r"<\|(?:(?:start|begin)_(?:of_)?)?think(?:ing)?\|>|<\|begin_of_thought\|>|<\|inner_prefix\|>",
    r"<\|channel\|>\s*(?:analysis|commentary)\b[^<]{0,60}(?:<\|message\|>)?",  # gpt-oss
    r"<\|channel>(?:\s*thoughts?\b)?",  # Gemma 4
))
CLOSE = "|".join((
    rf"</(?:{NAME}|{AMBIGUOUS})\s*>", r"\[/think\]", r"◁\s*/\s*think\s*▷",
    r"<\|(?:end_(?:of_)?|/)think(?:ing)?\|>|<\|end_of_thought\|>|<\|inner_suffix\|>",
    r"<\|channel\|>\s*final\b[^<]{0,60}(?:<\|constrain\|>[^<]{0,60})?(?:<\|message\|>)?",
    r"<channel\|>",
))
TAG = re.compile(rf"(?P<open>{OPEN})|(?P<close>{CLOSE})", re.I)
QUOTED = re.compile(r"""(?<!\w)[rbfu]{0,2}(["'`])(?:(?!\1)[^\n])*\1(?!\w)""", re.I)
# Granite 3.2 uses a sentence; gpt-oss without its marks leaves the bare names of its channels
WORDED = re.compile(
    r"\A\s*(?:here(?: i|')s my thought process:(?P<words>.*?)(?:here(?: i|')s my response:|\Z)|"
    r"(?-i:analysis)(?=(?-i:[A-Z])|.*assistantfinal)(?P<bare>.*?)(?:assistantfinal|\Z))",
    re.I | re.DOTALL)
WRAPPED = re.compile(r"\A\s*<(response|answer|output|final_answer)>(.*?)(?:</\1>\s*)?\Z",
                     re.I | re.DOTALL)

# marks of chat templates
MARK = (r"<\|[^|<>\s]{1,40}\|?>|<[^|<>\s]{1,20}\|>|<｜[^｜<>]{1,40}｜>|"
        r"<(?:bos|eos|pad|end_of_turn)>|\[/?INST\]|\[EOS\]")
ROLE = r"(?:assistant|user|human|system|model|bot)"
HEADER = (rf"<\|(?:start_header_id|im_start|start|start_of_role|role_start)\|>\s*{ROLE}\s*"
          rf"(?:<\|[a-z_]+\|>)?|"
          rf"<(?:start_of_turn|\|turn)>\s*{ROLE}\b|<\|{ROLE}\|>|<｜{ROLE}｜>|\[INST\]")
START = re.compile(rf"\A\s*(?:(?:{HEADER}|{MARK})\s*)*(?:(?:assistant|model)[ \t]*\n+)?", re.I)
END = re.compile(rf"(?:</s>|{MARK})\s*\Z", re.I)
NEXT_TURN = re.compile(rf"(?:</s>|{MARK})\s*(?:{HEADER}|{ROLE}[ \t]*\n)", re.I)


def spent_on(*replies) -> tuple[int, int] | None:
    """(tokens read, tokens written) of these replies and errors together; None if unknown."""
    known = [reply.spent for reply in replies if hasattr(reply, "spent")]  # skips other errors
    if None in known:
        return None
    return sum(read for read, _ in known), sum(written for _, written in known)


def usage_fields(reply: Reply) -> dict:
    """What is stored with a message: "tokens" (its own), "read", "written" (with all tries), "cut".

    "written" only if it differs from "tokens", "cut" only if true, and nothing that is unknown.
    """
    read, written = reply.spent or (None, None)
    fields = {"tokens": reply.tokens, "read": read,
              "written": None if written == reply.tokens else written, "cut": reply.cut or None}
    return {name: value for name, value in fields.items() if value is not None}


def clean(raw: str, opened: bool = False) -> tuple[str, str]:
    """(what is said, what is only thought) in a model's raw text.

    opened: whether the prompt opened the thoughts. A lone closing tag means that it did: all text
    before the tag is thought. A lone opening tag means that the limit on tokens cut the thoughts:
    all text after it is thought. Text about such tags stays (see `_split`).
    """
    worded = WORDED.match(raw)
    if worded and not opened:
        said = [raw[worded.end():]]
        thoughts = [worded["words"] or worded["bare"] or ""]
    else:
        said, thoughts = _split(raw, opened)
    text = _without_marks("".join(said))
    thoughts = "\n\n".join(filter(None, (_without_marks(piece).strip() for piece in thoughts)))
    if thoughts and (wrapped := WRAPPED.match(text)):
        text = wrapped[2]
    return raw if text.strip() == raw.strip() else text.strip(), thoughts


def _split(raw, opened):
    """(pieces that are said, pieces that are thought), read from left to right.

    An opening tag counts at the start of a line, or if a tag closes it before the marker. Inside
    thoughts every closing tag counts; outside, one with words on both sides, as in "split at
    </think> or not", does not. Code after the marker may be about tags: there a tag must be alone
    on its line and not in a multi-line string.
    """
    said, thoughts, inside, start = [""], [], opened, 0
    tags = list(_tags(raw))
    closing = [tag.start() for tag in tags if tag["close"]]
    unclosed = int(opened)
    for tag in tags:
        piece = raw[start:tag.start()]
        before = "".join(said)
        if not inside:
            before += piece
        starts_line = not _without_marks(before[-200:].rpartition("\n")[2]).strip()
        ends_line = not raw[tag.end():tag.end() + 200].partition("\n")[0].strip()
        ambiguous = re.match(rf"</?{AMBIGUOUS}\b", tag[0], re.I)
        if inside or _special(tag[0]):
            counts = True
        elif MARKER in before:
            counts = starts_line and ends_line and not ambiguous and not _within_string(before)
        elif tag["close"]:
            counts = (unclosed > 0 or starts_line and ends_line or
                      not ambiguous and (starts_line or ends_line or not before[-1].isspace()))
        else:
            marker = raw.find(MARKER, tag.end())
            close = bisect(closing, tag.start())
            paired = close < len(closing) and (marker < 0 or closing[close] < marker)
            counts = starts_line or paired and not ambiguous
        if not counts:
            continue
        if tag["open"]:
            unclosed += 1
        elif unclosed:
            unclosed -= 1
        if tag["close"] and not inside:
            thoughts.append(before)
            said = [""]
        else:
            _append(thoughts if inside else said, piece)
        inside = not tag["close"]
        start = tag.end()
    _append(thoughts if inside else said, raw[start:])
    return said, thoughts


def _special(tag):
    """Whether the tag is a token of its own, which pages and code do not contain."""
    return "|" in tag or "◁" in tag


def _within_string(before):
    return before.count('"""') % 2 or before.count("'''") % 2


def _append(pieces, piece):
    if pieces and piece[:1].isspace():  # do not add up the blanks around what was taken out
        pieces[-1] = pieces[-1].rstrip()
    pieces.append(piece)


def _tags(raw):
    """The tags in `raw` outside quoted strings such as "<think>" and r"<think>.*?</think>"."""
    strings = [match.span() for match in QUOTED.finditer(raw) if match[0] != raw.strip()]
    for tag in TAG.finditer(raw):
        while strings and strings[0][1] <= tag.start():
            strings.pop(0)
        if (not strings or strings[0][0] > tag.start() or
                re.search(r"\s", raw[strings[0][0]:tag.start()])):
            yield tag


def has_tag(raw: str) -> bool:
    """Whether `raw` has a tag of thoughts anywhere."""
    return TAG.search(raw) is not None


def thinks_first(raw: str, alone: bool = False) -> bool:
    """Whether `raw` begins within thoughts that the prompt opened: its first tag closes them.

    alone: that tag must be alone on its line and before any answer, so that a text about tags is
    not taken for thoughts.
    """
    tag = next(_tags(raw), None)
    if tag is None or not tag["close"]:
        return False
    before = raw[:tag.start()]
    if not _without_marks(before).strip():
        return False
    around = before.rpartition("\n")[2] + raw[tag.end():].partition("\n")[0]
    return not alone or _special(tag[0]) or not around.strip() and MARKER not in before


def opens_thoughts(prompt: str) -> bool:
    """Whether a prompt ends within thoughts, as the templates of some thinking models do."""
    *_, last = None, *TAG.finditer(prompt)
    return last is not None and last["open"] is not None and not prompt[last.end():].strip()


def _without_marks(text):
    """`text` without the marks before and after it. Those within stay: code may be about them."""
    if not re.search(r"</s>\s*[^\s<]", text):  # otherwise HTML with words struck out
        text = re.sub(r"\A\s*<s>", "", text)
    text = START.sub("", text, count=1)
    for mark in NEXT_TURN.finditer(text):  # the model went on after its turn
        before = text[:mark.start()]
        if not _within_string(before):
            text = before
            break
    struck_out = re.search(r"<s[\s>]", text)
    while mark := END.search(text, max(0, len(text) - 60)):
        if struck_out and mark[0].startswith("</s>"):
            break
        text = text[:mark.start()].rstrip()
    return text


def decoded(tokenizer, ids: list[int]) -> str:
    """The text of sampled ids; of the special tokens, only those that mark thoughts."""
    dropped = _dropped(tokenizer)
    kept = [i for i in ids if i not in dropped]
    # Llama-3.1's default for clean_up_tokenization_spaces would change code
    return tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@lru_cache(maxsize=16)
def _dropped(tokenizer) -> frozenset[int]:
    """Ids of the special tokens, except those that a tag is made of."""
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()
               if token.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
    part = re.compile(rf"{OPEN}|{CLOSE}|\[THINK\]|<\|(?:channel|message|constrain|start|end)\|>",
                      re.I)
    return frozenset(i for i, text in special.items() if not part.fullmatch(text))


# ---- models that play a human

OWN = r"(?:simulated[ _])?(?:human|user|customer|client|person)"
OTHER = (r"(?:(?:ai|programming|coding|helpful|web)[ _])?"
         r"(?:agent|assistant|ai|bot|chatbot|designer|programmer)")
LABEL = (r"(?:me|you|(?:(?:the |my )?(?:final )?(?:reply|response)|(?:my )?(?:final )?answer)"
         r"(?: as (?:the )?human)?)")
AROUND = r"[\s#>*_\[(<\"'`]{0,8}"
COLON = r"(?: ?\([^)\n]{1,30}\))?[*_\])>\"'`]{0,4} {0,4}[:：][*_\])]{0,4} *"
# the speaker's name: at the start, or alone on the first line
SPEAKER = re.compile(
    rf"\A(?:- )?{AROUND}(?:(?:as (?:the )?|the (?=human))?{OWN}(?:'s)?"
    rf"(?: (?:reply|response|answer|says|replies))?|"
    rf"{LABEL}|{OTHER}){COLON}|"
    rf"\A{AROUND}(?:human|assistant|model|user(?=\W*\n\n))[*_\])>:]{{0,4}} *\n+|\A<human>", re.I)
REPEATED = re.compile(rf"\A{AROUND}agent{COLON}.*?(?=\n{AROUND}{OWN}{COLON})", re.I | re.DOTALL)
INTRODUCED = re.compile(
    r"\A(?:(?:sure|ok(?:ay)?|certainly|of course)\b[^\n]{0,20}?)?here(?:'s| is)[^\n]{0,60}\b"
    r"(?:reply|response|answer)\b[^\n]{0,40}:(?: *\n+| +(?=[\"“«][^\n]*[\"”»]\Z))", re.I)
TURNS = rf"(?:{OWN}|{OTHER})(?:'s(?: next)?(?: (?:turn|reply|response|answer|message))?)?"
# where the next turn may begin: a name at the start of a line, or one from the prompt after a
# sentence; a name alone on a line; a heading, a rule, a tag
TURN = re.compile(
    rf"\n\n?{AROUND}(?:{TURNS}|system){COLON}|"
    rf"(?<=[.?!]) +[#*_ ]{{0,6}}(?-i:Agent|Human|Assistant|AGENT|HUMAN|USER|ASSISTANT){COLON}|"
    rf"(?<=[.?!)])\n{{0,2}}(?:assistant|user|model)\n|\n+[#*_\[]+{TURNS}[*_\]]* *(?:\n|\Z)|"
    rf"(?:\n\n+|(?<=[.?!)\"'])\n) {{0,8}}(?:---+|\*\*\*+) *(?:\n|\Z)|"
    rf"\n+ {{0,8}}(?:##+|</?(?:{OWN}|{OTHER})>)|</{OWN}>", re.I)
# a mark ends the turn directly after a word or sentence, or at the start of a line; the text may
# be about others
OVER = re.compile(rf"(?:(?<=[^\s\"'`(\[{{])|(?<=[.?!][\"'])|(?<=\n))(?:</s>|{MARK})", re.I)
ENCLOSED = re.compile(
    r"\A(?:<(human|user|customer|reply|response|answer)>(?P<tagged>.+?)</\1>|"
    r"\*\*(?P<bold>[^*]+)\*\*\Z|"
    r"(?P<mark>[\"'`])(?P<quoted>(?:(?!(?P=mark)).)+)(?P=mark)\Z|"
    r"[“„](?P<curly>[^“”„]+)[”“]\Z|«(?P<pointed>[^«»]+)»\Z)",
    re.I | re.DOTALL)


def reply_alone(text: str) -> str:
    """The reply of a model that plays a human, without name, quotes, marks and the next turn."""
    # this model knows the hidden information: nothing after an opening tag is said
    text = text[:next((tag.start() for tag in _tags(text) if tag["open"]), None)]
    text = _without_marks(text)
    for over in OVER.finditer(text):
        if over[0] != "</s>" or "<s>" not in text:
            text = text[:over.start()]
            break
    text = re.sub(r"\n\n+", "\n\n", "\n".join(map(str.rstrip, text.strip().splitlines())))
    for _ in range(4):  # they may be nested
        if enclosed := ENCLOSED.match(text):
            text = next(filter(None, reversed(enclosed.groups())))
        if text.startswith("```") and text.endswith("\n```") and text.count("```") == 2:
            text = text.partition("\n")[2][:-3]
        text = REPEATED.sub("", INTRODUCED.sub("", text.strip(), count=1), count=1)
        text = SPEAKER.sub("", text, count=1)
        lines = text.strip().splitlines()
        if text.startswith("\n") and all(line.startswith(">") for line in lines):
            text = "\n".join(line[1:].strip() for line in lines)
        text = text[:_next_turn(text)].strip()
    return text


def _next_turn(text):
    """Where the next turn begins, or None. A list, as "The columns:\\nUser: ...", is not a turn."""
    for turn in TURN.finditer(text):
        before = text[:turn.start()]
        above, _, paragraph = before.rpartition("\n\n")
        if turn[0].startswith("\n\n"):
            listed = before.endswith(":")
        elif turn[0].startswith("\n"):
            listed = above.endswith(":") or re.search(r"[:,;](?:\n|\Z)", paragraph)
        else:
            listed = paragraph.rpartition("\n")[2].strip(" .").isdigit()  # "1. Human: yes"
        if not listed:
            return turn.start()
