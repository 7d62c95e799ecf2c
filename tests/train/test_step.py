"""One training step against a plain one: whole batch in one process, full N x N matrices, cross-entropy, autograd.

The oracle shares with the product only the model and `rng.py`. Covered: the value of every term and the gradient
of every parameter, for 1 to 4 workers and for micro-batches that do and do not divide a worker's rows, replicated and
sharded, in float64 and float32, with activation checkpointing, with every option of the objective, with duplicate
images, duplicate texts, invalid rows, and a worker without a valid row; drop path and dropout on. And how many bytes
of images travel.
"""

import copy
import dataclasses
import functools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from worker_processes import in_processes

from vlmo_ray.config import ClusterConfig, Config, ModelConfig, Phase
from vlmo_ray.data.batch import Batch
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.recipes.pretraining import PretrainingConfig
from vlmo_ray.rng import Noise, stream, uniforms_torch
from vlmo_ray.tasks.pretraining import Pretraining
from vlmo_ray.train.optim import WeightAverage
from vlmo_ray.train.parallel import Parallel, parallelize, whole
from vlmo_ray.train.step import gradients

STEP, SEED = 5, 3
IMAGE_BYTES = 3 * 8 * 8
WEIGHTS = PretrainingConfig(itc=0.9, itm=1.1, mlm=0.3)
CONFIG = Config(
    name="test",
    model=ModelConfig(
        width=24, depth=3, num_heads=2, vl_start=1, drop_path=0.2, image_size=8, patch_size=4, vocab_size=60,
        max_text_len=7, bias_text_len=9,
    ),
    phases=(Phase(STEP + 1, 12),),
    slice_size=4,
    micro_batch=4,
    seed=SEED,
    task=WEIGHTS,
)  # fmt: skip

OBJECTIVES = {
    "exact": WEIGHTS,
    "smoothed": dataclasses.replace(WEIGHTS, label_smoothing=0.15),
    "sigmoid": dataclasses.replace(WEIGHTS, contrast="sigmoid"),
    "published balance": dataclasses.replace(WEIGHTS, feature_grad_scale=1 / 64),
    "local negatives": dataclasses.replace(WEIGHTS, negatives="local"),
    "half of the matching": dataclasses.replace(WEIGHTS, itm_share=0.5),
    "masked matching": dataclasses.replace(WEIGHTS, masked_matching=True),
    "half of the patches": dataclasses.replace(WEIGHTS, patch_dropout=0.5),
    "all patches at the end": dataclasses.replace(WEIGHTS, patch_dropout=0.5, unmasked_steps=1, itm_share=0.5),
    "one contrast alone": dataclasses.replace(WEIGHTS, itm=0.0, mlm=0.0, vl_contrast=False),
    "one contrast and matching": dataclasses.replace(WEIGHTS, mlm=0.0, vl_contrast=False),
    "contrasts and masked words": dataclasses.replace(WEIGHTS, itm=0.0),
    "distilled": dataclasses.replace(WEIGHTS, distill=0.6, distill_ramp=10),  # a share of 0.3 in step 5
    "distilled contrast": dataclasses.replace(WEIGHTS, itm=0.0, mlm=0.0, vl_contrast=False, distill=0.4),
}


def config_of(objective: str = "exact", **cluster) -> Config:
    loss = OBJECTIVES[objective]
    model = dataclasses.replace(CONFIG.model, init_logit_bias=-2.0 if loss.contrast == "sigmoid" else None)
    return dataclasses.replace(CONFIG, task=loss, model=model, cluster=ClusterConfig(**cluster))


def make_task(dtype=torch.float64, objective: str = "exact") -> Pretraining:
    config = config_of(objective)
    model = VLMo(config.model)
    init_weights(model, SEED)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # larger weights than at the start, so that no gradient is lost in rounding
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
        model.itc.log_scale.fill_(1.3)
        model.itc_vl.log_scale.fill_(0.7)
    return Pretraining(model.to(dtype), config)


def teacher_of(task: Pretraining) -> WeightAverage | None:
    """The average of the weights, as if they had been smaller before."""
    if not task.settings.distill:
        return None
    average = WeightAverage(task, 0.995)
    for tensor in average.tensors.values():
        tensor.mul_(0.8)
    return average


