"""Which turn earned the credit: the critic's advantage of every agent turn of finished episodes, and of every token.

evaluate.py --critic RUN/critic calls `add_credit`; report.html shows it. One line an episode goes to
RUN/advantages.jsonl: {"policy", "id", "sample", "critic", "weights" and "dialogue" (hashes), "turns": [{"advantage",
"ratios": [[end, log-ratio], …], "candidates"?}, …]}. `end` is where the token ends in the message, in characters; the
mean of the log-ratios is the advantage, equation (1) of train_critic.py.
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
from colbench.train.ranking import mean_log_ratio


def add_credit(path, lines, critic, base, load_in_4bit, tokenizer, model=None) -> list[dict]:
    """Score, with the critic in folder `critic`, the agent turns of the episodes in `lines` that `path` lacks.

    path: advantages.jsonl; None: no file. Returns the new rows.
    base: name of the base model, π_ref. model: its weights, if they are in memory. Both π_θ and π_ref read c, the
    hidden reference, in the prompt, unless the critic was trained with --no-hidden-info; with --official π_θ alone
    does. Candidates of a turn (`candidates` in its message) are scored too. Interrupted, it goes on.
    """
    how = read_json(Path(critic) / "training_args.json")
    advantage = partial(mean_log_ratio, length_norm=not how.get("no_length_norm"))

    def without_c(messages, reference):
        return messages
    seen = without_c if how.get("no_hidden_info") else with_hidden_info

    weights = weights_of(Path(critic))
    name = lambda line: (weights, line["policy"], line["id"], line["sample"], dialogue_hash(line))  # noqa: E731
    named = {name(line): line for line in lines if "reward" in line}
    there = {(row.get("weights"), row["policy"], row["id"], row["sample"], row.get("dialogue")): row
             for row in (repair_jsonl(path, CREDIT) if path else [])}
    there = {key: row for key, row in there.items() if key in named}  # other weights or dialogues: made anew
    todo = [line for key, line in named.items() if key not in there]
    if not todo:
        return []
    critic_model = (put_adapter(model, str(critic)) if model is not None else
                    load_model(base, load_in_4bit, adapter=str(critic)))
    whole = not has_adapters(critic_model)  # after full fine-tuning π_ref is a model of its own
    reference = load_model(base, load_in_4bit) if whole else critic_model
    trees = [trees_of(tokenizer, line, seen) for line in todo]
    ref_trees = [trees_of(tokenizer, line, without_c) for line in todo] if how.get("official") else trees
    if path:
        write_aside(path, lambda temporary: [
            temporary.touch(), *(append_jsonl(temporary, row) for row in there.values())])
    rows, bar = [], tqdm(total=len(todo), desc="credit", unit="episode")
    for group in pack([sum(map(tree_tokens, of_line)) for of_line in trees], how.get("tokens_per_step", 1024)):
        with torch.no_grad(), adapters_in_half(critic_model):
            logps = message_logps(critic_model, [tree for k in group for tree in trees[k]])
            with adapters_off(reference):
                ref_logps = message_logps(reference, [tree for k in group for tree in ref_trees[k]])
        scored = zip(logps, ref_logps)
        for k in group:
            line, (turns, states) = todo[k], (next(scored), [next(scored) for _ in trees[k][1:]])
            row = {"policy": line["policy"], "id": line["id"], "sample": line["sample"], "critic": str(critic),
                   "weights": weights, "dialogue": dialogue_hash(line), "turns": []}
            own = [message for message in line["dialogue_history"] if message["role"] == "assistant"]
            for message, theta, ref in zip(own, *turns):
                ends = token_ends(tokenizer, message["content"].strip())
                turn = {"advantage": rounded(advantage(theta, ref)),
                        "ratios": list(zip(ends, map(rounded, theta - ref)))}
                if message.get("candidates"):
                    texts = dict.fromkeys(message["candidates"])
                    turn["candidates"] = [(text, rounded(advantage(*both)))
                                          for text, both in zip(texts, zip(*states.pop(0)))]
                row["turns"].append(turn)
            rows.append(row)
            if path:
                append_jsonl(path, row)
        bar.update(len(group))
    bar.close()
    return rows


def trees_of(tokenizer, line, seen) -> list[Tree]:
    """The trees of an episode, its prompts as `seen`(messages, reference) by the critic.

    The dialogue with its agent turns, then each state that has candidates.
    """
    history, reference = line["dialogue_history"], line["task"]["ground_truth"]

    def prompt(i):
        return seen(prompt_messages(line.get("system", ""), history[:i]), reference)
    trees, end_id = [dialogue_tree(tokenizer, prompt(len(history)))], end_of_turn(tokenizer)
    for i, message in enumerate(history):
        if message["role"] == "assistant" and message.get("candidates"):
            leaves = [message_ids(tokenizer, text, end_id) for text in dict.fromkeys(message["candidates"])]
            trees.append(Tree(encode_dialogue(tokenizer, prompt(i))[0], [], leaves))
    return trees


def token_ends(tokenizer, content: str) -> list[int]:
    """Where each token of message_ids ends in `content`, in characters; the end-of-turn token ends behind the last."""
    content = content.encode("utf-8", "replace").decode()  # as in message_ids
    encoded = tokenizer(content, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    return [end for _, end in encoded["offset_mapping"]] + [len(content)]


def rounded(value) -> float:
    """To three digits."""
    return float(f"{float(value):.3g}")
