"""Messages from a model in this process: each prompt is computed once, rows leave the batch when they are done, and a message
depends on its own seed alone."""

import contextlib

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from colbench.model import adapters_off, encode_dialogue, end_of_turn
from colbench.server import Reply


class LocalChat:
    """Samples messages from a model in this process. Same interface as colbench.server.ServerChat.

    adapters: False samples from the base model under a PEFT model's adapters.
    batch_tokens: bound on rows x (prompt + new tokens) in one batch; lower it when memory runs out.
    repeatable: equal calls give equal messages on one machine.
    """

    repeatable = True

    def __init__(self, model, tokenizer, adapters: bool = True, batch_tokens: int = 65536):
        self.model, self.tokenizer, self.adapters, self.batch_tokens = model, tokenizer, adapters, batch_tokens
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", 8192)
        stops = model.generation_config.eos_token_id
        self.stops = {end_of_turn(tokenizer), *(stops if isinstance(stops, list) else [] if stops is None else [stops])}

    def sample(self, conversations, seeds, temperature=1.0, max_new_tokens=1024, stop=None):
        """One message per seed for each conversation: list of lists of Reply(text, tokens), or an Exception in its place.

        A message depends on its conversation and seed, not on what else is in the batch (but for rounding in the last bit).
        temperature 0 takes the likeliest token. A prompt that leaves no room in the model's context gives exceptions.
        """
        replies, jobs = [[None] * len(row) for row in seeds], []
        for i, messages in enumerate(conversations):
            prompt, _ = encode_dialogue(self.tokenizer, messages)
            room = min(max_new_tokens, self.context - len(prompt))
            if room < 1:
                error = RuntimeError(f"context full: {len(prompt)} tokens of {self.context}")
                replies[i] = [error] * len(seeds[i])
            else:
                jobs += [(prompt, room, i, j) for j in range(len(seeds[i]))]
        jobs.sort(key=lambda job: (len(job[0]), job[2], job[3]))
        while jobs:
            rows = 1
            while rows < len(jobs) and (rows + 1) * (len(jobs[rows][0]) + jobs[rows][1]) <= self.batch_tokens:
                rows += 1
            batch, jobs = jobs[:rows], jobs[rows:]
            for (_, _, i, j), ids in zip(batch, self._generate(batch, seeds, temperature)):
                text = self.tokenizer.decode([t for t in ids if t not in self.stops], skip_special_tokens=True,
                                             clean_up_tokenization_spaces=False)  # Llama-3.1's setting would edit code
                for mark in stop or ():
                    text = text.split(mark)[0]
                replies[i][j] = Reply(text.strip(), len(ids))
        return replies

    @torch.inference_mode()
    def _generate(self, batch, seeds, temperature) -> list[list[int]]:
        """Token ids of one message per job (prompt, room, i, j). Each distinct prompt is computed once; rows leave when done."""
        device = self.model.device
        prompts = list({i: prompt for prompt, _, i, _ in batch}.items())
        width = max(len(prompt) for _, prompt in prompts)
        ids = torch.tensor([[0] * (width - len(p)) + p for _, p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for _, p in prompts], device=device)
        steps = max(room for _, room, _, _ in batch)
        # one uniform number per token, from the row's own seed
        uniforms = torch.stack([
            torch.rand(steps, generator=torch.Generator().manual_seed(seeds[i][j]), dtype=torch.float64) for _, _, i, j in batch
        ]).to(device)
        cache = DynamicCache(config=self.model.config)
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        with adapters_off(self.model) if not self.adapters else contextlib.nullcontext():
            out = self.model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                             past_key_values=cache, use_cache=True, logits_to_keep=1)
            index = {i: row for row, (i, _) in enumerate(prompts)}
            rows = torch.tensor([index[i] for _, _, i, _ in batch], device=device)
            logits = out.logits[rows, -1]
            cache.batch_select_indices(rows)
            mask, messages, live = mask[rows], [[] for _ in batch], list(range(len(batch)))
            for step in range(steps):
                token = _draw(logits, uniforms[live, step], temperature)
                for row, value in zip(live, token.tolist()):
                    messages[row].append(value)
                keep = [k for k, row in enumerate(live)
                        if messages[row][-1] not in self.stops and len(messages[row]) < batch[row][1]]
                if not keep:
                    break
                if len(keep) < len(live):
                    live = [live[k] for k in keep]
                    keep = torch.tensor(keep, device=device)
                    token, mask = token[keep], mask[keep]
                    cache.batch_select_indices(keep)
                mask = F.pad(mask, (0, 1), value=1)
                out = self.model(input_ids=token[:, None], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                                 past_key_values=cache, use_cache=True)
                logits = out.logits[:, -1]
        return messages


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer with room for the next tokens: DynamicLayer copies all of them for every new token."""

    room = None  # (rows, heads, capacity, head size) each for keys and values

    def update(self, key_states, value_states, *args, **kwargs):
        n, m = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        if not n:
            super().update(key_states, value_states, *args, **kwargs)  # sets keys and values, and the layer's dtype and device
        if self.room is None or self.room[0].shape[2] < m:
            self.room = [F.pad(old, (0, 0, 0, m + m // 8 + 32 - old.shape[2])) for old in (self.keys, self.values)]
        if n:
            for room, new in zip(self.room, (key_states, value_states)):
                room[:, :, n:m] = new
        self._show(m)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        self.room = [room.index_select(0, indices) for room in self.room]
        self._show(self.get_seq_length())

    def _show(self, n: int) -> None:
        self.keys, self.values = (room[:, :, :n] for room in self.room)


def _draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
    """Next token of each row by inverting the cumulative distribution. logits (rows, vocabulary), uniform (rows,) in [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.float() / temperature).softmax(-1).double().cumsum(-1)
    token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)
