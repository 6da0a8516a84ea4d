"""The scorer against pycocoevalcap, against itself in another order, and against known numbers."""

import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from nltk.translate.bleu_score import corpus_bleu

import metrics
from metrics import CiderD, bleu, cider_d, faults, java_scores, rouge_l, score
from util import java_metrics
from util.tokenizer import tokenize

VOCABULARY = tokenize("A man's dog runs, the red cat jumps on balls in grass")
EDGE_CASES = {
    "an ordinary pair": ([["a dog runs", "the dog jumps on grass"]], ["a dog jumps"]),
    "an empty candidate": ([["a dog runs"], ["a cat"]], ["", "a cat"]),
    "only empty candidates": ([["a dog runs"], ["a cat"]], ["", ""]),
    "an empty reference": ([["", "a dog"], ["a cat runs"]], ["a dog", "a cat"]),
    "nothing at all": ([[""], [""]], ["", ""]),
    "shorter than four words": ([["a dog"], ["the cat runs on grass"]], ["a dog", "the cat"]),
    "no word in common": ([["a dog runs"], ["the cat"]], ["x y z u v", "w w w w w"]),
    "no four-gram in common": ([["a dog runs on grass"], ["a cat"]], ["a dog on grass runs", "a"]),
    "one image": ([["a dog runs on grass", "a dog"]], ["a dog runs on"]),
    "the same reference five times": ([["a dog runs fast"] * 5, ["a cat"]], ["a dog runs", "a"]),
    "a repeated word": ([["a a a dog"], ["the cat"]], ["a a a a a a", "the the cat"]),
    "very long": ([["a dog runs " * 150], ["the cat " * 90]], ["dog runs a " * 130, "the cat"]),
    "references as near above as below": ([["a b c", "a b c d e"], ["q"]], ["a b c d", "q"]),
}


def random_split(seed: int, images: int = 40) -> tuple[list[list[list[str]]], list[list[str]]]:
    rng = random.Random(seed)

    def caption() -> list[str]:
        return rng.choices(VOCABULARY, k=rng.choice([0, 1, 2, 3, 5, 8, 13, 40]))

    references = [[caption() for _ in range(rng.randint(1, 6))] for _ in range(images)]
    candidates = [rng.choice([caption(), rng.choice(r)]) for r in references]
    return references, candidates


def all_splits():
    for name, (references, candidates) in EDGE_CASES.items():
        split = [[c.split() for c in r] for r in references], [c.split() for c in candidates]
        yield pytest.param(*split, id=name)
    for seed in range(8):
        yield pytest.param(*random_split(seed), id=f"random {seed}")


every_split = pytest.mark.parametrize(("references", "candidates"), list(all_splits()))


def reference_score(scorer, references, candidates, **options):
    wanted = {i: [" ".join(c) for c in r] for i, r in enumerate(references)}
    given = {i: [" ".join(c)] for i, c in enumerate(candidates)}
    return scorer.compute_score(wanted, given, **options)


@pytest.mark.parametrize("seed", range(4))
def test_bleu_equals_nltks(seed):
    """On candidates of four words or more: nltk counts an n-gram for those that have none."""
    pairs = [pair for pair in zip(*random_split(seed), strict=True) if len(pair[1]) >= 4]
    references, candidates = map(list, zip(*pairs, strict=True))
    for n, value in enumerate(bleu(references, candidates), 1):
        assert value == pytest.approx(corpus_bleu(references, candidates, [1 / n] * n), abs=1e-9)


@every_split
def test_bleu_equals_the_reference_scorer(references, candidates):
    scorer = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    corpus, per_image = reference_score(scorer, references, candidates, verbose=0)
    assert bleu(references, candidates) == pytest.approx(corpus, abs=1e-9)
    ours = [bleu([r], [c]) for r, c in zip(references, candidates, strict=True)]
    np.testing.assert_allclose(np.transpose(ours), per_image, atol=1e-9)


@every_split
def test_rouge_l_equals_the_reference_scorer(references, candidates):
    scorer = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge()
    corpus, per_image = reference_score(scorer, references, candidates)
    assert rouge_l(references, candidates) == pytest.approx(corpus, abs=1e-9)
    ours = [rouge_l([r], [c]) for r, c in zip(references, candidates, strict=True)]
    np.testing.assert_allclose(ours, per_image, atol=1e-9)


