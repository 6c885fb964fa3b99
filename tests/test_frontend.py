"""Frontend Design: protocol, tasks, rewards, reviewer, vision models."""
import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from colbench.env.data import load_trajectories
from colbench.env.dialogue import play
from colbench.env.frontend import human as humans
from colbench.env.frontend.browser import Picture, Renderer
from colbench.env.frontend.environment import Frontend, load_opponent, win_rate
from colbench.env.frontend.human import (
    LONGEST_REPLY,
    MOST_PIXELS,
    PageHuman,
    Watcher,
    make_page_human,
)
from colbench.env.frontend.pages import BUSINESSES, compose, edits, expand, page_tasks
from colbench.env.frontend.protocol import extract, final_page, page_shown
from colbench.env.frontend.reviewer import NOTHING, SAME, align, colour, review
from colbench.env.frontend.score import Clip, Pixels, make_measure, preprocess
from colbench.lm.load import EMBEDDED
from colbench.lm.server import Reply, ServerChat
from colbench.run.errors import UserError
from conftest import needs_browser
from edited_pages import OWN, own
from stages import refused, run
from tiny_vision import save_tiny_vision

# ----------------------------------------------------------------------------------------- protocol

PAGE = '<html class="a">\n<body>one</body></html>'


@pytest.mark.parametrize("message, page", [
    (f"Here: {PAGE} and {PAGE.replace('one', 'two')}", PAGE),  # the first page
    (f"<!DOCTYPE html>\n{PAGE}", PAGE),  # quirks mode
    ("<html><body>never closed</body>", "<body>never closed</body>"),  # falls back to the body
    ("<html><body>never closed", None), ("no page", None), ("<HTML><BODY>x</BODY></HTML>", None),
    ("I use the <html> tag: <html><body>x</body></html>",
     "<html> tag: <html><body>x</body></html>"),
    ("<head><link></head><body>x</body>", "<body>x</body>"),  # the head is lost
    ('<html><img src="https://source.unsplash.com/random/30x20/?cat,dog"></html>',
     '<html><img src="https://picsum.photos/id/48/30/20,dog"></html>'),
    ('<html><img src="https://picsum.photos/30/20">'
     '<img src="https://picsum.photos/id/7/3/2"></html>',
     '<html><img src="https://picsum.photos/id/48/30/20">'
     '<img src="https://picsum.photos/id/7/3/2"></html>'),
])
def test_published_extraction(message, page):
    assert extract(message) == page


@pytest.mark.parametrize("message, page", [
    (f"{PAGE.replace('one', 'two')} better: {PAGE}", PAGE),
    ("<HTML><BODY>x</BODY></HTML>", "<HTML><BODY>x</BODY></HTML>"),
    ("```html\n<html><body>cut off\n```", "<html><body>cut off\n"),
    ("<head><link></head><body>x</body>", "<head><link></head><body>x</body>"),
    ("no page", None),
])
def test_tolerant_extraction(message, page):
    assert extract(message, "tolerant") == page


class Says:
    """An agent that takes its messages from a list."""

    def __init__(self, *messages):
        self.messages = list(messages)

    def sample(self, conversations, seeds, **_):
        return [[Reply(self.messages.pop(0), 1)] for _ in conversations]


class Hears:
    """A human that records the pages it was shown."""

    def __init__(self):
        self.seen = []

    def reply(self, tasks, histories, seeds):
        self.leaked, self.notes = [False], [{"screenshot": f"{len(self.seen)}.png"}]
        self.seen += [page_shown(history) for history in histories]
        return ["more red"]


def episode(*messages, max_turns=10):
    human = Hears()
    task = {"id": "a", "problem_description": "a page", "ground_truth": "<html></html>"}
    batches = play(Says(*messages), human, [(task, 0)], agent_prompt="Ask.",
                   answer=Frontend(None).answer, max_turns=max_turns)
    return [e for batch in batches for e in batch][0], human.seen


