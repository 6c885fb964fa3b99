"""Load models and tokenizers; settings of the process for them."""
import ctypes
import logging
import os
import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from colbench.run.errors import UserError
from colbench.run.hub import why_not

ENVIRONMENTS = Path(__file__).parent.parent / "env"
EMBEDDED = {"tiny": ENVIRONMENTS / "backend" / "tiny", "tiny-frontend": ENVIRONMENTS / "frontend" / "tiny"}


def prepare_machine() -> None:
    """Called once by every script: settings that make a CPU faster, and two warnings off that concern nobody."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of an optional kernel, on some CPUs
    # accelerate asks for it
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    torch.set_flush_denormal(True)  # sharp attention leaves numbers below 1e-38, on which a CPU is several times slower
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    # glibc: keep freed memory, unless the user chose; fetching it anew costs more than most tensor operations
    if hasattr(libc, "mallopt") and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD; older versions: 32 MB at most
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def load_tokenizer(name: str):
    """Tokenizer of a hub id or folder; "tiny" is the embedded model. UserError in one line if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(EMBEDDED.get(name, name))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(cannot_load(name, error)) from None
    if not tokenizer.chat_template:
        raise UserError(f"--model {name}: its tokenizer has no chat template; an instruction-tuned model is wanted")
    return tokenizer


def context_length(name: str) -> int:
    """Tokens that the model's positions reach; a large number where its configuration does not say."""
    try:
        config = AutoConfig.from_pretrained(EMBEDDED.get(name, name)).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(cannot_load(name, error)) from None
    return getattr(config, "max_position_embeddings", 1 << 30)


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
        if is_lora:
            # here, not above: PEFT takes seconds to import, and a wrong flag should be told at once
            from peft import PeftModel
            model = PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(cannot_load(source, error)) from None
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
