"""One training step against a plain one: whole batch in one process, full N x N matrices, cross-entropy, autograd.

The oracle shares with the product only the model and `rng.py`. Covered: the value of every term and the gradient
of every parameter, for 1, 2 and 3 workers and for micro-batches that do and do not divide a worker's rows, with
duplicate images, duplicate texts, invalid rows, and a worker without a valid row; drop path and dropout on.
"""

import dataclasses
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from vlmo_ray.config import Config, LossWeights, ModelConfig, Phase
from vlmo_ray.data.batch import PairBatch
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.rng import Noise, stream, uniforms_torch
from vlmo_ray.tasks.pretrain import Pretraining
from vlmo_ray.train.step import gradients

STEP, SEED = 5, 3
WEIGHTS = LossWeights(itc=0.9, itm=1.1, mlm=0.3)
CONFIG = Config(
    name="test",
    model=ModelConfig(
        width=24, depth=3, num_heads=2, vl_start=1, drop_path=0.2, image_size=8, patch_size=4, vocab_size=60,
        max_text_len=7, bias_text_len=9,
    ),
    phases=(Phase(1, 12),),
    slice_size=1,
    micro_batch=1,
    seed=SEED,
    loss=WEIGHTS,
)  # fmt: skip


def make_task(dtype=torch.float64) -> Pretraining:
    model = VLMo(CONFIG.model)
    init_weights(model, SEED)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # larger weights than at the start, so that no gradient is lost in rounding
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
        model.itc.log_scale.fill_(1.3)
        model.itc_vl.log_scale.fill_(0.7)
    return Pretraining(model.to(dtype), CONFIG)


def make_batch(rows=12, invalid=(4, 5, 6, 7), same_image=((0, 9),), same_text=((2, 3), (2, 10))) -> PairBatch:
    generator = torch.Generator().manual_seed(1)
    config = CONFIG.model
    length = torch.randint(3, config.max_text_len + 1, (rows,), generator=generator)
    mask = torch.arange(config.max_text_len) < length[:, None]
    text = torch.randint(5, config.vocab_size, mask.shape, generator=generator) * mask
    labels = torch.where((torch.rand(mask.shape, generator=generator) < 0.3) & mask, text, -100)
    valid = torch.ones(rows, dtype=torch.bool)
    valid[list(invalid)] = False
    labels[~valid] = -100
    image_key, text_key = torch.arange(rows), torch.arange(rows) + 100
    for a, b in same_image:
        image_key[b] = image_key[a]
    for a, b in same_text:
        text_key[b] = text_key[a]
    return PairBatch(
        image=torch.randint(0, 256, (rows, 3, 8, 8), generator=generator, dtype=torch.uint8),
        text_ids=text,
        text_mask=mask,
        mlm_ids=torch.where(labels >= 0, 4, text),
        mlm_labels=labels,
        image_key=image_key,
        text_key=text_key,
        valid=valid,
        position=torch.arange(rows),
        ids=[str(i) for i in range(rows)],
        problems=["" if v else f"row {i}" for i, v in enumerate(valid)],
    )


def oracle(task: Pretraining, batch: PairBatch) -> dict[str, torch.Tensor]:
    """The whole objective on the whole batch, written down as plainly as it goes; gradients by autograd."""
    model, rows = task.model, len(batch)

    def noise(name):
        return Noise(SEED, STEP, name, batch.position)

    pixels = batch.image.to(model.dtype) / 127.5 - 1
    image = model.encode(image=pixels, vl_branch=True, noise=noise("image"))
    text = model.encode(text=batch.text_ids, text_mask=batch.text_mask, vl_branch=True, noise=noise("text"))

    same = (batch.image_key[:, None] == batch.image_key) | (batch.text_key[:, None] == batch.text_key)
    opposes = ~same & batch.valid & batch.valid[:, None]
    counted = opposes | torch.eye(rows, dtype=torch.bool)

    def contrast(head, image_states, text_states):
        a, b = head.image(image_states[:, 0]), head.text(text_states[:, 0])
        logits = (head.log_scale.exp() * a @ b.T).masked_fill(~counted, -torch.inf)
        target = torch.arange(rows)
        if not batch.valid.any():
            return logits[counted].sum() * 0, logits
        v = batch.valid
        return (F.cross_entropy(logits[v], target[v]) + F.cross_entropy(logits.T[v], target[v])) / 2, logits

    itc, logits = contrast(model.itc, image.image, text.text)
    itc_vl, _ = contrast(model.itc_vl, image.image_vl, text.text_vl)

    def draw(scores, purpose):
        u = uniforms_torch(stream(SEED, purpose, STEP), batch.position, rows).clamp(min=2.0**-25)
        gumbel = -torch.log(-torch.log(u.to(scores.dtype)))
        return (scores + gumbel).masked_fill(~opposes, -torch.inf).argmax(dim=1)

    image_for_text = draw(logits.detach().T, "negative_image")
    text_for_image = draw(logits.detach(), "negative_text")
    kept = opposes.any(dim=1)

    def match(name, pictures, ids, mask):
        pair = model.encode(image=pictures, text=ids, text_mask=mask, noise=noise(name))
        return model.itm(model.pooler(pair.text[:, 0]))

    terms = [
        F.cross_entropy(
            match("itm_positive", pixels, batch.text_ids, batch.text_mask)[kept],
            torch.ones(int(kept.sum()), dtype=torch.long), reduction="sum",
        ),
        F.cross_entropy(
            match("itm_negative_image", pixels[image_for_text], batch.text_ids, batch.text_mask)[kept],
            torch.zeros(int(kept.sum()), dtype=torch.long), reduction="sum",
        ),
        F.cross_entropy(
            match("itm_negative_text", pixels, batch.text_ids[text_for_image], batch.text_mask[text_for_image])[kept],
            torch.zeros(int(kept.sum()), dtype=torch.long), reduction="sum",
        ),
    ]  # fmt: skip
    itm = sum(terms) / max(1, 3 * int(kept.sum()))

    hidden = model.encode(
        image=pixels, text=batch.mlm_ids, text_mask=batch.text_mask, noise=noise("mlm")
    ).text
    target = batch.mlm_labels >= 0
    mlm = F.cross_entropy(model.mlm(hidden[target]), batch.mlm_labels[target], reduction="sum")
    mlm = mlm / max(1, int(target.sum()))

    loss = WEIGHTS.itc * (itc + itc_vl) / 2 + WEIGHTS.itm * itm + WEIGHTS.mlm * mlm
    loss.backward()
    return {"loss": loss, "itc": itc, "itc_vl": itc_vl, "itm": itm, "mlm": mlm, "kept": kept.sum()}


