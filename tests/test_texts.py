"""colbench/lm/texts.py: what a model says, without thoughts, template marks, names, extra turns."""
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from colbench.lm.load import load_tokenizer
from colbench.lm.sampling import LocalChat
from colbench.lm.texts import OnlyThoughts, clean, opens_thoughts, reply_alone, thinks_first
from colbench.lm.tokens import encode_dialogue, end_of_turn

ANSWER = "I WANT TO ANSWER:\ndef f(s):\n    return "
SAID, THOUGHT = "The toll is 7.", "The hidden code adds x and 7;\nI WANT TO ANSWER: not yet."

FAMILIES = [
    "<think>\n{t}\n</think>\n\n{s}", "{t}\n</think>\n\n{s}",
    "<THINK>{t}</Think>{s}", "<thinking>{t}</thinking>\n{s}",
    "<Thought>{t}</Thought> {s}", "<thoughts>{t}</thoughts>{s}", "<reasoning>{t}</reasoning>{s}",
    '<think type="long">{t}</think>{s}',
    "[THINK]{t}[/THINK]{s}", "{t}\n[/THINK]\n{s}", "[think]{t}[/think]{s}",
    "◁think▷{t}◁/think▷{s}", "{t}◁/think▷{s}",
    "<seed:think>{t}</seed:think>{s}", "<longcat_think>{t}</longcat_think>{s}",
    "Here is my thought process:\n\n{t}\n\nHere is my response:\n\n{s}",
    "Here's my thought process: {t} Here's my response: {s}",
    "<think>{t}</think>\n<response>\n{s}\n</response>",
    "<think>\n{t}\n</think>\n<answer>\n{s}\n</answer>",
    "<|channel|>analysis<|message|>{t}<|end|><|start|>assistant<|channel|>final<|message|>{s}"
    "<|return|>",
    "<|start|>assistant<|channel|>analysis<|message|>{t}<|end|><|start|>assistant<|channel|>final "
    "<|constrain|>json<|message|>{s}", "analysis{t}assistantfinal{s}",
    "<|channel>thought\n{t}<channel|>{s}", "<|inner_prefix|>{t}<|inner_suffix|>{s}",
    "<|START_THINKING|>{t}<|END_THINKING|><|START_RESPONSE|>{s}<|END_RESPONSE|>",
    "<|begin_of_thought|>{t}<|end_of_thought|>\n\n<|begin_of_solution|>{s}<|end_of_solution|>",
    "<|im_start|>assistant\n<think>{t}</think>\n\n{s}<|im_end|>",
    "<|im_start|>assistant <think>{t}</think>{s}",
    "<scratch_pad>{t}</scratch_pad>{s}", "<inner_monologue>\n{t}\n</inner_monologue>\n{s}",
    "<cot>{t}</cot> {s}",
    "<analysis>{t}</analysis>\n\n{s}", "<reason>{t}</reason>{s}",
]


@pytest.mark.parametrize("raw", FAMILIES)
def test_thoughts_of_every_family_are_kept_apart(raw):
    assert clean(raw.format(t=THOUGHT, s=SAID)) == (SAID, THOUGHT)


@pytest.mark.parametrize("raw", [
    "<think>{t}", "<think>\n{t}\n", "[THINK]{t}", "◁think▷{t}",
    "<|channel|>analysis<|message|>{t}", "<reasoning>{t}",
    "Here is my thought process: {t}", "{t}\n</think>", "analysis{t}", "<|channel>thought\n{t}",
    "<think>{t}</think>\n\n<|im_end|>",
])
def test_thoughts_alone_say_nothing(raw):
    assert clean(raw.format(t=THOUGHT)) == ("", THOUGHT)


def test_several_thoughts_and_thoughts_that_the_prompt_opened():
    assert clean("<think>a</think>\nOne.\n<think>b</think>\nTwo.") == ("One.\nTwo.", "a\n\nb")
    assert clean("The toll <think>which?</think> is 7.") == (SAID, "which?")
    assert clean("<think>a <think> b</think>c") == ("c", "a\n\nb")
    assert clean("a</think>b</think>c") == clean("a\n</think>b\n</think>c") == ("c", "a\n\nb")
    assert clean("<think>a <think>b</think> x</think>c") == ("c", "a\n\nb\n\nx")
    assert clean("<think>a <reflection>b</reflection> x</think>c") == ("c", "a\n\nb\n\nx")
    assert clean("a</think>\nc") == clean("a</think>c", opened=True) == ("c", "a")
    assert clean("One.\n<think>cut") == ("One.", "cut")
    assert clean(f"<think>a</think>{ANSWER}1\n<think>\nb\n</think>\n") == (f"{ANSWER}1", "a\n\nb")
    assert clean("<think>\n\n</think>\n\nc") == ("c", "")
    assert clean("cut off", opened=True) == ("", "cut off")
    assert clean("a</think>b", opened=True) == ("b", "a")
    assert opens_thoughts("<|Assistant|><think>\n")
    assert not opens_thoughts("<think>\n\n</think>\n\n")
    assert not opens_thoughts("Say it after <think> and </think>. Assistant:")
    assert thinks_first("hm</think>x") and not thinks_first("<think>hm</think>x")
    assert not thinks_first("x")
    assert thinks_first("hm\n</think>\n\nx", alone=True)
    assert not thinks_first("Split at </think>, then?", alone=True)
    assert not thinks_first(f'{ANSWER}1\n"""\n</think>\n"""', alone=True)


