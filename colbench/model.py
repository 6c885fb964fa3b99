"""Plumbing that several scripts share: load a model, turn dialogues into tokens, log-probs of messages.

No learning lives here; the losses stand in the scripts. Three conventions hold everywhere:
 - A dialogue is tokenised piece by piece (template text, message, end-of-turn token, template text, ...), so what is trained
   on are exactly the tokens that were conditioned on while sampling. Template text is tokenised once, without special tokens
   added: no second BOS.
 - A message's tokens include the end-of-turn token that closes it.
 - "Adapters off" is the base model: with LoRA, agent, critic, reference and simulated human share one set of weights.
"""

import contextlib
import ctypes
import hashlib
import os
import re
import sys
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from colbench.files import UserError
from colbench.hub import why_not

EMBEDDED = {"tiny": Path(__file__).parent / "tiny", "tiny-frontend": Path(__file__).parent / "frontend" / "tiny"}
LOGITS_AT_ONCE = 2**26  # message_logps holds at most so many logits, 256 MB in float32: 523 positions of a 128k vocabulary
torch.set_flush_denormal(True)  # sharp attention leaves numbers below 1e-38, on which a CPU is several times slower
libc = ctypes.CDLL(None) if sys.platform == "linux" else None
# glibc: keep freed memory, unless the user chose; fetching it anew costs more than most tensor operations
if hasattr(libc, "mallopt") and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
    libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD; older versions allow no more than 32 MB
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# ------------------------------------------------------------------------------------------------------------ loading


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


def load_model(name: str, load_in_4bit: bool = False, device: str | torch.device | None = None, adapter: str | None = None):
    """The causal language model `name` (hub id, folder or "tiny"), in bfloat16 on CUDA and float32 elsewhere.

    load_in_4bit: NF4 with double quantisation (bitsandbytes). adapter: a folder that a training script wrote; a LoRA adapter is
    put on top of `name`, a fully fine-tuned model is loaded instead of it. UserError in one line if it cannot be loaded.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    is_lora = adapter is not None and (Path(adapter) / "adapter_config.json").exists()
    source = adapter if adapter and not is_lora else name
    try:
        model = AutoModelForCausalLM.from_pretrained(
            EMBEDDED.get(source, source), dtype=dtype, quantization_config=nf4(dtype) if load_in_4bit else None, device_map={"": device})
        keep_4bit_layout(model)
        if is_lora:
            from peft import PeftModel  # here, not above: it takes seconds to import, and a wrong flag should be told at once
            model = PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(cannot_load(source, error)) from None
    return model.eval()


def nf4(dtype) -> BitsAndBytesConfig:
    """4-bit weights: NF4 with double quantisation, computing in `dtype`."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)


def keep_4bit_layout(model) -> None:
    """On a CPU with AVX512-BF16 bitsandbytes would repack 4-bit weights at the first evaluation, and no gradient passes those."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def put_adapter(model, adapter: str):
    """The policy in folder `adapter` on the base model's weights that are in memory already; earlier adapters stay unused.
    A fully fine-tuned model is no adapter: it is loaded instead."""
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
        raise UserError(f"{adapter}: was trained on another model than {model.config._name_or_path}; give its own by --model") from None
    model.set_adapter(name)
    return model.eval()


def cannot_load(name: str, error: Exception) -> str:
    reason = why_not(error, name) or (str(error).strip().split("\n")[0][:200]
                                      + "; give a folder, or the id of a model on the hub that you have access to")
    return f"model {name}: {reason}"


def add_lora(model, rank: int, gradient_checkpointing: bool = False):
    """Prepare for training: LoRA of this rank on every linear layer (alpha = 2 x rank), or all weights if rank is 0.

    PEFT's `prepare_model_for_kbit_training` is left out on purpose: it makes embeddings, head and norms float32, which costs
    Llama-3.1-8B 2.1 GB and makes "adapters off" another model than the one that sampled.
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


# ------------------------------------------------------------------------------------------------- dialogues to tokens


