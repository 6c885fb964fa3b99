"""Compare step-level DPO with TRL's DPOTrainer: pairs per second on the same pairs and losses.

    pip install -r tests/bench/requirements.txt
    python tests/bench/dpo_vs_trl.py     # random Llama, 17 M parameters, 49k vocabulary; minutes
    python tests/bench/dpo_vs_trl.py --states 32 --hidden 576 --layers 12     # a larger model

Data: 400-token prompts, 16 candidates of 60 tokens and 4 pairs per state, drawn as train_policy.py
draws them, batch 8. Ours is the loop of train_policy.py: message_logps and policy_loss, LoRA on
frozen weights. TRL gets the same LoRA weights, optimiser, order of pairs and losses (sigmoid +
0.01 sft), in several settings. Then its best setting and ours run in turns, --repeats times, and
their medians are compared. TRL's time includes its π_ref pass, at each step or before training. All
sequences have one length, so padding costs nothing (this version of TRL pads even with
padding_free). Prints the largest difference of the losses (must be below 1e-4), the measured ratio,
and the ratio of tokens through the model. In a larger model the vocabulary matters less.
"""
import argparse
import contextlib
import functools
import gc
import io
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["TQDM_DISABLE"] = os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import SequentialSampler
from train_policy import policy_loss, policy_pairs
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from colbench.lm.adapters import adapters_off
from colbench.lm.load import EMBEDDED, keep_freed_memory, prepare_machine
from colbench.lm.logps import message_logps, pack, tree_tokens

try:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
except ImportError:  # --settings 0 measures only ours
    DPOTrainer = object

BETA, NLL, RATE = 0.1, 0.01, 1e-3
PRECOMPUTE = {"precompute_ref_log_probs": True}
SETTINGS = [  # for TRL: per-device batch (accumulated to 8), other settings
    (8, {}), (2, {}), (8, PRECOMPUTE), (4, PRECOMPUTE), (2, PRECOMPUTE), (1, PRECOMPUTE),
]


def make_model(args):
    """A random Llama of args.shape on args.device, bf16 or float32."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    with torch.device(args.device):
        model = LlamaForCausalLM(LlamaConfig(**args.shape)).to(dtype)
    keep_freed_memory(model)
    return model


def lora():
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0,
                      task_type="CAUSAL_LM")


def make_states(args):
    """Random states with candidates and pairs."""
    rng, states, size = random.Random(0), [], args.shape["vocab_size"]
    for _ in range(args.states):
        prompt = [rng.randrange(size) for _ in range(args.prompt)]
        candidates = [[rng.randrange(size) for _ in range(args.response)] for _ in range(16)]
        pairs = policy_pairs([rng.random() for _ in candidates], rng, 4)
        used = sorted({k for pair in pairs for k in pair})
        states.append({"tree": (prompt, [], [candidates[k] for k in used]),
                       "pairs": [(used.index(a), used.index(b)) for a, b in pairs]})
    return states


def ours(model, states, tokens_per_step, bf16=False):
    """The loop of train_policy.py. Returns (mean loss of each step, seconds)."""
    autocast = functools.partial(torch.autocast, model.device.type, torch.bfloat16, enabled=bf16)
    losses, start = [], time.perf_counter()
    sizes = [tree_tokens(state["tree"]) for state in states]
    for group in pack(sizes, tokens_per_step):
        with torch.no_grad(), autocast(), adapters_off(model):
            for k, logps in zip(group, message_logps(model, [states[k]["tree"] for k in group])):
                states[k]["ref_logps"] = logps
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    model.train()
    for first in range(0, len(states), 2):  # 2 states of 4 pairs: batch 8
        batch, mean = states[first:first + 2], 0.0
        weight = 1 / sum(len(state["pairs"]) for state in batch)
        for group in pack(sizes[first:first + 2], tokens_per_step):
            with autocast():
                logps = message_logps(model, [batch[k]["tree"] for k in group])
            total = 0.0
            for state, messages in zip([batch[k] for k in group], logps):
                ref = state["ref_logps"]
                for a, b in state["pairs"]:
                    loss, _, _ = policy_loss(messages[a], messages[b], ref[a], ref[b], BETA, NLL)
                    total = total + weight * loss
            total.backward()
            mean += total.item()
        losses.append(mean)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return losses, time.perf_counter() - start


class Peer(DPOTrainer):
    """TRL's trainer with pairs in order; records its losses and the time of its π_ref pass."""

    def __init__(self, *args, **kwargs):
        self.recorded_losses, self.ref_seconds = [], 0.0
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset  # already token ids

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.recorded_losses.append(loss.item())
        return loss

    def _precompute_ref_logps(self, *args, **kwargs):
        start = time.perf_counter()
        result = super()._precompute_ref_logps(*args, **kwargs)
        self.ref_seconds += time.perf_counter() - start
        return result