@pytest.mark.parametrize("raw", [
    ANSWER + 's.replace("<think>", "")', ANSWER + "re.sub(r'<think>.*?</think>', '', s)",
    ANSWER + "s.split('</think>')[-1]", ANSWER + 'f"{s}</think>\\n"',
    ANSWER + 's + "</s>"', ANSWER + "MODES[THINK]",
    ANSWER + "s[think]", ANSWER + '{"<|eot_id|>": 1}',
    ANSWER + "'''<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n'''\n",
    ANSWER + "s  # without <think> and </think>",
    ANSWER + '1\n"""Drop <think>...</think> blocks."""',
    ANSWER + '1\n"""\nDrop all up to </think>.\n"""',
    ANSWER + '"""\n<think>\n""" + s + """\n</think>\n"""',
    ANSWER + "f'''<thought>\n{s}\n</thought>'''", ANSWER + "x<reasoning and y>reasoning",
    ANSWER + "a<thought>b",
    ANSWER + "s.replace(/<think>.*<\\/think>/, '')", ANSWER + "`<think>\n${s}\n</think>`;",
    ANSWER + "1\n<html><body><reflection>hi</reflection></body></html>", ANSWER + "a < thought > b",
    ANSWER + "1\n<analysis>\nx\n</analysis>", ANSWER + "s  # all behind </think>",
    "Should I drop everything in <think> blocks?", "Should I split at </think> or behind it?",
    "Should I keep the [THINK] marker?", "Is <reason>late</reason> a field of it?",
    "Like <cot>\nx</cot>",
    f"Drop <think>? {ANSWER}'</think>'",
    "Is the tag `<think>` or `</think>`?",
    "<p>old</p> <s>12</s>", "<s>12</s> now 10", "  blanks stay \n", "", " ",
    "analysis of the toll: 7", "Is it a model\nor an assistant?", "if a <b|> c: pass",
])
def test_a_message_and_its_code_stay_as_they_are(raw):
    assert clean(raw) == (raw, "")


@pytest.mark.parametrize("raw", [
    "{s}<|eot_id|>", "{s}<|im_end|>\n", "{s}</s>", "{s}</s></s>",
    "{s}<end_of_turn>\n<eos>", "{s}<|endoftext|>",
    "{s}<|end|>", "{s}<｜end▁of▁sentence｜>", "{s}<turn|>", "{s} [/INST]",
    "assistant\n\n{s}", "model\n{s}", "<|assistant|>\n{s}",
    "<|start_header_id|>assistant<|end_header_id|>\n\n{s}<|eot_id|>", "<start_of_turn>model\n{s}",
    "<|begin_of_text|>{s}",
    "{s}<|im_end|>\n<|im_start|>user\nThanks",
    "{s}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nThanks",
    "{s}</s>[INST] Thanks [/INST]", "{s}<|im_start|>user\nThanks",
])
@pytest.mark.parametrize("said", [SAID, ANSWER + "'</s>' + s"])
def test_marks_around_a_message_are_cut_off(raw, said):
    assert clean(raw.format(s=said)) == (said, "") and reply_alone(raw.format(s=SAID)) == SAID
    assert clean(f"<s> {SAID}</s>") == (SAID, "")


@pytest.mark.parametrize("raw", """
Human: {s}|**Human**: {s}|**Human:** {s}|*Human:* {s}|__Human__: {s}|[Human]: {s}|<human>: {s}
<human>{s}</human>
(Human): {s}|HUMAN : {s}|Human：{s}|> Human: {s}|- Human: {s}|Human (simulated): {s}
**[Human]:** {s}|Human: **{s}**
User: {s}|Customer: {s}|Assistant: {s}|You: {s}|Reply: {s}|Human's reply: {s}|Simulated Human: {s}
<reply>{s}</reply>
"{s}"|“{s}”|«{s}»|`{s}`|Human: "{s}"|"Human: {s}"|Human says: "{s}"
### Human:~{s}|human~{s}|**Human**~~{s}|assistant~~{s}|user~~{s}|Human:~{s}
Sure! Here is the human's reply:~~"{s}"|Here's my response as the Human:~~{s}
Agent: What is it?~~Human: {s}
{s}~~Agent: Thanks.|{s}~Agent: Thanks.|{s}~~**Agent:** x|{s}~~**Agent**: x|{s}~[Agent]: x
{s}~<agent>x
{s}~~Assistant: x|{s}~~User: x|{s}~~Human: x|{s}~~AI: x|{s} Agent: Thanks!
Human: {s}~Human: It is 8.
{s}~~### Response:~x|{s}~~## Agent~x|{s}~~---~~(Note: x)|{s}~~**Agent**~x|{s}assistant~~Thanks
{s}~~assistant~~x
{s}~~Agent (AI): x|{s}</s> more|{s}[INST] more
Okay, here's the reply: "{s}"|Here is my answer as the Human: “{s}”|My answer: {s}
Final reply: {s}|My final answer: {s}
The Human: {s}|As the Human: {s}|as human: {s}|Reply as the Human: {s}|The human replies: "{s}"
As the user: {s}
{s}~~Agent's response: x|{s}~~**Agent's next message:** x|{s}~~[Agent's turn]
{s}~**Assistant's reply**~x
{s} ### Assistant: x|{s} **Agent:** x|USER: {s} ASSISTANT: x|HUMAN: {s} AGENT: x|Reply:~~> {s}
Human:~> {s}
```~{s}~```|```text~{s}~```|Human:~~```~{s}~```
""".strip().replace("\n", "|").replace("~", "\n").split("|"))
def test_only_the_reply_is_kept(raw):
    assert (reply_alone(raw.format(s=SAID)) ==
            reply_alone(raw.replace("\n", "\r\n").format(s=SAID)) == SAID)


