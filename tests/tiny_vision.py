"""A vision-language model with random weights in the hub's format.

It runs the real code for loading, template, pictures and decoding.
"""
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def save_tiny_vision(folder) -> str:
    from transformers import (
        AutoTokenizer,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "colbench" / "env" / "backend" / "tiny")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = ("{% for m in messages %}<|user|>{% for c in m['content'] %}"
                "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
                "{% endfor %}{% endfor %}<|assistant|>")
    images = CLIPImageProcessorPil(size={"shortest_edge": 64},
                                   crop_size={"height": 64, "width": 64})
    processor = LlavaProcessor(images, tokenizer, patch_size=32, chat_template=template,
                               vision_feature_select_strategy="default",
                               num_additional_image_tokens=1)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            image_size=64, patch_size=32),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=4096),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-1))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
