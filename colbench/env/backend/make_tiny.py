"""Makes colbench/env/backend/tiny/, the default: a Llama of two million weights that plays the mini benchmark badly.

    python -m colbench.env.backend.make_tiny           # about 8 minutes on 2 idle cores, the others 5, 4, 4, 7 and 8
    python -m colbench.env.backend.make_tiny --init TINY --steps 600 --weight 4 --first-text 100000
    python -m colbench.env.backend.make_tiny --init TINY --steps 450 --weight 4 --first-text 200000
    python -m colbench.env.backend.make_tiny --init TINY --steps 420 --weight 4 --first-text 300000
    python -m colbench.env.backend.make_tiny --init TINY --steps 700 --weight 4 --first-text 400000
    python -m colbench.env.backend.make_tiny --init TINY --steps 900 --weight 4 --first-text 500000 --practice-first 0

TINY is colbench/env/backend/tiny, which every call writes anew.

It stands in for "Llama-3.1-8B-Instruct before RL" at a size that a laptop trains in minutes, and is made the way such a
model comes about: by imitation of imperfect demonstrations. The demonstrator talks with the scripted human, knows what
two of the six hints of a detail mean, asks at random otherwise, now and then answers too early. What it lacks is
exactly what RL is to find: the meaning of the other eighty hints, and to wait until everything is known.

Two things an 8B model brings along have to be taught here, both stated so that nobody mistakes them for results:
 - reading the hidden reference: half of the texts carry it in front, as the critic's prompt does, and half of those
   show a demonstrator who makes use of it; the human's sentences count in the loss there, which ties a detail's name to
   its line;
 - turning what was told into code: a share of the texts are long, clean dialogues behind a marker that never occurs at
   play, and in the later calls the tokens that decide, lines of code and names of details, weigh four times as much.

The bundled model is the outcome of these six calls, of which the first five ran on an earlier version of this file:
there the demonstrator repeated a question now and then and stopped a little less surely, and only lines of code weighed
more. With that model a third of the answers that had every detail were wrong code, which is no trouble of the model
that it stands in for, and which rejection fine-tuning cures at once and a critic of questions cannot; after the sixth
call it is one in twenty.

A variant whose messages differ in length, by remarks that say nothing (README, what length does to the critic), is the
last call with --steps 500 --first-text 600000 --remarks --output runs/chatty.
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
from colbench.lm.load import prepare_machine
from colbench.lm.tokens import encode_dialogue

KNOWN = 2  # of the six hints of a detail
QUESTIONS = ("What is the {}?", "How much is the {}?", "Tell me the {}.")
# before a question; a token each
REMARKS = ("Thanks. ", "I see. ", "Good. ", "All right. ", "One more thing. ", "Let me think. ")
# below code
COMMENTS = ("\n# Done.", "\n# As you told me.", "\n# No rounding.", "\n# In whole numbers.", "\n# For any n and d.",
            "\n# Easy to extend.")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|practice|>"]
KNOWN_HINTS = {hint: name for name, (_, hints) in DETAILS.items() for hint in hints.split()[:KNOWN]}


def demonstrate(task: dict, rng: random.Random, informed: bool, clean: bool, remarks: bool = False,
                turns: int = 10) -> list[dict]:
    """One dialogue of the imperfect demonstrator with the scripted human.

    informed: it knows which details the task has. clean: it makes no mistakes and reads every hint, as nobody at play
    does. remarks: up to nine before a question, 24 below the code.
    """
    human = ScriptedHuman()
    function = task["ground_truth"].split("(")[0].split()[1]
    details = [line.split("# ")[1] for line in task["ground_truth"].split("\n") if "# " in line]
    hints = task["problem_description"].split("deal in ")[1].split(". The")[0].replace(" and ", ", ").split(", ")
    relevant = details if informed or clean else [KNOWN_HINTS[hint] for hint in hints if hint in KNOWN_HINTS]
    history = [{"role": "user", "content": task["problem_description"]}]
    asked, told = [], {}
    for turn in range(turns):
        complete = len(told) == len(hints)
        stop = complete if clean else rng.random() < (0.95 if complete else 0.04 if told else 0.0)
        if stop or turn == turns - 1:
            ordered = {name: told[name] for name in DETAILS if name in told}
            below = rng.choices(COMMENTS, k=rng.choice((0, 1, 2, 4, 8, 12, 16, 24))) if remarks else []
            answer = f"{MARKER}\n" + code(function, ordered, comments=False) + "".join(below)
            history.append({"role": "assistant", "content": answer})
            return history
        hopeful = [name for name in relevant if name not in asked]
        unasked = [name for name in DETAILS if name not in asked]
        if hopeful and (clean or rng.random() < 0.6):
            name = rng.choice(hopeful)
        else:
            name = rng.choice(unasked)
        asked.append(name)
        before = rng.choices(REMARKS, k=rng.choice((0, 0, 0, 1, 1, 2, 3, 4, 6, 9))) if remarks else []
        history.append({"role": "assistant", "content": "".join(before) + rng.choice(QUESTIONS).format(name)})
        reply = human.reply([task], [history], [0])[0]
        history.append({"role": "user", "content": reply})
        if any(character.isdigit() for character in reply):
            told[name] = int("".join(character for character in reply if character.isdigit()))


def practice_task(rng: random.Random) -> dict:
    """A task of three to eight details, all hinted at by words the demonstrator knows."""
    names = rng.sample(list(DETAILS), rng.randint(3, 8))
    function = rng.choice(FUNCTIONS)
    hints = [rng.choice(DETAILS[name][1].split()[:KNOWN]) for name in names]
    return {
        "problem_description": request(function, rng.sample(hints, len(hints))),
        "ground_truth": code(function, {name: rng.randint(2, 9) for name in names}),
    }


def demonstration(index: int, practice_share: float, remarks: bool = False) -> tuple[list[dict], bool]:
    """Text number `index` of the warm start: (messages, whether the human's sentences count in the loss too)."""
    rng = random.Random(f"warm start {index}")
    practice, hidden_info = rng.random() < practice_share, rng.random() < 0.5
    task = practice_task(rng) if practice else mini_task("train", index, seed=1_000_000, details=(2, 3, 4))
    history = demonstrate(task, rng, informed=hidden_info and rng.random() < 0.5, clean=practice,
                          remarks=remarks and not practice)
    system = ("<|practice|>" if practice else "") + TINY_PROMPT
    messages = [{"role": "system", "content": system}] + history
    return (with_hidden_info(messages, task["ground_truth"]) if hidden_info else messages), hidden_info


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over pieces that may become tokens as a whole.

    A hint, a detail, "toll is 3", a line of code, and the phrases between them. So what the human told is one token and
    the line that it means is another, and a model of this size can learn the one from the other; with numbers as tokens
    of their own it does not learn in minutes which belongs to what.
    """
    details, hints = "|".join(DETAILS), "|".join(hint for _, hints in DETAILS.values() for hint in hints.split())
    pieces = Regex(rf" ?\b(?:{details})\b(?: is \d+)?| ?\b(?:{hints}|{'|'.join(FUNCTIONS)})\b|"
                   r"total [+-]= [^\n#]*[^\n# ]|\n")
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
    texts = (m["content"].replace("<|practice|>", "") for i in range(4000) for m in demonstration(i, 0.5)[0])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>",
        additional_special_tokens=SPECIAL[3:], chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Random weights at scales that leave the plateau early.

    The default, 0.02, sits on it for thousands of steps at this width.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
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


def example(tokenizer, index: int, practice_share: float, remarks: bool) -> tuple[list[int], list[int]]:
    """Token ids and labels (-100 outside of the loss) of text number `index`."""
    messages, human_too = demonstration(index, practice_share, remarks)
    ids, spans = encode_dialogue(tokenizer, messages)
    labels = [-100] * len(ids)
    if human_too:  # everything after the request: the human's sentences can be predicted from the reference
        spans = [(spans[0][0], len(ids))]
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return ids, labels


def main() -> None:
    prepare_machine()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny")
    parser.add_argument("--steps", type=int, default=900, help="optimiser steps of --batch texts (default: 900)")
    parser.add_argument("--init", type=Path, help="go on from a model that this script wrote")
    parser.add_argument("--first-text", type=int, default=0,
                        help="number of the first text: others than those of an earlier call")
    parser.add_argument("--weight", type=float, default=1.0,
                        help="in the loss, of tokens that are lines of code or names of details")
    parser.add_argument("--practice-first", type=float, default=0.4,
                        help="share of the steps, the first, with clean dialogues only")
    parser.add_argument("--remarks", action="store_true",
                        help="messages of the demonstrator with remarks that say nothing; with --init")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak; cosine decay (default: 2e-3)")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.init:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.init)
        model = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    else:
        tokenizer = make_tokenizer(args.vocabulary)
        model = make_model(tokenizer)
    if args.remarks:
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in REMARKS + COMMENTS])
        model.resize_token_embeddings(len(tokenizer))
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    decides = torch.tensor([text.startswith("total ") or text.strip() in DETAILS for text in texts])
    print(f"{model.num_parameters():,} weights, {len(tokenizer)} tokens in the vocabulary")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 50) * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
    started, tokens = time.time(), 0
    for step in range(args.steps):
        practice_share = 1.0 if step < args.practice_first * args.steps else 0.25  # first learn to copy, then to err
        first = args.first_text + step * args.batch
        rows = [example(tokenizer, first + i, practice_share, args.remarks) for i in range(args.batch)]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
        logits = model(input_ids=ids).logits[:, :-1]  # right padding needs no mask: attention is causal
        targets = labels[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        weights = (targets != -100) * (1 + (args.weight - 1) * decides[targets.clamp(min=0)])
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
