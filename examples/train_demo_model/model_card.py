"""The README of the exported folder, filled with measured figures."""

import math
from dataclasses import dataclass

from .corpus import KINDS, Kind
from .data import CORE_SHARE, SHARES
from .train import Progress


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured of one exported model; losses are nats per token; stored is what the FP8 file gives."""

    progress: Progress
    python: str
    num_parameters: int
    training: dict[Kind, int]
    core: int
    held_out_tokens: int
    bytes_per_token: dict[Kind, float]
    unigram: dict[str, float]
    bigram: dict[str, float]
    loss: float
    stored_losses: dict[str, float]
    loads: dict[str, list[dict[str, float]]]
    answer: str


CARD = """\
# The demo model

A language model of DeepSeek-V3's architecture with {millions:.1f} million parameters (256 routed experts in 8 groups,
top-8, one shared expert, MLA, 3 MoE layers after a dense one), trained on two CPU cores. It exists so that a mesh has
something real to serve offline: real text, trained routing, DeepSeek's FP8 block format (`float8_e4m3fn`, one
`weight_scale_inv` for each 128 x 128 block; embeddings, head, norms and router gates in bfloat16).

**Training data**: text that Python {python} carries: the topics of `help()`, docstrings and sources of the standard
library, and dialogues made from the docstrings by rule. {docs:,} tokens of documentation ({docs_share:.0%} of what the
model saw), {dialogue:,} of dialogues ({dialogue_share:.0%}), {source:,} of sources ({source_share:.0%}). In the last
third of the time {core_share:.0%} of the rows repeated the documentation and dialogues of what people ask about first
({core:,} tokens). About 3% of the modules and topics were held out whole, with their dialogues.

**Training**: {seen:,} tokens in {minutes:.0f} minutes ({rate:,.0f} tokens/s on a shared machine), {steps:,} steps, Muon
and AdamW, load balance by the routing bias alone. Script: `examples/train_demo_model`.

| held-out loss ({held_out:,} tokens) | nats/token |
|---|---|
| unigram model of the same tokens | {unigram:.4f} |
| bigram model (Kneser-Ney) | {bigram:.4f} |
| this model, float32 | {loss:.4f} |
| this model, as stored in FP8 | {fp8_loss:.4f} |

| held-out loss by kind | unigram | bigram | this model, as stored | bits/byte |
|---|---|---|---|---|
{by_kind}

| held-out expert load | entropy / uniform | smallest / mean | largest / mean | on docs | on dialogue | on source |
|---|---|---|---|---|---|---|
{by_layer}

`What does os.path.join do?` (greedy):

> {answer}

**Limits**: it has read Python's documentation and nothing else. It repeats what it has read, mixes up what is similar,
invents the rest, and knows no other subject. It demonstrates a serving system; it is no assistant. At most 2048 tokens.
The text it learned from is under the Python Software Foundation License.
"""


def model_card(figures: Figures) -> str:
    """The card as Markdown."""
    progress = figures.progress
    kinds = []
    for kind, per_token in figures.bytes_per_token.items():
        loss = figures.stored_losses[kind]
        counted = f"{figures.unigram[kind]:.3f} | {figures.bigram[kind]:.3f}"
        kinds.append(f"| {kind} | {counted} | {loss:.3f} | {loss / per_token / math.log(2):.3f} |")
    layers = [
        f"| layer {layer} | {load['entropy']:.3f} | {load['min']:.2f} | {load['max']:.2f} | "
        + " | ".join(f"{figures.loads[kind][layer - 1]['max']:.2f}" for kind in KINDS)
        + " |"
        for layer, load in enumerate(figures.loads["all"], start=1)
    ]
    return CARD.format(
        millions=figures.num_parameters / 1e6,
        python=figures.python,
        **figures.training,
        core=figures.core,
        core_share=CORE_SHARE,
        **{f"{kind}_share": share for kind, share in SHARES.items()},
        seen=progress.tokens,
        minutes=progress.seconds / 60,
        rate=progress.tokens / progress.seconds,
        steps=progress.step,
        held_out=figures.held_out_tokens,
        unigram=figures.unigram["all"],
        bigram=figures.bigram["all"],
        loss=figures.loss,
        fp8_loss=figures.stored_losses["all"],
        by_kind="\n".join(kinds),
        by_layer="\n".join(layers),
        answer=figures.answer.replace("\n", "\n> "),
    )
