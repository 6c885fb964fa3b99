"""How similar two pages look: cosine similarity of CLIP embeddings, or pixels, without a model."""
from functools import lru_cache

import numpy as np
from PIL import Image

from colbench.run.errors import UserError

CLIP = "openai/clip-vit-base-patch32"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
CELL = 8  # px, side of a cell
COARSE = 32  # px, side of the coarse view


def make_measure(name: str, device=None):
    """The measure called `pixels` or `clip`, or another CLIP by hub id or folder.

    It has `.name` and `similarities(pairs) -> list of float`. UserError: CLIP cannot be loaded.
    """
    if name == "pixels":
        return Pixels()
    return Clip(CLIP if name == "clip" else name, device)


def picture(path, like=None) -> Image.Image:
    """The RGB picture at a path.

    path None (an answer without a page) gives a black picture, as in the released code. Its size is
    that of `like`, or 224 x 224 px.
    """
    if path is None:
        return Image.new("RGB", like.size if like else (224, 224), "black")
    with Image.open(path) as opened:
        return opened.convert("RGB")


class Clip:
    """Cosine similarity of CLIP image embeddings of two full-page screenshots, -1 to 1.

    The shorter side is scaled to 224 px and the centre is cropped: of a 1366 x 768 page, CLIP does
    not see the outer 299 px left and right. Embeddings are kept, so a hidden page costs once.
    """

    def __init__(self, name: str = CLIP, device=None, batch_size: int = 16):
        import torch
        from transformers import CLIPVisionModelWithProjection
        self.torch, self.batch_size, self.kept = torch, batch_size, {}
        self.name = f"cosine similarity, {name}"
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            # as CLIPModel.get_image_features, whose result changed its type in transformers 5
            model = CLIPVisionModelWithProjection.from_pretrained(name, dtype=torch.float32)
            self.model = model.to(self.device).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise UserError(f"--measure {name}: {reason}; give the folder or hub id of a CLIP, or "
                            "--measure pixels, which needs no model") from None

    def similarities(self, pairs: list) -> list:
        """pairs: (path of the answer's picture or None, path of the hidden page's picture)."""
        answers, hidden_pages = (self.embed([pair[side] for pair in pairs]) for side in (0, 1))
        return [float(a @ b) for a, b in zip(answers, hidden_pages)]

    def embed(self, paths: list) -> np.ndarray:
        """(number of paths, width of the embedding), each of length 1.

        All batches have one size, because it moves the sixth digit.
        """
        todo = list(dict.fromkeys(path for path in paths if path not in self.kept))
        for start in range(0, len(todo), self.batch_size):
            part = todo[start:start + self.batch_size]
            pixels = np.stack([preprocess(picture(path)) for path in part])
            padding = np.zeros((self.batch_size - len(part), *pixels.shape[1:]), np.float32)
            pixels = np.concatenate([pixels, padding])
            with self.torch.inference_mode():
                output = self.model(pixel_values=self.torch.from_numpy(pixels).to(self.device))
                embeddings = output.image_embeds.double().cpu().numpy()
            embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
            self.kept.update(zip(part, embeddings))
        return np.stack([self.kept[path] for path in paths])


def preprocess(image: Image.Image, size: int = 224) -> np.ndarray:
    """CLIP's input: (3, size, size) float32.

    Scales the shorter side to `size` (bicubic), crops the centre and normalises by the mean and
    deviation of CLIP's training data. Written out because the library's two versions differ in the
    last digits, and torchvision decides which one runs.
    """
    width, height = image.size
    short = min(width, height)
    scaled_size = int(size * width / short), int(size * height / short)
    image = image.resize(scaled_size, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    cropped = image.crop((left, top, left + size, top + size))
    pixels = (np.asarray(cropped, np.float64) * (1 / 255)).astype(np.float32)
    return ((pixels - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1)


class Pixels:
    """An offline stand-in for CLIP, from 0 to 1 (equal pictures). Do not compare it with published
    numbers. For the picture a of the answer and b of the hidden page

        s(a, b) = (2 C + D) / 3

    C, the coarse view: shrink both pictures to 32 x 32 px. C = max(0, 1 - 2 m), where m is the mean
    over these pixels of |a - b| in the channel that differs most; colours are in 0..1.
    D, the detail: put both pictures on white canvases of one size and cut them into cells of
    8 x 8 px. d is the standard deviation of the brightness in a cell, smoothed over 5 x 5 cells so
    that a small shift costs little. D = sum of min(d_a, d_b) / sum of max(d_a, d_b), or 1 if
    neither picture has any detail.
    """

    name = "pixel similarity"

    def similarities(self, pairs: list) -> list:
        """pairs: (path of the answer's picture or None, path of the hidden page's picture)."""
        parts = [self.parts(*pair) for pair in pairs]
        return [(2 * coarse + detail) / 3 for coarse, detail in parts]

    def parts(self, answer, hidden_page) -> tuple[float, float]:
        """(C, D) of two paths as in `similarities`."""
        if answer == hidden_page:
            return 1.0, 1.0
        coarse_a, a = _views(answer, _size(hidden_page) if answer is None else None)
        coarse_b, b = _views(hidden_page, None)
        coarse = max(0.0, 1 - 2 * float(np.abs(coarse_a - coarse_b).max(-1).mean()))
        rows, columns = (max(x.shape[axis] for x in (a, b)) for axis in (0, 1))
        a, b = (_smooth(np.pad(x, ((0, rows - x.shape[0]), (0, columns - x.shape[1]))))
                for x in (a, b))
        most = float(np.maximum(a, b).sum())
        return coarse, float(np.minimum(a, b).sum()) / most if most > 1e-9 else 1.0


@lru_cache(maxsize=4096)
def _size(path):
    with Image.open(path) as opened:
        return opened.size


@lru_cache(maxsize=512)
def _views(path, size) -> tuple[np.ndarray, np.ndarray]:
    """(32, 32, 3): colours of the coarse view; (rows, columns): each cell's brightness deviation.

    size: of the black picture if path is None.
    """
    image = picture(path) if path is not None else Image.new("RGB", size, "black")
    coarse = np.asarray(image.resize((COARSE, COARSE), Image.Resampling.BOX), np.float32) / 255
    rows, columns = -(-image.height // CELL), -(-image.width // CELL)
    canvas = Image.new("RGB", (columns * CELL, rows * CELL), "white")
    canvas.paste(image)
    pixels = np.asarray(canvas, np.float32).reshape(rows, CELL, columns, CELL, 3) / 255
    deviation = pixels.mean(-1).std((1, 3))
    return coarse, np.where(deviation < 1e-3, 0, deviation)  # less is rounding


def _smooth(values: np.ndarray, radius: int = 2) -> np.ndarray:
    """Mean over (2 radius + 1)² cells."""
    side = 2 * radius + 1
    padded = np.pad(values.astype(np.float64), radius)
    total = np.pad(padded.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    return np.maximum(sums, 0) / side**2  # differences of sums can be slightly below 0
