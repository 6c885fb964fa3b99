"""How close a page came to the reference: cosine similarity of CLIP embeddings, or pixels, which need no weights."""
from functools import lru_cache

import numpy as np
from PIL import Image

from colbench.run.errors import UserError

CLIP = "openai/clip-vit-base-patch32"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, of RGB in 0..1
CELL, COARSE = 8, 32  # px of a cell; cells across and down of the coarse view


def make_measure(name: str, device=None):
    """`pixels`, `clip`, or another CLIP by hub id or folder. Has `.name` and `similarities(pairs) -> list of float`."""
    return Pixels() if name == "pixels" else Clip(CLIP if name == "clip" else name, device)


def picture(path, like=None) -> Image.Image:
    """The RGB picture at a path.

    None, an answer without a page, is a black picture as in the released code: 224 x 224 px, or of the size of `like`.
    """
    if path is None:
        return Image.new("RGB", like.size if like else (224, 224), "black")
    with Image.open(path) as opened:
        return opened.convert("RGB")


class Clip:
    """Cosine similarity of CLIP image embeddings of two full-page screenshots, -1 to 1.

    The picture is scaled to 224 px on its shorter side and cropped in its centre: of a 1366 x 768 page the outer 299 px
    left and right are not seen. One model a process; embeddings are kept, so a reference costs once.
    """

    def __init__(self, name: str = CLIP, device=None, batch_size: int = 16):
        import torch
        from transformers import CLIPVisionModelWithProjection
        self.torch, self.batch_size, self.kept = torch, batch_size, {}
        self.name = f"cosine similarity, {name}"
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            # the same numbers as CLIPModel.get_image_features, whose result changed its type in transformers 5
            self.model = CLIPVisionModelWithProjection.from_pretrained(name, dtype=torch.float32).to(self.device).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise UserError(f"measure {name}: {reason}; "
                            "give a CLIP's folder or hub id, or --measure pixels, which needs none") from None

    def similarities(self, pairs: list) -> list:
        """pairs: (path of the answer's picture or None, path of the reference's picture)."""
        mine, wanted = (self.embed([pair[side] for pair in pairs]) for side in (0, 1))
        return [float(a @ b) for a, b in zip(mine, wanted)]

    def embed(self, paths: list) -> np.ndarray:
        """(number of paths, width of the embedding), each of length 1. A fixed batch size: it moves the sixth digit."""
        todo = list(dict.fromkeys(path for path in paths if path not in self.kept))
        for start in range(0, len(todo), self.batch_size):
            part = todo[start:start + self.batch_size]
            pixels = np.stack([preprocess(picture(path)) for path in part])
            pixels = np.concatenate([pixels, np.zeros((self.batch_size - len(part), *pixels.shape[1:]), np.float32)])
            with self.torch.inference_mode():
                output = self.model(pixel_values=self.torch.from_numpy(pixels).to(self.device))
                embeddings = output.image_embeds.double().cpu().numpy()
            embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
            self.kept.update(zip(part, embeddings))
        return np.stack([self.kept[path] for path in paths])


def preprocess(image: Image.Image, size: int = 224) -> np.ndarray:
    """(3, size, size) float32 as CLIP wants it.

    Shorter side to `size`, bicubic, centre crop, mean and deviation of its training data. Written out because the
    library's two versions of it differ in the last digits, and which one runs depends on torchvision.
    """
    width, height = image.size
    short = min(width, height)
    image = image.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float64) * (1 / 255)
    return ((pixels.astype(np.float32) - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1)


class Pixels:
    """An offline stand-in, 0 to 1, and 1 for equal pictures. Not CLIP, no embedding: do not compare it with published
    numbers. For an answer's picture a and the reference's b

        s(a, b) = (2 C + D) / 3

    C, the coarse view: both pictures are shrunk to 32 x 32 px, whatever their height. C = max(0, 1 - 2 m), where m is
    the mean over these of |a - b|, colours in 0..1, in the channel that differs most.
    D, the detail: both lie on white canvases of one size, cut into cells of 8 x 8 px; d is how much the brightness
    varies in a cell (its standard deviation), smoothed over 5 x 5 cells so that a small shift costs little.
    D = sum of min(d_a, d_b) / sum of max(d_a, d_b), and 1 where neither picture has any.
    """

    name = "pixel similarity"

    def similarities(self, pairs: list) -> list:
        """pairs: (path of the answer's picture or None, path of the reference's picture)."""
        return [(2 * coarse + detail) / 3 for coarse, detail in (self.parts(*pair) for pair in pairs)]

    def parts(self, mine, wanted) -> tuple[float, float]:
        """(C, D) of two paths as in `similarities`."""
        if mine == wanted:
            return 1.0, 1.0
        (coarse_a, a), (coarse_b, b) = _views(mine, _size(wanted) if mine is None else None), _views(wanted, None)
        coarse = max(0.0, 1 - 2 * float(np.abs(coarse_a - coarse_b).max(-1).mean()))
        rows, columns = (max(x.shape[axis] for x in (a, b)) for axis in (0, 1))
        a, b = (_smooth(np.pad(x, ((0, rows - x.shape[0]), (0, columns - x.shape[1])))) for x in (a, b))
        most = float(np.maximum(a, b).sum())
        return coarse, float(np.minimum(a, b).sum()) / most if most > 1e-9 else 1.0


@lru_cache(maxsize=4096)
def _size(path):
    with Image.open(path) as opened:
        return opened.size


@lru_cache(maxsize=512)
def _views(path, size) -> tuple[np.ndarray, np.ndarray]:
    """(32, 32, 3): the mean colours of the coarse view; (rows, columns): each cell's deviation of the brightness."""
    image = picture(path) if path is not None else Image.new("RGB", size, "black")
    coarse = np.asarray(image.resize((COARSE, COARSE), Image.Resampling.BOX), np.float32) / 255
    width, height = -(-image.width // CELL) * CELL, -(-image.height // CELL) * CELL
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(image)
    pixels = np.asarray(canvas, np.float32).reshape(height // CELL, CELL, width // CELL, CELL, 3) / 255
    deviation = pixels.mean(-1).std((1, 3))
    return coarse, np.where(deviation < 1e-3, 0, deviation)  # below a quarter of a grey level it is rounding


def _smooth(values: np.ndarray, radius: int = 2) -> np.ndarray:
    """Mean over (2 radius + 1)² cells."""
    side = 2 * radius + 1
    padded = np.pad(values.astype(np.float64), radius)
    total = np.pad(padded.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    return np.maximum(sums, 0) / side**2  # a difference of sums can be a hair below 0
