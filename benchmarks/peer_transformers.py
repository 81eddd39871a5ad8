"""transformers' figures for benchmarks/compare.py, which runs this file in a process of its own.

One forward pass over all prompts, then one for each further token of all sequences, with the cache it makes itself.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def measure(model: Any, batch_size: int, prompt_tokens: int, output_tokens: int) -> dict[str, float]:
    """Tokens a second of prompts and of what follows them."""
    ids = torch.randint(model.config.vocab_size, (batch_size, prompt_tokens))
    started = time.perf_counter()
    result = model(ids, use_cache=True, logits_to_keep=1)
    read = time.perf_counter()
    for _ in range(output_tokens):
        tokens = result.logits[:, -1:].argmax(-1)
        result = model(tokens, past_key_values=result.past_key_values, use_cache=True)
    ended = time.perf_counter()
    return {
        "batch_size": batch_size,
        "prefill_tokens_per_s": batch_size * prompt_tokens / (read - started),
        "decode_tokens_per_s": batch_size * output_tokens / (ended - read),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--batch-sizes", required=True)
    for name in ("--prompt-tokens", "--output-tokens", "--threads"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--result", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(given.checkpoint, dtype=getattr(torch, given.dtype)).eval()
    measure(model, 1, given.prompt_tokens, 1)  # reads the weights, makes what is made at first use
    sizes = [int(size) for size in given.batch_sizes.split(",")]
    cases = [measure(model, size, given.prompt_tokens, given.output_tokens) for size in sizes]
    given.result.write_text(json.dumps({"cases": cases}))


if __name__ == "__main__":
    main()
