"""Two critics of the paper's comparisons that give one number per message, by a linear head.

`regression`  A_θ = head on the message's mean last hidden state, trained by (2) without NLL
`value`       the same head as success probability, trained by binary cross-entropy on every turn
"""
from pathlib import Path

import torch
import torch.nn.functional as F

from colbench.lm.logps import Tree, message_means

HEADS = ("regression", "value")


class ValueHead(torch.nn.Linear):
    """Stays in float32 under autocast: bfloat16 would tie candidates closer than 1 in 256."""

    def forward(self, mean: torch.Tensor) -> torch.Tensor:
        with torch.autocast(mean.device.type, enabled=False):
            return super().forward(mean.float())


def value_head(model, folder: str | Path | None = None) -> ValueHead:
    """A head that starts at 0, or the trained one in `folder`."""
    head = ValueHead(model.config.get_text_config().hidden_size, 1, device=model.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    if folder:
        path = Path(folder) / "value_head.pt"
        head.load_state_dict(torch.load(path, map_location=model.device, weights_only=True))
    return head


def message_values(model, trees: list[Tree]) -> list[list[torch.Tensor]]:
    """The head's number for every message: per tree a list over messages of scalars."""
    return [[model.value_head(mean)[0] for mean in means] for means in message_means(model, trees)]


def head_loss(critic: str, turns: list, pair: tuple, rewards: list[float], beta: float):
    """(loss, {name in the log: value}) for a pair of places; value critic: for one place.

    turns: per trajectory a list over turns of scalars."""
    if critic == "value":
        return value_loss(turns[pair[0]], rewards[pair[0]])
    chosen, rejected = pair
    return regression_loss(sum(turns[chosen]), sum(turns[rejected]), beta)


def regression_loss(chosen_score: torch.Tensor, rejected_score: torch.Tensor, beta: float):
    """(2) without NLL, for the scores Σ_t A of τ+ and τ−: (loss, {name in the log: value})."""
    margin = chosen_score - rejected_score
    loss = -F.logsigmoid(beta * margin)
    return loss, {"margin": margin, "rewards/accuracies": chosen_score > rejected_score,
                  "rewards/chosen": beta * chosen_score, "rewards/rejected": beta * rejected_score,
                  "rewards/margins": beta * margin}


def value_loss(values: list[torch.Tensor], reward: float):
    """Cross-entropy of V(o_t, a_t, c) at every turn t with the success of the whole trajectory."""
    values = torch.stack(values)
    success = torch.full_like(values, float(reward == 1))
    loss = F.binary_cross_entropy_with_logits(values, success)
    return loss, {"rewards/accuracies": ((values > 0) == (success > 0)).float().mean()}
