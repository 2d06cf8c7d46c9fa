"""Fast text-to-image personalization after Arar et al. 2023 (arXiv 2307.06925).

The public names load on first use (PEP 562), so that `import dte_lab` stays free of torch.
"""

import importlib

__version__ = "0.1.0"

placeholder_token = "S*"

_public = {
    "Backbone": "backbone",
    "load_backbone": "backbone",
    "Concept": "concept",
    "DTEPipeline": "pipeline",
    "EncoderConfig": "config",
    "MethodConfig": "config",
    "TuningEncoder": "encoder",
    "load_encoder": "encoder",
    "PromptEncoder": "tokens",
    "TokenTable": "tokens",
    "TuneConfig": "tuning",
    "tune": "tuning",
}
__all__ = ["__version__", "placeholder_token", *_public]


def __getattr__(name: str) -> object:
    if name not in _public:
        raise AttributeError(f"module 'dte_lab' has no attribute '{name}'")
    return getattr(importlib.import_module(f"dte_lab.{_public[name]}"), name)


def __dir__() -> list[str]:
    return __all__
