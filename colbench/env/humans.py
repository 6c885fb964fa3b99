"""Simulated humans: they know the hidden information, the agent does not.

Every human has `reply(tasks, histories, seeds) -> list[str | Exception]`:
    tasks      B dicts with "problem_description" and "ground_truth" (the hidden information)
    histories  B dialogues so far, [{"role": "user" | "assistant", "content"}, …], the last message
               is the agent's
    seeds      B ints
After a call it may have these attributes, each B long:
    leaked     bools: whether the first draft of the reply contained hidden code
    thoughts   strings: what it thought before it replied; kept, never shown to the agent
    notes      dicts kept with the agent's messages (a screenshot)
    about      dicts kept with the replies (from `usage_fields`)
`repeatable` says whether equal calls get equal replies.
"""
import io
import re
import tokenize
from collections import namedtuple
from functools import lru_cache

from colbench.lm.server import ServerChat, is_address
from colbench.lm.texts import OnlyThoughts, Reply, reply_alone, spent_on, usage_fields
from colbench.run.errors import UserError
from colbench.run.files import seed_of
from colbench.run.settings import hide_password

PROMPT = """\
You play a person who asked an assistant for this:

{problem_description}

You alone know what follows. The assistant must never see it:

{hidden_information}

When the assistant asks something, tell in plain words what follows from it. If it does not \
settle the question, say that you don't know.

The conversation so far (you are the Human):

{dialogue_history}

Reply to the Agent's last message as the Human, in one or two short sentences, and write nothing \
but the reply."""
UNKNOWN = "I don't know."
THINKING = 4096  # max tokens for a model whose thoughts do not fit into the usual limit
# Verbatim code is a leak from this many characters on, not counting blanks:
RUN = 32   # anywhere in the code (about 40 with blanks)
LINE = 15  # a whole line (about 20 with blanks)
OUTSIDE = 10  # of them outside string constants: quoting a string is an answer, not a leak
STRING_TOKENS = ("STRING", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")  # f-strings: 3.12 on
STRINGS = {value for name, value in vars(tokenize).items() if name in STRING_TOKENS}
Code = namedtuple("Code", "headers runs lines")


class ModelHuman:
    """A chat model plays the human. `chat` is anything with `sample`: ServerChat or a local model.

    Replies are sampled at temperature 0 and cut at `max_characters` (400 in the released code).
    A reply that leaks (see `leaks`) is sampled once more at temperature 1. If that leaks too, it is
    cut before the leak; `cuts` counts these. `prompt` may contain {problem_description},
    {hidden_information} and {dialogue_history}; PROMPT fits any environment.
    """

    def __init__(self, chat, prompt=PROMPT, max_characters=400):
        self.chat, self.max_characters, self.prompt = chat, max_characters, prompt
        self.repeatable = getattr(chat, "repeatable", False)
        self.replies = self.leaks = self.cuts = 0

    def reply(self, tasks, histories, seeds):
        """See the top of this file. A request that failed returns its Exception."""
        prompts = [[{"role": "user", "content": self._prompt(task, history)}]
                   for task, history in zip(tasks, histories)]
        hidden_infos = [task["ground_truth"] for task in tasks]
        drafts = self._draw(prompts, seeds, temperature=0.0)
        leaking = [not isinstance(draft, Exception) and leaks(draft.text, hidden_info)
                   for draft, hidden_info in zip(drafts, hidden_infos)]
        again = [i for i, draft in enumerate(drafts)
                 if leaking[i] or getattr(draft, "text", None) == ""]
        if again:
            other_seeds = [seed_of(seeds[i], "again") for i in again]
            second = self._draw([prompts[i] for i in again], other_seeds, temperature=1.0)
            for i, draft in zip(again, second):
                both = spent_on(drafts[i], draft)
                if getattr(draft, "text", ""):  # otherwise keep the first draft
                    drafts[i] = draft
                text, cut = drafts[i].text, drafts[i].cut
                if leaks(text, hidden_infos[i]):
                    self.cuts += 1
                    text = cut_leak(text, hidden_infos[i])
                    cut = True
                drafts[i] = drafts[i]._replace(text=text or UNKNOWN, spent=both, cut=cut)
        self.leaked = leaking
        self.thoughts = [getattr(draft, "thoughts", "") for draft in drafts]
        self.about = [usage_fields(draft) if isinstance(draft, Reply) else {}
                      for draft in drafts]
        self.leaks += sum(leaking)
        self.replies += sum(not isinstance(draft, Exception) for draft in drafts)
        return [draft if isinstance(draft, Exception) else draft.text for draft in drafts]

    def _prompt(self, task, history):
        names = {"user": "Human", "assistant": "Agent"}
        dialogue = "\n\n".join(f"{names[message['role']]}: {message['content']}"
                               for message in history)
        return self.prompt.format(problem_description=task["problem_description"],
                                  hidden_information=task["ground_truth"],
                                  dialogue_history=dialogue)

    def _draw(self, prompts, seeds, temperature):
        # English has about four characters per token, so half as many tokens as characters suffice
        max_tokens = max(16, self.max_characters // 2)
        drafts = draw_replies(self.chat, prompts, seeds, temperature, max_tokens)
        return [draft if isinstance(draft, Exception) else
                draft._replace(text=draft.text[:self.max_characters].strip(),
                               cut=draft.cut or len(draft.text) > self.max_characters)
                for draft in drafts]


def draw_replies(chat, prompts, seeds, temperature, max_new_tokens):
    """A Reply or an Exception per prompt, from the chat model that plays the human."""
    rows = chat.sample(prompts, [[seed] for seed in seeds], temperature=temperature,
                       max_new_tokens=max_new_tokens)
    drafts = [row[0] for row in rows]
    longer = [i for i, draft in enumerate(drafts) if isinstance(draft, OnlyThoughts)]
    if longer and max_new_tokens < THINKING:
        more = draw_replies(chat, [prompts[i] for i in longer], [seeds[i] for i in longer],
                            temperature, THINKING)
        for i, draft in zip(longer, more):
            both = spent_on(drafts[i], draft)
            drafts[i] = draft._replace(spent=both) if isinstance(draft, Reply) else draft
    return [draft if isinstance(draft, Exception) else
            draft._replace(text=reply_alone(draft.text)) for draft in drafts]


def chat_human(spec, chat, prompt=PROMPT, kinds="self or a server's address", max_characters=400):
    """The ModelHuman for `spec`: "self" (`chat`, the local model) or a server, http://…#MODEL.

    kinds: what --human takes in this environment, for the error message.
    """
    if spec == "self":
        if chat is None:
            raise UserError("human self: no local model to play it; give a server's address")
        return ModelHuman(chat, prompt, max_characters)
    if is_address(spec):
        server = ServerChat(spec)
        server.check()
        return ModelHuman(server, prompt, max_characters)
    raise UserError(f"human {hide_password(spec)}: expected {kinds}")


# ---- what counts as leaked code


def leaks(reply, hidden_info):
    """Whether `reply` contains hidden code. Blanks, line ends and case do not matter. A leak is:

    - the header `def name(` of a hidden function, or
    - RUN characters in a row of the code, OUTSIDE of them outside string constants, or
    - a whole code line of at least LINE characters with an operator, OUTSIDE of them outside string
      constants.
    Comments, docstrings, string constants, numbers, names and a plain `name = 0.15` are answers.
    Paraphrased code is not detected. Hidden information that is not Python (a page) counts as code
    throughout.
    """
    return _leak_at(reply, hidden_info) is not None


def cut_leak(reply, hidden_info):
    """`reply` up to its first leak, without the fence or quote that opens the code. May be ""."""
    start = _leak_at(reply, hidden_info)
    if start is None:
        return reply
    return re.sub(r"```\w*\s*$", "", reply[:start]).rstrip("`\"'(: \n").strip()


def _leak_at(reply, hidden_info):
    """Index in `reply` where the first leak starts, or None."""
    code = _code(hidden_info)
    kept = [(i, low) for i, character in enumerate(reply) for low in character.lower()
            if not low.isspace()]
    places = [i for i, _ in kept]
    squeezed = "".join(low for _, low in kept)
    starts = [match.start() for header in code.headers if (match := header.search(reply))]
    for line in code.lines:
        at = squeezed.find(line)
        if at >= 0:
            starts.append(places[at])
    for at in range(len(squeezed) - RUN + 1):
        if squeezed[at:at + RUN] in code.runs:
            starts.append(places[at])
            break
    return min(starts, default=None)


@lru_cache(maxsize=256)  # about 100 kB each
def _code(hidden_info):
    """The hidden code without blanks and comments: headers, all runs of RUN characters, lines."""
    pieces = {}  # row -> [(text without blanks, whether it is a string constant)]
    for token in python_tokens(hidden_info) or ():
        text = "".join(token.string.split()).lower()
        if text and token.type != tokenize.COMMENT:
            pieces.setdefault(token.start[0], []).append((text, token.type in STRINGS))
    if not pieces:
        pieces = {row: [("".join(line.split()).lower(), False)]
                  for row, line in enumerate(hidden_info.splitlines())}
    lines, whole, outside = set(), "", []
    for row in sorted(pieces):
        line = "".join(text for text, _ in pieces[row])
        code = "".join(text for text, is_string in pieces[row] if not is_string)
        has_operator = re.search(r"[-+*/%<>=(\[{&|^~]", code)
        plain = re.fullmatch(r"\w+=[-+]?[\w.]*", code)  # one constant or name
        if len(line) >= LINE and len(code) >= OUTSIDE and has_operator and not plain:
            lines.add(line)
        whole += line
        for text, is_string in pieces[row]:
            outside += [not is_string] * len(text)
    runs = {whole[i:i + RUN] for i in range(len(whole) - RUN + 1)
            if sum(outside[i:i + RUN]) >= OUTSIDE}
    names = re.findall(r"\bdef\s+(\w+)\s*\(", hidden_info)
    headers = [re.compile(rf"\bdef\s+{name}\s*\(", re.IGNORECASE) for name in names]
    return Code(headers, runs, lines)


def python_tokens(text):
    """The Python tokens of `text`, or None if it is not Python."""
    try:
        return list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return None
