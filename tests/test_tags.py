"""Tags: the classes that the CNN finds most probable, as words for the decoder to read."""

import pytest
import torch
from helpers.datasets import write_colours
from helpers.tiny import COLOURS, picture, run_script
from safetensors.torch import load_file, save_file

import inference
import train
from config import configure
from decoder import DecoderConfig
from encoder import Encoder
from model import CaptionModel
from tags import HIDDEN, Tagger
from util import plots
from util.files import UserError
from vocabulary import PAD, Vocabulary

ZEBRA, PIZZA = 340, 963  # rows of ImageNet's classes
VOCABULARY = Vocabulary(["a", "zebra", "pizza", "elephant"])


@pytest.fixture
def tagger():
    """Of two channels: one says how likely a zebra is, the other a pizza."""
    torch.manual_seed(0)
    tagger = Tagger(count=2, channels=2, width=8)
    with torch.no_grad():
        tagger.classifier.weight.zero_()
        tagger.classifier.bias.zero_()
        tagger.classifier.weight[ZEBRA, 0] = tagger.classifier.weight[PIZZA, 1] = 1.0
    tagger.set_names(VOCABULARY)
    return tagger.eval()


def test_classes_are_named_by_the_words_that_captions_have(tagger):
    names = {row: tagger.names[row].tolist() for row in (ZEBRA, PIZZA, 386, 0)}
    assert names[ZEBRA] == [VOCABULARY.ids["zebra"], PAD, PAD, PAD]
    assert names[PIZZA][0] == VOCABULARY.ids["pizza"]
    assert names[386] == [VOCABULARY.ids["elephant"], PAD, PAD, PAD]  # African elephant
    assert names[0] == [PAD] * 4  # tench


@torch.no_grad()
def test_the_tags_are_the_words_of_the_most_probable_classes_in_their_order(tagger):
    embedding = torch.nn.Embedding(len(VOCABULARY), 8)
    features = torch.tensor(
        [[[3.0, 1.0], [3.0, 1.0]], [[0.0, 9.0], [4.0, 0.0]]]
    )  # means 3 1, 2 4.5
    tags = tagger(features, embedding) - tagger.position
    words = tagger.norm(embedding.weight * 8**0.5)
    zebra, pizza = words[VOCABULARY.ids["zebra"]], words[VOCABULARY.ids["pizza"]]
    torch.testing.assert_close(tags, torch.stack([zebra, pizza, pizza, zebra]).view(2, 2, 8))


@torch.no_grad()
def test_training_hides_some_tags_whole(tagger):
    embedding, features = torch.nn.Embedding(len(VOCABULARY), 8), torch.rand(500, 1, 2)
    hidden = (tagger.train()(features, embedding) - tagger.position).abs().sum(-1) < 1e-6
    assert abs(hidden.float().mean() - HIDDEN) < 0.06


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {},
            r"file has no classifier of ImageNet's 1000 classes \(fc.weight\), which --tags needs",
        ),
        ({"fc.weight": torch.zeros(1000, 3), "fc.bias": torch.zeros(1000)}, "no classifier"),
        ({"fc.weight": torch.ones(1000, 2) / 0, "fc.bias": torch.ones(1000)}, "no classifier"),
        ({"fc.weight": torch.zeros(1000, 2)}, r"\(fc.bias\)"),
    ],
)
def test_weights_without_a_classifier_are_refused(state, message, tagger):
    with pytest.raises(UserError, match=message):
        tagger.set_classifier(state, "fc", "file")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tags", "5", "--cnn-backbone", "vit_b_16"], "--tags 5 needs a CNN .* from resnet18, "),
        (["--tags", "5", "--cnn-weights", "none"], "--tags 5 needs a CNN that names"),
        (["--tags", "1001"], "--tags 1001 must be a whole number from 0 to 1,000"),
    ],
)
def test_tags_that_cannot_be_are_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        configure(flags)


# --- a run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder with data, weights of a small CNN with its classifier, and a run on them."""
    home = write_colours(tmp_path_factory.mktemp("tags") / "data").parent
    torch.manual_seed(0)
    state = {key: value.contiguous() for key, value in Encoder("resnet18").cnn.state_dict().items()}
    fc = torch.nn.Linear(512, 1000)
    state |= {f"fc.{key}": value for key, value in fc.state_dict().items()}
    save_file(state, home / "cnn.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("learning_curve", "caption_page"):
            patch.setattr(plots, name, lambda *arguments, **options: None)
        train.main(flags(home, "run", "--cnn-weights", str(home / "cnn.safetensors"),
                         "--tags", "2"))  # fmt: skip
    return home


def flags(home, run, *more):
    places = ["--data-dir", home / "data", "--output", home / run, "--cache-dir", home / "cache"]
    small = ["--epochs", "1", "--cnn-backbone", "resnet18"]
    return [*COLOURS, *map(str, places), *small, *more]


def test_a_run_with_tags_has_the_cnns_classifier_and_captions_images(home, tmp_path, capsys):
    state, weights = load_file(home / "run/best.safetensors"), load_file(home / "cnn.safetensors")
    assert state["decoder.tagger.classifier.weight"].equal(weights["fc.weight"])
    assert (state["decoder.tagger.names"] != PAD).any()
    picture(1).save(tmp_path / "photo.png")
    run = [tmp_path / "photo.png", "--checkpoint", home / "run"]
    code, out, _ = run_script(inference, *run, capsys=capsys)
    assert code == 0 and out.strip()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["transformer", "attention-lstm"])
def test_the_attention_over_the_image_sums_to_one_beside_tags(kind):
    config = DecoderConfig(kind, d_model=8, n_head=2, n_decode=1, fc_dim=8, tags=2)
    model = CaptionModel(Encoder("tiny"), config, VOCABULARY, 64).eval()
    memory = model.encode(torch.rand(1, 3, 64, 64))
    assert memory.shape == (1, 4 * 4 + 2, 8)
    maps = model.attention_maps(memory, torch.tensor([[[5, 6, 2]]]))
    assert maps.shape == (1, 1, 3, 4, 4)
    torch.testing.assert_close(maps.sum((-1, -2)), torch.ones(1, 1, 3))


def test_a_run_from_a_model_with_tags_names_its_classes_by_new_words_too(home, monkeypatch):
    for name in ("learning_curve", "caption_page"):
        monkeypatch.setattr(plots, name, lambda *arguments, **options: None)
    write_colours(home / "data", ("train-0.png,zebra zebra,train",))
    train.main(flags(home, "more", "--init-from", str(home / "run")))
    model = CaptionModel.load(home / "more")
    assert model.config.tags == 2
    assert model.decoder.tagger.names[ZEBRA, 0] == model.vocabulary.ids["zebra"]
    assert CaptionModel.load(home / "run").decoder.tagger.names[ZEBRA, 0] == PAD


@pytest.mark.parametrize("value", [-1, 10**6])
def test_a_model_file_whose_tags_have_unknown_words_is_refused(home, tmp_path, value):
    model = CaptionModel.load(home / "run")
    model.decoder.tagger.names[3, 0] = value
    model.save(tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="odd.safetensors is damaged: a tag's name has words"):
        CaptionModel.load(tmp_path / "odd.safetensors")
