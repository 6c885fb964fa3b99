"""Time the scoring of a state's 16 candidates: shared prompt against one by one, in one run.

    python tests/bench/critic_scoring.py     # 60-token candidates, 400 and 2,000-token prompts; CPU
    python tests/bench/critic_scoring.py --model meta-llama/Llama-3.1-8B-Instruct --load-in-4bit

All methods give log-probs of the same tokens, which are compared. One by one is a forward pass per
candidate: `plain` computes logits at all positions, as models do; `trimmed` only at the candidate's
tokens, the best one can do without sharing the prompt. Without --model: a random Llama;
--hidden 576 --layers 30 is the shape of a 135M chat model.
"""
import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from colbench.lm.load import keep_freed_memory, load_model, prepare_machine
from colbench.lm.logps import message_logps


def plain(model, prompt, candidates, trim=False):
    """Log-probs of each candidate's tokens, from a forward pass per candidate."""
    rows = []
    for candidate in candidates:
        ids = torch.tensor([prompt + candidate], device=model.device)
        keep = len(candidate) + 1 if trim else 0  # 0: all
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
        logps = logits[0, -len(candidate) - 1:-1].float().log_softmax(-1)
        rows.append(logps.gather(1, ids[0, -len(candidate):, None])[:, 0])
    return rows


def shared(model, prompt, candidates):
    return message_logps(model, [(prompt, [], candidates)])[0]


def seconds(function, *args, repeats):
    """(result, shortest time of `repeats` calls), after one call to warm up."""
    result, best = function(*args), float("inf")
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = function(*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return result, best


def main():
    prepare_machine()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model",
                        help="hub id or folder (default: random, with --hidden and --layers)")
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--prompts", type=int, nargs="+", default=[400, 2000])
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=60, help="of each candidate")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.model:
        model = load_model(args.model, args.load_in_4bit)
    else:
        heads = args.hidden // 64
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=args.vocabulary, hidden_size=args.hidden,
            intermediate_size=args.hidden * 8 // 3, num_hidden_layers=args.layers,
            num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True,
            initializer_range=0.05, max_position_embeddings=16384)).eval()
        keep_freed_memory(model)
    rng, size = random.Random(0), model.config.vocab_size
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.1  # bf16 rounding depends on order
    for length in args.prompts:
        prompt = [rng.randrange(size) for _ in range(length)]
        candidates = [[rng.randrange(size) for _ in range(args.tokens)]
                      for _ in range(args.candidates)]
        with torch.no_grad():
            expected, slow = seconds(plain, model, prompt, candidates, repeats=args.repeats)
            _, trimmed = seconds(plain, model, prompt, candidates, True, repeats=args.repeats)
            got, fast = seconds(shared, model, prompt, candidates, repeats=args.repeats)
        difference = (torch.cat(got) - torch.cat(expected)).abs().max().item()
        one_by_one = args.candidates * (length + args.tokens)
        together = length + args.candidates * args.tokens
        print(f"prompt {length}: one by one {slow:.3f} s plain, {trimmed:.3f} s trimmed, "
              f"shared {fast:.3f} s; ratio {slow / fast:.1f} to plain, {trimmed / fast:.1f} to "
              f"trimmed (tokens through the model: {one_by_one / together:.1f}); "
              f"log-probs differ by at most {difference:.1e}")
        if difference > tolerance:
            sys.exit("the log-probs differ")


if __name__ == "__main__":
    main()
