"""A concept as files that other programs read: LoRA weights and a textual-inversion embedding.

    pytorch_lora_weights.safetensors   diffusers and PEFT: `pipe.load_lora_weights(DIR)`
    learned_embeds.safetensors         v*: `pipe.load_textual_inversion(FILE)`, A1111, ComfyUI
    kohya_lora.safetensors             the same LoRA with the keys of A1111 and ComfyUI

They hold the soft path (v* and the offsets), which is what `generate` draws with alpha_blend 1; no
such file can carry the dual path. Tuning saw the offsets as `alpha_blend` of the picture, 0.7 by
default; alone they do up to 1 / 0.7 of that: load the LoRA at a scale of 0.7 where it is too much.
"""

from pathlib import Path

from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from jaxtyping import Float, Shaped
from safetensors.torch import save
from torch import Tensor

from dte_lab import placeholder_token
from dte_lab.common.errors import DTEError
from dte_lab.common.files import write_atomically
from dte_lab.concept import Concept
from dte_lab.lora import Offsets

LORA, EMBEDDING = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"
KOHYA = "kohya_lora.safetensors"


def export(concept: Concept, out_dir: Path | str) -> list[Path]:
    """Write the files of a Concept to a folder and return their paths.

    A concept without offsets (Textual Inversion) gets the embedding alone.
    Raises DTEError when the offsets belong to the hard path (`offsets_on="hard"`), OSError when
    the folder cannot be written.
    """
    if concept.config.offsets_on == "hard" and concept.offsets:
        raise DTEError(
            'With offsets_on="hard" the hard path has the offsets, but an exported LoRA works on '
            'v*: personalize with offsets_on="soft" to export.'
        )
    files = {EMBEDDING: save({placeholder_token: _plain(concept.v_star[0])})}
    if concept.offsets:
        lora = peft_state_dict(concept.offsets)
        kohya = convert_state_dict_to_kohya(lora)
        files[LORA] = save(lora, {"format": "pt"})
        files[KOHYA] = save({key: _plain(tensor) for key, tensor in kohya.items()})
    for name, data in files.items():
        write_atomically(Path(out_dir) / name, data)
    return [Path(out_dir) / name for name in files]


def peft_state_dict(offsets: Offsets) -> dict[str, Float[Tensor, "out in"]]:
    """Offsets -> {"unet.MODULE.lora_A.weight": (r, Din), "unet.MODULE.lora_B.weight": (Dout, r)}.

    PEFT keeps both matrices transposed: W' = W + B A there is W + A B here.
    """
    state = {}
    for key, (a, b) in offsets.items():
        module = f"unet.{key}.0" if key.endswith(".to_out") else f"unet.{key}"
        state[f"{module}.lora_A.weight"] = _plain(a[0].T)
        state[f"{module}.lora_B.weight"] = _plain(b[0].T)
    return state


def _plain(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.float() if tensor.is_floating_point() else tensor
