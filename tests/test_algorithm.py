"""Losses and log-probs, checked by hand and against a slow, obvious implementation."""

import math
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train_critic
import train_policy
from train_critic import advantage, critic_loss
from train_policy import policy_loss, policy_pairs
from transformers import AutoModelForCausalLM, LlamaConfig

import colbench.lm.logps
from colbench.env.backend.mini import mini_tasks
from colbench.env.dialogue import states_with_candidates
from colbench.env.hidden_info import HIDDEN_INFO, with_hidden_info, without_hidden_info
from colbench.lm.adapters import add_lora
from colbench.lm.load import load_tokenizer
from colbench.lm.logps import message_logps, pack
from colbench.lm.tokens import encode_dialogue
from colbench.train.heads import value_head
from colbench.train.critics import mean_log_ratio

SHAPE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256)


def softplus(x):
    return math.log1p(math.exp(x))


def test_critic_loss_by_hand():
    chosen, ref_chosen = [[-1.0, -2.0, -0.5], [-0.3]], [[-1.5, -2.5, -0.2], [-0.4]]
    rejected, ref_rejected = [[-0.7, -0.1]], [[-0.6, -0.9]]
    # the paper's normalisation: mean per turn, then sum over turns; not one mean per trajectory
    a_chosen = (0.5 + 0.5 - 0.3) / 3 + 0.1
    a_rejected = (-0.1 + 0.8) / 2
    nll = (1.0 + 2.0 + 0.5 + 0.3) / 4
    expected = softplus(-0.1 * (a_chosen - a_rejected)) + 0.01 * nll
    tensors = [[torch.tensor(turn, dtype=torch.float64) for turn in turns]
               for turns in (chosen, rejected, ref_chosen, ref_rejected)]
    loss, got_chosen, got_rejected = critic_loss(*tensors, beta=0.1, nll_weight=0.01)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert got_chosen.item() == pytest.approx(a_chosen)
    assert got_rejected.item() == pytest.approx(a_rejected)
    assert advantage(tensors[0][0], tensors[2][0]).item() == pytest.approx((0.5 + 0.5 - 0.3) / 3)


def test_policy_loss_by_hand():
    a, ref_a = [-1.0, -0.2], [-1.4, -0.1]
    b, ref_b = [-2.0], [-1.0]
    reward_a = 0.1 * (0.4 - 0.1)  # sums over tokens, not means
    reward_b = 0.1 * -1.0
    expected = softplus(-(reward_a - reward_b)) + 0.01 * (1.2 / 2)
    tensors = [torch.tensor(x, dtype=torch.float64) for x in (a, b, ref_a, ref_b)]
    loss, got_a, got_b = policy_loss(*tensors, 0.1, 0.01)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert (got_a.item(), got_b.item()) == (pytest.approx(reward_a), pytest.approx(reward_b))


def test_log_ratios_in_nats_per_message_by_hand():
    args = SimpleNamespace(beta=0.5, nll_weight=0.0, critic="logprob", score="turn-mean",
                           algorithm="sweet")
    a, ref_a = torch.tensor([-1.0, -0.2]), torch.tensor([-1.4, -0.1])
    b, ref_b = torch.tensor([-2.0]), torch.tensor([-1.0])
    example = train_policy.Example([], [], 0, ref_logps=[ref_a, ref_b])
    _, row = train_policy.pair_loss(args, example, ([0], [1]), [a, b])
    assert row["log_ratio/chosen"].item() == pytest.approx(0.3)
    assert row["log_ratio/rejected"].item() == -1
    assert row["margin"].item() == pytest.approx(1.3)
    assert row["rewards/margins"].item() == pytest.approx(0.65)
    _, row = train_policy.pair_loss(args, example, ([0, 1], [1]), [a, b])
    assert row["log_ratio/chosen"].item() == pytest.approx(-0.35)  # mean of 0.3 and -1
    example = train_critic.Example((0, 1), [], [], [], 0, ref_logps=[[ref_a, ref_b], [ref_b]])
    _, row = train_critic.pair_loss(args, example, (0, 1), [[a, b], [b]])
    assert row["log_ratio/chosen"].item() == pytest.approx(-0.35)
    assert row["log_ratio/rejected"].item() == -1
    assert row["margin"].item() == pytest.approx(0.15 - 1 + 1)  # sums of means per token


def test_beta_0_only_imitates_the_chosen_message():
    a = torch.tensor([-1.0, -0.2], requires_grad=True)
    b = torch.tensor([-2.0], requires_grad=True)
    policy_loss(a, b, torch.tensor([-1.4, -0.1]), torch.tensor([-1.0]), 0.0, 0.3)[0].backward()
    torch.testing.assert_close(a.grad, torch.full((2,), -0.15))
    assert b.grad.abs().sum() == 0


