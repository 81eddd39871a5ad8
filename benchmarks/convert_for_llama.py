"""Convert a DeepSeek-V3 checkpoint without a tokenizer for llama.cpp.

    python -P benchmarks/convert_for_llama.py LLAMA_CPP_FOLDER CHECKPOINT --outfile FILE --outtype bf16

Everything behind the first argument is for llama.cpp's own convert_hf_to_gguf.py, which would look for the tokenizer.
"""

from __future__ import annotations

import importlib
import sys


def main() -> None:
    folder = sys.argv.pop(1)
    sys.path[:0] = [folder, f"{folder}/gguf-py"]
    architecture = importlib.import_module("conversion.deepseek").DeepseekV2Model  # V3 is V2 with another gate there
    architecture.set_vocab = architecture._set_vocab_none
    importlib.import_module("convert_hf_to_gguf").main()


if __name__ == "__main__":
    main()
