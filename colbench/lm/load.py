"""Load models and tokenizers; settings of the process for them."""
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
EMBEDDED = {"tiny": ENVIRONMENTS / "backend" / "tiny", "tiny-frontend": ENVIRONMENTS / "frontend" / "tiny"}
LARGE = 2e9  # bytes of weights


def prepare_machine() -> None:
    """Called once by every script: settings that make a CPU faster, and two warnings off that concern nobody."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of an optional kernel, on some CPUs
    # accelerate asks for it
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    torch.set_flush_denormal(True)  # sharp attention leaves numbers below 1e-38, on which a CPU is several times slower
    # PyTorch's first choice on an H100: plans anew for every length, so for every sampled token, and with a mask its
    # gradients are reported to be NaN at times
    torch.backends.cuda.enable_cudnn_sdp(False)


def keep_freed_memory(model) -> None:
    """Once a small model is there and stays on the CPU: keep what is freed (glibc), unless the user chose.

    Fetching it anew costs more than most tensor operations. What a large one frees, in loading and of unpacked 4-bit
    weights, would add up to several times the model.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    small = model.device.type == "cpu" and model.get_memory_footprint() < LARGE
    if small and hasattr(libc, "mallopt") and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD; older versions: 32 MB at most
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def load_tokenizer(name: str):
    """Tokenizer of a hub id or folder; "tiny" is the embedded model. UserError in one line if there is none, or if it
    cannot give the tokens that its chat template and the model want."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(EMBEDDED.get(name, name))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(cannot_load(name, error)) from None
    if not tokenizer.chat_template:
        raise UserError(f"--model {name}: its tokenizer has no chat template; an instruction-tuned model is wanted")
    try:
        check_template(tokenizer)
    except UserError as error:
        raise UserError(f"--model {name}: {error}") from None
    special = set(tokenizer.all_special_ids)  # which no text becomes: Gemma 3 has one, for pictures, beyond its model
    largest = max([end_of_turn(tokenizer), *(k for k in tokenizer.get_vocab().values() if k not in special)])
    rows = getattr(text_config(name), "vocab_size", None)
    if rows and largest >= rows:
        raise UserError(f"--model {name}: the tokenizer's {largest + 1} tokens do not fit the model's {rows}; give the "
                        "model's own tokenizer, or resize the model's embeddings")
    return tokenizer


def text_config(name: str):
    """The configuration of the language model in `name`. UserError in one line if there is none."""
    try:
        return AutoConfig.from_pretrained(EMBEDDED.get(name, name)).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(cannot_load(name, error)) from None


def context_length(name: str) -> int:
    """Tokens of the longest dialogue that the model `name` takes."""
    return reach(text_config(name))


def reach(config) -> int:
    """Tokens that a model's positions reach; a large number where its configuration does not say.

    Where positions are scaled by the longest dialogue at hand (Phi-3 with 128k tokens, "dynamic" RoPE) only as far as
    none are: beyond, a message's log-probs would depend on what else is in the batch.
    """
    longest = getattr(config, "max_position_embeddings", None) or 1 << 30
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *(part for part in rope.values() if isinstance(part, dict))):  # one a kind of layer, or one
        if kind.get("rope_type") in ("dynamic", "longrope"):
            longest = min(longest, kind.get("original_max_position_embeddings") or longest)
    return longest


def load_model(name: str, load_in_4bit: bool = False, device: str | torch.device | None = None,
               adapter: str | None = None):
    """The causal language model `name` (hub id, folder or "tiny"), in bfloat16 on CUDA and float32 elsewhere.

    load_in_4bit: NF4 with double quantisation (bitsandbytes). adapter: a folder that a training script wrote; a LoRA
    adapter is put on top of `name`, a fully fine-tuned model is loaded instead of it. UserError in one line if it
    cannot be loaded.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    is_lora = adapter is not None and (Path(adapter) / "adapter_config.json").exists()
    source = adapter if adapter and not is_lora else name
    try:
        model = AutoModelForCausalLM.from_pretrained(
            EMBEDDED.get(source, source), dtype=dtype, quantization_config=nf4(dtype) if load_in_4bit else None,
            device_map={"": device})
        keep_4bit_layout(model)
        check_model(model.eval())
        if is_lora:
            # here, not above: PEFT takes seconds to import, and a wrong flag should be told at once
            from peft import PeftModel
            model = PeftModel.from_pretrained(model, adapter)
        keep_freed_memory(model)
    except UserError as error:
        raise UserError(f"model {source}: {error}") from None
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(cannot_load(source, error)) from None
    return model.eval()


def put_adapter(model, adapter: str):
    """The policy in folder `adapter` on the base model's weights that are in memory; earlier adapters stay unused.

    A fully fine-tuned model is no adapter: it is loaded instead.
    """
    if not (Path(adapter) / "adapter_config.json").exists():
        return load_model(adapter, device=model.device)
    name = hashlib.sha256(adapter.encode()).hexdigest()[:16]  # PEFT allows no dot in an adapter's name
    try:
        if not has_adapters(model):
            from peft import PeftModel
            model = PeftModel.from_pretrained(model, adapter, adapter_name=name)
        elif name not in model.peft_config:
            model.load_adapter(adapter, name)
    except (RuntimeError, ValueError) as error:  # other shapes, or layers that this model does not have
        if "size mismatch" not in str(error) and "Target modules" not in str(error):
            raise
        raise UserError(f"{adapter}: was trained on another model than {model.config._name_or_path}; "
                        "give its own by --model") from None
    model.set_adapter(name)
    return model.eval()


def nf4(dtype) -> BitsAndBytesConfig:
    """4-bit weights: NF4 with double quantisation, computing in `dtype`."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=dtype)


def keep_4bit_layout(model) -> None:
    """Keep bitsandbytes from repacking 4-bit weights, which no gradient passes then.

    It would do so on a CPU with AVX512-BF16, at the first evaluation.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def cannot_load(name: str, error: Exception) -> str:
    """One line on why the model `name` cannot be loaded, and what to do."""
    reason = why_not(error, name) or (str(error).strip().split("\n")[0][:200]
                                      + "; give a folder, or the id of a model on the hub that you have access to")
    return f"model {name}: {reason}"
