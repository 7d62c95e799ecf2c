"""VLMo: one transformer that is an image encoder, a text encoder and a fusion encoder.

Axes in the whole package: B batch, N global batch, T text tokens, P image tokens (1 + patches), D width,
H heads, L layers, S = T + P. Text comes first in a pair; token 0 of either modality is its CLS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from vlmo_ray import rng
from vlmo_ray.config import POOLED_HEADS, ModelConfig, check_model
from vlmo_ray.model import hub
from vlmo_ray.model.attention import PADDED
from vlmo_ray.model.embeddings import ImageEmbedding, RelativePositionBias, TextEmbedding
from vlmo_ray.model.experts import MoMELayer, Route
from vlmo_ray.model.heads import ClassifierHead, ContrastHead, MaskedWordHead, Pooler


@dataclass
class Encoding:
    """Hidden states after the final norm. A field is None if its modality or branch was not asked for."""

    text: Tensor | None = None  # [B,T,D]
    image: Tensor | None = None  # [B,P,D]
    text_vl: Tensor | None = None  # the same tokens with the vision-language expert in the top layers
    image_vl: Tensor | None = None
    layers: tuple[Tensor, ...] = ()  # [B,S,D] after the layers that were asked for, before the final norm


class VLMo(
    nn.Module,
    ModelHubMixin,
    library_name="vlmo-ray",
    tags=["vision-language"],
    paper_url="https://arxiv.org/abs/2111.02358",
):
    """The Mixture-of-Modality-Experts transformer with the heads that `config.heads` names; the others are None.

    `save_pretrained(folder)`, `push_to_hub(id)` and `VLMo.from_pretrained(folder or id)` are those of huggingface_hub.
    """

    drop_path_rates: Tensor  # [L]

    def __init__(self, config: ModelConfig):
        super().__init__()
        check_model(config)
        self.config = config
        width = config.width
        self.text_embed = TextEmbedding(config)
        self.image_embed = ImageEmbedding(config)
        # 0 text, 1 image, 2 the second image of NLVR2
        self.modality = nn.Embedding(3 if "nlvr2" in config.heads else 2, width)
        self.relative = RelativePositionBias(config) if config.position == "relative" else None
        self.layers = nn.ModuleList(MoMELayer(config, index) for index in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        # the probability of skipping a layer grows linearly with its index
        rates = torch.linspace(0, config.drop_path, config.depth)
        self.register_buffer("drop_path_rates", rates, persistent=False)

        heads = config.heads
        with_bias = config.init_logit_bias is not None
        self.itc = ContrastHead(width, with_bias) if "itc" in heads else None
        self.itc_vl = ContrastHead(width, with_bias) if "itc_vl" in heads else None
        self.pooler = Pooler(width) if any(head in heads for head in POOLED_HEADS) else None
        self.itm = nn.Linear(width, 2) if "itm" in heads else None
        self.mlm = MaskedWordHead(width, config.vocab_size) if "mlm" in heads else None
        self.vqa = ClassifierHead(width, 2 * width, config.num_answers) if "vqa" in heads else None
        self.nlvr2 = ClassifierHead(2 * width, 2 * width, 2) if "nlvr2" in heads else None

    def _save_pretrained(self, save_directory: Path) -> None:
        hub.write(save_directory, self.config, self.state_dict())

    @classmethod
    def _from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, *, model_id: str, config: dict | None = None, **download
    ) -> VLMo:
        """In float32, on the CPU. `config` is what the mixin has read already."""
        found, state = hub.read(model_id, **download)
        model = cls(found)
        model.load_state_dict(state)
        return model

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def embed_image(
        self, pixels: Tensor, image_slot: int = 1, masked: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        """Pixels [B,3,H,W] -> [B,P,D] with positions and modality; `image_slot` 2 is NLVR2's second image.

        In masked image modelling `mask_token` [1,1,D] stands for the patches that `masked` bool [B,P-1] names.
        """
        return self.image_embed(pixels, masked, mask_token) + self.modality.weight[image_slot]

    def embed_text(self, ids: Tensor, noise: rng.Noise | rng.Noises | None = None) -> Tensor:
        """Token ids int [B,T] -> [B,T,D]; the modality is added after LayerNorm and dropout."""
        return self.text_embed(ids, noise) + self.modality.weight[0]

    def position_bias(
        self, text_len: int | None = None, image: bool = True, kept: Tensor | None = None
    ) -> Tensor | None:
        """The relative bias [L,H,S,S] of all layers, tokens `[text; image]`; None for absolute positions.

        A step gathers it once and hands it to every pass; unimodal passes read its diagonal blocks. `text_len` None
        means `config.max_text_len`; `image` False leaves the image tokens out; `kept` int64 [P] names those that a
        caller has kept of the tokens of `embed_image`, None: all.
        """
        if self.relative is None:
            return None
        return self.relative(self.config.max_text_len if text_len is None else text_len, image, kept)

    def encode(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        read: int | None = None,
        bias: Tensor | None = None,
        noise: rng.Noise | rng.Noises | None = None,
        vl_branch: bool = False,
        image_slot: int = 1,
        layers: Sequence[int] = (),
        writing: bool = False,
    ) -> Encoding:
        """Encodes images, texts or pairs: which arguments are present decides the experts.

        Args:
            image: pixels [B,3,H,W], or tokens [B,P,D] from `embed_image`.
            text: token ids int [B,T].
            text_mask: bool [B,T], True for real tokens; None: all are real. Padding changes no result.
            read: how many tokens are wanted, from the first on: 1 is the CLS of an image, of a text, or of a pair's
                text. The last layer then computes no others. None: all. Of a pair, at most its text.
            bias: from `position_bias`, covering at least the tokens of this call; None gathers it here.
            noise: the draws of drop path and dropout. None: neither, regardless of `train()` or `eval()`.
            vl_branch: in a unimodal pass, also run the top layers with the vision-language expert, from the hidden
                state below `vl_start` (the second contrastive branch).
            image_slot: the modality row of `image`, if it is pixels.
            layers: which layers' states `Encoding.layers` has, from 0.
            writing: the text of a pair is being written: image tokens do not attend to it, and each of its tokens
                attends to the image, to itself and to those before it.
        """
        assert not (vl_branch and image is not None and text is not None), "a pair has no separate VL branch"
        num_text = 0 if text is None else text.shape[1]
        assert read is None or text is None or 0 < read <= num_text, f"{read} states of {num_text} text tokens"
        if image is not None and image.ndim == 4:
            image = self.embed_image(image, image_slot)

        bottom: Route
        if text is None:
            assert image is not None, "encode needs an image, a text or both"
            x, bottom, top = image, "image", "image"
        elif image is None:
            x, bottom, top = self.embed_text(text, noise), "text", "text"
        else:
            x, bottom, top = torch.cat([self.embed_text(text, noise), image], dim=1), "pair", "vl"

        layer_bias: tuple[Tensor, ...] | None = None  # [H,S,S] of each layer
        if self.relative is not None:
            whole: Tensor = self.relative(num_text, image is not None) if bias is None else bias
            layer_bias = _block(whole, num_text, x.shape[1] - num_text).unbind()
        if writing:
            later = unwritten(num_text, x.shape[1], x.device)
            zeros = x.new_zeros(1, *later.shape)
            layer_bias = tuple(b.masked_fill(later, PADDED) for b in layer_bias or [zeros] * self.config.depth)
        padding = None  # bool [B,S]
        if text is not None and text_mask is not None:
            padding = F.pad(~text_mask.bool(), (0, x.shape[1] - num_text))

        lower, upper = range(self.config.vl_start), range(self.config.vl_start, self.config.depth)
        keep = self._keep(noise, "drop_path")
        after = dict.fromkeys(layers, x)  # to be filled in
        below = self._run(x, lower, bottom, num_text, read, layer_bias, padding, keep, after)
        x = self._run(below, upper, top, num_text, read, layer_bias, padding, keep, after)
        seen = tuple(after.values())
        x = self.norm(x)
        x_vl = None
        if vl_branch:
            keep = self._keep(noise, "drop_path_vl")
            x_vl = self.norm(self._run(below, upper, "vl", num_text, read, layer_bias, padding, keep))

        if image is None:
            return Encoding(text=x, text_vl=x_vl, layers=seen)
        if text is None:
            return Encoding(image=x, image_vl=x_vl, layers=seen)
        return Encoding(text=x[:, :num_text], image=None if read else x[:, num_text:], layers=seen)

    forward = encode

    def _run(
        self,
        x: Tensor,
        layers: range,
        route: Route,
        num_text: int,
        read: int | None,
        bias,
        padding,
        keep,
        after: dict[int, Tensor] | None = None,
    ) -> Tensor:
        for index in layers:
            x = self.layers[index](
                x,
                route,
                num_text=num_text,
                read=read if index == self.config.depth - 1 else None,
                bias=None if bias is None else bias[index],
                padding=padding,
                keep=None if keep is None else keep[:, index],
            )
            if after is not None and index in after:
                after[index] = x
        return x

    def _keep(self, noise: rng.Noise | rng.Noises | None, purpose: str) -> Tensor | None:
        """Drop path factors [B,L,3]: of the attention, the expert, and the vision expert of a pair."""
        if noise is None or self.config.drop_path == 0:
            return None
        rates = self.drop_path_rates[:, None]
        uniform = noise.uniform(purpose, 3 * self.config.depth).unflatten(1, (self.config.depth, 3))
        return (uniform >= rates).to(rates.dtype) / (1 - rates)


def unwritten(num_text: int, tokens: int, device: torch.device) -> Tensor:
    """Bool [S,S], True where a query may not see a key: all text from an image token, later text from a text token."""
    query, key = torch.arange(tokens, device=device)[:, None], torch.arange(tokens, device=device)[None]
    return (key < num_text) & ((query >= num_text) | (key > query))


def _block(bias: Tensor, num_text: int, num_image: int) -> Tensor:
    """The block of a bias [L,H,S,S] for the tokens of one pass."""
    size = bias.shape[-1]
    if num_image == 0:
        assert size >= num_text, f"a bias of {size} tokens for {num_text} text tokens"
        return bias[..., :num_text, :num_text]
    if num_text == 0:
        assert size >= num_image, f"a bias of {size} tokens for {num_image} image tokens"
        return bias[..., size - num_image :, size - num_image :]
    assert size == num_text + num_image, f"a bias of {size} tokens for a pair of {num_text} + {num_image}"
    return bias


@torch.no_grad()
def init_weights(model: VLMo, seed: int = 0) -> None:
    """Initialises every parameter in place. A parameter's values depend on its name and the seed, not on other heads.

    | parameters                                                | value                       |
    |-----------------------------------------------------------|-----------------------------|
    | weights of linear layers, embeddings and patch projection | truncated normal, init_std  |
    | `cls`, absolute positions                                 | truncated normal, init_std  |
    | biases, relative bias table                               | 0                           |
    | norms                                                     | weight 1, bias 0            |
    | `attention_scale`, `expert_scale`                         | `config.layer_scale`        |
    | `log_scale`                                               | ln(1 / init_temperature)    |
    | `logit_bias`                                              | init_logit_bias             |
    | third row of `modality` (NLVR2's second image)            | copy of the second          |

    BEiT divides the output projections by the square root of the depth; VLMo does not.
    """
    config = model.config
    for name, parameter in model.named_parameters():
        field = name.rsplit(".", 1)[-1]
        if field == "log_scale":
            parameter.fill_(math.log(1 / config.init_temperature))
        elif field == "logit_bias":
            assert config.init_logit_bias is not None  # or there would be no such parameter
            parameter.fill_(config.init_logit_bias)
        elif field.endswith("_scale"):
            assert config.layer_scale is not None
            parameter.fill_(config.layer_scale)
        elif "norm." in name and field == "weight":
            parameter.fill_(1.0)
        elif field.endswith("bias") or field == "table":
            parameter.zero_()
        else:
            generator = torch.Generator().manual_seed(rng.stream(seed, f"init/{name}") >> 1)
            values = torch.empty(parameter.shape)
            nn.init.trunc_normal_(values, std=config.init_std, generator=generator)
            parameter.copy_(values)
    if len(model.modality.weight) == 3:
        model.modality.weight[2] = model.modality.weight[1]


@torch.no_grad()
def copy_experts(model: VLMo, kind: str, source: str) -> None:
    """Sets all experts of a kind to those of another in the same layer (paper Table 4); of text from image, its own
    attention too, where it has one. Does nothing if `source` is ""."""
    copies = {f".experts.{kind}.": f".experts.{source}."} if source else {}
    if (kind, source) == ("text", "image"):
        copies[".text_attention."] = ".attention."
    state = model.state_dict()
    for name, value in state.items():
        for own, other in copies.items():
            if own in name:
                value.copy_(state[name.replace(own, other)])
