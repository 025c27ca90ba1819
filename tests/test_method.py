"""The method, part by part, against the straight-line oracle (`helpers/oracle.py`), and what it must leave untouched."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM
from transformers.modeling_outputs import MaskedLMOutput

import sctd_ds
from helpers import oracle
from helpers.host_stops import HostStops
from helpers.oracle import Batch, Method, ModernSizes, Sizes
from sctd_ds.method.state import of_tokenizer

PAD, UNK, CLS, SEP, MASK = range(5)
VOCAB, WIDTH, HEADS, POSITIONS = 61, 32, 2, 40
KEPT_IDS = [UNK, CLS, SEP, MASK]

DOUBLE = 1e-9  # relative tolerance in float64; a step through float32 anywhere would cost 1e-7
SINGLE = 1e-3  # and in float32, where small sums of large terms lose digits

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


# Material: models, batches, tables


def bert(layers: int) -> BertForMaskedLM:
    """A tiny float64 BERT in training mode; no parameter, biases and LayerNorms included, is near its default."""
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=48,
        max_position_embeddings=POSITIONS,
        pad_token_id=PAD,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return awake(BertForMaskedLM(config))


def modern(pattern: str) -> ModernBertForMaskedLM:
    """The same of a ModernBERT; its layers are g(lobal) or l(ocal), which is two tokens to each side."""
    config = ModernBertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=len(pattern),
        num_attention_heads=HEADS,
        intermediate_size=48,
        max_position_embeddings=POSITIONS,
        local_attention=4,
        layer_types=[{"g": "full_attention", "l": "sliding_attention"}[kind] for kind in pattern],
        **{f"{name}_token_id": value for name, value in (("pad", PAD), ("cls", CLS), ("sep", SEP), ("bos", CLS), ("eos", SEP))},
    )
    return awake(ModernBertForMaskedLM(config))


def awake(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    # Sharp attention and quiet mixing keep the tokens of a sequence apart in deep layers: which are kept has to matter.
    sharp, quiet = ("query", "key", "Wqkv", "embeddings"), ("value", "dense", "Wi", "Wo")
    scales = {**dict.fromkeys(sharp, 0.5), **dict.fromkeys(quiet, 0.2)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = next((scales[part] for part in name.split(".") if part in scales and parameter.dim() == 2), 0.1)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if name.lower().endswith("norm.weight"):
                parameter.add_(1.0)
    return model.double().train()


def sizes(model: Any) -> Sizes:
    config = model.config
    if isinstance(model, BertForMaskedLM):
        return Sizes(config.num_hidden_layers, config.num_attention_heads, config.layer_norm_eps, config.pad_token_id)
    reach = tuple(config.local_attention // 2 if kind == "sliding_attention" else None for kind in config.layer_types)
    return ModernSizes(config.num_hidden_layers, config.num_attention_heads, config.norm_eps, config.pad_token_id, reach)


@dataclass(frozen=True)
class Case:
    """One shape of the problem. `real` are the real tokens of each row, None where no attention_mask is given."""

    name: str
    layers: int
    length: int
    labels: tuple[int, ...]
    real: tuple[int, ...] | None = None
    drop_ratio: float = 0.5
    table: str = "random"  # random | default (10 everywhere: ties everywhere) | coarse (three values: ties and order)
    types: bool = False
    first_token: int = CLS
    pattern: str | None = None  # of a ModernBERT's layers; None: a BERT
    separator: int | None = None  # rows hold several documents, which attention keeps apart

    def build(self) -> Any:
        return bert(self.layers) if self.pattern is None else modern(self.pattern)

    def batch(self, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        rows = len(self.labels)
        ids = torch.randint(5, VOCAB, (rows, self.length), generator=generator)
        ids[:, 0] = self.first_token
        labels = torch.full_like(ids, oracle.IGNORE)
        mask = torch.ones_like(ids)
        if self.real is None:
            ids[:, self.length // 2] = PAD  # a token like any other, but for its embedding, which is not learned
        for row, count in enumerate(self.labels):
            real = self.length if self.real is None else self.real[row]
            ids[row, real - 1] = SEP
            ids[row, real:] = PAD
            mask[row, real:] = 0
            chosen = 1 + torch.randperm(real - 2, generator=generator)[:count]
            labels[row, chosen] = ids[row, chosen]
            masked = chosen[: math.ceil(0.6 * count)]  # the others stay, so they can be dropped
            ids[row, masked] = MASK
            if self.separator is not None:
                others = (labels[row, 1 : real - 1] == oracle.IGNORE).nonzero().flatten() + 1
                ids[row, others[row % 2 :: 3]] = self.separator
        second = torch.arange(self.length) >= self.length // 2 - torch.arange(rows)[:, None]  # another place in each row
        types = second.long() if self.types and self.pattern is None else None
        return Batch(ids, labels, None if self.real is None else mask, types)

    def scores(self) -> Tensor:
        """The importance table, [V] fp32."""
        generator = torch.Generator().manual_seed(0)
        scores = {
            "random": torch.rand(VOCAB, generator=generator) * 8 + 1,
            "default": torch.full((VOCAB,), 10.0),
            "coarse": torch.randint(1, 4, (VOCAB,), generator=generator).float(),
        }[self.table]
        scores[KEPT_IDS] = oracle.ALWAYS_KEPT
        if self.first_token not in KEPT_IDS:
            scores[self.first_token] = -1.0  # nothing but its position keeps it
        return scores


CASES = [
    Case("plain", 4, 16, (3, 2, 4)),
    Case("one-row-odd-length", 4, 17, (5,)),
    Case("odd-layers-padded", 7, 21, (2, 3, 1), real=(21, 13, 17), types=True),
    Case("fewer-real-tokens-than-kept", 6, 20, (3, 2, 1), real=(20, 7, 4)),
    Case("all-scores-equal", 6, 16, (2, 2), table="default"),
    Case("few-distinct-scores", 12, 33, (4, 5, 3), table="coarse"),
    Case("mask-given-but-full", 4, 18, (2, 6), real=(18, 18), types=True),
    Case("row-without-labels", 6, 17, (3, 0, 2), real=(17, 11, 15)),
    Case("nothing-dropped", 4, 16, (3, 2), real=(16, 9), drop_ratio=0.0),
    Case("three-tenths", 7, 19, (3, 1, 2), real=(19, 19, 8), drop_ratio=0.3, table="coarse"),
    Case("first-token-is-no-cls", 4, 17, (2, 3), first_token=30),
    Case("twelve-layers-padded", 12, 16, (3, 2), real=(16, 6), table="default", types=True),
    Case("modern-every-third-global", 7, 21, (2, 3, 1), real=(21, 13, 17), pattern="gllgllg"),
    Case("modern-cross-global-last-local", 6, 20, (3, 2, 1), real=(20, 7, 4), pattern="lgglll"),
    Case("modern-all-local", 4, 17, (5, 2), table="coarse", pattern="llll"),
    Case("documents", 6, 21, (2, 3, 1), real=(21, 13, 17), separator=SEP),
    Case("documents-unpadded", 4, 16, (3, 2), table="coarse", separator=30),
    Case("modern-documents", 7, 21, (3, 4, 1), real=(21, 13, 17), pattern="gllgllg", separator=SEP),
]


def inputs(batch: Batch) -> dict[str, Tensor]:
    """What the model is called with; what is None is left out."""
    return {name: value for name, value in vars(batch).items() if value is not None}


def reference(model: BertForMaskedLM, case: Case, method: Method) -> oracle.Outcome:
    method = replace(method, drop_ratio=case.drop_ratio, separator=case.separator)
    return oracle.run(model.state_dict(), sizes(model), case.scores(), case.batch(), method)


def assert_same(model: BertForMaskedLM, loss: Tensor, expected: oracle.Outcome, tolerance: float = DOUBLE) -> None:
    """Loss and every parameter's gradient; what cancels to zero may differ by rounding of the largest gradient."""
    assert loss.item() == pytest.approx(expected.loss, rel=tolerance, abs=0)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.gradients.keys()
    atol = tolerance * 1e-2 * max(gradient.abs().max().item() for gradient in expected.gradients.values())
    for name, gradient in expected.gradients.items():
        actual = parameters[name].grad
        actual = torch.zeros_like(gradient) if actual is None else actual.cpu().double()
        torch.testing.assert_close(actual, gradient, rtol=tolerance, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# The oracle itself, against what it can be held against


def blocks(batch: Batch, separator: int) -> Tensor:
    """[B, 1, S, S]: which tokens (columns) a token (row) attends to where documents are kept apart; padding sees itself."""
    real = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    rows = []
    for ids, mask in zip(batch.input_ids.tolist(), real.tolist(), strict=True):
        document = [ids[:place].count(separator) if mask[place] else None for place in range(len(ids))]
        rows.append([[mine == other for other in document] for mine in document])
    return torch.tensor(rows)[:, None]


@pytest.mark.parametrize("case", [case for case in CASES if not (case.pattern and case.separator)], ids=lambda case: case.name)
def test_oracle_dense_pass_is_hugging_faces(case: Case) -> None:
    model = case.build()
    batch = inputs(case.batch())
    if case.separator is not None:
        batch["attention_mask"] = blocks(case.batch(), case.separator)
    out = model(**batch)
    out.loss.backward()
    tolerance = DOUBLE if case.pattern is None else SINGLE  # transformers rotates in fp32
    assert_same(model, out.loss, reference(model, case, Method(mode="dense")), tolerance)


def test_oracle_without_dropped_tokens_is_dense() -> None:
    case = replace(CASES[2], drop_ratio=0.0)
    model = case.build()
    dense, drop, align = (reference(model, case, Method(mode=mode)) for mode in ("dense", "drop", "align"))
    assert drop.loss == pytest.approx(dense.loss, rel=1e-12)
    assert align.loss == pytest.approx(dense.loss, rel=1e-12)
    assert align.kl == pytest.approx(0.0, abs=1e-12)


def test_oracle_selection_on_a_worked_example() -> None:
    table = [0.0, 9.0, 5.0, 5.0, 1.0]
    ids = [4, 2, 1, 3, 2, 4, 1, 0]
    # Position 0 first, then the two 9s (2, 6), then the earliest of the three 5s (1, 3, 4).
    assert oracle.select(table, ids, range(8), 4) == [0, 1, 2, 6]
    assert oracle.select(table, ids, [0, 5], 4) == [0, 5]
    assert [oracle.kept_count(n, ratio) for n, ratio in ((16, 0.5), (17, 0.5), (20, 0.3), (9, 0.0))] == [8, 9, 14, 9]


def test_oracle_divergence_is_torchs() -> None:
    teacher, student = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    expected = torch.nn.functional.kl_div(student.log_softmax(0), teacher.softmax(0), reduction="sum")
    torch.testing.assert_close(oracle.divergence(teacher, student), expected)


def test_oracle_table_on_a_worked_example() -> None:
    micro_batches = [[(1, 2.0), (2, 4.0)], [(1, 6.0), (3, math.nan), (4, 1.0)]]
    after = oracle.updated_table([10.0] * 5, micro_batches, decay=0.5, keep_token_ids=[4])
    assert after == [10.0, 7.0, 7.0, 10.0, 1e4]


ALIGNMENTS = [
    Method(kl_weight=4.0),
    Method(kl_weight=4.0, kl_layers="last"),
    Method(kl_weight=4.0, kl_layers="previous"),
    Method(kl_weight=4.0, kl_layers="previous", objective="released"),
    Method(kl_weight=4.0, objective="released"),
    Method(kl_weight=4.0, align_schedule="spread", interval=2, step=1),
    Method(kl_weight=4.0, align_schedule="spread", interval=2, step=2),
    Method(kl_weight=4.0, align_schedule="spread", interval=3, step=1, objective="released"),
    Method(kl_weight=4.0, align_schedule="spread", interval=1, step=5),
]


def settings_id(method: Method) -> str:
    """Test id: the settings that are not the default."""
    changed = {name: value for name, value in vars(method).items() if value != getattr(Method(), name)}
    return "-".join(f"{name}={value}" for name, value in changed.items())


def test_oracle_settings_all_matter() -> None:
    """No two settings agree within the tolerances the package is held to, so that taking one for another shows."""
    case = CASES[2]
    model = case.build()
    differing = [method for method in ALIGNMENTS if method.interval != 1]  # the interval schedule under another name
    methods = [Method(mode="dense"), Method(mode="drop"), Method(kl_weight=0.0), *differing]
    gradients = [reference(model, case, method).gradients for method in methods]
    for i, j in combinations(range(len(methods)), 2):
        distance = max(
            ((gradients[i][name] - gradients[j][name]).abs().max() / gradients[i][name].abs().max()).item()
            for name in ("cls.predictions.transform.dense.weight", "bert.encoder.layer.2.output.dense.weight")
        )
        assert distance > 10 * SINGLE, (methods[i], methods[j])


def test_oracle_spread_over_every_row_is_the_interval_schedule() -> None:
    case = CASES[7]
    model = case.build()
    interval = reference(model, case, Method(interval=1))
    spread = reference(model, case, Method(interval=1, align_schedule="spread", step=3))
    assert spread.loss == interval.loss


# The package against the oracle


def converted(case: Case, method: Method, **further: object) -> tuple[BertForMaskedLM, oracle.Outcome]:
    """A converted model in the mode of `method`, its table set as `case` says, and what the oracle expects of it."""
    model = case.build()
    expected = reference(model, case, method)
    names = ("interval", "kl_weight", "objective", "kl_layers", "align_schedule")
    chosen = {name: getattr(method, name) for name in names}
    chosen["document_mask"] = False if case.separator is None else case.separator
    config = sctd_ds.ScTDConfig(drop_ratio=case.drop_ratio, keep_token_ids=KEPT_IDS, **chosen, **further)
    assert sctd_ds.convert(model, config) is model
    sctd_ds.importance(model).scores.copy_(case.scores())
    sctd_ds.set_mode(model, method.mode, step=method.step)
    return model, expected


def forward_backward(model: BertForMaskedLM, case: Case) -> Tensor:
    loss = model(**inputs(case.batch())).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("mode", ["dense", "drop"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_dense_and_drop_steps(case: Case, mode: str) -> None:
    model, expected = converted(case, Method(mode=mode))
    assert_same(model, forward_backward(model, case), expected)


@pytest.mark.parametrize("shared_prefix", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("kl_weight", [0.0, 4.0])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_align_step(case: Case, kl_weight: float, shared_prefix: bool) -> None:
    model, expected = converted(case, Method(kl_weight=kl_weight), shared_prefix=shared_prefix)
    assert_same(model, forward_backward(model, case), expected)


@pytest.mark.parametrize("shared_prefix", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("name", ["odd-layers-padded", "fewer-real-tokens-than-kept", "row-without-labels"])
@pytest.mark.parametrize("method", ALIGNMENTS[1:], ids=settings_id)
def test_alignment_settings(method: Method, name: str, shared_prefix: bool) -> None:
    case = next(case for case in CASES if case.name == name)
    model, expected = converted(case, method, shared_prefix=shared_prefix)
    assert_same(model, forward_backward(model, case), expected)


@pytest.mark.parametrize("step", range(1, 5))
def test_every_phase_of_the_spread_schedule(step: int) -> None:
    """In the first of these phases rows 0 .. 2 meet no aligned row."""
    case = CASES[2]
    model, expected = converted(case, Method(kl_weight=4.0, align_schedule="spread", interval=4, step=step))
    assert (expected.ce_full is None) == (step == 1)
    assert_same(model, forward_backward(model, case), expected)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Case, Method, bool]:
    length = draw(st.integers(4, 24))
    real = draw(st.lists(st.integers(3, length), min_size=1, max_size=3))
    labels = [draw(st.integers(0, count - 2)) for count in real]
    labels[0] = max(labels[0], 1)
    layers = draw(st.integers(4, 9))
    case = Case(
        name="drawn",
        layers=layers,
        length=length,
        labels=tuple(labels),
        real=tuple(real) if draw(st.booleans()) else None,
        drop_ratio=draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.95])),
        table=draw(st.sampled_from(["random", "default", "coarse"])),
        types=draw(st.booleans()),
        first_token=draw(st.sampled_from([CLS, 30])),
        pattern=draw(st.none() | st.text("gl", min_size=layers, max_size=layers)),
        separator=draw(st.sampled_from([None, None, SEP])),
    )
    method = Method(
        mode=draw(st.sampled_from(["drop", "align", "align", "align"])),
        kl_weight=3.0,
        objective=draw(st.sampled_from(["paper", "released"])),
        kl_layers=draw(st.sampled_from(["both", "last", "previous"])),
        align_schedule=draw(st.sampled_from(["interval", "spread"])),
        interval=draw(st.integers(1, 4)),
        step=draw(st.integers(1, 9)),
    )
    return case, method, draw(st.booleans())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_any_problem(problem: tuple[Case, Method, bool]) -> None:
    case, method, shared_prefix = problem
    model, expected = converted(case, method, shared_prefix=shared_prefix)
    assert_same(model, forward_backward(model, case), expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("method", [Method(mode="drop"), *ALIGNMENTS], ids=settings_id)
def test_single_precision(method: Method, device: str) -> None:
    """On a GPU this is the path through the Triton kernels."""
    case = CASES[2]
    model, expected = converted(case, method)
    model.float().to(device)
    loss = model(**{name: value.to(device) for name, value in inputs(case.batch()).items()}).loss
    loss.backward()
    assert_same(model, loss, expected, SINGLE)


def test_a_boolean_mask_is_as_good_as_one_of_integers() -> None:
    case = CASES[2]
    model, expected = converted(case, ALIGNMENTS[2])
    batch = inputs(case.batch())
    loss = model(**batch | {"attention_mask": batch["attention_mask"].bool()}).loss
    loss.backward()
    assert_same(model, loss, expected)


@pytest.mark.parametrize("mode", ["dense", "drop", "align"])
def test_a_micro_batch_without_labels_teaches_nothing(mode: str) -> None:
    case = replace(CASES[2], labels=(0, 0, 0))
    model = case.build()
    sctd_ds.convert(model, sctd_ds.ScTDConfig(kl_weight=0.0, keep_token_ids=KEPT_IDS))
    sctd_ds.set_mode(model, mode)
    assert forward_backward(model, case).item() == 0.0
    assert all(p.grad is None or torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_the_mode_of_one_step_does_not_leak_into_the_next() -> None:
    case = CASES[2]
    model, _ = converted(case, Method(kl_weight=0.0))
    for mode in ("align", "drop", "dense", "drop", "align"):
        sctd_ds.set_mode(model, mode)
        model.zero_grad()
        loss = forward_backward(model, case)
        assert_same(model, loss, reference(case.build(), case, Method(mode=mode, kl_weight=0.0)))


@pytest.mark.parametrize("mode", ["dense", "drop", "align"])
@pytest.mark.parametrize("slots", [6, 11])
def test_static_label_slots_change_nothing(mode: str, slots: int) -> None:
    case = CASES[7]
    model, expected = converted(case, Method(mode=mode, kl_weight=0.0), labels_per_row=slots)
    assert_same(model, forward_backward(model, case), expected)


def test_a_separator_comes_from_the_tokenizer_or_is_asked_for() -> None:
    wanted = sctd_ds.ScTDConfig(document_mask=True)
    tokenizer = SimpleNamespace(sep_token_id=SEP)
    assert (
        of_tokenizer(wanted, tokenizer).document_mask == SEP
        and of_tokenizer(sctd_ds.ScTDConfig(), tokenizer).document_mask is False
    )
    with pytest.raises(sctd_ds.ConfigError, match="the tokenizer has no separator"):
        of_tokenizer(wanted, SimpleNamespace(sep_token_id=None))
    with pytest.raises(sctd_ds.ConfigError, match="set it to the separator's id"):
        sctd_ds.convert(bert(4), wanted)


def test_more_labels_than_slots_is_a_nan_loss() -> None:
    model, _ = converted(CASES[2], Method(mode="drop"), labels_per_row=2)
    assert model(**inputs(CASES[2].batch())).loss.isnan()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["drop", "align"])
def test_activation_checkpointing_recomputes_with_the_same_selection(mode: str, reentrant: bool) -> None:
    """The table is turned upside down between forward and backward; a second selection would keep other tokens."""
    case = CASES[2]
    model, expected = converted(case, Method(mode=mode, kl_weight=0.0))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    loss = model(**inputs(case.batch())).loss
    table = sctd_ds.importance(model).scores
    table.copy_(-case.scores())
    loss.backward()
    assert_same(model, loss, expected)


# The importance table


def poisoned(model: BertForMaskedLM, batch: Batch, row: int) -> Batch:
    """The batch with NaN losses in `row` only: token type 1 becomes NaN, and only that row has it."""
    with torch.no_grad():
        model.bert.embeddings.token_type_embeddings.weight[1] = math.nan
    types = torch.zeros_like(batch.input_ids)
    types[row] = 1
    return replace(batch, token_type_ids=types)


def assert_table(model: BertForMaskedLM, expected: list[float]) -> None:
    """Recorded losses are rounded to 2^-20 and the table is fp32."""
    scores = sctd_ds.importance(model).scores
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=2.0**-20)


def test_table_after_several_micro_batches() -> None:
    """Two steps: one update each, from the dropped passes; labels repeat within micro-batches and across them."""
    case = CASES[2]
    model, _ = converted(case, Method(), decay=0.9)
    expected = case.scores().tolist()
    for step in range(2):
        pairs = []
        for seed, mode in enumerate(("drop", "align", "drop")):
            batch = case.batch(seed=10 * step + seed)
            batch.labels[batch.labels > 40] = 40
            batch.labels[(batch.labels >= 0) & (batch.labels < 20)] = UNK  # a pinned id as a label
            outcome = oracle.run(case.build().state_dict(), sizes(model), expected, batch, Method(mode=mode))
            pairs.append(outcome.label_losses)
            sctd_ds.set_mode(model, mode)
            model(**inputs(batch)).loss.backward()
        labels = [label for micro_batch in pairs for label, _ in micro_batch]
        assert UNK in labels and len(set(labels)) < len(labels)
        assert_table(model, expected)  # unchanged until the step is applied
        sctd_ds.importance(model).update()
        expected = oracle.updated_table(expected, pairs, 0.9, KEPT_IDS)
        assert_table(model, expected)
    assert expected[40] != case.scores()[40]


def test_table_does_not_depend_on_the_split_into_micro_batches() -> None:
    case = CASES[2]
    batch = case.batch()
    tables = []
    for parts in ([slice(0, 3)], [slice(0, 1), slice(1, 3)], [slice(2, 3), slice(1, 2), slice(0, 1)]):
        model, _ = converted(case, Method(mode="drop"))
        for part in parts:
            model(**{name: value[part] for name, value in inputs(batch).items()})
        sctd_ds.importance(model).update()
        tables.append(sctd_ds.importance(model).scores)
    for table in tables[1:]:
        torch.testing.assert_close(table, tables[0], rtol=1e-6, atol=0)


def test_nan_losses_leave_the_table_alone() -> None:
    case = CASES[0]
    model, _ = converted(case, Method(mode="drop"))
    model(**inputs(poisoned(model, case.batch(), row=slice(None))))
    sctd_ds.importance(model).update()
    assert torch.equal(sctd_ds.importance(model).scores, case.scores())


def test_nan_losses_of_one_row_hide_no_other() -> None:
    case = CASES[0]
    model, _ = converted(case, Method(mode="drop"), decay=0.5)
    batch = poisoned(model, case.batch(), row=1)
    pairs = reference(model, case, Method(mode="drop")).label_losses  # of the batch without the NaN row's token type
    finite = [pair for pair, row in zip(pairs, (batch.labels != oracle.IGNORE).nonzero()[:, 0], strict=True) if row != 1]
    assert 0 < len(finite) < len(pairs)
    assert model(**inputs(batch)).loss.isnan()
    sctd_ds.importance(model).update()
    assert_table(model, oracle.updated_table(case.scores(), [finite], 0.5, KEPT_IDS))


def test_skipped_step_leaves_the_table_alone() -> None:
    case = CASES[0]
    model, _ = converted(case, Method(mode="drop"))
    forward_backward(model, case)
    sctd_ds.importance(model).discard()
    sctd_ds.importance(model).update()
    assert torch.equal(sctd_ds.importance(model).scores, case.scores())


def test_a_dense_step_of_a_dropping_run_teaches_the_table() -> None:
    case = CASES[0]
    model, _ = converted(case, Method(mode="dense"), decay=0.5)
    pairs = reference(model, case, Method(mode="dense")).label_losses
    model(**inputs(case.batch()))
    sctd_ds.importance(model).update()
    assert_table(model, oracle.updated_table(case.scores(), [pairs], 0.5, KEPT_IDS))


@pytest.mark.parametrize("training", [True, False], ids=["dense method", "evaluation"])
def test_a_dense_model_and_evaluation_teach_the_table_nothing(training: bool) -> None:
    case = CASES[0]
    model, _ = converted(case, Method(mode="dense" if training else "drop"))
    if training:
        sctd_ds.convert(model, sctd_ds.ScTDConfig(method="dense"))
    model.train(training)
    before = sctd_ds.importance(model).scores.clone()
    model(**inputs(case.batch()))
    sctd_ds.importance(model).update()
    assert torch.equal(sctd_ds.importance(model).scores, before)


# Nothing in a step waits for the device


@pytest.mark.parametrize(
    "stop",
    [
        lambda x: x[0].item(),
        lambda x: bool((x > 1).any()),
        lambda x: x[x > 1],
        lambda x: torch.where(x > 1),
        lambda x: x.masked_select(x > 1),
        lambda x: x.index_put((x > 1,), x[:2]),
        lambda x: torch.equal(x, x),
        lambda x: x.tolist(),
        lambda x: x * torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device),
    ],
    ids=["item", "if", "mask", "where", "masked_select", "index_put", "equal", "tolist", "copied-there"],
)
def test_stops_of_the_host_are_noticed(stop: Callable[[Tensor], object]) -> None:
    x = torch.arange(4.0)
    with HostStops() as host:
        stop(x)
    assert len(host.stops) == 1


