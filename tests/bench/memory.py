"""Peak memory and tokens/s of one optimiser step: measured on a GPU, or computed; on a CPU the arithmetic is checked.

    python tests/bench/memory.py --stage critic --tokens 8192     # on a GPU: 4-bit Llama-3.1-8B, random weights
    python tests/bench/memory.py --table                          # the README's table by arithmetic, no GPU needed
    python tests/bench/memory.py                                  # without a GPU: a small model's step, checked
    python tests/bench/memory.py --config CONFIG.json ...         # another Llama-shaped model

The weights are random, made and quantised to NF4 layer by layer, so the full-precision model never exists. LoRA of rank
32 on all linear layers, gradient checkpointing, message_logps and the scripts' own losses, reference pass with adapters
off, AdamW. `--tokens` is what goes through the model at once: --tokens-per-step, or one pair of the critic's
trajectories if that is longer. Gigabytes are 10^9 bytes.

`estimate` counts, for T tokens, L layers, hidden size H, feed-forward size I, vocabulary V, and a bytes in an
activation (2 in bf16):
 weights      4.127 bits for each weight of the layers (a scale of 8 bits per 64, one of 32 per 256 scales), embeddings
              and head unquantised
 adapters     16 bytes for each LoRA weight: float32 weight, gradient and AdamW's two averages
 checkpoints  T·H·a for each layer: all that is kept of a layer until its backward pass
 one layer    what autograd keeps while one layer is computed again; see `layer_bytes`
 mask         T·T bool, and the same in the activations' type, as with one mask for the whole row. On CUDA only the
              leaves' rows of it are used (colbench/lm/attention.py), so there it is a bound
 logits       a chunk of LOGITS_AT_ONCE logits: in the activations' type, float32, and their gradients
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
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=False,
    rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                         original_max_position_embeddings=8192))
SMALL = dict(vocab_size=8192, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8,
             num_key_value_heads=4, max_position_embeddings=16384, tie_word_embeddings=False)
RANK, MESSAGE = 32, 60
TOLERANCE = 0.25  # of what a step adds to the weights, on a CPU


def shapes(config):
    """(out, in) of the linear layers of one decoder layer."""
    h, i = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or h // config.num_attention_heads
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    return [(q, h), (kv, h), (kv, h), (h, q), (i, h), (i, h), (h, i)]


def layer_bytes(config, a):
    """Bytes a token that autograd holds at the most while one layer is computed again and differentiated.

    Norms work in float32: two copies each of two norms. Each adapter keeps its own input in float32 on a CPU and in the
    autocast type on CUDA. Attention: queries, keys, values before and after the rotation, keys and values repeated for
    all heads, its output. Feed-forward: gate, its activation, up, their product; and two gradients of that size at the
    turning point.
    """
    h, i = config.hidden_size, config.intermediate_size
    kv = shapes(config)[1][0]
    norms = 2 * 2 * 4 * h
    adapters = 0 if a == 4 else a * (6 * h + i)
    attention = a * (3 * h + 2 * kv + 3 * h)
    feed_forward = a * (4 * i + 2 * i)
    return norms + adapters + attention + feed_forward + a * 2 * h


def estimate(config, tokens, said=None, a=2, four_bit=True):
    """Bytes by part for one optimiser step with `tokens` in a forward pass, `said` of them in messages (None: all); a:
    bytes of an activation and of an unquantised weight. critic and policy differ in nothing that counts: the same
    tokens go through the same model."""
    linear = sum(out * into for out, into in shapes(config)) * config.num_hidden_layers
    lora = RANK * sum(out + into for out, into in shapes(config)) * config.num_hidden_layers
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    biggest = max(out * into for out, into in shapes(config))  # a layer's weights are unpacked for their product
    chunk = min(LOGITS_AT_ONCE, (said or tokens) * config.vocab_size)
    return {
        "weights": linear * (4.127 / 8 if four_bit else a) + embeddings * a,
        "adapters": 16 * lora,
        "checkpoints": tokens * config.hidden_size * a * config.num_hidden_layers,
        "one layer": tokens * layer_bytes(config, a) + (biggest * a if four_bit else 0),
        "mask": tokens * tokens * (1 + a),
        "logits": chunk * (4 + 4 + (a if a < 4 else 0)),  # never beside a layer's recomputation: see `total`
    }


def total(parts):
    """Peak: the logits' chunk and the layer being computed again are never there together."""
    always = parts["weights"] + parts["adapters"] + parts["checkpoints"] + parts["mask"]
    return always + max(parts["one layer"], parts["logits"])


