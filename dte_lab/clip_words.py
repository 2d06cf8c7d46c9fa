"""The vocabulary's words as CLIP sees them: which word is a picture of?"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from dte_lab.backbone import Backbone
from dte_lab.common.errors import DTEError
from dte_lab.tokens import TokenTable


@torch.no_grad()
def word_clip_embeddings(
    backbone: Backbone, table: TokenTable, batch_size: int = 256
) -> Float[Tensor, "words embed"]:
    """Unit CLIP embeddings of "a picture of a WORD" for the table's words.

    Raises DTEError when the text encoder has no projection.
    """
    if not backbone.has_projection:
        raise DTEError(
            f"The text encoder of backbone {backbone.name} has no projection to CLIP space; "
            "save it as CLIPTextModelWithProjection."
        )
    embeddings = []
    starts = range(0, len(table), batch_size)
    for i in tqdm(starts, desc="words", disable=len(starts) < 50):  # a large vocabulary takes time
        texts = [f"a picture of a {word}" for word in table.words[i : i + batch_size]]
        # Attention is causal, so padding behind the end token would change nothing.
        batch = backbone.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        ids = batch.input_ids
        embeds = backbone.text_encoder(input_ids=ids.to(backbone.device)).text_embeds
        embeddings.append(F.normalize(embeds.float(), dim=-1))
    return torch.cat(embeddings)


def word_of_pictures(
    embeds: Float[Tensor, "pictures embed"], word_clip: Float[Tensor, "words embed"]
) -> int:
    """Row of the word that is most similar to pictures of one concept, on average."""
    return int((word_clip.to(embeds) @ embeds.mean(dim=0)).argmax())
