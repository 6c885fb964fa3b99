"""Critics that rank candidates: a trained one that evaluate.py or the report asks, and all others.

Every function here returns the advantage of each candidate of each state: a list over states of
lists of floats, [] for a state that is too long. A state: {"id", "sample", "turn", "max_turns",
"messages", "candidates", "task"}. base_logps: message_logps under the base model (π_ref).
"""
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch

from colbench.env.flags import played_with, refuse_unused
from colbench.env.hidden_info import with_hidden_info
from colbench.lm.logps import candidate_trees, message_logps, pack, tree_tokens
from colbench.run.errors import UserError
from colbench.run.files import seed_of
from colbench.train.heads import HEADS, message_values
from colbench.train.judges import judge_scores, rollout_scores

TRAINED = ("logprob", *HEADS)
UNTRAINED = ("untrained", "random", "judge", "rollout")


def mean_log_ratio(logps: torch.Tensor, ref_logps: torch.Tensor, length_norm: bool = True):
    """(1), a copy of `advantage` in train_critic.py for finished critics: change both together."""
    if not length_norm:
        return (logps - ref_logps).sum()
    return (logps - ref_logps).mean()


def per_candidate(forward, tokenizer, prompts: list[list[dict]], candidates: list[list[str]],
                  max_tokens: int, tokens_per_step: int) -> list[list]:
    """What `forward` gives for every candidate after its prompt: a list over states of lists.

    forward: trees -> per tree a list over messages, as message_logps. A state with a candidate that
    ends beyond max_tokens gets []."""
    states = list(zip(prompts, candidates))
    numbered_trees = candidate_trees(tokenizer, states, max_tokens, tokens_per_step)
    outputs = [[] for _ in states]
    for batch in pack([tree_tokens(tree) for _, tree in numbered_trees], tokens_per_step):
        for k, messages in zip(batch, forward([numbered_trees[k][1] for k in batch])):
            outputs[numbered_trees[k][0]] += messages
    return outputs


def prompts_of(states: list[dict], hidden_info: bool) -> list[list[dict]]:
    """The dialogue at each state, with c if the critic may see it."""
    if not hidden_info:
        return [state["messages"] for state in states]
    return [with_hidden_info(state["messages"], state["task"]["ground_truth"]) for state in states]


@torch.no_grad()
def logprob_scores(states: list[dict], tokenizer, model, base_logps, *, max_tokens: int,
                   tokens_per_step: int, hidden_info: bool = True, length_norm: bool = True,
                   ref_hidden_info: bool = True) -> list[list[float]]:
    """The paper's critic, as train_critic.py ranks with it.

    ref_hidden_info: whether π_ref reads c too; the released code's does not."""
    per = partial(per_candidate, tokenizer=tokenizer, max_tokens=max_tokens,
                  candidates=[state["candidates"] for state in states],
                  tokens_per_step=tokens_per_step)
    logps = per(partial(message_logps, model), prompts=prompts_of(states, hidden_info))
    ref_logps = per(base_logps, prompts=prompts_of(states, hidden_info and ref_hidden_info))
    return [[mean_log_ratio(*pair, length_norm).item() for pair in zip(*of_state)]
            for of_state in zip(logps, ref_logps)]


@torch.no_grad()
def other_scores(critic: str, states: list[dict], tokenizer, model, base_logps, *, max_tokens: int,
                 tokens_per_step: int, hidden_info: bool = True,
                 seed: int = 0) -> list[list[float]]:
    """`untrained`, `random`, `judge`, `regression` and `value`."""
    candidates = [state["candidates"] for state in states]
    with_c, without_c = prompts_of(states, True), prompts_of(states, False)
    per = partial(per_candidate, tokenizer=tokenizer, candidates=candidates, max_tokens=max_tokens,
                  tokens_per_step=tokens_per_step)
    if critic == "random":  # a control: what the policy stage does without a critic
        return [[seed_of(seed, *state_key(state), k, "random critic") / 2**63
                 for k in range(len(state["candidates"]))] for state in states]
    if critic == "judge":
        prompts = prompts_of(states, hidden_info)
        return judge_scores(base_logps, tokenizer, prompts, candidates, tokens_per_step)
    if critic == "untrained":  # log-ratio of the base model with c to itself without
        logps, base = per(base_logps, prompts=with_c), per(base_logps, prompts=without_c)
        return [[mean_log_ratio(*pair).item() for pair in zip(*of_state)]
                for of_state in zip(logps, base)]
    values = per(partial(message_values, model), prompts=prompts_of(states, hidden_info))
    return [[value.item() for value in of_state] for of_state in values]


@contextmanager
def other_critic(args, environment, tokenizer, model, base_logps):
    """states -> their scores by --critic, if it is not the paper's.

    A context, because rollouts need their environment. They play as the trajectories were played.
    """
    if args.critic != "rollout":
        yield partial(other_scores, args.critic, tokenizer=tokenizer, model=model,
                      base_logps=base_logps, max_tokens=args.max_tokens, seed=args.seed,
                      tokens_per_step=args.tokens_per_step, hidden_info=not args.no_hidden_info)
        return
    played = SimpleNamespace(**played_with(args, environment) | vars(args))
    with environment(played, args.run) as playing:
        yield partial(rollout_scores, tokenizer=tokenizer, model=model, environment=playing,
                      human=played.human, max_new_tokens=played.max_new_tokens,
                      batch_tokens=played.batch_tokens, seed=args.seed)


def check_critic_flags(args, given: set[str], environment) -> None:
    """UserError for flags of train_critic.py that have no effect or contradict each other."""
    args.vision_critic = getattr(args, "vision_critic", None)  # Frontend Design's own flag
    unused = ""
    if args.critic != "logprob":
        unused += " no_length_norm official nll_weight"
    if args.critic == "value":
        unused += " beta pairs_per_task"
    if args.critic in UNTRAINED:
        unused += " lora_rank beta pairs_per_task learning_rate epochs batch_size save_every"
    if args.critic in ("untrained", "random", "rollout"):
        unused += " no_hidden_info"
    refuse_unused(given, f"--critic {args.critic}", unused)
    if args.official:
        refuse_unused(given, "--official", "no_length_norm nll_weight")
    if not environment.has_success and (args.critic == "value" or args.official):
        raise UserError("--critic value and --official need answers that can be entirely right; "
                        f"--env {args.env} has none")
    if args.vision_critic:
        refuse_unused(given, "--vision-critic", "model no_hidden_info tokens_per_step max_tokens")
        if args.critic != "regression":
            raise UserError("--vision-critic needs --critic regression")


def state_key(row: dict) -> tuple:
    """(id, sample, turn) of a state."""
    return row["id"], row["sample"], row["turn"]
