"""Tiny models of the transformers library with random weights, each with an input."""

import torch
import transformers

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def pixels(size):
    return {"pixel_values": torch.randn(4, 3, size, size)}


def tokens():
    return {"input_ids": torch.randint(40, (3, 12))}


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck"
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
        drop_path_rate=0.0,
    )
    return transformers.SwinForImageClassification(config), pixels(32)


def vit():
    config = transformers.ViTConfig(image_size=16, patch_size=8, **SIZES)
    return transformers.ViTForImageClassification(config), pixels(16)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, **NO_DROPOUT
    )
    return transformers.GPT2LMHeadModel(config), tokens()


def llama():
    config = transformers.LlamaConfig(vocab_size=40, num_key_value_heads=1, **SIZES)
    return transformers.LlamaForCausalLM(config), tokens()


def bert():
    config = transformers.BertConfig(vocab_size=40, hidden_dropout_prob=0.0, **SIZES)
    config.attention_probs_dropout_prob = 0.0
    return transformers.BertForMaskedLM(config), tokens()


def albert():
    config = transformers.AlbertConfig(vocab_size=40, embedding_size=8, **SIZES)
    return transformers.AlbertForMaskedLM(config), tokens()


MODELS = [resnet, swin, vit, gpt2, llama, bert, albert]
