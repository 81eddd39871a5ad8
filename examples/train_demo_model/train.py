"""Train the bundled demo model: `python -m examples.train_demo_model.train --minutes 94 --work-dir build/demo_model`.

The budget is time, not steps: the learning rate follows the elapsed fraction of it, so a run on a slow or busy machine
ends annealed like any other. Run again with the same folder, and it goes on from the last checkpoint.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import DeepseekV3ForCausalLM

from .corpus import KINDS, Kind, documents, is_core, is_held_out
from .data import Batches, TokenizedText, held_out_rows, shares_at, tokenize, tokenize_texts
from .model import BIAS_STEP, LoadBalancer, build_model, demo_config, next_token_loss
from .optimizer import build_optimizers
from .tokenizer import train_tokenizer

SEED = 20240501
WARMUP, DECAY_FROM, FINAL_RATE = 0.02, 0.55, 0.01
BALANCE_UNTIL = 0.96
GRADIENT_LIMIT = 1.0


@dataclass(kw_only=True)
class Progress:
    """What a run has done so far; saved with each checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The tokenizer and all texts as tokens; `core` is the part of `training` that the end of training repeats."""

    tokenizer: Tokenizer
    training: dict[Kind, TokenizedText]
    core: TokenizedText
    held_out: dict[Kind, TokenizedText]


def prepare(work_dir: Path) -> Prepared:
    """Build the corpus, and train the tokenizer or read the one trained before."""
    corpus = list(documents())
    training = [document for document in corpus if not is_held_out(document)]
    path = work_dir / "tokenizer.json"
    if not path.exists():
        train_tokenizer(document.text for document in training).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    return Prepared(
        tokenizer=tokenizer,
        training=tokenize(tokenizer, training),
        core=tokenize_texts(tokenizer, [document.text for document in training if is_core(document)]),
        held_out=tokenize(tokenizer, [document for document in corpus if is_held_out(document)]),
    )


def rate_factor(done: float) -> float:
    """The learning rate over its peak: warm-up, plateau, linear decay (`done` runs from 0 to 1)."""
    if done < WARMUP:
        return max(done / WARMUP, 0.01)
    if done < DECAY_FROM:
        return 1.0
    return max(FINAL_RATE, (1 - done) / (1 - DECAY_FROM))


@torch.no_grad()
def mean_loss(model: DeepseekV3ForCausalLM, rows: torch.Tensor) -> float:
    """Nats per token of predicting rows of equal length."""
    return sum(next_token_loss(model, chunk).item() * len(chunk) for chunk in torch.split(rows, 8)) / len(rows)


def describe_loads(loads: list[torch.Tensor]) -> list[dict[str, float]]:
    """Per layer: largest and smallest load over the mean, and the entropy of the loads over that of a uniform one."""
    result = []
    for load in loads:
        share = load.double() / load.sum()
        entropy = -(share * share.clamp(min=1e-12).log()).sum().item() / math.log(len(load))
        relative = share * len(load)
        figures = {"max": relative.max().item(), "min": relative.min().item(), "entropy": entropy}
        result.append({name: round(value, 4) for name, value in figures.items()})
    return result


class Trainer:
    """The training loop with everything that a checkpoint holds."""

    def __init__(self, work_dir: Path, *, batch_tokens: int) -> None:
        torch.manual_seed(SEED)
        self.work_dir = work_dir
        self.data = prepare(work_dir)
        self.model = build_model(demo_config(self.data.tokenizer.get_vocab_size()))
        self.balancer = LoadBalancer(self.model)
        self.optimizers = build_optimizers(self.model)
        self.progress = Progress()
        self.checkpoint = work_dir / "checkpoint.pt"
        if self.checkpoint.exists():
            self._load()
        texts = [*self.data.training.values(), self.data.core]
        self.batches = Batches(texts, batch_tokens=batch_tokens, seed=SEED + self.progress.step)

    def _load(self) -> None:
        state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])

    def save(self) -> None:
        """Write the checkpoint; a reader sees the old one or the new one."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": asdict(self.progress),
        }
        temporary = self.checkpoint.with_suffix(".new")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)

    def step(self, done: float) -> tuple[float, list[torch.Tensor]]:
        """One batch; returns its loss and its expert loads."""
        factor = rate_factor(done)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        rows = self.batches.next(shares_at(done))
        loss = next_token_loss(self.model, rows)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_LIMIT)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loads = self.balancer.take_loads()
        if done < BALANCE_UNTIL:
            self.balancer.update_biases(loads, BIAS_STEP * factor)
        self.progress.step += 1
        self.progress.tokens += rows.numel() - len(rows)
        return loss.item(), loads

    def run(self, minutes: float, *, report_every: int = 50, save_seconds: float = 180.0) -> None:
        """Train until the budget is used up."""
        budget, saved_at, losses = minutes * 60, self.progress.seconds, list[float]()
        window: list[torch.Tensor] = []
        while self.progress.seconds < budget:
            started = time.monotonic()
            loss, loads = self.step(self.progress.seconds / budget)
            losses.append(loss)
            window = [old + new for old, new in zip(window, loads, strict=True)] if window else loads
            if self.progress.step % report_every == 0:
                self.report(losses, window)
                losses, window = [], []
            if self.progress.seconds - saved_at > save_seconds:
                self.save()
                saved_at = self.progress.seconds
            self.progress.seconds += time.monotonic() - started
        self.save()

    def report(self, losses: list[float], loads: list[torch.Tensor]) -> None:
        """One line of JSON on standard output, with held-out losses now and then."""
        line: dict[str, Any] = {
            **asdict(self.progress),
            "loss": round(sum(losses) / len(losses), 4),
            "tokens_per_second": round(self.progress.tokens / max(self.progress.seconds, 1e-9)),
            "loads": describe_loads(loads),
        }
        if self.progress.step % 500 == 0:
            rows = {kind: held_out_rows(text)[:16] for kind, text in self.data.held_out.items()}
            line["held_out"] = {kind: round(mean_loss(self.model, rows[kind]), 4) for kind in KINDS}
            self.balancer.take_loads()
        print(json.dumps(line), flush=True)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=94.0, help="time budget of the whole run")
    parser.add_argument("--work-dir", type=Path, required=True, help="folder of the checkpoint and the tokenizer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options.work_dir, batch_tokens=options.batch_tokens)
    core = {"core": trainer.data.core}
    for part, texts in (("training", trainer.data.training | core), ("held-out", trainer.data.held_out)):
        sizes = {kind: {"tokens": text.num_tokens, "bytes": text.num_bytes} for kind, text in texts.items()}
        print(json.dumps({part: sizes}), flush=True)
    trainer.run(options.minutes)


if __name__ == "__main__":
    main()
