"""GGUF files, the format of llama.cpp."""

from convert.gguf.reading import Reader as Reader
from convert.gguf.writing import Writer as Writer