def test_what_the_host_computes_for_itself_is_no_stop() -> None:
    x = torch.arange(4.0)
    with HostStops() as host:
        factor = torch.tensor(3.0).sqrt()
        if factor.isfinite():
            x.mul_(factor)
    assert not host.stops


@pytest.mark.parametrize("name", ["plain", "mask-given-but-full", "odd-layers-padded"])
@pytest.mark.parametrize(
    "method",
    [Method(mode="dense"), Method(mode="drop"), *ALIGNMENTS],
    ids=lambda method: method.mode if method.mode != "align" else settings_id(method),
)
def test_a_step_never_stops_the_host(method: Method, name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    model, _ = converted(case, method, labels_per_row=6)
    batch = inputs(case.batch())
    with HostStops() as host:
        loss = model(**batch).loss
        loss.backward()
    assert loss.isfinite() and not host.stops


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("method", [Method(mode="drop"), *ALIGNMENTS], ids=settings_id)
def test_a_step_on_a_gpu_never_waits(method: Method, device: str) -> None:
    case = CASES[2]
    model, _ = converted(case, method, labels_per_row=6)
    model.float().to(device)
    batch = {name: value.to(device) for name, value in inputs(case.batch()).items()}
    model(**batch).loss.backward()  # compiles kernels, creates handles and workspaces
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# What the method must leave as it was


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[6]], ids=lambda case: case.name)
def test_evaluation_is_the_untouched_model(case: Case, dtype: torch.dtype) -> None:
    untouched = case.build().to(dtype).eval()
    model, _ = converted(case, Method())
    model.to(dtype)
    if dtype is torch.float64:
        forward_backward(model, case)  # a training step in between leaves no trace
    model.eval()
    batch = inputs(case.batch())
    with torch.no_grad():
        for arguments in (
            batch,
            {k: v for k, v in batch.items() if k != "labels"},
            batch | {"output_hidden_states": True},
        ):
            output, expected = model(**arguments), untouched(**arguments)
            assert type(output) is type(expected) is MaskedLMOutput
            assert output.keys() == expected.keys()
            assert torch.equal(output.logits, expected.logits)
            if "labels" in arguments:
                assert torch.equal(output.loss, expected.loss)
        assert all(map(torch.equal, output.hidden_states, expected.hidden_states))


