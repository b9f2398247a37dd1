"""The tasks of eval.py by name. A task is one module: a dataclass `Config` with its keys, and `run(cfg)`.

The module's docstring begins the `--help` of the task, and its first sentence stands in the list of all tasks. Where
the `Config` has a key `checkpoint`, the data and backbone that this run was trained with are the defaults of these
sections.
"""

from importlib import import_module
from types import ModuleType

from runtime.config import pick

TASKS = {  # modules, of which eval.py imports only the one that runs
    "knn": "evaluation.tasks.knn",
    "linear": "evaluation.tasks.linear",
    "logistic": "evaluation.tasks.logistic",
    "protocol": "evaluation.tasks.protocol",
    "few_label": "evaluation.tasks.few_label",
    "transfer": "evaluation.tasks.transfer",
    "compare_classification": "evaluation.tasks.compare_classification",
    "features": "evaluation.tasks.features",
    "embedding": "evaluation.tasks.embedding",
    "correspondence": "evaluation.tasks.correspondence",
    "segment": "evaluation.tasks.segment",
    "compare": "evaluation.tasks.compare",
    "defects": "evaluation.tasks.defects",
    "landscape": "evaluation.tasks.landscape",
    "describe": "evaluation.tasks.describe",
    "data": "evaluation.tasks.data",
    "robustness": "evaluation.tasks.robustness",
    "attention": "evaluation.tasks.attention",
    "gradcam": "evaluation.tasks.gradcam",
    "export": "evaluation.tasks.export",
}


def module_of(task: str) -> ModuleType:
    """The module of a task.

    Raises:
        UserError: there is no such task.
    """
    return import_module(pick(TASKS, task, "task"))