def random_model(config, device, dtype):
    """The model with random NF4 weights: one layer at a time is made and quantised."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype,
                                               quant_type="nf4", compress_statistics=True, device="meta")
                    weight = torch.randn(linear.out_features, linear.in_features, device=device, dtype=dtype) * 0.02
                    packed.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4",
                                                      compress_statistics=True, module=packed).to(device)
                    if hasattr(packed, "support_avx512bf16_for_cpu"):
                        packed.support_avx512bf16_for_cpu = False
                    setattr(part, name, packed)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:  # embeddings, head, norms
                value = torch.ones(parameter.shape) if parameter.dim() == 1 else torch.randn(
                    parameter.shape, device=device, dtype=dtype) * 0.02
                setattr(module, name, nn.Parameter(value.to(device, dtype), requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.tie_weights()
    model.is_loaded_in_4bit = True
    return model


def trees_of(stage, tokens, vocabulary):
    """Trees of `tokens` tokens in all: two trajectories of ten messages, or a state with eight candidates."""
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(vocabulary, (n,), generator=generator).tolist()  # noqa: E731
    if stage == "critic":
        half, turns = tokens // 2, min(10, tokens // 2 // (2 * MESSAGE))
        gap = half // turns
        return [(ids(half), [((t + 1) * gap - MESSAGE, (t + 1) * gap) for t in range(turns)], []) for _ in range(2)]
    return [(ids(tokens - 8 * MESSAGE), [], [ids(MESSAGE) for _ in range(8)])]


def step(model, stage, trees, optimizer):
    """Reference pass, loss, backward, AdamW: as in the training scripts."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        with torch.no_grad(), adapters_off(model):
            ref = message_logps(model, trees)
        logps = message_logps(model, trees)
        if stage == "critic":
            loss, _, _ = critic_loss(logps[0], logps[1], ref[0], ref[1], 0.1, 0.01)
        else:
            loss = sum(policy_loss(logps[0][k], logps[0][k + 4], ref[0][k], ref[0][k + 4], 0.1, 0.01)[0]
                       for k in range(4)) / 4
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def resident():
    """(resident bytes now, most so far) of this process."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prepare(config, device):
    """(model with adapters, optimiser whose averages are there, as in the middle of a run)."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    model = add_lora(random_model(config, device, dtype), RANK, gradient_checkpointing=True).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    step(model, "critic", trees_of("critic", 2 * 10 * MESSAGE, config.vocab_size), optimizer)
    return model, optimizer


def measure(model, optimizer, stage, tokens, repeats=1):
    """(peak bytes of a step, least seconds of some, loss). On a CPU the peak is what the step adds to the resident
    memory."""
    trees, device, best = trees_of(stage, tokens, model.config.vocab_size), model.device.type, float("inf")
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = resident()[0]
    for _ in range(repeats):
        start = time.perf_counter()
        loss = step(model, stage, trees, optimizer)  # its .item() waits for the loss only
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident()[1] - before, best, loss


def flops(config, trees):
    """Floating-point operations that `step` needs.

    Two for each weight of the layers and token, four times: π_ref's pass, ours, the checkpointed layers again, the
    gradient of their inputs (frozen weights have none). Attention: four for each feature of a query and pair of tokens
    that see each other, five times (its backward pass counts two). Head: tokens of messages only, three times.
    """
    linear = sum(out * into for out, into in shapes(config)) * config.num_hidden_layers
    tokens = said = pairs = 0
    for trunk, spans, leaves in trees:
        n, lengths = len(trunk), [len(leaf) for leaf in leaves]
        tokens += n + sum(lengths)
        said += sum(b - a for a, b in spans) + sum(lengths)
        pairs += n * (n + 1) // 2 + sum(m * n + m * (m + 1) // 2 for m in lengths)
    attention = 4 * pairs * shapes(config)[0][0] * config.num_hidden_layers
    return 8 * linear * tokens + 5 * attention + 6 * said * config.vocab_size * config.hidden_size


def table(config):
    """One table for both stages: `estimate` says why."""
    print("| tokens at once | weights | adapters, AdamW | checkpoints | one layer | mask | peak (computed) |")
    print("|" + "---|" * 7)
    for tokens in (2048, 4096, 8192, 16384):
        parts = estimate(config, tokens)
        row = [f"{parts[name] / 1e9:.1f}" for name in ("weights", "adapters", "checkpoints", "one layer", "mask")]
        print(f"| {tokens:,} | {' | '.join(row)} | {total(parts) / 1e9:.1f} GB |")


def main():
    prepare_machine()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path,
                        help="a Llama-shaped config.json (default: Llama-3.1-8B; small on a CPU)")
    parser.add_argument("--stage", choices=("critic", "policy"), default="critic")
    parser.add_argument("--tokens", type=int, help="in one forward pass (default: 8192; on a CPU 3072)")
    parser.add_argument("--table", action="store_true", help="print the computed table for both stages")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    shape = json.loads(args.config.read_text()) if args.config else LLAMA_8B if on_gpu or args.table else SMALL
    config = LlamaConfig(**shape)
    config._attn_implementation = "sdpa"
    if args.table:
        return table(config)
    # freed tensors go back to the system: the peak is exact
    if not on_gpu and os.environ.get("MALLOC_MMAP_THRESHOLD_") is None:
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)
    tokens = args.tokens or (8192 if on_gpu else 3072)
    model, optimizer = prepare(config, "cuda" if on_gpu else "cpu")
    peak, seconds, loss = measure(model, optimizer, args.stage, tokens)
    said = sum(b - a for _, spans, _ in trees_of(args.stage, tokens, 2) for a, b in spans) or 8 * MESSAGE
    parts = estimate(config, tokens, said, 2 if on_gpu else 4)
    expected = total(parts)
    if not on_gpu:  # what is there before the step is not in the measurement
        expected -= parts["weights"] + parts["adapters"] * 3 / 4  # the gradients come with the step
    device = torch.cuda.get_device_name() if on_gpu else "CPU, what the step adds"
    print(f"{args.stage}, {tokens} tokens at once, {device}: "
          f"{peak / 1e9:.3f} GB measured, {expected / 1e9:.3f} GB computed "
          f"({peak / expected - 1:+.0%}), {tokens / seconds:.0f} tokens/s, "
          f"{flops(config, trees_of(args.stage, tokens, 2)) / seconds / 1e12:.3g} TFLOP/s, loss {loss:.4f}")
    print("computed parts in GB: " + ", ".join(f"{name} {value / 1e9:.3f}" for name, value in parts.items()))
    if abs(peak / expected - 1) > TOLERANCE:
        sys.exit(f"more than {TOLERANCE:.0%} off: correct the arithmetic")


if __name__ == "__main__":
    main()
