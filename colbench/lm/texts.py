"""What a model says, out of what it wrote. Every message goes through `clean`, a local model's and a served one's:

    thoughts    what stands in <think>...</think>, or in the marks of another family, is kept but not said
    marks       chat-template marks that were left in the text are cut off

What plays a human also writes who speaks, quotes, or the next turn: `reply_alone` leaves the reply.
"""
import re
from bisect import bisect
from collections import namedtuple
from functools import lru_cache

MARKER = "I WANT TO ANSWER:"  # what stands behind it in an agent's message is the answer (colbench/env/dialogue.py)

# text: what is said; tokens: how many were generated, or None where a server does not say; thoughts: may be "";
# spent: (tokens read, tokens written) for it and for earlier tries, or None; cut: whether the bound on tokens ended it
Reply = namedtuple("Reply", "text tokens thoughts spent cut", defaults=("", None, False))


class NoText(RuntimeError):
    """A reply that says nothing. spent: as a Reply's."""

    def __init__(self, message, spent=None):
        super().__init__(message)
        self.spent = spent


class OnlyThoughts(NoText):
    """A reply whose thoughts did not come to an end."""


# Each family opens and closes its thoughts in its own way
NAME = r"(?:[\w.]+[:_.-])?(?:think(?:ing)?|thoughts?|reasoning|scratch_?pad|reflection)"
MODEST = r"(?:inner_monologue|analysis|reason|cot)"  # names that a page may well have: only at a line's beginning
OPEN = "|".join((
    # Qwen3, DeepSeek-R1, Granite 3.3; <seed:think>; EXAONE's <thought>
    rf"<(?:{NAME}|{MODEST})(?:\s+\w+=\"[^\"\n]{{0,60}}\")*>",
    r"\[think\]",  # Magistral
    r"◁\s*think\s*▷",  # Kimi
    r"<\|(?:(?:start|begin)_(?:of_)?)?think(?:ing)?\|>|<\|begin_of_thought\|>|<\|inner_prefix\|>",  # Command A, Apertus
    r"<\|channel\|>\s*(?:analysis|commentary)\b[^<]{0,60}(?:<\|message\|>)?",  # gpt-oss
    r"<\|channel>(?:\s*thoughts?\b)?",  # Gemma 4
))
CLOSE = "|".join((
    rf"</(?:{NAME}|{MODEST})\s*>", r"\[/think\]", r"◁\s*/\s*think\s*▷",
    r"<\|(?:end_(?:of_)?|/)think(?:ing)?\|>|<\|end_of_thought\|>|<\|inner_suffix\|>",
    r"<\|channel\|>\s*final\b[^<]{0,60}(?:<\|constrain\|>[^<]{0,60})?(?:<\|message\|>)?",
    r"<channel\|>",
))
TAG = re.compile(rf"(?P<open>{OPEN})|(?P<close>{CLOSE})", re.I)
QUOTED = re.compile(r"""(?<!\w)[rbfu]{0,2}(["'`])(?:(?!\1)[^\n])*\1(?!\w)""", re.I)
# Granite 3.2 says it in words; where gpt-oss's marks were dropped the names of its channels stand bare
WORDED = re.compile(r"\A\s*(?:here(?: i|')s my thought process:(?P<words>.*?)(?:here(?: i|')s my response:|\Z)|"
                    r"(?-i:analysis)(?=(?-i:[A-Z])|.*assistantfinal)(?P<bare>.*?)(?:assistantfinal|\Z))",
                    re.I | re.DOTALL)
WRAPPED = re.compile(r"\A\s*<(response|answer|output|final_answer)>(.*?)(?:</\1>\s*)?\Z", re.I | re.DOTALL)

# Marks of chat templates
MARK = r"<\|[^|<>\s]{1,40}\|?>|<[^|<>\s]{1,20}\|>|<｜[^｜<>]{1,40}｜>|<(?:bos|eos|pad|end_of_turn)>|\[/?INST\]|\[EOS\]"
ROLE = r"(?:assistant|user|human|system|model|bot)"
HEADER = (rf"<\|(?:start_header_id|im_start|start|start_of_role|role_start)\|>\s*{ROLE}\s*(?:<\|[a-z_]+\|>)?|"
          rf"<(?:start_of_turn|\|turn)>\s*{ROLE}\b|<\|{ROLE}\|>|<｜{ROLE}｜>|\[INST\]")