def test_answer_is_the_last_page_shown():
    first, second = "<html>1</html>", "<html>2</html>"
    done, seen = episode(f"thinking <html>0</html> OUTPUT:\n{first}", "OUTPUT: no page",
                         f"OUTPUT: I WANT TO ANSWER: {second} OUTPUT: x")
    assert (done["answer"], done["outcome"], seen) == (second, "answered", [first, None])
    screenshots = [m.get("screenshot") for m in done["dialogue_history"]]
    assert screenshots == [None, "0.png", None, "1.png", None, None]
    # an answer without a page keeps the page before it
    assert episode(first, "I WANT TO ANSWER: done")[0]["answer"] == first
    # the marker counts only after OUTPUT:
    done, seen = episode(f"I WANT TO ANSWER: OUTPUT: {first}", second, max_turns=2)
    assert (done["answer"], done["outcome"], seen) == (second, "limit", [first])
    assert episode("nothing", max_turns=1)[0]["answer"] == ""


def test_page_language():
    request = page_tasks("train", 1)[0]["problem_description"]
    business = next(name for name in BUSINESSES if name in request)
    said = ["columns 3\nmenu: left", "nonsense 4\ncolumns 7", "columns 2\nbutton red"]
    history = [{"role": "user", "content": request}]
    assert expand(history) is None
    for text in said:
        history += [{"role": "assistant", "content": text},
                    {"role": "user", "content": "button green"}]
    wanted = compose(business, {"columns": "2", "menu": "left", "button": "red"})
    assert expand(history) == final_page(history, "edits") == wanted
    assert page_shown(history[:6], "edits") == wanted
    assert edits(said[1]) == {} and page_shown(history[:4], "edits") is None


# -------------------------------------------------------------------------------------------- tasks


def test_bundled_tasks():
    train, test = Frontend.tasks("pages:train"), Frontend.tasks("pages:test")
    assert (len(train), len(test)) == (400, 200)
    assert Frontend.tasks("pages:train", 5) == train[:5] == page_tasks("train", 5)
    pages = [{task["ground_truth"] for task in split} for split in (train, test)]
    assert not pages[0] & pages[1] and len(pages[0]) > 380
    assert all({"problem_description", "ground_truth", "id"} == set(task) for task in train)
    # requests say nothing about the details: one request per business
    assert len({task["problem_description"] for task in train}) == len(BUSINESSES)


def test_published_format(tmp_path):
    path = tmp_path / "tasks.jsonl"
    rows = [{"problem_description": "a page", "ground_truth": PAGE},
            {"problem_description": "a page", "ground_truth": PAGE + "<p>", "id": "x"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = Frontend.tasks(path)
    assert [task["id"] for task in tasks] == [tasks[0]["id"], "x"] and len(tasks[0]["id"]) == 12
    for row, words in (
        ({"problem_description": "a"}, "ground_truth: missing"),
        ({"problem_description": 3, "ground_truth": PAGE}, "expected a string, got 3"),
        ({"problem_description": "a", "ground_truth": "def f(): pass"}, "not a page"),
    ):
        path.write_text(json.dumps(rows[0]) + "\n" + json.dumps(row) + "\n")
        with pytest.raises(UserError, match=f"tasks.jsonl:2: .*{words}"):
            Frontend.tasks(path)
    dialogue = [{"role": "user", "content": "a page"}, {"role": "assistant", "content": PAGE}]
    path.write_text(json.dumps({"task": rows[0], "dialogue_history": dialogue}) + "\n")
    assert load_trajectories(path, Frontend.check_task)[0]["task"]["ground_truth"] == PAGE


def _write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_websight_by_one_command(tmp_path):
    if not find_spec("datasets"):
        pytest.skip("needs the package datasets from tests/requirements.txt")
    rows = [{"text": f'<html>{i}<img src="https://picsum.photos/3/2"></html>',
             "llm_generated_idea": f"idea {i}", "image": "x"} for i in range(7)]
    (tmp_path / "source").mkdir()
    _write(tmp_path / "source" / "train.jsonl", *rows)

    command = ["-m", "colbench.env.frontend.tasks", "--source", tmp_path / "source",
               "--output", tmp_path / "out", "--n"]
    run(*command, 3)
    test = Frontend.tasks(tmp_path / "out" / "test.jsonl")
    assert [task["problem_description"] for task in test] == ["idea 3", "idea 4", "idea 5"]
    assert test[0]["ground_truth"] == '<html>3<img src="https://picsum.photos/id/48/3/2"></html>'
    assert "too few rows" in refused(*command, 5)


# ------------------------------------------------------------------------------------------- reward


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A CLIP with random weights in the hub's format, to run the real loading code."""
    from transformers import CLIPConfig, CLIPModel
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    vision = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                  patch_size=32, projection_dim=32)
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                vocab_size=100)
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=32)
    CLIPModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    """For each of five businesses the pictures of a page, a light and a heavy edit of it."""
    with Renderer(tmp_path_factory.mktemp("shots"), layout=True) as renderer:
        rows = []
        for business in list(BUSINESSES)[:5]:
            base = {"columns": "3", "picture": "left", "background": "white"}
            light = base | {"button": "red"}
            heavy = base | {"background": "dark", "picture": "none", "columns": "1",
                            "menu": "left", "form": "three"}
            rows.append(renderer.render([compose(business, d) for d in (base, light, heavy)]))
        yield rows


