"""Pictures: ranks against loops, attention against the kernel of the model, words."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_run import SMALL, job

from vlmo_ray.data.text import Tokenizer, words_of, written
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.objectives.pairs import Pairs
from vlmo_ray.report import gallery
from vlmo_ray.report.gallery import Gallery, attention, first_rows
from vlmo_ray.tasks.matching import Matching
from vlmo_ray.train.loop import train


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory) -> str:
    where = str(tmp_path_factory.mktemp("gallery") / "run")
    assert train(job(scenes, where, SMALL)).step == 10
    return where


@pytest.mark.parametrize("changes", [{}, {"position": "absolute"}, {"vl_start": 2}, {"attention": "separate"}])
def test_attention_is_that_of_the_layers(changes):
    """With the identity as values, attention gives its weights."""
    config = dataclasses.replace(SMALL.model, depth=3, vl_start=1) if not changes else SMALL.model
    model = VLMo(dataclasses.replace(config, **changes)).double()
    init_weights(model, 1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator)
    ids = torch.randint(5, 1000, (2, 6), generator=generator)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    seen, real = [], F.scaled_dot_product_attention

    def weights(q, k, v, **options):
        eye = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:3], -1)
        seen.append(real(q, k, eye, **options))
        return real(q, k, v, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", weights)
        found = attention(model, image, ids, mask)
    first = min(model.config.vl_start, model.config.depth - 1)
    fused = [w for w in seen if w.shape[-1] == 6 + 5][-(model.config.depth - first) :]
    wanted = torch.stack([w.mean(dim=1)[:, :6, 6:] for w in fused]).mean(dim=0)
    torch.testing.assert_close(found, wanted)
    assert not model.layers[-1].attention._forward_pre_hooks


def test_a_caption_is_the_text_of_its_tokens():
    ids, _, _ = Tokenizer(12).encode("Two Dalmatians run!")
    assert written(ids) == "two dalmatians run !"
    assert words_of(ids) == [("two", [1]), ("dalmatians", [2, 3, 4]), ("run", [5]), ("!", [6])]


def test_ranks_against_loops(run, scenes):
    """Images with several captions are one candidate; the worst error comes first."""
    generator = torch.Generator().manual_seed(3)
    key = torch.tensor([1, 2, 3, 2, 4, 5, 6, 7])
    image = torch.nn.functional.normalize(torch.randn(8, 5, generator=generator), dim=1)[key - 1]
    text = torch.nn.functional.normalize(torch.randn(8, 5, generator=generator), dim=1)
    feature = {"image_feature": image, "text_feature": text, "image_key": key}
    pictures, captions = [f"picture {k}" for k in key.tolist()], [f"text {i}" for i in range(8)]
    texts, images = gallery._retrieval(feature, pictures, captions, 8)
    assert len(texts) == 8 and len(images) == 7
    for query in texts:
        row = captions.index(query.shown)
        scores = {f"picture {int(key[j])}": float(text[row] @ image[j]) for j in range(8)}
        order = sorted(scores, key=lambda name: -scores[name])
        assert [hit.shown for hit in query.hits] == order[:5]
        assert query.rank == order.index(f"picture {int(key[row])}")
        assert [hit.right for hit in query.hits] == [name == f"picture {int(key[row])}" for name in order[:5]]
        assert query.wanted.shown == f"picture {int(key[row])}" and query.wanted.right
        for hit in query.hits:
            assert hit.similarity == pytest.approx(scores[hit.shown])
    for query in images:
        rows = [i for i in range(8) if pictures[i] == query.shown]
        order = sorted(range(8), key=lambda i: -float(image[rows[0]] @ text[i]))
        assert query.rank == min(order.index(i) for i in rows)
    missed = [query.missed_by for query in texts if query.rank]
    assert missed == sorted(missed, reverse=True) and [q.rank > 0 for q in texts] == sorted(
        (q.rank > 0 for q in texts), reverse=True
    )


def test_of_a_run(run, scenes):
    found = Gallery.of(run, scenes, rows=30, shown=6)
    assert found.rows == 30 and len(found.texts) == len(found.images) == 6
    assert 0 < len(found.negatives) <= 6 and len(found.looks) == 3
    columns = first_rows(scenes, Matching(VLMo(SMALL.model)).encoder(), 30)
    assert len(columns["id"]) == 30 and columns["valid"].all()
    key = {written(ids): i for i, ids in enumerate(columns["text_ids"])}
    keys = (torch.from_numpy(columns[name]) for name in ("image_key", "text_key"))
    pairs = Pairs(*keys, torch.ones(30, dtype=torch.bool), 0, 30)
    for negative in found.negatives:
        own, other = key[negative.text], key[negative.other_text]
        assert pairs.may_oppose(torch.tensor([own]), slice(other, other + 1)).all()
        assert negative.image != negative.other_image
        assert all(0 < p < 1 for p in negative.matching)
    assert [word for word, _ in found.looks[0].words] == written(columns["text_ids"][0]).split()
    assert all(picture.startswith("data:image/jpeg;base64,") for _, picture in found.looks[0].words)


def test_rows_that_cannot_be_read_are_left_out(tmp_path, scenes):
    from conftest import small_scenes

    from vlmo_ray.data.prepare.shards import write_dataset

    rows = [record | ({"image": b"no image"} if i % 2 else {}) for i, record in enumerate(small_scenes(5, 8))]
    write_dataset(str(tmp_path / "some"), rows, rows_per_group=3)
    encoder = Matching(VLMo(SMALL.model)).encoder()
    assert len(first_rows(str(tmp_path / "some"), encoder, 3)["id"]) == 3
    assert len(first_rows(str(tmp_path / "some"), encoder, 9)["id"]) == 4
    write_dataset(str(tmp_path / "none"), [row | {"image": b"no image"} for row in rows], rows_per_group=3)
    with pytest.raises(UserError, match=r"no row of .*none can be read"):
        first_rows(str(tmp_path / "none"), encoder, 3)


def test_heat_lies_where_it_is_high():
    image = np.full((3, 16, 16), 200, np.uint8)
    plain, warm = gallery._picture(image), gallery._picture(image, np.eye(2))
    assert plain != warm and gallery._picture(image, np.ones((2, 2))) != warm
