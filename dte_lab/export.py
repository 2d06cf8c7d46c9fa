"""A concept as files that other programs read: LoRA weights and a textual-inversion embedding.

    pytorch_lora_weights.safetensors   diffusers and PEFT: `pipe.load_lora_weights(DIR)`
    learned_embeds.safetensors         v*: `pipe.load_textual_inversion(FILE)`, A1111, ComfyUI
    kohya_lora.safetensors             the same LoRA with the keys of A1111 and ComfyUI

With a `name` they are called NAME_lora, NAME and NAME_kohya: A1111 takes the name of an embedding's
file as the word that calls it. They hold the soft path (v* and the offsets), which is what
`generate` draws with alpha_blend 1; no such file can carry the dual path.
"""

import hashlib
import re
from pathlib import Path

from diffusers import StableDiffusionPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from jaxtyping import Float, Shaped
from safetensors.torch import save
from torch import Tensor
from transformers import CLIPTextModel

from dte_lab import placeholder_token
from dte_lab.backbone import load_backbone, stock_pipeline
from dte_lab.common.errors import DTEError
from dte_lab.common.files import check_path, prepare_folder, write_atomically
from dte_lab.common.origin import origin_text
from dte_lab.common.settings import check_kind, check_text
from dte_lab.concept import Concept
from dte_lab.lora import Offsets
from dte_lab.recommended import SMALL_WORLD, STABLE_DIFFUSION
from dte_lab.sd15 import SD15

LORA, EMBEDDING = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"
KOHYA = "kohya_lora.safetensors"


def export(
    concept: Concept,
    out_dir: Path | str,
    name: str | None = None,
    token: str = placeholder_token,
) -> list[Path]:
    """Write the files of a Concept to a folder and return their paths.

    name: of the files. token: the word that stands for the concept in prompts; two concepts in one
    pipeline need two. A concept without offsets (Textual Inversion) gets the embedding alone.
    Raises DTEError when the offsets belong to the hard path (`offsets_on="hard"`), or for a name or
    a token that can be none; OSError when the folder cannot be written.
    """
    check_kind("the concept", concept, Concept)
    check_text("the token", token)
    if concept.config.offsets_on == "hard" and concept.offsets:
        raise DTEError(
            'With offsets_on="hard" the hard path has the offsets, but an exported LoRA works on '
            'v*: personalize with offsets_on="soft" to export.'
        )
    if not token or re.search(r"\s", token) or not token.isprintable():
        raise DTEError(f"The token {token!r} is no single word: use for example <my-thing>.")
    embedding, lora, kohya = export_paths(concept, out_dir, name)
    prepare_folder(out_dir)
    origin = origin_text(export_origin(concept, token))
    files = {embedding: save({token: _plain(concept.v_star[0])}, origin)}
    if concept.offsets:
        state = peft_state_dict(concept.offsets)
        files[lora] = save(state, {"format": "pt", **origin})
        state = convert_state_dict_to_kohya(state)
        state = {key: _plain(tensor) for key, tensor in state.items()}
        files[kohya] = save(state, kohya_metadata(concept, state, kohya.stem, token) | origin)
    for path, data in files.items():
        write_atomically(path, data)
    return list(files)


def export_origin(concept: Concept, token: str) -> dict[str, str]:
    """What the files of `export` are made of, as origin.py writes it into them."""
    return {"concept": concept.origin, "token": token}


def export_paths(concept: Concept, out_dir: Path | str, name: str | None = None) -> list[Path]:
    """Of the embedding, the LoRA and kohya's LoRA, as `export` calls them.

    Raises DTEError for a name that no file can have.
    """
    names = [EMBEDDING, LORA, KOHYA]
    check_path("the output folder", out_dir)
    if name is not None:
        check_text("the name", name)
        if not re.fullmatch(r"\w[\w.-]{0,99}", name):
            raise DTEError(f"The name {name!r} has to be letters, digits, '-', '_' and '.' alone.")
        names = [f"{name}{end}.safetensors" for end in ("", "_lora", "_kohya")]
    return [Path(out_dir) / file for file in names]


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


def kohya_metadata(
    concept: Concept, state: dict[str, Tensor], name: str, token: str
) -> dict[str, str]:
    """What kohya's sd-scripts write beside a LoRA, and its readers show; all values are strings.

    The hash is the one of their files: SHA-256 of what follows the header.
    """
    data = save(state)
    header = 8 + int.from_bytes(data[:8], "little")
    rank = str(max(a.shape[-1] for a, _ in concept.offsets.values()))
    model = "sd_v1" if concept.backbone == "sd15" else f"dte_lab {Path(concept.backbone).name}"
    return {
        "ss_base_model_version": model,
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_output_name": name,
        "ss_steps": str(concept.info.get("num_steps", "")),
        "sshs_model_hash": hashlib.sha256(data[header:]).hexdigest(),
        "modelspec.title": name,
        "modelspec.trigger_phrase": token,
    }


def diffusers_pipeline(name: str | Path = "small", device: str = "cpu") -> StableDiffusionPipeline:
    """diffusers' own pipeline of a backbone, into which what `export` wrote can be loaded.

    Its text encoder is a CLIPTextModel, as diffusers' loader of embeddings needs it.
    Raises DTEError as `load_backbone` does.
    """
    backbone = load_backbone(name, device)
    text, known = backbone.text_encoder, backbone.text_encoder.text_model.state_dict()
    plain = CLIPTextModel(text.config).to(text.device, text.dtype).eval()
    prefix = next(iter(plain.state_dict())).removesuffix(next(iter(known)))
    plain.load_state_dict({prefix + key: tensor for key, tensor in known.items()})
    return stock_pipeline(
        backbone.vae, plain, backbone.tokenizer, backbone.unet, backbone.scheduler
    )


def recipe(concept: Concept, paths: list[Path], token: str = placeholder_token) -> str:
    """Python that draws with diffusers what `export` wrote to `paths`."""
    if concept.backbone == "sd15":
        lines = [
            "from diffusers import StableDiffusionPipeline",
            f'pipe = StableDiffusionPipeline.from_pretrained("{SD15}")',
        ]
    else:
        lines = [
            "from dte_lab.export import diffusers_pipeline",
            f"pipe = diffusers_pipeline({str(concept.backbone)!r})",
        ]
    lines.append(f"pipe.load_textual_inversion({str(paths[0])!r})")
    if len(paths) > 1:
        folder, file, adapter = str(paths[1].parent), paths[1].name, paths[1].stem
        adapter = re.sub(r"\W", "_", adapter)
        lines += [
            f"pipe.load_lora_weights({folder!r}, weight_name={file!r}, adapter_name={adapter!r})",
            f"pipe.set_adapters({adapter!r}, 1.0)  # the strength",
        ]
    usual = STABLE_DIFFUSION if concept.backbone == "sd15" else SMALL_WORLD
    scale = (concept.settings or usual).guidance_scale
    lines.append(f"picture = pipe({f'{token} at night'!r}, guidance_scale={scale}).images[0]")
    return "\n".join(lines)


def _plain(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.float() if tensor.is_floating_point() else tensor
