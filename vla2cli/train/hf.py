"""transformers' training classes, imported without a look at the hub: peft and more come along."""

from vla2_models.imports import nothing_from_the_hub

with nothing_from_the_hub():
    from transformers import (
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

__all__ = [
    "PrinterCallback",
    "Trainer",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrainingArguments",
]