def test_pairs_of_trajectories():
    trajectories = [{"id": task, "reward": reward} for task, reward in
                    [("x", 0.5), ("y", 1.0), ("x", 1.0), ("y", 1.0), ("x", 0.0), ("z", 0.0)]]
    trajectory_pairs = train_critic.trajectory_pairs
    # any higher reward, but only within a task
    assert sorted(trajectory_pairs(trajectories, 0, seed=0)) == [(0, 4), (2, 0), (2, 4)]
    assert len(trajectory_pairs(trajectories, 2, seed=0)) == 2
    assert trajectory_pairs(trajectories, 2, seed=0) == trajectory_pairs(trajectories, 2, seed=0)


def test_critic_and_multi_turn_dpo_learn_from_the_same_pairs():
    rng, lengths = random.Random(0), set()
    rewards = (0.0, 0.1, 0.3, 0.7, 0.9, 1.0)
    for _ in range(50):
        trajectories = [{"id": rng.choice("vwxyz"), "reward": rng.choice(rewards)}
                        for _ in range(rng.randrange(1, 30))]
        for pairs_per_task in (0, 1, 4):
            seed = rng.randrange(3)
            pairs = train_critic.trajectory_pairs(trajectories, pairs_per_task, seed)
            assert pairs == train_policy.trajectory_pairs(trajectories, pairs_per_task, seed)
            lengths.add(len(pairs))
    assert len(lengths) > 20  # the cases differ


@pytest.mark.parametrize("length_norm", [True, False])
def test_the_critic_ranks_with_the_formula_it_was_trained_with(length_norm):
    generator = torch.Generator().manual_seed(0)
    for length in range(1, 200):
        logps, ref = -torch.rand(2, length, generator=generator) * 9
        ranked = mean_log_ratio(logps, ref, length_norm)
        assert torch.equal(advantage(logps, ref, length_norm), ranked)
    assert torch.equal(advantage(logps, ref), mean_log_ratio(logps, ref))  # the same default


def test_pairs_of_candidates():
    advantages = [0.3, -0.1, 0.9, 0.0, 0.5, -0.7]  # best first: 2 4 0 | 3 1 5
    drawn = [pair for seed in range(200)
             for pair in policy_pairs(advantages, random.Random(seed), 4)]
    assert {a for a, _ in drawn} == {2, 4, 0}
    assert {b for _, b in drawn} == {3, 1, 5}
    assert len({*policy_pairs(advantages, random.Random(0), 4)}) == 4
    assert len(policy_pairs(advantages, random, 99)) == 9
    # the middle one is in neither half
    assert policy_pairs(advantages[:3], random.Random(0), 4) == [(2, 1)]
    assert policy_pairs([0.3], random.Random(0), 4) == []  # a single candidate


def test_pack_keeps_all_in_order_within_budget():
    assert pack([3, 3, 3, 9, 1, 1], 6) == [[0, 1], [2], [3], [4, 5]]
    assert pack([], 6) == []


DIALOGUE = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add tax."},
    {"role": "assistant", "content": "What is the toll?"},
    {"role": "user", "content": "The toll is 7."},
    {"role": "assistant", "content": "I WANT TO ANSWER:\ndef f(n, d):\n    return 7"},
]
# our own short versions of each family's template
TEMPLATES = {
    "tiny": None,
    "llama3": "{{ bos_token }}{% for m in messages %}"
              "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
              "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
              "{% if add_generation_prompt %}"
              "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "chatml": "{% if messages[0]['role'] != 'system' %}"
              "<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
              "{% for m in messages %}"
              "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
             "{{ raise_exception('System role not supported') }}{% endif %}"
             "{% for m in messages %}"
             "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
             "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
             "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
}
END = {"tiny": "<|end|>", "llama3": "<|eot_id|>", "chatml": "<|im_end|>", "gemma": "<end_of_turn>"}


