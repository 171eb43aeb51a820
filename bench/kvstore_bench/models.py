"""KV-cache of known models: how many bytes a token takes in each layer. Pure.

A model with grouped-query attention keeps a key and a value for each KV head of each layer::

    bytes a token and layer = 2 * KV heads * head size * bytes of a number

DeepSeek's latent attention (MLA) keeps one latent vector of 512 numbers and one rotated key of 64,
whatever the number of heads, and the same on all tensor-parallel ranks.

Shapes are those of the publications that `source` names. The rows of DeepSeek-V3, gpt-oss,
Llama-3.1-8B and -70B, Qwen3-8B and -32B were compared with the model files of NIXL's benchmark
(github.com/ai-dynamo/nixl, benchmark/kvbench/examples).
"""

from __future__ import annotations

from dataclasses import dataclass

# Of MLA: the latent vector and the key that carries positions (arXiv 2412.19437, section 4.2).
_MLA_NUMBERS = 512 + 64
# DeepSeek-V3.2 in FP8 with scales: 512 numbers of a byte, four scales of four bytes, and 64
# numbers of two (github.com/deepseek-ai/FlashMLA, README); the indexer's key has 128 numbers of
# a byte and a scale of four bytes (vLLM, models/deepseek_v2.py, `Indexer`).
_V32_BYTES = (512 + 4 * 4 + 64 * 2) + (128 + 4)


@dataclass(frozen=True, slots=True)
class Model:
    """What a token of a model's KV-cache takes.

    Attributes:
        layers: Layers that keep KV.
        layer_bytes: Bytes of a token in each of them.
        dtype: Of what is kept.
        source: Where the shape is published.
        replicated: Whether all tensor-parallel ranks keep the same bytes.
        note: What the numbers leave out.
    """

    layers: int
    layer_bytes: int
    dtype: str
    source: str
    replicated: bool = False
    note: str = ""

    @property
    def token_bytes(self) -> int:
        """Bytes of a token, all layers."""
        return self.layers * self.layer_bytes


def _grouped(layers: int, heads: int, size: int, source: str, note: str = "") -> Model:
    """Keys and values of `heads` KV heads of `size` numbers, in bfloat16."""
    return Model(layers, 2 * heads * size * 2, "bfloat16", source, note=note)


_LLAMA3 = "arXiv 2407.21783, table 3"
_QWEN25 = "arXiv 2412.15115, table 1"
_QWEN3 = "arXiv 2505.09388, tables 1 and 2"
_V3 = "arXiv 2412.19437, section 4.2"

MODELS = {
    "deepseek-v3": Model(61, _MLA_NUMBERS * 2, "bfloat16", _V3, replicated=True),
    "deepseek-v3-fp8": Model(61, _MLA_NUMBERS, "float8_e4m3", _V3, replicated=True),
    "deepseek-v3.2": Model(
        61,
        _V32_BYTES,
        "fp8_ds_mla",
        "FlashMLA's README; vLLM's Indexer",
        replicated=True,
        note="FP8 with scales, and the indexer's key",
    ),
    "kimi-k2": Model(61, _MLA_NUMBERS * 2, "bfloat16", "arXiv 2507.20534", True),
    "gpt-oss-120b": _grouped(
        36,
        8,
        64,
        "arXiv 2508.10925",
        "as if no layer had a sliding window: an upper bound beyond 128 tokens",
    ),
    "qwen3-30b-a3b": _grouped(48, 4, 128, _QWEN3),
    "qwen3-8b": _grouped(36, 8, 128, _QWEN3),
    "qwen3-32b": _grouped(64, 8, 128, _QWEN3),
    "qwen3-235b-a22b": _grouped(94, 4, 128, _QWEN3),
    "qwen2.5-32b": _grouped(64, 8, 128, _QWEN25),
    "qwen2.5-72b": _grouped(80, 8, 128, _QWEN25),
    "mistral-7b": _grouped(32, 8, 128, "arXiv 2310.06825, table 1"),
    "llama-3.1-8b": _grouped(32, 8, 128, _LLAMA3),
    "llama-3.1-70b": _grouped(80, 8, 128, _LLAMA3),
    "llama-3.1-405b": _grouped(126, 8, 128, _LLAMA3),
}

__all__ = ["MODELS", "Model"]
