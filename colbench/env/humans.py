"""Simulated humans: they know the hidden reference, the agent does not.

Every human has `reply(tasks, histories, seeds) -> list[str | Exception]`:
    tasks      B dicts with "problem_description" and "ground_truth" (the hidden reference)
    histories  B dialogues so far, [{"role": "user" | "assistant", "content"}, …], the agent's message last
    seeds      B ints
It may have `leaked`, B bools: in which of its latest replies the first draft held code of the reference; `thoughts`, B
texts of what it thought before it replied, which are kept and never shown to the agent; `notes`, B dicts that are kept
with the agent's messages (a screenshot); `about`, B dicts that are kept with the replies themselves (what `kept_beside`
gives); and `repeatable`, whether equal calls give equal replies.
"""
import io
import re
import tokenize
from collections import namedtuple
from functools import lru_cache

from colbench.lm.server import ServerChat, is_address
from colbench.lm.texts import OnlyThoughts, Reply, kept_beside, reply_alone, spent_on
from colbench.run.errors import UserError
from colbench.run.files import seed_of
from colbench.run.settings import hide_password

PROMPT = """\
You play a person who asked an assistant for this:

{problem_description}

You alone know what follows. The assistant must never see it:

{hidden_information}

When the assistant asks something, tell in plain words what follows from it. If it does not settle the question, say \
that you don't know.

The conversation so far (you are the Human):

{dialogue_history}

Reply to the Agent's last message as the Human, in one or two short sentences, and write nothing but the reply."""
UNKNOWN = "I don't know."
THINKING = 4096  # tokens for a reply of a model that thinks longer than a reply is
RUN = 32   # characters without blanks (about 40 with them) of verbatim code that are a leak
LINE = 15  # the same for a whole line (about 20 with blanks)
OUTSIDE = 10  # that many of them outside string constants: quoting a text of the reference is an answer, not a leak
STRINGS = {value for name, value in vars(tokenize).items()
           if name in ("STRING", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")}  # f-strings: Python 3.12 and later
Code = namedtuple("Code", "headers runs lines")


class ModelHuman:
    """A chat model plays the human. `chat` is anything with `sample`: ServerChat, or the local model.

    Replies are drawn at temperature 0 and cut at `max_characters` (400 in the released environment). One that leaks
    (see `leaks`) is drawn again once at temperature 1; if that leaks too, it is cut there; `cuts` counts these.
    `prompt` may hold {problem_description}, {hidden_information} and {dialogue_history}; PROMPT fits any environment.
    """

    def __init__(self, chat, prompt=PROMPT, max_characters=400):
        self.chat, self.max_characters, self.prompt = chat, max_characters, prompt
        self.repeatable = getattr(chat, "repeatable", False)
        self.replies = self.leaks = self.cuts = 0

    def reply(self, tasks, histories, seeds):
        """See the top of the file. A request that failed has its Exception in its place."""
        prompts = [[{"role": "user", "content": self._prompt(*pair)}] for pair in zip(tasks, histories)]
        references = [task["ground_truth"] for task in tasks]
        drafts = self._draw(prompts, seeds, temperature=0.0)
        leaking = [not isinstance(draft, Exception) and leaks(draft.text, code)
                   for draft, code in zip(drafts, references)]
        again = [i for i, draft in enumerate(drafts) if leaking[i] or getattr(draft, "text", None) == ""]
        if again:
            other_seeds = [seed_of(seeds[i], "again") for i in again]
            second = self._draw([prompts[i] for i in again], other_seeds, temperature=1.0)
            for i, draft in zip(again, second):
                both = spent_on(drafts[i], draft)
                if getattr(draft, "text", ""):  # else the first draft is the best there is
                    drafts[i] = draft
                text, cut = drafts[i].text, drafts[i].cut
                if leaks(text, references[i]):
                    self.cuts += 1
                    text, cut = cut_leak(text, references[i]), True
                drafts[i] = drafts[i]._replace(text=text or UNKNOWN, spent=both, cut=cut)
        self.leaked = leaking
        self.thoughts = [getattr(draft, "thoughts", "") for draft in drafts]
        self.about = [kept_beside(draft) if isinstance(draft, Reply) else {} for draft in drafts]
        self.leaks += sum(leaking)
        self.replies += sum(not isinstance(draft, Exception) for draft in drafts)
        return [draft if isinstance(draft, Exception) else draft.text for draft in drafts]

    def _prompt(self, task, history):
        names = {"user": "Human", "assistant": "Agent"}
        dialogue = "\n\n".join(f"{names[message['role']]}: {message['content']}" for message in history)
        return self.prompt.format(problem_description=task["problem_description"],
                                  hidden_information=task["ground_truth"], dialogue_history=dialogue)

    def _draw(self, prompts, seeds, temperature):
        # English has about four characters a token: half the characters as tokens is ample
        drafts = draw_replies(self.chat, prompts, seeds, temperature, max(16, self.max_characters // 2))
        return [draft if isinstance(draft, Exception) else
                draft._replace(text=draft.text[:self.max_characters].strip(),
                               cut=draft.cut or len(draft.text) > self.max_characters) for draft in drafts]


def draw_replies(chat, prompts, seeds, temperature, max_new_tokens):
    """One Reply, or an Exception, for each prompt of a human that `chat` plays: the reply alone."""
    drafts = [row[0] for row in chat.sample(prompts, [[seed] for seed in seeds], temperature=temperature,
                                            max_new_tokens=max_new_tokens)]
    longer = [i for i, draft in enumerate(drafts) if isinstance(draft, OnlyThoughts)]
    if longer and max_new_tokens < THINKING:
        more = draw_replies(chat, [prompts[i] for i in longer], [seeds[i] for i in longer], temperature, THINKING)
        for i, draft in zip(longer, more):
            both = spent_on(drafts[i], draft)
            drafts[i] = draft._replace(spent=both) if isinstance(draft, Reply) else draft
    return [draft if isinstance(draft, Exception) else draft._replace(text=reply_alone(draft.text)) for draft in drafts]


def chat_human(spec, chat, prompt=PROMPT, kinds="self, or a server's address", max_characters=400):
    """The ModelHuman for `spec`: "self" plays on `chat`, the local model; else a server's address, http://…#MODEL.

    kinds: what else --human takes in this environment, for the message of the UserError.
    """
    if spec == "self":
        if chat is None:
            raise UserError("human self: there is no local model that could play it")
        return ModelHuman(chat, prompt, max_characters)
    if is_address(spec):
        server = ServerChat(spec)
        server.check()
        return ModelHuman(server, prompt, max_characters)
    raise UserError(f"human {hide_password(spec)}: {kinds} is wanted")


# ---- what counts as leaked code


def leaks(reply, reference):
    """Whether `reply` holds code of the reference. Blanks, line ends and case do not matter. Any of these is a leak:

    - the header `def name(` of one of its functions,
    - RUN characters in a row of its code, OUTSIDE of them outside string constants,
    - a whole code line of LINE characters or more, OUTSIDE of them outside string constants, with an operator.
    Comments, docstrings, string constants, numbers, names and a plain `name = 0.15` are answers. Code retold in other
    names is not seen. A reference that is no Python (a page) is taken as code from end to end.
    """
    return _leak_at(reply, reference) is not None


def cut_leak(reply, reference):
    """`reply` up to its first leak, without the fence or quote that opens the code. May be ""."""
    start = _leak_at(reply, reference)
    if start is None:
        return reply
    return re.sub(r"```\w*\s*$", "", reply[:start]).rstrip("`\"'(: \n").strip()


def _leak_at(reply, reference):
    """Index in `reply` where the first leak starts, or None."""
    code = _code(reference)
    kept = [(i, low) for i, character in enumerate(reply) for low in character.lower() if not low.isspace()]
    places, squeezed = [i for i, _ in kept], "".join(low for _, low in kept)
    starts = [found.start() for header in code.headers if (found := header.search(reply))]
    for line in code.lines:
        at = squeezed.find(line)
        if at >= 0:
            starts.append(places[at])
    for at in range(len(squeezed) - RUN + 1):
        if squeezed[at:at + RUN] in code.runs:
            starts.append(places[at])
            break
    return min(starts, default=None)


@lru_cache(maxsize=256)  # each holds some 100 kB
def _code(reference):
    """The reference without blanks and comments: header patterns, all its runs of RUN characters, its long lines."""
    pieces = {}  # row -> [(text without blanks, is it a string constant)]
    for token in python_tokens(reference) or ():
        text = "".join(token.string.split()).lower()
        if text and token.type != tokenize.COMMENT:
            pieces.setdefault(token.start[0], []).append((text, token.type in STRINGS))
    if not pieces:
        pieces = {row: [("".join(line.split()).lower(), False)] for row, line in enumerate(reference.splitlines())}
    lines, whole, outside = set(), "", []
    for row in sorted(pieces):
        line = "".join(text for text, _ in pieces[row])
        code = "".join(text for text, is_string in pieces[row] if not is_string)
        plain = re.fullmatch(r"\w+=[-+]?[\w.]*", code)  # one constant or name
        if len(line) >= LINE and len(code) >= OUTSIDE and re.search(r"[-+*/%<>=(\[{&|^~]", code) and not plain:
            lines.add(line)
        whole += line
        for text, is_string in pieces[row]:
            outside += [not is_string] * len(text)
    runs = {whole[i:i + RUN] for i in range(len(whole) - RUN + 1) if sum(outside[i:i + RUN]) >= OUTSIDE}
    names = re.findall(r"\bdef\s+(\w+)\s*\(", reference)
    headers = [re.compile(rf"\bdef\s+{name}\s*\(", re.IGNORECASE) for name in names]
    return Code(headers, runs, lines)


def python_tokens(reference):
    """Its Python tokens, or None if it is no Python."""
    try:
        return list(tokenize.generate_tokens(io.StringIO(reference).readline))
    except (tokenize.TokenError, SyntaxError):
        return None
