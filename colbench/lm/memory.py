"""How much memory a model takes, by arithmetic, before it is tried."""
import resource
import sys

import torch

from colbench.lm.logps import LOGITS_AT_ONCE
from colbench.run.settings import count


def model_row(model, name: str, training: bool = False) -> str:
    """Its name, number of weights and the bytes they take; with `training` also how many are trained."""
    weights = model.num_parameters() if hasattr(model, "num_parameters") else sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = f"{name}: {count(weights)} weights in {model.get_memory_footprint() / 1e9:.2f} GB on {model.device}"
    return size + f", {count(trained)} of them are trained" * training


def memory_now(device) -> float:
    """Bytes held at this moment: on the GPU by tensors, else the most the process has had resident."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def sampling_memory(model, batch_tokens: int) -> str:
    """Estimate for sampling `batch_tokens` tokens at a time.

    What is held now, their keys and values with room to grow, and the activations of one layer while the prompts are
    read.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 9 / 8 * config.num_hidden_layers * 2 * heads * width
    layer = 4 * config.hidden_size + 3 * config.intermediate_size
    total = memory_now(model.device) + batch_tokens * (cache + layer) * model.dtype.itemsize
    return f"at most about {total / 1e9:.1f} GB while sampling (--batch-tokens {batch_tokens:,})"


def training_memory(model, tokens: int, checkpointing: bool) -> str:
    """Estimate for training with `tokens` tokens in one pass.

    What is held now, gradients and Adam's two moments of what is trained, activations (of one layer at a time with
    gradient checkpointing), mask, and one chunk of logits with its gradient.
    """
    config = model.config.get_text_config()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    hidden, inner = config.hidden_size, config.intermediate_size
    # kept for the backward pass, LoRA's inputs included
    layer = tokens * (14 * hidden + 6 * inner) * model.dtype.itemsize
    layers = config.num_hidden_layers
    activations = layer + layers * tokens * hidden * model.dtype.itemsize if checkpointing else layers * layer
    logits = 3 * 4 * min(LOGITS_AT_ONCE, tokens * config.vocab_size)
    total = memory_now(model.device) + 12 * trained + activations + tokens**2 + logits
    return f"about {total / 1e9:.1f} GB with up to {tokens:,} tokens in one pass (--tokens-per-step)"