@pytest.mark.slow
@needs_browser
def test_clip_equals_the_library(tiny_clip, shots):
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    paths = [picture.path for row in shots for picture in row]
    images = [Image.open(path).convert("RGB") for path in paths]
    images.append(Image.new("RGB", (224, 224), "black"))
    pixels = CLIPImageProcessorPil()(images, return_tensors="pt")["pixel_values"]
    ours = np.stack([preprocess(image) for image in images])
    np.testing.assert_array_equal(ours, pixels.numpy())
    with torch.no_grad():
        wanted = CLIPModel.from_pretrained(tiny_clip).get_image_features(pixel_values=pixels)
        wanted = getattr(wanted, "pooler_output", wanted)
        wanted = torch.nn.functional.normalize(wanted, dim=-1)
    clip = Clip(tiny_clip, device="cpu", batch_size=4)
    np.testing.assert_allclose(clip.embed([*paths, None]), wanted.numpy(), atol=2e-5)
    got = clip.similarities([(paths[0], paths[0]), (None, paths[0]), (paths[1], paths[2])])
    np.testing.assert_allclose(got, [1, wanted[-1] @ wanted[0], wanted[1] @ wanted[2]], atol=2e-5)
    assert tiny_clip in clip.name  # never named like the real CLIP


def test_missing_clip_is_reported_in_one_line(tmp_path):
    with pytest.raises(UserError, match="--measure pixels") as error:
        make_measure(str(tmp_path / "nothing"))
    assert "\n" not in str(error.value)


@needs_browser
@pytest.mark.parametrize("name", ["pixels", "clip"])
def test_heavier_edits_score_lower(name, tiny_clip, shots):
    measure = make_measure("pixels" if name == "pixels" else tiny_clip, "cpu")
    for same, light, heavy in shots:
        paths = [same.path, light.path, heavy.path, None]
        a, b, c, d = measure.similarities([(path, same.path) for path in paths])
        assert a == pytest.approx(1, abs=1e-5) and a > b > c, (a, b, c)
        assert d < b


def test_pixel_measure_by_hand(tmp_path):
    def save(name, *boxes, size=(80, 80)):
        image = Image.new("RGB", size, "white")
        for colour_, box in boxes:
            image.paste(colour_, box)
        image.save(tmp_path / name)
        return tmp_path / name
    white, gray = save("white.png"), save("gray.png", ("#cccccc", (0, 0, 80, 40)))
    # half of the coarse view differs by 51/255 = 0.2, so m = 0.1 and C = 0.8; neither has detail
    assert Pixels().similarities([(gray, white)])[0] == pytest.approx((2 * 0.8 + 1) / 3)
    taller = save("taller.png", size=(80, 160))
    assert Pixels().similarities([(white, taller)])[0] == 1  # the added half is white too
    # black and white differ completely; neither has detail
    assert Pixels().similarities([(None, white)])[0] == pytest.approx(1 / 3)
    # a black bar of 4 x 8 px (1 x 2 px of the coarse view) makes detail in one cell; smoothed, in
    # 5 x 5 cells. In the other picture it is six cells further to the right.
    one, other = (save(f"{x}.png", ("black", (x, 16, x + 4, 24)), size=(128, 128))
                  for x in (16, 64))
    coarse, detail = Pixels().parts(one, other)
    assert coarse == pytest.approx(1 - 2 * 4 / 32 ** 2) and detail == 0
    assert Pixels().parts(one, white) == (pytest.approx(1 - 2 * 2 / 32 ** 2), 0)
    assert Pixels().name == "pixel similarity"


