"""Messages from a model in this process.

Each prompt is computed and held once however many messages are drawn from it, what is done leaves the batch, and a
message depends on its own seed alone.
"""
import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from colbench.lm.adapters import adapters_in_half, adapters_off, base_of
from colbench.lm.attention import attention_masks
from colbench.lm.load import reach
from colbench.lm.logps import logits_of
from colbench.lm.texts import OnlyThoughts, Reply, clean, decoded, spent_on
from colbench.lm.tokens import encode_dialogue, end_of_turn
from colbench.run.files import seed_of

PROMPT, PADDING = -1, -2  # owners of a row's tokens that belong to no message
LIKELY = 0.25  # of the tokens that a message may have: few have more


class LocalChat:
    """Samples messages from a model in this process. Same interface as colbench.lm.server.ServerChat.

    adapters: False samples from the base model under a PEFT model's adapters.
    batch_tokens: bound on the tokens held at once, prompts and what is said; lower it when memory runs out.
    repeatable: equal calls give equal messages on one machine.
    """

    repeatable = True

    def __init__(self, model, tokenizer, adapters: bool = True, batch_tokens: int = 65536):
        self.model, self.tokenizer, self.adapters, self.batch_tokens = model, tokenizer, adapters, batch_tokens
        self.context = reach(model.config.get_text_config())
        stops = model.generation_config.eos_token_id
        self.stops = {end_of_turn(tokenizer), *(stops if isinstance(stops, list) else [] if stops is None else [stops])}

    def sample(self, conversations, seeds, temperature=1.0, max_new_tokens=1024, stop=None, again=True):
        """One message per seed of each dialogue: list of lists of Reply, or an Exception in its place.

        A message depends on its conversation and seed, not on what else is in the batch (but for rounding in the last
        bit). temperature 0 takes the likeliest token. A prompt that leaves no room in the model's context gives
        exceptions, and so does a message that is all thoughts, sampled `again` with another seed.
        """
        replies, jobs = [[None] * len(row) for row in seeds], []
        for i, messages in enumerate(conversations):
            prompt, _ = encode_dialogue(self.tokenizer, messages)
            room = min(max_new_tokens, self.context - len(prompt))
            if room < 1:
                error = RuntimeError(f"context full: {len(prompt)} tokens of {self.context}")
                replies[i] = [error] * len(seeds[i])
                continue
            at_once = max(1, (self.batch_tokens - len(prompt)) // room)
            for j in range(0, len(seeds[i]), at_once):
                jobs.append((prompt, room, seeds[i][j:j + at_once], i, j))
        jobs.sort(key=lambda job: (len(job[2]), len(job[0]), job[3:]))
        while jobs:  # rows with equally many messages share a batch
            rows, n = 1, len(jobs[0][2])
            while (rows < len(jobs) and len(jobs[rows][2]) == n
                   and (rows + 1) * (len(jobs[rows][0]) + n * LIKELY * jobs[rows][1]) <= self.batch_tokens):
                rows += 1
            batch, jobs = jobs[:rows], jobs[rows:]
            found = self._generate([job[:3] for job in batch], temperature)
            jobs = [job for job, messages in zip(batch, found) if messages is None] + jobs
            for (prompt, *_, i, j), messages in zip(batch, found):
                for k, ids in enumerate(messages or (), j):
                    text = decoded(self.tokenizer, [t for t in ids if t not in self.stops])
                    for mark in stop or ():
                        text = text.split(mark)[0]
                    text, thoughts = clean(text)
                    spent = len(prompt), len(ids)
                    replies[i][k] = Reply(text.strip(), len(ids), thoughts, spent, ids[-1] not in self.stops)
                    if thoughts and not text.strip():
                        replies[i][k] = OnlyThoughts(
                            f"a reply without text, {len(ids)} tokens that are all thoughts", spent)
        # as ServerChat does it
        silent = [(i, k) for i, row in enumerate(replies) for k, one in enumerate(row) if isinstance(one, OnlyThoughts)]
        if silent and again:
            other_seeds = [[seed_of(seeds[i][k], "again")] for i, k in silent]
            others = self.sample([conversations[i] for i, _ in silent], other_seeds, temperature, max_new_tokens, stop,
                                 again=False)
            for (i, k), [other] in zip(silent, others):
                spent = spent_on(replies[i][k], other)
                replies[i][k] = (OnlyThoughts(f"{other}, twice", spent) if isinstance(other, OnlyThoughts) else
                                 other._replace(spent=spent))
        return replies

    @torch.inference_mode()
    def _generate(self, batch, temperature) -> list[list[list[int]] | None]:
        """Token ids of one message per seed for every job (prompt, tokens a message may have, seeds); None for a job
        that is put back: where more is said than was likely, the later half of the rows leaves, to be sampled anew.

        A row of the batch is a prompt. Behind it, in the same cache, come the tokens of its messages, at each step one
        of every message that goes on, side by side. A message sees the prompt and the tokens that are its own: `owner`
        says whose each is.
        """
        base, device = base_of(self.model), self.model.device
        width = max(len(prompt) for prompt, _, _ in batch)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _, _ in batch], device=device)
        owner = torch.tensor([[PADDING] * (width - len(prompt)) + [PROMPT] * len(prompt) for prompt, _, _ in batch],
                             device=device)
        position = ((owner == PROMPT).cumsum(1) - 1).clamp(min=0)  # (rows, tokens so far), as `owner`
        messages = [[[] for _ in seeds] for _, _, seeds in batch]
        live = [(row, k) for row, (_, _, seeds) in enumerate(batch) for k in range(len(seeds))]
        rows, steps = list(range(len(batch))), max(room for _, room, _ in batch)
        # one uniform number per token, from the message's own seed
        uniforms = torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                                for _, _, seeds in batch for seed in seeds]).to(device)
        cache = DynamicCache()
        cache.layers = [RoomyLayer() for _ in range(base.config.get_text_config().num_hidden_layers)]
        with adapters_in_half(self.model) if self.adapters else adapters_off(self.model):
            hidden = base.get_decoder()(input_ids=ids, attention_mask=(owner == PROMPT).long(), position_ids=position,
                                        past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            logits = logits_of(base, hidden)[[row for row, _ in live]]
            for step in range(steps):
                token = _draw(logits, uniforms[:, step], temperature)
                for (row, k), value in zip(live, token.tolist()):
                    messages[row][k].append(value)
                keep = [i for i, (row, k) in enumerate(live)
                        if messages[row][k][-1] not in self.stops and len(messages[row][k]) < batch[row][1]]
                if not keep:
                    break
                going = sorted({live[i][0] for i in keep})
                if len(going) > 1 and len(going) * (owner.shape[1] + len(batch[0][2])) > self.batch_tokens:
                    for row in going[len(going) // 2:]:
                        messages[row] = None
                    going = going[:len(going) // 2]
                    keep = [i for i in keep if live[i][0] in going]
                if len(keep) < len(live) or not step:
                    live, keep = [live[i] for i in keep], torch.tensor(keep, device=device)
                    token, uniforms = token[keep], uniforms[keep]
                    if len(going) < len(rows):
                        going_on = torch.tensor([rows.index(row) for row in going], device=device)
                        cache.batch_select_indices(going_on)
                        rows, owner, position = going, owner[going_on], position[going_on]
                    place, column, query = _columns(rows, live, device)
                    start = position[:, width - 1:width] + 1  # (rows, 1), tokens of each prompt
                ids = torch.zeros_like(query)
                ids[place, column] = token
                now = (start + step).expand_as(query)
                owner, position = torch.cat([owner, query], 1), torch.cat([position, now], 1)
                visible = (owner[:, None] == PROMPT) | (owner[:, None] == query[:, :, None])  # (rows, queries, keys)
                mask = attention_masks(base, visible, lambda: now[:, :, None] - position[:, None])
                hidden = base.get_decoder()(input_ids=ids, attention_mask=mask, position_ids=now, past_key_values=cache,
                                            use_cache=True).last_hidden_state
                logits = logits_of(base, hidden[place, column])
        return messages


def _columns(rows: list[int], live: list[tuple[int, int]], device):
    """Where the next token of each live message (row, number) stands.

    Its place among `rows`, its column, and (rows, columns) with the owner of each, PADDING where a row has fewer
    messages than another.
    """
    used, where, order = dict.fromkeys(rows, 0), [], {row: place for place, row in enumerate(rows)}
    for row, _ in live:
        where.append((order[row], used[row]))
        used[row] += 1
    place, column = torch.tensor(where, device=device).T
    query = torch.full((len(rows), max(used.values())), PADDING, device=device)
    query[place, column] = torch.tensor([k for _, k in live], device=device)
    return place, column, query


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer with room for the next tokens: DynamicLayer copies all of them for each token."""

    room = None  # (rows, heads, capacity, head size) each for keys and values

    def update(self, key_states, value_states, *args, **kwargs):
        n, m = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        if not n:
            # sets keys and values, and the layer's dtype and device
            super().update(key_states, value_states, *args, **kwargs)
        if self.room is None or self.room[0].shape[2] < m:
            self.room = [F.pad(old, (0, 0, 0, m + m // 8 + 32 - old.shape[2])) for old in (self.keys, self.values)]
        if n:
            for room, new in zip(self.room, (key_states, value_states)):
                room[:, :, n:m] = new
        self._show(m)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        if self.room:  # a layer that uses another's keys has none
            self.room = [room.index_select(0, indices) for room in self.room]
            self._show(self.get_seq_length())

    def _show(self, n: int) -> None:
        self.keys, self.values = (room[:, :, :n] for room in self.room)


def _draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
    """Next token of each row by inverting the cumulative distribution.

    logits (rows, vocabulary), uniform (rows,) in [0, 1).
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.float() / temperature).softmax(-1).double().cumsum(-1)
    token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)
