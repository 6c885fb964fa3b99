"""Adapters on a model, and off again.

"Adapters off" is the base model, so agent, critic, reference and simulated human share one set of weights.
"""
import contextlib
import hashlib
from pathlib import Path

from colbench.lm.load import load_model
from colbench.run.errors import UserError


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


def add_lora(model, rank: int, gradient_checkpointing: bool = False):
    """Prepare for training: LoRA of this rank on every linear layer (alpha = 2 x rank), or all weights if rank is 0.

    PEFT's `prepare_model_for_kbit_training` is left out on purpose: it makes embeddings, head and norms float32, which
    costs Llama-3.1-8B 2.1 GB and makes "adapters off" another model than the one that sampled.
    """
    if rank:
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"))
    elif getattr(model, "is_loaded_in_4bit", False):
        raise UserError("--lora-rank 0 trains all weights, which 4-bit weights do not allow: add --no-load-in-4bit")
    else:
        model = model.float()  # an optimiser's steps are too small for bfloat16 weights
    if gradient_checkpointing:
        model.enable_input_require_grads()  # frozen embeddings: without it no gradient reaches a checkpointed block
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def has_adapters(model) -> bool:
    """Whether it is a PeftModel, asked without importing PEFT."""
    return hasattr(model, "get_base_model")


def adapters_off(model):
    """Context in which the model is the base model again. A model without adapters is the base model as it is."""
    return model.disable_adapter() if has_adapters(model) else contextlib.nullcontext()


def base_of(model):
    """The causal language model under the adapters, which lie inside its layers."""
    return model.get_base_model() if has_adapters(model) else model
