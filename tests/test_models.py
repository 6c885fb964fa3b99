"""Small random models of many families: a message's log-probs, gradients and samples are those that
it has alone, or the model is refused in one line."""
import copy
import json
import random
import sys
from pathlib import Path

import pytest
import torch
import transformers as T
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))  # the other test modules

import colbench.lm.attention
import colbench.lm.logps
from colbench.env.backend.mini import mini_tasks
from colbench.lm.adapters import add_lora, base_of, training_mode
from colbench.lm.load import EMBEDDED, load_model, load_tokenizer, reach
from colbench.lm.logps import Tree, check_model, message_logps
from colbench.lm.memory import sampling_memory, training_memory
from colbench.lm.sampling import LocalChat
from colbench.run.errors import UserError
from stages import lines, run

SHAPE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256)
GPT = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_local_experts=4)
FAMILIES = {
    "llama": lambda: T.LlamaConfig(**SHAPE),
    "qwen2": lambda: T.Qwen2Config(**SHAPE),
    "qwen3": lambda: T.Qwen3Config(**SHAPE),
    "qwen3-moe": lambda: T.Qwen3MoeConfig(**SHAPE, **EXPERTS),
    "gemma2": lambda: T.Gemma2Config(**SHAPE, final_logit_softcapping=2.0,
                                     attn_logit_softcapping=3.0, sliding_window=8),
    "gemma3": lambda: T.Gemma3TextConfig(**SHAPE, sliding_window=8),
    "mistral": lambda: T.MistralConfig(**SHAPE, sliding_window=8),
    "mixtral": lambda: T.MixtralConfig(**SHAPE, num_local_experts=4),
    "phi": lambda: T.PhiConfig(**SHAPE),
    "phi3": lambda: T.Phi3Config(**SHAPE, pad_token_id=2),
    "granite": lambda: T.GraniteConfig(**SHAPE, logits_scaling=3.0),
    "cohere": lambda: T.CohereConfig(**SHAPE, logit_scale=0.5),
    "olmo2": lambda: T.Olmo2Config(**SHAPE, pad_token_id=2),
    "smollm3": lambda: T.SmolLM3Config(**SHAPE, pad_token_id=2),
    "gpt-oss": lambda: T.GptOssConfig(**SHAPE, **EXPERTS, sliding_window=8),
    "gpt2": lambda: T.GPT2Config(**GPT),
    "opt": lambda: T.OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32),
}


AS_ON_CUDA = " as on CUDA"  # with the attention used on a GPU
# the other families are slow tests
QUICK = ("llama", "gemma2", "mistral", "qwen3-moe", "gpt2", "cohere", "llama" + AS_ON_CUDA,
         "gemma3" + AS_ON_CUDA)


@pytest.fixture(params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
                        for name in (*FAMILIES, *(name + AS_ON_CUDA for name in FAMILIES))])
def model(request, monkeypatch):
    torch.manual_seed(0)
    config = FAMILIES[request.param.removesuffix(AS_ON_CUDA)]()
    model = AutoModelForCausalLM.from_config(config).eval()
    if request.param.endswith(AS_ON_CUDA):
        monkeypatch.setattr(colbench.lm.attention, "SHORT_CUTS_ON", {"cpu"})
    if not hasattr(model.config, "num_experts_per_tok"):  # experts support no float64
        model.double()
    for parameter in model.parameters():  # far from uniform, so that a wrong mask shows
        torch.nn.init.normal_(parameter, std=0.3)
    monkeypatch.setattr(colbench.lm.logps, "LOGITS_AT_ONCE", 7 * 97)  # several chunks
    return model


def naive(model, prompt, message):
    """Log-probs of one message after one prompt: one forward pass, all logits."""
    logps = model(input_ids=torch.tensor([prompt + message])).logits[0].log_softmax(-1)
    return torch.stack([logps[len(prompt) + k - 1, token] for k, token in enumerate(message)])


def random_trees(rng):
    ids = lambda n: [rng.randrange(97) for _ in range(n)]  # noqa: E731
    trajectory = (ids(40), [(7, 12), (20, 21), (33, 40)], [])
    state = (ids(23), [], [ids(5), ids(1), ids(9)])
    both = (ids(15), [(3, 6)], [ids(4), ids(2)])
    return [trajectory, state, both]


