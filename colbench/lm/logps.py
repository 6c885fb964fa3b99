"""Log-probs of messages that share their prompt, in one forward pass. Losses are in the scripts."""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from colbench.lm.adapters import base_of
from colbench.lm.attention import attention_masks
from colbench.lm.tokens import encode_dialogue, end_of_turn, message_ids
from colbench.run.errors import UserError

LOGITS_AT_ONCE = 2**26  # 256 MB in float32, 523 positions of a 128k vocabulary


class Tree(NamedTuple):
    """Messages that share their prompt.

    `spans` [start, end) are messages inside the trunk; each leaf follows the whole trunk.
    A trajectory is a trunk with its agent turns as spans. A state with candidates is a trunk
    without spans and the candidates as leaves, so its prompt is computed once.
    """

    trunk: list[int]
    spans: list[tuple[int, int]]
    leaves: list[list[int]]


def tree_tokens(tree: Tree) -> int:
    """Tokens of a tree in a forward pass."""
    trunk, _, leaves = tree
    return len(trunk) + sum(len(leaf) for leaf in leaves)


def dialogue_tree(tokenizer, messages: list[dict]) -> Tree:
    """The tree of a whole dialogue: the agent's messages are the spans."""
    return Tree(*encode_dialogue(tokenizer, messages), [])


def message_logps(model, trees: list[Tree]) -> list[list[torch.Tensor]]:
    """Log-probs of every message's tokens, in one forward pass; differentiable.

    Returns per tree a list of (tokens in the message,) float32 tensors: spans first, then leaves.
    """
    hidden, _, predict, lengths = _last_layer(model, trees)
    base, hidden = base_of(model), hidden[predict]  # (tokens of all messages, hidden size)
    targets = [token for trunk, spans, leaves in trees
               for message in [*(trunk[a:b] for a, b in spans), *leaves] for token in message]
    chunk = max(1, LOGITS_AT_ONCE // base.get_output_embeddings().out_features)
    parts = zip(hidden.split(chunk), torch.tensor(targets, device=base.device).split(chunk))
    if any(p.requires_grad for p in base.get_output_embeddings().parameters()):
        logps = torch.cat([checkpoint(_token_logps, base, *part, use_reentrant=False)
                           for part in parts])
    else:
        logps = torch.cat([_FrozenHead.apply(base, *part) for part in parts])
    per_message = iter(logps.split(lengths))
    return [[next(per_message) for _ in range(len(spans) + len(leaves))]
            for _, spans, leaves in trees]


@torch.no_grad()
def check_model(model) -> None:
    """UserError if a message's log-probs depend on the other dialogues in the row.

    They may differ from those of the message alone (the model ignores positions or the mask), or
    change with its neighbours (layers that carry a state).
    """
    config = model.config.get_text_config()
    kinds = {"conv", "linear_attention", "mamba"} & {*(getattr(config, "layer_types", None) or ())}
    if kinds or getattr(model, "_is_stateful", False):
        raise UserError("layers that carry a state from token to token are not supported (a "
                        "message's log-probs would depend on what precedes it in the row); "
                        "choose a model with attention layers only")
    generator = torch.Generator().manual_seed(0)
    first, trunk, leaf, sibling, other_first, other_sibling = (
        torch.randint(config.vocab_size, (n,), generator=generator).tolist()
        for n in (17, 11, 5, 7, 17, 7))

    def among(first, sibling):
        """Log-probs of the span and the leaf, next to these neighbours."""
        trees = [Tree(first, [], []), Tree(trunk, [(4, 9)], [sibling, leaf])]
        return torch.cat(message_logps(model, trees)[1][::2])

    ids = torch.tensor(trunk + leaf, device=model.device)
    try:
        packed = among(first, sibling)
        moved = among(other_first, other_sibling)
        logps = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError,
            ValueError) as error:
        raise UserError("its layers do not take several dialogues in one row, so messages have no "
                        f"log-probs ({' '.join(str(error).split())[:150]}); "
                        "choose a model with attention layers only") from None
    places = torch.tensor([*range(4, 9), *range(11, 16)], device=model.device)
    alone = logps[places - 1, ids[places]]
    limits = (1e-5, 1e-3) if model.dtype == torch.float32 else (0.05, 0.5)
    for when, others, limit in (("when its neighbours in the row change", moved, limits[0]),
                                ("next to others than alone", alone, limits[1])):
        difference = (packed - others).abs().max()
        if not difference < limit:  # NaN is refused too
            raise UserError(f"a message has different log-probs {when} (by {difference:.2g} nats), "
                            "which is not supported; choose a model with attention layers only")


def message_means(model, trees: list[Tree]) -> list[list[torch.Tensor]]:
    """Like message_logps, but the mean of the last layer's output: (hidden size,) float32."""
    hidden, places, _, lengths = _last_layer(model, trees)
    per_message = iter(hidden[places].float().split(lengths))
    return [[next(per_message).mean(0) for _ in range(len(spans) + len(leaves))]
            for _, spans, leaves in trees]


