"""What changes weights: the optimiser, one step, the average of weights, and the state on disk.

T words · M captions in a batch
"""

import contextlib
import io
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import files
from dataset import mix
from encoder import fingerprint, multiplies_bfloat16
from losses import cross_entropy, unlooked
from model import CaptionModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """How the weights change."""

    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 32
    """Images a step, each with all its captions."""
    lr: float = 6e-4
    """Peak learning rate of the decoder."""
    cnn_lr: float = 1e-5
    """Peak learning rate of the CNN's last stages (--finetune-cnn)."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises; it falls to 0 as a cosine after."""
    weight_decay: float = 0.01
    """AdamW's decay of weight matrices."""
    label_smoothing: float = 0.1
    """Share of the target spread over all words."""
    attention_penalty: float = 1.0
    """Weight of the penalty for parts of the image not looked at (attention-lstm)."""
    grad_clip: float = 1.0
    """Largest norm of the gradient (0: no limit)."""
    ema: float = 0.998
    """Decay of the average of weights that is evaluated and saved (0: no average)."""
    patience: int = 5
    """Stop after this many epochs without a better validation CIDEr (0: never)."""
    seed: int = 0
    """Seed of weights, order, dropout and augmentation."""
    output: Path | None = None
    """Folder of the run (default: runs/DATASET, with a number if that is taken)."""
    resume: bool = False
    """Go on with the run in --output where it stopped, with its flags."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    amp: bool = True
    """Mixed precision (bfloat16) where the device is made for it: GPUs, CPUs with AVX512-BF16."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError("--epochs and --batch-size must be at least 1")
        if not (self.lr > 0 and self.cnn_lr > 0):
            raise ValueError(f"--lr {self.lr} and --cnn-lr {self.cnn_lr} must be above 0")
        for name in ("warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                said = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise ValueError(f"{said} must be at least 0 and below 1")
        if self.grad_clip < 0 or self.weight_decay < 0 or self.patience < 0:
            raise ValueError("--grad-clip, --weight-decay and --patience must not be below 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema {self.ema} must be at least 0 and below 1")


class Trainer:
    """A model with its optimiser and average of weights, and how far training has come.

    Nothing is random but by (seed, step), so this state and the step are all a resumed run needs.
    """

    COUNTS = ("step_number", "epoch", "batch", "words", "seconds", "rows")

    def __init__(self, model: CaptionModel, config: TrainConfig, total_steps: int):
        self.model, self.config, self.total_steps = model, config, total_steps
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(self.groups(), betas=(0.9, 0.98), eps=1e-8)
        self.average = {name: tensor.clone() for name, tensor in model.learned()}
        self.step_number = self.epoch = self.batch = 0
        self.nll = torch.zeros((), dtype=torch.float64, device=self.device)
        self.words = 0
        self.seconds = 0.0
        self.rows: list[dict[str, Any]] = []

    def groups(self) -> list[dict[str, Any]]:
        """Return AdamW's parameter groups: matrices decay, vectors don't; the CNN has its lr."""
        config, slow = self.config, self.model.encoder.trained == "last"
        groups = []
        for part, lr in (
            (self.model.encoder, config.cnn_lr if slow else config.lr),
            (self.model.decoder, config.lr),
        ):
            learning = [parameter for parameter in part.parameters() if parameter.requires_grad]
            for matrices in (True, False):
                chosen = [each for each in learning if (each.dim() > 1) == matrices]
                decay = config.weight_decay if matrices else 0.0
                if chosen:
                    groups.append({"params": chosen, "peak": lr, "weight_decay": decay})
        return groups

    def rate(self) -> float:
        """Return the share of the peak learning rate at this step: warm-up, then a cosine to 0."""
        warmup = max(1, round(self.config.warmup * self.total_steps))
        if self.step_number < warmup:
            return (self.step_number + 1) / warmup
        along = (self.step_number - warmup) / max(1, self.total_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, along)))

    def step(self, inputs: Tensor, tokens: Tensor, owner: Tensor) -> None:
        """Learn from one batch."""
        config = self.config
        torch.manual_seed(mix(config.seed, self.step_number))
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.rate()
        mixed = config.amp and multiplies_bfloat16(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            taught = self.model(*(each.to(self.device) for each in (inputs, tokens, owner)))
        loss = cross_entropy(taught.logits, tokens.to(self.device), config.label_smoothing)
        objective = loss.objective / loss.words
        if taught.attention is not None:
            objective = objective + config.attention_penalty * unlooked(taught.attention)
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()
        if config.grad_clip:
            learning = [each for group in self.optimizer.param_groups for each in group["params"]]
            nn.utils.clip_grad_norm_(learning, config.grad_clip)
        self.optimizer.step()
        self.step_number += 1
        self.batch += 1
        self.update_average()
        self.nll += loss.nll
        self.words += loss.words

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average a little towards the weights; at the start it follows them closely."""
        decay = min(self.config.ema, (1 + self.step_number) / (10 + self.step_number))
        for name, tensor in self.model.learned():
            if self.config.ema and tensor.is_floating_point():
                self.average[name].lerp_(tensor, 1 - decay)
            else:
                self.average[name].copy_(tensor)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[CaptionModel]:
        """Lend the model with the average of weights in it, in eval mode."""
        own = {name: tensor.clone() for name, tensor in self.model.learned()}
        self.model.load_state_dict(self.average, strict=False)
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.load_state_dict(own, strict=False)

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs, as tensors and plain values."""
        return {
            "weights": dict(self.model.learned()),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "encoder": fingerprint(self.model.encoder) if self.frozen() else None,
            "nll": float(self.nll),
            **{name: getattr(self, name) for name in self.COUNTS},
        }

    def frozen(self) -> bool:
        return self.model.encoder.trained == "none"

    def load(self, state: dict[str, Any]) -> None:
        """Take over a `state`; ValueError where the frozen CNN is another."""
        if self.frozen() and state["encoder"] != fingerprint(self.model.encoder):
            raise ValueError(
                f"the CNN's weights are {fingerprint(self.model.encoder)}, but the run began with "
                f"{state['encoder']}; give the same --cnn-weights"
            )
        learned = dict(self.model.learned())
        if different := state["weights"].keys() ^ learned.keys():
            raise ValueError(
                f"the run was begun by another version of the project ({min(different)} is only in "
                "one of them); go on with that version, or start a new run"
            )
        self.model.load_state_dict(state["weights"], strict=False)
        # The command line may have changed learning rates and decay: they are not taken over.
        groups = [{**group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, groups, strict=True):
            group |= {"peak": own["peak"], "weight_decay": own["weight_decay"]}
        self.average = {name: value.to(self.device) for name, value in state["average"].items()}
        self.nll.fill_(state["nll"])
        for name in self.COUNTS:
            setattr(self, name, state[name])

    def best(self) -> float:
        """Return the best validation CIDEr so far."""
        return max((row["CIDEr"] for row in self.rows if row["CIDEr"] is not None), default=-1.0)

    def patience_is_over(self) -> bool:
        """Tell whether the last `patience` epochs have all been worse than one before them."""
        scores = [row["CIDEr"] for row in self.rows if row["CIDEr"] is not None]
        waited = len(scores) - 1 - scores.index(max(scores)) if scores else 0
        return bool(self.config.patience) and waited >= self.config.patience


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write last.pt; the one before it stays as previous.pt."""
    # Through memory: torch.save turns a full disk into a RuntimeError without a reason.
    content = io.BytesIO()
    torch.save(state, content)
    last = folder / "last.pt"
    with files.replacing(last) as temporary:
        temporary.write_bytes(content.getbuffer())
        if last.exists():
            last.replace(folder / "previous.pt")


def load_state(folder: Path) -> dict[str, Any] | None:
    """Return the training state of a run (the one before it if the last is damaged), or None."""
    for name in ("last.pt", "previous.pt"):
        if not (folder / name).exists():
            continue
        try:
            return torch.load(folder / name, map_location="cpu", weights_only=True)
        except Exception as error:
            log.warning("%s can't be read (%s)", folder / name, str(error).splitlines()[0])
    return None
