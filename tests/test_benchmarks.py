"""The usual way has the same losses and captions, and the benchmarks run."""

import json
from pathlib import Path

import bench
import busy
import growth
import pytest
import scale
import streams
import synthetic
import torch
import usual_way

from decoder import DecoderConfig, build_decoder
from decoding import beam_search, greedy
from losses import cross_entropy
from util.files import UserError
from vocabulary import END

SIZES = {"d_model": 16, "n_head": 2, "n_decode": 2, "fc_dim": 32, "seq_len": 9}
SEARCH = {"beam_size": 4, "max_words": 9}


def decoder(kind: str):
    """Return an untrained decoder with weights so large that its captions differ."""
    torch.manual_seed(1)
    model = build_decoder(DecoderConfig(kind, **SIZES), vocabulary=30, channels=8, positions=6)
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(3 if weights.dim() > 1 else 1)
    return model.eval()


def to_lists(decoded) -> list[list[int]]:
    return [line[: line.index(END) + 1] for line in decoded.tokens[:, 0].tolist()]


def test_the_usual_training_step_has_our_loss():
    ours, words = decoder("transformer"), synthetic.vocabulary(26)
    one = synthetic.batch(4, words=words)
    tokens = one.tokens[:, :10]
    inputs = torch.randn(4, 6, 8)
    expected = cross_entropy(ours(ours.encode(inputs), tokens, one.owner).logits, tokens)
    usual = usual_way.UsualTransformer(ours).eval()
    for padded in (tokens, usual_way.pad(tokens, usual_way.PADDED_TO)):
        loss = usual.loss(inputs[one.owner], padded)
        assert float(loss.detach()) == pytest.approx(float(expected.nll / expected.words), abs=1e-4)


def test_the_usual_ways_of_decoding_find_our_captions():
    inputs = torch.randn(12, 6, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours = decoder("transformer")
        usual = usual_way.UsualTransformer(ours).eval()
        fast = greedy(ours, ours.encode(inputs), max_words=9)
        slow = usual_way.greedy(usual, inputs, 9).tolist()
        assert [line[: line.index(END) + 1] for line in slow] == to_lists(fast)
        for kind, way, model in (
            ("transformer", usual_way.transformer_beam, usual),
            ("attention-lstm", usual_way.attention_beam, decoder("attention-lstm")),
        ):
            ours = decoder(kind)
            expected = to_lists(
                beam_search(ours, ours.encode(inputs), **SEARCH, length_penalty=0.7)
            )
            found = [way(model, each, **SEARCH, penalty=0.7) for each in inputs]
            assert found == expected and len({tuple(line) for line in found}) >= 3


def test_the_benchmark_writes_its_table(tmp_path, capsys):
    bench.main(["--rows", "reward", "--repeats", "1", "--json", str(tmp_path / "bench.json")])
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["machine"]
    (row,) = report["rows"]
    assert row.keys() == {"name", "unit", "usual", "ours", "ratio", "target", "met"}
    assert row["ratio"] == pytest.approx(row["ours"] / row["usual"])
    assert "| CIDEr-D reward of 320 samples | captions/s |" in capsys.readouterr().out


def test_an_unknown_row_is_named():
    with pytest.raises(UserError, match="no row is called .*dog.*choose from training"):
        bench.main(["--rows", "dog"])
    with pytest.raises(UserError, match="dog can't be varied; choose from images"):
        growth.main(["--vary", "dog"])


def test_synthetic_captions_are_as_long_as_real_ones():
    lengths = [len(line.split()) for lines in synthetic.captions(400) for line in lines]
    assert sum(lengths) / len(lengths) == pytest.approx(10.8, abs=0.3)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("layout", ["csv", "coco", "none"])
def test_the_scale_of_captions_is_measured_on_what_was_written(layout, tmp_path):
    if layout != "none":
        scale.write(tmp_path / "data", layout, 10)
    found = scale.measure(tmp_path / "data", layout, 10)
    captions = [line for _, _, lines in scale.make_images(10) for line in lines]
    special_tokens = 4
    assert len(captions) == 50
    words = {word for line in captions for word in line.split()}
    assert found["words"] == len(words) + special_tokens
    assert found["peak"] >= 0 and found["record_us"] > 0


def test_streams_are_measured_beside_files(tmp_path, capsys):
    streams.main(["--images", "12", "--shard-size", "5", "--img-size", "32", "--workers", "0",
                  "--json", str(tmp_path / "streams.json")])  # fmt: skip
    rows = json.loads((tmp_path / "streams.json").read_text())
    assert [row["what"] for row in rows] == ["written", "streamed", "from files"]
    assert all(row["images_s"] > 0 for row in rows)
    assert "| streamed | 0 |" in capsys.readouterr().out


def test_overlapping_spans_are_counted_once():
    spans = [(0.0, 2.0), (1.0, 3.0), (1.5, 2.5), (5.0, 6.0)]
    assert busy.sum_covered(spans) == busy.sum_covered(reversed(spans)) == 4.0
    assert busy.sum_covered([]) == 0.0
