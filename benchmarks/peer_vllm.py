"""vLLM's figures for benchmarks/compare.py, which runs this file with the Python that has vLLM.

Prefill: all prompts, one token each. Decode: the same number of other prompts with more tokens, less that time.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def seconds(engine: Any, batch_size: int, prompt_tokens: int, max_tokens: int) -> float:
    """For `batch_size` prompts of random ids, whole."""
    vocab = range(engine.llm_engine.model_config.get_vocab_size())
    prompts = [{"prompt_token_ids": random.choices(vocab, k=prompt_tokens)} for _ in range(batch_size)]
    params = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=max_tokens)
    started = time.perf_counter()
    engine.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - started


def measure(engine: Any, batch_size: int, prompt_tokens: int, output_tokens: int) -> dict[str, float]:
    """Tokens a second of prompts and of what follows them."""
    prefill = seconds(engine, batch_size, prompt_tokens, 1)
    whole = seconds(engine, batch_size, prompt_tokens, 1 + output_tokens)
    return {
        "batch_size": batch_size,
        "prefill_tokens_per_s": batch_size * prompt_tokens / prefill,
        "decode_tokens_per_s": batch_size * output_tokens / (whole - prefill),
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
    random.seed(0)
    sizes = [int(size) for size in given.batch_sizes.split(",")]
    engine = LLM(
        model=given.checkpoint,
        dtype=given.dtype,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_num_seqs=max(sizes),
        max_model_len=given.prompt_tokens + given.output_tokens + 1,
        # What vLLM chooses on processors with AMX takes 16-bit weights only.
        attention_backend="CPU_MLA" if given.dtype == "float32" else None,
    )
    for size in sizes:
        measure(engine, size, given.prompt_tokens, 2)  # compiles what this size needs
    cases = [measure(engine, size, given.prompt_tokens, given.output_tokens) for size in sizes]
    given.result.write_text(json.dumps({"cases": cases}))


if __name__ == "__main__":
    main()
