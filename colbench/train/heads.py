"""The linear head of the critics that give one number a message."""
from pathlib import Path

import torch


class ValueHead(torch.nn.Linear):
    """Stays in float32 under autocast: in bfloat16 candidates closer than a part in 256 would tie."""

    def forward(self, mean: torch.Tensor) -> torch.Tensor:
        with torch.autocast(mean.device.type, enabled=False):
            return super().forward(mean.float())


def value_head(model, folder: str | Path | None = None) -> ValueHead:
    """The head of the critics `regression` and `value` on a message's mean last hidden state; starts at 0."""
    head = ValueHead(model.config.get_text_config().hidden_size, 1, device=model.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    if folder:
        state = torch.load(Path(folder) / "value_head.pt", map_location=model.device, weights_only=True)
        head.load_state_dict(state)
    return head
