"""Llama 3 as torchtitan names it: the model that the examples and the benchmarks fine-tune."""

from llama3.config import CONFIGS, LORA, LlamaConfig
from llama3.model import Attention, FeedForward, Llama, TransformerBlock, apply_rope, rope_table
from llama3.moe import Experts, MixtureOfExperts

__all__ = [
    "CONFIGS",
    "LORA",
    "Attention",
    "Experts",
    "FeedForward",
    "Llama",
    "LlamaConfig",
    "MixtureOfExperts",
    "TransformerBlock",
    "apply_rope",
    "rope_table",
]
