"""Adapters on a model, and off again.

"Adapters off" is the base model, so agent, critic, reference and simulated human share one set of weights.
"""
import contextlib

import torch

from colbench.run.errors import UserError


def add_lora(model, rank: int, gradient_checkpointing: bool = False):
    """Prepare for training: LoRA of this rank on every linear layer (alpha = 2 x rank), or all weights if rank is 0.

    What a text never passes through, such as the part of a checkpoint that sees pictures, stays as it is.
    PEFT's `prepare_model_for_kbit_training` is left out on purpose: it makes embeddings, head and norms float32, which
    costs Llama-3.1-8B 2.1 GB and makes "adapters off" another model than the one that sampled.
    """
    passed = {*model.get_decoder().modules(), model.get_output_embeddings()}
    unused = [name for name, module in model.named_modules()
              if module not in passed and next(module.parameters(recurse=False), None) is not None]
    if rank:
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=unused or None, lora_dropout=0.0,
            task_type="CAUSAL_LM"))
    elif getattr(model, "is_loaded_in_4bit", False):
        raise UserError("--lora-rank 0 trains all weights, which 4-bit weights do not allow: add --no-load-in-4bit")
    else:
        model = model.float()  # an optimiser's steps are too small for bfloat16 weights
        for name in unused:
            model.get_submodule(name).requires_grad_(False)
    if gradient_checkpointing:
        model.enable_input_require_grads()  # frozen embeddings: without it no gradient reaches a checkpointed block
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def training_mode(model) -> None:
    """Ready for steps: gradient checkpointing works, and no dropout or other noise makes the policy differ from the
    reference before it has learned anything."""
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):  # which transformers heeds in training mode alone
            module.training = True
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)


def has_adapters(model) -> bool:
    """Whether it is a PeftModel, asked without importing PEFT."""
    return hasattr(model, "get_base_model")


def adapters_off(model):
    """Context in which the model is the base model again. A model without adapters is the base model as it is."""
    return model.disable_adapter() if has_adapters(model) else contextlib.nullcontext()


def adapters_in_half(model):
    """Context in which adapters, whose weights are float32, compute in the bfloat16 of the weights under them, as they
    do in training. Without it PEFT copies all activations to float32."""
    half = has_adapters(model) and base_of(model).dtype == torch.bfloat16
    return torch.autocast(model.device.type, torch.bfloat16, enabled=half)


def base_of(model):
    """The causal language model under the adapters, which lie inside its layers."""
    return model.get_base_model() if has_adapters(model) else model
