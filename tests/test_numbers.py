"""The same numbers whatever the workers, the batch and the cache, and the reference scorer's."""

import time

import pytest
import torch
from helpers.tiny import SMALL, assert_same_run, losses, picture, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import metrics
import train
from dataset import CaptionDataset, get_loader
from decoding import DecodingConfig, decode, to_captions
from encoder import image_transform
from features import cached_features
from losses import cross_entropy
from readers import Record

LINES = ("a red circle", "a blue square on a dog", "café", "zebra a a a")


def test_the_number_of_workers_changes_nothing_of_a_run(drawn, tmp_path):
    for workers in ("0", "2"):
        argv = [*SMALL, "--data-dir", str(drawn), "--output", str(tmp_path / workers)]
        train.main([*argv, "--workers", workers, "--limit", "8", "--epochs", "1"])
    assert_same_run(tmp_path / "2", tmp_path / "0")
    assert losses(tmp_path / "2") == losses(tmp_path / "0")


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[Record]:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        picture(number).save(folder / f"{number}.png")
    return [Record(f"{n}.png", folder / f"{n}.png", LINES) for n in range(12)]


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["transformer", "lstm", "attention-lstm"])
def test_float16_features_give_what_float32_ones_give(decoder, records, tmp_path):
    """The loss within 0.5 %, a caption's log-probability within 0.05, and the same words."""
    model = tiny_model(decoder=decoder).eval()
    cache = cached_features(records, model.encoder, 64, tmp_path, "test", workers=0)
    transform = image_transform(64, train=False)
    said = []
    for how in ({"features": cache}, {"transform": transform}):
        dataset = CaptionDataset(records, model.vocabulary, model.config.seq_len, **how)
        (batch,) = get_loader(dataset, len(records))
        loss = cross_entropy(model(batch.inputs, batch.tokens, batch.owner).logits, batch.tokens)
        memory, longest = model.encode(batch.inputs), model.config.seq_len
        decoded = decode(model.decoder, memory, DecodingConfig(), longest=longest)
        said.append((loss, to_captions(model.vocabulary, decoded), batch.inputs.dtype))
    (half, ours, small), (full, theirs, large) = said
    assert (small, large) == (torch.float16, torch.float32)
    assert float(half.objective) == pytest.approx(float(full.objective), rel=5e-3)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[0].text == other[0].text
        assert mine[0].log_prob == pytest.approx(other[0].log_prob, abs=0.05)


# --- the scorer, on captions that mean no good

ODD = st.sampled_from(
    ["", "a", "A", "dog", "dogs", "the", "runs", "...", "!?", ",", "-", "'", '"', "()", "a" * 50,
     "狗", "कुत्ता", "🐶", "é", "e\u0301", "ß", "ﬁ", "\u200d", "\u202e", "0", "1,000", "\t"]
)  # fmt: skip
CAPTION = st.lists(ODD, max_size=12).map(" ".join) | st.text(max_size=20)
SPLIT = st.lists(
    st.tuples(st.lists(CAPTION, min_size=1, max_size=4), CAPTION), min_size=2, max_size=5
)


@given(SPLIT)
def test_adversarial_captions_score_as_in_the_reference_scorer(split):
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge()
    cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    references = [[metrics.tokenize(line) for line in lines] for lines, _ in split]
    candidates = [metrics.tokenize(line) for _, line in split]
    wanted = {i: [" ".join(line) for line in lines] for i, lines in enumerate(references)}
    given_ = {i: [" ".join(line)] for i, line in enumerate(candidates)}
    expected, _ = bleu.compute_score(wanted, given_, verbose=0)
    assert metrics.bleu(references, candidates) == pytest.approx(expected, abs=1e-9)
    assert metrics.rouge_l(references, candidates) == pytest.approx(
        rouge.compute_score(wanted, given_)[0], abs=1e-9
    )
    if any(map(any, references)):  # of no words at all the reference scorer makes an error
        assert metrics.cider_d(references, candidates) == pytest.approx(
            cider.compute_score(wanted, given_)[0], abs=1e-9
        )


@settings(max_examples=10)
@given(
    st.lists(ODD.filter(bool), min_size=1, max_size=3), st.sampled_from(["", " ", ".", "-", "'"])
)
def test_a_caption_of_thousands_of_signs_is_cut_in_a_moment(parts, joint):
    start = time.process_time()
    metrics.tokenize((joint.join(parts) + joint) * (10_000 // len(joint.join(parts) + joint)))
    assert time.process_time() - start < 3
