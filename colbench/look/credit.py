"""Which turn earned the credit: the critic's advantage of every agent turn, and of every token.

evaluate.py --critic RUN/critic calls `add_credit`, and report.html shows the result. One line per
episode goes to RUN/advantages.jsonl: {"policy", "id", "sample", "critic", "weights" and "dialogue"
(hashes), "turns": [{"advantage", "ratios": [[end, log-ratio], …], "candidates"?}, …]}. `end` is
where the token ends in the message, in characters. The mean of the log-ratios is the advantage,
equation (1) of train_critic.py.
"""
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from colbench.env.data import CREDIT
from colbench.env.dialogue import prompt_messages
from colbench.env.hidden_info import with_hidden_info
from colbench.lm.adapters import adapters_in_half, adapters_off, has_adapters
from colbench.lm.load import load_model, put_adapter
from colbench.lm.logps import Tree, dialogue_tree, message_logps, pack, tree_tokens
from colbench.lm.tokens import encode_dialogue, end_of_turn, message_ids
from colbench.run.files import append_jsonl, dialogue_hash, repair_jsonl, write_aside
from colbench.run.settings import read_json, weights_of
from colbench.train.critics import mean_log_ratio


def add_credit(path, lines, critic, base, load_in_4bit, tokenizer, model=None) -> list[dict]:
    """Score, with the critic in a folder, the agent turns of the episodes that `path` lacks.

    path: advantages.jsonl; None: no file. Returns the new rows. base: name of the base model,
    π_ref. model: its weights, if they are in memory. π_θ and π_ref both read c, unless the critic
    was trained with --no-hidden-info; with --official only π_θ does. Candidates of a turn are
    scored too. An interrupted call resumes.
    """
    trained_with = read_json(Path(critic) / "training_args.json")
    advantage = partial(mean_log_ratio, length_norm=not trained_with.get("no_length_norm"))
    weights = weights_of(Path(critic))

    def key_of(line):
        return weights, line["policy"], line["id"], line["sample"], dialogue_hash(line)

    scored_lines = {key_of(line): line for line in lines if "reward" in line}
    done = {}  # rows of other weights or dialogues are made anew
    for row in repair_jsonl(path, CREDIT) if path else []:
        key = row.get("weights"), row["policy"], row["id"], row["sample"], row.get("dialogue")
        if key in scored_lines:
            done[key] = row
    todo = [line for key, line in scored_lines.items() if key not in done]
    if not todo:
        return []
    if model is not None:
        critic_model = put_adapter(model, str(critic))
    else:
        critic_model = load_model(base, load_in_4bit, adapter=str(critic))
    base_model = critic_model
    if not has_adapters(critic_model):  # after full fine-tuning π_ref is a model of its own
        base_model = load_model(base, load_in_4bit)
    hidden_info = not trained_with.get("no_hidden_info")
    trees = [trees_of(tokenizer, line, hidden_info) for line in todo]
    ref_trees = trees
    if trained_with.get("official"):
        ref_trees = [trees_of(tokenizer, line, hidden_info=False) for line in todo]
    if path:
        write_aside(path, lambda temporary: [
            temporary.touch(), *(append_jsonl(temporary, row) for row in done.values())])
    rows, bar = [], tqdm(total=len(todo), desc="credit", unit="episode")
    sizes = [sum(map(tree_tokens, of_line)) for of_line in trees]
    for batch in pack(sizes, trained_with.get("tokens_per_step", 1024)):
        with torch.no_grad(), adapters_in_half(critic_model):
            logps = message_logps(critic_model, [tree for k in batch for tree in trees[k]])
            with adapters_off(base_model):
                ref_logps = message_logps(base_model, [t for k in batch for t in ref_trees[k]])
        outputs = zip(logps, ref_logps)
        for k in batch:
            of_line = [next(outputs) for _ in trees[k]]
            row = {"policy": todo[k]["policy"], "id": todo[k]["id"], "sample": todo[k]["sample"],
                   "critic": str(critic), "weights": weights, "dialogue": dialogue_hash(todo[k]),
                   "turns": credit_of_turns(tokenizer, todo[k], of_line, advantage)}
            rows.append(row)
            if path:
                append_jsonl(path, row)
        bar.update(len(batch))
    bar.close()
    return rows


def credit_of_turns(tokenizer, line: dict, outputs: list, advantage) -> list[dict]:
    """The "turns" of a row. outputs: (logps, ref_logps) of each tree of the line."""
    whole, *states = outputs
    messages = [message for message in line["dialogue_history"] if message["role"] == "assistant"]
    turns = []
    for message, logps, ref_logps in zip(messages, *whole):
        ends = token_ends(tokenizer, message["content"].strip())
        turn = {"advantage": rounded(advantage(logps, ref_logps)),
                "ratios": list(zip(ends, map(rounded, logps - ref_logps)))}
        if message.get("candidates"):
            texts = dict.fromkeys(message["candidates"])
            turn["candidates"] = [(text, rounded(advantage(*pair)))
                                  for text, pair in zip(texts, zip(*states.pop(0)))]
        turns.append(turn)
    return turns


def trees_of(tokenizer, line: dict, hidden_info: bool) -> list[Tree]:
    """The trees of an episode: the dialogue with its agent turns, then each state with candidates.

    hidden_info: whether the prompts hold c."""
    history = line["dialogue_history"]

    def prompt(i):
        messages = prompt_messages(line.get("system", ""), history[:i])
        if not hidden_info:
            return messages
        return with_hidden_info(messages, line["task"]["ground_truth"])

    trees, end_id = [dialogue_tree(tokenizer, prompt(len(history)))], end_of_turn(tokenizer)
    for i, message in enumerate(history):
        if message["role"] == "assistant" and message.get("candidates"):
            leaves = [message_ids(tokenizer, text, end_id)
                      for text in dict.fromkeys(message["candidates"])]
            trees.append(Tree(encode_dialogue(tokenizer, prompt(i))[0], [], leaves))
    return trees


def token_ends(tokenizer, content: str) -> list[int]:
    """Where each token of message_ids ends in `content`, in characters.

    The end-of-turn token ends where the last one does."""
    content = content.encode("utf-8", "replace").decode()  # as in message_ids
    encoded = tokenizer(content, add_special_tokens=False, split_special_tokens=True,
                        return_offsets_mapping=True)
    return [end for _, end in encoded["offset_mapping"]] + [len(content)]


def rounded(value) -> float:
    """To three digits."""
    return float(f"{float(value):.3g}")
