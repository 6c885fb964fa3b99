"""What a model says, out of what it wrote. Every message goes through `clean`, a local model's and a served one's:

    thoughts    what stands in <think>...</think>, or in the marks of another family, is kept but not said
    marks       chat-template marks that were left in the text are cut off

What plays a human also writes who speaks, quotes, or the next turn: `reply_alone` leaves the reply.
"""
import re
from collections import namedtuple
from functools import lru_cache

# text: what is said; tokens: how many were generated, or None where a server does not say; thoughts: may be ""
Reply = namedtuple("Reply", "text tokens thoughts", defaults=("",))


class NoText(RuntimeError):
    """A reply that says nothing."""


class OnlyThoughts(NoText):
    """A reply whose thoughts did not come to an end."""


# Each family opens and closes its thoughts in its own way
NAME = r"(?:[\w.]+[:_.-])?(?:think(?:ing)?|thoughts?|reasoning|scratchpad|reflection)"
OPEN = "|".join((
    rf"<\s*{NAME}(?:\s[^<>\n]{{0,60}})?>",  # Qwen3, DeepSeek-R1, Granite 3.3; <seed:think>; EXAONE's <thought>
    r"(?<![\w\])])(?:(?-i:\[THINK\])|\[think\](?=[\s\S]*?\[/think\]))",  # Magistral; in small letters x[think] is code
    r"◁\s*think\s*▷",  # Kimi
    r"<\|(?:(?:start|begin)_(?:of_)?)?think(?:ing)?\|>|<\|begin_of_thought\|>|<\|inner_prefix\|>",  # Command A, Apertus
    r"<\|channel\|>\s*(?:analysis|commentary)\b[^<]{0,60}(?:<\|message\|>)?",  # gpt-oss
    r"<\|channel>(?:\s*thoughts?\b)?",  # Gemma 4
))
CLOSE = "|".join((
    rf"<\s*/\s*{NAME}\s*>", r"\[/think\]", r"◁\s*/\s*think\s*▷",
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


def clean(raw: str, opened: bool = False) -> tuple[str, str]:
    """(what is said, what is only thought) of a model's raw text.

    A closing tag alone closes what the prompt had opened: all before it is thought. An opening tag alone was cut by the
    bound on tokens: all behind it is thought. Tags in a quoted string of code are code. opened: the prompt did open it.
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
    said, thoughts, inside, start = [], [], opened, 0
    for tag in _tags(raw):
        piece, closes = raw[start:tag.start()], tag["close"] is not None
        if closes and not inside:
            thoughts.append("".join(said) + piece)
            said = []
        else:
            _append(thoughts if inside else said, piece)
        inside, start = not closes, tag.end()
    _append(thoughts if inside else said, raw[start:])
    return said, thoughts


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


def thinks_first(raw: str) -> bool:
    """Whether it begins within thoughts that the prompt had opened: its first tag closes them."""
    tag = next(_tags(raw), None)
    return tag is not None and tag["close"] is not None and bool(_without_marks(raw[:tag.start()]).strip())


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
        if not (before.count('"""') % 2 or before.count("'''") % 2):
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
LABEL = r"(?:me|you|answer|(?:the |my )?(?:reply|response))"
AROUND = r"[\s#>*_\[(<\"'`]{0,8}"
COLON = r"(?: ?\([^)\n]{1,30}\))?[*_\])>\"'`]{0,4} {0,4}[:：][*_\])]{0,4} *"
# who speaks: at the beginning, or alone on the first line
SPEAKER = re.compile(
    rf"\A(?:- )?{AROUND}(?:{OWN}(?:'s)?(?: (?:reply|response|answer|says|replies))?|{LABEL}|{OTHER}){COLON}|"
    rf"\A{AROUND}(?:human|assistant|model|user(?=\W*\n\n))[*_\])>:]{{0,4}} *\n+|\A<human>", re.I)
REPEATED = re.compile(rf"\A{AROUND}agent{COLON}.*?(?=\n{AROUND}{OWN}{COLON})", re.I | re.DOTALL)
INTRODUCED = re.compile(r"\A(?:(?:sure|ok(?:ay)?|certainly|of course)\b[^\n]{0,20}?)?here(?:'s| is)[^\n]{0,60}\b"
                        r"(?:reply|response|answer)\b[^\n]{0,40}: *\n+", re.I)
# what can be the next turn: a name at the beginning of a line, or one that the prompt has, behind a sentence; the name
# alone on a line; a heading, a rule, a tag
TURN = re.compile(
    rf"\n\n?{AROUND}(?:{OWN}|{OTHER}|system){COLON}|(?<=[.?!]) +[*_]{{0,2}}(?-i:Agent|Human|Assistant){COLON}|"
    rf"(?<=[.?!)])\n{{0,2}}(?:assistant|user|model)\n|\n+[#*_\[]+(?:{OWN}|{OTHER})[*_\]]* *\n|"
    rf"\n+ {{0,8}}(?:##+|(?:---+|\*\*\*+) *(?:\n|\Z)|</?(?:{OWN}|{OTHER})>)|</{OWN}>", re.I)
ENCLOSED = re.compile(
    r"\A(?:<(human|user|customer|reply|response|answer)>(?P<tagged>.+?)</\1>|\*\*(?P<bold>[^*]+)\*\*\Z|"
    r"(?P<mark>[\"'`])(?P<quoted>(?:(?!(?P=mark)).)+)(?P=mark)\Z|[“„](?P<curly>[^“”„]+)[”“]\Z|«(?P<pointed>[^«»]+)»\Z)",
    re.I | re.DOTALL)


def reply_alone(text: str) -> str:
    """The reply in what a model wrote that plays a human: without speaker's name, quotes, marks, and the next turn."""
    text = re.split(rf"</s>|{MARK}", _without_marks(text))[0].strip()
    text = re.sub(r"\n\n+", "\n\n", "\n".join(map(str.rstrip, text.splitlines())))
    for _ in range(4):  # one may stand in the other
        if enclosed := ENCLOSED.match(text):
            text = next(filter(None, reversed(enclosed.groups())))
        text = REPEATED.sub("", INTRODUCED.sub("", text.strip(), count=1), count=1)
        text = SPEAKER.sub("", text, count=1)
        text = text[:_next_turn(text)].strip()
    return text


def _next_turn(text):
    """Where the next turn begins, or None. The lines of "These are the columns:\\nUser: ...\\nAgent: ..." are none."""
    for found in TURN.finditer(text):
        paragraph = text[:found.start()].rpartition("\n\n")[2]
        if not (found[0].startswith("\n") and found[0][1] != "\n" and re.search(r"[:,;](?:\n|\Z)", paragraph)):
            return found.start()