def render(tokenizer, messages: list[dict]) -> str:
    """Template text of a dialogue, ending where the assistant's next message begins. Templates that know no system role
    get the system text in front of the first user message."""
    messages = [{"role": m["role"], "content": m["content"].strip()} for m in messages]
    has_system = messages[0]["role"] == "system" and len(messages) > 1
    try:
        text = _template(tokenizer, messages, add_generation_prompt=True)
        if not has_system or messages[0]["content"] in text:
            return text  # else the template drops system texts without a word
    except Exception as error:  # jinja2.TemplateError raised by the template itself
        if not has_system:
            raise UserError(f"the chat template refuses this dialogue: {error}") from None
    system, first, *rest = messages
    return render(tokenizer, [{"role": first["role"], "content": system["content"] + "\n\n" + first["content"]}, *rest])


def _template(tokenizer, messages, **options) -> str:
    """The chat template's text. A template that writes today's date (Llama-3.2 and 3.3 do) gets the one that Llama-3.1 always
    writes: what is sampled today must have the same tokens in tomorrow's training."""
    fixed_date = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
    return tokenizer.apply_chat_template(messages, tokenize=False, chat_template=fixed_date + tokenizer.get_chat_template(), **options)


def end_of_turn(tokenizer) -> int:
    """Id of the token that ends an assistant message: the first token of the template's text behind such a message."""
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "@@@"}]
    tail = _template(tokenizer, messages).rsplit("@@@", 1)[1].lstrip()
    ids = tokenizer.encode(tail, add_special_tokens=False)
    return ids[0] if ids else tokenizer.eos_token_id


def encode_dialogue(tokenizer, messages: list[dict]) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a dialogue and, for every assistant message, its [start, end) in them, end-of-turn token included.

    A dialogue that ends with the user's message ends with the template's text that opens the assistant's answer. Marks of the
    template inside a message (a user who writes <|eot_id|>) stay plain text.
    """
    end_id = end_of_turn(tokenizer)
    end_text = tokenizer.decode([end_id])
    messages, contents = [*messages, {"role": "assistant", "content": None}], {}
    for i, message in enumerate(messages[:-1]):  # the template gets a place holder for a text that holds its marks
        text = message["content"].strip()
        if "\ue000" in text or _ids(tokenizer, text, True) != _ids(tokenizer, text, False):
            contents[f"\ue000{i}\ue000"] = text
            messages[i] = {"role": message["role"], "content": f"\ue000{i}\ue000"}
    ids, spans, done = [], [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or (message["content"] is None and messages[i - 1]["role"] == "assistant"):
            continue
        text = render(tokenizer, messages[:i])
        if not text.startswith(done):
            raise UserError("the chat template rewrites earlier turns when a new one comes; choose a model whose template does not")
        for piece in re.split("(\ue000[0-9]+\ue000)", text[len(done):]):
            ids += text_ids(tokenizer, contents[piece]) if piece in contents else _ids(tokenizer, piece, False)
        if message["content"] is not None:
            content = message["content"].strip()
            start = len(ids)
            ids += message_ids(tokenizer, contents.get(content, content), end_id)
            spans.append((start, len(ids)))
            done = text + content + end_text
    return ids, spans


def text_ids(tokenizer, text: str) -> list[int]:
    """Tokens of a text that somebody wrote: what looks like a special token in it is text."""
    return list(_ids(tokenizer, text, True))


@lru_cache(maxsize=1 << 14)  # a dialogue is tokenised again at each of its turns
def _ids(tokenizer, text: str, split_special_tokens: bool) -> tuple[int, ...]:
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair, from some server's or file's JSON, is no character
    return tuple(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split_special_tokens))


def message_ids(tokenizer, content: str, end_id: int) -> list[int]:
    """Tokens of one assistant message with its end-of-turn token."""
    return text_ids(tokenizer, content.strip()) + [end_id]


# ----------------------------------------------------------------------------------------------------------- log-probs


def message_logps(model, trees: list[tuple]) -> list[list[torch.Tensor]]:
    """Log-probs of the tokens of every message of some trees, in one forward pass; differentiable.

    A tree is (trunk ids, spans, leaves): the messages inside the trunk that `spans` [start, end) name, then the messages
    `leaves` (lists of ids), each of which follows the whole trunk. A trajectory is a trunk with its agent turns as spans; a
    state with candidates is a trunk without spans and the candidates as leaves, so its prompt is computed once.
    Returns per tree a list of (tokens in the message,) float32 tensors: spans first, then leaves.
    """
    hidden, _, predict, lengths = _last_layer(model, trees)
    base, hidden = base_of(model), hidden[predict]  # (tokens of all messages, hidden size)
    targets = [token for trunk, spans, leaves in trees
               for message in [*(trunk[a:b] for a, b in spans), *leaves] for token in message]
    chunk = max(1, LOGITS_AT_ONCE // base.get_output_embeddings().out_features)
    parts = zip(hidden.split(chunk), torch.tensor(targets, device=base.device).split(chunk))
    if any(p.requires_grad for p in base.get_output_embeddings().parameters()):  # all weights are trained
        logps = torch.cat([checkpoint(_token_logps, base, *part, use_reentrant=False) for part in parts])
    else:
        logps = torch.cat([_FrozenHead.apply(base, *part) for part in parts])
    per_message = iter(logps.split(lengths))
    return [[next(per_message) for _ in range(len(spans) + len(leaves))] for _, spans, leaves in trees]


def message_means(model, trees: list[tuple]) -> list[list[torch.Tensor]]:
    """Like message_logps, but of each message the mean over its tokens of the last layer's output: (hidden size,) float32."""
    hidden, places, _, lengths = _last_layer(model, trees)
    per_message = iter(hidden[places].float().split(lengths))
    return [[next(per_message).mean(0) for _ in range(len(spans) + len(leaves))] for _, spans, leaves in trees]


