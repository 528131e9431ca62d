"""Tokenizers: images as grids of integers, the targets of methods that classify masked patches."""

from .dalle import DalleEncoder
from .named import is_function, load_tokenizer
from .recorded import RecordedTarget, record_tokens
from .target import Tokenizer, TokenTarget
from .weights import PUBLISHED, load_dalle

__all__ = [
    "PUBLISHED",
    "DalleEncoder",
    "RecordedTarget",
    "TokenTarget",
    "Tokenizer",
    "is_function",
    "load_dalle",
    "load_tokenizer",
    "record_tokens",
]
