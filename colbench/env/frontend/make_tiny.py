"""Makes colbench/env/frontend/tiny/: a Llama (under 1M parameters) that edits pages badly.

    python -m colbench.env.frontend.make_tiny --layouts PAGES
    python -m colbench.env.frontend.make_tiny --layouts PAGES --init TINY --learning-rate 2e-3 \\
        --first-text 100000
    python -m colbench.env.frontend.make_tiny --layouts PAGES --init TINY --learning-rate 2e-3 \\
        --first-text 200000

TINY is colbench/env/frontend/tiny; every call overwrites it. PAGES is a folder for 2,160 rendered
pages, which the first call makes. After that each call takes 8 minutes on one core.

The model uses the page language of colbench.env.frontend.pages: each message sets one or two
details. As in colbench.env.backend.make_tiny it imitates an imperfect demonstrator: every second
message or so takes up a remark of the human, the others set something at random, and it often
answers before the human is content. RL has to find that listening and waiting pay. Reading the
hidden page is taught too: half of the texts start with it, and over half of those show a
demonstrator that uses it.

The demonstrations are dialogues with the scripted human. The browser lays out every page of one
business once; for other businesses the texts in the remarks are replaced.
"""
import argparse
import itertools
import math
import random
import re
import time
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from colbench.env.backend.make_tiny import CHAT_TEMPLATE, SPECIAL
from colbench.env.dialogue import MARKER
from colbench.env.frontend.browser import Renderer
from colbench.env.frontend.pages import BUSINESSES, DETAILS, compose, request
from colbench.env.frontend.protocol import EDITS_PROMPT
from colbench.env.frontend.reviewer import NOTHING, SAME, review
from colbench.env.hidden_info import with_hidden_info
from colbench.lm.load import keep_freed_memory, prepare_machine
from colbench.lm.tokens import encode_dialogue

MODEL = next(iter(BUSINESSES))  # the business whose pages are rendered
REMARKS = {  # detail -> what a remark about it mentions
    "background": "page background", "menu": "sidebar", "headline": "headline should be",
    "picture": "picture", "columns": "column", "button": "button", "form": "input field"}
LAYOUTS = {}


def key(details: dict) -> tuple:
    """A page's key in LAYOUTS."""
    return tuple(details.get(name, values[0]) for name, values in DETAILS.items())


def load_layouts(folder: Path) -> None:
    """Fill LAYOUTS: render every page of one business, or read it from `folder`."""
    combinations = list(itertools.product(*DETAILS.values()))
    with Renderer(folder, layout=True) as renderer:
        for start in range(0, len(combinations), 48):
            part = combinations[start:start + 48]
            pages = [compose(MODEL, dict(zip(DETAILS, values))) for values in part]
            pictures = renderer.render(pages)
            LAYOUTS.update((values, picture.layout) for values, picture in zip(part, pictures))
            print(f"\r{start + len(part)} of {len(combinations)} pages", end="", flush=True)
    print()


@lru_cache(maxsize=200_000)
def remark(shown: tuple, wanted: tuple) -> str:
    """What the scripted human says about page `shown`."""
    return review(LAYOUTS[shown], LAYOUTS[wanted])


def demonstrate(business: str, wanted: dict, rng: random.Random, informed: bool) -> list[dict]:
    """One dialogue of the demonstrator with the scripted human.

    wanted: the details of the hidden page; an informed demonstrator knows them.
    """
    history = [{"role": "user", "content": request(business)}]
    details, said = {}, NOTHING
    for turn in range(10):
        wrong = [name for name in DETAILS if details.get(name, DETAILS[name][0]) != wanted[name]]
        heard = wrong if informed else [name for name in wrong if REMARKS[name] in said]
        if turn and rng.random() < (0.9 if said == SAME else 0.2):
            history.append({"role": "assistant", "content": MARKER})
            return history
        lines = {}
        for _ in range(rng.choice((1, 2))):
            if heard and rng.random() < (0.8 if informed else 0.5):
                name = rng.choice(heard)
                lines[name] = wanted[name]
            else:
                name = rng.choice(list(DETAILS))
                lines[name] = rng.choice(DETAILS[name])
        details |= lines
        text = "\n".join(f"{name} {value}" for name, value in lines.items())
        history.append({"role": "assistant", "content": text})
        said = remark(key(details), key(wanted))
        texts = dict(zip((MODEL, *BUSINESSES[MODEL]), (business, *BUSINESSES[business])))
        pattern = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
        reply = re.sub(pattern, lambda match: texts[match.group()], said)
        history.append({"role": "user", "content": reply})
    history[-2:] = [{"role": "assistant", "content": MARKER}]
    return history


