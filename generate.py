"""Ids in, ids out, with a cache; and ids to messages, as they come. Prints nothing."""

import re

import torch

import data
from model import KVCache

PREFILL = 512  # prompt tokens read at a time: bounds the memory of their logits


class Decoder:
    """A model with what it has read: a prompt that begins as the last one did costs only its new tokens."""

    def __init__(self, model, tokenizer, size, share=None):
        """`size`: tokens of context, prompt and answer together. `share(id)`: rank 0's choice, where several ranks decode together."""
        weight = model.lm_head.weight
        self.model, self.tokenizer, self.share = model, tokenizer, share or (lambda id: id)
        self.cache = KVCache(model.config, size, dtype=model.dtype or weight.dtype, device=weight.device)
        self.read = []  # the ids behind the cache
        ends = {tokenizer.im_end, tokenizer.engine.token_to_id("</s>"), tokenizer.engine.token_to_id("<|endoftext|>")}
        self.ends = ends - {None}
        never = {i for i in range(model.config.vocab_size) if i in tokenizer.special_ids or i >= len(tokenizer)} - self.ends
        self.never = torch.tensor(sorted(never), dtype=torch.long)

    def forward(self, ids):
        """The logits (V,) of what follows `ids`, float32, on the CPU."""
        common = next((i for i, (a, b) in enumerate(zip(self.read, ids)) if a != b), min(len(self.read), len(ids)))
        self.cache.length = min(common, len(ids) - 1)
        self.read = []  # until it is done: Ctrl-C may come in between
        new = torch.tensor([ids[self.cache.length :]], device=self.cache.layers[0].device)
        for part in new.split(PREFILL, dim=1):
            logits = self.model(part, cache=self.cache)
        self.read = list(ids)
        return logits[0, -1].float().cpu()

    @torch.inference_mode()
    def generate(self, ids, max_new=256, temperature=0.7, top_p=0.95, generator=None):
        """Yield the ids that continue `ids`, until the model ends its turn (that id is not yielded), `max_new` or the context's end."""
        ids = list(ids)
        for _ in range(min(max_new, self.cache.size - len(ids))):
            logits = self.forward(ids)
            logits[self.never] = -torch.inf
            chosen = self.share(pick(logits, temperature, top_p, generator))
            if chosen in self.ends:
                return
            ids.append(chosen)
            yield chosen


def pick(logits, temperature, top_p, generator=None):
    """One id from logits (V,): the best at temperature 0, else drawn from the smallest set of ids that holds `top_p` of the probability."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits / temperature).softmax(0).sort(descending=True)
    probabilities[probabilities.cumsum(0) - probabilities > top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def messages(ids, tokenizer):
    """Ids as they come → the list of messages so far, each time it grew. What may still turn out to be a mark or half a letter waits."""
    seen, known = [], []
    for id in ids:
        seen.append(id)
        text = tokenizer.decode(seen)
        found = data.messages_of(re.sub("(\n>{0,3}|\ufffd+)$", "", text))
        if found != known:
            known = found
            yield found
    found = data.messages_of(tokenizer.decode(seen)) if seen else []
    if found != known:
        yield found


def fit(turns, me, tokenizer, size):
    """The ids of the prompt after `turns`, without as many of the oldest turns as it takes to leave `size` tokens at most."""
    for oldest in range(len(turns)):
        ids, _ = tokenizer.encode(data.prompt(turns[oldest:], me, tokenizer.specials))
        if len(ids) <= size:
            return ids
    return ids[:1] + ids[-size + 1 :]