def base_of(model):
    return model.get_base_model() if has_adapters(model) else model  # adapters are inside its layers


def _last_layer(model, trees: list[tuple]):
    """(last layer's output (tokens, hidden size), places of the messages' tokens, places one before them, messages' lengths).

    All trees lie in one row. A token sees its own tree's trunk, and its own leaf, up to itself: attention mask and restarted
    positions see to that, and nothing is padded.
    """
    ids, positions, tree_of, leaf_of, places, predict, lengths = [], [], [], [], [], [], []
    for t, (trunk, spans, leaves) in enumerate(trees):
        offset = len(ids)
        ids += trunk
        positions += range(len(trunk))
        tree_of += [t] * len(trunk)
        leaf_of += [-1] * len(trunk)
        for start, end in spans:
            places += range(offset + start, offset + end)
            predict += range(offset + start - 1, offset + end - 1)  # the output one place before a token predicts it
            lengths.append(end - start)
        for k, leaf in enumerate(leaves):
            places += range(len(ids), len(ids) + len(leaf))
            predict += [offset + len(trunk) - 1, *range(len(ids), len(ids) + len(leaf) - 1)]
            lengths.append(len(leaf))
            ids += leaf
            positions += range(len(trunk), len(trunk) + len(leaf))
            tree_of += [t] * len(leaf)
            leaf_of += [k] * len(leaf)
    base = base_of(model)
    device = base.device
    place, tree, leaf = torch.arange(len(ids), device=device), *torch.tensor([tree_of, leaf_of], device=device)
    position = torch.tensor(positions, device=device)
    visible = (tree[:, None] == tree) & ((leaf == -1) | (leaf[:, None] == leaf)) & (place[:, None] >= place)  # (query, key)
    hidden = base.get_decoder()(
        input_ids=torch.tensor([ids], device=device), position_ids=position[None],
        attention_mask=attention_masks(base, visible[None], (position[:, None] - position)[None]), use_cache=False,
    ).last_hidden_state[0]
    return hidden, torch.tensor(places, device=device), torch.tensor(predict, device=device), lengths


