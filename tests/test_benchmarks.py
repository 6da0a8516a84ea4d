"""The usual way has the same losses and captions, and the benchmarks run."""

import json
from pathlib import Path

import bench
import busy
import growth
import neighbours
import peer_rows
import peers
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
from vocabulary import END, START

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


def test_work_is_measured_beside_neighbours_that_end_with_it(monkeypatch):
    threads, started, popen = torch.get_num_threads(), [], neighbours.subprocess.Popen
    monkeypatch.setattr(
        neighbours.subprocess, "Popen", lambda *args: started.append(popen(*args)) or started[-1]
    )
    counts = []

    def work() -> None:
        assert started[-1].poll() is None
        counts.append(torch.get_num_threads())

    monkeypatch.setattr(neighbours, "make_work", lambda: {"nothing": work})
    (row,) = neighbours.neighbour_rows(neighbours.Machine(neighbours.CPU, 1))
    assert counts == [1, threads] * 2 and torch.get_num_threads() == threads
    assert row["name"] == f"nothing beside a busy neighbour, {threads} threads against one"
    assert started and all(process.poll() is not None for process in started)


def needs(*packages: str):
    """Skip a test unless the packages of requirements-peers.txt are installed."""
    missing = [name for name in packages if not peer_rows.is_installed(name)]
    reason = f"{', '.join(missing)} not installed (requirements-peers.txt)"
    return pytest.mark.skipif(bool(missing), reason=reason)


@needs("transformers")
def test_a_gpt2_of_transformers_with_our_weights_computes_the_same():
    ours = decoder("transformer")
    gpt2 = peer_rows.build_gpt2(ours)
    tokens = torch.randint(4, 30, (3, 8), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = START
    with torch.no_grad():
        memory = ours.encode(torch.randn(3, 6, 8))
        expected = ours(memory, tokens, torch.arange(3)).logits
        found = gpt2(input_ids=tokens[:, :-1], encoder_hidden_states=memory).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def measure_peers(tmp_path, run, *rows: str) -> dict:
    """Return the report of `peers.py` on a tiny model, which must have compared the results."""
    report = tmp_path / "peers.json"
    peers.main(["--rows", *rows, "--repeats", "1", "--images", "6", "--batch-size", "4",
                "--checkpoint", str(run / "best.safetensors"), "--json", str(report)])  # fmt: skip
    report = json.loads(report.read_text())
    for row in report["rows"]:
        for clock in ("wall", "processor"):
            one = row[clock]
            assert one["ratio"] == pytest.approx(one["peer"] / one["ours"])
    return report


@needs("transformers")
def test_decoding_is_measured_beside_transformers(tmp_path, run, capsys):
    report = measure_peers(tmp_path, run, "greedy", "beam", "sample")
    assert [row["name"] for row in report["rows"]] == [
        f"{method}, {size}"
        for method in ("greedy", "beam 5", "sampling")
        for size in ("batches of 4", "one image")
    ]
    assert "| greedy, one image | transformers |" in capsys.readouterr().out


@needs("transformers")
def test_other_captions_are_not_compared(tmp_path, run, monkeypatch):
    monkeypatch.setattr(peer_rows, "greedy", lambda *args, **_: greedy(*args, max_words=1))
    with pytest.raises(RuntimeError, match="greedy captions differ"):
        measure_peers(tmp_path, run, "greedy")


@needs("onnx", "onnxscript", "onnxruntime", "openvino")
def test_the_cnn_is_measured_beside_other_engines(tmp_path, run):
    report = measure_peers(tmp_path, run, "cnn")
    assert {row["peer"] for row in report["rows"]} == {"onnxruntime", "openvino"}
    assert report["left_out"] == {} and "1 threads" in report["machine"]


def test_rows_without_their_packages_are_left_out_in_one_line(tmp_path, run, capsys, monkeypatch):
    monkeypatch.setattr(peers, "is_installed", lambda name: False)
    monkeypatch.setattr(peer_rows, "PHOTO", (400, 300))
    report = measure_peers(tmp_path, run, "greedy", "reading")
    assert report["left_out"] == {"greedy": ["transformers"]}
    assert {row["peer"] for row in report["rows"]} == {"Pillow", "torchvision"}
    said = capsys.readouterr().err
    assert (
        "greedy: rows that need transformers are left out: pip install -r requirements-peers"
        in said
    )


def test_an_unknown_row_is_named():
    with pytest.raises(UserError, match="no row is called .*dog.*choose from training"):
        bench.main(["--rows", "dog"])
    with pytest.raises(UserError, match="no row is called .*dog.*choose from greedy"):
        peers.main(["--rows", "dog"])
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
