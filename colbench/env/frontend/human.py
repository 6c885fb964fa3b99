"""Simulated humans of Frontend Design: they see the agent's page and the one they have in mind, and say what differs.

Same `reply(tasks, histories, seeds)` as in colbench.env.humans. Who looks at the two pages is one of
    scripted     colbench.env.frontend.reviewer: no model, deterministic
    http://...   a vision model behind an OpenAI-compatible server; the released environment's is Qwen2-VL-72B-Instruct
    a name       hub id or folder of a vision model that transformers runs here
"""
import base64
import io
from functools import lru_cache

from PIL import Image

from colbench.env.frontend.reviewer import review
from colbench.env.humans import draw_replies
from colbench.lm.server import ServerChat, is_address
from colbench.lm.texts import OnlyThoughts, Reply, clean, decoded, kept_beside, opens_thoughts
from colbench.run.errors import UserError

LONGEST_REPLY = 1000  # characters, as in the released environment
# of one picture: 1366 x 5000 px are 8,700 tokens of Qwen2-VL, two of them more than a server's 16,384
MOST_PIXELS = 2_000_000
WATCHER_PROMPT = (
    "You play a person who asked a web designer for a page. You have that page before your eyes, the designer has "
    "never seen it. Below you see first what the designer shows you now, then the page that you want. Tell the "
    "designer in a few sentences, as such a person would, in what the two differ most, the most striking "
    "things first, and concretely: colours, sizes, places, what is missing, what is too much. Write nothing but that, "
    "and no code."
)
MINE, NONE, WANTED = "The designer's page:", "The designer has shown no page this time.", "The page that you want:"


def make_page_human(spec: str, renderer, page_shown):
    """The human for `spec` (see above). UserError: no such human, or one that cannot be used.

    renderer: with layout=True for "scripted". page_shown: history -> page in its last message.
    """
    if spec == "scripted":
        return PageHuman(renderer, page_shown, Scripted())
    if is_address(spec):
        server = ServerChat(spec)
        server.check()
        return PageHuman(renderer, page_shown, Watcher(server))
    if spec == "self":
        raise UserError("--human self: the agent's model sees no pictures; give scripted, a server's address, "
                        "or the name of a vision model")
    return PageHuman(renderer, page_shown, Watcher(LocalVision(spec)))


class PageHuman:
    """Renders what was said last and what is wanted, and lets `watcher` compare. `notes`: where the pictures lie."""

    def __init__(self, renderer, page_shown, watcher):
        self.renderer, self.page_shown, self.watcher = renderer, page_shown, watcher
        self.repeatable = isinstance(watcher, Scripted)  # see colbench.env.dialogue.play
        self.chat = getattr(watcher, "chat", None)
        self.replies = self.leaks = self.cuts = 0

    def reply(self, tasks, histories, seeds):
        """See colbench.env.humans.

        A page that cannot be rendered counts as none; a reference that cannot ends the dialogue.
        """
        pictures = self.renderer.render([*(task["ground_truth"] for task in tasks), *map(self.page_shown, histories)])
        wanted, mine = pictures[:len(tasks)], pictures[len(tasks):]
        sound = [i for i in range(len(tasks)) if wanted[i].path]
        texts = [RuntimeError(f"the reference page cannot be rendered: {picture.refusal}") for picture in wanted]
        self.thoughts, self.about = [""] * len(tasks), [{} for _ in tasks]
        for i, reply in zip(sound, self.watcher.say([(mine[i], wanted[i]) for i in sound], [seeds[i] for i in sound])):
            texts[i] = reply if isinstance(reply, Exception) else reply.text[:LONGEST_REPLY].strip()
            self.thoughts[i] = getattr(reply, "thoughts", "")
            if isinstance(reply, Reply):
                self.about[i] = kept_beside(reply._replace(cut=reply.cut or len(reply.text) > LONGEST_REPLY))
        self.leaked = [False] * len(tasks)  # who sees only pictures has no code to leak
        self.notes = [{"screenshot": f"{picture.path.parent.name}/{picture.path.name}"} if picture.path else
                      {"not_rendered": picture.refusal} if picture.refusal != "no page" else {} for picture in mine]
        self.replies += sum(isinstance(text, str) for text in texts)
        return texts