@pytest.mark.parametrize("mode", ["dense", "drop", "align"])
def test_training_returns_what_it_did(mode: str) -> None:
    case = CASES[0]
    model, expected = converted(case, Method(mode=mode, kl_weight=0.0))
    batch = inputs(case.batch())
    assert type(model(**batch)) is MaskedLMOutput
    assert model(**batch, return_dict=False)[0].item() == pytest.approx(expected.loss, rel=DOUBLE)


def test_conversion_keeps_parameters_and_state_dict() -> None:
    model = bert(4)
    parameters = dict(model.named_parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sctd_ds.convert(model, sctd_ds.ScTDConfig(keep_token_ids=KEPT_IDS))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    now = dict(model.named_parameters())
    assert list(now) == list(parameters) and all(now[name] is parameters[name] for name in now)


def test_a_copy_is_a_model_of_its_own() -> None:
    case = CASES[2]
    model, expected = converted(case, Method(mode="drop"))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    sctd_ds.importance(model).scores.zero_()
    assert_same(copied, forward_backward(copied, case), expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_saved_model_loads_as_a_plain_bert(tmp_path: Path) -> None:
    case = CASES[2]
    model, _ = converted(case, Method())
    forward_backward(model, case)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert type(loaded) is BertForMaskedLM
    saved = model.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    batch = inputs(case.batch())
    with torch.no_grad():  # the loaded tensors are aligned differently, so not bit for bit
        torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_table_stays_single_precision(cast: str) -> None:
    model, _ = converted(CASES[0], Method())
    getattr(model, cast)()
    scores = sctd_ds.importance(model).scores
    assert scores.dtype is torch.float32
    assert torch.equal(scores, CASES[0].scores())


def test_table_starts_at_ten_with_the_special_tokens_on_top() -> None:
    model = sctd_ds.convert(bert(4), sctd_ds.ScTDConfig(keep_token_ids=KEPT_IDS))
    assert torch.equal(sctd_ds.importance(model).scores, CASES[4].scores())


# Refusals


@pytest.mark.parametrize("mode", ["dense", "drop", "align"])
def test_training_without_labels_is_refused(mode: str) -> None:
    model, _ = converted(CASES[0], Method(mode=mode))
    with pytest.raises(ValueError, match="labels"):
        model(input_ids=CASES[0].batch().input_ids)


@pytest.mark.parametrize("mode", ["dense", "drop", "align"])
def test_inputs_embeds_are_refused(mode: str) -> None:
    model, _ = converted(CASES[0], Method(mode=mode))
    embeds = torch.zeros(3, 16, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=embeds, labels=CASES[0].batch().labels)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_too_few_layers_are_refused(layers: int) -> None:
    with pytest.raises(ValueError, match=f"{layers} encoder layers.*at least 4"):
        sctd_ds.convert(bert(layers), sctd_ds.ScTDConfig(keep_token_ids=KEPT_IDS))


def test_unknown_mode_is_refused() -> None:
    model, _ = converted(CASES[0], Method())
    with pytest.raises(ValueError, match="aligned"):
        sctd_ds.set_mode(model, "aligned")