def test_a_reply_ends_at_a_mark_that_it_is_not_about():
    for raw in ("{s}<|eot_id|> more", '"{s}"<|im_end|> more',
                "{s}\n<|user|> more", "{s}<｜end▁of▁sentence｜>more"):
        assert reply_alone(raw.format(s=SAID)) == SAID
    assert reply_alone("It is 7<|end|>more") == "It is 7"
    # thoughts may begin anywhere
    assert reply_alone(f"{SAID} <think>The hidden code adds") == SAID


@pytest.mark.parametrize("text", [
    "The user: id column is first.", "It is like this: user: name.",
    "There are two: a human: x, an agent: y.",
    "These are the columns:\nUser: text\nAgent: number\nAge: int",
    'Either "a" or "b".', '"a" and "b"', "It's 7.",
    "Yes: 7: 8.", "Note: the toll is 7.", "Use {'a': 1}.",
    "Human readable names, please.", "User id, then name.",
    "The format is `agent: name`.", "a\n\nb", "- one\n- two",
    "If n > 3: add 7.", "Model numbers first.",
    "a | b\n--- | ---\n1 | 2", "", "7", "Reply within a day.", "Answer with a number.",
    "Use <s>old</s> for old prices.", "Split at </s> please.",
    "The separator is <|sep|>, keep it.", "Is it '</s>'?",
    "The sections are:\n\n## Human\n## Agent", "The log looks like:\n\nUser: id\nAgent: name",
    "Two roles:\n\nHuman: asks\nAgent: answers\nUser: pays",
    "1. Human: yes\n2. Agent: no", " 3. Agent: no".strip(),
    "The output is\n***\ntext\n***", "First\n---\nthen the total",
    "> 5", "> 5 is large", "Run ```f``` and ```g```",
])
def test_a_plain_reply_stays_as_it_is(text):
    assert reply_alone(text) == text


def test_hostile_texts_take_little_time():
    start = time.perf_counter()
    for piece in ("\n", " ", "<think>", "</think>", "'", '"a ', "<", "<|", "*", "#", "Agent\n",
                  "assistant\n", "here is ", "</s>", "<s>", "<|eot_id|>", "(Human", "analysis",
                  "<a.", "[think]", " \n", "<|channel|>analysis"):
        for text in (piece * (30_000 // len(piece)), piece * (30_000 // len(piece)) + "x"):
            clean(text), reply_alone(text)
    assert time.perf_counter() - start < 60  # with backtracking it takes hours


# ---- a local model


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = load_tokenizer("tiny")
    special = ["[THINK]", "[/THINK]", "<|other|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


def reciter(tokenizer, dialogue, *texts):
    """A model that always says the tokens `texts` after this dialogue.

    Its layer does nothing, and the head leads from each token to the next.
    """
    ids = [encode_dialogue(tokenizer, dialogue)[0][-1], *tokenizer.convert_tokens_to_ids(texts)]
    size = len(tokenizer)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=1, head_dim=8,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=512)).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        for now, then in zip(ids, ids[1:]):
            model.lm_head.weight[then, now] = 1.0
    return model


def test_tags_that_are_special_tokens_keep_a_local_models_thoughts_apart(tokenizer):
    """Decoded without special tokens, the tags would be lost and the thoughts said."""
    dialogue = [{"role": "user", "content": "Please help."}]
    end = tokenizer.decode([end_of_turn(tokenizer)])
    model = reciter(tokenizer, dialogue, "[THINK]", "A", "[/THINK]", "<|other|>", "B", "C", end)
    chat = LocalChat(model, tokenizer)
    [[reply, other]] = chat.sample([dialogue], [[1, 2]], temperature=0, max_new_tokens=20)
    assert reply == other and reply[:3] == ("BC", 7, "A")
    [[reply]] = chat.sample([dialogue], [[1]], temperature=0, max_new_tokens=2)
    assert isinstance(reply, OnlyThoughts) and "2 tokens" in str(reply) and "twice" in str(reply)
