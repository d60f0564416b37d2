"""Fine-tuning of patched models on long inputs.

>>> from longctx.train import Epochs, Training, finetune, pack, prepare
>>> rows = pack(prepare("chats.json", tokenizer).dataset, 16_384)             # doctest: +SKIP
>>> done = finetune(model, tokenizer, Epochs(rows, rows=500), Training(max_steps=500),
...                 output_dir="runs/x")                                      # doctest: +SKIP
"""

from typing import TYPE_CHECKING

from longctx.lazy_exports import exporter

if TYPE_CHECKING:
    from .config import Gate, Training
    from .data.collate import pack
    from .data.preparation import Prepared, prepare
    from .data.sampling import Epochs, TrainDataset
    from .data.tokenize import TokenizeSettings
    from .engine.finetune import Finetuned, finetune
    from .engine.lora import Lora, load_adapter
    from .loss.distillation import Distillation
    from .loss.load_balance import LoadBalance
    from .loss.long_ce import LongCE
    from .loss.objective import Contrastive, Losses, Unlikelihood
    from .loss.sequence_unlikelihood import SequenceUnlikelihood
    from .positions import FullLength, LengthSchedule, PoSE, Positions, RandomPositions
    from .recipes import RECIPES, Recipe
    from .run import Run, TrainingPlan

__all__ = [
    "RECIPES",
    "Contrastive",
    "Distillation",
    "Epochs",
    "Finetuned",
    "FullLength",
    "Gate",
    "LengthSchedule",
    "LoadBalance",
    "LongCE",
    "Lora",
    "Losses",
    "PoSE",
    "Positions",
    "Prepared",
    "RandomPositions",
    "Recipe",
    "Run",
    "SequenceUnlikelihood",
    "TokenizeSettings",
    "TrainDataset",
    "Training",
    "TrainingPlan",
    "Unlikelihood",
    "finetune",
    "load_adapter",
    "pack",
    "prepare",
]

__getattr__ = exporter(
    __name__,
    __all__,
    (
        "config",
        "positions",
        "data.tokenize",
        "data.sampling",
        "data.collate",
        "data.preparation",
        "loss.sequence_unlikelihood",
        "loss.distillation",
        "loss.load_balance",
        "loss.long_ce",
        "loss.objective",
        "engine.lora",
        "engine.finetune",
        "recipes",
        "run",
    ),
)