def trl(model, lora_weights, states, batch, settings, folder, bf16=False):
    """TRL on the same pairs. Returns (mean loss of each step, seconds)."""
    rows = [{"prompt_ids": state["tree"][0], "chosen_ids": state["tree"][2][a],
             "rejected_ids": state["tree"][2][b],
             "setting": f"{batch} {settings}"}  # a new fingerprint: no cache of earlier settings
            for state in states for a, b in state["pairs"]]
    config = DPOConfig(
        output_dir=folder, per_device_train_batch_size=batch,
        gradient_accumulation_steps=8 // batch, num_train_epochs=1, learning_rate=RATE,
        lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0,
        optim="adamw_torch", beta=BETA, loss_type=["sigmoid", "sft"], loss_weights=[1.0, NLL],
        max_length=None, bf16=bf16, use_cpu=model.device.type == "cpu",
        gradient_checkpointing=False, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, precompute_ref_batch_size=batch, **settings)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED["tiny"])
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Peer(model=model, args=config, train_dataset=Dataset.from_list(rows),
                       processing_class=tokenizer, peft_config=lora())
        missing = trainer.model.load_state_dict(lora_weights, strict=False)
        assert not missing.unexpected_keys
        start = time.perf_counter()
        trainer.train()
    seconds = time.perf_counter() - start + trainer.ref_seconds
    losses = trainer.recorded_losses
    per_step = 8 // batch
    means = [sum(losses[i:i + per_step]) / per_step for i in range(0, len(losses), per_step)]
    return means, seconds


def compare(args):
    """Run ours and TRL's settings, then ours and TRL's best setting in turns.

    Returns (measurements, a function that runs ours, one that runs TRL's best setting).
    """
    states = make_states(args)
    pairs = sum(len(state["pairs"]) for state in states)
    millions = make_model(args).num_parameters() / 1e6
    print(f"{pairs} pairs at {len(states)} states, {millions:.1f} M parameters, "
          f"{torch.get_num_threads()} threads")
    torch.manual_seed(1)
    model = get_peft_model(make_model(args), lora())
    with torch.no_grad():  # nonzero B matrices, so that losses differ from the first step on
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    lora_weights = {name: p.detach().clone()
                    for name, p in model.named_parameters() if p.requires_grad}
    differences = {}

    def run_ours():
        model.load_state_dict(lora_weights, strict=False)
        return ours(model, make_states(args), args.tokens_per_step, args.bf16)

    def run_trl(batch, settings):
        name = ", ".join(["TRL", f"batch {batch}", *settings])
        gc.collect()  # an earlier trainer's model
        try:
            with tempfile.TemporaryDirectory() as folder:
                losses, taken = trl(
                    make_model(args), lora_weights, states, batch, settings, folder, args.bf16)
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory", flush=True)
            return float("inf")
        differences[name] = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        if differences[name] > 1e-4 and not args.bf16:  # bf16 rounding grows with every step
            sys.exit(f"the losses differ: {losses} and {expected}")
        print(f"{name}: {pairs / taken:.2f} pairs/s ({taken:.1f} s), "
              f"losses differ by at most {differences[name]:.1e}", flush=True)
        return taken

    run_ours()  # warm up
    expected, seconds = run_ours()
    print(f"ours: {pairs / seconds:.2f} pairs/s ({seconds:.1f} s), "
          f"losses {', '.join(f'{x:.5f}' for x in expected)}")
    measured = {"pairs": pairs, "ours": seconds, "losses": expected}
    if not args.settings:
        return measured, run_ours, None
    best = min(SETTINGS[:args.settings], key=lambda setting: run_trl(*setting))
    turns = [(run_ours()[1], run_trl(*best)) for _ in range(args.repeats)]
    seconds, taken = (statistics.median(times) for times in zip(*turns))
    print(f"ours {seconds:.2f} s, TRL's best setting {taken:.2f} s (medians of {args.repeats})")
    print(f"ratio of pairs/s: {taken / seconds:.1f} "
          f"(turn by turn {', '.join(f'{b / a:.1f}' for a, b in turns)})")
    trl_tokens = sum(2 * len(state["pairs"]) * (args.prompt + args.response) for state in states)
    our_tokens = sum(tree_tokens(state["tree"]) for state in states)
    print(f"ratio of tokens through the model: {trl_tokens / our_tokens:.1f}; the rest comes from "
          "the vocabulary (logits only at response tokens, once per distinct response) and from "
          "TRL's logging")
    measured |= {"ours": seconds, "trl": taken, "best": best,
                 "difference": max(differences.values())}
    return measured, run_ours, functools.partial(run_trl, *best)


def main():
    prepare_machine()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=4,
                        help="states of 4 pairs, an even number (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=400)
    parser.add_argument("--response", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--tokens-per-step", type=int, default=1024,
                        help="ours, in one forward pass: one state here (default: %(default)s)")
    parser.add_argument("--settings", type=int, default=len(SETTINGS),
                        help="how many of TRL's settings to try (default: all %(default)s)")
    parser.add_argument("--repeats", type=int, default=3,
                        help="runs of ours and of TRL's best setting (default: %(default)s)")
    args = parser.parse_args()
    args.device, args.bf16 = "cpu", False
    args.shape = dict(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64, tie_word_embeddings=True)
    if args.settings and DPOTrainer is object:
        sys.exit("TRL is not installed: pip install -r tests/bench/requirements.txt")
    compare(args)


if __name__ == "__main__":
    main()
