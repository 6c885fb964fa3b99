"""Load models and tokenizers; process settings for them."""
import ctypes
import hashlib
import logging
import os
import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from colbench.lm.adapters import has_adapters
from colbench.lm.logps import check_model
from colbench.lm.tokens import check_template, end_of_turn
from colbench.run.errors import UserError
from colbench.run.hub import why_not

ENVIRONMENTS = Path(__file__).parent.parent / "env"
EMBEDDED = {
    "tiny": ENVIRONMENTS / "backend" / "tiny",
    "tiny-frontend": ENVIRONMENTS / "frontend" / "tiny",
}
LARGE = 2e9  # bytes of weights


def prepare_machine() -> None:
    """Make a CPU faster and silence two irrelevant warnings. Every script calls it once."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # optional kernel, on some CPUs
    # accelerate triggers it
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    # Sharp attention leaves numbers below 1e-38, which slow a CPU down several times.
    torch.set_flush_denormal(True)
    # PyTorch's first choice on an H100. It plans anew for every length, so for every sampled token;
    # with a mask its gradients are reported to be NaN at times.
    torch.backends.cuda.enable_cudnn_sdp(False)


def keep_freed_memory(model) -> None:
    """Keep freed memory in the process (glibc) for a small model on the CPU, unless the user chose.

    Asking the system for it again costs more than most tensor operations. A large model frees
    several times its size while loading and unpacking 4-bit weights, so there it is given back.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    small = model.device.type == "cpu" and model.get_memory_footprint() < LARGE
    if small and hasattr(libc, "mallopt") and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        # M_MMAP_THRESHOLD; older versions take at most 32 MB
        libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def load_tokenizer(name: str):
    """The tokenizer of a hub id, folder or "tiny" (the embedded model).

    UserError if there is none, or if it does not fit its chat template or the model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(EMBEDDED.get(name, name))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(cannot_load(name, error)) from None
    if not tokenizer.chat_template:
        raise UserError(f"--model {name}: its tokenizer has no chat template; "
                        "choose an instruction-tuned model")
    try:
        check_template(tokenizer)
    except UserError as error:
        raise UserError(f"--model {name}: {error}") from None
    # Text never becomes a special token; Gemma 3 has one for pictures beyond its embeddings.
    special = set(tokenizer.all_special_ids)
    in_text = [token for token in tokenizer.get_vocab().values() if token not in special]
    largest = max([end_of_turn(tokenizer), *in_text])
    rows = getattr(text_config(name), "vocab_size", None)
    if rows and largest >= rows:
        raise UserError(f"--model {name}: the tokenizer's {largest + 1} tokens do not fit the "
                        f"model's {rows}; use the model's own tokenizer, or resize its embeddings")
    return tokenizer


def text_config(name: str):
    """The configuration of the language model in `name`. UserError if there is none."""
    try:
        return AutoConfig.from_pretrained(EMBEDDED.get(name, name)).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(cannot_load(name, error)) from None


def context_length(name: str) -> int:
    """The longest dialogue that the model `name` takes, in tokens."""
    return reach(text_config(name))


def reach(config) -> int:
    """The longest sequence a model takes, in tokens; 2**30 if its configuration does not say.

    Some models scale positions by the longest dialogue in the batch (Phi-3 with 128k tokens,
    "dynamic" RoPE). They are used only up to the length where scaling starts: beyond it a message's
    log-probs would depend on the rest of the batch.
    """
    longest = getattr(config, "max_position_embeddings", None) or 1 << 30
    rope = getattr(config, "rope_parameters", None) or {}
    per_layer_kind = [part for part in rope.values() if isinstance(part, dict)]
    for settings in (rope, *per_layer_kind):
        if settings.get("rope_type") in ("dynamic", "longrope"):
            longest = min(longest, settings.get("original_max_position_embeddings") or longest)
    return longest


def load_model(name: str, load_in_4bit: bool = False, device: str | torch.device | None = None,
               adapter: str | None = None):
    """The causal language model `name` (hub id, folder or "tiny"): bfloat16 on CUDA, else float32.

    load_in_4bit: NF4 with double quantisation (bitsandbytes). adapter: a folder that a training
    script wrote; a LoRA adapter goes on top of `name`, a fully fine-tuned model replaces it.
    UserError if it cannot be loaded.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    is_lora = adapter is not None and (Path(adapter) / "adapter_config.json").exists()
    source = adapter if adapter and not is_lora else name
    try:
        model = AutoModelForCausalLM.from_pretrained(
            EMBEDDED.get(source, source), dtype=dtype, device_map={"": device},
            quantization_config=nf4(dtype) if load_in_4bit else None)
        keep_4bit_layout(model)
        check_model(model.eval())
        if is_lora:
            from peft import PeftModel  # takes seconds to import: a wrong flag is reported first
            model = PeftModel.from_pretrained(model, adapter)
        keep_freed_memory(model)
    except UserError as error:
        raise UserError(f"model {source}: {error}") from None
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(cannot_load(source, error)) from None
    return model.eval()


def put_adapter(model, adapter: str):
    """The policy in folder `adapter` on the base model in memory; earlier adapters stay unused.

    A fully fine-tuned model is not an adapter: it is loaded instead.
    """
    if not (Path(adapter) / "adapter_config.json").exists():
        return load_model(adapter, device=model.device)
    name = hashlib.sha256(adapter.encode()).hexdigest()[:16]  # PEFT's names may not contain a dot
    try:
        if not has_adapters(model):
            from peft import PeftModel
            model = PeftModel.from_pretrained(model, adapter, adapter_name=name)
        elif name not in model.peft_config:
            model.load_adapter(adapter, name)
    except (RuntimeError, ValueError) as error:  # other shapes, or layers this model lacks
        if "size mismatch" not in str(error) and "Target modules" not in str(error):
            raise
        raise UserError(f"{adapter}: was trained on another model than "
                        f"{model.config._name_or_path}; give the model it was trained on "
                        "with --model") from None
    model.set_adapter(name)
    return model.eval()


def nf4(dtype) -> BitsAndBytesConfig:
    """4-bit weights: NF4 with double quantisation, computing in `dtype`."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                              bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)


def keep_4bit_layout(model) -> None:
    """Keep bitsandbytes from repacking 4-bit weights at the first evaluation.

    It does so on CPUs with AVX512-BF16, and no gradient passes repacked weights.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def cannot_load(name: str, error: Exception) -> str:
    """One line on why the model `name` cannot be loaded, and what to do."""
    reason = why_not(error, name)
    if not reason:
        first_line = str(error).strip().split("\n")[0][:200]
        reason = f"{first_line}; give a folder, or the hub id of a model that you have access to"
    return f"model {name}: {reason}"
