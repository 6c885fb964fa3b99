"""Attention masks of a row of trees and of messages that are being sampled, and on CUDA attention without the waste.

A mask of its own keeps PyTorch from its fastest kernel: all pairs of tokens are computed, those of two dialogues that
do not see each other included, and keys and values are copied for every head of a group. So on CUDA `attend` stands in
for transformers' "sdpa" wherever a mask of `attention_masks` comes by: the result is the same but for rounding.
"""
import torch
import torch.nn.functional as F

SHORT_CUTS_ON = {"cuda"}  # kinds of device


def attention_masks(base, visible: torch.Tensor, distance, trees=()):
    """What the decoder takes as attention mask for visible (rows, queries, keys).

    It is `visible` itself, or kept to a window (Mistral) by distance(), of the keys from the query in positions, or
    one mask for each kind of layer (Gemma). trees: (tokens of the trunk, of the leaves) of each tree in the row; none
    while sampling.
    """
    config = base.config.get_text_config()
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    masks = {"full_attention": visible}
    if window:
        masks["sliding_attention"] = visible & (distance() < window)
    for kind, mask in masks.items():
        if config._attn_implementation == "eager":  # it adds the mask to the scores
            mask = torch.zeros_like(mask, dtype=base.dtype).masked_fill(~mask, torch.finfo(base.dtype).min)
        masks[kind] = mask[:, None]
    if config._attn_implementation == "sdpa" and visible.device.type in SHORT_CUTS_ON:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # here, not above: it takes seconds to import
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
        masks["full_attention"].trees = trees  # the mask stays whole: who does not know `trees` gets the same result
    return masks if window and kinds else list(masks.values())[-1]


def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, position_bias=None, **settings):
    """transformers' "sdpa": query (rows, heads, queries, size), key and value (rows, key heads, keys, size) ->
    (rows, queries, heads, size). A trunk needs no mask, it is plain causal attention; leaves see their own tree."""
    trees = getattr(attention_mask, "trees", None)
    if trees is None or dropout or position_bias is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      position_bias=position_bias, **settings)
    if not trees:
        return _by_group(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None
    sizes, outputs, start = [trunk + leaves for trunk, leaves in trees], [], 0
    for (trunk, leaves), *parts in zip(trees, *(x.split(sizes, 2) for x in (query, key, value))):
        asked, keys, values = parts
        asked_by_trunk, asked_by_leaves = asked.split([trunk, leaves], 2)
        outputs.append(F.scaled_dot_product_attention(
            asked_by_trunk, keys[:, :, :trunk], values[:, :, :trunk], is_causal=True, scale=scaling,
            enable_gqa=query.shape[1] > key.shape[1]))
        end = start + trunk + leaves
        if leaves:
            outputs.append(_by_group(asked_by_leaves, keys, values,
                                     attention_mask[:, :, start + trunk:end, start:end], scaling))
        start = end
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _by_group(query, key, value, mask, scaling):
    """Attention with a mask (rows, 1, queries, keys). Heads that share keys become queries of one head: no copies."""
    rows, heads, n, size = query.shape
    group = heads // key.shape[1]
    output = F.scaled_dot_product_attention(query.reshape(rows, -1, group * n, size), key, value,
                                            attn_mask=mask.repeat(1, 1, group, 1), scale=scaling)
    return output.reshape(rows, heads, n, -1)
