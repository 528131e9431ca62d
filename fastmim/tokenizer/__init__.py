"""Tokenizers: images as grids of integers, the targets of methods that classify masked patches."""

from .dalle import DalleEncoder
from .recorded import RecordedTarget, record_tokens
from .target import Tokenizer, TokenTarget
from .weights import PUBLISHED, load_dalle

__all__ = ["PUBLISHED", "DalleEncoder", "RecordedTarget", "TokenTarget", "Tokenizer", "load_dalle", "record_tokens"]
