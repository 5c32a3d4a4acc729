"""Tiny models of the transformers library with random weights, dropout, and a loss of their own."""

import torch
import transformers

from tests.support.transformers_models import SIZES

TEXT = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="bottleneck", num_labels=4
    )
    return transformers.ResNetForImageClassification(config), pixels(32)


def swin():
    config = transformers.SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=4,
        drop_path_rate=0.3,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.2,
        num_labels=4,
    )
    return transformers.SwinForImageClassification(config), pixels(32)


def vit():
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=4, **SIZES, **dropout)
    return transformers.ViTForImageClassification(config), pixels(16)


def bert():
    config = transformers.BertConfig(num_labels=4, **TEXT, **SIZES)  # its dropouts are 0.1
    return transformers.BertForSequenceClassification(config), tokens(torch.arange(4))


def gpt2():
    sizes = {"n_positions": 12, "n_embd": 16, "n_layer": 3, "n_head": 2}
    config = transformers.GPT2Config(**TEXT, **sizes)  # its dropouts are 0.1
    return transformers.GPT2LMHeadModel(config), tokens()


def llama():
    config = transformers.LlamaConfig(num_key_value_heads=1, attention_dropout=0.2, **TEXT, **SIZES)
    return transformers.LlamaForCausalLM(config), tokens()


MODELS = {make.__name__: make for make in (resnet, swin, vit, bert, gpt2, llama)}


def pixels(size):
    return {"pixel_values": torch.randn(4, 3, size, size), "labels": torch.arange(4)}


def tokens(labels=None):
    ids = torch.randint(3, 40, (4, 8))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    labels = ids if labels is None else labels
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