@pytest.mark.slow
@needs_browser
def test_pixel_measure_puts_edits_in_order(tmp_path):
    with Renderer(tmp_path) as renderer:
        shots = [[picture.path for picture in renderer.render([page, *others])]
                 for page, others in own()]
        blank = renderer.render(["<html></html>"])[0].path
    wrong = set()
    for name, (hidden_page, *others) in zip(OWN, shots):
        scores = Pixels().similarities([(path, hidden_page) for path in others])
        assert all(0 <= score < 1 for score in scores)
        assert Pixels().similarities([(hidden_page, hidden_page)]) == [1]
        empty = max(Pixels().similarities([(blank, hidden_page), (None, hidden_page)]))
        assert empty < scores[0 if name == "sparse" else 1] and empty <= 2 / 3
        named = zip(("near", "moderate", "major", "unrelated"), scores)
        wrong |= {(name, closer, further)
                  for (closer, a), (further, b) in combinations(named, 2) if not a > b}
    # here the unrelated page has the same background and the major edit leaves little; plain
    # thumbnails get these wrong too
    assert wrong == {(name, "major", "unrelated")
                     for name in ("shop", "gallery", "blog", "picture across")}


# ----------------------------------------------------------------------------------------- reviewer


@pytest.fixture(scope="module")
def look(tmp_path_factory):
    with Renderer(tmp_path_factory.mktemp("looks"), layout=True) as renderer:
        yield lambda *pages: [picture.layout for picture in renderer.render(pages)]


@needs_browser
@pytest.mark.parametrize("edit, words", [
    ({"background": "blue"}, "background should be pale blue, not white"),
    ({"background": "dark"}, "background should be dark gray"),
    ({"menu": "left"}, "navigation bar should be a sidebar on the left"),
    ({"headline": "centre"}, "headline should be centred"),
    ({"picture": "right"}, "one picture, on the right"),
    ({"picture": "wide"}, "one picture, over the whole width"),
    ({"columns": "2"}, "2 columns, not 1"), ({"button": "red"}, "button should be red, not blue"),
    ({"form": "three"}, "3 input fields"),
])
def test_reviewer_names_the_edit_that_was_made(look, edit, words):
    shown, wanted = look(compose("Oak Hall", {}), compose("Oak Hall", edit))
    text = review(shown, wanted)
    assert words in text
    assert text.count(".") <= 3 and "<" not in text and "bg-" not in text
    assert text == review(shown, wanted)
    assert review(wanted, wanted) == SAME
    assert review(None, wanted) == NOTHING


SHEET = ('<link href="https://cdn.jsdelivr.net/npm/tailwindcss@2.2.19/dist/tailwind.min.css" '
         'rel="stylesheet">')


@needs_browser
@pytest.mark.parametrize("old, new, words", [
    ("text-4xl", "text-xl", "headline should be smaller"),
    ("Our shop", "Fine wines", 'headline should read "Fine wines"'),
    ("font-serif", "font-sans", "font without serifs"),
    ("text-black", "text-red-600", "headline should be red"),
    ("<footer", "<div hidden", "no footer"), ("<tr><td>2</td></tr>", "", "one row, not 2"),
    ("500/300", "200/120", "picture should be smaller"),
    ("<img", "<img src=https://picsum.photos/id/48/500/300><img", "2 pictures, not 1"),
    ('<a href="#">Two</a>', "", "one link, not 2"),
])
def test_reviewer_on_a_different_page(look, old, new, words):
    page = (f'<html>{SHEET}<body class="font-serif"><header class="p-4">'
            '<h1 class="text-4xl text-black">Our shop</h1>'
            '<a href="#">One</a><a href="#">Two</a></header><section class="p-8">'
            '<img src="https://picsum.photos/id/48/500/300">'
            '<p>We sell many things that you may want to have.</p>'
            '<table><tr><td>1</td></tr><tr><td>2</td></tr></table></section>'
            '<footer class="bg-blue-800 text-white p-6">The end of it</footer></body></html>')
    assert old in page
    assert words in review(*look(page, page.replace(old, new)))


def test_bands_are_aligned_by_their_content():
    def band(text, kind="section"):
        return {"text": text, "kind": kind, "columns": 1, "pictures": 0}
    a, b, c, d = band("Welcome to us"), band("Prices"), band("Contact"), band("(c) us", "footer")
    assert align([a, c, d], [a, b, c, d]) == [(a, a), (None, b), (c, c), (d, d)]
    assert align([a, b], []) == [(a, None), (b, None)] and align([], []) == []


