"""The main job: next-token prediction on the embedded corpus, on text files, or on token shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmon.data.corpus import corpus_tokens, text_tokens
from fastmon.data.shards import Tokens, Windows, find_files, read_shard
from fastmon.workloads.presets import Preset, preset
from fastmon.workloads.transformer import GPT


class GPTWorkload:
    """A GPT of the preset cfg["mode"] on next-token loss; see fastmon.workloads.Workload for the protocol."""

    name: ClassVar[str] = "gpt"

    def __init__(
        self,
        row: Preset,
        train: Windows,
        val: Windows,
        *,
        batch_size: int,
        seed: int,
        grad_checkpointing: bool,
        device: torch.device,
        rank: int,
        world_size: int,
    ) -> None:
        if len(val) < batch_size:
            raise ValueError(
                f"{val.source} has {len(val)} windows of {val.seq_len} tokens, batch_size is {batch_size}"
            )
        self.preset, self.train, self.val = row, train, val
        self.batch_size, self.device, self.rank, self.world_size = batch_size, device, rank, world_size
        gpt = GPT(row, seq_len=train.seq_len, seed=seed, grad_checkpointing=grad_checkpointing).to(device)
        self.model: nn.Module = gpt
        self.parameters = sum(p.numel() for p in gpt.parameters())
        self.samples_per_micro_batch = batch_size
        self.tokens_per_micro_batch = batch_size * train.seq_len
        self.flops_per_token = row.flops_per_token(train.seq_len)

    @classmethod
    def build(
        cls,
        cfg: Mapping[str, Any],
        device: torch.device | str,
        *,
        rank: int,
        world_size: int,
    ) -> GPTWorkload:
        """Read the data that cfg names, then make the model.

        Keys: mode, width, seq_len, batch_size, seed, text, train_files, val_files, grad_checkpointing. Data
        errors come before any weight is drawn.
        """
        row = preset(cfg["mode"], width=cfg["width"])
        seq_len, seed = cfg["seq_len"], cfg["seed"]
        train, val = (
            Windows(arrays, seq_len=seq_len, seed=seed, vocab_size=row.vocab, source=source)
            for arrays, source in _token_arrays(cfg, row)
        )
        return cls(
            row,
            train,
            val,
            batch_size=cfg["batch_size"],
            seed=seed,
            grad_checkpointing=cfg["grad_checkpointing"],
            device=torch.device(device),
            rank=rank,
            world_size=world_size,
        )

    def batches(self, *, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's (inputs, targets), (batch_size, seq_len) int64 each, on the host."""
        index = start + self.rank
        while True:
            yield self._shifted(torch.from_numpy(self.train.batch(index, size=self.batch_size)))
            index += self.world_size

    @staticmethod
    def _shifted(
        tokens: Tensor,  # (B, T + 1)
    ) -> tuple[Tensor, Tensor]:
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def to_device(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the batch on the device; to CUDA through pinned memory, so that the host does not wait."""
        if self.device.type == "cuda":
            batch = tuple(t.pin_memory() for t in batch)
        return tuple(t.to(self.device, non_blocking=True) for t in batch)

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the mean next-token loss in nats, 0-d fp32."""
        inputs, targets = batch
        loss: Tensor = self.model(inputs, targets)
        return loss

    @torch.no_grad()
    def evaluate(self, *, max_batches: int) -> dict[str, float]:
        """Return the mean loss over windows spread evenly over the validation data, the same at every call.

        The batches are dealt out to the ranks and the sums added up. A rank without a batch of its own in the
        last round computes one again and does not count it, so that sharded models take part in every
        forward.
        """
        count = max(1, min(max_batches, len(self.val) // self.batch_size))
        windows = self.val.spread(count * self.batch_size).reshape(count, self.batch_size)
        rounds = -(-count // self.world_size)
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        was_training = self.model.training
        self.model.eval()
        for turn in range(rounds):
            index = turn * self.world_size + self.rank
            tokens = torch.from_numpy(self.val.read(windows[index % count]))
            loss = self.loss(self.to_device(self._shifted(tokens)))
            if index < count:
                total += loss.double().cpu()
        self.model.train(was_training)
        if self.world_size > 1:
            dist.all_reduce(total)
        return {"Loss/val_loss": total.item() / count}

    def optimizer_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the blocks' 2-D weights as "matrix"; embedding, untied head, norms and biases as "other"."""
        groups: dict[str, list[nn.Parameter]] = {"matrix": [], "other": []}
        for name, parameter in self.model.named_parameters():
            hidden = parameter.ndim >= 2 and "blocks." in name
            groups["matrix" if hidden else "other"].append(parameter)
        return groups

    def describe(self) -> dict[str, str | int | float]:
        """Return sizes of model and data."""
        row = self.preset
        return {
            "parameters": self.parameters,
            "matmul_parameters": row.matmul_parameters(),
            "dim": row.dim,
            "layers": row.layers,
            "heads": row.heads,
            "ffn": row.ffn,
            "vocab": row.vocab,
            "norm": row.norm,
            "attention": "torch scaled_dot_product_attention, causal",
            "data": self.train.source,
            "train_tokens": len(self.train) * self.train.seq_len,
            "val_tokens": len(self.val) * self.val.seq_len,
            "flops_per_token": self.flops_per_token,
        }


def _token_arrays(cfg: Mapping[str, Any], row: Preset) -> list[tuple[list[Tokens], str]]:
    """Return [(arrays, what they are)] for training and for validation, from the source that cfg names."""
    train_files, val_files, text = cfg["train_files"], cfg["val_files"], cfg["text"]
    if train_files or val_files:
        if text:
            raise ValueError("--text and --train-files are two sources of training data; give one")
        if not (train_files and val_files):
            raise ValueError("--train-files and --val-files belong together; one of them is missing")
        return [
            ([read_shard(p, vocab_size=row.vocab) for p in find_files(pattern)], f"{kind} shards {pattern}")
            for kind, pattern in (("training", train_files), ("validation", val_files))
        ]
    train, val = text_tokens(text) if text else corpus_tokens()
    what = f"text {text}" if text else "the embedded corpus (KJV and ASV)"
    return [([train], what), ([val], f"the validation part of {what}")]