START = re.compile(rf"\A\s*(?:(?:{HEADER}|{MARK})\s*)*(?:(?:assistant|model)[ \t]*\n+)?", re.I)
END = re.compile(rf"(?:</s>|{MARK})\s*\Z", re.I)
NEXT_TURN = re.compile(rf"(?:</s>|{MARK})\s*(?:{HEADER}|{ROLE}[ \t]*\n)", re.I)


def spent_on(*replies) -> tuple[int, int] | None:
    """(tokens read, tokens written) for these replies and errors together; None where a reply does not say."""
    known = [reply.spent for reply in replies if hasattr(reply, "spent")]  # no other error came out of a model
    return None if None in known else (sum(read for read, _ in known), sum(written for _, written in known))


def kept_beside(reply: Reply) -> dict:
    """What is kept beside a message: {"tokens" (its own), "read" and "written" (to get it, with all tries), "cut"}.

    "written" only where it is not "tokens", "cut" only where it is true; none of what a server does not say.
    """
    read, written = reply.spent or (None, None)
    found = {"tokens": reply.tokens, "read": read, "written": None if written == reply.tokens else written,
             "cut": reply.cut or None}
    return {name: value for name, value in found.items() if value is not None}


def clean(raw: str, opened: bool = False) -> tuple[str, str]:
    """(what is said, what is only thought) of a model's raw text.

    A closing tag alone closes what the prompt had opened: all before it is thought. An opening tag alone was cut by the
    bound on tokens: all behind it is thought. What is about such tags stays (see `_split`). opened: the prompt did open
    thoughts.
    """
    worded = WORDED.match(raw)
    if worded and not opened:
        said, thoughts = [raw[worded.end():]], [worded["words"] or worded["bare"] or ""]
    else:
        said, thoughts = _split(raw, opened)
    text = _without_marks("".join(said))
    thoughts = "\n\n".join(filter(None, (_without_marks(piece).strip() for piece in thoughts)))
    if thoughts and (wrapped := WRAPPED.match(text)):
        text = wrapped[2]
    return raw if text.strip() == raw.strip() else text.strip(), thoughts


def _split(raw, opened):
    """Pieces of what is said and of what is thought, read from left to right.

    A tag opens at a line's beginning, or where one closes before the marker. What is open, any tag closes; else one
    closes unless words stand on both sides of it, as in "split at </think> or not". Behind the marker there may be code
    about tags: there a tag stands alone on its line, in no string of several lines.
    """
    said, thoughts, inside, start = [""], [], opened, 0
    tags = list(_tags(raw))
    closing = [tag.start() for tag in tags if tag["close"]]
    owed = int(opened)  # openings that have not been closed
    for tag in tags:
        piece, before = raw[start:tag.start()], "".join(said)
        if not inside:
            before += piece
        ahead = not _without_marks(before[-200:].rpartition("\n")[2]).strip()
        modest = re.match(rf"</?{MODEST}\b", tag[0], re.I)
        alone = not raw[tag.end():tag.end() + 200].partition("\n")[0].strip()
        if inside or _special(tag[0]):
            counts = True
        elif MARKER in before:
            counts = ahead and alone and not modest and not _within_string(before)
        elif tag["close"]:
            counts = owed > 0 or ahead and alone or not modest and (ahead or alone or not before[-1].isspace())
        else:
            marker, close = raw.find(MARKER, tag.end()), bisect(closing, tag.start())
            paired = close < len(closing) and (marker < 0 or closing[close] < marker)
            counts = ahead or paired and not modest
        if not counts:
            continue
        owed += 1 if tag["open"] else -1 if owed else 0
        if tag["close"] and not inside:
            thoughts.append(before)
            said = [""]
        else:
            _append(thoughts if inside else said, piece)
        inside, start = not tag["close"], tag.end()
    _append(thoughts if inside else said, raw[start:])
    return said, thoughts


def _special(tag):
    """Whether it is a token of its own, which no page or code has."""
    return "|" in tag or "◁" in tag


def _within_string(before):
    return before.count('"""') % 2 or before.count("'''") % 2


