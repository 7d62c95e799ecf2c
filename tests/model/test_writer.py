"""Writing: cached decoding against passes over the whole text, and beam search against all texts there are."""

import dataclasses
import itertools
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from vlmo_ray.config import MODEL_SIZES
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.model.writer import Writer, beam_search

CONFIG = dataclasses.replace(
    MODEL_SIZES["tiny"], width=24, num_heads=3, depth=3, vl_start=2, image_size=24, max_text_len=7, bias_text_len=9,
    vocab_size=1100, heads=("mlm",), layer_scale=0.3,
)  # fmt: skip
START, END, MASK = 101, 102, 103
CONFIGS = {
    "relative": CONFIG,
    "absolute": dataclasses.replace(CONFIG, position="absolute"),
    "one": dataclasses.replace(CONFIG, experts="one", vl_start=3),
}


def make(config) -> VLMo:
    model = VLMo(config).double().eval()
    init_weights(model, 3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "table" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def some_images() -> torch.Tensor:
    return torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 - 1


@torch.no_grad()
def plainly(model: VLMo, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The log probabilities of the token after `text` [B,T], by a pass over everything."""
    ids = torch.cat([text, torch.full_like(text[:, :1], MASK)], dim=1)
    states = model.encode(image=image, text=ids, writing=True).text
    return model.mlm(states[:, -1]).log_softmax(dim=-1)


def total(terms: torch.Tensor) -> torch.Tensor:
    """[...,N] -> [...]: added one by one from the least, so neither their order nor zeros among them change a bit."""
    return terms.sort(dim=-1).values.cumsum(dim=-1)[..., -1]


class SumsInOneOrder(TorchFunctionMode):
    """Matrix products and attention whose results do not depend on the shapes of a call, as those of the kernels do:
    these add up in another order for two tokens than for twenty."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        own = {F.linear: self.linear, F.scaled_dot_product_attention: self.attention}
        return own.get(func, func)(*args, **(kwargs or {}))

    @staticmethod
    def linear(x, weight, bias=None):
        product = total(x[..., None, :] * weight)
        return product if bias is None else product + bias

    @staticmethod
    def attention(q, k, v, attn_mask, scale):
        logits = total(q[..., :, None, :] * k[..., None, :, :]) * scale
        logits = logits if attn_mask is None else logits + attn_mask
        shares = (logits - logits.amax(dim=-1, keepdim=True)).exp()
        shares = shares / total(shares)[..., None]
        return total(shares[..., :, None, :] * v.transpose(-2, -1)[..., None, :, :])


@pytest.mark.parametrize("exactly", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_cache_changes_nothing(name, exactly):
    """Bit by bit, if sums are in one order; but for their rounding with the kernels."""
    model, image = make(CONFIGS[name]), some_images()
    tolerance = 0.0 if exactly else 1e-13
    with SumsInOneOrder() if exactly else nullcontext():
        writer = Writer(model, image, MASK)
        text = torch.tensor([[START, 1005, 1000, 1001, 1002, 1003], [START, 1009, 1008, 1007, 1006, 1005]])
        for length in range(1, 7):
            found, wanted = writer(text[:, length - 1]), plainly(model, image, text[:, :length])
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
            if length == 3:  # the rows change places, as beams do
                swapped = torch.tensor([1, 0])
                writer.select(swapped)
                text, image = text[swapped], image[swapped]
    with pytest.raises(UserError, match="has 7 tokens at most"):
        writer(text[:, 0])


@torch.no_grad()
def test_what_is_written_later_changes_nothing_before_it():
    """A text token sees the image and what stands before it, an image token no text at all."""
    model, image = make(CONFIG), some_images()
    text = torch.tensor([[START, 1005, 1000, 1001, 1002], [START, 1009, 1008, 1007, 1006]])
    other = text.clone()
    other[:, 3] = 1050
    one, two = (model.encode(image=image, text=ids, writing=True) for ids in (text, other))
    assert torch.equal(one.text[:, :3], two.text[:, :3]) and torch.equal(one.image, two.image)
    assert not torch.equal(one.text[:, 3:], two.text[:, 3:])
    shown = model.encode(image=image.flip(0), text=text, writing=True)
    assert not torch.allclose(one.text, shown.text)
    padded = torch.cat([text, torch.zeros(2, 2, dtype=torch.int64)], dim=1)
    mask = padded > 0
    short = model.encode(image=image, text=padded, text_mask=mask, writing=True)
    torch.testing.assert_close(short.text[:, :5], one.text, rtol=1e-12, atol=1e-12)


class Toy:
    """Log probabilities that depend on the whole text, from a table."""

    def __init__(self, rows: int, vocabulary: int, seed: int):
        self.seed, self.vocabulary = seed, vocabulary
        self.texts = [(row,) for row in range(rows)]

    def after(self, text: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, text)) % 2**31)
        return (2 * torch.randn(self.vocabulary, generator=generator, dtype=torch.float64)).log_softmax(0)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        self.texts = [(*text, token) for text, token in zip(self.texts, tokens.tolist(), strict=True)]
        return torch.stack([self.after(text) for text in self.texts])

    def select(self, rows: torch.Tensor) -> None:
        self.texts = [self.texts[row] for row in rows.tolist()]


def exhaustively(toy: Toy, row: int, start: int, end: int, banned: set[int], most: int) -> tuple[list[int], float]:
    words = [word for word in range(toy.vocabulary) if word not in banned | {end}]
    best = ([], -math.inf)
    for count in range(1, most + 1):
        for text in itertools.product(words, repeat=count):
            written, total = (row, start), 0.0
            for word in (*text, end):
                total += float(toy.after(written)[word])
                written = (*written, word)
            best = max(best, (list(text), total / (count + 2) ** 0.6), key=lambda found: found[1])
    return best


@pytest.mark.parametrize("seed", range(6))
def test_with_enough_beams_the_best_text_of_all_is_found(seed):
    options = {"start": 4, "end": 1, "banned": {0, 4}, "max_tokens": 3}
    tokens, scores = beam_search(Toy(3, 5, seed), 3, beams=32, **options)
    for row in range(3):
        text, score = exhaustively(Toy(3, 5, seed), row, 4, 1, {0, 4}, 3)
        assert tokens[row].tolist() == text + [1] * (4 - len(text))
        assert float(scores[row]) == pytest.approx(score, rel=1e-12)


def test_one_beam_is_greedy_and_more_are_no_worse():
    greedy_wins = 0
    for seed in range(20):
        options = {"start": 4, "end": 1, "banned": {0, 4}, "max_tokens": 4}
        one, three, all_of_them = (
            float(beam_search(Toy(1, 7, seed), 1, beams=n, **options)[1]) for n in (1, 3, 10_000)
        )
        assert all_of_them >= max(one, three) - 1e-12
        greedy_wins += one == pytest.approx(all_of_them)
    assert 0 < greedy_wins < 20  # greedy search is not always right here, so the test can fail


def test_what_cannot_write_is_refused():
    for changes, message in (({"heads": ()}, "no head for words"), ({"attention": "separate"}, "'shared'")):
        with pytest.raises(UserError, match=message):
            Writer(VLMo(dataclasses.replace(CONFIG, **changes)), torch.zeros(1, 3, 24, 24), MASK)