@every_split
def test_cider_d_equals_the_reference_scorer(references, candidates):
    if not any(word for r in references for c in r for word in c):
        assert cider_d(references, candidates) == 0  # the reference scorer stops with an error
        return
    scorer = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    corpus, per_image = reference_score(scorer, references, candidates)
    assert cider_d(references, candidates) == pytest.approx(corpus, abs=1e-9)
    ours = CiderD(references).scores(candidates, range(len(candidates)))
    np.testing.assert_allclose(ours, per_image, atol=1e-9)


def test_a_batch_of_candidates_scores_like_each_alone():
    references, _ = random_split(1)
    scorer, rng = CiderD(references), random.Random(2)
    images = [rng.randrange(len(references)) for _ in range(200)]
    captions = [rng.choices([*VOCABULARY, "new", "newer"], k=rng.randrange(12)) for _ in images]
    alone = [scorer.scores([c], [i])[0] for c, i in zip(captions, images, strict=True)]
    np.testing.assert_allclose(scorer.scores(captions, images), alone, atol=1e-12)


def test_cider_d_takes_integer_tokens_as_it_takes_words():
    references, candidates = random_split(5)
    numbers = {word: place * 1000 for place, word in enumerate(VOCABULARY)}
    as_numbers = [[[numbers[w] for w in c] for c in r] for r in references]
    assert cider_d(as_numbers, [[numbers[w] for w in c] for c in candidates]) == pytest.approx(
        cider_d(references, candidates), abs=1e-12
    )


def test_the_order_of_images_and_references_changes_no_score():
    references, candidates = random_split(6)
    order = list(range(len(references)))
    random.Random(0).shuffle(order)
    shuffled = [references[i][::-1] for i in order], [candidates[i] for i in order]
    for metric in (bleu, rouge_l, cider_d):
        assert metric(*shuffled) == pytest.approx(metric(references, candidates), abs=1e-12)


def test_perfect_captions_score_one():
    references = {"x.jpg": ["A man rides a red bicycle."], "y.jpg": ["Two dogs play in the snow!"]}
    found = score(references, {k: v[0].upper() for k, v in references.items()})
    assert list(found) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    assert found.pop("CIDEr") == pytest.approx(10)
    assert all(value == pytest.approx(1) for value in found.values())


def test_known_captions_score_the_known_numbers():
    references = {
        1: ["A brown dog runs on the grass.", "The dog is running across a green lawn."],
        2: ["Two children play with a ball.", "Kids playing football in the park."],
        3: ["A man rides a red bicycle.", "A cyclist on a red bike goes down the road."],
    }
    candidates = {3: "a man on a red bike", 1: "A dog runs on the grass", 2: "two kids play a ball"}
    known = {  # pycocoevalcap 1.2 behind its own Java tokeniser
        "BLEU-1": 0.8890097652981863,
        "BLEU-2": 0.7127935618331063,
        "BLEU-3": 0.5899345011939403,
        "BLEU-4": 0.5114901758201374,
        "ROUGE-L": 0.7840602531262135,
        "CIDEr": 2.6254809476397507,
    }
    assert score(references, candidates) == pytest.approx(known, abs=1e-9)


@pytest.mark.parametrize("metric", [bleu, rouge_l, cider_d])
def test_captions_may_be_strings_or_tokens(metric):
    references = [["A dog's toy.", "The dogs!"], ["Two cats sleep, don't they?"]]
    candidates = ["a dog's toys", "two cats"]
    tokens = [[tokenize(line) for line in lines] for lines in references]
    expected = metric(tokens, [tokenize(line) for line in candidates])
    assert metric(references, candidates) == expected
    assert metric(references, [tokenize(candidates[0]), candidates[1]]) == expected
    with pytest.raises(ValueError, match="references of image 0 must be a list"):
        metric(["a dog", "a cat"], candidates)


def test_one_function_and_one_row_add_a_metric(monkeypatch):
    def mean_length(references, candidates):
        return sum(map(len, candidates)) / len(candidates)

    monkeypatch.setitem(metrics.METRICS, ("words",), mean_length)
    found = score({1: ["a dog"], 2: ["a cat"]}, {1: "A dog runs.", 2: "a"})
    assert found["words"] == 2
    assert list(found)[-1] == "words"


def test_one_image_alone_has_no_cider():
    assert score({7: ["a dog runs on grass"]}, {7: "a dog runs on grass"})["CIDEr"] == 0


