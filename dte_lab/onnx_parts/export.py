"""Write backbone and encoder as ONNX graphs, with all that running them needs besides.

    encoder, words, text, unet, encode, decode, tune    .onnx, see parts.py and tuning.py
    weights.bin                                         the weights of all of them, fp16
    tokenizer.json                                      as the library tokenizers writes it
    model.json                                          shapes, words, offsets, noise schedule

>>> export_onnx(DTEPipeline.from_pretrained("small"), "onnx/")
"""

import copy
import json
from pathlib import Path

import torch
from torch import nn

from dte_lab import placeholder_token
from dte_lab.common.errors import DTEError
from dte_lab.common.files import write_atomically
from dte_lab.encoder import trained_encoder
from dte_lab.onnx_parts.graphs import (
    OPSET,
    WEIGHT_FILE,
    WeightStore,
    gather_words,
    point_to,
    take_weights,
    to_onnx,
)
from dte_lab.onnx_parts.parts import (
    Layout,
    Part,
    autoencoder_parts,
    encoder_part,
    text_part,
    unet_part,
    words_part,
)
from dte_lab.onnx_parts.tuning import TERMS, TUNING_PROMPTS, tune_part
from dte_lab.pipeline import DTEPipeline
from dte_lab.tuning import TuneConfig

ONNX_FORMAT = "dte-onnx-1"
ABOUT_FILE, TOKENIZER_FILE = "model.json", "tokenizer.json"
PART_NAMES = ("encoder", "words", "text", "unet", "encode", "decode", "tune")


def export_onnx(pipe: DTEPipeline, out_dir: Path | str, tuning: bool = True) -> list[Path]:
    """Write a pipeline as ONNX graphs to a folder and return the paths, see the module.

    tuning: with the graph of a tuning step, which takes longest to make. The pipeline must be on
    the CPU, and in float32. What the graphs compute differs from torch by rounding alone: by less
    than 1e-3 after a whole sampling run, tested with ONNX Runtime.
    Raises DTEError without a trained encoder, for one of whole matrices, and elsewhere than on the
    CPU in float32; OSError when the folder cannot be written.
    """
    check_exportable(pipe)
    pipe = plain_copy(pipe)
    parts = onnx_parts(pipe, tuning)
    weights, models, keys = WeightStore(), {}, {}
    tokens = pipe.backbone.text_encoder.get_input_embeddings().weight.detach().numpy()
    ids = pipe.prompt_encoder.table.ids.numpy().astype("int32")
    for part in parts:
        models[part.name] = to_onnx(part)
        gather_words(models[part.name], tokens, ids)
        keys[part.name] = take_weights(models[part.name], weights)
    offsets, data, halves = weights.layout()
    files = {WEIGHT_FILE: data}
    for name, model in models.items():
        point_to(model, keys[name], weights, offsets)
        files[f"{name}.onnx"] = model.SerializeToString(deterministic=True)
    files[TOKENIZER_FILE] = pipe.backbone.tokenizer.backend_tokenizer.to_str().encode()
    about = describe(pipe, parts) | {"weights": {"file": WEIGHT_FILE, "half_bytes": halves}}
    about["files"] = {name: len(data) for name, data in files.items()}
    files[ABOUT_FILE] = json.dumps(about, indent=1).encode()
    for name, content in files.items():
        write_atomically(Path(out_dir) / name, content)
    return [Path(out_dir) / name for name in files]


def check_exportable(pipe: DTEPipeline) -> None:
    """Raise DTEError for a pipeline that `export_onnx` cannot write."""
    encoder = trained_encoder(pipe.encoder, "An export to ONNX")
    if encoder.settings.rank == "full":
        raise DTEError("An export to ONNX needs offsets of low rank, not of rank 'full'.")
    if pipe.backbone.device.type != "cpu" or pipe.backbone.dtype != torch.float32:
        raise DTEError("An export to ONNX needs the model on the CPU, in float32.")


def plain_copy(pipe: DTEPipeline) -> DTEPipeline:
    """One whose convolutions have the memory layout that ONNX knows; `pipe` stays as it is."""
    pipe = copy.deepcopy(pipe)
    for module in (pipe.backbone.unet, pipe.backbone.vae):
        nn.Module.to(module, memory_format=torch.contiguous_format)
    return pipe


def onnx_parts(pipe: DTEPipeline, tuning: bool = True) -> list[Part]:
    parts = [encoder_part(pipe), words_part(pipe), text_part(pipe), unet_part(pipe)]
    return parts + autoencoder_parts(pipe) + ([tune_part(pipe)] if tuning else [])


def describe(pipe: DTEPipeline, parts: list[Part]) -> dict:
    """What a program must know to run the graphs as `DTEPipeline` runs torch's modules."""
    backbone, encode, encoder = pipe.backbone, pipe.prompt_encoder, pipe.encoder
    tokenizer, scheduler = encode.tokenizer, backbone.scheduler
    config, usual = TuneConfig.of(backbone.recommended), backbone.recommended
    return {
        "format": ONNX_FORMAT,
        "opset": OPSET,
        "backbone": Path(backbone.name).name,
        "parts": {
            part.name: {
                "inputs": {k: [str(x.dtype)[6:], list(x.shape)] for k, x in part.inputs.items()},
                "outputs": list(part.outputs),
            }
            for part in parts
        },
        "resolution": backbone.resolution,
        "latent_shape": list(backbone.latent_shape),
        "prediction_type": backbone.prediction_type,
        "scheduler": {k: v for k, v in sorted(scheduler.config.items()) if not k.startswith("_")},
        "alphas_cumprod": backbone.alphas_cumprod.tolist(),
        "tokens": {
            "length": tokenizer.model_max_length,
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "pad": tokenizer.pad_token_id,
            "placeholder": placeholder_token,
            "placeholder_id": encode.table.ids[0].item(),
        },
        "words": encode.table.words,
        "offsets": [list(pair) for pair in Layout.of(encoder).pairs],
        "alpha_blend": encoder.method.alpha_blend,
        "guidance_scale": usual.guidance_scale,
        "tuning": {
            "prompt": TUNING_PROMPTS[0],
            "terms": list(TERMS),
            "num_steps": usual.num_steps,
            "constant_steps": config.constant_steps,
            "batch_size": config.batch_size,
            "token_learning_rate": config.token_learning_rate * encode.table.typical_entry,
            "offset_learning_rate": config.offset_learning_rate,
            "betas": [0.9, 0.99],
            "eps": 1e-8,
        },
    }