@pytest.mark.parametrize("family", TEMPLATES)
def test_masks_at_every_turn_boundary(family):
    tokenizer = load_tokenizer("tiny")
    if TEMPLATES[family]:
        special = ["<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<start_of_turn>",
                   END[family]]
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.chat_template = TEMPLATES[family]
    ids, spans = encode_dialogue(tokenizer, DIALOGUE)
    trained_on = [tokenizer.decode(ids[a:b]) for a, b in spans]
    # the end-of-turn token is included
    assert trained_on == [m["content"] + END[family] for m in DIALOGUE if m["role"] == "assistant"]
    assert ids.count(tokenizer.bos_token_id) == (0 if family == "chatml" else 1)  # no second BOS
    outside = tokenizer.decode(
        [token for i, token in enumerate(ids) if not any(a <= i < b for a, b in spans)])
    assert "What is" not in outside and "WANT TO ANSWER" not in outside
    assert "The toll is 7." in outside
    # a later turn's prompt is a prefix of the whole dialogue: training sees what sampling saw
    prompt, _ = encode_dialogue(tokenizer, DIALOGUE[:4])
    assert prompt == ids[:spans[1][0]]
    if family != "gemma":  # Gemma has the system text in the first user message
        text = tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
        assert text.startswith(tokenizer.decode(ids))


def test_special_tokens_in_a_message_stay_text():
    tokenizer = load_tokenizer("tiny")
    ids, spans = encode_dialogue(tokenizer, [{"role": "user", "content": "x"},
                                             {"role": "assistant", "content": "a<|end|>b"}])
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert ids[slice(*spans[0])].count(end) == 1  # only the real one


def test_half_a_surrogate_pair_is_read_as_a_question_mark():
    tokenizer = load_tokenizer("tiny")
    broken, whole = ([{"role": "user", "content": f"a {char} b"},
                      {"role": "assistant", "content": f"{char}!"}] for char in ("\ud83d", "?"))
    assert encode_dialogue(tokenizer, broken) == encode_dialogue(tokenizer, whole)


def test_hidden_info_is_only_in_the_critics_prompt():
    hidden_code = "def f(n, d):\n    return 7  # secret"
    prompt = with_hidden_info(DIALOGUE, hidden_code)
    assert "# secret" in prompt[0]["content"] and prompt[1:] == DIALOGUE[1:]
    assert prompt[0] == {"role": "system", "content": f"Be brief.{HIDDEN_INFO}{hidden_code}"}
    assert "secret" not in str(DIALOGUE)  # the dialogue itself is unchanged


def test_a_state_for_the_policy_stage_has_no_trace_of_the_hidden_code():
    [task] = mini_tasks("train", 1)
    candidates = ["What is the toll?", "Hm."]
    history = [{"role": "user", "content": task["problem_description"]},
               {"role": "assistant", "content": "What is the toll?", "candidates": candidates}]
    trajectory = {"id": task["id"], "sample": 0, "task": task, "dialogue_history": history}
    [state] = states_with_candidates([trajectory], "Ask.")
    traces = [line.strip() for line in task["ground_truth"].splitlines() if "=" in line]
    traces += task["test_cases"].values()
    assert len(traces) > 12 and all(trace in str(state) for trace in traces)
    stripped = without_hidden_info(state)
    assert not any(trace in str(stripped) for trace in traces)
    assert stripped["messages"] == [{"role": "system", "content": "Ask."}, history[0]]
    assert stripped["candidates"] == ["What is the toll?", "Hm."]
    assert (stripped["id"], stripped["turn"]) == (task["id"], 1)
    assert state["task"] is task  # the critic still needs the hidden code to rank


def test_logits_of_a_large_vocabulary_are_never_all_in_memory(monkeypatch):
    """No result in forward or backward is as large as positions x vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            outs = out if isinstance(out, (tuple, list)) else [out]
            self.size = max([self.size, *(t.numel() for t in outs if torch.is_tensor(t))])
            return out

    monkeypatch.setattr(colbench.lm.logps, "LOGITS_AT_ONCE", 10 * 5000)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE | {"vocab_size": 5000}))
    tree = ([1] * 30, [], [[2] * 50, [3] * 50])
    add_lora(model, 4)
    with Largest() as seen:
        sum(logps.sum() for logps in message_logps(model, [tree])[0]).backward()
    assert seen.size <= 5000 * 32  # the size of the LM head; all logits would be 5000 x 100


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_measured_memory_matches_the_computed_table():
    """The peak of a real step is within a quarter of the README's computed memory table."""
    script = Path(__file__).parent / "bench" / "memory.py"
    done = subprocess.run([sys.executable, script, "--tokens", "2048"],
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-500:]


def test_the_value_head_stays_float32_under_autocast():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    torch.manual_seed(0)
    head = value_head(model)
    mean = torch.randn(SHAPE["hidden_size"])
    torch.nn.init.normal_(head.weight)
    expected = (head.weight[0].double() @ mean.double()).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert head(mean)[0].item() == pytest.approx(expected, abs=1e-5)