def demonstration(index: int) -> tuple[list[dict], bool]:
    """Text number `index`: (messages, whether the loss includes the human's messages)."""
    rng = random.Random(f"pages warm start {index}")
    business = rng.choice(list(BUSINESSES))
    wanted = {name: rng.choice(values) for name, values in DETAILS.items()}
    sees_hidden_page = rng.random() < 0.5
    informed = sees_hidden_page and rng.random() < 0.6
    history = demonstrate(business, wanted, rng, informed)
    messages = [{"role": "system", "content": EDITS_PROMPT}, *history]
    if sees_hidden_page:
        messages = with_hidden_info(messages, compose(business, wanted))
    return messages, sees_hidden_page


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which a tag, a word or a line of the page language may become one token.

    Reading a hidden page then means finding a few tokens, which a tiny model learns in minutes.
    """
    lines = "|".join(f"{name} {value}" for name, values in DETAILS.items() for value in values)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(rf"<[^>]*>|^(?:{lines})$|\n| ?[\w'-]+"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL[:-1], show_progress=False, min_frequency=10,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = (m["content"] for i in range(3000) for m in demonstration(i)[0])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>",
        additional_special_tokens=SPECIAL[3:-1], chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False)


def make_model(tokenizer) -> LlamaForCausalLM:
    """Random weights, scaled as in colbench.env.backend.make_tiny."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=344, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "embed_tokens" in name:
            torch.nn.init.normal_(weight, std=0.1)
        elif "proj" in name:
            scale = 0.5 if "o_proj" in name or "down_proj" in name else 1.0
            torch.nn.init.normal_(weight, std=scale / math.sqrt(weight.shape[1]))
    return model


def example(tokenizer, index: int) -> tuple[list[int], list[int]]:
    """Token ids and labels (-100 outside the loss) of text number `index`."""
    messages, human_too = demonstration(index)
    ids, spans = encode_dialogue(tokenizer, messages)
    labels = [-100] * len(ids)
    for start, end in [(spans[0][0], len(ids))] if human_too else spans:
        labels[start:end] = ids[start:end]
    return ids, labels


def main() -> None:
    prepare_machine()
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny")
    parser.add_argument("--layouts", type=Path, required=True,
                        help="folder for the rendered pages; existing ones are kept")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--init", type=Path, help="continue from a model that this script wrote")
    parser.add_argument("--first-text", type=int, default=0,
                        help="number of the first text; avoids the texts of an earlier call")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=3e-3,
                        help="peak; cosine decay (default: 3e-3)")
    parser.add_argument("--vocabulary", type=int, default=1024)
    args = parser.parse_args()
    torch.manual_seed(0)
    load_layouts(args.layouts)
    if args.steps == 0:
        return
    if args.init:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.init)
        model = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    else:
        tokenizer = make_tokenizer(args.vocabulary)
        model = make_model(tokenizer)
    keep_freed_memory(model)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98),
                                  weight_decay=0.01)

    def rate(step):
        return min(1.0, step / 25) * 0.5 * (1 + math.cos(math.pi * step / args.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    started, tokens = time.time(), 0
    for step in range(args.steps):
        first = args.first_text + step * args.batch
        rows = [example(tokenizer, first + i) for i in range(args.batch)]
        width = max(len(ids) for ids, _ in rows)
        pad = tokenizer.pad_token_id
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
        # attention is causal, so right padding needs no mask
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += sum(len(ids) for ids, _ in rows)
        if step % 25 == 0:
            speed = tokens / (time.time() - started)
            print(f"step {step:5d}  loss {loss.item():.3f}  {speed:,.0f} tokens/s", flush=True)
    model.half().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
