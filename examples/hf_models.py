"""Small models of transformers with random weights, and a batch for each.

Two layers of width 128: large enough that every linear is worth rewriting at rank 4, and that the blocks of NF4 fit
into each weight.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import lora_fx

WIDTH, HIDDEN, LAYERS, HEADS, VOCABULARY, LENGTH = 128, 256, 2, 4, 256, 24
BYTES = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
DECODER = {
    **BYTES,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
}
ENCODER = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128}
T5 = {"d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": HIDDEN, "num_layers": LAYERS, "num_heads": HEADS}

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """A kind of model: its class in transformers, its configuration, and what it is trained on."""

    model: str
    config: str
    values: Mapping[str, Any]
    inputs: str = "causal"
    """``"causal"``, ``"masked"``, ``"pair"`` (of source and target) or ``"image"``."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """How the model is built, beside its configuration."""
    conv1d: bool = False
    """Its linears are `Conv1D`s, which are to be made linears."""

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """The model in training mode, without dropout; equal seeds give equal weights."""
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**self.values)
        model: Any = getattr(transformers, self.model)._from_config(config, **self.options)
        if self.conv1d:
            lora_fx.Conv1DConverter().convert(model)
        if self.model == "GPT2LMHeadModel":
            model.loss_type = (
                "ForCausalLM"  # else it says at each step that this is what it takes, and breaks the graph
            )
        built: nn.Module = model.to(dtype).train()
        return built

    def sized(self, layers: int) -> "Kind":
        """The same with another number of layers."""
        names = {"num_hidden_layers", "n_layer", "num_layers"} & self.values.keys()
        return dataclasses.replace(self, values={**self.values, **dict.fromkeys(names, layers)})

    def batch(self, size: int = 2, seed: int = 1, dtype: torch.dtype = torch.float32) -> Batch:
        """What the model is called with in training: inputs and labels."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, VOCABULARY, (size, LENGTH), generator=generator)
        if self.inputs == "image":
            pixels = torch.randn(size, 3, 32, 32, generator=generator)
            return {"pixel_values": pixels.to(dtype), "labels": tokens[:, 0] % 10}
        if self.inputs == "pair":
            return {"input_ids": tokens, "labels": tokens[:, : LENGTH // 2].flip(1)}
        return {"input_ids": tokens, "labels": tokens}


def checkpoint(model: Any) -> None:
    """Turn on gradient checkpointing by the model's own switch, so that the model still is one graph."""
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):  # T5's halves have a configuration each
            module.config.use_cache = False  # else it warns while it is traced, which breaks the graph
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the switch has a new name, but not in every version
        model.gradient_checkpointing_enable()
    if hasattr(model, "_require_grads_hook"):
        # Hooks that make embeddings require gradients, which reentrant checkpointing needed: they break the graph, and
        # cost a gradient of the first layer's input that nothing reads.
        model.disable_input_require_grads()


KINDS: dict[str, Kind] = {
    "llama": Kind("LlamaForCausalLM", "LlamaConfig", DECODER),
    "qwen2": Kind("Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "qwen3": Kind("Qwen3ForCausalLM", "Qwen3Config", DECODER),
    "mistral": Kind("MistralForCausalLM", "MistralConfig", DECODER),
    "gemma2": Kind("Gemma2ForCausalLM", "Gemma2Config", DECODER),
    "phi3": Kind("Phi3ForCausalLM", "Phi3Config", DECODER),
    "mixtral": Kind(
        "MixtralForCausalLM",
        "MixtralConfig",
        # All experts are chosen: roundings would change a choice now and then, which is no error of a gradient.
        DECODER | {"num_local_experts": 2, "num_experts_per_tok": 2},
        # The default, a grouped product, has no float64; a loop over experts breaks the graph.
        options={"experts_implementation": "batched_mm"},
    ),
    "gpt2": Kind(
        "GPT2LMHeadModel",
        "GPT2Config",
        BYTES | GPT2 | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        conv1d=True,
    ),
    "t5": Kind(
        "T5ForConditionalGeneration",
        "T5Config",
        BYTES | T5 | {"dropout_rate": 0.0, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0},
        "pair",
    ),
    "bert": Kind("BertForMaskedLM", "BertConfig", BYTES | ENCODER, "masked"),
    "vit": Kind(
        "ViTForImageClassification",
        "ViTConfig",
        ENCODER | {"image_size": 32, "patch_size": 8, "num_labels": 10},
        "image",
    ),
}