def _append(pieces, piece):
    if pieces and piece[:1].isspace():  # the blanks on both sides of what was taken out would add up
        pieces[-1] = pieces[-1].rstrip()
    pieces.append(piece)


def _tags(raw):
    """The tags in `raw` that are none of a quoted string: "<think>", r"<think>.*?</think>", "{x}</think>"."""
    strings = [found.span() for found in QUOTED.finditer(raw) if found[0] != raw.strip()]
    for tag in TAG.finditer(raw):
        while strings and strings[0][1] <= tag.start():
            strings.pop(0)
        if not strings or strings[0][0] > tag.start() or re.search(r"\s", raw[strings[0][0]:tag.start()]):
            yield tag


def has_tag(raw: str) -> bool:
    """Whether it holds a tag of thoughts anywhere."""
    return TAG.search(raw) is not None


def thinks_first(raw: str, alone: bool = False) -> bool:
    """Whether it begins within thoughts that the prompt had opened: its first tag closes them.

    alone: that tag must stand alone on its line, before any answer, so that no text about tags is taken for thoughts.
    """
    tag = next(_tags(raw), None)
    if tag is None or not tag["close"] or not _without_marks(raw[:tag.start()]).strip():
        return False
    around = raw[:tag.start()].rpartition("\n")[2] + raw[tag.end():].partition("\n")[0]
    return not alone or _special(tag[0]) or not around.strip() and MARKER not in raw[:tag.start()]


def opens_thoughts(prompt: str) -> bool:
    """Whether a prompt ends within the thoughts of the answer, as the templates of some thinking models do."""
    *_, last = None, *TAG.finditer(prompt)
    return last is not None and last["open"] is not None and not prompt[last.end():].strip()


def _without_marks(text):
    """`text` without the marks before and behind it. Within it there may be code that is about such marks."""
    if not re.search(r"</s>\s*[^\s<]", text):  # else it is HTML, words struck out
        text = re.sub(r"\A\s*<s>", "", text)
    text = START.sub("", text, count=1)
    for found in NEXT_TURN.finditer(text):  # the server went on when the turn was over
        before = text[:found.start()]
        if not _within_string(before):
            text = before
            break
    struck_out = re.search(r"<s[\s>]", text)
    while (mark := END.search(text, max(0, len(text) - 60))) and not (struck_out and mark[0].startswith("</s>")):
        text = text[:mark.start()].rstrip()
    return text


def decoded(tokenizer, ids: list[int]) -> str:
    """The text of sampled ids, with those special tokens that mark thoughts."""
    dropped = _dropped(tokenizer)
    kept = [i for i in ids if i not in dropped]
    # Llama-3.1's own setting of the last argument would edit code
    return tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@lru_cache(maxsize=16)
def _dropped(tokenizer) -> frozenset[int]:
    """Its special tokens but for those that a tag is made of."""
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
    part = re.compile(rf"{OPEN}|{CLOSE}|\[THINK\]|<\|(?:channel|message|constrain|start|end)\|>", re.I)
    return frozenset(i for i, text in special.items() if not part.fullmatch(text))


# ---- what plays a human

OWN = r"(?:simulated[ _])?(?:human|user|customer|client|person)"
OTHER = r"(?:(?:ai|programming|coding|helpful|web)[ _])?(?:agent|assistant|ai|bot|chatbot|designer|programmer)"
LABEL = r"(?:me|you|(?:(?:the |my )?(?:final )?(?:reply|response)|(?:my )?(?:final )?answer)(?: as (?:the )?human)?)"
AROUND = r"[\s#>*_\[(<\"'`]{0,8}"
COLON = r"(?: ?\([^)\n]{1,30}\))?[*_\])>\"'`]{0,4} {0,4}[:：][*_\])]{0,4} *"
# who speaks: at the beginning, or alone on the first line
SPEAKER = re.compile(
    rf"\A(?:- )?{AROUND}(?:(?:as (?:the )?|the (?=human))?{OWN}(?:'s)?(?: (?:reply|response|answer|says|replies))?|"
    rf"{LABEL}|{OTHER}){COLON}|"
    rf"\A{AROUND}(?:human|assistant|model|user(?=\W*\n\n))[*_\])>:]{{0,4}} *\n+|\A<human>", re.I)
