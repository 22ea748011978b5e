"""Llama 3 as torchtitan names it: the model that the examples and the benchmarks fine-tune."""

from llama3.config import CONFIGS, LORA, LlamaConfig
from llama3.model import Attention, FeedForward, Llama, TransformerBlock, apply_rope, rope_table

__all__ = [
    "CONFIGS",
    "LORA",
    "Attention",
    "FeedForward",
    "Llama",
    "LlamaConfig",
    "TransformerBlock",
    "apply_rope",
    "rope_table",
]
