"""Makes colbench/env/backend/tiny/: a Llama (2M parameters) that plays the mini benchmark badly.

    python -m colbench.env.backend.make_tiny           # 20 minutes on 2 idle cores

It is our "Llama-3.1-8B-Instruct before RL" at a size that a laptop trains in minutes, and
learns as such a model does: by imitating imperfect demonstrations. The demonstrator talks with the
scripted human. It knows exactly what three of each detail's six hints mean; for the others it knows
only a group of five details. Now and then it asks at random. It answers too early in one turn of
nine, and often keeps asking after it has been told everything. It wraps its messages in empty
remarks, up to nine tokens before a four-token question and up to six below code, so that length
says nothing about worth. RL has to find what is missing: what exactly the other sixty hints mean,
to wait until everything is known, and then to answer.

Two abilities of an 8B model have to be taught here, so they are not results:
 - reading the hidden code. Half of the texts start with it, as the critic's prompt does, and half
   of those show a demonstrator that uses it. There the human's sentences count in the loss too,
   which ties a detail's name to its line;
 - turning the human's replies into code. Some texts are long, clean dialogues after a marker that
   never occurs during play. The tokens that decide (lines of code, names of details) weigh four
   times as much.
"""
import argparse
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from colbench.env.backend.environment import TINY_PROMPT
from colbench.env.backend.human import ScriptedHuman
from colbench.env.backend.mini import DETAILS, FUNCTIONS, code, mini_task, request
from colbench.env.dialogue import MARKER
from colbench.env.hidden_info import with_hidden_info
from colbench.env.humans import UNKNOWN
from colbench.lm.load import keep_freed_memory, prepare_machine
from colbench.lm.tokens import encode_dialogue

KNOWN = 3  # of the six hints of a detail
BATCH, VOCABULARY = 24, 2048
QUESTIONS = ("What is the {}?", "How much is the {}?", "Tell me the {}.")
# before a question and below code; one token each
REMARKS = ("Thanks. ", "I see. ", "Good. ", "All right. ", "One more thing. ", "Let me think. ")
COMMENTS = ("\n# Done.", "\n# As you told me.", "\n# No rounding.", "\n# In whole numbers.",
            "\n# For any n and d.", "\n# Easy to extend.")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|bos|>", "<|end|>", "<|pad|>",
           "<|system|>", "<|user|>", "<|assistant|>", "<|practice|>"]
GROUPS = [list(DETAILS)[i:i + 5] for i in range(0, len(DETAILS), 5)]
MEANING = {  # hint -> (its detail, whether the demonstrator knows that exactly)
    hint: (name, k < KNOWN)
    for name, (_, hints) in DETAILS.items()
    for k, hint in enumerate(hints.split())
}


def demonstrate(task: dict, rng: random.Random, informed: bool, clean: bool,
                turns: int = 10) -> list[dict]:
    """One dialogue of the imperfect demonstrator with the scripted human.

    informed: it knows which details the task has. clean: it makes no mistakes or remarks and knows
    every hint, which never happens during play.
    """
    human = ScriptedHuman()
    hidden_code, description = task["ground_truth"], task["problem_description"]
    function = hidden_code.split("(")[0].split()[1]
    details = [line.split("# ")[1] for line in hidden_code.split("\n") if "# " in line]
    deals = description.split("deal in ")[1].split(". The")[0]
    hints = deals.replace(" and ", ", ").split(", ")
    history = [{"role": "user", "content": description}]
    asked, told = [], {}
    for turn in range(turns):
        complete = len(told) == len(hints)
        if clean:
            stop = complete
        else:
            stop = rng.random() < (0.25 if complete else 0.11 if told else 0.0)
        if stop or turn == turns - 1:
            ordered = {name: told[name] for name in DETAILS if name in told}
            comments = [] if clean else rng.choices(COMMENTS, k=rng.choice((0, 0, 1, 2, 3, 4, 6)))
            answer = f"{MARKER}\n" + code(function, ordered, comments=False) + "".join(comments)
            return [*history, {"role": "assistant", "content": answer}]
        if informed or clean:
            hopeful = details
        else:
            hopeful = [name for hint in hints for name in possible_details(hint, hints, told)]
        hopeful = [name for name in hopeful if name not in asked]
        unasked = [name for name in DETAILS if name not in asked]
        name = rng.choice(hopeful if hopeful and (clean or rng.random() < 0.8) else unasked)
        asked.append(name)
        remarks = []
        if not clean:
            remarks = rng.choices(REMARKS, k=rng.choice((0, 0, 0, 1, 1, 2, 3, 4, 6, 9)))
        question = "".join(remarks) + rng.choice(QUESTIONS).format(name)
        history.append({"role": "assistant", "content": question})
        reply = human.reply([task], [history], [0])[0]
        history.append({"role": "user", "content": reply})
        if digits := "".join(character for character in reply if character.isdigit()):
            told[name] = int(digits)