def test_message_logps_equal_one_by_one(model):
    check_model(model)
    trees = random_trees(random.Random(1))
    for (trunk, spans, leaves), got in zip(trees, message_logps(model, trees)):
        expected = [naive(model, trunk[:a], trunk[a:b]) for a, b in spans]
        expected += [naive(model, trunk, leaf) for leaf in leaves]
        assert len(got) == len(expected)
        for one, other in zip(got, expected):  # the log-softmax is float32
            torch.testing.assert_close(one.double(), other.double(), atol=2e-6, rtol=0)


def test_messages_of_shared_prompts_are_those_of_a_slow_sampler(model):
    """LocalChat draws the same tokens as a whole forward pass per token.

    Three prompt lengths, five messages each of different lengths; also with windows of 8 tokens and
    with scaled or capped logits.
    """
    model.float()  # transformers' eager attention gives NaN for padding in float64
    rng, stops, seeds = random.Random(2), set(range(12)), [11, 12, 13, 14, 15]
    chat = LocalChat(model, load_tokenizer("tiny"))
    chat.stops = stops
    prompts = [[rng.randrange(97) for _ in range(n)] for n in (5, 17, 30)]
    limits = (25, 9, 25)
    got = chat._generate([(prompt, limit, seeds) for prompt, limit in zip(prompts, limits)], 1.0)
    for prompt, limit, messages in zip(prompts, limits, got):
        for seed, message in zip(seeds, messages):
            expected = []
            generator = torch.Generator().manual_seed(seed)
            uniforms = torch.rand(25, generator=generator, dtype=torch.float64)
            for uniform in uniforms.tolist()[:limit]:
                logits = model(input_ids=torch.tensor([prompt + expected])).logits[0, -1]
                cumulative = logits.softmax(-1).cumsum(-1)
                expected.append(int((cumulative <= uniform).sum()))
                if expected[-1] in stops:
                    break
            assert message == expected
    lengths = {len(message) for messages in got for message in messages}
    assert len(lengths) > 3, lengths  # messages end at different steps


@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_gradients_of_shared_prompts_equal_one_by_one(model, head):
    model.get_output_embeddings().weight.requires_grad_(head == "trained")
    prompt, _, leaves = random_trees(random.Random(2))[1]
    shared, single = copy.deepcopy(model), copy.deepcopy(model)
    weights = [torch.randn(len(leaf)) for leaf in leaves]  # one per token
    [messages] = message_logps(shared, [(prompt, [], leaves)])
    sum((w * logps).sum() for w, logps in zip(weights, messages)).backward()
    sum((w * naive(single, prompt, leaf)).sum() for w, leaf in zip(weights, leaves)).backward()
    for one, other in zip(shared.parameters(), single.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None) == (not one.requires_grad)
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-5)


def test_a_leaf_does_not_see_its_sibling(model):
    prompt, leaf = [1, 2, 3], [4, 5]
    alone = message_logps(model, [(prompt, [], [leaf])])[0][0]
    with_sibling = message_logps(model, [(prompt, [], [[6, 7, 8], leaf])])[0][1]
    torch.testing.assert_close(alone, with_sibling, atol=1e-6, rtol=0)


def test_as_on_cuda_no_mask_is_as_long_as_the_row(monkeypatch):
    """Trunks need no mask, leaves one over their own tree, also in gradient checkpointing.

    Gradients are those of one mask over the whole row.
    """
    trees, masks, gradients = random_trees(random.Random(3)), [], []
    attention = torch.nn.functional.scaled_dot_product_attention
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(colbench.lm.attention, "SHORT_CUTS_ON", {device})
        model = add_lora(initialised(FAMILIES["llama"]()), 4, gradient_checkpointing=True)
        training_mode(model)

        def spy(*args, attn_mask=None, **kwargs):
            masks.append(attn_mask if attn_mask is None else (*attn_mask.shape,))
            return attention(*args, attn_mask, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        sum(m.sum() for tree in message_logps(model, trees) for m in tree).backward()
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    whole = [(1, 1, 99, 99)]
    split = [None, None, (1, 1, 30, 38), None, (1, 1, 12, 21)]  # two heads share their keys
    assert masks == 4 * whole + 4 * split  # two layers, each twice
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


MLA = dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
           n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1,
           head_dim=4, num_key_value_heads=4, moe_intermediate_size=16, num_experts_per_tok=2)