def make_batch(rows=12, invalid=(4, 5, 6, 7), same_image=((0, 9),), same_text=((2, 3), (2, 10))) -> Batch:
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
    columns = {
        "image": torch.randint(0, 256, (rows, 3, 8, 8), generator=generator, dtype=torch.uint8),
        "text_ids": text,
        "text_mask": mask,
        "mlm_ids": torch.where(labels >= 0, 4, text),
        "mlm_labels": labels,
        "image_key": image_key,
        "text_key": text_key,
    }
    problems = ["" if v else f"row {i}" for i, v in enumerate(valid)]
    return Batch(columns, valid, torch.arange(rows), [str(i) for i in range(rows)], problems)


def oracle(task: Pretraining, batch: Batch, objective: str = "exact") -> dict[str, torch.Tensor]:
    """The whole objective on the whole batch, written down as plainly as it goes; gradients by autograd."""
    model, rows, options = task.model, len(batch), OBJECTIVES[objective]
    share = options.distill * (0.5 if options.distill_ramp else 1.0)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(0.8)

    def noise(name):
        return Noise(SEED, STEP, name, batch.position)

    patches = CONFIG.model.num_patches
    seen = torch.arange(1 + patches)
    if options.patch_dropout and CONFIG.total_steps - options.unmasked_steps > STEP:
        draws = uniforms_torch(stream(SEED, "patch_dropout", STEP), torch.zeros(1, dtype=torch.int64), patches)[0]
        least = sorted(range(patches), key=lambda i: draws[i])[: round(patches * (1 - options.patch_dropout))]
        seen = torch.tensor([0, *sorted(1 + i for i in least)])

    def encode_images(pictures, text=None, **arguments):
        """The tokens that are seen, and their part of the bias of all."""
        before = 0 if text is None else text.shape[1]
        tokens = torch.cat([torch.arange(before), before + seen])
        bias = model.position_bias(before)[:, :, tokens][..., tokens]
        return model.encode(image=model.embed_image(pictures)[:, seen], text=text, bias=bias, **arguments)

    pixels = batch.image.to(model.dtype) / 127.5 - 1
    image = encode_images(pixels, vl_branch=True, noise=noise("image"))
    text = model.encode(text=batch.text_ids, text_mask=batch.text_mask, vl_branch=True, noise=noise("text"))

    same = (batch.image_key[:, None] == batch.image_key) | (batch.text_key[:, None] == batch.text_key)
    opposes = ~same & batch.valid & batch.valid[:, None]
    counted = opposes | torch.eye(rows, dtype=torch.bool)

    with torch.no_grad():
        taught_image = teacher.encode(image=pixels, vl_branch=True)
        taught_text = teacher.encode(text=batch.text_ids, text_mask=batch.text_mask, vl_branch=True)

    def soft(head, image_states, text_states):
        """The teacher's similarities, at the temperature of the student."""
        with torch.no_grad():
            a, b = head.image(image_states[:, 0]), head.text(text_states[:, 0])
            return a @ b.T

    def contrast(head, image_states, text_states, taught):
        a, b = head.image(image_states[:, 0]), head.text(text_states[:, 0])
        a, b = (x.detach() + options.feature_grad_scale * (x - x.detach()) for x in (a, b))
        logits = head.log_scale.exp() * a @ b.T
        valid = batch.valid.nonzero().squeeze(1)
        if head.logit_bias is not None:
            sign = 2 * torch.eye(rows) - 1
            terms = -F.logsigmoid(sign * (logits + head.logit_bias))
            return terms[counted & batch.valid[:, None]].sum() / max(1, len(valid)), logits
        total = 0 * logits.sum()
        for i in valid:
            columns = counted[i].nonzero().squeeze(1)
            target = (columns == i).nonzero()[0]
            scale = head.log_scale.detach().exp()
            for row, theirs in ((logits[i], taught[i]), (logits[:, i], taught[:, i])):
                hard = F.cross_entropy(row[columns][None], target, label_smoothing=options.label_smoothing)
                wanted = (scale * theirs[columns]).softmax(dim=0)
                total = total + (1 - share) * hard - share * (wanted * row[columns].log_softmax(dim=0)).sum()
        return total / (2 * max(1, len(valid))), logits

    itc, logits = contrast(model.itc, image.image, text.text, soft(teacher.itc, taught_image.image, taught_text.text))
    both = options.vl_contrast
    taught = soft(teacher.itc_vl, taught_image.image_vl, taught_text.text_vl)
    itc_vl = contrast(model.itc_vl, image.image_vl, text.text_vl, taught)[0] if both else itc

    size = CONFIG.slice_size
    minable = opposes
    if options.negatives == "local":
        minable = opposes & (batch.position[:, None] // size == batch.position // size)

    def draw(scores, purpose):
        u = uniforms_torch(stream(SEED, purpose, STEP), batch.position, rows).clamp(min=2.0**-25)
        gumbel = -torch.log(-torch.log(u.to(scores.dtype)))
        return (scores + gumbel).masked_fill(~minable, -torch.inf).argmax(dim=1)

    image_for_text = draw(logits.detach().T, "negative_image")
    text_for_image = draw(logits.detach(), "negative_text")
    asked = batch.position % size < options.itm_share * size
    kept = minable.any(dim=1) & asked

    def match(name, pictures, ids, mask):
        pair = encode_images(pictures, ids, text_mask=mask, noise=noise(name))
        return model.itm(model.pooler(pair.text[:, 0]))

    ids = batch.mlm_ids if options.masked_matching else batch.text_ids
    terms = [
        F.cross_entropy(
            match("itm_positive", pixels, ids, batch.text_mask)[kept],
            torch.ones(int(kept.sum()), dtype=torch.long), reduction="sum",
        ),
        F.cross_entropy(
            match("itm_negative_image", pixels[image_for_text], ids, batch.text_mask)[kept],
            torch.zeros(int(kept.sum()), dtype=torch.long), reduction="sum",
        ),
        F.cross_entropy(
            match("itm_negative_text", pixels, ids[text_for_image], batch.text_mask[text_for_image])[kept],
            torch.zeros(int(kept.sum()), dtype=torch.long), reduction="sum",
        ),
    ]  # fmt: skip
    itm = sum(terms) / max(1, 3 * int(kept.sum()))

    draws = noise("itm_positive" if options.masked_matching else "mlm")
    hidden = encode_images(pixels, batch.mlm_ids, text_mask=batch.text_mask, noise=draws).text
    target = batch.mlm_labels >= 0
    found = model.mlm(hidden[target])
    mlm = (1 - share) * F.cross_entropy(found, batch.mlm_labels[target], reduction="sum")
    with torch.no_grad():
        states = teacher.encode(image=pixels, text=batch.mlm_ids, text_mask=batch.text_mask).text
        wanted = teacher.mlm(states[target]).softmax(dim=-1)
    mlm = mlm - share * (wanted * found.log_softmax(dim=-1)).sum()
    mlm = mlm / max(1, int(target.sum()))

    loss = options.itc * (itc + itc_vl) / 2
    loss = loss + options.itm * itm if options.itm else loss
    loss = loss + options.mlm * mlm if options.mlm else loss
    loss.backward()
    named = {"loss": loss, "itc": itc, "itc_vl": itc_vl, "itm": itm, "mlm": mlm}
    named = {name: value for name, value in named.items() if name == "loss" or name in task.settings.heads}
    return {name: value.detach() for name, value in named.items()} | {
        "kept": kept,
        "asked": (asked & batch.valid).sum(),
        "image_for_text": image_for_text,
    }


def grads_of(task: Pretraining) -> dict[str, torch.Tensor]:
    """Every parameter has a gradient but those that the task freezes; asserting so is part of the test."""
    missing = {n for n, p in task.model.named_parameters() if p.grad is None}
    assert missing == {n for n, _ in task.model.named_parameters() if not task.trainable(f"model.{n}")}
    return {n: whole(p.grad).clone() for n, p in task.model.named_parameters() if p.grad is not None}


@functools.cache
def expected(case: str, objective: str = "exact") -> tuple[dict, dict]:
    """Figures and gradients of the oracle."""
    task = make_task(objective=objective)
    figures = oracle(task, make_batch(**CASES[case]), objective)
    return figures, grads_of(task)


def check(figures, grads, case, objective="exact", tolerance=1e-9):
    wanted, wanted_grads = expected(case, objective)
    assert {"loss", "itc", "itc_vl", "itm", "mlm"} & figures.keys() == wanted.keys() & figures.keys()
    for name in {"loss", "itc", "itc_vl", "itm", "mlm"} & wanted.keys():
        torch.testing.assert_close(
            float(figures[name]), float(wanted[name]), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert grads.keys() == wanted_grads.keys()
    for name, grad in grads.items():
        scale = float(wanted_grads[name].abs().max())
        torch.testing.assert_close(
            grad.double(),
            wanted_grads[name],
            rtol=tolerance,
            atol=tolerance * max(scale, 1e-3),
            msg=lambda m, n=name: f"{n}: {m}",
        )
    if "itm" in wanted:
        assert float(figures["pairs_without_negative"]) == wanted["asked"] - wanted["kept"].sum()


CASES = {
    "plain": dict(invalid=(), same_image=(), same_text=()),
    "duplicates and invalid rows": {},
    "no valid row at all": dict(invalid=range(12)),
    "one valid row": dict(invalid=range(1, 12)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro_batch", [12, 5, 1])
def test_one_worker_equals_the_plain_step(case, micro_batch):
    batch, task = make_batch(**CASES[case]), make_task()
    figures = gradients(Parallel(task), batch, Workers((12,)), STEP, micro_batch)
    check(figures, grads_of(task), case)


@pytest.mark.parametrize("case", list(CASES)[:3])
@pytest.mark.parametrize("objective", list(OBJECTIVES)[1:])
@pytest.mark.parametrize("micro_batch", [12, 4])
def test_every_objective_equals_the_plain_step(case, objective, micro_batch):
    batch, task = make_batch(**CASES[case]), make_task(objective=objective)
    figures = gradients(Parallel(task), batch, Workers((12,)), STEP, micro_batch, average=teacher_of(task))
    check(figures, grads_of(task), case, objective)
    if case == "plain":  # the option does something
        exact, exact_grads = expected(case)
        wanted, wanted_grads = expected(case, objective)
        assert any(
            n not in wanted_grads or not torch.allclose(grad, wanted_grads[n]) for n, grad in exact_grads.items()
        )
        assert (float(wanted["loss"]) == float(exact["loss"])) == (objective == "published balance")


@pytest.mark.parametrize("micro_batch, passes", [(12, 2 + 2), (6, 2 * (2 + 2 + 2)), (5, 3 * (2 + 2 + 2))])
def test_nothing_is_computed_twice_with_one_micro_batch(micro_batch, passes):
    """Image, text; pairs with own texts, and with other texts. With several, the first two once more."""
    task, calls = make_task(), []
    encode = task.model.encode
    task.model.encode = lambda **arguments: (calls.append(1), encode(**arguments))[1]
    gradients(Parallel(task), make_batch(), Workers((12,)), STEP, micro_batch)
    assert len(calls) == passes


def test_float32_is_close_too():
    batch, task = make_batch(), make_task(torch.float32)
    figures = gradients(Parallel(task), batch, Workers((12,)), STEP, 5)
    check(figures, grads_of(task), "duplicates and invalid rows", tolerance=1e-4)


def test_bf16_is_near():
    """Passes in bf16, features and losses in float32: a rounding of 2^-8 here and there, and no more."""
    batch, task, exact = make_batch(), make_task(torch.float32), expected("duplicates and invalid rows")[0]
    figures = gradients(Parallel(task), batch, Workers((12,)), STEP, 5, bf16=True)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads_of(task).values())
    for name in ("itc", "itc_vl", "mlm"):  # a negative may flip, so matching is not compared
        assert float(figures[name]) == pytest.approx(float(exact[name]), rel=0.02)
    assert float(figures["itc"]) != pytest.approx(float(exact["itc"]), rel=1e-6)


def test_activation_checkpointing_changes_nothing():
    batch, task = make_batch(), make_task()
    parallel = parallelize(task, ClusterConfig(activation_checkpointing=True), 1, torch.device("cpu"))
    figures = gradients(parallel, batch, Workers((12,)), STEP, 5)
    check(figures, grads_of(task), "duplicates and invalid rows")
    assert task.model.state_dict().keys() == make_task().model.state_dict().keys()


@pytest.mark.compile
def test_compiled_layers_change_nothing_but_rounding():
    batch, task = make_batch(), make_task()
    parallel = parallelize(task, ClusterConfig(compile=True), 1, torch.device("cpu"))
    for micro_batch in (12, 5):
        task.zero_grad()
        figures = gradients(parallel, batch, Workers((12,)), STEP, micro_batch)
        check(figures, grads_of(task), "duplicates and invalid rows")


def test_left_out_patches_are_drawn_anew_in_each_step():
    task = make_task(objective="half of the patches")
    task.kept_patches, task.full_from = 3, 2000
    drawn = [task._kept_tokens(step, torch.device("cpu")) for step in range(2001)]
    assert drawn.pop() is None  # a step that sees all of them
    assert all(kept[0] == 0 and len(kept) == 4 and (kept.diff() > 0).all() for kept in drawn)  # [I_CLS] always
    counts = torch.bincount(torch.cat(drawn), minlength=5)[1:]
    assert ((counts - 1500).abs() < 100).all()  # five standard deviations of 2000 draws with 3/4


def test_fewer_patches_make_shorter_passes():
    task, lengths = make_task(objective="half of the patches"), []
    layer = task.model.layers[0].forward
    task.model.layers[0].forward = lambda x, *rest, **named: (lengths.append(x.shape[1]), layer(x, *rest, **named))[1]
    gradients(Parallel(task), make_batch(invalid=()), Workers((12,)), STEP, 12)
    longest = int(make_batch().text_len.max())
    assert lengths == [3, longest, longest + 3, longest + 3]


def test_micro_batches_have_texts_of_about_the_same_length():
    """Each row once, with little padding; in their own order if only some rows are matched, as these are spread."""
    batch, seen = make_batch(rows=12, invalid=()), []
    for share in (1.0, 0.5):
        task = make_task()
        task.settings = dataclasses.replace(task.settings, itm_share=share)
        encode = task.encode
        task.encode = lambda micro, *args, encode=encode: (seen.append(micro), encode(micro, *args))[1]
        seen.clear()
        gradients(Parallel(task), batch, Workers((12,)), STEP, 4)
        lengths = [micro.text_len.tolist() for micro in seen[:3]]
        assert [micro.text_ids.shape[1] for micro in seen[:3]] == [max(some) for some in lengths]
        wanted = sorted(batch.text_len.tolist()) if share == 1 else batch.text_len.tolist()
        assert [n for some in lengths for n in some] == wanted


def test_drop_path_is_on_in_these_tests():
    batch, task, still = make_batch(), make_task(), make_task()
    still.model.config = dataclasses.replace(CONFIG.model, drop_path=0.0)
    still.model.drop_path_rates.zero_()
    a = gradients(Parallel(task), batch, Workers((12,)), STEP, 12)
    b = gradients(Parallel(still), batch, Workers((12,)), STEP, 12)
    assert abs(float(a["loss"]) - float(b["loss"])) > 1e-3


@dataclass(frozen=True)
class Trial:
    micro_batch: int
    case: str = "duplicates and invalid rows"
    strategy: str = "ddp"
    objective: str = "exact"
    dtype: torch.dtype = torch.float64
    activation_checkpointing: bool = False


def worker(rank, world, counts, trials):
    first = sum(counts[:rank])
    out = []
    for trial in trials:
        task = make_task(trial.dtype, trial.objective)
        cluster = ClusterConfig(strategy=trial.strategy, activation_checkpointing=trial.activation_checkpointing)
        parallel = parallelize(task, cluster, world, torch.device("cpu"))
        batch = make_batch(**CASES[trial.case]).rows(slice(first, first + counts[rank]))
        average = teacher_of(task)
        figures = gradients(parallel, batch, Workers(counts, rank), STEP, trial.micro_batch, average=average)
        out.append(({name: float(value) for name, value in figures.items()}, grads_of(task)))
    return out


def distinct_remote_images(counts, wanted) -> int:
    """How many images the workers must receive, each once."""
    total, first = 0, 0
    for count in counts:
        own = range(first, first + count)
        rows = [i for i in own if wanted["kept"][i]]
        total += len({int(wanted["image_for_text"][i]) for i in rows} - set(own))
        first += count
    return total


EVERY_CASE = [Trial(4, case) for case in ("plain", "one valid row", "no valid row at all")]
EVERY_OBJECTIVE = [Trial(4, objective=o, strategy=s) for o in list(OBJECTIVES)[1:] for s in ("ddp", "fsdp")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "counts, trials",
    [
        ((6, 6), [Trial(6), Trial(4), Trial(6, strategy="fsdp"), Trial(6, dtype=torch.float32)]),
        (
            (5, 7),
            [
                Trial(7), Trial(3), Trial(3, strategy="fsdp"), Trial(5, strategy="fsdp"), Trial(6),
                Trial(3, activation_checkpointing=True), Trial(3, strategy="fsdp", activation_checkpointing=True),
            ],
        ),
        ((4, 4, 4), [Trial(4), Trial(3, strategy="fsdp"), *EVERY_CASE]),
        ((8, 4), EVERY_OBJECTIVE),
        ((3, 5, 4), [Trial(2), Trial(2, strategy="fsdp"), Trial(2, "plain", dtype=torch.float32)]),
        pytest.param(
            (1, 2, 5, 4),
            [
                Trial(5), Trial(2), Trial(2, strategy="fsdp"), Trial(2, strategy="fsdp", dtype=torch.float32),
                Trial(2, activation_checkpointing=True), Trial(2, strategy="fsdp", activation_checkpointing=True),
            ],
            marks=pytest.mark.full,
        ),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_several_workers_equal_the_plain_step(counts, trials):
    """Rows 4 to 7 are not valid: of (4, 4, 4) the second worker has no valid row."""
    results = in_processes(len(counts), worker, counts, trials)
    for i, trial in enumerate(trials):
        wanted, _ = expected(trial.case, trial.objective)
        for rank in range(len(counts)):
            figures, grads = results[rank][i]
            tolerance = 1e-9 if trial.dtype == torch.float64 else 1e-4
            try:
                check(figures, grads, trial.case, trial.objective, tolerance)
            except AssertionError as error:
                raise AssertionError(f"{trial}, worker {rank} of {len(counts)}: {error}") from error
            # only chosen images travel, and none twice to the same worker
            received = distinct_remote_images(counts, wanted) * IMAGE_BYTES
            if "itm" not in wanted:
                continue
            assert figures["exchanged_bytes"] == received <= int(wanted["kept"].sum()) * IMAGE_BYTES
        if trial.case == "plain" and trial.objective == "exact":
            assert received > 0


def bf16_worker(rank, world):
    out = []
    for strategy in ("ddp", "fsdp"):
        task = make_task(torch.float32)
        parallel = parallelize(task, ClusterConfig(strategy=strategy), world, torch.device("cpu"), bf16=True)
        kinds = set()
        attention = task.model.layers[1].attention
        attention.register_forward_hook(lambda module, *_, kinds=kinds: kinds.add(module.qkv.weight.dtype))
        batch = make_batch().rows(slice(6 * rank, 6 * rank + 6))
        figures = gradients(parallel, batch, Workers((6, 6), rank), STEP, 6, bf16=True)
        out.append(({name: float(value) for name, value in figures.items()}, grads_of(task), kinds))
    return out


@pytest.mark.slow
def test_in_bf16_sharded_workers_gather_half_the_bytes_and_agree_with_replicated_ones():
    """Rounding norms, LayerScale and biases to bf16 is all that differs; all gradients are in float32."""
    for (ddp, ddp_grads, whole_kind), (fsdp, fsdp_grads, gathered_kind) in in_processes(2, bf16_worker):
        assert whole_kind == {torch.float32} and gathered_kind == {torch.bfloat16}
        assert fsdp["loss"] == pytest.approx(ddp["loss"], rel=0.01)
        assert all(grad.dtype == torch.float32 for grad in fsdp_grads.values())
        a, b = (torch.cat([grads[name].flatten() for name in sorted(grads)]) for grads in (ddp_grads, fsdp_grads))
        assert F.cosine_similarity(a, b, dim=0) > 0.995