def test_unlike_image_ids_are_refused_with_the_number_and_an_example():
    with pytest.raises(ValueError, match=r"2 of 3 images have references but no caption, 'b'"):
        score({"a": ["x"], "b": ["x"], "c": ["x"]}, {"a": "x"})
    with pytest.raises(ValueError, match=r"1 captions are of images without references, 9 for one"):
        score({1: ["x"]}, {1: "x", 9: "x"})


def test_empty_input_is_refused():
    with pytest.raises(ValueError, match="nothing to score"):
        score({}, {})
    with pytest.raises(ValueError, match="image 1 must be a list of at least one caption, got"):
        cider_d([[["a"]], []], [["a"], ["b"]])
    with pytest.raises(ValueError, match=r"references of image 4 must be a list .* got 'a dog'"):
        score({4: "a dog"}, {4: "a dog"})


def test_a_wrong_number_of_candidates_is_refused():
    with pytest.raises(ValueError, match="2 images have references, but there are 1 candidates"):
        bleu([[["a"]], [["b"]]], [["a"]])
    with pytest.raises(ValueError, match="needs one image index from 0 to 0"):
        CiderD([[["a"]]]).scores([["a"]], [1])


def test_without_java_each_absent_score_has_its_reason(monkeypatch):
    monkeypatch.setattr(java_metrics.shutil, "which", lambda name: None)
    scores, reasons = java_scores({1: ["a dog"]}, {1: "a dog"})
    assert scores == {}
    assert [reason.split(":")[0] for reason in reasons] == [
        "METEOR not computed",
        "SPICE not computed",
    ]
    assert all("no java on the PATH" in reason for reason in reasons)


def test_without_the_package_the_reason_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(java_metrics.shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(java_metrics.importlib.util, "find_spec", lambda name: None)
    _, reasons = java_scores({1: ["a dog"]}, {1: "a dog"})
    assert all("pip install -r requirements-dev.txt" in reason for reason in reasons)


def test_a_java_that_fails_ends_in_a_line(monkeypatch, tmp_path):
    pytest.importorskip("pycocoevalcap.meteor.meteor")
    if sys.platform == "win32":
        pytest.skip("stands a shell script in for java")
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'Could not create the Java Virtual Machine' >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    scores, reasons = java_scores({1: ["a dog"]}, {1: "a dog"})
    assert "METEOR" not in scores
    assert reasons[0].startswith("METEOR not computed: ") and "Virtual Machine" in reasons[0]


def test_spice_downloads_nothing(monkeypatch):
    spice = pytest.importorskip("pycocoevalcap.spice.spice")
    monkeypatch.setattr(java_metrics, "SPICE_JARS", ("absent.jar",))
    monkeypatch.setitem(metrics.METRICS, ("METEOR",), lambda references, candidates: 0.5)
    monkeypatch.setattr(java_metrics.shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(spice, "get_stanford_models", lambda: pytest.fail("went to download"))
    scores, reasons = java_scores({1: ["a dog"]}, {1: "a dog"})
    assert scores == {"METEOR": 0.5}
    assert len(reasons) == 1 and "absent.jar missing in" in reasons[0]


@pytest.mark.slow
def test_meteor_equals_the_package_and_leaves_no_process():
    pytest.importorskip("pycocoevalcap.meteor.meteor")
    if shutil.which("java") is None:
        pytest.skip("no java on the PATH")
    references = {"b": ["A dog runs on the grass."], "a": ["Two kids play.", "Children playing!"]}
    scores, _ = java_scores(references, {"a": "two children play", "b": "a dog is running"})
    assert scores["METEOR"] == pytest.approx(0.37996314186500457, abs=1e-6)
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "meteor-1.5.jar" not in listed


def test_importing_the_scorer_loads_neither_torch_nor_nltk():
    code = "import sys, metrics; print([m for m in ('torch', 'nltk') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize(
    ("caption", "bad", "repeats"),
    [("a man with a", 1, 0), ("A dog runs in the.", 1, 0), ("a dog runs", 0, 0), ("", 0, 0),
     ("a dog and and a cat", 0, 1), ("a boy in a field in a field", 0, 1),
     ("a black dog and a white dog", 0, 0), ("two men and", 1, 0)],
)  # fmt: skip
def test_faults_are_what_a_reader_would_call_so(caption, bad, repeats):
    assert faults([caption]) == {"bad_endings": bad, "repeats": repeats}


def test_faults_are_shares():
    found = faults(["a man with a", "a dog", "a dog dog", "a cat of"])
    assert found == {"bad_endings": 0.5, "repeats": 0.25}
    assert faults([]) == {"bad_endings": 0, "repeats": 0}