class Scripted:
    """The reviewer: two layouts to a few sentences."""

    def say(self, pairs, seeds):
        """A Reply about each (agent's picture, reference's picture)."""
        return [Reply(review(mine.layout if mine.path else None, wanted.layout), None) for mine, wanted in pairs]


class Watcher:
    """A vision model. `chat`: anything with `sample`, ServerChat or LocalVision. The likeliest reply is taken."""

    def __init__(self, chat, prompt: str = WATCHER_PROMPT):
        self.chat, self.prompt = chat, prompt

    def say(self, pairs, seeds):
        """A Reply about each (agent's picture, reference's picture), or an Exception."""
        return draw_replies(self.chat, [self._messages(*pair) for pair in pairs], seeds, temperature=0.0,
                            max_new_tokens=512)

    def _messages(self, mine, wanted):
        """One user message: the prompt, the agent's picture first, the reference second."""
        def text(words):
            return {"type": "text", "text": words}

        def image(path):
            return {"type": "image_url", "image_url": {"url": data_url(path)}}
        shown = [text(MINE), image(mine.path)] if mine.path else [text(NONE)]
        return [{"role": "user", "content": [text(self.prompt), *shown, text(WANTED), image(wanted.path)]}]


@lru_cache(maxsize=256)
def data_url(path) -> str:
    """The picture as a data URL, scaled down to MOST_PIXELS; the reward sees the full one."""
    file = io.BytesIO()
    scaled(path).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def scaled(path) -> Image.Image:
    """The RGB picture at a path, of at most MOST_PIXELS."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    if picture.width * picture.height > MOST_PIXELS:
        scale = (MOST_PIXELS / (picture.width * picture.height)) ** 0.5
        size = max(1, int(picture.width * scale)), max(1, int(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return picture


class LocalVision:
    """A vision model in this process. Same `sample` as colbench.lm.server.ServerChat; one dialogue at a time."""

    def __init__(self, name: str, device=None):
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
        self.torch = torch
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            self.processor = AutoProcessor.from_pretrained(name)
            self.model = AutoModelForImageTextToText.from_pretrained(
                name, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32).to(device).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise UserError(f"--human {name}: {reason}; scripted, a server's address, "
                            "or the hub id or folder of a vision model is wanted") from None

    def sample(self, conversations, seeds, temperature=0.0, max_new_tokens=512, stop=None):
        """As ServerChat.sample. An error (a picture too large, no memory) takes the place of its reply."""
        replies = []
        for messages, row in zip(conversations, seeds):
            replies.append([])
            for seed in row:
                try:
                    replies[-1].append(self._one(messages, seed, temperature, max_new_tokens))
                except OnlyThoughts as error:
                    replies[-1].append(error)
                except (RuntimeError, ValueError) as error:
                    replies[-1].append(RuntimeError(str(error).strip().split("\n")[0][:200]))
        return replies

    def _one(self, messages, seed, temperature, max_new_tokens):
        pictures, turns = [], []
        for message in messages:
            parts = []
            for part in message["content"]:
                if part["type"] == "image_url":
                    encoded = part["image_url"]["url"].split(",", 1)[1]
                    pictures.append(Image.open(io.BytesIO(base64.b64decode(encoded))))
                    part = {"type": "image"}
                parts.append(part)
            turns.append({"role": message["role"], "content": parts})
        prompt = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = self.processor(images=pictures, text=prompt, return_tensors="pt")
        inputs = inputs.to(self.model.device, dtype=self.model.dtype)
        self.torch.manual_seed(seed)
        settings = dict(do_sample=True, temperature=temperature) if temperature else dict(do_sample=False)
        with self.torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **settings)
            ids = ids[0, inputs["input_ids"].shape[1]:]
        spent = inputs["input_ids"].shape[1], len(ids)
        text, thoughts = clean(decoded(self.processor.tokenizer, ids.tolist()), opens_thoughts(prompt))
        if thoughts and not text.strip():
            raise OnlyThoughts(f"a reply without text, {len(ids)} tokens that are all thoughts", spent)
        return Reply(text.strip(), len(ids), thoughts, spent, len(ids) == max_new_tokens)
