"""Fine-tuning within a budget of FLOPs, as a peft method (GreenTrainer, https://arxiv.org/abs/2309.13192).

>>> import peft_greentrainer                  # registers the type GREENTRAINER with peft
>>> model = get_peft_model(base, GreenTrainerConfig(rho=0.5, task_type="CAUSAL_LM"))
>>> Trainer(model, args, train_dataset=train, callbacks=[GreenTrainerCallback()]).train()
"""

from . import registration


# The config class needs the type, so the type comes first.
registration.add_peft_type()

from .averaging import follow_selections  # noqa: E402
from .callback import GreenTrainerCallback  # noqa: E402
from .card import describe  # noqa: E402
from .config import GreenTrainerConfig  # noqa: E402
from .conversion import convert_to_lora, export_tensors, save_as_lora  # noqa: E402
from .cost import CostGraph, profile  # noqa: E402
from .layer import GreenTrainerLayer  # noqa: E402
from .model import GreenTrainerModel  # noqa: E402
from .selection import Selection, select  # noqa: E402


registration.register(GreenTrainerConfig, GreenTrainerModel)
registration.register_card(describe)
follow_selections()

__version__ = "0.1.0"

__all__ = [
    "CostGraph",
    "GreenTrainerCallback",
    "GreenTrainerConfig",
    "GreenTrainerLayer",
    "GreenTrainerModel",
    "Selection",
    "convert_to_lora",
    "export_tensors",
    "profile",
    "save_as_lora",
    "select",
]
