"""Best-of-N per turn: a critic chooses which of N sampled messages is played (evaluate.py)."""
from pathlib import Path

import torch

from colbench.lm.adapters import adapters_in_half, adapters_off, has_adapters
from colbench.lm.load import context_length
from colbench.lm.logps import message_logps
from colbench.run.errors import UserError
from colbench.run.settings import read_json
from colbench.train.critics import UNTRAINED, logprob_scores, other_scores
from colbench.train.heads import value_head
from colbench.train.judges import rollout_scores


def make_chooser(args, agents, environment):
    """states -> the number of the candidate that --critic prefers, for `play`.

    args: flags of evaluate.py. Call it before `agents.agent`: the critic's adapters may go on the
    base model, too. The policy's adapters are active again after each choice.
    """
    kind, trained_with, critic = args.critic, {}, None
    if args.critic not in UNTRAINED:
        trained_with = read_json(Path(args.critic) / "training_args.json")
        kind = trained_with.get("critic", "logprob")
        if trained_with.get("vision_critic"):
            raise UserError(f"--critic {args.critic}: sees pictures; only train_critic.py ranks "
                            "with it")
        critic = agents.load(args.critic)
        if (Path(args.critic) / "value_head.pt").exists():
            critic.value_head = value_head(critic, args.critic)
    critic_adapter = critic.active_adapter if has_adapters(critic) else None
    limits = dict(max_tokens=context_length(args.model),
                  tokens_per_step=trained_with.get("tokens_per_step", args.tokens_per_step))
    hidden_info = not trained_with.get("no_hidden_info")

    def base_logps(trees):  # log π_ref
        with torch.no_grad(), adapters_off(agents.model):
            return message_logps(agents.model, trees)

    def score(states):
        model = critic or agents.model
        if kind == "rollout":
            return rollout_scores(states, agents.tokenizer, agents.model, environment, args.human,
                                  args.max_new_tokens, args.batch_tokens, args.seed)
        if kind == "logprob":
            return logprob_scores(states, agents.tokenizer, model, base_logps, **limits,
                                  hidden_info=hidden_info,
                                  length_norm=not trained_with.get("no_length_norm"),
                                  ref_hidden_info=not trained_with.get("official"))
        return other_scores(kind, states, agents.tokenizer, model, base_logps, **limits,
                            hidden_info=hidden_info, seed=args.seed)

    def choose(states: list[dict]) -> list[int]:
        shared = agents.model
        policy_adapter = shared.active_adapter if has_adapters(shared) else None
        if critic_adapter:
            shared.set_adapter(critic_adapter)
        with adapters_in_half(shared):
            scores = score(states)
        if policy_adapter:
            shared.set_adapter(policy_adapter)
        # a state that is too long has no scores
        return [max(range(len(row)), key=row.__getitem__) if row else 0 for row in scores]
    return choose


def check_critic(args) -> None:
    """UserError if evaluate.py cannot use its --critic, or needs one."""
    folder = args.critic if args.critic not in UNTRAINED else None
    names = "config.json", "adapter_config.json"
    if args.best_of > 1 and not args.critic:
        raise UserError("--best-of needs --critic: a folder written by train_critic.py, "
                        "untrained, random, judge or rollout")
    if args.critic in UNTRAINED and args.best_of == 1:
        raise UserError(f"--critic {args.critic} needs --best-of, as in --best-of 16")
    if folder and not any((Path(folder) / name).exists() for name in names):
        raise UserError(f"--critic {folder}: no trained critic here; run train_critic.py first")
    if not folder or args.best_of > 1:
        return
    if args.shard[1] > 1:
        raise UserError("--critic for the report needs all episodes: concatenate the shards, then "
                        "repeat the command without --shard")
    if (Path(folder) / "value_head.pt").exists():
        raise UserError(f"--critic {folder}: its head gives one number per message, but the report "
                        "shows log-ratios of tokens; add --best-of 16, or use a critic trained "
                        "with --critic logprob")
