"""Run the four scripts with --preset llama on a checkpoint of Llama-3.1-8B's size, without a GPU.

    python tests/bench/full_size.py DIR                             # 16 GB of disk; most of an hour
    python tests/bench/full_size.py DIR --layers 2 --hidden 512     # a small model, a minute

DIR/model gets a random checkpoint in bf16 shards with Llama 3's tokenizer (an existing one of the
same shape is kept), DIR/run a run: one task, two turns, messages of a few tokens, a step or two. A
random model never scores, so every other trajectory gets reward 1 before the critic learns. Prints
per stage the seconds, the peak memory (without pages of the checkpoint's files, which the system
reclaims when it needs space) and the stage's own estimate. Exit code 1 if a stage fails or exceeds
--most.
"""
import argparse
import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
import torch
from memory import LLAMA_8B
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from real_tokenizers import real_tokenizer
from test_templates import TEMPLATES

ROOT = Path(__file__).parents[2]
SMALL = "--max-new-tokens 4 --max-turns 2"
STAGES = {
    "collect": f"--tasks mini:train --n-tasks 1 --k 2 --candidate-share 1 --n-candidates 3 {SMALL}",
    "train_critic": "--epochs 1 --tokens-per-step 1024",
    "train_policy": "--epochs 1 --pairs-per-state 1 --tokens-per-step 1024",
    "evaluate": f"--tasks mini:test --n-tasks 1 {SMALL}",
}


def make_checkpoint(folder: Path, config: LlamaConfig, tokenizer) -> None:
    """Random bf16 weights, one shard per layer, so that only one is in memory at a time.

    The model writes meaningless messages of about five tokens: the first number of every token's
    embedding is large and passes through the layers, whose outputs are small, and there the head
    favours the end-of-turn token.
    """
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shards, index = {}, {}
    for name, weight in model.state_dict().items():
        layer = re.search(r"layers\.(\d+)\.", name)
        shards.setdefault(int(layer[1]) + 1 if layer else 0, []).append((name, weight.shape))
    folder.mkdir(parents=True)
    for k, weights in sorted(shards.items()):
        file = f"model-{k + 1:05}-of-{len(shards):05}.safetensors"
        index |= {name: file for name, _ in weights}
        values = {}
        for name, shape in weights:
            if len(shape) == 1:
                values[name] = torch.ones(shape, dtype=torch.bfloat16)
            else:
                scale = 0.0003 if re.search("o_proj|down_proj", name) else 0.02
                values[name] = torch.randn(shape, dtype=torch.bfloat16) * scale
        if k == 0:
            values["model.embed_tokens.weight"][:, 0] = config.hidden_size**0.5 / 2
            values["lm_head.weight"][:, 0] = 0.0
            values["lm_head.weight"][end, 0] = math.log(100_000) / config.hidden_size**0.5
        save_file(values, folder / file, metadata={"format": "pt"})
    size = sum(file.stat().st_size for file in folder.iterdir())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index}))
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)  # last: with it the checkpoint is whole


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096, help="hidden size, a multiple of 512")
    parser.add_argument("--most", type=float, default=24.0,
                        help="GB that a stage may use (default: %(default)s)")
    args = parser.parse_args()
    # it has one token more than the model's own
    tokenizer = AutoTokenizer.from_pretrained(real_tokenizer("llama"))
    tokenizer.chat_template = TEMPLATES["llama-3.1"][0]
    config = LlamaConfig(**LLAMA_8B | dict(
        vocab_size=len(tokenizer), num_hidden_layers=args.layers, hidden_size=args.hidden,
        intermediate_size=args.hidden * 7 // 2, num_attention_heads=args.hidden // 128,
        num_key_value_heads=args.hidden // 512),
        architectures=["LlamaForCausalLM"], dtype="bfloat16", bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009])
    model, run, start = args.folder / "model", args.folder / "run", time.time()
    shutil.rmtree(run, ignore_errors=True)
    existing = {}
    if (model / "config.json").exists():
        existing = json.loads((model / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "num_hidden_layers")
    if any(existing.get(name) != getattr(config, name) for name in names):
        shutil.rmtree(model, ignore_errors=True)
        make_checkpoint(model, config, tokenizer)
    size = sum(file.stat().st_size for file in model.iterdir()) / 1e9
    print(f"checkpoint of {size:.1f} GB: {time.time() - start:.0f} s", flush=True)
    for stage, flags in STAGES.items():
        if stage == "train_critic":
            path = run / "trajectories.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for line in lines:
                line["reward"] = float(line["sample"] % 2)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        start, log = time.time(), args.folder / f"{stage}.log"
        with log.open("w") as output:
            most = 0
            process = subprocess.Popen(
                [sys.executable, ROOT / f"{stage}.py", "--preset", "llama", "--model", model,
                 "--run", run, *flags.split()], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})
            while process.poll() is None:
                with contextlib.suppress(psutil.Error):  # it has just ended
                    memory = psutil.Process(process.pid).memory_info()
                    most = max(most, (memory.rss - memory.shared) / 1e9)
                time.sleep(0.2)
        code, text = process.returncode, log.read_text()
        plan = re.search(r"about ([\d.]+ GB)", text)
        print(f"{stage}: {time.time() - start:.0f} s, at most {most:.2f} GB; "
              f"estimate {plan[1] if plan else 'none'}", flush=True)
        if code or most > args.most:
            sys.exit(f"{stage}: exit code {code}, {most:.1f} GB of {args.most:g}; "
                     f"the end of {log}:\n{text[-2000:]}")


if __name__ == "__main__":
    main()
