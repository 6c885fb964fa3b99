"""LocalChat.sample on the embedded model, against transformers' generate and a slow sampler.

Nothing depends on what the embedded model has learned, except that it ends its messages.
"""

import math
from collections import Counter

import pytest
import torch

from colbench.env.backend.mini import mini_tasks
from colbench.env.dialogue import prompt_messages
from colbench.lm.adapters import adapters_off, add_lora
from colbench.lm.load import load_model, load_tokenizer
from colbench.lm.sampling import LocalChat, RoomyLayer
from colbench.lm.tokens import encode_dialogue, end_of_turn
from colbench.run.files import seed_of

SYSTEM = "Ask about one missing detail at a time, then answer."


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def model():
    return load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def chat(model, tokenizer):
    return LocalChat(model, tokenizer)


@pytest.fixture(scope="module")
def conversations():
    """Eight dialogues of different lengths, with zero, one or two agent messages."""
    turns = [{"role": "assistant", "content": "What is the rate?"},
             {"role": "user", "content": "The rate is 12."},
             {"role": "assistant", "content": "Anything else?"},
             {"role": "user", "content": "I don't know."}]
    dialogues = []
    for i, task in enumerate(mini_tasks("train", 8)):
        request = {"role": "user", "content": task["problem_description"] + " Please." * i}
        dialogues.append(prompt_messages(SYSTEM, [request, *turns[:2 * (i % 3)]]))
    return dialogues


@pytest.fixture(scope="module")
def seeds(conversations):
    """Sixteen seeds for each conversation, as in the scripts."""
    return [[seed_of(0, i, j) for j in range(16)] for i in range(len(conversations))]


def slow_sample(model, tokenizer, messages, seed, temperature, max_new_tokens):
    """Token ids of one message: no batch, no cache, the whole sequence for every token."""
    ids, _ = encode_dialogue(tokenizer, messages)
    uniforms = torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed),
                          dtype=torch.float64)
    new = []
    for uniform in uniforms.tolist():
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + new])).logits[0, -1].double()
        cumulative = (logits / temperature).softmax(-1).cumsum(-1)
        new.append(min(int((cumulative <= uniform).sum()), len(cumulative) - 1))
        if new[-1] == end_of_turn(tokenizer):
            break
    return new


def test_prompts_differ_in_length(conversations, tokenizer):
    assert len({len(encode_dialogue(tokenizer, messages)[0]) for messages in conversations}) >= 6


def test_greedy_is_generate(chat, model, tokenizer, conversations):
    replies = chat.sample(conversations, [[0]] * len(conversations),
                          temperature=0, max_new_tokens=48)
    for messages, [reply] in zip(conversations, replies):
        prompt = torch.tensor([encode_dialogue(tokenizer, messages)[0]])
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt),
                                do_sample=False, max_new_tokens=48,
                                eos_token_id=end_of_turn(tokenizer))[0, prompt.shape[1]:]
        assert reply.text == tokenizer.decode(output, skip_special_tokens=True).strip()
        assert reply.tokens == len(output)  # generate's output includes the end-of-turn token


def test_samples_are_those_of_a_slow_sampler(chat, model, tokenizer, conversations, seeds):
    few = [row[:3] for row in seeds]
    ended = 0
    for temperature in (1.0, 0.7):
        replies = chat.sample(conversations, few, temperature=temperature, max_new_tokens=40)
        for messages, row, got in zip(conversations, few, replies):
            for seed, reply in zip(row, got):
                ids = slow_sample(model, tokenizer, messages, seed, temperature, 40)
                assert reply.text == tokenizer.decode(ids, skip_special_tokens=True).strip()
                assert reply.tokens == len(ids)  # the end-of-turn token counts
                ended += ids[-1] == end_of_turn(tokenizer)
    assert ended > 10


