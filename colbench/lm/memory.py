"""Estimate how much memory a model takes."""
import psutil
import torch

from colbench.lm.logps import LOGITS_AT_ONCE
from colbench.run.settings import count


def model_row(model, name: str, training: bool = False) -> str:
    """A line with its name, parameters and size; with `training` also the trained parameters."""
    if hasattr(model, "num_parameters"):
        parameters = model.num_parameters()
    else:
        parameters = sum(p.numel() for p in model.parameters())
    gigabytes = model.get_memory_footprint() / 1e9
    row = f"{name}: {count(parameters)} parameters in {gigabytes:.2f} GB on {model.device}"
    if training:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        row += f", {count(trained)} of them trained"
    return row


def memory_now(device) -> float:
    """Bytes held now: by tensors on the GPU, or by the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def shape(model) -> tuple[int, int, int, int] | None:
    """(layers, hidden size, MLP size, size of a layer's keys); None if the fields are unusual."""
    config = model.config.get_text_config()
    try:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        return config.num_hidden_layers, +config.hidden_size, +inner, heads * width
    except (AttributeError, TypeError):  # no such field; one number per layer
        return None


def sampling_memory(model, batch_tokens: int) -> str | None:
    """A line on sampling `batch_tokens` tokens at a time; None for a model of unusual shape.

    Counted: what is held now, the tokens' keys and values with room to grow, and one layer's
    activations while prompts are read.
    """
    if not shape(model):
        return None
    layers, hidden, inner, keys = shape(model)
    cache, layer = 9 / 8 * layers * 2 * keys, 4 * hidden + 3 * inner
    total = memory_now(model.device) + batch_tokens * (cache + layer) * model.dtype.itemsize
    return f"at most about {total / 1e9:.1f} GB while sampling (--batch-tokens {batch_tokens:,})"


def training_memory(model, tokens: int, checkpointing: bool) -> str | None:
    """A line on training with `tokens` tokens in one pass; None for a model of unusual shape.

    Counted: what is held now, gradients and Adam's two moments of trained parameters, activations
    (one layer at a time with gradient checkpointing), mask, one chunk of logits with its gradient.
    """
    if not shape(model):
        return None
    layers, hidden, inner, _ = shape(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # kept for the backward pass, LoRA's inputs included
    layer = tokens * (14 * hidden + 6 * inner) * model.dtype.itemsize
    activations = layers * layer
    if checkpointing:
        activations = layer + layers * tokens * hidden * model.dtype.itemsize
    logits = 3 * 4 * min(LOGITS_AT_ONCE, tokens * model.config.get_text_config().vocab_size)
    total = memory_now(model.device) + 12 * trained + activations + tokens**2 + logits
    return (f"about {total / 1e9:.1f} GB with up to {tokens:,} tokens in one pass "
            "(--tokens-per-step)")