def grads_of(task: Pretraining) -> dict[str, torch.Tensor]:
    """Every parameter but the unused rows of token types has a gradient; asserting so is part of the test."""
    missing = [n for n, p in task.model.named_parameters() if p.grad is None]
    assert not missing, missing
    return {n: p.grad.clone() for n, p in task.model.named_parameters()}


def check(figures, grads, expected, expected_grads, tolerance):
    for name in ("loss", "itc", "itc_vl", "itm", "mlm"):
        torch.testing.assert_close(
            float(figures[name]),
            float(expected[name].detach()),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    for name, grad in grads.items():
        wanted = expected_grads[name]
        scale = float(wanted.abs().max())
        torch.testing.assert_close(
            grad, wanted, rtol=tolerance, atol=tolerance * max(scale, 1e-3), msg=lambda m, n=name: f"{n}: {m}"
        )


CASES = {
    "plain": dict(invalid=(), same_image=(), same_text=()),
    "duplicates and invalid rows": {},
    "no valid row at all": dict(invalid=range(12)),
    "one valid row": dict(invalid=range(1, 12)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro_batch", [12, 5, 1])
def test_one_worker_equals_the_plain_step(case, micro_batch):
    batch, reference, task = make_batch(**CASES[case]), make_task(), make_task()
    expected = oracle(reference, batch)
    figures = gradients(task, batch, Workers((12,)), STEP, WEIGHTS, micro_batch)
    check(figures, grads_of(task), expected, grads_of(reference), 1e-9)
    assert figures["pairs_without_negative"] == batch.valid.sum() - expected["kept"]


def test_float32_is_close_too():
    batch, reference, task = make_batch(), make_task(), make_task(torch.float32)
    expected = oracle(reference, batch)
    figures = gradients(task, batch, Workers((12,)), STEP, WEIGHTS, 5)
    grads = {name: grad.double() for name, grad in grads_of(task).items()}
    check(figures, grads, expected, grads_of(reference), 1e-4)


def test_drop_path_is_on_in_these_tests():
    batch = make_batch()
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, drop_path=0.0))
    task, still = make_task(), make_task()
    still.model.config = config.model
    still.model.drop_path_rates.zero_()
    a = gradients(task, batch, Workers((12,)), STEP, WEIGHTS, 12)
    b = gradients(still, batch, Workers((12,)), STEP, WEIGHTS, 12)
    assert abs(float(a["loss"]) - float(b["loss"])) > 1e-3


def worker(rank, counts, port, micro_batch, cases, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(counts))
    first = sum(counts[:rank])
    out = []
    for case in cases:
        task = make_task()
        wrapped = torch.nn.parallel.DistributedDataParallel(task, broadcast_buffers=False)
        batch = make_batch(**CASES[case]).rows(slice(first, first + counts[rank]))
        figures = gradients(wrapped, batch, Workers(counts, rank), STEP, WEIGHTS, micro_batch)
        out.append(
            ({k: float(v) for k, v in figures.items()}, {k: g.numpy() for k, g in grads_of(task).items()})
        )
    queue.put((rank, out))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("counts, micro_batch", [((6, 6), 6), ((5, 7), 3), ((4, 4, 4), 4), ((3, 5, 4), 2)])
def test_several_workers_equal_the_plain_step(counts, micro_batch):
    """(4, 4, 4) leaves the second worker without a valid row; (5, 7) and (3, 5, 4) give unequal micro-batches."""
    cases = [*list(CASES)[:2], "one valid row"]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    running = mp.start_processes(
        worker,
        (counts, port, micro_batch, cases, queue),
        nprocs=len(counts),
        join=False,
        start_method="spawn",
    )
    results = dict(queue.get() for _ in counts)
    while not running.join():
        pass
    for i, case in enumerate(cases):
        reference = make_task()
        expected = oracle(reference, make_batch(**CASES[case]))
        for rank in range(len(counts)):
            figures, grads = results[rank][i]
            grads = {name: torch.from_numpy(grad) for name, grad in grads.items()}
            check(figures, grads, expected, grads_of(reference), 1e-9)
        received = sum(results[rank][i][0]["exchanged_bytes"] for rank in range(1))
        assert (received > 0) == (case != "one valid row")