REPEATED = re.compile(rf"\A{AROUND}agent{COLON}.*?(?=\n{AROUND}{OWN}{COLON})", re.I | re.DOTALL)
INTRODUCED = re.compile(r"\A(?:(?:sure|ok(?:ay)?|certainly|of course)\b[^\n]{0,20}?)?here(?:'s| is)[^\n]{0,60}\b"
                        r"(?:reply|response|answer)\b[^\n]{0,40}:(?: *\n+| +(?=[\"“«][^\n]*[\"”»]\Z))", re.I)
TURNS = rf"(?:{OWN}|{OTHER})(?:'s(?: next)?(?: (?:turn|reply|response|answer|message))?)?"
# what can be the next turn: a name at the beginning of a line, or one that the prompt has, behind a sentence; the name
# alone on a line; a heading, a rule, a tag
TURN = re.compile(
    rf"\n\n?{AROUND}(?:{TURNS}|system){COLON}|"
    rf"(?<=[.?!]) +[#*_ ]{{0,6}}(?-i:Agent|Human|Assistant|AGENT|HUMAN|USER|ASSISTANT){COLON}|"
    rf"(?<=[.?!)])\n{{0,2}}(?:assistant|user|model)\n|\n+[#*_\[]+{TURNS}[*_\]]* *(?:\n|\Z)|"
    rf"(?:\n\n+|(?<=[.?!)\"'])\n) {{0,8}}(?:---+|\*\*\*+) *(?:\n|\Z)|"
    rf"\n+ {{0,8}}(?:##+|</?(?:{OWN}|{OTHER})>)|</{OWN}>", re.I)
# a mark that ends the turn stands directly behind what is said, or on a line of its own; others are spoken about
OVER = re.compile(rf"(?:(?<=[^\s\"'`(\[{{])|(?<=[.?!][\"'])|(?<=\n))(?:</s>|{MARK})", re.I)
ENCLOSED = re.compile(
    r"\A(?:<(human|user|customer|reply|response|answer)>(?P<tagged>.+?)</\1>|\*\*(?P<bold>[^*]+)\*\*\Z|"
    r"(?P<mark>[\"'`])(?P<quoted>(?:(?!(?P=mark)).)+)(?P=mark)\Z|[“„](?P<curly>[^“”„]+)[”“]\Z|«(?P<pointed>[^«»]+)»\Z)",
    re.I | re.DOTALL)


def reply_alone(text: str) -> str:
    """The reply in what a model wrote that plays a human: without speaker's name, quotes, marks, and the next turn."""
    # who plays the human knows what is hidden: what stands behind an opening tag anywhere is not said
    text = text[:next((tag.start() for tag in _tags(text) if tag["open"]), None)]
    text = _without_marks(text)
    if over := next((mark for mark in OVER.finditer(text) if mark[0] != "</s>" or "<s>" not in text), None):
        text = text[:over.start()]
    text = re.sub(r"\n\n+", "\n\n", "\n".join(map(str.rstrip, text.strip().splitlines())))
    for _ in range(4):  # one may stand in the other
        if enclosed := ENCLOSED.match(text):
            text = next(filter(None, reversed(enclosed.groups())))
        if text.startswith("```") and text.endswith("\n```") and text.count("```") == 2:
            text = text.partition("\n")[2][:-3]
        text = REPEATED.sub("", INTRODUCED.sub("", text.strip(), count=1), count=1)
        text = SPEAKER.sub("", text, count=1)
        if text.startswith("\n") and all(line.startswith(">") for line in text.strip().splitlines()):
            text = "\n".join(line[1:].strip() for line in text.strip().splitlines())
        text = text[:_next_turn(text)].strip()
    return text


def _next_turn(text):
    """Where the next turn begins, or None. The lines of "These are the columns:\\nUser: ...\\nAgent: ..." are none."""
    for found in TURN.finditer(text):
        before = text[:found.start()]
        above, _, paragraph = before.rpartition("\n\n")
        if found[0].startswith("\n\n"):
            listed = before.endswith(":")
        elif found[0].startswith("\n"):
            listed = above.endswith(":") or re.search(r"[:,;](?:\n|\Z)", paragraph)
        else:
            listed = paragraph.rpartition("\n")[2].strip(" .").isdigit()  # "1. Human: yes"
        if not listed:
            return found.start()
