"""Attention masks for a row of trees and for sampling, and fast attention for them on CUDA.

With an explicit mask PyTorch cannot use its fastest kernel: it computes all pairs of tokens, even
of dialogues that do not see each other, and copies keys and values for every head of a group. So on
CUDA `attend` replaces transformers' "sdpa" for masks of `attention_masks`; results differ only by
rounding.
"""
import torch
import torch.nn.functional as F

SHORT_CUTS_ON = {"cuda"}  # device types


def attention_masks(base, visible: torch.Tensor, distance, trees=()):
    """The decoder's attention mask for visible (rows, queries, keys).

    It is `visible`, limited to a sliding window (Mistral) by distance() (query's position minus
    key's), or one mask per kind of layer (Gemma). trees: (trunk tokens, leaf tokens) of each tree
    in the row; empty while sampling.
    """
    config = base.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    masks = {"full_attention": visible}
    if window:
        masks["sliding_attention"] = visible & (distance() < window)
    for kind, mask in masks.items():
        if config._attn_implementation == "eager":  # it adds the mask to the scores
            lowest = torch.finfo(base.dtype).min
            mask = torch.zeros_like(mask, dtype=base.dtype).masked_fill(~mask, lowest)
        masks[kind] = mask[:, None]
    if config._attn_implementation == "sdpa" and visible.device.type in SHORT_CUTS_ON:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # takes seconds to import
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
        masks["full_attention"].trees = trees  # the mask stays valid for code that ignores this
    return masks if window and kinds else list(masks.values())[-1]


def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, position_bias=None,
           **settings):
    """transformers' "sdpa" with short cuts for masks that carry `trees`.

    query (rows, heads, queries, size), key and value (rows, key heads, keys, size) ->
    (rows, queries, heads, size). A trunk needs no mask: it is plain causal attention. Leaves see
    only their own tree.
    """
    trees = getattr(attention_mask, "trees", None)
    if trees is None or dropout or position_bias is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout,
                                      scaling=scaling, position_bias=position_bias, **settings)
    if not trees:
        output = _by_group(query, key, value, attention_mask, scaling)
        return output.transpose(1, 2).contiguous(), None
    sizes = [trunk + leaves for trunk, leaves in trees]
    outputs = []
    start = 0
    for (trunk, leaves), *parts in zip(trees, *(x.split(sizes, 2) for x in (query, key, value))):
        queries, keys, values = parts
        trunk_queries, leaf_queries = queries.split([trunk, leaves], 2)
        outputs.append(F.scaled_dot_product_attention(
            trunk_queries, keys[:, :, :trunk], values[:, :, :trunk], is_causal=True, scale=scaling,
            enable_gqa=query.shape[1] > key.shape[1]))
        end = start + trunk + leaves
        if leaves:
            mask = attention_mask[:, :, start + trunk:end, start:end]
            outputs.append(_by_group(leaf_queries, keys, values, mask, scaling))
        start = end
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _by_group(query, key, value, mask, scaling):
    """Attention with a mask (rows, 1, queries, keys).

    Heads that share keys become queries of one head, so keys are not copied.
    """
    rows, heads, n, size = query.shape
    group = heads // key.shape[1]
    output = F.scaled_dot_product_attention(
        query.reshape(rows, -1, group * n, size), key, value,
        attn_mask=mask.repeat(1, 1, group, 1), scale=scaling)
    return output.reshape(rows, heads, n, -1)
