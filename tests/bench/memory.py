"""Measure or compute peak memory and tokens/s of one optimiser step.

    python tests/bench/memory.py --stage critic --tokens 8192     # on a GPU: 4-bit Llama-3.1-8B
    python tests/bench/memory.py --table                          # the README's table, computed
    python tests/bench/memory.py                                  # on a CPU: small model, checked
    python tests/bench/memory.py --config CONFIG.json ...         # another Llama-shaped model

Weights are random, made and quantised to NF4 layer by layer, so the full-precision model never
exists. LoRA of rank 32 on all linear layers, gradient checkpointing, message_logps, the scripts'
losses, a π_ref pass with adapters off, AdamW. `--tokens` go through the model at once: they stand
for --tokens-per-step, or for one pair of trajectories if that is longer. 1 GB is 10^9 bytes.

`estimate` counts, for T tokens, hidden size H and activations of a bytes (2 in bf16):
 weights      4.127 bits per parameter of the layers (a scale of 8 bits per 64, one of 32 per 256
              scales); embeddings and head unquantised
 adapters     16 bytes per LoRA parameter: float32 value, gradient and AdamW's two averages
 checkpoints  T·H·a per layer: what is kept of it until its backward pass
 one layer    what autograd keeps while one layer is recomputed; see `layer_bytes`
 mask         T·T bool, and the same in the activations' type, for one mask over the whole row. An
              upper bound on CUDA, which uses only the leaves' rows (colbench/lm/attention.py)
 logits       a chunk of LOGITS_AT_ONCE logits: in the activations' type, float32, and gradients
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import bitsandbytes as bnb
import torch
from torch import nn
from train_critic import critic_loss
from train_policy import policy_loss
from transformers import LlamaConfig, LlamaForCausalLM

from colbench.lm.adapters import adapters_off, add_lora
from colbench.lm.load import prepare_machine
from colbench.lm.logps import LOGITS_AT_ONCE, message_logps

LLAMA_8B = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
    rms_norm_eps=1e-5, tie_word_embeddings=False,
    rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
                         high_freq_factor=4.0, original_max_position_embeddings=8192))
SMALL = dict(
    vocab_size=8192, hidden_size=256, intermediate_size=704, num_hidden_layers=6,
    num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=16384,
    tie_word_embeddings=False)
RANK, MESSAGE = 32, 60
TOLERANCE = 0.25  # relative error allowed


def shapes(config):
    """(out, in) of the linear layers of one decoder layer."""
    h, i = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or h // config.num_attention_heads
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    return [(q, h), (kv, h), (kv, h), (h, q), (i, h), (i, h), (h, i)]


def layer_bytes(config, a):
    """Most bytes per token that autograd holds while one layer is recomputed and differentiated.

    Norms work in float32: two copies each of two norms. Each adapter keeps its own input, in
    float32 on a CPU and in the autocast type on CUDA. Attention: queries, keys, values before and
    after the rotation, keys and values repeated for all heads, its output. Feed-forward: gate, its
    activation, up, their product; and two gradients of that size at the turning point.
    """
    h, i = config.hidden_size, config.intermediate_size
    kv = shapes(config)[1][0]
    norms = 2 * 2 * 4 * h
    adapters = 0 if a == 4 else a * (6 * h + i)
    attention = a * (3 * h + 2 * kv + 3 * h)
    feed_forward = a * (4 * i + 2 * i)
    return norms + adapters + attention + feed_forward + a * 2 * h


def estimate(config, tokens, message_tokens=None, a=2, four_bit=True):
    """Bytes by part for one optimiser step with `tokens` in a forward pass; same for both stages.

    message_tokens: tokens in messages (None: all). a: bytes of an activation and of an unquantised
    parameter.
    """
    linear = sum(out * into for out, into in shapes(config)) * config.num_hidden_layers
    lora = RANK * sum(out + into for out, into in shapes(config)) * config.num_hidden_layers
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    biggest = max(out * into for out, into in shapes(config))  # unpacked for the matrix product
    chunk = min(LOGITS_AT_ONCE, (message_tokens or tokens) * config.vocab_size)
    return {
        "weights": linear * (4.127 / 8 if four_bit else a) + embeddings * a,
        "adapters": 16 * lora,
        "checkpoints": tokens * config.hidden_size * a * config.num_hidden_layers,
        "one layer": tokens * layer_bytes(config, a) + (biggest * a if four_bit else 0),
        "mask": tokens * tokens * (1 + a),
        "logits": chunk * (4 + 4 + (a if a < 4 else 0)),
    }


def total(parts):
    """Peak: logits and a recomputed layer are never in memory together."""
    always = parts["weights"] + parts["adapters"] + parts["checkpoints"] + parts["mask"]
    return always + max(parts["one layer"], parts["logits"])


def random_model(config, device, dtype):
    """The model with random NF4 weights, made and quantised one layer at a time."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    packed = bnb.nn.Linear4bit(
                        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype,
                        quant_type="nf4", compress_statistics=True, device="meta")
                    weight = torch.randn(linear.out_features, linear.in_features, device=device,
                                         dtype=dtype) * 0.02
                    packed.weight = bnb.nn.Params4bit(
                        weight, requires_grad=False, quant_type="nf4", compress_statistics=True,
                        module=packed).to(device)
                    if hasattr(packed, "support_avx512bf16_for_cpu"):
                        packed.support_avx512bf16_for_cpu = False
                    setattr(part, name, packed)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:  # embeddings, head, norms
                if parameter.dim() == 1:
                    value = torch.ones(parameter.shape)
                else:
                    value = torch.randn(parameter.shape, device=device, dtype=dtype) * 0.02
                setattr(module, name, nn.Parameter(value.to(device, dtype), requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.tie_weights()
    model.is_loaded_in_4bit = True
    return model


def trees_of(stage, tokens, vocabulary):
    """Trees of `tokens` tokens: two trajectories of ten messages or a state with eight candidates.
    """
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(vocabulary, (n,), generator=generator).tolist()  # noqa: E731
    if stage == "critic":
        half, turns = tokens // 2, min(10, tokens // 2 // (2 * MESSAGE))
        gap = half // turns
        spans = [((t + 1) * gap - MESSAGE, (t + 1) * gap) for t in range(turns)]
        return [(ids(half), spans, []) for _ in range(2)]
    return [(ids(tokens - 8 * MESSAGE), [], [ids(MESSAGE) for _ in range(8)])]


def step(model, stage, trees, optimizer):
    """π_ref's pass, loss, backward, AdamW: as in the training scripts."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        with torch.no_grad(), adapters_off(model):
            ref_logps = message_logps(model, trees)
        logps = message_logps(model, trees)
        if stage == "critic":
            loss, _, _ = critic_loss(*logps, *ref_logps, 0.1, 0.01)
        else:
            [logps], [ref_logps] = logps, ref_logps
            losses = [policy_loss(logps[k], logps[k + 4], ref_logps[k], ref_logps[k + 4], 0.1, 0.01)
                      for k in range(4)]
            loss = sum(loss for loss, *_ in losses) / 4
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def resident():
    """(resident bytes now, peak so far) of this process."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prepare(config, device):
    """(model with adapters, optimiser after a step, so that its averages exist)."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    model = random_model(config, device, dtype)
    model = add_lora(model, RANK, gradient_checkpointing=True).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    step(model, "critic", trees_of("critic", 2 * 10 * MESSAGE, config.vocab_size), optimizer)
    return model, optimizer


def measure(model, optimizer, stage, tokens, repeats=1):
    """(peak bytes of a step, shortest time in seconds, loss).

    On a CPU the peak is what the step adds to the resident memory.
    """
    trees = trees_of(stage, tokens, model.config.vocab_size)
    device, best = model.device.type, float("inf")
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = resident()[0]
    for _ in range(repeats):
        start = time.perf_counter()
        loss = step(model, stage, trees, optimizer)  # its .item() waits only for the loss
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resident()[1] - before
    return peak, best, loss


def flops(config, trees):
    """Floating-point operations that `step` needs.

    Two per layer parameter and token, four times: π_ref's pass, ours, recomputation, gradient of
    the inputs (frozen weights have none). Attention: four per query feature and pair of tokens that
    see each other, five times (its backward pass counts twice). Head: tokens of messages only,
    three times.
    """
    linear = sum(out * into for out, into in shapes(config)) * config.num_hidden_layers
    tokens = message_tokens = pairs = 0
    for trunk, spans, leaves in trees:
        n, lengths = len(trunk), [len(leaf) for leaf in leaves]
        tokens += n + sum(lengths)
        message_tokens += sum(b - a for a, b in spans) + sum(lengths)
        pairs += n * (n + 1) // 2 + sum(m * n + m * (m + 1) // 2 for m in lengths)
    attention = 4 * pairs * shapes(config)[0][0] * config.num_hidden_layers
    head = message_tokens * config.vocab_size * config.hidden_size
    return 8 * linear * tokens + 5 * attention + 6 * head


def table(config):
    """Print one table for both stages."""
    print("| tokens at once | weights | adapters, AdamW | checkpoints | one layer | mask "
          "| peak (computed) |")
    print("|" + "---|" * 7)
    for tokens in (2048, 4096, 8192, 16384):
        parts = estimate(config, tokens)
        row = [f"{parts[name] / 1e9:.1f}"
               for name in ("weights", "adapters", "checkpoints", "one layer", "mask")]
        print(f"| {tokens:,} | {' | '.join(row)} | {total(parts) / 1e9:.1f} GB |")


def main():
    prepare_machine()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path,
                        help="a Llama-shaped config.json (default: Llama-3.1-8B; small on a CPU)")
    parser.add_argument("--stage", choices=("critic", "policy"), default="critic")
    parser.add_argument("--tokens", type=int,
                        help="in one forward pass (default: 8192; on a CPU 3072)")
    parser.add_argument("--table", action="store_true",
                        help="print the computed table for both stages")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    shape = LLAMA_8B if on_gpu or args.table else SMALL
    if args.config:
        shape = json.loads(args.config.read_text())
    config = LlamaConfig(**shape)
    config._attn_implementation = "sdpa"
    if args.table:
        return table(config)
    # give freed tensors back to the system, so that the peak is exact
    if not on_gpu and os.environ.get("MALLOC_MMAP_THRESHOLD_") is None:
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536",
                       "MALLOC_TRIM_THRESHOLD_": "65536"}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)
    tokens = args.tokens or (8192 if on_gpu else 3072)
    model, optimizer = prepare(config, "cuda" if on_gpu else "cpu")
    peak, seconds, loss = measure(model, optimizer, args.stage, tokens)
    trees = trees_of(args.stage, tokens, 2)
    message_tokens = sum(b - a for _, spans, _ in trees for a, b in spans) or 8 * MESSAGE
    parts = estimate(config, tokens, message_tokens, 2 if on_gpu else 4)
    expected = total(parts)
    if not on_gpu:  # only what the step adds is measured; it adds the adapters' gradients
        expected -= parts["weights"] + parts["adapters"] * 3 / 4
    device = torch.cuda.get_device_name() if on_gpu else "CPU, what the step adds"
    print(f"{args.stage}, {tokens} tokens at once, {device}: "
          f"{peak / 1e9:.3f} GB measured, {expected / 1e9:.3f} GB computed "
          f"({peak / expected - 1:+.0%}), {tokens / seconds:.0f} tokens/s, "
          f"{flops(config, trees) / seconds / 1e12:.3g} TFLOP/s, loss {loss:.4f}")
    print("computed parts in GB: "
          + ", ".join(f"{name} {value / 1e9:.3f}" for name, value in parts.items()))
    if abs(peak / expected - 1) > TOLERANCE:
        sys.exit(f"more than {TOLERANCE:.0%} off: correct the arithmetic")


if __name__ == "__main__":
    main()
