"""Captions in scripts without spaces between words: split, written and scored by character."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.datasets import save_image
from helpers.tiny import COLOURS, run_script, tiny_model
from hypothesis import given
from hypothesis import strategies as st

import app
import evaluate
import inference
import metrics
import train
from losses import Reward
from model import CaptionModel
from model_file import read_metadata
from readers import Record, load_split
from util import scripts
from util.results import Caption
from util.scripts import is_unspaced, join_words, list_words
from vocabulary import END, START, Vocabulary, split_words

CHINESE = ["一只红色的狗在跑。", "两个人，穿T恤，拿着12个球"]
LINES = {
    "一只狗，在跑。": "一 只 狗 在 跑",
    "穿T恤的12个人": "穿 T 恤 的 12 个 人",
    "iPhone手机和3G": "iPhone 手 机 和 3G",
    "夜の町の通り": "夜 の 町 の 通 り",
    "「ホット・ドッグ」を食べる！": "ホ ッ ト ド ッ グ を 食 べ る",
    "人々が〇を書く": "人 々 が 〇 を 書 く",
    "𠮷野家": "𠮷 野 家",
    "น้ำใส ๒๓ คน": "น้ ำ ใ ส ๒๓ ค น",
    "ស្រី៕": "ស្ រី",
    "လူတစ်": "လူ တ စ်",
    "ﾎｯﾄ": "ﾎ ｯ ﾄ",
    "강아지가 달린다": "강아지가 달린다",
    "लाल गेंद, a dog": "लाल गेंद, a dog",
}


@pytest.mark.parametrize(("text", "words"), LINES.items())
def test_letters_with_their_marks_are_words_and_digits_and_other_words_stay_whole(text, words):
    assert list_words(text) == words.split()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("一 只 dog 和 3 猫", "一只dog和3猫"),
        ("a big dog", "a big dog"),
        ("穿 t shirt 的 人", "穿t shirt的人"),
        ("น้ ำ ใ ส", "น้ำใส"),
        ("", ""),
    ],
)
def test_words_are_joined_with_spaces_only_between_those_of_other_scripts(words, text):
    assert join_words(words.split()) == text


@given(st.text("一只狗のドーงน้ำ12ab, 。"))
def test_a_caption_that_was_split_and_joined_is_split_in_the_same_way(text):
    words = split_words(text, by_character=True)
    assert split_words(join_words(words), by_character=True) == words or any(
        # Two words of another script that only a sign parted stay two, with a space.
        not scripts.is_character(word)
        for word in words
    )
    assert all(scripts.is_character(word) or not scripts.is_unspaced([word]) for word in words)


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (["一只狗"], True),
        (["红球"], True),
        (["夜の町の通り", "a dog", "a cat"], True),
        (["ชายใส่เสื้อสีแดง กำลังเดินอยู่ริมถนน"], True),  # a space between clauses
        (["男の子が走る　海で"], True),
        (["一只 狗 在 草地 上 跑"], False),  # by a tool
        (["ชาย ใส่ เสื้อ สี แดง"], False),
        (["a dog", "강아지가 달린다", "собака", "लाल गेंद"], False),
        (["a dog"] * 200 + ["東京の犬"], False),
        (["a ♥ dog 。、「」"], False),
        ([], False),
    ],
)
def test_the_script_decides_unless_spaces_were_put_between_words(captions, expected):
    assert is_unspaced(captions) == expected


# --- the model's words


def test_a_vocabulary_of_such_captions_is_one_of_characters_and_writes_without_spaces():
    vocabulary = Vocabulary.build(CHINESE, 1)
    assert vocabulary.by_character
    assert {"狗", "t", "恤", "12"} <= set(vocabulary.known)
    ids = vocabulary.encode(CHINESE[1], 30)
    assert (ids[0], ids[-1], len(ids)) == (START, END, 13)
    assert vocabulary.decode(torch.tensor(ids)) == "两个人穿t恤拿着12个球"
    assert vocabulary.list_words(ids)[4:6] == ["t", "恤"]


@pytest.mark.parametrize("captions", [["a dog runs"], ["一只 狗 在 草地 上 跑"], ["लाल गेंद"]])
def test_other_vocabularies_are_as_before(captions, tmp_path):
    vocabulary = Vocabulary.build(captions, 1)
    assert not vocabulary.by_character
    assert vocabulary.known == tuple(sorted(captions[0].split()))
    assert vocabulary.decode(vocabulary.encode(captions[0], 30)) == captions[0]
    vocabulary.save(tmp_path / "words.json")
    assert json.loads((tmp_path / "words.json").read_text()).keys() == {"words"}


def test_files_keep_how_captions_are_split_and_older_ones_split_by_spaces(tmp_path):
    vocabulary = Vocabulary.build(CHINESE, 1)
    vocabulary.save(tmp_path / "words.json")
    assert Vocabulary.load(tmp_path / "words.json") == vocabulary
    older = Vocabulary(vocabulary.known)
    assert older != vocabulary
    assert older.encode("狗狗", 30) == [START, 3, END]
    older.save(tmp_path / "words.json")
    assert Vocabulary.load(tmp_path / "words.json") == older
    model = tiny_model(words=vocabulary.known)
    model.save(tmp_path / "older.safetensors")
    assert "by_character" not in read_metadata(tmp_path / "older.safetensors")
    model.vocabulary = vocabulary
    model.save(tmp_path / "new.safetensors")
    assert CaptionModel.load(tmp_path / "new.safetensors").vocabulary == vocabulary
    assert CaptionModel.load(tmp_path / "older.safetensors").vocabulary == older


def test_attention_is_by_character_and_a_score_is_the_mean_over_characters(tmp_path):
    model = tiny_model(words=["一", "只", "狗", "在", "跑"])
    model.vocabulary = Vocabulary(model.vocabulary.known, by_character=True)
    captioner = inference.Captioner(model)
    save_image(tmp_path / "a.png")
    explained = captioner.explain(tmp_path / "a.png", min_words=3)[0]
    assert explained.text == "".join(explained.words) and len(explained.words) >= 3
    assert len(explained.attention) == len(explained.words)
    assert explained.score == explained.log_prob / (len(explained.words) + 1)
    assert Caption("一只 dog", -4.0).score == -1.0
    assert Caption("a big dog", -4.0).score == -1.0


def test_the_page_gets_a_map_for_each_character():
    maps = np.full((3, 2, 2), 0.25)
    explained = inference.Explained("一只狗", -4.0, ["一", "只", "狗"], maps)
    answer = app.to_json(explained)
    assert (answer["words"], len(answer["attention"])) == (["一", "只", "狗"], 3)
    assert app.to_json(Caption("一只 dog", -4.0))["words"] == ["一", "只", "dog"]


# --- scores


def test_scores_are_by_character_on_both_sides():
    references = {1: ["一只红色的狗。", "一条狗在跑"], 2: ["两个人在打球", "有两个人"]}
    captions = {1: "一只红色的狗", 2: "两人在打球"}

    def spaced(text):
        return " ".join(text.replace("。", ""))

    expected = metrics.score(
        {key: [spaced(each) for each in lines] for key, lines in references.items()},
        {key: spaced(text) for key, text in captions.items()},
    )
    assert metrics.score(references, captions) == expected
    assert expected["BLEU-4"] > 0.5 and expected["CIDEr"] > 1
    assert metrics.score(references, {key: spaced(text) for key, text in captions.items()}) == (
        expected
    )
    pairs = list(references.values()), list(captions.values())
    assert metrics.bleu(*pairs)[3] == expected["BLEU-4"]
    scores = metrics.CiderD(pairs[0]).scores(pairs[1], [0, 1])
    assert math.isclose(scores.mean(), expected["CIDEr"])


def test_captions_that_were_split_by_a_tool_are_scored_by_its_words():
    references = [["一只 红色 的 狗", "一条 狗 在 草地 上 跑"]]
    assert metrics.bleu(references, ["一只 红色 的 狗"])[3] == pytest.approx(1)
    assert metrics.bleu(references, ["一 只 红 色 的 狗"])[0] < 0.5


def test_the_reward_is_the_same_score():
    records = [Record(1, None, ("一只红色的狗。",)), Record(2, None, ("两个人在打球",))]
    vocabulary = Vocabulary.build([each.captions[0] for each in records], 1)
    reward = Reward(records, vocabulary)
    samples = torch.tensor([[vocabulary.encode("一只狗", 9)[1:], [5, 6, END, 0]]])
    words = [["一", "只", "狗"], [vocabulary.words[5], vocabulary.words[6]]]
    assert [reward.to_words(tokens) for tokens in samples[0].tolist()] == [
        [*each, "<end>"] for each in words
    ]
    assert reward.reference_words(0) == [[*"一只红色的狗", "<end>"]]
    assert reward([1], samples)[0, 0] > 0


def test_a_doubled_character_is_no_fault_and_a_doubled_phrase_is_one():
    assert metrics.faults(["人人都慢慢走", "红球"])["repeats"] == 0
    assert metrics.faults(["一只狗一只狗"])["repeats"] == 1
    assert metrics.faults(["a dog and and"])["repeats"] == 1


# --- the scripts


def write_table(folder, captions) -> None:
    """Write 16 images, red and blue, with the two captions."""
    rows = ["image,caption,split"]
    for number, split in enumerate(["train"] * 8 + ["val"] * 4 + ["test"] * 4):
        save_image(folder / f"{number}.png")
        rows.append(f'{number}.png,"{captions[number % 2]}",{split}')
    (folder / "captions.csv").write_text("\n".join(rows), encoding="utf-8")


@pytest.mark.parametrize(
    "captions",
    [CHINESE, ["赤い犬が走る", "青いボールが3個"], ["หมาสีแดงกำลังวิ่ง", "ลูกบอลสีน้ำเงิน"]],
    ids=["Chinese", "Japanese", "Thai"],
)
def test_a_run_learns_such_captions_says_so_writes_them_and_is_scored(captions, tmp_path, capsys):
    write_table(tmp_path / "photos", captions)
    output = tmp_path / "run"
    flags = (*COLOURS, "--data-dir", tmp_path / "photos", "--output", output, "--ema", 0)
    code, out, err = run_script(train, *flags, "--epochs", 2, capsys=capsys)
    assert (code, out.count("split by character, such as")) == (0, 1), err
    words = {word for line in captions for word in split_words(line, True)}
    assert f"{len(words) + 4} words" in out
    written = tmp_path / "captions.json"
    flags = ("--data-dir", tmp_path / "photos", "--captions-json", written, "--min-words", 5)
    flags = ("--checkpoint", output, *flags, "--json", tmp_path / "scores.json", "--workers", 0)
    assert run_script(evaluate, *flags, "--no-java", capsys=capsys)[0] == 0
    given = {row["image_id"]: row["caption"] for row in json.loads(written.read_text())}
    assert all(" " not in text and set(list_words(text)) <= words for text in given.values())
    references = {each.image_id: each.captions for each in load_split(
        "csv", tmp_path / "photos", "test"
    )}  # fmt: skip

    def space(text):
        return " ".join(split_words(text, True))

    expected = metrics.score(
        {name: [space(text) for text in texts] for name, texts in references.items()},
        {name: space(text) for name, text in given.items()},
    )
    report = json.loads((tmp_path / "scores.json").read_text())
    assert {name: report[name] for name in expected} == expected
    again = ("--resume", "--output", output, "--epochs", 3)
    code, out, err = run_script(train, *again, capsys=capsys)
    assert (code, "changed" in err) == (0, False), err


def test_a_model_of_words_learns_characters_with_init_from(tmp_path, capsys):
    write_table(tmp_path / "photos", CHINESE)
    tiny = tiny_model(img_size=32)
    tiny.save(tmp_path / "start.safetensors")
    flags = ("--dataset", "csv", "--init-from", tmp_path / "start.safetensors", "--min-count", 1)
    flags = (*flags, "--data-dir", tmp_path / "photos", "--output", tmp_path / "run")
    code, out, err = run_script(train, *flags, "--epochs", 1, "--workers", 0, capsys=capsys)
    assert code == 0, err
    assert "split by character" in out and "狗 (" in out
    vocabulary = CaptionModel.load(tmp_path / "run").vocabulary
    assert vocabulary.by_character and vocabulary.known[:8] == tiny.vocabulary.known


def test_captions_that_seq_len_truncates_are_counted(tmp_path, capsys):
    write_table(tmp_path / "photos", CHINESE)
    flags = (*COLOURS, "--data-dir", tmp_path / "photos", "--output", tmp_path / "run")
    code, out, err = run_script(train, *flags, "--seq-len", 9, "--epochs", 1, capsys=capsys)
    assert (code, "--seq-len 9 truncates 4 of 8" in out) == (0, True), err


def test_the_example_of_the_documentation_is_scored_by_character(tmp_path):
    """docs/data.md has the table; one of its captions is Japanese."""
    text = Path(train.__file__).with_name("docs").joinpath("data.md").read_text(encoding="utf-8")
    table = text.split("```csv\n")[1].split("```")[0]
    (tmp_path / "captions.csv").write_text(table, encoding="utf-8")
    for line in table.splitlines()[1:]:
        save_image(tmp_path / line.split(",")[0])
    (record,) = load_split("csv", tmp_path, "val")
    assert record.captions == ("夜の町の通り",)
    captions = {record.image_id: "夜の通り"}
    scores = metrics.score({record.image_id: record.captions}, captions)
    assert scores["BLEU-1"] == pytest.approx(math.exp(1 - 6 / 4))  # shorter by two characters
    vocabulary = Vocabulary.build([*record.captions, "a dog runs along the beach"], 1)
    assert vocabulary.decode(vocabulary.encode(record.captions[0], 30)) == "夜の町の通り"