def test_names_of_colours():
    names = {(255, 255, 255): "white", (0, 0, 0): "black", (243, 244, 246): "very light gray",
             (31, 41, 55): "dark gray", (191, 219, 254): "pale blue", (37, 99, 235): "blue",
             (30, 58, 138): "dark blue", (220, 38, 38): "red", (5, 150, 105): "dark green",
             (255, 251, 235): "very pale yellow", (245, 158, 11): "orange",
             (124, 58, 237): "purple"}
    assert {rgb: colour(rgb) for rgb in names} == names


@needs_browser
def test_page_human(tmp_path):
    with Renderer(tmp_path / "shots", layout=True) as renderer:
        human = make_page_human("scripted", renderer, page_shown)
        blue, giant = compose("Oak Hall", {"background": "blue"}), "x" * 3_000_000
        tasks = [{"ground_truth": page} for page in (blue, blue, blue, giant)]
        shown = [compose("Oak Hall", {}), "no page", f"<html>{giant}</html>",
                 compose("Oak Hall", {})]
        histories = [[{"role": "assistant", "content": page}] for page in shown]
        texts = human.reply(tasks, histories, range(4))
        assert "pale blue" in texts[0] and texts[1] == texts[2] == NOTHING
        assert isinstance(texts[3], RuntimeError) and "larger than" in str(texts[3])
        assert (tmp_path / human.notes[0]["screenshot"]).exists()
        assert human.notes[1] == {} and "larger than" in human.notes[2]["not_rendered"]
        assert human.leaked == [False] * 4
        with pytest.raises(UserError, match="sees no pictures"):
            make_page_human("self", renderer, page_shown)


# ------------------------------------------------------------------------------------ vision models


@pytest.fixture()
def server():
    """A real HTTP server that speaks the protocol.

    replies: (status, text) or "hang", one per request; the last one repeats.
    """
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self._send(200, {"object": "list", "data": [{"id": "watcher", "object": "model"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = body["messages"][0]["content"]
            if isinstance(content, str):  # the check at the start
                return self._send(200, _completion("x"))
            server.requests.append(body)
            reply = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
            if reply == "hang":
                server.released.wait(20)
                return self.close_connection
            status, text = reply
            self._send(status, _completion(text) if status == 200 else {"error": {"message": text}})

        def _send(self, status, row):
            data = json.dumps(row).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.replies, server.released = [], [(200, "more red")], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def _completion(text):
    message = {"role": "assistant", "content": text}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "watcher",
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}


class Album:
    """Replaces a renderer: every "page" is the path of a picture."""

    def __init__(self, layout=False):
        pass

    def render(self, pages):
        return [Picture(Path(page), None, None) if page else Picture(None, "no page", None)
                for page in pages]


@pytest.fixture()
def album(tmp_path):
    Image.new("RGB", (1366, 768), "red").save(tmp_path / "mine.png")
    Image.new("RGB", (1366, 9000), "blue").save(tmp_path / "wanted.png")
    return str(tmp_path / "mine.png"), {"ground_truth": str(tmp_path / "wanted.png")}


def ask(human, *shown, task):
    histories = [[{"role": "assistant", "content": page or ""}] for page in shown]
    return human.reply([task] * len(shown), histories, range(len(shown)))


def shown(history):
    return history[-1]["content"] or None


def test_what_the_server_gets(server, album):
    server.replies = [(200, "<think>hm</think>" + "x" * 1500)]
    human = make_page_human(server.url, Album(), shown)
    assert ask(human, album[0], None, task=album[1]) == ["x" * LONGEST_REPLY] * 2
    with_picture, without = sorted(server.requests,
                                   key=lambda body: -len(body["messages"][0]["content"]))
    assert with_picture["temperature"] == 0 and with_picture["model"] == "watcher"
    assert len(with_picture["messages"]) == 1
    urls = [part["image_url"]["url"] for part in with_picture["messages"][0]["content"]
            if part["type"] == "image_url"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.split("base64,")[1]))) for url in urls]
    # the agent's picture comes first
    assert [picture.getpixel((5, 5)) for picture in pictures] == [(255, 0, 0), (0, 0, 255)]
    assert pictures[0].size == (1366, 768)
    assert 0.99 * MOST_PIXELS < pictures[1].width * pictures[1].height <= MOST_PIXELS  # scaled
    assert pictures[1].width / pictures[1].height == pytest.approx(1366 / 9000, rel=0.01)
    parts = [part.get("text") for part in without["messages"][0]["content"]]
    assert humans.NONE in parts and sum(part is None for part in parts) == 1


