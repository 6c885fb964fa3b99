"""Simulated humans of Frontend Design: they compare the agent's page with the hidden page.

Same `reply(tasks, histories, seeds)` as in colbench.env.humans. The pages are compared by one of
    scripted     colbench.env.frontend.reviewer: no model, deterministic
    http://...   a vision model behind an OpenAI-compatible server (released environment:
                 Qwen2-VL-72B-Instruct)
    a name       hub id or folder of a vision model that transformers runs here
"""
import base64
import io
from functools import lru_cache

from PIL import Image

from colbench.env.frontend.reviewer import review
from colbench.env.humans import draw_replies
from colbench.lm.server import ServerChat, is_address
from colbench.lm.texts import OnlyThoughts, Reply, clean, decoded, usage_fields, opens_thoughts
from colbench.run.errors import UserError

LONGEST_REPLY = 1000  # characters, as in the released environment
# per picture: two of 1366 x 5000 px (8,700 tokens each in Qwen2-VL) exceed a server's 16,384
MOST_PIXELS = 2_000_000
WATCHER_PROMPT = (
    "You play a person who asked a web designer for a page. You have that page before your eyes, "
    "the designer has never seen it. Below you see first what the designer shows you now, then the "
    "page that you want. Tell the designer in a few sentences, as such a person would, in what the "
    "two differ most, the most striking things first, and concretely: colours, sizes, places, what "
    "is missing, what is too much. Write nothing but that, and no code."
)
SHOWN = "The designer's page:"
NONE = "The designer has shown no page this time."
WANTED = "The page that you want:"


def make_page_human(spec: str, renderer, page_shown):
    """The human for `spec` (see above). UserError: unknown or not usable.

    renderer: needs layout=True for "scripted". page_shown: history -> page in its last message.
    """
    if spec == "scripted":
        return PageHuman(renderer, page_shown, Scripted())
    if is_address(spec):
        server = ServerChat(spec)
        server.check()
        return PageHuman(renderer, page_shown, Watcher(server))
    if spec == "self":
        raise UserError("--human self: the agent's model sees no pictures; give scripted, the "
                        "address of a server or the name of a vision model")
    return PageHuman(renderer, page_shown, Watcher(LocalVision(spec)))


class PageHuman:
    """Renders the agent's page and the hidden page, and lets `watcher` compare them.

    notes: the last picture shown in each dialogue, or why there is none.
    """

    def __init__(self, renderer, page_shown, watcher):
        self.renderer, self.page_shown, self.watcher = renderer, page_shown, watcher
        self.repeatable = isinstance(watcher, Scripted)  # see colbench.env.dialogue.play
        self.chat = getattr(watcher, "chat", None)
        self.replies = self.leaks = self.cuts = 0

    def reply(self, tasks, histories, seeds):
        """See colbench.env.humans.

        If the agent's page cannot be rendered, the human sees none. If the hidden page cannot, the
        dialogue ends.
        """
        hidden_pages = [task["ground_truth"] for task in tasks]
        pictures = self.renderer.render([*hidden_pages, *map(self.page_shown, histories)])
        hidden, shown = pictures[:len(tasks)], pictures[len(tasks):]
        sound = [i for i in range(len(tasks)) if hidden[i].path]
        texts = [RuntimeError(f"the hidden page cannot be rendered: {picture.refusal}")
                 for picture in hidden]
        self.thoughts = [""] * len(tasks)
        self.about = [{} for _ in tasks]
        pairs = [(shown[i], hidden[i]) for i in sound]
        for i, reply in zip(sound, self.watcher.say(pairs, [seeds[i] for i in sound])):
            texts[i] = reply if isinstance(reply, Exception) else reply.text[:LONGEST_REPLY].strip()
            self.thoughts[i] = getattr(reply, "thoughts", "")
            if isinstance(reply, Reply):
                cut = reply.cut or len(reply.text) > LONGEST_REPLY
                self.about[i] = usage_fields(reply._replace(cut=cut))
        self.leaked = [False] * len(tasks)  # pictures contain no code to leak
        self.notes = [{} for _ in tasks]
        for note, picture in zip(self.notes, shown):
            if picture.path:
                note["screenshot"] = f"{picture.path.parent.name}/{picture.path.name}"
            elif picture.refusal != "no page":
                note["not_rendered"] = picture.refusal
        self.replies += sum(isinstance(text, str) for text in texts)
        return texts


class Scripted:
    """The reviewer: compares two layouts in a few sentences."""

    def say(self, pairs, seeds):
        """A Reply about each (agent's Picture, hidden page's Picture)."""
        return [Reply(review(shown.layout if shown.path else None, hidden.layout), None)
                for shown, hidden in pairs]


class Watcher:
    """A vision model, decoded greedily. chat: anything with `sample`, ServerChat or LocalVision."""

    def __init__(self, chat, prompt: str = WATCHER_PROMPT):
        self.chat, self.prompt = chat, prompt

    def say(self, pairs, seeds):
        """A Reply about each (agent's Picture, hidden page's Picture), or an Exception."""
        return draw_replies(self.chat, [self._messages(*pair) for pair in pairs], seeds,
                            temperature=0.0, max_new_tokens=512)

    def _messages(self, shown, hidden):
        """One user message: the prompt, the agent's picture, the picture of the hidden page."""
        def text(words):
            return {"type": "text", "text": words}

        def image(path):
            return {"type": "image_url", "image_url": {"url": data_url(path)}}
        first = [text(SHOWN), image(shown.path)] if shown.path else [text(NONE)]
        content = [text(self.prompt), *first, text(WANTED), image(hidden.path)]
        return [{"role": "user", "content": content}]


@lru_cache(maxsize=256)
def data_url(path) -> str:
    """The picture as a data URL, scaled down to MOST_PIXELS; the reward uses the full picture."""
    file = io.BytesIO()
    scaled(path).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def scaled(path) -> Image.Image:
    """The RGB picture at a path, scaled down to at most MOST_PIXELS."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    if picture.width * picture.height > MOST_PIXELS:
        scale = (MOST_PIXELS / (picture.width * picture.height)) ** 0.5
        size = max(1, int(picture.width * scale)), max(1, int(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return picture


class LocalVision:
    """A vision model in this process; answers one dialogue at a time.

    Same `sample` as colbench.lm.server.ServerChat.
    """

    def __init__(self, name: str, device=None):
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
        self.torch = torch
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        try:
            self.processor = AutoProcessor.from_pretrained(name)
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
            self.model = model.to(device).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise UserError(f"--human {name}: {reason}; give scripted, the address of a server, or "
                            "the hub id or folder of a vision model") from None

    def sample(self, conversations, seeds, temperature=0.0, max_new_tokens=512, stop=None):
        """As ServerChat.sample. An error (picture too large, no memory) replaces its reply."""
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
        settings = dict(do_sample=False)
        if temperature:
            settings = dict(do_sample=True, temperature=temperature)
        with self.torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **settings)
            ids = ids[0, inputs["input_ids"].shape[1]:]
        spent = inputs["input_ids"].shape[1], len(ids)
        text = decoded(self.processor.tokenizer, ids.tolist())
        text, thoughts = clean(text, opens_thoughts(prompt))
        if thoughts and not text.strip():
            raise OnlyThoughts(f"a reply without text: all {len(ids)} tokens are thoughts", spent)
        return Reply(text.strip(), len(ids), thoughts, spent, len(ids) == max_new_tokens)
