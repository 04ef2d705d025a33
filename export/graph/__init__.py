"""Deployment forms of the model: small `nn.Module`s that lower to few, fast operations. Shared by every exporter.

Nothing here runs the transformers model: the forms copy weights out of the family's views, fold constants into them and
compute the same function (`tests/export/test_graph*.py` hold them to 1e-5 of the transformers model).
"""

from export.graph.language import Decode, LanguageModel, Prefill, TokenEmbedding
from export.graph.options import COREML, EXECUTORCH, GraphOptions
from export.graph.stock import TextDecoder
from export.graph.vision import Tower, VisionEncoder

__all__ = [
    "COREML",
    "EXECUTORCH",
    "Decode",
    "GraphOptions",
    "LanguageModel",
    "Prefill",
    "TextDecoder",
    "TokenEmbedding",
    "Tower",
    "VisionEncoder",
]