def test_errors_of_the_server_end_only_that_dialogue(server, album):
    chat = ServerChat(server.url, "watcher", timeout=1, max_retries=1, concurrency=1)
    human = PageHuman(Album(), shown, Watcher(chat))
    server.replies = [(400, "the prompt is too long"), (500, "oops"), (500, "oops"), (200, "fine")]
    bad, broken, fine = ask(human, album[0], album[0], album[0], task=album[1])
    assert "too long" in str(bad) and "oops" in str(broken) and fine == "fine"
    assert isinstance(bad, Exception) and isinstance(broken, Exception)
    assert len(server.requests) == 4  # a 400 is not retried, a 500 is
    server.replies = ["hang", "hang", (200, "fine")]
    late, fine = ask(human, album[0], album[0], task=album[1])
    assert isinstance(late, Exception) and "timed out" in str(late).lower() and fine == "fine"
    task = {"id": "a", "problem_description": "a page", **album[1]}
    server.replies = [(400, "no")]
    batches = play(Says(album[0]), human, [(task, 0)], agent_prompt="Ask.",
                   answer=Frontend(None).answer)
    done = [e for batch in batches for e in batch][0]
    assert done["outcome"] == "simulation_failed" and done["error"].startswith("human: ")
    assert "reward" not in done


def test_local_vision_model(tmp_path, album):
    save_tiny_vision(tmp_path / "vision")
    human = make_page_human(str(tmp_path / "vision"), Album(), shown)
    texts = ask(human, album[0], None, task=album[1])
    assert all(isinstance(text, str) and text for text in texts) and len(texts[0]) <= LONGEST_REPLY
    assert texts == ask(human, album[0], None, task=album[1])
    with pytest.raises(UserError, match="hub id or folder of a vision model"):
        make_page_human(str(EMBEDDED["tiny"]), Album(), shown)


def test_vision_critic_gradient_is_that_of_the_loss(tmp_path, album):
    """Computing it turn by turn gives the gradient of equation (2)."""
    from colbench.train.vision_critic import Critic, pair_step
    torch.manual_seed(0)
    critic = Critic(save_tiny_vision(tmp_path / "vision"), lora_rank=2)
    torch.nn.init.normal_(critic.model.value_head.weight)
    wanted = album[1]["ground_truth"]
    chosen = [("a page", album[0], wanted), ("a page", wanted, wanted)]
    rejected = [("a page", None, wanted)]
    loss, margin = pair_step(critic, chosen, rejected, beta=0.7, weight=0.5)
    trained = [p for p in critic.model.parameters() if p.requires_grad]
    got = [p.grad.clone() for p in trained]
    for p in trained:
        p.grad = None
    difference = (sum(critic.advantage(*turn) for turn in chosen)
                  - sum(critic.advantage(*turn) for turn in rejected))
    whole = -torch.nn.functional.logsigmoid(0.7 * difference)
    (0.5 * whole).backward()
    assert (loss, margin) == pytest.approx((whole.item(), difference.item()), abs=1e-5)
    for gradient, parameter in zip(got, trained):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-4)
    assert any(g.abs().max() > 0 for g in got[:-2])  # not only the head


# ----------------------------------------------------------------------------------------- win rate


def line(task, value, policy="base", sample=0):
    return {"id": task, "sample": sample, "policy": policy, "scores": {"similarity": value}}


def test_win_rate_by_hand(tmp_path):
    mine = [line("a", 0.9), line("b", 0.5), line("c", 0.7), line("d", 0.1),
            {"id": "e", "sample": 0, "outcome": "error: x"}]
    others = [line("a", 0.8), line("b", 0.5), line("c", 0.71), line("d", 0.1, sample=1)]
    result = win_rate(mine, others)
    assert (result["win_rate"], result["ties"], result["wins"], result["n"],
            result["without_partner"]) == (0.5, 1 / 3, 1 / 3, 3, 2)
    assert 0 <= result["win_rate_95"][0] < 0.5 < result["win_rate_95"][1] <= 1
    path = _write(tmp_path / "episodes.jsonl", *others, line("a", 0.3, "other"))
    assert load_opponent(f"{path}#other") == [line("a", 0.3, "other")]
    with pytest.raises(UserError, match="holds base, other"):
        load_opponent(str(path))
