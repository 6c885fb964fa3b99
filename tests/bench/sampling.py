"""Time the sampling of 16 candidates from one prompt: LocalChat.sample against transformers.

    python tests/bench/sampling.py        # 400-token prompt, 60 new tokens; random weights, CPU
    python tests/bench/sampling.py --model meta-llama/Llama-3.1-8B-Instruct --load-in-4bit

Compared in one run with 16 rows of transformers' generate and with its continuous batching
(generate_batch, which forks the prompt's cache). None stops early: each makes rows x tokens new
tokens. At temperature 0 ours and generate must give the same text. At temperature 1 the draws
differ by design: ours has a seed per row, continuous batching has none.
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from colbench.lm.load import keep_freed_memory, load_model, load_tokenizer, prepare_machine
from colbench.lm.sampling import LocalChat
from colbench.lm.tokens import encode_dialogue

DRAWN = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)


def best_of(repeats, function):
    """(result, shortest time)."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return result, best


def ours(chat, prompts, rows, tokens, temperature):
    """LocalChat's new tokens: for each prompt a list of `rows` messages."""
    return chat._generate([(prompt, tokens, [rows * i + k for k in range(rows)])
                           for i, prompt in enumerate(prompts)], temperature)


def generate(model, prompts, rows, tokens, **settings):
    """New tokens of transformers' generate on `rows` copies of each prompt, all equally long."""
    ids = torch.tensor([prompt for prompt in prompts for _ in range(rows)], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
            pad_token_id=0, eos_token_id=None, **settings)
    return output[:, ids.shape[1]:].tolist()


def continuous(model, prompts, rows, tokens, keep=False, **cache):
    """New tokens of each message from transformers' continuous batching.

    keep: keep its preparation for the next call. cache: its settings, such as num_blocks; without
    them it takes 90 % of the free memory.
    """
    config = GenerationConfig(**DRAWN, num_return_sequences=rows, max_new_tokens=tokens,
                              eos_token_id=-1, pad_token_id=0)
    replies = model.generate_batch(
        prompts, config, ContinuousBatchingConfig(**cache), persistent_manager=keep)
    return [reply.generated_tokens for reply in replies.values()]


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
    parser.add_argument("--prompt", type=int, default=400, help="approximate tokens")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = load_tokenizer(args.model or "tiny")
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
    words = 0
    messages = lambda: [{"role": "user", "content": "toll " * words}]  # noqa: E731
    while len(encode_dialogue(tokenizer, messages())[0]) < args.prompt:
        words += 1
    prompt, _ = encode_dialogue(tokenizer, messages())
    chat = LocalChat(model, tokenizer)
    chat.stops = set()  # run to the full length
    seeds = list(range(args.rows))
    shape = [prompt], args.rows, args.tokens
    new = args.rows * args.tokens
    greedy, expected = ours(chat, *shape, 0)[0], generate(model, *shape, do_sample=False)
    if greedy != expected:
        same = sum(a == b for a, b in zip(sum(greedy, []), sum(expected, []))) / new
        if model.dtype == torch.float32:
            sys.exit(f"greedy tokens differ: {same:.1%} equal")
        print(f"greedy tokens: {same:.1%} equal (bf16 rounds differently)")
    result, slow = best_of(args.repeats, lambda: generate(model, *shape, **DRAWN))
    assert [len(row) for row in result] == [args.tokens] * args.rows
    result, forked = best_of(args.repeats, lambda: continuous(model, *shape))
    assert [len(row) for row in result] == [args.tokens] * args.rows
    [result], fast = best_of(args.repeats, lambda: chat.sample(
        [messages()], [seeds], max_new_tokens=args.tokens))
    assert [reply.tokens for reply in result] == [args.tokens] * args.rows
    print(f"prompt {len(prompt)} tokens, {args.rows} rows of {args.tokens}: "
          f"generate {slow:.3f} s ({new / slow:.0f} tokens/s), "
          f"continuous batching {forked:.3f} s ({new / forked:.0f} tokens/s), "
          f"LocalChat.sample {fast:.3f} s ({new / fast:.0f} tokens/s)")
    print(f"ratio to generate {slow / fast:.1f}, to continuous batching {forked / fast:.1f}; "
          f"greedy tokens equal: {greedy == expected}")


if __name__ == "__main__":
    main()