def test_sample_depends_on_conversation_and_seed_only(chat, model, tokenizer, conversations, seeds):
    together = chat.sample(conversations, seeds, max_new_tokens=32)
    assert len({reply.text for row in together for reply in row}) > 16
    alone = [[chat.sample([messages], [[seed]], max_new_tokens=32)[0][0] for seed in row[:2]]
             for messages, row in zip(conversations, seeds)]
    assert alone == [row[:2] for row in together]
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    shuffled = chat.sample([conversations[i] for i in order],
                           [seeds[i][::-1] for i in order], max_new_tokens=32)
    assert shuffled == [together[i][::-1] for i in order]
    # one row at a time, and batches that split the samples of a conversation
    for batch_tokens in (1, 700, 3000):
        small = LocalChat(model, tokenizer, batch_tokens=batch_tokens)
        rows = slice(None, 2 if batch_tokens == 1 else None)
        some = small.sample(conversations, [row[rows] for row in seeds], max_new_tokens=32)
        assert some == [row[rows] for row in together]


def test_batches_assume_likely_lengths_and_keep_to_their_limit(tokenizer, conversations, seeds,
                                                               monkeypatch):
    """Few messages reach their limit. If many do, some rows leave the batch and are sampled anew:
    the limit on tokens holds, and every message stays the same."""
    # in float32, rounding would show after some hundred hot tokens
    model = load_model("tiny", device="cpu").double()
    held, prefilled, update = [], [], RoomyLayer.update

    def counted(layer, keys, values, *args, **kwargs):
        result = update(layer, keys, values, *args, **kwargs)
        held.append(result[0].shape[0] * result[0].shape[2])
        prefilled.append(len(keys) if keys.shape[2] == result[0].shape[2] else 0)
        return result

    few = [row[:2] for row in seeds]
    prompts = [encode_dialogue(tokenizer, messages)[0] for messages in conversations]
    longest = max(map(len, prompts)) + 2 * 200
    for temperature in (1.0, 9.0):  # messages of about ten tokens; some of 200
        together = LocalChat(model, tokenizer, batch_tokens=10**6).sample(
            conversations, few, temperature=temperature, max_new_tokens=200)
        monkeypatch.setattr(RoomyLayer, "update", counted)
        bound = 2 * longest
        some = LocalChat(model, tokenizer, batch_tokens=bound).sample(
            conversations, few, temperature=temperature, max_new_tokens=200)
        monkeypatch.setattr(RoomyLayer, "update", update)
        assert some == together
        # room for two rows of full length
        assert max(held) <= bound and max(prefilled) >= 4
        again = sum(prefilled) / model.config.num_hidden_layers - len(conversations)
        assert again == 0 if temperature == 1.0 else again > 0
        held.clear()
        prefilled.clear()


def test_the_first_of_many_is_the_same_as_alone(chat, conversations, seeds):
    """Sixteen candidates equal sixteen calls: sampling candidates does not change a dialogue."""
    [sixteen] = chat.sample(conversations[:1], seeds[:1], max_new_tokens=32)
    assert sixteen == [chat.sample(conversations[:1], [[seed]], max_new_tokens=32)[0][0]
                       for seed in seeds[0]]
    assert len({reply.text for reply in sixteen}) > 1


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_first_token_frequencies(chat, model, tokenizer, conversations, temperature):
    """Pearson's chi-square of the first token's text: 2,000 seeds against the softmax."""
    n, messages = 2000, conversations[0]
    seeds = [[seed_of("frequency", k) for k in range(n)]]
    [replies] = chat.sample([messages], seeds, temperature=temperature, max_new_tokens=1)
    counts = Counter(reply.text for reply in replies)
    with torch.no_grad():
        prompt = torch.tensor([encode_dialogue(tokenizer, messages)[0]])
        logits = model(input_ids=prompt).logits[0, -1]
    expected = Counter()
    for token, p in enumerate((logits / temperature).double().softmax(-1).tolist()):
        expected[tokenizer.decode([token], skip_special_tokens=True).strip()] += n * p
    # the usual rule for chi-square
    cells = [(counts[text], e) for text, e in expected.items() if e >= 5]
    rest = n - sum(e for _, e in cells)
    if rest >= 5:
        cells.append((n - sum(count for count, _ in cells), rest))
    chi_square = sum((count - e) ** 2 / e for count, e in cells)
    freedom = len(cells) - 1
    assert freedom >= 1 or temperature == 1.0
    # Wilson and Hilferty's quantile at z = 4: a correct sampler fails once in 30,000 sets
    limit = 0.5
    if freedom:
        limit = freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < limit, (chi_square, freedom)