WINDOW = dict(sliding_window=8)
MORE = {
    "Gemma": {},
    "Gemma4Text": WINDOW | dict(vocab_size_per_layer_input=97, hidden_size_per_layer_input=8),
    "Ministral": WINDOW, "Qwen2Moe": EXPERTS | dict(shared_expert_intermediate_size=16),
    "GraniteMoe": dict(num_local_experts=4), "Cohere2": WINDOW, "Olmo3": WINDOW, "Olmoe": EXPERTS,
    "Glm4": {}, "Exaone4": WINDOW | dict(sliding_window_pattern=2), "StableLm": {},
    "DeepseekV2": MLA, "DeepseekV3": MLA, "Starcoder2": WINDOW, "GPTNeoX": {}, "Ernie4_5": {},
    "SeedOss": {}, "HunYuanDenseV1": {}, "Nemotron": {}, "Phimoe": dict(num_local_experts=4),
    "Arcee": {}, "Apertus": {}, "Helium": {}, "Persimmon": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE)
def test_more_families(family):
    model = initialised(getattr(T, family + "Config")(**SHAPE | {"pad_token_id": 2} | MORE[family]))
    check_model(model)
    trees = random_trees(random.Random(1))
    with torch.no_grad():
        for (trunk, spans, leaves), got in zip(trees, message_logps(model, trees)):
            expected = [naive(model, trunk[:a], trunk[a:b]) for a, b in spans]
            expected += [naive(model, trunk, leaf) for leaf in leaves]
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def initialised(config, std=0.3):
    """A random model, far from the uniform distribution; std None: its family's own initialisation.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters() if std else ():
        torch.nn.init.normal_(parameter, std=std)
    return model


STATES = {
    "lfm2": lambda: T.Lfm2Config(
        **SHAPE, layer_types=["conv", "full_attention"], block_multiple_of=8),
    "qwen3-next": lambda: T.Qwen3NextConfig(
        **SHAPE, **EXPERTS, shared_expert_intermediate_size=16, linear_key_head_dim=8,
        linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        layer_types=["linear_attention"] * 2),
    "mamba2": lambda: T.Mamba2Config(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8,
        n_groups=1),
    "granite-4": lambda: T.GraniteMoeHybridConfig(
        **SHAPE, layer_types=["mamba", "attention"], num_local_experts=4, mamba_n_heads=8,
        mamba_d_head=8, mamba_d_state=8, mamba_expand=2),
    # takes positions from the mask
    "bloom": lambda: T.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
    "mpt": lambda: T.MptConfig(vocab_size=97, d_model=32, n_heads=4, n_layers=2, max_seq_len=256),
}


@pytest.mark.parametrize("std", [None, 0.3])
@pytest.mark.parametrize("family", STATES)
def test_models_that_cannot_pack_dialogues_are_refused(family, std):
    with pytest.raises(UserError, match="choose a model with attention layers only"):
        check_model(initialised(STATES[family](), std))


@pytest.mark.parametrize("says, leak", [
    # a state that the configuration does not mention
    ("when its neighbours", lambda hidden: hidden + 1e-3 * hidden.cumsum(1)),
    ("next to others than alone",
     lambda hidden: hidden + torch.arange(hidden.shape[1])[None, :, None] / 50),
    ("by nan nats", lambda hidden: hidden * float("nan"))])
def test_a_model_is_tested_when_it_is_loaded(says, leak):
    model = initialised(FAMILIES["llama"]())
    check_model(model)
    model.model.layers[0].register_forward_hook(lambda module, given, hidden: leak(hidden))
    with pytest.raises(UserError, match=says):
        check_model(model)


LONG = dict(original_max_position_embeddings=32, rope_theta=10000.0)
FACTORS = dict(short_factor=[1.0] * 4, long_factor=[4.0] * 4)
SCALED = {
    "longrope": lambda: T.Phi3Config(
        **SHAPE, pad_token_id=2, original_max_position_embeddings=32,
        rope_scaling={"rope_type": "longrope", "type": "longrope", **FACTORS, **LONG}),
    "dynamic": lambda: T.LlamaConfig(
        **SHAPE | {"max_position_embeddings": 32},
        rope_scaling={"rope_type": "dynamic", "factor": 4.0, **LONG})}


@pytest.mark.parametrize("kind", SCALED)
def test_models_that_scale_positions_are_used_up_to_the_unscaled_length(kind):
    """Up to `reach` a message's log-probs are its own; in a longer row the first tokens' change."""
    model = initialised(SCALED[kind]())
    assert reach(model.config) == 32 == LocalChat(model, load_tokenizer("tiny")).context
    rng = random.Random(3)
    ids = [rng.randrange(97) for _ in range(64)]
    trees = [Tree(ids[:20], [], [ids[20:32]]), Tree(ids[3:9], [], [ids[9:14]])]
    with torch.no_grad():
        for (trunk, _, leaves), got in zip(trees, message_logps(model, trees)):
            torch.testing.assert_close(got[0], naive(model, trunk, leaves[0]), atol=2e-6, rtol=0)
        short, long = (model(input_ids=torch.tensor([ids[:n]])).logits[0, 20] for n in (32, 64))
    assert (short - long).abs().max() > 1e-3
    always_scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, **LONG}
    assert reach(T.LlamaConfig(**SHAPE, rope_scaling=always_scaled)) == 256


def vision_config(family, **text):
    """The configuration of a small language model with a vision tower."""
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                  image_size=32, patch_size=8)
    if family == "gemma3":
        return T.Gemma3Config(
            text_config={**SHAPE, "sliding_window": 64, "model_type": "gemma3_text", **text},
            vision_config={**vision, "model_type": "siglip_vision_model"}, mm_tokens_per_image=4,
            boi_token_index=5, eoi_token_index=6, image_token_index=7)
    return T.Mistral3Config(
        text_config={**SHAPE, "model_type": "mistral", **text},
        vision_config={**vision, "model_type": "pixtral"}, image_token_index=7)


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
def test_a_vision_tower_is_not_trained(family, rank):
    model = T.AutoModelForImageTextToText.from_config(vision_config(family)).float()
    check_model(model.eval())
    model = add_lora(model, rank)
    [messages] = message_logps(model, [Tree([8, 9, 10, 11], [(2, 4)], [])])
    sum(logps.sum() for logps in messages).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    assert any("layers.1" in name for name in trained)
    assert not any("vision" in name or "projector" in name for name in trained)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "mixtral", *(pytest.param(name, marks=pytest.mark.slow)
                                                         for name in ("opt", "phi"))])
def test_no_noise_while_training(family, checkpointing):
    """No dropout (of modules, attention or layers) and no router jitter: at step 0 policy = π_ref.

    Gradient checkpointing works: layers are computed twice.
    """
    config = FAMILIES[family]()
    noise = [name for name in vars(config)
             if name.endswith(("drop", "dropout", "pdrop", "jitter_noise"))]
    for name in noise:
        setattr(config, name, 0.5)
    tree, calls = Tree([8, 9, 10, 11], [(2, 4)], [[12, 13]]), []
    model = initialised(config)
    expected = torch.cat(message_logps(model, [tree])[0])
    model = add_lora(model, 4, checkpointing)
    training_mode(model)
    layers = base_of(model).get_decoder().get_submodule("h" if family == "gpt2" else "layers")
    next(layers[1].children()).register_forward_pre_hook(lambda *_: calls.append(1))
    got = torch.cat(message_logps(model, [tree])[0])
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    got.sum().backward()
    assert len(calls) == 1 + checkpointing
    base_of(model).train()
    noisy = torch.cat(message_logps(model, [tree])[0])
    assert noise and (noisy - expected).abs().max() > 1e-3


def test_memory_estimates_without_the_usual_fields():
    class Odd:
        num_hidden_layers = 2
        hidden_size = 32
        num_attention_heads = 4
        intermediate_size = [48, 64]
        vocab_size = 97

    usual, gpt2, odd = (initialised(FAMILIES[name]()) for name in ("llama", "gpt2", "llama"))
    odd.config.get_text_config = Odd
    for model in (usual, gpt2):
        assert "GB" in sampling_memory(model, 1000) and "GB" in training_memory(model, 1000, True)
    assert sampling_memory(odd, 1000) is training_memory(odd, 1000, True) is None


FREED = """if True:
    import resource, sys, torch
    from colbench.lm import load, memory
    load.LARGE = float(sys.argv[1])
    load.prepare_machine()
    model = load.load_model("tiny", device="cpu")
    before = memory.memory_now(model.device)
    blocks = [torch.ones(1 << 20) for _ in range(100)]  # 420 MB
    line = memory.training_memory(model, 100, False)
    del blocks
    print(memory.memory_now(model.device) - before,
          resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
          float(line.split()[1]) - float(memory.training_memory(model, 100, False).split()[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
@pytest.mark.parametrize("large, kept", [("2e9", True), ("0", False)])
def test_freed_memory_is_kept_for_a_small_model_and_estimates_count_held_memory(large, kept):
    held, most, fell = map(float, run("-c", FREED, large).stdout.split()[-3:])
    assert most > 4e8  # the peak; estimates do not start from it
    assert (held > 4e8) == kept and (held < 5e7) == (not kept)
    assert fell == pytest.approx(0.0 if kept else 0.42, abs=0.11)  # printed in steps of 0.1 GB


@pytest.fixture
def folder(tmp_path):
    """A function that saves a model with `rows` embeddings and the embedded model's tokenizer."""
    def make(rows, change=lambda tokenizer: None):
        tokenizer = load_tokenizer("tiny")
        change(tokenizer)
        T.LlamaForCausalLM(T.LlamaConfig(**SHAPE | {"vocab_size": rows})).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return str(tmp_path)
    return make


def test_a_tokenizer_larger_than_its_model(folder):
    size = len(load_tokenizer("tiny"))
    load_tokenizer(folder(size))
    with pytest.raises(UserError, match=f"{size} tokens do not fit the model's {size - 1}"):
        load_tokenizer(folder(size - 1))
    with pytest.raises(UserError, match=f"{size + 1} tokens do not fit the model's {size}"):
        load_tokenizer(folder(size, lambda tokenizer: tokenizer.add_tokens(["blorb"])))


def test_a_special_token_beyond_the_embeddings_is_allowed(folder):
    """The smallest Gemma 3 has a picture token beyond its last embedding; text never becomes it."""
    size = len(load_tokenizer("tiny"))
    more = {"additional_special_tokens": ["<picture>"]}
    name = folder(size, lambda tokenizer: tokenizer.add_special_tokens(more))
    chat = LocalChat(load_model(name, device="cpu"), load_tokenizer(name))
    messages = [{"role": "user", "content": "a <picture> b"}]
    [[reply]] = chat.sample([messages], [[0]], max_new_tokens=3)
    assert reply.tokens <= 3


def test_a_folder_with_layers_that_carry_a_state_is_refused(tmp_path):
    config = json.loads(STATES["lfm2"]().to_json_string()) | {"vocab_size": 1404}
    AutoModelForCausalLM.from_config(T.Lfm2Config(**config)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"^model {tmp_path}: layers that carry a state"):
        load_model(str(tmp_path), device="cpu")
    size = len(load_tokenizer(EMBEDDED["tiny"]))
    assert load_model("tiny", device="cpu").config.vocab_size == size


@pytest.mark.parametrize("script, family, flags", [
    # the untied head gets no gradient
    ("train_critic.py", "llama", ["--critic", "regression", "--lora-rank", 0]),
    ("train_policy.py", "gemma3", []),
    *(pytest.param(*more, marks=pytest.mark.slow) for more in (
        ("train_critic.py", "gpt2", ["--critic", "value", "--lora-rank", 0]),
        ("train_critic.py", "gemma3", ["--epochs", 1]),
        ("train_policy.py", "gpt2", ["--algorithm", "rft"])))])
def test_the_training_scripts_with_other_models(tmp_path, script, family, flags):
    tokenizer = load_tokenizer("tiny")
    shape = dict(vocab_size=len(tokenizer), tie_word_embeddings=False)
    if family == "gemma3":
        config = vision_config(family, **shape, max_position_embeddings=1024)
        model = T.AutoModelForImageTextToText.from_config(config)
    else:
        config = FAMILIES[family]()
        positions = "n_positions" if family == "gpt2" else "max_position_embeddings"
        config.update(shape | {positions: 1024})
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    good, bad = (f"I WANT TO ANSWER:\ndef f(n):\n    return {n}" for n in ("7 * n", "n"))
    trajectories, states = [], []
    for task in mini_tasks("train", 4):
        request = {"role": "user", "content": task["problem_description"]}
        asked = {"role": "assistant", "content": "What is the rate?",
                 "candidates": ["What is the rate?", bad]}
        rest = [{"role": "user", "content": "The rate is 7."},
                {"role": "assistant", "content": good}]
        wrong = {"role": "assistant", "content": bad}
        trajectories += [
            {"task": task, "dialogue_history": [request, asked, *rest], "reward": 1.0},
            {"task": task, "dialogue_history": [request, wrong], "reward": 0.0}]
        states.append({"id": task["id"], "sample": 0, "turn": 1, "max_turns": 10,
                       "messages": [request], "candidates": asked["candidates"],
                       "advantages": [0.5, -0.5]})
    for name, rows in (("trajectories", trajectories), ("preferences", states)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if script == "train_critic.py":
        (tmp_path / "preferences.jsonl").unlink()
    done = run(script, "--run", tmp_path, "--model", tmp_path / "model", "--batch-size", 2, *flags)
    output = "critic" if script == "train_critic.py" else "policy"
    assert (tmp_path / output).is_dir() and "Traceback" not in done.stderr
    log = lines(tmp_path / f"{output}_log.jsonl")
    assert all(row["skipped"] == 0 and row["grad_norm"] > 0 for row in log)
