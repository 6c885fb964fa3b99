"""Switch a model's adapters on and off.

"Adapters off" is the base model: agent, critic, π_ref and simulated human share one set of weights.
"""
import contextlib

import torch

from colbench.run.errors import UserError


def add_lora(model, rank: int, gradient_checkpointing: bool = False):
    """Prepare for training: LoRA on every linear layer (alpha = 2 x rank), all weights for rank 0.

    Modules that text never passes through, such as a checkpoint's vision tower, stay frozen. PEFT's
    `prepare_model_for_kbit_training` is left out on purpose: it makes embeddings, head and norms
    float32, which costs Llama-3.1-8B 2.1 GB, and then "adapters off" is not the model that sampled.
    """
    used = {*model.get_decoder().modules(), model.get_output_embeddings()}
    unused = [name for name, module in model.named_modules()
              if module not in used and next(module.parameters(recurse=False), None) is not None]
    if rank:
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, task_type="CAUSAL_LM",
            target_modules="all-linear", exclude_modules=unused or None))
    elif getattr(model, "is_loaded_in_4bit", False):
        raise UserError("--lora-rank 0 trains all weights, which is impossible in 4-bit: "
                        "add --no-load-in-4bit")
    else:
        model = model.float()  # an optimiser's steps are too small for bfloat16 weights
        for name in unused:
            model.get_submodule(name).requires_grad_(False)
    if gradient_checkpointing:
        model.enable_input_require_grads()  # else frozen embeddings pass no gradient to the blocks
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def training_mode(model) -> None:
    """Allow gradient checkpointing, without dropout or other noise: at step 0 policy = π_ref."""
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # transformers checkpoints only in training mode
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)


def has_adapters(model) -> bool:
    """Whether it is a PeftModel, without importing PEFT."""
    return hasattr(model, "get_base_model")


def adapters_off(model):
    """Context in which the model is the base model; no-op for a model without adapters."""
    return model.disable_adapter() if has_adapters(model) else contextlib.nullcontext()


def adapters_in_half(model):
    """Context in which float32 adapters on bfloat16 weights compute in bfloat16, as in training.

    Without it PEFT copies all activations to float32.
    """
    half = has_adapters(model) and base_of(model).dtype == torch.bfloat16
    return torch.autocast(model.device.type, torch.bfloat16, enabled=half)


def base_of(model):
    """The causal language model that the adapters are in."""
    return model.get_base_model() if has_adapters(model) else model