def _last_layer(model, trees: list[Tree]):
    """All trees in one row, without padding, through the decoder.

    Returns (last layer's output (tokens, hidden size), places of the messages' tokens, places one
    before them, messages' lengths). Attention mask and restarted positions let a token see its own
    tree's trunk and its own leaf, up to itself.
    """
    ids, positions, tree_of, leaf_of, places, predict, lengths = [], [], [], [], [], [], []
    for t, (trunk, spans, leaves) in enumerate(trees):
        offset = len(ids)
        ids += trunk
        positions += range(len(trunk))
        tree_of += [t] * len(trunk)
        leaf_of += [-1] * len(trunk)
        for start, end in spans:
            places += range(offset + start, offset + end)
            predict += range(offset + start - 1, offset + end - 1)  # one place before each token
            lengths.append(end - start)
        for k, leaf in enumerate(leaves):
            places += range(len(ids), len(ids) + len(leaf))
            predict += [offset + len(trunk) - 1, *range(len(ids), len(ids) + len(leaf) - 1)]
            lengths.append(len(leaf))
            ids += leaf
            positions += range(len(trunk), len(trunk) + len(leaf))
            tree_of += [t] * len(leaf)
            leaf_of += [k] * len(leaf)
    base = base_of(model)
    device = base.device
    place = torch.arange(len(ids), device=device)
    tree, leaf = torch.tensor([tree_of, leaf_of], device=device)
    position = torch.tensor(positions, device=device)
    same_leaf = (leaf == -1) | (leaf[:, None] == leaf)
    visible = (tree[:, None] == tree) & same_leaf & (place[:, None] >= place)  # (query, key)
    sizes = [(len(trunk), sum(map(len, leaves))) for trunk, _, leaves in trees]
    mask = attention_masks(base, visible[None], lambda: (position[:, None] - position)[None], sizes)
    hidden = base.get_decoder()(
        input_ids=torch.tensor([ids], device=device), position_ids=position[None],
        attention_mask=mask, use_cache=False).last_hidden_state[0]
    places = torch.tensor(places, device=device)
    predict = torch.tensor(predict, device=device)
    return hidden, places, predict, lengths


def _token_logps(base, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probs (n,) float32 of targets (n,) given the last layer's output (n, hidden size).

    Under `checkpoint` the logits (n, vocabulary) are dropped after the forward pass and recomputed,
    chunk by chunk, in the backward pass.
    """
    return -F.cross_entropy(logits_of(base, hidden), targets, reduction="none")


class _FrozenHead(torch.autograd.Function):
    """_token_logps for a head that is not trained.

    A token's log-prob depends only on its own row h of `hidden`, so its gradient is the incoming
    number times ∂ log p / ∂h = (onehot − softmax) W. That is computed along with the logits:
    nothing is computed twice, and only (n, hidden size) is kept.
    """

    @staticmethod
    def forward(ctx, base, hidden, targets):
        with torch.set_grad_enabled(ctx.needs_input_grad[1]):
            hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[1])
            logits = logits_of(base, hidden)
        slope = logits.detach()
        total = slope.logsumexp(-1, keepdim=True)
        logps = slope.gather(-1, targets[:, None]) - total
        if ctx.needs_input_grad[1]:
            slope.sub_(total).exp_().neg_()  # −softmax, in the logits' memory
            slope.scatter_add_(-1, targets[:, None], torch.ones_like(total))
            ctx.save_for_backward(*torch.autograd.grad(logits, hidden, slope))
        return logps[:, 0]

    @staticmethod
    def backward(ctx, gradient):
        [slope] = ctx.saved_tensors
        return None, (gradient[:, None] * slope).to(slope.dtype), None


def logits_of(base, hidden: torch.Tensor) -> torch.Tensor:
    """Logits for rows of the last layer's output: (n, hidden size) -> (n, vocabulary) float32."""
    config = base.config.get_text_config()
    logits = base.get_output_embeddings()(hidden).float()
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    if scale != 1:  # Cohere; Granite
        logits = logits * scale
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = cap * torch.tanh(logits / cap)
    return logits


def pack(sizes: list[int], budget: int) -> list[list[int]]:
    """Indices in order, in groups of total size at most `budget` (a larger item is alone)."""
    groups, left = [], 0
    for index, size in enumerate(sizes):
        if not groups or size > left:
            groups.append([])
            left = budget
        groups[-1].append(index)
        left -= size
    return groups


def candidate_trees(tokenizer, states: list[tuple[list[dict], list[str]]], max_tokens: int,
                    budget: int) -> list[tuple[int, Tree]]:
    """[(index of the state, tree)] for states (messages, candidates); candidates are the leaves.

    A state of more than `budget` tokens becomes several trees; one with a candidate that passes
    max_tokens has none.
    """
    trees = []
    end_id = end_of_turn(tokenizer)
    for number, (messages, candidates) in enumerate(states):
        prompt, _ = encode_dialogue(tokenizer, messages)
        leaves = [message_ids(tokenizer, text, end_id) for text in candidates]
        if len(prompt) + max(map(len, leaves)) <= max_tokens:
            for part in pack([len(leaf) for leaf in leaves], max(1, budget - len(prompt))):
                trees.append((number, Tree(prompt, [], [leaves[k] for k in part])))
    return trees