def attention_masks(base, visible: torch.Tensor, distance: torch.Tensor):
    """What the decoder takes as attention mask for visible (rows, queries, keys): as it is, or kept to a window (Mistral) by the keys'
    distance from the query in positions, or one mask for each kind of layer (Gemma)."""
    config = base.config.get_text_config()
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    masks = {"full_attention": visible}
    if window:
        masks["sliding_attention"] = visible & (distance < window)
    for kind, mask in masks.items():
        if config._attn_implementation == "eager":  # it adds the mask to the scores
            mask = torch.zeros_like(mask, dtype=base.dtype).masked_fill(~mask, torch.finfo(base.dtype).min)
        masks[kind] = mask[:, None]
    return masks if window and kinds else list(masks.values())[-1]


def _token_logps(base, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probs of targets (n,) given the last layer's output hidden (n, hidden size), float32 (n,). Under `checkpoint` the
    logits (n, vocabulary) are dropped after the forward pass and computed again, chunk by chunk, in the backward pass."""
    return -F.cross_entropy(logits_of(base, hidden), targets, reduction="none")


class _FrozenHead(torch.autograd.Function):
    """_token_logps where the head itself is not trained. A token's log-prob depends on its own row h of `hidden` alone, so its
    gradient is the number that arrives times ∂ log p / ∂h = (onehot − softmax) W, which is made while the logits are at hand:
    nothing is computed twice, and (n, hidden size) is all that is kept."""

    @staticmethod
    def forward(ctx, base, hidden, targets):
        with torch.set_grad_enabled(ctx.needs_input_grad[1]):
            hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[1])
            logits = logits_of(base, hidden)
        slope = logits.detach()
        total = slope.logsumexp(-1, keepdim=True)
        logps = slope.gather(-1, targets[:, None]) - total
        if ctx.needs_input_grad[1]:
            slope.sub_(total).exp_().neg_()  # −softmax, in the logits' memory
            slope.scatter_add_(-1, targets[:, None], torch.ones_like(total))
            ctx.save_for_backward(*torch.autograd.grad(logits, hidden, slope))
        return logps[:, 0]

    @staticmethod
    def backward(ctx, gradient):
        [slope] = ctx.saved_tensors
        return None, (gradient[:, None] * slope).to(slope.dtype), None


def logits_of(base, hidden: torch.Tensor) -> torch.Tensor:
    """(n, hidden size) -> (n, vocabulary) float32."""
    config = base.config.get_text_config()
    logits = base.get_output_embeddings()(hidden).float()
    if (scale := getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)) != 1:  # Cohere; Granite
        logits = logits * scale
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = cap * torch.tanh(logits / cap)
    return logits


def tree_tokens(tree: tuple) -> int:
    """Tokens that a tree takes in message_logps."""
    trunk, _, leaves = tree
    return len(trunk) + sum(len(leaf) for leaf in leaves)


def pack(sizes: list[int], budget: int) -> list[list[int]]:
    """Indices of items in order, in groups whose sizes sum to at most `budget` (a larger item gets a group of its own)."""
    groups, room = [], 0
    for index, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = budget
        groups[-1].append(index)
        room -= size
    return groups


def candidate_trees(tokenizer, states: list[tuple[list[dict], list[str]]], max_tokens: int, budget: int) -> list[tuple[int, tuple]]:
    """[(number of the state, tree)] for states (messages, candidate messages): the prompt as trunk, candidates as leaves. A state
    that takes more than `budget` tokens becomes several trees; one with a candidate that passes max_tokens has none."""
    jobs, end_id = [], end_of_turn(tokenizer)
    for number, (messages, candidates) in enumerate(states):
        prompt, _ = encode_dialogue(tokenizer, messages)
        leaves = [message_ids(tokenizer, text, end_id) for text in candidates]
        if len(prompt) + max(map(len, leaves)) <= max_tokens:
            for part in pack([len(leaf) for leaf in leaves], max(1, budget - len(prompt))):
                jobs.append((number, (prompt, [], [leaves[k] for k in part])))
    return jobs
