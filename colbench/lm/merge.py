"""Merge a trained adapter into its base model: a plain bf16 model for engines without adapters.

    python -m colbench.lm.merge runs/llama/policy merged/     # into the model it was trained on
    python -m colbench.lm.merge runs/llama/policy merged/ --model /data/Llama-3.1-8B-Instruct

An adapter trained on 4-bit weights is merged into unquantised ones: log-probs move by the rounding
of 4 bits. Runs on the CPU; an 8B model takes 16 GB of memory and 16 GB of disk.
"""
import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from colbench.lm.load import EMBEDDED, cannot_load, load_tokenizer, prepare_machine
from colbench.run.errors import UserError, run_main
from colbench.run.files import write_aside


def main():
    prepare_machine()
    from peft import PeftModel  # warns if imported before prepare_machine
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path,
                        help="folder that train_policy.py or train_critic.py wrote")
    parser.add_argument("output", type=Path, help="new folder for the merged model")
    parser.add_argument("--model", help="hub id or folder of the base model "
                        "(default: the one named in the adapter)")
    args = parser.parse_args()
    config = args.adapter / "adapter_config.json"
    if not config.exists():
        raise UserError(f"{args.adapter}: no adapter here (no adapter_config.json); "
                        "a fully fine-tuned model needs no merging")
    if args.output.exists():
        raise UserError(f"{args.output}: already exists; name a new folder")
    name = args.model or json.loads(config.read_text())["base_model_name_or_path"]
    tokenizer = load_tokenizer(name)
    try:
        base = AutoModelForCausalLM.from_pretrained(
            EMBEDDED.get(name, name), dtype=torch.bfloat16)
        merged = PeftModel.from_pretrained(base, args.adapter).merge_and_unload()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(cannot_load(name, error)) from None
    except RuntimeError:  # shapes differ
        raise UserError(f"{args.adapter}: does not fit {name}; "
                        "give the model that it was trained on with --model") from None

    def write(temporary):
        merged.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    write_aside(args.output, write)
    print(f"{args.output}: {name} with {args.adapter} merged in, bf16; "
          f"next: vllm serve {args.output}")


if __name__ == "__main__":
    run_main(main)