def possible_details(hint: str, hints: list[str], told: dict) -> list[str]:
    """What the demonstrator thinks `hint` may mean.

    A roughly known hint may mean any detail of its group, until the number of details told from the
    group equals the number of hints at it.
    """
    name, known = MEANING[hint]
    if known:
        return [name]
    group = next(group for group in GROUPS if name in group)
    n_hints = sum(MEANING[other][0] in group for other in hints)
    return group if n_hints > len(told.keys() & set(group)) else []


def practice_task(rng: random.Random) -> dict:
    """A task of three to eight details, with hints that the demonstrator knows exactly."""
    names = rng.sample(list(DETAILS), rng.randint(3, 8))
    function = rng.choice(FUNCTIONS)
    hints = [rng.choice(DETAILS[name][1].split()[:KNOWN]) for name in names]
    return {
        "problem_description": request(function, rng.sample(hints, len(hints))),
        "ground_truth": code(function, {name: rng.randint(2, 9) for name in names}),
    }


def demonstration(index: int, practice_share: float) -> tuple[list[dict], bool]:
    """Text number `index`: (messages, whether the human's sentences count in the loss too)."""
    rng = random.Random(f"warm start {index}")
    practice = rng.random() < practice_share
    hidden_info = rng.random() < 0.5
    if practice:
        task = practice_task(rng)
    else:
        task = mini_task("train", index, seed=1_000_000, details=(3, 4, 5))
    informed = hidden_info and rng.random() < 0.5
    history = demonstrate(task, rng, informed, clean=practice)
    system = ("<|practice|>" if practice else "") + TINY_PROMPT
    messages = [{"role": "system", "content": system}] + history
    if hidden_info:
        messages = with_hidden_info(messages, task["ground_truth"])
    return messages, hidden_info


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over pieces that may become single tokens.

    Pieces: a hint, a detail, "toll is 3", a line of code, and the phrases between them. So the
    human's sentence and the matching line are one token each, and the model learns one from the
    other. With numbers as separate tokens it does not learn within minutes which belongs to what.
    """
    details = "|".join(DETAILS)
    words = "|".join(hint for _, hints in DETAILS.values() for hint in hints.split())
    pieces = Regex(rf" ?\b(?:{details})\b(?: is \d+)?| ?\b(?:{words}|{'|'.join(FUNCTIONS)})\b|"
                   r"\n {4}total [+-]= [^\n#]*[^\n# ]")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pieces, behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False, min_frequency=20,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [UNKNOWN] * 1000
    for i in range(4000):
        texts += [m["content"].replace("<|practice|>", "") for m in demonstration(i, 1.0)[0]]
        task = mini_task("train", i, seed=1_000_000, details=(2, 3))
        texts.append(task["problem_description"])
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in REMARKS + COMMENTS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>",
        additional_special_tokens=SPECIAL[3:], chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Random weights. At the default scale, 0.02, the loss hardly moves for thousands of steps."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "embed_tokens" in name:
            torch.nn.init.normal_(weight, std=0.1)
        elif "proj" in name:
            scale = 0.5 if "o_proj" in name or "down_proj" in name else 1.0
            torch.nn.init.normal_(weight, std=scale / math.sqrt(weight.shape[1]))
    return model


def example(tokenizer, index: int, practice_share: float) -> tuple[list[int], list[int]]:
    """Token ids and labels (-100: not in the loss) of text number `index`."""
    messages, human_too = demonstration(index, practice_share)
    ids, spans = encode_dialogue(tokenizer, messages)
    labels = [-100] * len(ids)
    if human_too:  # everything after the request: the hidden code predicts the human's sentences
        spans = [(spans[0][0], len(ids))]
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return ids, labels


def main() -> None:
    prepare_machine()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny")
    parser.add_argument("--steps", type=int, default=3000,
                        help="optimiser steps of 24 texts (default: 3000)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(VOCABULARY)
    model = make_model(tokenizer)
    keep_freed_memory(model)
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    decides = torch.tensor([text.startswith("\n    total ") or text.strip() in DETAILS
                            for text in texts])
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, step / 50) * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
    started, tokens = time.time(), 0
    for step in range(args.steps):
        practice_share = 1.0 if step < 0.3 * args.steps else 0.25  # first copy, then make mistakes
        rows = [example(tokenizer, step * BATCH + i, practice_share) for i in range(BATCH)]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
        logits = model(input_ids=ids).logits[:, :-1]  # causal: right padding needs no mask
        targets = labels[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none")
        weights = (targets != -100) * (1 + 3 * decides[targets.clamp(min=0)])
        loss = (losses * weights.flatten()).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += sum(len(ids) for ids, _ in rows)
        if step % 50 == 0:
            speed = tokens / (time.time() - started)
            print(f"step {step:5d}  loss {loss.item():.3f}  {speed:,.0f} tokens/s", flush=True)
    model.half().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