@pytest.mark.parametrize("bound", [1, 2, 7])
def test_max_new_tokens(chat, conversations, seeds, bound):
    """The limit only cuts a message. A high temperature makes messages long."""
    replies = chat.sample(conversations, seeds, temperature=5.0, max_new_tokens=bound)
    assert max(reply.tokens for row in replies for reply in row) == bound
    wholes = chat.sample(conversations, seeds, temperature=5.0, max_new_tokens=32)
    for row, long_row in zip(replies, wholes):
        for reply, whole in zip(row, long_row):
            assert whole.text.startswith(reply.text) and reply.tokens == min(bound, whole.tokens)


def test_a_full_context_affects_only_its_conversation(chat, tokenizer, conversations, seeds):
    """A prompt that leaves no room gives exceptions, one that leaves a little short messages."""
    few = [row[:2] for row in seeds[:3]]
    expected = chat.sample(conversations[:3], few, max_new_tokens=16)
    user = {"role": "user", "content": "days " * 2 * chat.context}
    mixed = [conversations[0], [conversations[0][0], user], conversations[1], conversations[2]]
    replies = chat.sample(mixed, [few[0], few[0], few[1], few[2]], max_new_tokens=16)
    assert all(isinstance(reply, Exception) and "context full" in str(reply)
               for reply in replies[1])
    assert len(replies[1]) == 2
    assert [replies[0], *replies[2:]] == expected

    def room_after(words):
        prompt, _ = encode_dialogue(tokenizer, [{"role": "user", "content": "x " * words}])
        return chat.context - len(prompt)

    # fills the context except for a few tokens
    words = next(words for words in range(chat.context, 0, -1) if room_after(words) >= 1)
    almost = [{"role": "user", "content": "x " * words}]
    room = room_after(words)
    assert 1 <= room < 16
    [replies] = chat.sample([almost], [few[0]], max_new_tokens=64)
    assert all(1 <= reply.tokens <= room for reply in replies)


def test_no_conversations(chat, conversations):
    assert chat.sample([], [], max_new_tokens=4) == []
    assert chat.sample(conversations[:2], [[], [1]], max_new_tokens=4)[0] == []


def test_stop_strings_cut_a_message(chat, conversations, seeds):
    [whole] = chat.sample(conversations[:1], seeds[:1], max_new_tokens=32)
    text = max((reply.text for reply in whole), key=len)
    mark = text[len(text) // 2]
    [cut] = chat.sample(conversations[:1], seeds[:1], max_new_tokens=32, stop=[mark])
    assert [reply.text for reply in cut] == [reply.text.split(mark)[0].strip() for reply in whole]


def test_adapters_off_is_the_base_model(chat, tokenizer, conversations, seeds):
    expected = chat.sample(conversations, seeds, max_new_tokens=24)
    peft = add_lora(load_model("tiny", device="cpu"), 4).eval()
    with torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    off = LocalChat(peft, tokenizer, adapters=False)
    assert off.sample(conversations, seeds, max_new_tokens=24) == expected
    assert LocalChat(peft, tokenizer).sample(conversations, seeds, max_new_tokens=24) != expected
    # switching adapters off leaves no trace
    assert off.sample(conversations, seeds, max_new_tokens=24) == expected
    with adapters_off(peft):
        assert (LocalChat(peft, tokenizer).sample(conversations, seeds, max_new_tokens=24) ==
                expected)


def test_adapters_on_half_precision_weights_compute_in_half_precision(tokenizer, conversations):
    """As in training: LoRA's weights stay float32, activations do not."""
    model = add_lora(load_model("tiny", device="cpu").bfloat16(), 4)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    seen = set()
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))
    LocalChat(model, tokenizer).sample(conversations[:1], [[0]], max_new_tokens=4)
    assert seen == {torch.bfloat16}
