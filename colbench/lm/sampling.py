"""Messages from a model in this process.

Each prompt is computed and held once, however many messages are sampled from it. Finished messages
leave the batch. A message depends only on its own seed.
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
LIKELY = 0.25  # expected length of a message as a share of its limit; few are longer


class LocalChat:
    """Samples messages from a model in this process. Interface of colbench.lm.server.ServerChat.

    adapters: False samples from the base model under a PEFT model's adapters.
    batch_tokens: limit on the tokens held at once, prompts and messages; lower it to save memory.
    repeatable: equal calls give equal messages on one machine.
    """

    repeatable = True

    def __init__(self, model, tokenizer, adapters: bool = True, batch_tokens: int = 65536):
        self.model = model
        self.tokenizer = tokenizer
        self.adapters = adapters
        self.batch_tokens = batch_tokens
        self.context = reach(model.config.get_text_config())
        stops = model.generation_config.eos_token_id
        if not isinstance(stops, list):
            stops = [] if stops is None else [stops]
        self.stops = {end_of_turn(tokenizer), *stops}

    def sample(self, conversations, seeds, temperature=1.0, max_new_tokens=1024, stop=None,
               again=True):
        """One message per seed of each dialogue: lists of Reply, or an Exception in its place.

        A message depends on its conversation and seed, not on the rest of the batch (except for
        rounding in the last bit). temperature 0 takes the likeliest token. A prompt that leaves no
        room in the model's context gives exceptions. So does a message that is all thoughts, after
        one more try with another seed if `again`.
        """
        replies = [[None] * len(row) for row in seeds]
        jobs = []
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
        while jobs:  # a batch has rows with the same number of messages
            rows = 1
            n = len(jobs[0][2])
            while rows < len(jobs) and len(jobs[rows][2]) == n:
                prompt, room, *_ = jobs[rows]
                if (rows + 1) * (len(prompt) + n * LIKELY * room) > self.batch_tokens:
                    break
                rows += 1
            batch, jobs = jobs[:rows], jobs[rows:]
            results = self._generate([job[:3] for job in batch], temperature)
            jobs = [job for job, messages in zip(batch, results) if messages is None] + jobs
            for (prompt, *_, i, j), messages in zip(batch, results):
                for k, ids in enumerate(messages or (), j):
                    text = decoded(self.tokenizer, [t for t in ids if t not in self.stops])
                    for mark in stop or ():
                        text = text.split(mark)[0]
                    text, thoughts = clean(text)
                    spent = len(prompt), len(ids)
                    cut = ids[-1] not in self.stops
                    replies[i][k] = Reply(text.strip(), len(ids), thoughts, spent, cut)
                    if thoughts and not text.strip():
                        words = f"a reply without text: all {len(ids)} tokens are thoughts"
                        replies[i][k] = OnlyThoughts(words, spent)
        # as in ServerChat
        silent = [(i, k) for i, row in enumerate(replies) for k, reply in enumerate(row)
                  if isinstance(reply, OnlyThoughts)]
        if silent and again:
            other_seeds = [[seed_of(seeds[i][k], "again")] for i, k in silent]
            others = self.sample([conversations[i] for i, _ in silent], other_seeds, temperature,
                                 max_new_tokens, stop, again=False)
            for (i, k), [other] in zip(silent, others):
                spent = spent_on(replies[i][k], other)
                if isinstance(other, OnlyThoughts):
                    replies[i][k] = OnlyThoughts(f"{other}, twice", spent)
                else:
                    replies[i][k] = other._replace(spent=spent)
        return replies

    @torch.inference_mode()
    def _generate(self, batch, temperature) -> list[list[list[int]] | None]:
        """Token ids of one message per seed for every job (prompt, limit on tokens, seeds).

        None for a job that must be sampled anew: when the messages get longer than expected, the
        later half of the rows leaves the batch.

        A row of the batch is a prompt and, after it in the same cache, its messages side by side:
        each step adds one token of every unfinished message. A message sees the prompt and its own
        tokens; `owner` says whose each token is.
        """
        base, device = base_of(self.model), self.model.device
        width = max(len(prompt) for prompt, _, _ in batch)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _, _ in batch],
                           device=device)
        owner = torch.tensor([[PADDING] * (width - len(prompt)) + [PROMPT] * len(prompt)
                              for prompt, _, _ in batch], device=device)  # (rows, tokens so far)
        position = ((owner == PROMPT).cumsum(1) - 1).clamp(min=0)  # (rows, tokens so far)
        messages = [[[] for _ in seeds] for _, _, seeds in batch]
        live = [(row, k) for row, (_, _, seeds) in enumerate(batch) for k in range(len(seeds))]
        rows = list(range(len(batch)))
        steps = max(room for _, room, _ in batch)
        # one uniform number per token, from the message's own seed: (messages, steps)
        uniforms = torch.stack([
            torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for _, _, seeds in batch for seed in seeds]).to(device)
        cache = DynamicCache()
        n_layers = base.config.get_text_config().num_hidden_layers
        cache.layers = [RoomyLayer() for _ in range(n_layers)]
        with adapters_in_half(self.model) if self.adapters else adapters_off(self.model):
            hidden = base.get_decoder()(
                input_ids=ids, attention_mask=(owner == PROMPT).long(), position_ids=position,
                past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            logits = logits_of(base, hidden)[[row for row, _ in live]]
            for step in range(steps):
                token = _draw(logits, uniforms[:, step], temperature)
                for (row, k), value in zip(live, token.tolist()):
                    messages[row][k].append(value)
                keep = [i for i, (row, k) in enumerate(live)
                        if messages[row][k][-1] not in self.stops
                        and len(messages[row][k]) < batch[row][1]]
                if not keep:
                    break
                kept_rows = sorted({live[i][0] for i in keep})
                held = len(kept_rows) * (owner.shape[1] + len(batch[0][2]))  # tokens
                if len(kept_rows) > 1 and held > self.batch_tokens:
                    half = len(kept_rows) // 2
                    for row in kept_rows[half:]:
                        messages[row] = None
                    kept_rows = kept_rows[:half]
                    keep = [i for i in keep if live[i][0] in kept_rows]
                if len(keep) < len(live) or not step:
                    live = [live[i] for i in keep]
                    keep = torch.tensor(keep, device=device)
                    token, uniforms = token[keep], uniforms[keep]
                    if len(kept_rows) < len(rows):
                        index = torch.tensor([rows.index(row) for row in kept_rows], device=device)
                        cache.batch_select_indices(index)
                        rows, owner, position = kept_rows, owner[index], position[index]
                    place, column, query = _columns(rows, live, device)
                    start = position[:, width - 1:width] + 1  # (rows, 1), tokens of each prompt
                ids = torch.zeros_like(query)
                ids[place, column] = token
                now = (start + step).expand_as(query)
                owner = torch.cat([owner, query], 1)
                position = torch.cat([position, now], 1)
                # (rows, queries, keys)
                visible = (owner[:, None] == PROMPT) | (owner[:, None] == query[:, :, None])
                mask = attention_masks(base, visible, lambda: now[:, :, None] - position[:, None])
                hidden = base.get_decoder()(
                    input_ids=ids, attention_mask=mask, position_ids=now, past_key_values=cache,
                    use_cache=True).last_hidden_state
                logits = logits_of(base, hidden[place, column])
        return messages


def _columns(rows: list[int], live: list[tuple[int, int]], device):
    """Where each live message (row, number) puts its next token.

    Returns its place among `rows`, its column, and a table (rows, columns) of their owners, with
    PADDING where a row has fewer messages than another.
    """
    used = dict.fromkeys(rows, 0)
    order = {row: place for place, row in enumerate(rows)}
    where = []
    for row, _ in live:
        where.append((order[row], used[row]))
        used[row] += 1
    place, column = torch.tensor(where, device=device).T
    query = torch.full((len(rows), max(used.values())), PADDING, device=device)
    query[place, column] = torch.tensor([k for _, k in live], device=device)
    return place, column, query


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, with room for more: DynamicLayer copies them all per token."""

    room = None  # keys and values, each (rows, heads, capacity, head size)

    def update(self, key_states, value_states, *args, **kwargs):
        n = self.get_seq_length()
        m = n + key_states.shape[2]
        if not n:
            # also sets the layer's dtype and device
            super().update(key_states, value_states, *args, **kwargs)
        if self.room is None or self.room[0].shape[2] < m:
            capacity = m + m // 8 + 32
            self.room = [F.pad(old, (0, 0, 0, capacity - old.shape[2]))
                         for old in (self.keys, self.values)]
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
