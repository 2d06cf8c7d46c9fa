"""Words as vectors: the vocabulary's usable words, and prompts that carry a predicted embedding.

The predicted word embedding v* (paper: v* = E(I_c)) takes the place of the placeholder "S*" in a
prompt; its nearest real word v_h is the "hard" word of the dual path.
"""

import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dte_lab import placeholder_token
from dte_lab.backbone import Backbone, backbone_folder
from dte_lab.common.errors import DTEError
from dte_lab.prompts import check_prompts

log = logging.getLogger(__name__)

CLIP_WORDS = Path(__file__).parent / "clip_words.json"  # by tools/clip_words.py


class TokenTable:
    """The whole words of the vocabulary, with their input embeddings.

    Usable are tokens that end a word ("</w>") and consist of 3 or more ASCII letters: what a byte-
    level vocabulary writes for an emoji are letters, too. Of those, only what `known_words` lists,
    where it lists any. ("ours")

    Attributes:
        words: list of n strings.
        ids: their token ids, (n,).
        embeddings: their rows of the text encoder's embedding matrix, (n, d), fp32.
        mean_norm: mean Euclidean norm of these rows, a float.
        typical_entry: root mean square of their entries, a float.
    """

    def __init__(self, backbone: Backbone) -> None:
        vocabulary = backbone.tokenizer.get_vocab()
        special = set(backbone.tokenizer.all_special_tokens)
        usable = sorted(
            (i, token.removesuffix("</w>"))
            for token, i in vocabulary.items()
            if token.endswith("</w>") and token not in special
        )
        usable = [
            (i, word) for i, word in usable if word.isascii() and word.isalpha() and len(word) >= 3
        ]
        if (known := known_words(backbone)) is not None:
            usable = [(i, word) for i, word in usable if word in known]
        if not usable:
            raise DTEError(f"The vocabulary of backbone {backbone.name} has no usable word.")
        self.ids = torch.tensor([i for i, _ in usable])
        self.words = [word for _, word in usable]
        weight = backbone.text_encoder.get_input_embeddings().weight
        self.embeddings = weight.detach()[self.ids.to(weight.device)].float()
        self.ids = self.ids.to(weight.device)
        self.norms = self.embeddings.norm(dim=-1)  # (n,)
        self.mean_norm = self.norms.mean().item()
        self.typical_entry = self.embeddings.square().mean().sqrt().item()
        self._neighbour_cosines: dict[int, float] = {}  # by k

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def gaussian(self) -> tuple[Float[Tensor, " dim"], Float[Tensor, "dim dim"]]:
        """Mean and precision of a Gaussian fitted to the embeddings.

        The covariance is shrunk by a tenth towards the identity's multiple of the same trace, so
        that few words in many dimensions still have an inverse.
        """
        covariance = torch.cov(self.embeddings.T, correction=0)  # (d, d)
        eye = torch.eye(len(covariance)).to(covariance)
        covariance = 0.9 * covariance + 0.1 * covariance.diagonal().mean() * eye
        return self.embeddings.mean(dim=0), torch.linalg.inv(covariance)

    def neighbour_cosine(self, k: int) -> float:
        """Mean cosine of a word to its k nearest other words, over up to 1,000 words."""
        if k not in self._neighbour_cosines:  # not functools.cache, which keeps the table alive
            some = self.embeddings[:: -(-len(self) // 1000)]
            best = self.cosines(some).topk(min(k + 1, len(self)), dim=-1).values  # (m, k + 1)
            self._neighbour_cosines[k] = best[:, 1:].mean().item()  # the first is the word itself
        return self._neighbour_cosines[k]

    def cosines(self, v: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch words"]:
        """Cosine of each embedding to each word; no gradient."""
        table, norms = self.embeddings.to(v.device), self.norms.to(v.device)
        return F.normalize(v.detach().float(), dim=-1) @ table.T / norms

    def nearest_rows(
        self, v: Float[Tensor, "batch dim"], k: int = 1
    ) -> tuple[Float[Tensor, "batch near"], Int[Tensor, "batch near"]]:
        """The k nearest words by cosine: (similarities, rows of the table).

        With fewer than k words in the table, all of them.
        """
        return self.cosines(v).topk(min(k, len(self)), dim=-1)

    def nearest(
        self, v: Float[Tensor, "batch dim"], k: int = 5
    ) -> tuple[Int[Tensor, "batch near"], list[list[str]], Float[Tensor, "batch near"]]:
        """The k usable words nearest to each embedding by cosine similarity.

        Returns token ids, B lists of k words, and similarities.
        """
        similarities, rows = self.nearest_rows(v, k)
        words = [[self.words[i] for i in row] for row in rows.tolist()]
        return self.ids.to(rows.device)[rows], words, similarities


def known_words(backbone: Backbone) -> set[str] | None:
    """The words that mean something to a backbone; None where nobody knows them.

    They are in the `words.json` of its folder: an embedding that training hardly met means nothing.
    Where there is none and the vocabulary is CLIP's, they are its 12,003 nouns (clip_words.json):
    the rest are mostly pieces of words, such as "tification".
    Raises DTEError when a file holds something else than a list of words.
    """
    path = backbone_folder(backbone.name) / "words.json"
    if not path.exists():
        words = json.loads(CLIP_WORDS.read_text())
        vocabulary = backbone.tokenizer.get_vocab()
        return set(words) if all(f"{word}</w>" in vocabulary for word in words) else None
    try:
        words = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DTEError(f"{path} must hold a JSON list of words: write it again or remove it.")
    return set(words)


class PromptTokens(NamedTuple):
    """Tokenized prompts with places for v*."""

    ids: Int[Tensor, "batch length"]
    slots: Int[Tensor, "batch length"]  # which vector to insert at each position, or -1


class PromptEncoder:
    """Prompts -> encoder_hidden_states (B, L, d) of the UNet, with embeddings inserted at "S*".

    The embedding enters through a forward hook on the text encoder's embedding layer, so gradients
    flow from the UNet to v*; tokenizer and text encoder stay as they are.
    """

    def __init__(self, backbone: Backbone, table: TokenTable | None = None) -> None:
        self.tokenizer = backbone.tokenizer
        self.text_encoder = backbone.text_encoder
        self.table = table or TokenTable(backbone)
        self._pieces: dict[str, list[int]] = {}  # text between placeholders -> token ids

    def __call__(
        self, prompts: Sequence[str], v_star: Float[Tensor, "one_or_batch *n dim"]
    ) -> Float[Tensor, "batch length dim"]:
        """Encode prompts, each with "S*", with embeddings (B, d) or several each, (B, n, d).

        A batch of 1 serves all prompts. Raises DTEError when a prompt has no placeholder, or when
        the batch sizes disagree.
        """
        n = 1 if v_star.ndim == 2 else v_star.shape[1]
        return self.encode(self.tokenize(prompts, n), v_star)

    def encode(
        self, tokens: PromptTokens, v_star: Float[Tensor, "one_or_batch *n dim"]
    ) -> Float[Tensor, "batch length dim"]:
        """As a call, of prompts that `tokenize` has seen."""
        ids, slots = tokens
        v_star = v_star[:, None] if v_star.ndim == 2 else v_star  # (B, n, d)
        if v_star.shape[0] not in (1, len(ids)):
            raise DTEError(f"Got {len(ids)} prompts but {v_star.shape[0]} embeddings v*.")
        v_star = v_star.expand(len(ids), -1, -1)

        def insert(module: torch.nn.Module, args: tuple, embeddings: Tensor) -> Tensor:  # (B, L, d)
            index = slots.clamp(min=0)[..., None].expand(-1, -1, v_star.shape[-1])
            inserted = v_star.gather(1, index).to(embeddings.dtype)  # (B, L, d)
            return torch.where((slots >= 0)[..., None], inserted, embeddings)

        hook = self.text_encoder.get_input_embeddings().register_forward_hook(insert)
        try:
            return self.text_encoder(input_ids=ids).last_hidden_state
        finally:
            hook.remove()

    @torch.no_grad()
    def plain(self, prompts: Sequence[str]) -> Float[Tensor, "batch length dim"]:
        """Encode ordinary prompts, for instance the negative prompt ""."""
        ids = [self._fit(self._piece(prompt)) for prompt in prompts]
        return self.text_encoder(input_ids=self._tensor(ids)).last_hidden_state

    @torch.no_grad()
    def hard(
        self, prompts: Sequence[str], v_star: Float[Tensor, "one_or_batch dim"]
    ) -> Float[Tensor, "batch length dim"]:
        """Encode prompts with the real word nearest to v_star in its place, v_h."""
        return self(prompts, self.nearest_hard(v_star))

    @torch.no_grad()
    def nearest_hard(self, v_star: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """v_h: the embedding of the usable word nearest to v_star by cosine."""
        rows = self.table.nearest_rows(v_star)[1].squeeze(-1)
        return self.table.embeddings.to(v_star.device)[rows]

    def word(self, text: str) -> Float[Tensor, "1 dim"]:
        """The embedding of a word, the mean of its tokens'."""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        table = self.text_encoder.get_input_embeddings().weight.detach()
        return table[torch.tensor(ids, device=table.device)].float().mean(dim=0, keepdim=True)

    def tokenize(self, prompts: Sequence[str], num_vectors: int = 1) -> PromptTokens:
        """Token ids of prompts, and where the vectors go.

        Raises DTEError when a prompt has no placeholder within the text encoder's length.
        """
        check_prompts(prompts)
        all_ids, all_slots = [], []
        for prompt in prompts:
            ids, slots = [], []
            for i, text in enumerate(prompt.split(placeholder_token)):
                if i > 0:
                    # Any word's id will do: its embedding is replaced by the vector.
                    ids += [self.table.ids[0].item()] * num_vectors
                    slots += range(num_vectors)
                piece = self._piece(text)
                ids += piece
                slots += [-1] * len(piece)
            limit = self.tokenizer.model_max_length - 2
            if 0 not in slots[: limit - num_vectors + 1]:
                raise DTEError(
                    f"The prompt {prompt!r} is too long: {placeholder_token} lies beyond "
                    f"the {limit} tokens that the text encoder reads."
                )
            all_ids.append(self._fit(ids))
            slots = [-1, *slots[:limit]]
            all_slots.append(slots + [-1] * (limit + 2 - len(slots)))
        return PromptTokens(self._tensor(all_ids), self._tensor(all_slots))

    def _piece(self, text: str) -> list[int]:
        if text not in self._pieces:
            self._pieces[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._pieces[text]

    def _fit(self, ids: list[int]) -> list[int]:
        """Add begin, end and padding; cut what is too long."""
        length = self.tokenizer.model_max_length
        if len(ids) > length - 2:
            log.warning("A prompt of %d tokens was cut to %d.", len(ids), length - 2)
        ids = [self.tokenizer.bos_token_id, *ids[: length - 2], self.tokenizer.eos_token_id]
        return ids + [self.tokenizer.pad_token_id] * (length - len(ids))

    def _tensor(self, rows: list[list[int]]) -> Int[Tensor, "batch length"]:
        return torch.tensor(rows, device=self.text_encoder.device)
