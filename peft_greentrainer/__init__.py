"""Fine-tuning within a budget of FLOPs, as a peft method (GreenTrainer, https://arxiv.org/abs/2309.13192).

>>> import peft_greentrainer                  # registers the type GREENTRAINER with peft
>>> model = get_peft_model(base, GreenTrainerConfig(rho=0.5, task_type="CAUSAL_LM"))
>>> Trainer(model, args, train_dataset=train, callbacks=[GreenTrainerCallback()]).train()
"""

from .adapter import registration


# The config class needs the type, so the type comes first.
registration.add_peft_type()

from .adapter.config import GreenTrainerConfig  # noqa: E402
from .adapter.layer import GreenTrainerLayer  # noqa: E402
from .measuring.formulas import flop_counter  # noqa: E402
from .measuring.profile import profile  # noqa: E402
from .planning.graph import CostGraph  # noqa: E402
from .planning.selection import Selection, select  # noqa: E402
from .sharing.card import describe  # noqa: E402
from .sharing.export import convert_to_lora, export_tensors, save_as_lora  # noqa: E402
from .training.averaging import follow_selections  # noqa: E402
from .training.callback import GreenTrainerCallback  # noqa: E402
from .training.model import GreenTrainerModel  # noqa: E402


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
    "flop_counter",
    "profile",
    "save_as_lora",
    "select",
]
